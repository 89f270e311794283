"""Each knob of a training run does what it says, and nothing when it is off."""

from __future__ import annotations

import copy
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.errors import UsageError
from ich_train.averaging import averaged
from ich_train.checkpoint import load_model, read_meta
from ich_train.config import EvalConfig, TrainConfig
from ich_train.evaluation.evaluate import evaluate_run
from ich_train.evaluation.metrics import roc_aucs
from ich_train.loss import cross_entropy, elementwise_loss, loss_sums
from ich_train.predict import Mirrored, load_predictor, predict_rows
from ich_train.preprocess import Augment, Preprocess
from ich_train.ranks import Ranks
from ich_train.runs import Epoch, best_of, is_finished, read_history, settings_of, write_history
from ich_train.scan_network import ScanLogits
from ich_train.session import prepare
from ich_train.split import split_rows
from ich_train.step import Step
from ich_train.train import train
from tests.support.slow_reads import interrupt_at_read

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dataset(twelve: Path) -> Dataset:
    return open_dataset(twelve)


def settings(**changed: Any) -> TrainConfig:
    return TrainConfig.model_validate({"epochs": 2, "batch_size": 8, "device": "cpu"} | changed)


def quiet(dataset: Dataset, out: Path, of: TrainConfig, *, resume: bool = False) -> Any:
    return train(dataset, out, of, None, console=Console(file=io.StringIO(), width=200), resume=resume)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder, "cpu").model.state_dict()


# --- the loss


def test_the_focal_loss_is_lins() -> None:
    logits, targets = torch.randn(7, 6, dtype=torch.float64), (torch.rand(7, 6) < 0.4).double()
    p = torch.where(targets > 0, torch.sigmoid(logits), 1 - torch.sigmoid(logits))
    torch.testing.assert_close(cross_entropy(logits, targets, focal_gamma=2.0), -((1 - p) ** 2) * torch.log(p))
    of = elementwise_loss("bce", classes=6, focal_gamma=2.0)
    torch.testing.assert_close(of(logits, targets), -((1 - p) ** 2) * torch.log(p))


def test_the_weight_of_positives_counts_them_more() -> None:
    logits, targets = torch.randn(7, 2), (torch.rand(7, 2) < 0.5).float()
    plain = cross_entropy(logits, targets)
    for given, each in (([3.0], [3.0, 3.0]), ([2.0, 5.0], [2.0, 5.0])):
        weighted = elementwise_loss("bce", classes=2, pos_weight=given)(logits, targets)
        torch.testing.assert_close(weighted, torch.where(targets > 0, plain * torch.tensor(each), plain))
    with pytest.raises(UsageError, match="one for each of 2 classes; found 3"):
        elementwise_loss("bce", classes=2, pos_weight=[1.0, 2.0, 3.0])


