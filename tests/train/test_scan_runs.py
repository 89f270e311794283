"""Runs that read whole scans: they train, resume, are evaluated by slice and by scan, and learn from labels of scans."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from rich.console import Console
from sklearn.metrics import roc_auc_score
from torch import nn

from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.errors import UsageError
from ich_train.config import EvalConfig, TrainConfig
from ich_train.embed import embed
from ich_train.evaluation.evaluate import evaluate_run
from ich_train.features import read_features
from ich_train.loss import loss_sums
from ich_train.meters import Meter
from ich_train.predict import load_predictor
from ich_train.ranks import Ranks
from ich_train.runs import read_history
from ich_train.scan_network import SequenceNetwork
from ich_train.scan_predict import predict_scans, predict_slices
from ich_train.scans import scan_labels, scans_of
from ich_train.session import prepare
from ich_train.train import train
from ich_train.volume_loader import VolumeLoader
from tests.support.sealing import replace_table, with_column
from tests.support.slow_reads import interrupt_at_read

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
TIMES = {"seconds", "slices_per_s", "wait_share"}
QUICK = EvalConfig(bootstrap=10)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dataset(twelve: Path) -> Dataset:
    return open_dataset(twelve)


def settings(**changed: Any) -> TrainConfig:
    small = {"epochs": 2, "batch_size": 8, "device": "cpu", "head": "gru", "head_size": 16}
    return TrainConfig.model_validate(small | changed)


def quiet(dataset: Dataset, out: Path, of: TrainConfig, *, resume: bool = False, evaluate: bool = False) -> Any:
    console = Console(file=io.StringIO(), width=200)
    return train(dataset, out, of, QUICK if evaluate else None, console=console, resume=resume)


def lessons(out: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in vars(line).items() if key not in TIMES} for line in read_history(out)]


def with_scan_labels(path: Path, copy: Path, level: str = "series") -> Dataset:
    """A copy of a dataset whose labels are those of whole scans."""
    shutil.copytree(path, copy)
    dataset = open_dataset(path)
    scans = scans_of(dataset)
    labels = dict(zip(scans.series.tolist(), scan_labels(dataset, scans).tolist(), strict=True))
    table, of_row = dataset.slices, dataset.slices["series_row"].to_pylist()
    levels = [level if row in labels else "none" for row in of_row]
    values = {"label_level": levels} | {
        name: [labels[row][k] if row in labels else None for row in of_row] for k, name in enumerate(dataset.classes)
    }
    for name, column in values.items():
        table = with_column(table, name, column)
    replace_table(copy, "slices", table)
    return open_dataset(copy)


@pytest.mark.parametrize("head", ["gru", "lstm", "transformer", "attention"])
def test_a_run_on_scans_is_whole(dataset: Dataset, tmp_path: Path, head: str) -> None:
    result = quiet(dataset, tmp_path / "run", settings(head=head, context=1, slab=12))
    assert result.finished
    assert result.history[-1].train_loss < result.history[0].train_loss
    predictor = load_predictor(tmp_path / "run", dataset, device="cpu")
    assert predictor.meta.head is not None
    assert predictor.meta.head.kind == head
    series = np.unique(dataset.slices["series_row"].to_numpy()[dataset.slices["fold"].to_numpy() == 1])
    found = predict_scans(predictor, dataset, series)
    assert found.slices.shape == (len(found.rows), 6)
    rows = found.rows[::-3]
    np.testing.assert_array_equal(predict_slices(predictor, dataset, rows), found.of_rows(rows))


def test_a_run_on_scans_is_evaluated_by_slice_and_by_scan(dataset: Dataset, tmp_path: Path) -> None:
    quiet(dataset, tmp_path / "run", settings(epochs=1))
    metrics = evaluate_run(tmp_path / "run", dataset, QUICK)
    series = np.unique(dataset.slices["series_row"].to_numpy()[dataset.slices["fold"].to_numpy() == 1])
    assert metrics["by_scan"]["cases"] == len(series)
    assert metrics["by_slice"]["cases"] == sum(dataset.series["n_ok"].to_numpy()[series])
    found = predict_scans(load_predictor(tmp_path / "run", dataset, device="cpu"), dataset, series)
    truth = scan_labels(dataset, scans_of(dataset, series))
    for k, name in enumerate(dataset.classes):
        area = metrics["by_scan"]["labels"][name]["roc_auc"]
        if area is not None:
            assert area == pytest.approx(roc_auc_score(truth[:, k], found.scans[:, k]))
    assert "By scan, as the head says" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_loss_is_the_mean_over_slices_and_weighted_scans(dataset: Dataset) -> None:
    session = prepare(dataset, settings(scan_weight=7.0, batch_size=2), ALONE, weights=None)
    session.model.eval()
    batch = next(iter(session.loader))
    judged = session.step.validate(session.model, *batch.inputs)  # type: ignore[union-attr]
    real = batch.rows >= 0  # type: ignore[union-attr]
    with torch.no_grad():
        lengths = real.sum(dim=1).tolist()
        logits = session.model(session.preprocess(batch.volumes[real]), lengths)  # type: ignore[union-attr]
    weights = torch.ones(6)
    slices = loss_sums(logits.slices, batch.labels[real], weights)
    scans = loss_sums(logits.scans, batch.scan_labels, weights)  # type: ignore[union-attr]
    torch.testing.assert_close(judged.sums.loss, slices.loss + 7 * scans.loss)
    torch.testing.assert_close(judged.sums.weight, slices.weight + 7 * scans.weight)
    assert judged.sums.known == slices.known + scans.known
    assert torch.equal(judged.labels, batch.labels[real])


def test_a_stopped_run_resumes_exactly(twelve: Path, tmp_path: Path) -> None:
    of = settings(epochs=3, scans_per_batch=1, sampling="balanced", slab=20)
    quiet(open_dataset(twelve), tmp_path / "whole", of)
    stopping = open_dataset(twelve)
    interrupt_at_read(stopping, 11)
    assert not quiet(stopping, tmp_path / "stopped", of).finished
    assert torch.load(tmp_path / "stopped" / "last" / "state.pt", weights_only=True)["step"] > 0
    assert quiet(open_dataset(twelve), tmp_path / "stopped", of, resume=True).finished
    assert lessons(tmp_path / "stopped") == lessons(tmp_path / "whole")
    name = "last/model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_all_slices_of_a_scan_are_augmented_alike(dataset: Dataset) -> None:
    session = prepare(dataset, settings(), ALONE, weights=None)
    images = torch.zeros(7, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 10:14, 10:14] = 255
    moved = session.step.augment(images, torch.Generator().manual_seed(0), [3, 4])
    assert all(torch.equal(moved[0], moved[k]) for k in (1, 2))
    assert all(torch.equal(moved[3], moved[k]) for k in (4, 5, 6))
    assert not torch.equal(moved[0], moved[3])


def test_a_head_is_trained_on_features_in_a_second_stage(
    dataset: Dataset, tmp_path: Path, call: Callable[..., int]
) -> None:
    quiet(dataset, tmp_path / "slices", settings(head="none", epochs=1, context=1))
    assert call("embed", tmp_path / "slices", "--out", "features.zarr", "--data", dataset.path) == 0
    made = read_features(tmp_path / "features.zarr")
    array = zarr.open_array(tmp_path / "features.zarr", mode="r")
    assert array.shape == made.shape == (len(dataset), 256)
    np.testing.assert_array_equal(array[:], made.values)
    of = settings(features=tmp_path / "features.zarr", context=1, epochs=3)
    result = quiet(dataset, tmp_path / "head", of)
    assert result.history[-1].train_loss < result.history[0].train_loss
    predictor = load_predictor(tmp_path / "head", dataset, device="cpu")
    assert isinstance(predictor.model, SequenceNetwork)
    slices = load_predictor(tmp_path / "slices", dataset, device="cpu").model.state_dict()
    for key, value in predictor.model.encoder.state_dict().items():
        assert torch.equal(value, slices[key]), "the encoder stays as it was"
    # From pixels: the same as from the features.
    scans = scans_of(dataset, [3])
    with torch.no_grad():
        logits = predictor.model(torch.from_numpy(made.values[scans.rows]), [len(scans.rows)])
    found = predict_scans(predictor, dataset, np.array([3]))
    np.testing.assert_allclose(found.slices, torch.sigmoid(logits.slices).numpy(), atol=1e-5)
    np.testing.assert_allclose(found.scans, torch.sigmoid(logits.scans).numpy(), atol=1e-5)
    rows, features = embed(tmp_path / "head", dataset, tmp_path / "again.zarr")
    np.testing.assert_allclose(read_features(tmp_path / "again.zarr").values, made.values, atol=1e-5)
    assert (rows, features) == made.shape


def test_a_second_stage_is_not_resumed_on_features_of_another_encoder(dataset: Dataset, tmp_path: Path) -> None:
    features = tmp_path / "features.zarr"
    for seed in (0, 1):
        quiet(dataset, tmp_path / f"slices-{seed}", settings(head="none", epochs=1, seed=seed))
    embed(tmp_path / "slices-0", dataset, features)
    quiet(dataset, tmp_path / "head", settings(features=features, epochs=1))
    longer = settings(features=features, epochs=2)
    embed(tmp_path / "slices-1", dataset, features)
    with pytest.raises(UsageError, match="not made by the encoder that"):
        quiet(dataset, tmp_path / "head", longer, resume=True)
    assert quiet(
        dataset, tmp_path / "head", settings(features=features, epochs=1), resume=True
    ).finished  # nothing to do
    embed(tmp_path / "slices-0", dataset, features)
    assert len(quiet(dataset, tmp_path / "head", longer, resume=True).history) == 2


@pytest.mark.parametrize("head", ["gru", "transformer"])
def test_a_run_starts_from_the_weights_of_another_with_its_head(dataset: Dataset, tmp_path: Path, head: str) -> None:
    of = settings(head=head, epochs=1)
    quiet(dataset, tmp_path / "first", of)
    file = tmp_path / "first" / "best" / "model.safetensors"
    expected = load_predictor(tmp_path / "first", dataset, device="cpu").model.state_dict()
    torch.save({"model_state_dict": {f"module.{key}": value for key, value in expected.items()}}, tmp_path / "other.pt")
    for weights in (file, tmp_path / "other.pt"):
        found = prepare(dataset, of, ALONE, weights=weights).model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
    for other in ("lstm", "none"):
        found = prepare(dataset, settings(head=other), ALONE, weights=tmp_path / "other.pt").model.state_dict()
        of_encoder = {
            key: value for key, value in found.items() if f"encoder.{key.removeprefix('encoder.')}" in expected
        }
        assert len(of_encoder) == sum(key.startswith("encoder.") for key in expected)
        for key, value in of_encoder.items():
            assert torch.equal(value, expected[f"encoder.{key.removeprefix('encoder.')}"])


def test_a_head_on_features_starts_from_weights_that_have_one(dataset: Dataset, tmp_path: Path) -> None:
    quiet(dataset, tmp_path / "slices", settings(head="none", epochs=1))
    embed(tmp_path / "slices", dataset, tmp_path / "features.zarr")
    of = settings(features=tmp_path / "features.zarr", epochs=1)
    quiet(dataset, tmp_path / "first", of)
    expected = load_predictor(tmp_path / "first", dataset, device="cpu").model.state_dict()
    weights = tmp_path / "first" / "best" / "model.safetensors"
    found = prepare(dataset, of, ALONE, weights=weights).model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    with pytest.raises(UsageError, match="weights of an encoder only"):
        prepare(dataset, of, ALONE, weights=tmp_path / "slices" / "best" / "model.safetensors")


def test_only_the_labels_of_a_filter_count(dataset: Dataset) -> None:
    index = dataset.slices["slice_index"].to_numpy()
    for where, whole in (("slice_index < 5", False), ("series_row != 3", True)):
        session = prepare(dataset, settings(where=where, scans_per_batch=1), ALONE, weights=None)
        for loader in (session.loader, session.val_loader):
            assert isinstance(loader, VolumeLoader)
            for batch in loader:
                known = (batch.labels >= 0).all(dim=2)
                rows = batch.rows[batch.mask].numpy()
                expected = np.ones(len(rows), bool) if whole else index[rows] < 5
                np.testing.assert_array_equal(known[batch.mask].numpy(), expected)
                assert bool((batch.scan_labels >= 0).all()) == whole


def test_slabs_of_scans_that_are_labelled_as_a_whole_are_refused(twelve: Path, tmp_path: Path) -> None:
    weak = with_scan_labels(twelve, tmp_path / "weak.zarr")
    with pytest.raises(UsageError, match=r"say nothing of a slab of 8 slices\. Set slab = 0"):
        quiet(weak, tmp_path / "run", settings(slab=8))
    assert prepare(weak, settings(slab=100), ALONE, weights=None).loader.items > 0  # cuts no scan


def test_a_filter_that_leaves_no_label_to_learn_from_is_refused(dataset: Dataset, tmp_path: Path, nets: str) -> None:
    of = settings(head="volume", model=f"{nets}:Volume", where="slice_index > 5")
    with pytest.raises(
        UsageError, match=r"No label is known .* to train on: .* 'slice_index > 5' selects some slices only"
    ):
        quiet(dataset, tmp_path / "run", of)


def test_batches_without_a_label_have_no_mean(dataset: Dataset) -> None:
    session = prepare(dataset, settings(where="slice_index < 2", slab=4, scans_per_batch=1), ALONE, weights=None)
    sums = [session.step(*batch.inputs, rate=1e-4, seed=0) for batch in session.loader]
    meters = [Meter(one) for one in sums]
    assert any(np.isnan(meter.means()[0]) for meter in meters)
    assert np.isfinite(Meter(torch.stack(sums).sum(dim=0)).means()).all()
    assert all(torch.isfinite(value).all() for value in session.model.parameters())


def test_slices_without_a_position_are_not_passed_over_in_silence(dataset: Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "data.zarr"
    shutil.copytree(dataset.path, copy)
    positions = dataset.slices["position_mm"].to_pylist()
    of_row = dataset.slices["series_row"].to_numpy()
    rows = np.flatnonzero(of_row == of_row[in_training(dataset)][0])
    positions[int(rows[-1])] = None
    replace_table(copy, "slices", with_column(dataset.slices, "position_mm", positions))
    shown = io.StringIO()
    console = Console(file=shown, width=300)
    train(open_dataset(copy), tmp_path / "run", settings(epochs=1, slab=12), None, console=console)
    assert "no position in their scan: 1 labelled slice." in shown.getvalue()
    assert " slabs of " in shown.getvalue()


def test_labels_of_scans_calibrate_no_slice(
    twelve: Path, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    weak = with_scan_labels(twelve, tmp_path / "weak.zarr")
    quiet(weak, tmp_path / "run", settings(epochs=1))
    assert call("eval", tmp_path / "run", "--data", weak.path, "--sensitivity", 0.8) == 0
    shown = capsys.readouterr().err
    assert "scans, as the head says" in shown
    assert "by their highest slice" not in shown
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["calibration"]["temperature"] is None
    assert metrics["calibration"]["as_predicted"] == {"ece": None, "brier": None, "log_loss": None}
    assert any(point["threshold"] is not None for point in metrics["operating_point"]["labels"].values())
    assert not (tmp_path / "run" / "pictures" / "reliability.png").exists()


def test_features_of_something_else_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    quiet(dataset, tmp_path / "slices", settings(head="none", epochs=1))
    path = tmp_path / "features.zarr"
    embed(tmp_path / "slices", dataset, path)
    for changed, message in (
        ({"model": "resnet18"}, "made with model baseline; this run has resnet18"),
        ({"context": 1}, "made with context 0"),
        ({"val_fold": 2}, "made with val_fold 0"),
        ({"head": "none"}, "features need a head"),
    ):
        with pytest.raises(UsageError, match=message):
            quiet(dataset, tmp_path / "run", settings(features=path, **changed))
    with pytest.raises(UsageError, match="holds no features"):
        embed(tmp_path / "slices", dataset, tmp_path / "slices")
    chunk = path / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-40])
    with pytest.raises(UsageError, match="they are damaged"):
        read_features(path)
    shutil.rmtree(path)
    with pytest.raises(UsageError, match=r"No such file.*ich-train embed"):
        read_features(path)


def test_a_network_of_volumes_trains_and_predicts(dataset: Dataset, tmp_path: Path, nets: str) -> None:
    of = settings(head="volume", model=f"{nets}:Volume", spacing_mm=8.0, depth_mm=96.0, slab=0, epochs=3)
    result = quiet(dataset, tmp_path / "run", of, evaluate=True)
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert result.metrics is not None
    assert result.metrics["by_scan"]["cases"] > 0
    assert not (tmp_path / "run" / "pictures" / "feature_maps.png").exists()
    predictor = load_predictor(tmp_path / "run", dataset, device="cpu")
    seen: list[torch.Size] = []
    predictor.model.network.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    found = predict_scans(predictor, dataset, np.array([1, 2]))
    assert seen == [(2, 3, 12, 32, 32)]
    np.testing.assert_array_equal(found.slices[0], found.scans[0])
    np.testing.assert_array_equal(found.slices[-1], found.scans[1])


@pytest.mark.parametrize("spacing_mm", [0.0, 8.0])
def test_what_a_scan_gets_does_not_depend_on_the_others(
    dataset: Dataset, tmp_path: Path, nets: str, spacing_mm: float
) -> None:
    quiet(dataset, tmp_path / "run", settings(head="volume", model=f"{nets}:Volume", spacing_mm=spacing_mm, epochs=1))
    predictor = load_predictor(tmp_path / "run", dataset, device="cpu")
    series = np.arange(12)
    together = predict_scans(predictor, dataset, series)
    for one in series:
        alone = predict_scans(predictor, dataset, np.array([one]))
        np.testing.assert_array_equal(alone.scans[0], together.scans[one])
        np.testing.assert_array_equal(alone.slices, together.of_rows(alone.rows))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"spacing_mm": 5.0}, "spacing_mm is for"),
        ({"depth_mm": 5.0}, "need spacing_mm"),
        ({"head": "volume", "context": 1}, "context is for slices"),
        ({"head": "volume", "scan_weight": 0.0}, "scan_weight must be above 0"),
        ({"compile": True}, "compile is for slices"),
        ({"scans_per_batch": 100}, "at least one batch of 100 scans"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    dataset: Dataset, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        quiet(dataset, tmp_path / "run", settings(**wrong))
    assert not (tmp_path / "run").exists()


def test_labels_of_scans_alone_teach(twelve: Path, tmp_path: Path) -> None:
    """On the phantom's training scans the loss of scans falls far below that of their shares, without a slice's label."""
    weak = with_scan_labels(twelve, tmp_path / "weak.zarr", level="series")
    of = settings(
        head="attention", epochs=10, scans_per_batch=2, learning_rate=4e-3, flip=False, rotation_degrees=0, zoom=0,
        shift=0, dropout=0, warmup_epochs=1,
    )  # fmt: skip
    result = quiet(weak, tmp_path / "run", of)
    assert result.history[-1].train_loss < 0.6 * result.history[0].train_loss
    predictor = load_predictor(tmp_path / "run", weak, device="cpu")
    state = torch.load(tmp_path / "run" / "last" / "state.pt", weights_only=True)
    assert state["loader"]["scans"] == len(np.unique(weak.slices["series_row"].to_numpy()[in_training(weak)]))
    assert predictor.meta.head is not None


def in_training(dataset: Dataset) -> Any:
    fold = dataset.slices["fold"].fill_null(-1).to_numpy()
    return fold == 2


TOGETHER = """
import io, json, sys
from pathlib import Path
import torch
from rich.console import Console
from ich_prep.dataset.union import open_union
from ich_train.config import TrainConfig
from ich_train.train import train
torch.set_num_threads(1)
of = TrainConfig.model_validate(json.loads(sys.argv[1]))
train(open_union(of.data), Path("two"), of, None, console=Console(file=io.StringIO()))
"""


def test_two_processes_lose_what_one_does(twelve: Path, tmp_path: Path) -> None:
    """A network without batch statistics; nothing random; one batch of two scans, or one scan on each process."""
    still = {"flip": False, "rotation_degrees": 0, "zoom": 0, "shift": 0, "dropout": 0, "data": twelve}
    quiet(open_dataset(twelve), tmp_path / "one", settings(scans_per_batch=2, **still))
    (tmp_path / "together.py").write_text(TOGETHER, encoding="utf-8")
    given = settings(scans_per_batch=1, **still).model_dump_json()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "together.py", given], cwd=tmp_path, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, two = lessons(tmp_path / "one"), lessons(tmp_path / "two")
    for ours, theirs in zip(one, two, strict=True):
        for name in ("train_loss", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)


def test_a_submission_of_a_run_on_scans(dataset: Dataset, tmp_path: Path, call: Callable[..., int]) -> None:
    quiet(dataset, tmp_path / "run", settings(epochs=1))
    assert call("predict", tmp_path / "run", "--data", dataset.path, "--out", "x.csv") == 0
    lines = (tmp_path / "x.csv").read_text(encoding="utf-8").splitlines()
    tested = sum(subset == "test" for subset in dataset.slices["subset"].to_pylist())
    assert len(lines) == 1 + 6 * tested
    assert json.loads((tmp_path / "run" / "best" / "meta.json").read_text())["head"]["kind"] == "gru"
    assert isinstance(load_predictor(tmp_path / "run", dataset, device="cpu").slice_network, nn.Module)


def test_the_scans_of_each_value_of_a_column_are_measured(dataset: Dataset, tmp_path: Path) -> None:
    quiet(dataset, tmp_path / "run", settings(epochs=1))
    of_folds = EvalConfig(bootstrap=10, subset="all", by="fold")
    found = evaluate_run(tmp_path / "run", dataset, of_folds)
    assert len(found["by_value"]) > 1
    scans = [views["by_scan"]["cases"] for views in found["by_value"].values()]
    assert sum(scans) == found["by_scan"]["cases"]
    assert found["by_scan"]["patients"] == found["by_slice"]["patients"]


def test_maps_of_a_run_on_scans_are_refused(
    dataset: Dataset, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    quiet(dataset, tmp_path / "run", settings(epochs=1), evaluate=True)
    assert call("explain", tmp_path / "run", "--data", dataset.path) == 2
    assert "reads whole scans (head gru)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "explanations").exists()
