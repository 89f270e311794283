"""Judges a trained network on rows of a dataset: probabilities, measures, curves, pictures and a report.

::

    runs/NAME/
        metrics.json            every measure; written last, it says that the evaluation is whole
        predictions.parquet     a line for each slice: what it is, its labels, its probabilities
        curves/*.csv            the points of the ROC and precision-recall curves
        pictures/*.png          what the report shows
        report.html             all of it on one page
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pyarrow import csv

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.errors import UsageError
from ich_train.data import SliceLoader
from ich_train.metrics import (
    POLICIES,
    Curve,
    best_f1_thresholds,
    by_series,
    measure,
    position_scores,
    precision_recall_curves,
    roc_aucs,
    roc_curves,
)
from ich_train.model import conv_layers
from ich_train.plots import (
    Example,
    LayerMaps,
    confusion_panels,
    example_sheet,
    feature_maps,
    history_curve,
    png,
    precision_recall_panels,
    roc_panels,
)
from ich_train.predict import Predictor, load_predictor, predict_rows
from ich_train.report import report_html
from ich_train.runs import METRICS, Epoch, read_history, write_whole
from ich_train.split import Split, label_matrix, split_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset

PREDICTIONS, PICTURES, CURVES, REPORT = "predictions.parquet", "pictures", "curves", "report.html"
SHEET_COLUMNS = 4  # slices in a line of a sheet
SUBSETS = ("train", "val", "test", "all")
NAMED = ("row", "sop_instance_uid", "series_instance_uid", "patient_id", "subset", "fold")


@dataclass(frozen=True)
class Cases:
    """Slices with their labels and probabilities; a line of each array is a slice."""

    rows: NDArray[np.int64]
    labels: NDArray[np.int8]  # (n, 6), -1 where unknown
    probabilities: NDArray[np.float32]  # (n, 6)
    series: NDArray[np.int64]
    series_sizes: NDArray[np.int64]  # usable slices of that series, labelled or not
    patients: NDArray[np.int64]
    positions: NDArray[np.float64]  # from 0 at one end of the series to 1 at the other


def evaluate_run(
    run: Path,
    dataset: Dataset,
    *,
    subset: str = "test",
    limit: int | None = None,
    seed: int = 0,
    bootstrap: int = 1000,
    device: str = "cpu",
    threads: int = 2,
    batch_size: int = 64,
    out: Path | None = None,
) -> dict[str, Any]:
    """Evaluate the best network of the folder ``run`` on a part of ``dataset``; write it all, return the metrics.

    It is written to the folder ``out``, or to ``run``. Labels of whole series are judged, whatever the network learned
    from: the report says so, and the measures by series are those that count then.

    ``subset`` is train, val, test or all three, split as in training; of ``limit`` slices, drawn by ``seed``, where it
    has more. The thresholds of best F1 come from the whole validation part; where that is empty there are none, and
    without a training part there is nothing that knows the position only. Where slices are drawn there is nothing by
    series, for the drawn slices of a series are not the series. Raises `TrainError` where the run has no network or
    history, and `UsageError` where the dataset does not fit it, has no labels or none in the subset, or there is no
    such subset.
    """
    if subset not in SUBSETS:
        raise UsageError(f"Expected a subset of {', '.join(SUBSETS)}; found {subset!r}.")
    out = out or run
    history = read_history(run)
    predictor = load_predictor(run, dataset, device=device)
    meta = predictor.meta
    judged = () if subset == "all" else (subset,)
    split = split_rows(dataset, **meta["split"], allow_series_labels=True, needed=judged)
    part = np.sort(np.concatenate([*vars(split).values()])) if subset == "all" else vars(split)[subset]
    rows = draw_rows(part, limit=limit, seed=seed)
    needed = np.union1d(rows, split.val)
    probabilities = predict_rows(
        predictor.model,
        predictor.preprocess,
        dataset,
        needed,
        context=meta["context"],
        batch_size=batch_size,
        threads=threads,
        device=device,
    )

    cases = _cases(dataset, rows, probabilities[np.searchsorted(needed, rows)])
    validation = _cases(dataset, split.val, probabilities[np.searchsorted(needed, split.val)])
    training = _cases(dataset, split.train, np.empty((len(split.train), len(RSNA_CLASSES)), np.float32))
    baseline = position_scores(training.positions, training.labels, cases.positions)
    metrics = {
        "model": meta,
        "dataset": _describe(dataset, split, meta) | {"patient_is_study": _unnamed(dataset, rows, split)},
        "evaluated": {
            "subset": subset,
            "limit": limit,
            "seed": seed,
            "bootstrap": bootstrap,
            "slices": len(rows),
            "series_labels": bool(
                pc.any(pc.equal(dataset.slices["label_level"].take(pa.array(rows)), "series")).as_py()
            ),
        },
    } | measure_views(cases, validation, baseline, whole=len(rows) == len(part), resamples=bootstrap, seed=seed)

    roc = roc_curves(cases.labels, cases.probabilities)
    precision_recall = precision_recall_curves(cases.labels, cases.probabilities)
    view = metrics["by_slice"]
    figures = draw_history(history, kept=meta["epoch"])
    figures["roc"] = roc_panels(roc, view)
    figures["precision_recall"] = precision_recall_panels(precision_recall, view)
    figures |= {f"confusion_{policy}": confusion_panels(view, policy) for policy in POLICIES}
    for name in RSNA_CLASSES:
        threshold = view["labels"][name]["at_best_f1"]["threshold"]
        figures[f"sheet_{name}"] = draw_sheet(dataset, predictor, cases, name, 0.5 if threshold is None else threshold)
    figures["feature_maps"] = draw_feature_maps(dataset, predictor, _most_certain(cases))

    out.mkdir(parents=True, exist_ok=True)
    (out / METRICS).unlink(missing_ok=True)  # of the evaluation that is replaced
    pq.write_table(_predictions(dataset, cases), out / PREDICTIONS)
    (out / CURVES).mkdir(exist_ok=True)
    _write_curves(out / CURVES / "roc.csv", roc, x="false_positive_rate", y="true_positive_rate")
    _write_curves(out / CURVES / "precision_recall.csv", precision_recall, x="recall", y="precision")
    (out / PICTURES).mkdir(exist_ok=True)
    pictures = {name: png(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        (out / PICTURES / f"{name}.png").write_bytes(picture)
    write_whole(out / REPORT, report_html(metrics, history, pictures))
    write_whole(out / METRICS, json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    return metrics


def draw_rows(rows: NDArray[np.int64], *, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Return ``limit`` of ``rows``, ascending, drawn by ``seed`` without repeats; all of them where there are no more."""
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, size=limit, replace=False))


