"""The RSNA 2019 competition's submission file, made of the probabilities of slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from ich_prep.dataset.storage import naming, write_whole
from ich_prep.errors import UsageError, count
from ich_prep.files import require_regular
from ich_train.rsna import require_rsna
from ich_train.runs import require_writable
from ich_train.split import split_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset
    from ich_train.checkpoint import Meta


@dataclass(frozen=True)
class Submission:
    """How many lines were written, for how many slices, and how many of these have no usable image."""

    lines: int
    slices: int
    without_image: int


@dataclass(frozen=True)
class _Lines:
    """The slice and the class of each line; slices by SOP Instance UID, classes as indices into the dataset's."""

    slice_ids: pa.Array
    classes: NDArray[np.int64]


def check_submission(out: Path, classes: tuple[str, ...]) -> None:
    """Raise `UsageError` if ``classes`` are not RSNA's, or if ``out`` cannot be written."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder. Name the CSV file to write with --out.")
    require_writable(out.parent, hint="Name another file with --out.")
    require_rsna(classes, "A submission")


def require_names(dataset: Dataset) -> None:
    """Raise `UsageError` if ``dataset`` has pseudonyms: a submission names slices by their SOP Instance UID."""
    if dataset.has_pseudonyms:
        raise UsageError(
            f"A submission names slices by their SOP Instance UID; {dataset.path} has pseudonyms. Build the dataset with "
            "--identifiers keep."
        )


def write_submission(
    out: Path,
    slices: pa.Table,
    classes: tuple[str, ...],
    *,
    sample: Path | None = None,
    shares: Callable[[], NDArray[np.float32]],
) -> Submission:
    """Write the probabilities of ``slices`` to ``out`` in the competition's format.

    ``slices`` have a ``sop_instance_uid``, a ``label_line`` and a column for each of ``classes``, null where they have no
    probability. The lines are ``ID,Label`` with IDs of the form ``<sop_instance_uid>_<class>``: those of the file ``sample``
    in its order, or without it six for each of ``slices``, in the order of the label file and then of the table. A slice
    without a probability gets ``shares()``, (classes,). Raises `UsageError` if ``sample`` is not such a file.
    """
    usable = slices.filter(pc.is_valid(slices[classes[0]]))
    lines = _lines_of_sample(sample, classes) if sample is not None else _lines_of(slices, len(classes))
    # One row more than there are usable slices: for those without an image, at index -1.
    place = pc.fill_null(pc.index_in(lines.slice_ids, usable["sop_instance_uid"].combine_chunks()), -1).to_numpy()
    without_image = len(pc.unique(lines.slice_ids.filter(pa.array(place < 0))))
    filled = shares() if without_image else np.zeros(len(classes), np.float32)
    probabilities = np.stack([usable[name].to_numpy() for name in classes], axis=1)
    values = np.vstack([probabilities, filled]).astype(np.float32)[place, lines.classes]
    names = np.array(classes)[lines.classes]
    # Nine digits are what a float32 needs to read back as the same number.
    text = "".join(
        f"{slice_id}_{name},{value:.9g}\n"
        for slice_id, name, value in zip(lines.slice_ids.to_pylist(), names, values.tolist(), strict=True)
    )
    write_output(out, f"ID,Label\n{text}".encode())
    return Submission(len(values), len(pc.unique(lines.slice_ids)), without_image)


def write_output(out: Path, data: bytes) -> None:
    """Write a file that the user named, and the folders above it; an `OSError` names that file, not a temporary one."""
    with naming(out):  # for its folder too
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, data)


def _lines_of(slices: pa.Table, count: int) -> _Lines:
    """Return ``count`` lines for each of ``slices``, in the order of the label file."""
    line = pc.fill_null(slices["label_line"], np.iinfo(np.int64).max).to_numpy()
    ordered = np.argsort(line, kind="stable")
    slice_ids = slices["sop_instance_uid"].take(pa.array(np.repeat(ordered, count))).combine_chunks()
    return _Lines(slice_ids, np.tile(np.arange(count), len(slices)))


def _lines_of_sample(sample: Path, classes: tuple[str, ...]) -> _Lines:
    """Return the lines of a sample submission; raises `UsageError` if the file is not one."""
    expected = "Expected a sample submission with the columns ID,Label and lines such as ID_0123abcde_any,0.5"
    try:
        require_regular(sample)
        table = csv.read_csv(sample, convert_options=csv.ConvertOptions(column_types={"ID": pa.string()}))
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"Cannot read {sample}: {error}. {expected}.") from error
    if table.column_names != ["ID", "Label"] or not len(table):
        raise UsageError(f"{expected}; {sample} has {count(len(table), 'line')} of {', '.join(table.column_names)}.")
    ids = table["ID"].combine_chunks()
    parts = pc.extract_regex(ids, f"(?s)^(?P<slice>.+)_(?P<class>{'|'.join(classes)})$")
    if parts.null_count:
        first = ids[pc.index(pc.is_null(parts), True).as_py()]
        raise UsageError(
            f"{expected}; {sample} has {count(parts.null_count, 'line')} of other names, the first {first!s}."
        )
    indices = pc.index_in(parts.field("class"), pa.array(classes)).to_numpy().astype(np.int64)
    return _Lines(parts.field("slice"), indices)


def training_shares(dataset: Dataset, meta: Meta) -> NDArray[np.float32]:
    """Return the share of positives of each label among the training slices of a run, (classes,), 0 if none is known."""
    split = split_rows(
        dataset, val_fold=meta.val_fold, test_fold=meta.test_fold, allow_series_labels=True, where=meta.where, needed=()
    )
    labels = dataset.labels[split.train]
    known = (labels >= 0).sum(axis=0)
    shares: NDArray[np.float32] = ((labels > 0).sum(axis=0) / np.maximum(known, 1)).astype(np.float32)
    return shares
