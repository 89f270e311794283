"""Evaluates a trained network on rows of a dataset: probabilities, measures, curves, pictures and a report.

::

    runs/NAME/
        metrics.json            every measure; written last: its presence says that the evaluation is complete
        predictions.parquet     a row for each slice: its identity, labels and probabilities
        curves/*.csv            the points of the ROC and precision-recall curves
        pictures/*.png          what the report shows
        report.html             all of it on one page
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from ich_prep.dataset.predictions import PREDICTIONS
from ich_prep.dataset.storage import write_whole
from ich_prep.dataset.tables import parquet_bytes, with_columns
from ich_train.evaluation.calibration import calibration, operating_point
from ich_train.evaluation.cases import Cases, cases_of, select, values_of
from ich_train.evaluation.figures import curves_of, draw_history, draw_network, draw_results
from ich_train.evaluation.metrics import best_f1_thresholds, by_series, measure, roc_aucs
from ich_train.evaluation.plots import png
from ich_train.evaluation.position import position_scores
from ich_train.evaluation.report import report_html
from ich_train.predict import Mirrored, Predictor, load_predictor
from ich_train.rows import draw_rows, labelled_rows
from ich_train.runs import METRICS, METRICS_VERSION, read_history, require_writable
from ich_train.scan_predict import ScanProbabilities, predict_scans, predict_slices, series_rows
from ich_train.split import Split, split_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset
    from ich_train.checkpoint import Meta
    from ich_train.config import EvalConfig
    from ich_train.evaluation.metrics import Curve
    from ich_train.runs import Epoch

PICTURES, CURVES, REPORT = "pictures", "curves", "report.html"
VIEWS: tuple[Literal["max", "mean"], ...] = ("max", "mean")  # of the slices of a series
AXES = {"roc": ("false_positive_rate", "true_positive_rate"), "precision_recall": ("recall", "precision")}
IDENTITY = ("row", "sop_instance_uid", "series_instance_uid", "series_row", "patient_id", "subset", "fold")


@dataclass(frozen=True)
class Rows:
    """The rows of an evaluation. ``complete``: all of the part, and so whole series."""

    split: Split
    evaluated: NDArray[np.int64]
    complete: bool


@dataclass(frozen=True)
class Predicted:
    """The slices evaluated and those of validation; ``baseline`` (n, classes) guesses the former from their places."""

    cases: Cases
    validation: Cases
    baseline: NDArray[np.float64]


def evaluate_run(
    run: Path,
    dataset: Dataset,
    evaluation: EvalConfig,
    *,
    device: str = "cpu",
    threads: int = 2,
    out: Path | None = None,
) -> dict[str, Any]:
    """Evaluate the best network of the folder ``run`` on a part of ``dataset``; write everything, return the metrics.

    The files go to the folder ``out``, or to ``run``. Labels of whole series are accepted, whatever the network learned
    from: the report says so, and the per-series measures are then the ones to read.

    The parts train, val and test are split as in training, and of the filter that the run was trained with; another filter
    of the ``evaluation`` selects the evaluated slices among all. The thresholds of best F1 come from the whole validation
    part; if that is empty there are none, and without a training part there is no position-only baseline. With a
    ``limit`` there are no results by series, because the drawn slices of a series are not the series. Raises
    `TrainError` if the run has no network or history, and `UsageError` if the dataset does not fit it, has no labels or
    none in the part, or if the folder cannot be written to.
    """
    out = out or run
    require_writable(out, hint="Name another folder with --out.")
    predictor = load_predictor(run, dataset, device=device)
    history = read_history(run)
    rows = choose_rows(dataset, predictor.meta, evaluation)
    values = None if evaluation.by is None else values_of(dataset, rows.evaluated, evaluation.by)
    predicted = predict_parts(dataset, predictor, rows, evaluation, threads=threads)
    meta, cases = predictor.meta, predicted.cases
    learned_from = np.union1d(rows.evaluated, rows.split.train)
    metrics = {
        "version": METRICS_VERSION,
        "model": meta.model_dump(mode="json"),
        "dataset": describe(dataset, vars(rows.split), learned_from, trained_on=meta.dataset_digest),
    } | measure_all(dataset, predicted, evaluation, values, complete=rows.complete)
    curves = curves_of(cases)
    figures = draw_history(history, kept=meta.epoch) | draw_results(dataset, predictor, cases, curves, metrics)
    figures |= draw_network(dataset, predictor, cases)
    write_evaluation(out, dataset, cases, curves, figures, metrics, history)
    return metrics


def measure_views(
    cases: Cases,
    validation: Cases,
    baseline: NDArray[np.float64],
    *,
    complete: bool,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the measures of ``cases`` by slice and, if they are ``complete`` series, by series (maximum and mean).

    The scans of a network with a head are measured too, ``by_scan``.

    The thresholds of best F1 are those of ``validation`` in the same view. ``position_only`` beside them is the area
    under the ROC curve of ``baseline`` (n, classes), probabilities that depend on each slice's place in its series only.
    Intervals resample fold groups, each with all its patients.
    """
    patients = len(np.unique(cases.patients))
    given: dict[str, Any] = {"classes": cases.classes, "resamples": resamples, "seed": seed}
    thresholds = best_f1_thresholds(validation.labels, validation.probabilities)
    views: dict[str, Any] = {
        "by_slice": measure(cases.labels, cases.probabilities, cases.groups, thresholds, **given)
        | {"patients": patients, "position_only": roc_aucs(cases.labels, baseline, cases.classes)},
        "by_series_max": None,
        "by_series_mean": None,
        "by_scan": None,
    }
    for how in VIEWS if complete else ():
        val_labels, val_probabilities, _ = _series_of(validation, validation.probabilities, how=how)
        labels, probabilities, first = _series_of(cases, cases.probabilities, how=how)
        _, by_position, _ = _series_of(cases, baseline, how=how)
        thresholds = best_f1_thresholds(val_labels, val_probabilities)
        views[f"by_series_{how}"] = measure(labels, probabilities, cases.groups[first], thresholds, **given) | {
            "patients": patients,
            "position_only": roc_aucs(labels, by_position, cases.classes),
        }
    if cases.scans is not None and validation.scans is not None and complete:
        val_labels, of_validation, _ = _series_of(validation, validation.scans, how="max")
        labels, of_scans, first = _series_of(cases, cases.scans, how="max")
        _, by_position, _ = _series_of(cases, baseline, how="max")
        thresholds = best_f1_thresholds(val_labels, of_validation)
        views["by_scan"] = measure(labels, of_scans, cases.groups[first], thresholds, **given) | {
            "patients": patients,
            "position_only": roc_aucs(labels, by_position, cases.classes),
        }
    return views


