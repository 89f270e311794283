"""Cross-validation: every slice is tested once, by the network that was trained without its fold."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score

from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.predictions import read_predictions
from ich_prep.errors import UsageError
from ich_train.checkpoint import read_meta
from ich_train.config import EvalConfig, TrainConfig
from ich_train.cross_validation import cross_validate
from ich_train.predict import load_predictor
from ich_train.rows import labelled_rows
from ich_train.runs import Epoch, mean_history, read_history
from ich_train.scan_predict import predict_scans, predict_slices
from ich_train.split import split_rows
from tests.support.slow_reads import interrupt_at_read

QUICK = ("--epochs", 1, "--batch-size", 8, "--device", "cpu", "--threads", 1)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dataset(twelve: Path) -> Dataset:
    return open_dataset(twelve)


def recipe(folder: Path, train: str = "", evaluation: str = "bootstrap = 10") -> Path:
    file = folder / "small.toml"
    file.write_text(f"[train]\n{train}\n[eval]\n{evaluation}\n", encoding="utf-8")
    return file


def metrics_of(out: Path) -> Any:
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


def test_each_slice_is_tested_once_by_the_network_that_did_not_see_its_fold(
    dataset: Dataset, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("cv", "--data", dataset.path, "--recipe", recipe(tmp_path), *QUICK) == 0
    out = tmp_path / "runs" / "small-cv"
    assert "of the test folds" in capsys.readouterr().err

    found = pq.read_table(out / "predictions.parquet")  # type: ignore[no-untyped-call]
    rows = found["row"].to_numpy()
    assert rows.tolist() == labelled_rows(dataset).tolist()
    folds = found["fold"].to_numpy()
    probabilities = read_predictions(out, dataset)
    for fold in (0, 1, 2):
        meta = read_meta(out / f"fold-{fold}" / "best")
        assert (meta.test_fold, meta.val_fold) == (fold, (fold + 1) % 3)
        split = split_rows(dataset, val_fold=meta.val_fold, test_fold=meta.test_fold, allow_series_labels=False)
        assert not np.isin(rows[folds == fold], np.concatenate([split.train, split.val])).any()
        predictor = load_predictor(out / f"fold-{fold}", dataset, device="cpu")
        expected = predict_slices(predictor, dataset, rows[folds == fold])
        np.testing.assert_allclose(probabilities[rows[folds == fold]], expected, rtol=1e-5)

    metrics = metrics_of(out)
    assert metrics["evaluated"]["slices"] == len(rows)
    assert [of["fold"] for of in metrics["folds"]] == [0, 1, 2]
    assert [*metrics["by_value"]] == ["0", "1", "2"]
    for k, name in enumerate(dataset.classes):
        labels = dataset.labels[rows, k]
        if 0 < labels.sum() < len(labels):
            area = roc_auc_score(labels, probabilities[rows, k])
            assert metrics["by_slice"]["labels"][name]["roc_auc"] == pytest.approx(area)
    sizes = [part["slices"] for part in metrics["dataset"]["parts"].values()]
    assert sizes == [int((folds == fold).sum()) for fold in (0, 1, 2)]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Cross-validated" in page
    assert "ROC AUC for each value of fold, by slice" in page


def test_an_interrupted_cross_validation_resumes_in_the_fold_that_it_was_in(twelve: Path, tmp_path: Path) -> None:
    settings = TrainConfig(epochs=1, batch_size=8, device="cpu", threads=1, data=twelve)

    def validate(out: str, dataset: Dataset, *, resume: bool = False) -> Any:
        console = Console(file=io.StringIO(), width=200)
        evaluation = EvalConfig(bootstrap=10)
        return cross_validate(
            dataset, tmp_path / out, settings, evaluation, folds="0,2", console=console, resume=resume
        )

    dataset = open_dataset(twelve)
    assert validate("whole", dataset) is not None
    split = split_rows(dataset, val_fold=1, test_fold=0, allow_series_labels=False)
    reads_of_the_first = len(split.train) // 8 + -(-len(split.val) // 8)
    stopping = open_dataset(twelve)
    interrupt_at_read(stopping, reads_of_the_first + 1)
    assert validate("out", stopping) is None
    assert read_meta(tmp_path / "out" / "fold-0" / "best").epoch == 1
    assert not (tmp_path / "out" / "fold-2" / "best").exists()
    assert not (tmp_path / "out" / "metrics.json").exists()

    kept = tmp_path / "out" / "fold-0" / "best" / "model.safetensors"
    before = kept.stat().st_mtime_ns
    assert validate("out", open_dataset(twelve), resume=True) is not None
    assert kept.stat().st_mtime_ns == before
    one, other = (read_predictions(tmp_path / name, dataset) for name in ("whole", "out"))
    np.testing.assert_array_equal(one, other)
    assert np.isfinite(one).any(axis=1).sum() < len(labelled_rows(dataset))
    with pytest.raises(UsageError, match="is not empty"):
        validate("out", dataset)


def test_the_scans_of_a_head_are_pooled(dataset: Dataset, tmp_path: Path, call: Callable[..., int]) -> None:
    small = recipe(tmp_path, 'head = "attention"\nhead_size = 8')
    assert call("cv", "--data", dataset.path, "--recipe", small, *QUICK, "--folds", "0,1", "--out", "out") == 0
    metrics = metrics_of(tmp_path / "out")
    found = []
    for fold in (0, 1):
        series = np.unique(dataset.slices["series_row"].to_numpy()[dataset.slices["fold"].to_numpy() == fold])
        scans = predict_scans(load_predictor(tmp_path / "out" / f"fold-{fold}", dataset, device="cpu"), dataset, series)
        of_rows = dataset.slices["series_row"].to_numpy()
        truth = [dataset.labels[of_rows == number, 0].max() for number in scans.series]
        found.append((truth, scans.scans[:, 0]))
    truths, probabilities = (np.concatenate(parts) for parts in zip(*found, strict=True))
    area = metrics["by_scan"]["labels"][dataset.classes[0]]["roc_auc"]
    assert metrics["by_scan"]["cases"] == len(truths)
    if 0 < truths.sum() < len(truths):
        assert area == pytest.approx(roc_auc_score(truths, probabilities))


def test_without_validation_the_last_epochs_are_tested(
    dataset: Dataset, tmp_path: Path, call: Callable[..., int]
) -> None:
    small = recipe(tmp_path, 'val_fold = "none"')
    assert call("cv", "--data", dataset.path, "--recipe", small, *QUICK, "--folds", "1", "--out", "out") == 0
    metrics = metrics_of(tmp_path / "out")
    assert metrics["folds"] == [{"fold": 1, "run": "fold-1", "val_fold": "none", "epoch": 1}]
    assert metrics["calibration"]["temperature"] is None
    assert math.isnan(read_history(tmp_path / "out" / "fold-1")[0].val_loss)


@pytest.mark.parametrize(
    ("train", "evaluation", "words", "message"),
    [
        ("", "", ("--folds", "0,3"), "of the folds 0, 1, 2; found '0,3'"),
        ("", "", ("--folds", "first"), "found 'first'"),
        ("", "limit = 5", (), "evaluates all slices of each test fold"),
        ('features = "f.zarr"\nhead = "gru"', "", (), "Cross-validation takes no features"),
        ("", "", ("--weights", "missing.pt"), "Cannot read weights"),
    ],
)
def test_what_cannot_be_cross_validated_leaves_nothing(
    dataset: Dataset,
    tmp_path: Path,
    call: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    train: str,
    evaluation: str,
    words: tuple[object, ...],
    message: str,
) -> None:
    small = recipe(tmp_path, train, evaluation)
    assert call("cv", "--data", dataset.path, "--recipe", small, *QUICK, "--out", "out", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_resumed_cross_validation_keeps_its_folds(
    dataset: Dataset, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        call("cv", "--data", dataset.path, "--recipe", recipe(tmp_path), *QUICK, "--folds", "0,2", "--out", "out") == 0
    )
    before = metrics_of(tmp_path / "out")
    assert call("cv", "--resume", "--out", "out") == 0
    assert metrics_of(tmp_path / "out") == before
    assert not (tmp_path / "out" / "fold-1").exists()
    (tmp_path / "out" / "folds.txt").unlink()
    capsys.readouterr()
    assert call("cv", "--resume", "--out", "out") == 1
    assert "Name them with --folds" in " ".join(capsys.readouterr().err.split())
    assert call("eval", "out") != 0
    assert "is a cross-validation" in " ".join(capsys.readouterr().err.split())
    assert call("cv", "--resume", "--out", "out", "--folds", "all") == 0
    assert [of["fold"] for of in metrics_of(tmp_path / "out")["folds"]] == [0, 1, 2]


def test_several_processes_are_refused(
    dataset: Dataset, call: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call("cv", "--data", dataset.path, *QUICK) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_means_go_as_far_as_all_histories() -> None:
    def lines(*losses: float) -> list[Epoch]:
        return [Epoch(k + 1, 2.0, loss, 0.5, loss + 1, 0.5, 0.1, 10.0, 0.0, 0.5) for k, loss in enumerate(losses)]

    means = mean_history([lines(1.0, 0.5, 0.2), lines(3.0, 0.1)])
    assert [(line.epoch, line.train_loss, line.val_loss) for line in means] == [(1, 2.0, 3.0), (2, 0.3, 1.3)]
