"""One evaluation of a cross-validation: each slice by the network that was trained without its fold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_train.evaluation.cases import MOST_VALUES, Cases, cases_of, values_of
from ich_train.evaluation.evaluate import (
    Predicted,
    Rows,
    choose_rows,
    describe,
    measure_all,
    predict_parts,
    write_evaluation,
)
from ich_train.evaluation.figures import curves_of, draw_history, draw_results
from ich_train.predict import Predictor, load_predictor
from ich_train.runs import METRICS_VERSION, mean_history, read_history, require_writable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset
    from ich_train.config import EvalConfig

# Of meta.json: what differs from fold to fold.
_OF_ONE_FOLD = {"epoch", "val_loss", "val_fold", "test_fold"}


@dataclass(frozen=True)
class _Fold:
    """The run that tests on one fold, its rows and what it predicts of them."""

    run: Path
    predictor: Predictor
    rows: Rows
    predicted: Predicted


def evaluate_folds(
    runs: Mapping[int, Path],
    dataset: Dataset,
    evaluation: EvalConfig,
    *,
    out: Path,
    device: str = "cpu",
    threads: int = 2,
) -> dict[str, Any]:
    """Evaluate the best networks of ``runs``, by test fold, together on ``dataset``; write to ``out``, return the metrics.

    The files are those of `ich_train.evaluation.evaluate.evaluate_run`. Every slice of the folds is there once, with the
    probabilities of the network that was tested on it; thresholds and temperature are those of the validation parts of
    all runs together. Without another column to measure by, each fold is also measured apart. Raises as ``evaluate_run``.
    """
    require_writable(out, hint="Name another folder with --out.")
    histories = [read_history(run) for run in runs.values()]
    folds = {
        fold: _predict_fold(run, dataset, evaluation, device=device, threads=threads) for fold, run in runs.items()
    }
    predicted = _pool(dataset, [of.predicted for of in folds.values()])
    if evaluation.by is None and len(folds) <= MOST_VALUES:
        evaluation = evaluation.model_copy(update={"by": "fold"})
    values = None if evaluation.by is None else values_of(dataset, predicted.cases.rows, evaluation.by)
    measured = measure_all(dataset, predicted, evaluation, values, complete=True)
    measured["evaluated"]["subset"] = "folds"

    first = next(iter(folds.values())).predictor
    parts = {f"fold {fold}": of.rows.evaluated for fold, of in folds.items()}
    used = np.unique(
        np.concatenate([part for of in folds.values() for part in (of.rows.evaluated, of.rows.split.train)])
    )
    metrics = {
        "version": METRICS_VERSION,
        "model": first.meta.model_dump(mode="json", exclude=_OF_ONE_FOLD),
        "folds": [
            {"fold": fold, "run": of.run.name, "val_fold": of.predictor.meta.val_fold, "epoch": of.predictor.meta.epoch}
            for fold, of in folds.items()
        ],
        "dataset": describe(dataset, parts, used, trained_on=first.meta.dataset_digest),
    } | measured
    history, curves = mean_history(histories), curves_of(predicted.cases)
    figures = draw_history(history, kept=None) | draw_results(dataset, first, predicted.cases, curves, metrics)
    write_evaluation(out, dataset, predicted.cases, curves, figures, metrics, history)
    return metrics


def _predict_fold(run: Path, dataset: Dataset, evaluation: EvalConfig, *, device: str, threads: int) -> _Fold:
    predictor = load_predictor(run, dataset, device=device)
    rows = choose_rows(dataset, predictor.meta, evaluation)
    return _Fold(run, predictor, rows, predict_parts(dataset, predictor, rows, evaluation, threads=threads))


def _pool(dataset: Dataset, parts: Sequence[Predicted]) -> Predicted:
    cases, order = _pool_cases(dataset, [part.cases for part in parts])
    validation, _ = _pool_cases(dataset, [part.validation for part in parts])
    return Predicted(cases, validation, np.concatenate([part.baseline for part in parts])[order])


def _pool_cases(dataset: Dataset, parts: Sequence[Cases]) -> tuple[Cases, NDArray[np.int64]]:
    """Return ``parts``, of which each row is in one only, as one in the order of the rows, and that order."""
    rows = np.concatenate([part.rows for part in parts])
    order = np.argsort(rows, kind="stable")
    cases = cases_of(dataset, rows[order], np.concatenate([part.probabilities for part in parts])[order])
    scans = [part.scans for part in parts if part.scans is not None]
    return (replace(cases, scans=np.concatenate(scans)[order]) if scans else cases), order