def _series_of(
    cases: Cases, values: NDArray[Any], *, how: Literal["max", "mean"]
) -> tuple[NDArray[np.int8], NDArray[Any], NDArray[Any]]:
    """Return the labels of each series, its ``values`` from those of its slices, (n, classes), and one of its slices."""
    return by_series(cases.series, cases.series_sizes, cases.labels, values, how=how)


def choose_rows(dataset: Dataset, meta: Meta, evaluation: EvalConfig) -> Rows:
    """Return the rows of the part that ``evaluation`` names, as the network of ``meta`` splits ``dataset``."""
    subset = evaluation.subset
    parts = partial(
        split_rows, dataset, val_fold=meta.val_fold, test_fold=meta.test_fold, allow_series_labels=True
    )  # fmt: skip
    where = meta.where if evaluation.where is None else evaluation.where
    chosen = parts(where=where, needed=() if subset == "all" else (subset,))
    split = chosen if where == meta.where else parts(where=meta.where, needed=())
    candidates = np.sort(np.concatenate([*vars(chosen).values()])) if subset == "all" else vars(chosen)[subset]
    rows = draw_rows(candidates, limit=evaluation.limit, seed=evaluation.seed)
    complete = len(rows) == len(candidates) and (where is None or _are_whole_series(dataset, rows))
    return Rows(split, rows, complete=complete)