def measure_views(
    cases: Cases,
    validation: Cases,
    baseline: NDArray[np.float64],
    *,
    whole: bool,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the measures of ``cases`` by slice and, where they are whole series, by series (maximum and mean).

    The thresholds of best F1 are those of ``validation`` in the same view. ``position_only`` beside them is the area
    under the ROC curve of ``baseline`` (n, 6), probabilities that know no more than each slice's place in its series.
    """
    thresholds = best_f1_thresholds(validation.labels, validation.probabilities)
    views: dict[str, Any] = {
        "by_slice": measure(
            cases.labels, cases.probabilities, cases.patients, thresholds, resamples=resamples, seed=seed
        )
        | {"position_only": roc_aucs(cases.labels, baseline)},
        "by_series_max": None,
        "by_series_mean": None,
    }
    for how in ("max", "mean") if whole else ():
        known, likely, _ = by_series(
            validation.series, validation.series_sizes, validation.labels, validation.probabilities, how=how
        )
        labels, probabilities, first = by_series(
            cases.series, cases.series_sizes, cases.labels, cases.probabilities, how=how
        )
        _, by_position, _ = by_series(cases.series, cases.series_sizes, cases.labels, baseline, how=how)
        thresholds = best_f1_thresholds(known, likely)
        views[f"by_series_{how}"] = measure(
            labels, probabilities, cases.patients[first], thresholds, resamples=resamples, seed=seed
        ) | {"position_only": roc_aucs(labels, by_position)}
    return views


def draw_history(history: Sequence[Epoch], kept: int) -> dict[str, Figure]:
    """Return the curves of loss and accuracy by name; ``kept`` is the epoch whose weights are evaluated."""
    epochs = [line.epoch for line in history]
    return {
        quantity: history_curve(
            epochs,
            [getattr(line, f"train_{quantity}") for line in history],
            [getattr(line, f"val_{quantity}") for line in history],
            quantity=quantity,
            kept=kept,
        )
        for quantity in ("loss", "accuracy")
    }


def draw_sheet(dataset: Dataset, predictor: Predictor, cases: Cases, label: str, threshold: float) -> Figure:
    """Return the slices on which the network was surest of ``label``, right and wrong, with their windows.

    At most one slice of a series in each of the four groups, so that one bleed does not fill the sheet.
    """
    j = RSNA_CLASSES.index(label)
    probability, truth = cases.probabilities[:, j], cases.labels[:, j]
    called = probability >= threshold
    groups = {}
    for title, end, chosen, certainty in (
        ("True positives", "highest", (truth == 1) & called, probability),
        ("False positives", "highest", (truth == 0) & called, probability),
        ("False negatives", "lowest", (truth == 1) & ~called, -probability),
        ("True negatives", "lowest", (truth == 0) & ~called, -probability),
    ):
        best = np.flatnonzero(chosen)
        best = best[np.argsort(-certainty[best], kind="stable")]
        _, first = np.unique(cases.series[best], return_index=True)
        picked = best[np.sort(first)[:SHEET_COLUMNS]]
        groups[f"{title}: {chosen.sum():,}, the {end} probability first"] = [
            Example(_windows(dataset, predictor, cases.rows[k]), f"p {probability[k]:.3f} · row {cases.rows[k]}")
            for k in picked
        ]
    return example_sheet(groups, columns=SHEET_COLUMNS)


def draw_feature_maps(dataset: Dataset, predictor: Predictor, row: int) -> Figure:
    """Return what each convolution layer of the network makes of the slice ``row``."""
    context = predictor.meta["context"]
    loader = SliceLoader(dataset, np.array([row]), batch_size=1, order="sequential", context=context, pin=False)
    layers = conv_layers(predictor.model)
    maps: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output, name=name: maps.update({name: output}))
        for name, layer in layers
    ]
    (batch,) = loader
    images = batch.images.to(predictor.device)
    with torch.inference_mode():
        predictor.model(predictor.preprocess(images))
    for handle in handles:
        handle.remove()
    # In the order in which they were reached, which is that of the arithmetic.
    reached = [LayerMaps(name, output[0].float().cpu().numpy()) for name, output in maps.items()]
    return feature_maps(predictor.preprocess.codes(images)[0].cpu().numpy(), reached)


def _windows(dataset: Dataset, predictor: Predictor, row: int) -> NDArray[np.uint8]:
    """Return the windows of one slice as 8-bit codes (channel, y, x), without its neighbours."""
    images = torch.from_numpy(dataset.read([row])).to(predictor.device)
    codes: NDArray[np.uint8] = predictor.preprocess.codes(images)[0].cpu().numpy()
    return codes


def _most_certain(cases: Cases) -> int:
    """Return the row of the highest probability of any: among the slices that have a bleed, if one does."""
    probability, truth = cases.probabilities[:, RSNA_CLASSES.index("any")], cases.labels[:, RSNA_CLASSES.index("any")]
    return int(cases.rows[np.argmax(probability + (truth == 1))])


def _cases(dataset: Dataset, rows: NDArray[np.int64], probabilities: NDArray[np.float32]) -> Cases:
    slices = dataset.slices.select(["series_row", "patient_id", "slice_index"]).take(pa.array(rows))
    series = slices["series_row"].to_numpy().astype(np.int64)
    last = dataset.series["n_slices"].to_numpy()[series] - 1
    place = slices["slice_index"].to_numpy().astype(np.float64)
    return Cases(
        rows=rows,
        labels=label_matrix(dataset, rows),
        probabilities=probabilities,
        series=series,
        series_sizes=dataset.series["n_ok"].to_numpy()[series].astype(np.int64),
        patients=_codes(slices["patient_id"]),
        # The only slice of a series is in the middle of it.
        positions=np.divide(place, last, out=np.full(len(rows), 0.5), where=last > 0),
    )


def _codes(names: pa.ChunkedArray) -> NDArray[np.int64]:
    encoded = names.combine_chunks().dictionary_encode()
    codes: NDArray[np.int64] = encoded.indices.to_numpy().astype(np.int64)
    return codes


def _describe(dataset: Dataset, split: Split, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the dataset is and how many slices, series, patients and positives each part of the split has."""
    parts = {}
    for name, rows in vars(split).items():
        taken = dataset.slices.select(["series_row", "patient_id"]).take(pa.array(rows))
        positives = (label_matrix(dataset, rows) > 0).sum(axis=0)
        parts[name] = {
            "slices": len(rows),
            "series": pc.count_distinct(taken["series_row"]).as_py(),
            "patients": pc.count_distinct(taken["patient_id"]).as_py(),
            "positives": dict(zip(RSNA_CLASSES, positives.tolist(), strict=True)),
        }
    return {
        "name": dataset.path.name,
        "digest": dataset.digest,
        "trained_on": dataset.digest == meta["dataset_digest"],
        "slices": len(dataset.slices),
        "series": len(dataset.series),
        "patients": pc.count_distinct(dataset.slices["patient_id"]).as_py(),
        "parts": parts,
    }


def _unnamed(dataset: Dataset, rows: NDArray[np.int64], split: Split) -> int:
    """Return how many of the slices ``rows`` and of those to train on have their study's UID for a patient."""
    flags = dataset.slices["flags"].take(pa.array(np.union1d(rows, split.train)))
    return int(pc.equal(pc.list_flatten(flags), "patient_is_study").to_numpy().sum())


def _predictions(dataset: Dataset, cases: Cases) -> pa.Table:
    taken = dataset.slices.select([*NAMED, *RSNA_CLASSES]).take(pa.array(cases.rows))
    for j, name in enumerate(RSNA_CLASSES):
        taken = taken.append_column(f"p_{name}", pa.array(cases.probabilities[:, j], pa.float32()))
    return taken


def _write_curves(path: Path, curves: Mapping[str, Curve], *, x: str, y: str) -> None:
    table = pa.table(
        {
            "label": pa.array([name for name, curve in curves.items() for _ in curve.x], pa.string()),
            x: np.concatenate([np.empty(0), *(curve.x for curve in curves.values())]),
            y: np.concatenate([np.empty(0), *(curve.y for curve in curves.values())]),
            "threshold": np.concatenate([np.empty(0), *(curve.threshold for curve in curves.values())]),
        }
    )
    csv.write_csv(table, path)