OWN = """
import torch

def squared(logits, targets):
    return (torch.sigmoid(logits) - targets) ** 2

def summed(logits, targets):
    return squared(logits, targets).sum()

def constant(logits, targets):
    return targets * 0.0

def fails(logits, targets):
    raise ValueError("no such thing")

def darker(images, generator):
    return images * torch.rand(1, generator=generator, device=images.device)

def cropped(images, generator):
    return images[..., 1:]

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_parts.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)
    return "own_parts"


def test_a_loss_of_ones_own_is_averaged_over_the_known_labels(own: str, dataset: Dataset, tmp_path: Path) -> None:
    loss = elementwise_loss(f"{own}:squared", classes=6)
    logits, labels = torch.randn(5, 6), torch.randint(-1, 2, (5, 6)).to(torch.int8)
    sums = loss_sums(logits, labels, torch.ones(6), loss)
    known = labels >= 0
    torch.testing.assert_close(sums.loss, ((torch.sigmoid(logits) - labels) ** 2)[known].sum())
    result = quiet(dataset, tmp_path / "run", settings(loss=f"{own}:squared", epochs=1))
    assert 0 < result.history[0].train_loss < 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("summed", r"returned \(\); it must return a loss for each logit, \(2, 6\)"),
        ("constant", "has no gradient"),
        ("fails", "ValueError: no such thing"),
        ("missing", "In own_parts, the name"),
        ("number", "must be a function of logits and targets"),
    ],
)
def test_a_loss_that_cannot_be_one_is_refused(own: str, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        elementwise_loss(f"{own}:{name}", classes=6)
    with pytest.raises(UsageError, match="makes its own loss"):
        elementwise_loss(f"{own}:squared", classes=6, focal_gamma=1.0)


def test_an_augmentation_of_ones_own_follows_the_others(own: str, dataset: Dataset) -> None:
    preprocess = Preprocess(pixels="windows", windows=dataset.spec.windows)
    still = {"flip": False, "rotation_degrees": 0, "zoom": 0, "shift": 0}
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    plain = Augment(preprocess, settings(**still))(images, torch.Generator().manual_seed(3))
    own_one = Augment(preprocess, settings(**still, augmentation=f"{own}:darker"))
    dark = own_one(images, torch.Generator().manual_seed(3))
    share = torch.rand(1, generator=torch.Generator().manual_seed(3))
    scaling = preprocess.scaling
    torch.testing.assert_close(dark * scaling.std + scaling.mean, (plain * scaling.std + scaling.mean) * share)
    for name, message in (("cropped", r"returned \(2, 3, 8, 7\)"), ("fails", "ValueError: no such thing")):
        with pytest.raises(UsageError, match=message):
            Augment(preprocess, settings(**still, augmentation=f"{own}:{name}"))(images, torch.Generator())


# --- gradients and weights


def test_accumulated_batches_are_one_larger_batch() -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (8, 3, 4, 4), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 2, (8, 6)).astype(np.int8))
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Flatten(), nn.Linear(48, 6))
    parts = copy.deepcopy(whole)

    def step_of(model: nn.Module, accumulate: int) -> Step:
        return Step(
            model=model, network=model, augment=lambda images, _: images.float(), preprocess=lambda images: images.float(),
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0), scaler=torch.amp.GradScaler("cpu", enabled=False),
            weights=torch.ones(len(RSNA_CLASSES)), precision=torch.float32, clip_norm=1e9, ranks=ALONE,
            use_cuda_graph=False, accumulate=accumulate,
        )  # fmt: skip

    step_of(whole, 1)(images, labels, rate=1e-3, seed=0)
    of_parts = step_of(parts, 2)
    before = copy.deepcopy(parts.state_dict())
    of_parts(images[:4], labels[:4], rate=1e-3, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in parts.state_dict().items())
    of_parts(images[4:], labels[4:], rate=1e-3, seed=0)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    of_parts(images[:4], labels[:4], rate=1e-3, seed=0, last=True)
    assert not torch.equal(next(parts.parameters()), next(whole.parameters())), "the last batch of an epoch is used"


@pytest.mark.parametrize("changed", [{"accumulate": 3}, {"ema_decay": 0.9}, {"average_epochs": 2}, {"patience": 3}])
def test_a_stopped_run_resumes_exactly(twelve: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    of = settings(epochs=3, seed=4, **changed)
    quiet(open_dataset(twelve), tmp_path / "whole", of)
    stopping = open_dataset(twelve)
    interrupt_at_read(stopping, 50)
    assert not quiet(stopping, tmp_path / "stopped", of).finished
    assert quiet(open_dataset(twelve), tmp_path / "stopped", of, resume=True).finished
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_an_exponential_average_follows_the_weights() -> None:
    model = nn.Linear(2, 1)
    average = averaged(model, ema_decay=0.75, last_epochs=0)
    assert average is not None
    assert not average.begun
    expected = None
    for value in (1.0, 2.0, 5.0):
        nn.init.constant_(model.weight, value)
        average.after_step()
        expected = value if expected is None else 0.75 * expected + 0.25 * value
    assert average.begun
    assert average.network.weight.flatten().tolist() == pytest.approx([expected] * 2)  # type: ignore[union-attr,operator]


def test_the_last_epochs_are_averaged_equally() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    average = averaged(model, ema_decay=0.0, last_epochs=2)
    assert average is not None
    for epoch, value in enumerate((7.0, 1.0, 2.0), start=1):
        nn.init.constant_(model[0].weight, value)  # type: ignore[arg-type]
        model[0].running_mean.fill_(value)  # type: ignore[union-attr,operator]
        average.after_step()
        average.after_epoch(epoch, 3)
        assert average.begun == (epoch > 1)
    for tensor in (average.network[0].weight, average.network[0].running_mean):  # type: ignore[index]
        assert tensor.item() == pytest.approx(1.5)
    assert averaged(model, ema_decay=0.0, last_epochs=0) is None


def test_the_average_is_what_is_validated_and_kept(dataset: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = quiet(dataset, run, settings(ema_decay=0.9, epochs=1))
    best, last = weights_of(run / "best"), weights_of(run / "last")
    assert any(not torch.equal(best[key], last[key]) for key in best)
    state = torch.load(run / "last" / "state.pt", weights_only=True)["average"]
    assert all(torch.equal(best[key], state[f"module.{key}"]) for key in best)
    plain = quiet(dataset, tmp_path / "plain", settings(epochs=1))
    assert all(torch.equal(value, last[key]) for key, value in weights_of(tmp_path / "plain" / "last").items())
    assert result.history[0].train_loss == plain.history[0].train_loss
    assert result.history[0].val_loss != plain.history[0].val_loss


# --- which epochs


def line(epoch: int, *, loss: float, auc: float = 0.5) -> Epoch:
    return Epoch(epoch, 1.0, 0.5, 0.9, loss, 0.9, 1e-3, 100.0, 0.0, auc)


def test_the_area_may_choose_the_best_epoch() -> None:
    history = [line(1, loss=0.5, auc=0.7), line(2, loss=0.4, auc=0.6), line(3, loss=0.6, auc=math.nan)]
    assert best_of(history).epoch == 2
    assert best_of(history, "auc").epoch == 1
    assert best_of(history, "last").epoch == 3


def test_a_run_stops_when_it_gets_no_better() -> None:
    history = [line(1, loss=0.5), line(2, loss=0.4), line(3, loss=0.41), line(4, loss=0.42)]
    of = settings(epochs=9, patience=2)
    assert [is_finished(history[:k], of) for k in range(5)] == [False, False, False, False, True]
    assert not is_finished(history, settings(epochs=9))
    assert is_finished(history, settings(epochs=4))


def test_a_run_that_stopped_early_is_finished(dataset: Dataset, tmp_path: Path) -> None:
    of = settings(epochs=30, patience=1, learning_rate=0.5)
    result = quiet(dataset, tmp_path / "run", of)
    assert result.finished
    assert len(result.history) < 30
    assert len(result.history) == best_of(result.history).epoch + 1
    assert quiet(dataset, tmp_path / "run", of, resume=True).history == result.history


def test_the_area_of_each_epoch_is_that_of_its_validation(dataset: Dataset, tmp_path: Path) -> None:
    result = quiet(dataset, tmp_path / "run", settings(choose_best="auc", epochs=3))
    predictor = load_predictor(tmp_path / "run", dataset, device="cpu")
    rows = split_rows(dataset, val_fold=0, test_fold=1, allow_series_labels=False).val
    probabilities = predict_rows(predictor.model, predictor.preprocess, dataset, rows, context=0)
    areas = [a for a in roc_aucs(dataset.labels[rows], probabilities, dataset.classes).values() if a is not None]
    best = max(result.history, key=lambda line: line.val_auc)
    assert best.val_auc == pytest.approx(np.mean(areas), abs=1e-6)
    assert predictor.meta.epoch == best.epoch
    assert read_history(tmp_path / "run") == list(result.history)


def test_a_history_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    write_history(tmp_path, [line(1, loss=0.5)])
    file = tmp_path / "history.csv"
    file.write_text("\n".join(row.rpartition(",")[0] for row in file.read_text().splitlines()) + "\n")
    (found,) = read_history(tmp_path)
    assert math.isnan(found.val_auc)
    assert found.val_loss == 0.5


def test_all_patients_may_be_trained_on(dataset: Dataset, tmp_path: Path) -> None:
    of = settings(val_fold="none", test_fold="none", epochs=2)
    session = prepare(dataset, of, ALONE, weights=None)
    assert session.loader.items == sum(level == "slice" for level in dataset.slices["label_level"].to_pylist())
    console = Console(file=(text := io.StringIO()), width=200)
    result = train(dataset, tmp_path / "run", of, EvalConfig(bootstrap=5), console=console)
    assert result.finished
    assert result.metrics is None, "nothing is held out"
    assert all(math.isnan(line.val_loss) for line in read_history(tmp_path / "run"))
    meta = read_meta(tmp_path / "run" / "best")
    assert (meta.epoch, meta.val_fold, meta.val_loss) == (2, "none", None)
    assert "no validation" in text.getvalue()
    assert "* last epoch: kept as best/" in text.getvalue()
    only_val = settings(val_fold="none", epochs=1)
    metrics = train(dataset, tmp_path / "tested", only_val, EvalConfig(bootstrap=5), console=console).metrics
    assert metrics is not None
    assert metrics["dataset"]["parts"]["val"]["slices"] == 0


def test_a_finished_run_is_lengthened(dataset: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = quiet(dataset, run, settings(epochs=1))
    longer = quiet(dataset, run, settings(epochs=3), resume=True)
    assert longer.finished
    assert len(longer.history) == 3
    assert longer.history[0] == first.history[0]
    assert settings_of(run)[0].epochs == 3
    with pytest.raises(UsageError, match="epochs"):
        quiet(dataset, run, settings(epochs=2), resume=True)


# --- predictions


def test_mirror_images_are_averaged(dataset: Dataset, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images = torch.randn(3, 1, 3, 4)
    both = Mirrored(network)(images)
    torch.testing.assert_close(both, (network(images) + network(images.flip(-1))) / 2)
    torch.testing.assert_close(Mirrored(network)(images.flip(-1)), both)

    class Two(nn.Module):
        def forward(self, images: torch.Tensor, lengths: list[int]) -> ScanLogits:
            return ScanLogits(network(images), network(images)[: len(lengths)])

    assert torch.equal(Mirrored(Two())(images, [1, 2]).scans, both[:2])
    quiet(dataset, tmp_path / "run", settings(epochs=1))
    plain, mirrored = (
        evaluate_run(tmp_path / "run", dataset, EvalConfig(bootstrap=2, mirror=mirror))["by_slice"]["log_loss"]
        for mirror in (False, True)
    )
    assert plain != mirrored


# --- initial weights: see also test_model.py


@pytest.mark.parametrize("kind", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "net.backbone."])
@pytest.mark.parametrize("inside", [None, "state_dict", "model_state_dict", "model"])
def test_checkpoints_of_other_loops_are_read(tmp_path: Path, kind: str, inside: str | None) -> None:
    from ich_train.model import build_model

    source = build_model("baseline", channels=3, size=32, classes=6).state_dict()
    tensors = {f"{kind}{key}": value for key, value in source.items()} | {"loss.weight": torch.ones(6)}
    content: Any = tensors if inside is None else {inside: tensors, "epoch": 3}
    torch.save(content, tmp_path / "other.ckpt")
    model = build_model("baseline", channels=3, size=32, classes=6, weights=tmp_path / "other.ckpt")
    assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())


def test_a_refusal_shows_the_names_of_both_sides(tmp_path: Path) -> None:
    from ich_train.model import build_model

    torch.save({"stem.weight": torch.ones(2), "stem.bias": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(
        UsageError, match=r"The file has stem\.weight, stem\.bias; the network has conv1\.weight, conv1"
    ):
        build_model("baseline", channels=3, size=32, classes=6, weights=tmp_path / "other.pt")


def test_the_command_line_offers_them(call: Callable[..., int], twelve: Path, tmp_path: Path) -> None:
    recipe = "[train]\nepochs = 1\nbatch_size = 8\ndevice = 'cpu'\npos_weight = 2.0\n[eval]\nbootstrap = 5\n"
    (tmp_path / "quick.toml").write_text(recipe, encoding="utf-8")
    assert call("run", "--recipe", "quick.toml", "--data", twelve) == 0
    assert settings_of(tmp_path / "runs" / "quick")[0].pos_weight == (2.0,)
    assert call("run", "--resume", "--out", "runs/quick", "--epochs", 2) == 0
    assert len(read_history(tmp_path / "runs" / "quick")) == 2
    assert call("eval", "runs/quick", "--mirror") == 0