def _are_whole_series(dataset: Dataset, rows: NDArray[np.int64]) -> bool:
    """Return whether ``rows`` are all labelled rows of their series."""
    series = dataset.slices["series_row"].fill_null(-1).to_numpy()
    return bool(np.isin(series[labelled_rows(dataset, allow_series_labels=True)], series[rows]).sum() == len(rows))


def predict_parts(
    dataset: Dataset, predictor: Predictor, rows: Rows, evaluation: EvalConfig, *, threads: int
) -> Predicted:
    """Return the evaluated slices and those of the validation part, each slice predicted once."""
    rows_to_predict = np.union1d(rows.evaluated, rows.split.val)
    if evaluation.mirror:
        predictor = replace(predictor, model=Mirrored(predictor.model))
    scans = None
    if predictor.meta.head is None:
        probabilities = predict_slices(
            predictor, dataset, rows_to_predict, batch_size=evaluation.batch_size, threads=threads
        )
    else:
        scans = predict_scans(predictor, dataset, series_rows(dataset, rows_to_predict), threads=threads)
        probabilities = scans.of_rows(rows_to_predict)
    cases, validation = (
        _with_scans(cases_of(dataset, part, probabilities[np.searchsorted(rows_to_predict, part)]), scans)
        for part in (rows.evaluated, rows.split.val)
    )
    unpredicted = np.empty((len(rows.split.train), len(dataset.classes)), np.float32)
    training = cases_of(dataset, rows.split.train, unpredicted)
    return Predicted(cases, validation, position_scores(training.positions, training.labels, cases.positions))


def _with_scans(cases: Cases, scans: ScanProbabilities | None) -> Cases:
    if scans is None:
        return cases
    return replace(cases, scans=scans.scans[np.searchsorted(scans.series, cases.series)])


def measure_all(
    dataset: Dataset, predicted: Predicted, evaluation: EvalConfig, values: pa.Array | None, *, complete: bool
) -> dict[str, Any]:
    """Return what ``metrics.json`` says of ``predicted``; ``values`` (n,) are those by which it is also measured apart."""
    cases, validation, baseline = predicted.cases, predicted.validation, predicted.baseline
    levels = pc.unique(dataset.slices["label_level"].take(pa.array(cases.rows))).to_pylist()
    given: dict[str, Any] = {"complete": complete, "resamples": evaluation.bootstrap, "seed": evaluation.seed}
    by_value = {}
    for value in [] if values is None else sorted(values.unique().to_pylist()):
        chosen = pc.equal(values, value).to_numpy(zero_copy_only=False)
        by_value[value] = measure_views(select(cases, chosen), validation, baseline[chosen], **given)
    of_both = cases.labels, cases.probabilities, validation.labels, validation.probabilities
    # What is calibrated is a slice's probability: the label of its series does not judge that.
    judged = cases.slice_labels, cases.probabilities, validation.slice_labels, validation.probabilities
    return {
        "evaluated": evaluation.model_dump(exclude={"batch_size"})
        | {"slices": len(cases.rows), "series_labels": bool({*levels} - {"slice", "none"})},
        "calibration": calibration(*judged, cases.classes),
        "operating_point": None
        if evaluation.sensitivity is None
        else operating_point(*of_both, classes=cases.classes, sensitivity=evaluation.sensitivity),
        "by_value": by_value,
    } | measure_views(cases, validation, baseline, **given)


