from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.dataset.dataset import open_dataset
from ich_train.config import EvalConfig
from ich_train.evaluation.calibration import (
    brier_score,
    calibration,
    calibration_error,
    operating_point,
    reliability,
)
from ich_train.evaluation.evaluate import evaluate_run
from ich_train.evaluation.metrics import log_loss
from ich_train.runs import Epoch, write_history
from ich_train.temperature import fit_temperature, scaled
from tests.support.training_runs import save_untrained

CLASSES = ("a", "b")


def drawn(n: int, *, seed: int, times: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn with probabilities, and those probabilities with their logits multiplied."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 1.5, (n, 2))
    labels = (rng.random((n, 2)) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    labels[rng.random((n, 2)) < 0.1] = -1
    return labels, 1 / (1 + np.exp(-times * logits))


@given(times=st.floats(0.2, 5), seed=st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_logits_times_a_factor_give_it_as_the_temperature(times: float, seed: int) -> None:
    assert fit_temperature(*drawn(40_000, seed=seed, times=times)) == pytest.approx(times, rel=0.05)


@given(times=st.sampled_from([0.3, 1.0, 3.0]), seed=st.integers(0, 20))
@settings(max_examples=10, deadline=None)
def test_the_log_loss_of_other_cases_does_not_rise(times: float, seed: int) -> None:
    found = calibration(*drawn(5000, seed=seed, times=times), *drawn(5000, seed=seed + 1000, times=times), CLASSES)
    assert found["scaled"]["log_loss"] <= found["as_predicted"]["log_loss"] + 1e-3
    if times == 3.0:
        assert found["scaled"]["log_loss"] < found["as_predicted"]["log_loss"] - 0.05
        assert found["scaled"]["ece"] < found["as_predicted"]["ece"] / 2
        assert found["scaled"]["brier"] < found["as_predicted"]["brier"]


def test_scaling_changes_no_ranking_and_is_undone_by_its_inverse() -> None:
    _, probabilities = drawn(500, seed=0)
    moved = scaled(probabilities, 2.5)
    np.testing.assert_array_equal(np.argsort(moved[:, 0]), np.argsort(probabilities[:, 0]))
    np.testing.assert_allclose(scaled(moved, 0.4), probabilities, rtol=1e-5)
    assert np.isfinite(log_loss(np.array([[0, 1]], np.int8), scaled(np.array([[1.0, 0.0]]), 0.5), CLASSES) or 0)


def test_the_measures_on_a_small_example() -> None:
    labels = np.array([[1, 0], [0, -1], [1, 1]], np.int8)
    probabilities = np.array([[0.9, 0.1], [0.9, 0.5], [0.5, 0.5]])
    bins = reliability(labels, probabilities)
    np.testing.assert_allclose(bins.predicted, [0.1, 0.5, 0.9])
    np.testing.assert_allclose(bins.observed, [0, 1, 0.5])
    np.testing.assert_array_equal(bins.cases, [1, 2, 2])
    assert calibration_error(labels, probabilities) == pytest.approx((0.1 + 2 * 0.5 + 2 * 0.4) / 5)
    assert brier_score(labels, probabilities) == pytest.approx((0.01 + 0.01 + 0.81 + 0.25 + 0.25) / 5)


def test_without_both_answers_there_is_no_temperature() -> None:
    for labels in (np.zeros((4, 2), np.int8), np.full((4, 2), -1, np.int8), np.empty((0, 2), np.int8)):
        assert fit_temperature(labels, np.full(labels.shape, 0.3)) is None
    empty = np.empty((0, 2), np.int8)
    assert calibration(empty, np.empty((0, 2)), empty, np.empty((0, 2)), CLASSES)["as_predicted"]["ece"] is None


@given(sensitivity=st.floats(0.05, 1), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_an_operating_point_has_its_sensitivity_on_validation(sensitivity: float, seed: int) -> None:
    labels, probabilities = drawn(300, seed=seed)
    given_ = {"classes": CLASSES, "sensitivity": sensitivity}
    found = operating_point(labels, probabilities, labels, probabilities, **given_)["labels"]
    for j, name in enumerate(CLASSES):
        point = found[name]
        assert point["sensitivity"] >= sensitivity - 1e-12
        higher = probabilities[:, j] > point["threshold"]
        assert higher[labels[:, j] == 1].mean() < sensitivity
        below = probabilities[:, j] < point["threshold"]
        assert point["specificity"] == pytest.approx(below[labels[:, j] == 0].mean())


def test_a_sensitivity_is_a_share_of_whole_positives() -> None:
    probabilities = np.arange(100, 0, -1).reshape(-1, 1) / 101
    labels = np.ones((100, 1), np.int8)
    for percent in range(1, 101):
        found = operating_point(
            labels, probabilities, labels, probabilities, classes=["any"], sensitivity=percent / 100
        )
        assert found["labels"]["any"]["sensitivity"] == percent / 100


def test_an_evaluation_reports_them(twelve: Path, tmp_path: Path) -> None:
    dataset = open_dataset(twelve)
    run = save_untrained(tmp_path / "run", dataset)
    write_history(run, [Epoch(k, 1.0, 0.5, 0.8, 0.5, 0.8, 1e-3, 100.0, 0.0) for k in (1, 2)])
    metrics = evaluate_run(run, dataset, EvalConfig(bootstrap=2, sensitivity=0.9))
    assert metrics["calibration"]["temperature"] > 0
    assert metrics["operating_point"]["labels"]["any"]["sensitivity"] is not None
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "At the thresholds of a sensitivity of 0.9 on validation" in report
    assert "Brier score" in report
    assert (run / "pictures" / "reliability.png").is_file()
    assert evaluate_run(run, dataset, EvalConfig(bootstrap=2))["operating_point"] is None
