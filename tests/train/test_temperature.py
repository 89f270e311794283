"""Predictions with the temperature of the run's evaluation, and when there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ich_prep.dataset.dataset import open_dataset
from ich_train.checkpoint import read_meta
from ich_train.config import EvalConfig, TrainConfig
from ich_train.evaluation.evaluate import evaluate_run
from ich_train.predict import load_predictor
from ich_train.runs import METRICS, Epoch, start, write_history
from ich_train.scan_predict import predict_slices
from ich_train.temperature import scaled, temperature_of
from tests.support.training_runs import save_untrained

Call = Callable[..., int]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(twelve: Path, tmp_path: Path) -> Path:
    """An evaluated run of an untrained network."""
    dataset = open_dataset(twelve)
    start(tmp_path / "net", TrainConfig(data=dataset.path, device="cpu"), EvalConfig(batch_size=16))
    save_untrained(tmp_path / "net", dataset)
    write_history(tmp_path / "net", [Epoch(k, 1.0, 0.5, 0.8, 0.5, 0.8, 1e-3, 100.0, 0.0) for k in (1, 2)])
    evaluate_run(tmp_path / "net", dataset, EvalConfig(bootstrap=0))
    return tmp_path / "net"


def rewrite(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    metrics = json.loads((run / METRICS).read_text())
    change(metrics)
    (run / METRICS).write_text(json.dumps(metrics))


def probabilities(path: Path, classes: tuple[str, ...]) -> np.ndarray:
    table = pq.read_table(path)
    return np.stack([table[name].to_numpy() for name in classes], axis=1)


def test_predictions_are_scaled_and_say_so(
    call: Call, run: Path, twelve: Path, twelve_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = open_dataset(twelve)
    temperature = temperature_of(run, read_meta(run / "best")).value
    assert temperature is not None and abs(temperature - 1) > 0.01
    raw = predict_slices(load_predictor(run, dataset, device="cpu"), dataset, np.arange(len(dataset)), batch_size=16)
    for name, src in (("dataset", twelve), ("files", twelve_tree)):
        out, scans, report = (tmp_path / f"{name}{end}" for end in (".parquet", "-scans.parquet", ".html"))
        assert call("predict", run, "--src", src, "--out", out, "--scans", scans, "--report", report) == 0
        assert f"net: calibrated, temperature {temperature:.3f}." in capsys.readouterr().err
        assert f"calibrated, temperature {temperature:.3f}" in report.read_text(encoding="utf-8")
        found = probabilities(out, dataset.classes)
        assert np.array_equal(found, scaled(raw, temperature).astype(np.float32)), name
        rows = pq.read_table(out)["series_row"].to_numpy()
        of_scans = probabilities(scans, dataset.classes)
        assert np.array_equal(of_scans, np.stack([found[rows == one].max(axis=0) for one in np.unique(rows)]))
        for path in (out, scans):
            kept = json.loads(pq.read_schema(path).metadata[b"ich_networks"])
            assert kept == [{"run": "net", "temperature": temperature}]


def test_they_are_not_if_told_so(
    call: Call, run: Path, twelve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = open_dataset(twelve)
    out = tmp_path / "x.parquet"
    assert call("predict", run, "--src", twelve, "--out", out, "--no-calibrate") == 0
    assert "net: not calibrated: --no-calibrate." in capsys.readouterr().err
    raw = predict_slices(load_predictor(run, dataset, device="cpu"), dataset, np.arange(len(dataset)), batch_size=16)
    assert np.array_equal(probabilities(out, dataset.classes), raw)
    assert json.loads(pq.read_schema(out).metadata[b"ich_networks"]) == [{"run": "net", "temperature": None}]


def test_a_submission_is_scaled_too(call: Call, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, option in (("scaled", []), ("raw", ["--no-calibrate"])):
        assert call("predict", run, "--out", tmp_path / f"{name}.csv", *option) == 0
    said = capsys.readouterr().err
    assert "net: calibrated" in said and "net: not calibrated" in said
    assert (tmp_path / "scaled.csv").read_text() != (tmp_path / "raw.csv").read_text()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda metrics: metrics["model"].update(epoch=77), "its evaluation is of another epoch"),
        (lambda metrics: metrics["dataset"].update(trained_on=False), "its evaluation is of another dataset"),
        (lambda metrics: metrics["calibration"].update(temperature=None), "no temperature can be fitted"),
        (lambda metrics: metrics["calibration"].update(temperature=-1.0), "no temperature can be fitted"),
        (lambda metrics: metrics["calibration"].update(temperature="2"), "cannot be read or has no temperature"),
        (lambda metrics: metrics.pop("calibration"), "cannot be read or has no temperature"),
    ],
)
def test_a_temperature_of_something_else_does_not_count(
    run: Path, change: Callable[[dict[str, Any]], object], why: str
) -> None:
    rewrite(run, change)
    found = temperature_of(run, read_meta(run / "best"))
    assert found.value is None
    assert why in found.describe()


def test_without_an_evaluation_there_is_none(run: Path) -> None:
    meta = read_meta(run / "best")
    (run / METRICS).write_text("{")
    assert "cannot be read" in temperature_of(run, meta).why
    (run / METRICS).unlink()
    assert temperature_of(run, meta).describe() == "not calibrated: it has not been evaluated (ich-train eval)"
