from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from rich.console import Console

from ich_prep.build_dataset import build
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.windows import Window
from ich_prep.errors import TrainError, UsageError
from ich_prep.phantom import synthesize
from ich_train.checkpoint import load_model
from ich_train.config import EvalConfig, TrainConfig
from ich_train.evaluation.evaluate import evaluate_run
from ich_train.ranks import Ranks
from ich_train.resume import restore
from ich_train.runs import Epoch, read_history, settings_of
from ich_train.session import prepare
from ich_train.split import split_rows
from ich_train.train import Result, learning_rate, step_seed, train
from tests.support.sealing import replace_table
from tests.support.slow_reads import interrupt_at_read
from tests.support.training_runs import rewrite_meta

TIMES = {"seconds", "slices_per_s", "wait_share"}
QUICK = EvalConfig(bootstrap=20)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
# Chance is each process's own, and each compiled network's: where two runs are compared, it is left out.
STILL = {
    "flip": False,
    "rotation_degrees": 0.0,
    "zoom": 0.0,
    "shift": 0.0,
    "window_jitter": 0.0,
    "noise": 0.0,
    "dropout": 0.0,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dataset(twelve: Path) -> Dataset:
    return open_dataset(twelve)


def settings(**changed: Any) -> TrainConfig:
    return TrainConfig.model_validate({"epochs": 2, "batch_size": 8, "device": "cpu"} | changed)


def quiet_train(dataset: Dataset, out: Path, of: TrainConfig, *, resume: bool = False) -> tuple[Result, str]:
    """The result and what was printed; most tests are about the training and save themselves the evaluation."""
    text = io.StringIO()
    result = train(dataset, out, of, None, console=Console(file=text, width=200), resume=resume)
    return result, text.getvalue()


def lessons(history: tuple[Epoch, ...] | list[Epoch]) -> list[dict[str, float]]:
    """What a history says of the learning, the times left out."""
    return [{key: value for key, value in asdict(line).items() if key not in TIMES} for line in history]


def test_a_run_leaves_what_it_promises(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "run"
    text = io.StringIO()
    result = train(dataset, out, settings(epochs=3), QUICK, console=Console(file=text, width=200))
    printed = text.getvalue()
    assert result.finished
    assert result.metrics is not None
    assert [line.epoch for line in result.history] == [1, 2, 3]
    assert read_history(out) == list(result.history)
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert all(0 <= line.wait_share <= 1 and line.slices_per_s > 0 for line in result.history)
    for name in ("recipe.toml", "best/model.safetensors", "last/state.pt", "metrics.json", "report.html"):
        assert (out / name).is_file(), name
    assert not (out / "best" / "state.pt").exists()
    best = min(result.history, key=lambda line: line.val_loss)
    meta = load_model(out / "best", "cpu").meta
    assert (meta.epoch, meta.val_loss) == (best.epoch, best.val_loss)
    assert meta.dataset_digest == dataset.digest
    assert load_model(out / "last", "cpu").meta.epoch == 3
    outline, *lines = printed.splitlines()
    train_rows = split_rows(dataset, val_fold=0, test_fold=1, allow_series_labels=False).train
    assert outline.startswith(f"Training baseline in float32 on cpu: {len(train_rows):,} slices, ")
    for line in lines[:3]:
        assert "training loss" in line
        assert "waiting for data" in line
    assert "lowest validation loss" in printed


def test_the_label_table_is_read_once(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_table = Dataset.read_table

    def counted(self: Dataset, name: str, columns: Any = None) -> pa.Table:
        read.append(name)
        return read_table(self, name, columns)

    monkeypatch.setattr(Dataset, "read_table", counted)
    of = settings(epochs=1, context=1, sampling="balanced")
    train(dataset, tmp_path / "run", of, QUICK, console=Console(file=io.StringIO()))
    assert read.count("slices") == 1


def test_the_seed_decides_the_run(dataset: Dataset, tmp_path: Path) -> None:
    of = {seed: quiet_train(dataset, tmp_path / f"{seed}", settings(seed=int(seed)))[0] for seed in (1.0, 1.5, 2)}
    assert lessons(of[1.0].history) == lessons(of[1.5].history)
    assert lessons(of[1.0].history) != lessons(of[2].history)


@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_a_stopped_run_resumes_exactly(twelve: Path, tmp_path: Path, sampling: str) -> None:
    of = settings(epochs=3, sampling=sampling, order="windowed", model="baseline", seed=4)
    whole, _ = quiet_train(open_dataset(twelve), tmp_path / "whole", of)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopping = open_dataset(twelve)
    interrupt_at_read(stopping, 50)
    stopped, _ = quiet_train(stopping, tmp_path / "stopped", of)
    assert not stopped.finished
    assert 0 < len(stopped.history) < 3
    state = torch.load(tmp_path / "stopped" / "last" / "state.pt", weights_only=True)
    assert state["step"] > 0, "the stop was meant to fall into the middle of an epoch"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed, printed = quiet_train(open_dataset(twelve), tmp_path / "stopped", of, resume=True)
    assert f"in epoch {len(stopped.history) + 1}, after {state['step']} of its steps" in printed
    assert resumed.finished
    assert lessons(resumed.history) == lessons(whole.history)
    for folder in ("best", "last"):
        name = f"{folder}/model.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    again, _ = quiet_train(open_dataset(twelve), tmp_path / "stopped", of, resume=True)
    assert again.finished
    assert again.history == resumed.history


def test_an_unfinished_run_that_was_evaluated_is_evaluated_again_at_its_end(twelve: Path, tmp_path: Path) -> None:
    stopping = open_dataset(twelve)
    interrupt_at_read(stopping, 50)
    assert not quiet_train(stopping, tmp_path / "run", settings(epochs=3))[0].finished
    (tmp_path / "run" / "metrics.json").write_text('{"evaluated": {"subset": "val"}}', encoding="utf-8")
    console = Console(file=io.StringIO())
    result = train(open_dataset(twelve), tmp_path / "run", settings(epochs=3), QUICK, console=console, resume=True)
    assert result.metrics is not None
    assert result.metrics["evaluated"]["subset"] == "test"


def test_a_run_last_evaluated_on_another_dataset_is_evaluated_again_on_its_own(
    twelve_tree: Path, dataset: Dataset, tmp_path: Path
) -> None:
    run, console = tmp_path / "run", Console(file=io.StringIO())
    train(dataset, run, settings(epochs=1), QUICK, console=console)
    build(twelve_tree, tmp_path / "other.zarr", Spec(size=32, slices_per_shard=32, folds=3), workers=0)
    evaluate_run(run, open_dataset(tmp_path / "other.zarr"), QUICK)
    resumed = train(dataset, run, settings(epochs=1), QUICK, console=console, resume=True)
    assert resumed.metrics is not None
    assert resumed.metrics["dataset"]["digest"] == dataset.digest
    again = train(dataset, run, settings(epochs=1), QUICK, console=console, resume=True)
    assert again.metrics is None, "there was nothing left to evaluate"


def test_a_run_goes_on_without_the_weights_that_it_began_with(twelve: Path, tmp_path: Path) -> None:
    quiet_train(open_dataset(twelve), tmp_path / "first", settings(epochs=1))
    weights = tmp_path / "weights.safetensors"
    shutil.copy(tmp_path / "first" / "best" / "model.safetensors", weights)
    of = settings(epochs=3, weights=weights)
    whole, _ = quiet_train(open_dataset(twelve), tmp_path / "whole", of)
    stopping = open_dataset(twelve)
    interrupt_at_read(stopping, 50)
    assert not quiet_train(stopping, tmp_path / "stopped", of)[0].finished
    weights.unlink()
    resumed, _ = quiet_train(open_dataset(twelve), tmp_path / "stopped", of, resume=True)
    assert lessons(resumed.history) == lessons(whole.history)


def test_a_run_goes_on_in_the_precision_of_another_device(twelve: Path, tmp_path: Path) -> None:
    """A run of ``precision = "auto"`` has no loss scaling in bfloat16, and has it on a GPU that knows float16 alone."""
    stopping = open_dataset(twelve)
    interrupt_at_read(stopping, 50)
    assert not quiet_train(stopping, tmp_path / "run", settings(epochs=3))[0].finished
    alone = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    session = prepare(open_dataset(twelve), settings(epochs=3, precision="float16"), alone, weights=None)
    restore(session, torch.load(tmp_path / "run" / "last" / "state.pt", weights_only=True))
    assert session.step.scaler.is_enabled()
    assert session.history


def test_a_run_that_was_stopped_on_a_gpu_goes_on_without_one(twelve: Path, tmp_path: Path) -> None:
    of = settings(epochs=3, seed=4)
    whole, _ = quiet_train(open_dataset(twelve), tmp_path / "whole", of)
    stopping = open_dataset(twelve)
    interrupt_at_read(stopping, 50)
    assert not quiet_train(stopping, tmp_path / "stopped", of)[0].finished
    place = tmp_path / "stopped" / "last" / "state.pt"
    state = torch.load(place, weights_only=True)
    assert state["step"] > 0, "the stop was meant to fall into the middle of an epoch"
    for group in state["optimizer"]["param_groups"]:  # as a recorded step leaves them
        group |= {"lr": torch.tensor(group["lr"]), "capturable": True}
    torch.save(state, place)
    digest = hashlib.sha256(place.read_bytes()).hexdigest()
    rewrite_meta(tmp_path / "stopped", lambda meta: meta["digests"].update({place.name: digest}), checkpoint="last")
    resumed, _ = quiet_train(open_dataset(twelve), tmp_path / "stopped", of, resume=True)
    assert lessons(resumed.history) == lessons(whole.history)


def command(*options: object) -> list[str]:
    return ["-m", "ich_train", "run", *map(str, options)]


def recipe_of(tmp_path: Path, **changed: Any) -> Path:
    from ich_train.config import recipe_text

    recipe = tmp_path / "recipe.toml"
    of = settings(**changed).model_dump()
    recipe.write_text(recipe_text({"train": of, "eval": QUICK.model_dump()}), encoding="utf-8")
    return recipe


def test_a_killed_run_goes_on_from_its_last_epoch(twelve: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, epochs=4, data=twelve)
    whole, _ = quiet_train(open_dataset(twelve), tmp_path / "whole", settings(epochs=4, data=twelve))
    killed = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, *command("--recipe", recipe, "--out", killed)],
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 2/4: training loss"):
                process.send_signal(signal.SIGKILL)
                break
        process.stderr.read()
    assert process.returncode == -signal.SIGKILL
    assert 2 <= len(read_history(killed)) < 4
    resumed, _ = quiet_train(open_dataset(twelve), killed, settings(epochs=4, data=twelve), resume=True)
    assert lessons(resumed.history) == lessons(whole.history)


def test_a_run_killed_before_its_first_checkpoint_begins_again(dataset: Dataset, tmp_path: Path) -> None:
    whole, _ = quiet_train(dataset, tmp_path / "whole", settings())
    early = tmp_path / "early"
    early.mkdir()
    (early / "recipe.toml").write_bytes((tmp_path / "whole" / "recipe.toml").read_bytes())
    resumed, _ = quiet_train(dataset, early, settings(), resume=True)
    assert lessons(resumed.history) == lessons(whole.history)


def test_a_run_without_its_last_checkpoint_is_not_started_again(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "run"
    quiet_train(dataset, out, settings(epochs=2))
    shutil.rmtree(out / "last")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        UsageError, match=r"has trained 2 epochs, but .*/last is missing\. Restore that folder, or start"
    ):
        quiet_train(dataset, out, settings(epochs=2), resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_killed_between_its_first_two_checkpoints_repeats_the_epoch(dataset: Dataset, tmp_path: Path) -> None:
    whole, _ = quiet_train(dataset, tmp_path / "whole", settings())
    killed = tmp_path / "killed"
    quiet_train(dataset, killed, settings(epochs=1))
    (killed / "recipe.toml").write_bytes((tmp_path / "whole" / "recipe.toml").read_bytes())
    shutil.rmtree(killed / "last")
    resumed, _ = quiet_train(dataset, killed, settings(), resume=True)
    assert lessons(resumed.history) == lessons(whole.history)


def test_a_finished_run_says_so_and_is_left_alone(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, _ = quiet_train(dataset, out, settings(epochs=1))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again, printed = quiet_train(dataset, out, settings(epochs=1), resume=True)
    assert printed == f"{out} is already finished: nothing to do.\n"
    assert again == first
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    text = io.StringIO()
    evaluated = train(dataset, out, settings(epochs=1), QUICK, console=Console(file=text, width=200), resume=True)
    assert text.getvalue() == f"{out} is already finished: only its evaluation is left.\n"
    assert evaluated.metrics is not None


def torchrun(*options: object) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.Popen([*launcher, *command(*options)], stderr=subprocess.PIPE, text=True, env=ONE_THREAD)


def with_unknown_labels(path: Path, copy: Path) -> Path:
    """A copy of the dataset in which two of three slices, drawn, have a label for any only."""
    shutil.copytree(path, copy)
    slices = open_dataset(path).slices
    bare = pa.array(np.random.default_rng(0).random(len(slices)) < 2 / 3)
    for name in RSNA_CLASSES[:-1]:
        values = pc.if_else(bare, pa.scalar(None, pa.int8()), slices[name])
        slices = slices.set_column(slices.schema.get_field_index(name), slices.schema.field(name), values)
    replace_table(copy, "slices", slices)
    return copy


@pytest.mark.parametrize("unknown", [False, True])
def test_two_processes_learn_what_one_learns_from_both_shares(twelve: Path, tmp_path: Path, unknown: bool) -> None:
    path = with_unknown_labels(twelve, tmp_path / "data.zarr") if unknown else twelve
    one, _ = quiet_train(open_dataset(path), tmp_path / "one", settings(batch_size=16, data=path, **STILL))
    recipe = recipe_of(tmp_path, batch_size=8, data=path, **STILL)
    with torchrun("--recipe", recipe, "--out", tmp_path / "two") as process:
        _, printed = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert printed.count("epoch 2/2: training loss") == 1
    assert (tmp_path / "two" / "metrics.json").is_file()
    for alone, together in zip(lessons(one.history), lessons(read_history(tmp_path / "two")), strict=True):
        assert together == pytest.approx(alone, rel=1e-3)


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(twelve: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, epochs=4, batch_size=4, data=twelve)
    with torchrun("--recipe", recipe, "--out", tmp_path / "whole") as process:
        process.communicate(timeout=240)
    with torchrun("--recipe", recipe, "--out", tmp_path / "stopped") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 1/4: training loss"):
                process.send_signal(signal.SIGINT)
                break
        assert "ich-train run --resume" in process.stderr.read()
    assert 1 <= len(read_history(tmp_path / "stopped")) < 4
    with torchrun("--resume", "--out", tmp_path / "stopped") as process:
        _, printed = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    for whole, resumed in zip(
        lessons(read_history(tmp_path / "whole")), lessons(read_history(tmp_path / "stopped")), strict=True
    ):
        assert resumed == pytest.approx(whole, rel=1e-9)


def test_hu_windowed_on_the_device_teach_what_windows_teach(
    twelve_tree: Path, dataset: Dataset, tmp_path: Path
) -> None:
    build(twelve_tree, tmp_path / "hu.zarr", Spec(size=32, store="hu", slices_per_shard=16, folds=3), workers=0)
    of = settings(epochs=1, context=1, **STILL)
    windows, _ = quiet_train(dataset, tmp_path / "windows", of)
    hu, _ = quiet_train(open_dataset(tmp_path / "hu.zarr"), tmp_path / "hu", of)
    assert lessons(hu.history) == lessons(windows.history)
    assert load_model(tmp_path / "hu" / "best", "cpu").meta.channels == 9
    named = settings(epochs=1, windows=["stroke", "blood=75/215"])
    quiet_train(open_dataset(tmp_path / "hu.zarr"), tmp_path / "named", named)
    meta = load_model(tmp_path / "named" / "best", "cpu").meta
    assert meta.windows[1] == Window("blood", center=75.0, width=215.0)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns(dataset: Dataset, tmp_path: Path, precision: str) -> None:
    result, _ = quiet_train(dataset, tmp_path / "run", settings(precision=precision, loss="rsna"))
    assert result.history[1].train_loss < result.history[0].train_loss


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler, about torch itself
def test_a_compiled_network_learns_the_same(dataset: Dataset, tmp_path: Path) -> None:
    plain, _ = quiet_train(dataset, tmp_path / "plain", settings(**STILL))
    compiled, _ = quiet_train(dataset, tmp_path / "compiled", settings(compile=True, **STILL))
    for one, other in zip(lessons(plain.history), lessons(compiled.history), strict=True):
        assert other == pytest.approx(one, rel=1e-2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 5000}, "at least one batch of 5,000 slices for 1 process; found"),
        ({"windows": ["brain"]}, "Leave them out"),
        ({"model": "resnet19"}, "Did you mean 'resnet18'"),
        ({"val_fold": 7}, "No slices for val"),
        ({"device": "quantum"}, "quantum"),
        ({"weights": "nowhere.pth"}, r"nowhere\.pth"),
    ],
)
def test_invalid_settings_leave_no_folder(
    dataset: Dataset, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        quiet_train(dataset, tmp_path / "run", settings(**changed))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="lower learning_rate"):
        quiet_train(dataset, tmp_path / "run", settings(learning_rate=1e30, warmup_epochs=0))


def test_a_run_does_not_go_on_with_another_dataset(twelve_tree: Path, dataset: Dataset, tmp_path: Path) -> None:
    quiet_train(dataset, tmp_path / "run", settings(epochs=1))
    build(twelve_tree, tmp_path / "other.zarr", Spec(size=32, slices_per_shard=32, folds=3), workers=0)
    with pytest.raises(TrainError, match="--data"):
        quiet_train(open_dataset(tmp_path / "other.zarr"), tmp_path / "run", settings(epochs=1), resume=True)


def test_a_run_does_not_go_on_with_an_edited_recipe(dataset: Dataset, tmp_path: Path) -> None:
    quiet_train(dataset, tmp_path / "run", settings(epochs=1))
    recipe = tmp_path / "run" / "recipe.toml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("\nseed = 0\n", "\nseed = 5\n"), encoding="utf-8")
    edited, _ = settings_of(tmp_path / "run")
    with pytest.raises(UsageError, match=r"seed \(was 0, now 5\)"):
        quiet_train(dataset, tmp_path / "run", edited, resume=True)


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    rates = [learning_rate(step, peak=0.1, warmup_steps=10, all_steps=100) for step in range(101)]
    assert (np.diff(rates[:11]) > 0).all()
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[0] == pytest.approx(0.1 / 11)
    assert rates[10] == max(rates) == 0.1
    assert rates[55] == pytest.approx(0.05)
    assert rates[100] == pytest.approx(0)


def test_every_step_has_a_seed_of_its_own() -> None:
    places = [
        (seed, epoch, step, rank) for seed in range(3) for epoch in range(3) for step in range(9) for rank in (0, 1)
    ]
    seeds = {step_seed(seed, epoch=epoch, step=step, rank=rank) for seed, epoch, step, rank in places}
    assert len(seeds) == len(places)


@pytest.fixture(scope="module")
def sixty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sixty")
    synthesize(folder / "rsna", series=60, size=128, workers=0)
    build(folder / "rsna", folder / "data.zarr", Spec(size=128), workers=0)
    return folder / "data.zarr"


def held_out_aucs(path: Path, out: Path, seed: int) -> dict[str, float]:
    """The area under the ROC curve of each label on held-out patients, after a run with nothing but defaults."""
    result = train(
        open_dataset(path), out, TrainConfig(seed=seed), EvalConfig(bootstrap=0), console=Console(stderr=True)
    )
    assert result.metrics is not None
    return {name: entry["roc_auc"] for name, entry in result.metrics["by_slice"]["labels"].items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_baseline_learns_the_phantom_in_ten_epochs(sixty: Path, tmp_path: Path, seed: int) -> None:
    aucs = held_out_aucs(sixty, tmp_path / "run", seed)
    assert aucs["any"] >= 0.90
    assert min(aucs.values()) >= 0.75, aucs


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_shuffled_labels_there_is_nothing_to_learn(sixty: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data.zarr"
    shutil.copytree(sixty, copy)
    slices = open_dataset(sixty).slices
    train_rows = np.flatnonzero(pc.equal(slices["subset"], "train").to_numpy())
    source = np.arange(len(slices))
    source[train_rows] = np.random.default_rng(0).permutation(train_rows)
    for name in RSNA_CLASSES:
        slices = slices.set_column(slices.schema.get_field_index(name), name, slices[name].take(pa.array(source)))
    replace_table(copy, "slices", slices)
    aucs = held_out_aucs(copy, tmp_path / "run", seed=0)
    assert 0.4 <= aucs["any"] <= 0.6
    # A subtype has a dozen positives here: only their mean is that certain.
    assert 0.4 <= np.mean(list(aucs.values())) <= 0.6


def test_of_two_that_resume_one_run_one_trains_and_the_other_says_so(twelve: Path, tmp_path: Path) -> None:
    """The first is stopped, as by Ctrl-Z, while it holds the run."""
    out = tmp_path / "run"
    quiet_train(open_dataset(twelve), out, settings(epochs=1, data=twelve))
    recipe = recipe_of(tmp_path, epochs=2, data=twelve)
    words = [sys.executable, *command("--recipe", recipe, "--out", out, "--resume")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ONE_THREAD) as first:
        assert first.stderr is not None
        printed = next(line for line in first.stderr if line.startswith("Training"))
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run(words, capture_output=True, text=True, env=ONE_THREAD, check=False)
        first.send_signal(signal.SIGCONT)
        printed += first.stderr.read()
    assert second.returncode == 1
    assert second.stderr == (
        f"Error: Another process trains the run in {out}. Wait for it, or stop it, then run this command again.\n"
    )
    assert first.returncode == 0, printed
    assert len(read_history(out)) == 2
