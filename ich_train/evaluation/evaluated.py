"""What an evaluation wrote, read back, and whether several are of the same cases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError

from ich_prep.dataset.predictions import PREDICTIONS
from ich_prep.dataset.tables import read_parquet
from ich_prep.errors import TrainError, UsageError, count, describe_os_error
from ich_prep.files import read_regular
from ich_train.evaluation.metrics import Thresholds
from ich_train.evaluation.report import part_words
from ich_train.runs import HISTORY, METRICS, METRICS_VERSION, RECIPE, Epoch, mean_history, read_history

MAX_METRICS_BYTES = 1 << 26
IDENTITY = {
    "row": pa.int64(),
    "sop_instance_uid": pa.string(),
    "patient_id": pa.string(),
    "fold_group": pa.string(),
    "series_row": pa.int64(),
    "series_slices": pa.int64(),
}


class _Part(BaseModel):
    """A part of ``metrics.json``: what is not needed here is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Model(_Part):
    network: str
    head: dict[str, object] | None = None
    epoch: int | None = None


class _Dataset(_Part):
    name: str
    digest: str
    trained_on: bool


class _Evaluated(_Part):
    subset: str
    slices: int


class _AtThreshold(_Part):
    threshold: float | None


class _Label(_Part):
    at_best_f1: _AtThreshold


class _View(_Part):
    labels: dict[str, _Label]


class _Fold(_Part):
    fold: int
    run: str
    epoch: int


class Summary(_Part):
    """What a comparison needs of ``metrics.json``."""

    version: int
    model: _Model
    dataset: _Dataset
    evaluated: _Evaluated
    folds: tuple[_Fold, ...] = ()
    by_slice: _View
    by_series_max: _View | None = None
    by_series_mean: _View | None = None

    def describe(self) -> str:
        """Return what was evaluated, in words."""
        return f"{part_words(self.evaluated.subset)} of {self.dataset.name}, digest {self.dataset.digest[:12]}"

    def thresholds(self, view: str) -> Thresholds | None:
        """Return the thresholds of best F1 of the ``view``, by class; None if it was not measured."""
        measured = getattr(self, view)
        return None if measured is None else tuple(entry.at_best_f1.threshold for entry in measured.labels.values())


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: line i of each array is slice i of the table."""

    folder: Path
    summary: Summary
    history: Sequence[Epoch]  # the means of the runs of a cross-validation; empty where there is none
    slices: pa.Table  # with the columns ``IDENTITY``
    labels: npt.NDArray[np.int8]  # (n, classes), -1 where unknown
    probabilities: npt.NDArray[np.float32]  # (n, classes)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in order."""
        return tuple(self.summary.by_slice.labels)

    def numbered(self, column: str) -> npt.NDArray[np.int64]:
        """Return a number for each distinct value of a ``column``, in the order of first occurrence.

        Numbers of slices that are divided alike are equal, whatever the values are.
        """
        encoded = self.slices[column].combine_chunks().dictionary_encode()
        numbers: npt.NDArray[np.int64] = encoded.indices.to_numpy().astype(np.int64)
        return numbers


