"""The RSNA 2019 competition's submission file, made of a run's probabilities of the test subset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import csv

from ich_prep.dataset.storage import naming, write_whole
from ich_prep.errors import UsageError, count
from ich_prep.files import require_regular
from ich_train.predict import Predictor, load_predictor
from ich_train.rsna import require_rsna
from ich_train.runs import require_writable
from ich_train.scan_predict import predict_slices
from ich_train.split import split_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset


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


def write_submission(
    run: Path,
    dataset: Dataset,
    out: Path,
    *,
    sample: Path | None = None,
    device: torch.device | str = "cpu",
    threads: int = 2,
    batch_size: int = 64,
) -> Submission:
    """Write the probabilities of the test subset to ``out`` in the competition's format.

    The lines are ``ID,Label`` with IDs of the form ``<sop_instance_uid>_<class>``: those of the file ``sample`` in its
    order, or without it six for each row of the subset, in the order of the label file and then of the dataset. A slice
    without a usable image gets the training slices' share of each label. Raises `UsageError` if the dataset has other
    classes than RSNA's pseudonyms or no test subset, ``sample`` is not such a file, or ``out`` cannot be written.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder. Name the CSV file to write with --out.")
    require_writable(out.parent, hint="Name another file with --out.")
    require_rsna(dataset.classes, "A submission")
    if dataset.attributes["spec"].get("identifiers") == "pseudonymise":
        raise UsageError(
            f"A submission names slices by their SOP Instance UID; {dataset.path} has pseudonyms. Build the dataset with "
            "--identifiers keep."
        )
    predictor = load_predictor(run, dataset, device=device)
    slices = dataset.slices
    test = np.flatnonzero(pc.equal(slices["subset"], "test").to_numpy())
    if not len(test):
        raise UsageError(
            f"No slices of the subset test in {dataset.path}. Build from a tree that holds the competition's test files."
        )
    usable = test[dataset.is_ok[test]]
    lines = _lines_of_sample(sample, dataset.classes) if sample is not None else _lines_of(dataset, test)
    # One row more than there are usable slices: for those without an image, at index -1.
    place = pc.fill_null(pc.index_in(lines.slice_ids, slices["sop_instance_uid"].take(pa.array(usable))), -1).to_numpy()
    without_image = len(pc.unique(lines.slice_ids.filter(pa.array(place < 0))))
    shares = _training_shares(dataset, predictor) if without_image else np.zeros(len(dataset.classes), np.float32)

    probabilities = predict_slices(predictor, dataset, usable, batch_size=batch_size, threads=threads)
    values = np.vstack([probabilities, shares])[place, lines.classes]
    names = np.array(dataset.classes)[lines.classes]
    # Nine digits are what a float32 needs to read back as the same number.
    text = "".join(
        f"{slice_id}_{name},{value:.9g}\n"
        for slice_id, name, value in zip(lines.slice_ids.to_pylist(), names, values.tolist(), strict=True)
    )
    with naming(out):  # for its folder too
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, f"ID,Label\n{text}".encode())
    return Submission(len(values), len(pc.unique(lines.slice_ids)), without_image)


def _lines_of(dataset: Dataset, rows: NDArray[np.int64]) -> _Lines:
    """Return six lines for each of ``rows``, in the order of the label file."""
    count = len(dataset.classes)
    line = pc.fill_null(dataset.slices["label_line"].take(pa.array(rows)), np.iinfo(np.int64).max).to_numpy()
    ordered = rows[np.argsort(line, kind="stable")]
    slice_ids = dataset.slices["sop_instance_uid"].take(pa.array(np.repeat(ordered, count))).combine_chunks()
    return _Lines(slice_ids, np.tile(np.arange(count), len(rows)))


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


def _training_shares(dataset: Dataset, predictor: Predictor) -> NDArray[np.float32]:
    """Return the share of positives of each label among the training slices, (classes,), 0 if none is known."""
    meta = predictor.meta
    split = split_rows(dataset, val_fold=meta.val_fold, test_fold=meta.test_fold, allow_series_labels=True)
    labels = dataset.labels[split.train]
    known = (labels >= 0).sum(axis=0)
    shares: NDArray[np.float32] = ((labels > 0).sum(axis=0) / np.maximum(known, 1)).astype(np.float32)
    return shares