def describe(
    dataset: Dataset, parts: Mapping[str, NDArray[np.int64]], used: NDArray[np.int64], *, trained_on: str
) -> dict[str, Any]:
    """Return what the dataset is and how many slices, series, patients and positives are in each of ``parts``, rows.

    ``used`` are the rows to evaluate or learn from, ``trained_on`` is the digest of the dataset that was trained on.
    """
    described = {}
    for name, part in parts.items():
        taken = dataset.slices.select(["series_row", "patient_id"]).take(pa.array(part))
        positives = (dataset.labels[part] > 0).sum(axis=0)
        described[name] = {
            "slices": len(part),
            "series": pc.count_distinct(taken["series_row"]).as_py(),
            "patients": pc.count_distinct(taken["patient_id"]).as_py(),
            "positives": dict(zip(dataset.classes, positives.tolist(), strict=True)),
        }
    return {
        "name": dataset.path.name,
        "digest": dataset.digest,
        "trained_on": dataset.digest == trained_on,
        "slices": len(dataset.slices),
        "series": len(dataset.series),
        "patients": pc.count_distinct(dataset.slices["patient_id"]).as_py(),
        "parts": described,
        "patient_is_study": _count_without_patient(dataset, used),
    }


def _count_without_patient(dataset: Dataset, rows: NDArray[np.int64]) -> int:
    """Return how many of the slices ``rows`` have their study's UID for a patient."""
    flags = dataset.slices["flags"].take(pa.array(rows))
    return int(pc.equal(pc.list_flatten(flags), "patient_is_study").to_numpy().sum())


def write_evaluation(
    out: Path,
    dataset: Dataset,
    cases: Cases,
    curves: Mapping[str, Mapping[str, Curve]],
    figures: Mapping[str, Figure],
    metrics: Mapping[str, Any],
    history: Sequence[Epoch],
) -> None:
    """Write all files of an evaluation to the folder ``out``, the metrics last."""
    pictures = {name: png(figure) for name, figure in figures.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / METRICS).unlink(missing_ok=True)  # of the evaluation that is replaced
    write_whole(out / PREDICTIONS, parquet_bytes(_predictions(dataset, cases), write_page_checksum=True))
    (out / CURVES).mkdir(exist_ok=True)
    for name, of_labels in curves.items():
        x, y = AXES[name]
        _write_curves(out / CURVES / f"{name}.csv", of_labels, x=x, y=y)
    (out / PICTURES).mkdir(exist_ok=True)
    for name, picture in pictures.items():
        write_whole(out / PICTURES / f"{name}.png", picture)
    write_whole(out / REPORT, report_html(metrics, history, pictures).encode())
    write_whole(out / METRICS, (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())


def _predictions(dataset: Dataset, cases: Cases) -> pa.Table:
    rows = pa.array(cases.rows)
    of = ["dataset"] if len(dataset.parts) > 1 else []
    taken = dataset.slices.select([*IDENTITY, *of]).take(rows)
    labels = dataset.slices.select([*cases.classes]).take(rows)
    added = {"fold_group": dataset.fold_groups.take(rows), "series_slices": pa.array(cases.series_sizes)}
    added |= {name: labels[name] for name in cases.classes}
    for j, name in enumerate(cases.classes):
        added[f"p_{name}"] = pa.array(cases.probabilities[:, j], pa.float32())
    return with_columns(taken, added)


def _write_curves(path: Path, curves: Mapping[str, Curve], *, x: str, y: str) -> None:
    table = pa.table(
        {
            "label": pa.array([name for name, curve in curves.items() for _ in curve.x], pa.string()),
            x: np.concatenate([np.empty(0), *(curve.x for curve in curves.values())]),
            y: np.concatenate([np.empty(0), *(curve.y for curve in curves.values())]),
            "threshold": np.concatenate([np.empty(0), *(curve.threshold for curve in curves.values())]),
        }
    )
    written = pa.BufferOutputStream()
    csv.write_csv(table, written)
    write_whole(path, written.getvalue().to_pybytes())