def read_evaluation(folder: Path) -> Evaluation:
    """Return the evaluation in ``folder``: a run, a cross-validation, or what ``ich-train eval --out`` wrote.

    Raises `UsageError` if there is none, `TrainError` if its files are damaged or of another version.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not the folder of a run or of an evaluation: there is no such folder.")
    again = how_to_evaluate(folder)
    if not (folder / METRICS).is_file():
        raise UsageError(f"{folder} has not been evaluated: there is no {METRICS} in it. {again}")
    summary = read_summary(folder)
    slices, labels, probabilities = _read_predictions(folder, [*summary.by_slice.labels], again)
    if len(slices) != summary.evaluated.slices:
        raise TrainError(
            f"{folder / PREDICTIONS} has {count(len(slices), 'slice')}, {METRICS} beside it "
            f"{summary.evaluated.slices:,}: they are of two evaluations. {again}"
        )
    return Evaluation(folder, summary, _read_history(folder, summary), slices, labels, probabilities)


def read_summary(folder: Path) -> Summary:
    """Return what ``metrics.json`` in ``folder`` says; raises `TrainError` if it cannot be read."""
    file = folder / METRICS
    try:
        document = json.loads(read_regular(file, limit=MAX_METRICS_BYTES))
        if isinstance(document, dict) and document.get("version") != METRICS_VERSION:
            raise TrainError(
                f"Expected {METRICS} of version {METRICS_VERSION} in {folder}; found {str(document.get('version'))[:100]}. "
                f"{how_to_evaluate(folder)}"
            )
        return Summary.model_validate(document)
    except OSError as error:
        raise TrainError(f"Cannot read an evaluation: {describe_os_error(error)}.") from error
    except (ValidationError, ValueError, RecursionError) as error:
        raise TrainError(f"The evaluation in {file} is damaged. {how_to_evaluate(folder)}") from error


def replaced_words(folder: Path, dataset_digest: str, subset: str) -> str:
    """Return which evaluation in ``folder`` one of a ``subset`` of another dataset or state of it replaces, or "".

    It is "" too if there is none, or none that can be read.
    """
    if not (folder / METRICS).is_file():
        return ""
    try:
        before = read_summary(folder)
    except TrainError:
        return ""
    if (before.dataset.digest, before.evaluated.subset) == (dataset_digest, subset):
        return ""
    return (
        f"This replaced the evaluation of {before.describe()}, {count(before.evaluated.slices, 'slice')}, in {folder}; "
        "with --out, both are kept."
    )


def how_to_evaluate(folder: Path) -> str:
    """Return how to write the evaluation in ``folder`` again, in a sentence."""
    if any(folder.glob("fold-*")):
        return f"Write it with `ich-train cv --resume --out {folder}`."
    if (folder / RECIPE).is_file():
        return f"Write it with `ich-train eval {folder}`."
    return "Write it with `ich-train eval RUN --out FOLDER`."


def _read_predictions(
    folder: Path, classes: Sequence[str], again: str
) -> tuple[pa.Table, npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    path = folder / PREDICTIONS
    columns: Mapping[str, pa.DataType] = (
        IDENTITY | dict.fromkeys(classes, pa.int8()) | {f"p_{name}": pa.float32() for name in classes}
    )
    try:
        table = read_parquet(path)
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise TrainError(f"{path} lacks the columns {', '.join(missing)}: an earlier version wrote it. {again}")
        table = table.select([*columns]).cast(pa.schema(columns.items()))
        table.validate(full=True)
    except FileNotFoundError:
        raise TrainError(f"There is no {PREDICTIONS} in {folder}, only {METRICS}. {again}") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise TrainError(f"{path} cannot be read: {error}. {again}") from None
    slices = table.select([*IDENTITY])
    labels = np.stack([table[name].fill_null(-1).to_numpy() for name in classes], axis=1)
    probabilities = np.stack([table[f"p_{name}"].fill_null(np.nan).to_numpy() for name in classes], axis=1)
    if any(column.null_count for column in slices.columns) or not np.isfinite(probabilities).all():
        raise TrainError(f"{path} has empty cells, or probabilities that are no numbers. {again}")
    return slices, labels, probabilities


def _read_history(folder: Path, summary: Summary) -> Sequence[Epoch]:
    if summary.folds:
        runs = [folder / of.run for of in summary.folds]
        return mean_history([read_history(run) for run in runs]) if all((r / HISTORY).is_file() for r in runs) else []
    return read_history(folder) if (folder / HISTORY).is_file() else []


def require_same_cases(first: Evaluation, other: Evaluation) -> Evaluation:
    """Return ``other`` with its slices in the order of those of ``first``.

    Datasets may differ, in their windows or size or in slices that were not evaluated; what was evaluated may not: its
    slices (by row in one dataset, else by SOP Instance UID), their labels, and whose they are. Raises `UsageError` that
    says what differs.
    """
    both = f"{other.folder} cannot be compared with {first.folder}: "
    here, there = (f"{of.folder}: {of.summary.describe()}" for of in (first, other))
    if other.classes != first.classes:
        raise UsageError(
            f"{both}their classes differ: {', '.join(other.classes)}, and {', '.join(first.classes)}. Compare runs on "
            "datasets with the same classes, in the same order."
        )
    same_dataset = first.summary.dataset.digest == other.summary.dataset.digest
    key = "row" if same_dataset else "sop_instance_uid"
    where = pc.index_in(first.slices[key], value_set=other.slices[key].combine_chunks())
    shared = len(where) - where.null_count
    if where.null_count or len(other.slices) != len(first.slices):
        raise UsageError(
            f"{both}they were evaluated on other slices. Only {count(shared, 'slice')} "
            f"{'is' if shared == 1 else 'are'} in both ({here}, {count(len(first.slices), 'slice')}; {there}, "
            f"{count(len(other.slices), 'slice')}). Evaluate both on the same slices with `ich-train eval RUN --data "
            "DATASET --subset PART --out FOLDER`, and compare those folders."
        )
    order = where.to_numpy().astype(np.int64)
    if len(np.unique(order)) != len(order):
        raise UsageError(
            f"{both}their datasets differ ({here}; {there}), so slices are matched by UID, and some slices share one "
            "SOP Instance UID. Evaluate both runs on the same dataset."
        )
    aligned = Evaluation(
        other.folder,
        other.summary,
        other.history,
        other.slices.take(pa.array(order)),
        other.labels[order],
        other.probabilities[order],
    )
    differing = (aligned.labels != first.labels).any(axis=1)
    if differing.any():
        uid = first.slices["sop_instance_uid"][int(np.argmax(differing))].as_py()
        raise UsageError(
            f"{both}the labels of {count(int(differing.sum()), 'slice')} differ, the first of {uid} ({here}; {there}). "
            f"Evaluate both again on the dataset with the right labels, with --data."
        )
    if not np.array_equal(first.numbered("fold_group"), aligned.numbered("fold_group")):
        raise UsageError(
            f"{both}their slices are the same, but belong to other patients ({here}; {there}). "
            "Evaluate both on one dataset, with --data."
        )
    return aligned


def same_volumes(first: Evaluation, other: Evaluation) -> bool:
    """Return whether the slices, which are the same, make up the same volumes, of as many slices with pixels."""
    sizes = pc.all(pc.equal(first.slices["series_slices"], other.slices["series_slices"])).as_py()
    return bool(sizes and np.array_equal(first.numbered("series_row"), other.numbered("series_row")))
