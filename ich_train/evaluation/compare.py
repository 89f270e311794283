"""Compares evaluated runs: measures side by side, and differences with intervals that resample the same patients.

::

    compare.html    the page: verdicts, tables, differences, curves
    compare.json    every number
    compare.csv     the same as a table: a line for each view, run, class and measure
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ich_prep.dataset.storage import write_whole
from ich_prep.errors import UsageError
from ich_train.evaluation.compare_report import LETTERS, VIEWS, compare_html
from ich_train.evaluation.evaluated import Evaluation, read_evaluation, require_same_cases, same_volumes
from ich_train.evaluation.metrics import by_series, precision_recall_curves, roc_curves
from ich_train.evaluation.paired import Network, compare_networks
from ich_train.evaluation.plots import difference_bars, history_curves, png, run_curves
from ich_train.runs import require_writable

VERSION = 1  # of compare.json
HOW = {"by_series_max": "max", "by_series_mean": "mean"}
HEAD = ("view", "run", "folder", "class", "measure")
NUMBERS = ("value", "low", "high", "difference", "difference_low", "difference_high")
MEAN = "(mean)"  # in the column class of the table; no class has this name


def compare(folders: Sequence[Path], out: Path, *, resamples: int, seed: int) -> dict[str, Any]:
    """Compare the evaluations in ``folders``, each with the first; write ``out``, an .html file, and .json and .csv.

    Each is a run, a cross-validation, or what ``ich-train eval --out`` wrote. Returns what ``compare.json`` says. Raises
    `UsageError` for fewer than two folders, for one named twice, for one without an evaluation, and if the evaluated
    slices, their labels or their patients are not the same; `TrainError` for damaged files.
    """
    _check_folders(folders)
    if out.suffix != ".html":
        raise UsageError(f"--out is the page to write, and must end with .html; found {out}.")
    require_writable(out.parent, hint="Name another file with --out.")
    if out.is_dir():
        raise UsageError(f"{out} is a folder. Name a file with --out.")
    first, *others = [read_evaluation(folder) for folder in folders]
    runs = [first, *(require_same_cases(first, other) for other in others)]
    found = {
        "version": VERSION,
        "classes": list(first.classes),
        "slices": len(first.labels),
        "patients": len(np.unique(first.numbered("patient_id"))),
        "resamples": resamples,
        "seed": seed,
        "runs": [_described(letter, run) for letter, run in zip(LETTERS, runs, strict=False)],
    } | _measured(runs, resamples=resamples, seed=seed)
    pictures = {name: png(figure) for name, figure in _draw(found, runs).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out.with_suffix(".json"), (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    write_whole(out.with_suffix(".csv"), _table(found).encode())
    write_whole(out, compare_html(found, pictures).encode())
    return found


def _check_folders(folders: Sequence[Path]) -> None:
    if len(folders) < 2:
        raise UsageError("A comparison takes at least two runs: ich-train compare RUN RUN.")
    if len(folders) > len(LETTERS):
        raise UsageError(f"A comparison takes at most {len(LETTERS)} runs; found {len(folders)}.")
    resolved: dict[Path, Path] = {}
    for folder in folders:
        before = resolved.setdefault(folder.resolve(), folder)
        if before is not folder:
            raise UsageError(f"{folder} is the same folder as {before}. Name each run once.")


def _described(letter: str, run: Evaluation) -> dict[str, Any]:
    return {"run": letter, "folder": str(run.folder)} | run.summary.model_dump(
        mode="json", include={"model", "dataset", "evaluated", "folds"}
    )


def _measured(runs: Sequence[Evaluation], *, resamples: int, seed: int) -> dict[str, Any]:
    """Return the results of each view by name; None for a view that is not of whole series in every run."""
    first = runs[0]
    patients, sizes = first.numbered("fold_group"), first.slices["series_slices"].to_numpy()
    series = first.numbered("series_row")
    given: dict[str, Any] = {"classes": first.classes, "resamples": resamples, "seed": seed}
    views: dict[str, Any] = {}
    for view in VIEWS:
        thresholds = [run.summary.thresholds(view) for run in runs]
        known = [one for one in thresholds if one is not None]
        probabilities: list[Any] = [run.probabilities for run in runs]
        labels, whose = first.labels, patients
        if view in HOW:
            if len(known) < len(runs) or not all(same_volumes(first, run) for run in runs[1:]):
                views[view] = None
                continue
            reduced = [by_series(series, sizes, labels, of, how=HOW[view]) for of in probabilities]  # type: ignore[arg-type]
            labels, whose = reduced[0][0], patients[reduced[0][2]]
            probabilities = [one[1] for one in reduced]
        networks = [Network(*pair) for pair in zip(probabilities, known, strict=True)]
        results = compare_networks(labels, networks, whose, **given)
        views[view] = {"cases": len(labels), "runs": results}
    return views


def _draw(found: Mapping[str, Any], runs: Sequence[Evaluation]) -> dict[str, Any]:
    names = [f"{letter}  {run.folder.name or run.folder}" for letter, run in zip(LETTERS, runs, strict=False)]
    histories = {name: run.history for name, run in zip(names, runs, strict=True) if run.history}
    figures: dict[str, Any] = {"differences": difference_bars(_differences(found))}
    if histories:
        figures |= {quantity: history_curves(names, histories, quantity) for quantity in ("loss", "accuracy")}
    for picture, curves_of, axes in (
        ("roc", roc_curves, ("false positive rate", "true positive rate")),
        ("precision_recall", precision_recall_curves, ("recall", "precision")),
    ):
        curves = {
            name: curves_of(run.labels, run.probabilities, run.classes) for name, run in zip(names, runs, strict=True)
        }
        figures[picture] = run_curves(runs[0].classes, curves, *axes)
    return figures


def _differences(found: Mapping[str, Any]) -> dict[str, dict[str, tuple[float | None, Sequence[float] | None]]]:
    """Return the difference in ROC AUC by slice of each run from the first, with its interval, by class and in the mean."""
    differences = {}
    for run, result in zip(found["runs"][1:], found["by_slice"]["runs"][1:], strict=True):
        entries = result["labels"] | {"mean of classes": result["mean"]}
        differences[f"{run['run']} \N{MINUS SIGN} {LETTERS[0]}"] = {
            name: (entry["roc_auc"]["difference"], entry["roc_auc"]["difference_interval"])
            for name, entry in entries.items()
        }
    return differences


def _table(found: Mapping[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*HEAD, *NUMBERS))
    for view in VIEWS:
        results = [] if found[view] is None else found[view]["runs"]
        for run, result in zip(found["runs"], results, strict=False):
            for name, entry in (*result["labels"].items(), (MEAN, result["mean"])):
                for measure, of in entry.items():
                    if of["value"] is None:
                        continue
                    cells = (of["value"], *(of["interval"] or ("", "")))
                    differences = (of["difference"], *(of["difference_interval"] or ("", "")))
                    writer.writerow((view, run["run"], run["folder"], name, measure, *cells, *differences))
    return text.getvalue()
