"""The slices that are evaluated: what they are, their labels and their probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.where import joined_schema, slices_with_series
from ich_prep.errors import UsageError, did_you_mean
from ich_train.scans import slice_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset


MOST_VALUES = 20


@dataclass(frozen=True)
class Cases:
    """Slices with their labels and probabilities; line i of each array is slice i."""

    classes: tuple[str, ...]
    rows: NDArray[np.int64]
    labels: NDArray[np.int8]  # (n, classes), -1 where unknown
    slice_labels: NDArray[np.int8]  # (n, classes), those that were given for the slice itself, else -1
    probabilities: NDArray[np.float32]  # (n, classes)
    series: NDArray[np.int64]
    series_sizes: NDArray[np.int64]  # slices of that series with pixels, labelled or not
    patients: NDArray[np.int64]
    groups: NDArray[np.int64]  # fold groups: patients that are one person or share images
    positions: NDArray[np.float64]  # from 0 at one end of the series to 1 at the other
    scans: NDArray[np.float32] | None = None  # (n, classes), a head's probabilities of the scan that each slice is of


def values_of(dataset: Dataset, rows: NDArray[np.int64], name: str) -> pa.Array:
    """Return the column ``name`` of the slices or their series as text (n,), at ``rows`` (n,); "none" for null.

    Raises ``UsageError`` for an unknown column, one of lists, and one with more than ``MOST_VALUES`` values.
    """
    known = joined_schema(dataset.slices.schema, dataset.series.schema)
    if name not in known.names:
        raise UsageError(f"--by: {dataset.path} has no column {name[:100]!r}.{did_you_mean(name[:100], known.names)}")
    kind = known.field(name).type
    if pa.types.is_nested(kind):
        raise UsageError(f"--by takes a column of text, numbers or booleans; {name} is of type {kind}.")
    column = slices_with_series(dataset.slices, dataset.series, [name])[name].take(pa.array(rows))
    values = column.cast(pa.string()).fill_null("none").combine_chunks()
    found = pc.count_distinct(values).as_py()
    if found > MOST_VALUES:
        raise UsageError(
            f"--by takes a column of at most {MOST_VALUES} values; {name} has {found:,}. Group them first."
        )
    return values


def select(cases: Cases, chosen: NDArray[np.bool_]) -> Cases:
    """Return the ``chosen`` (n,) of ``cases``."""
    arrays = {name: value[chosen] for name, value in vars(cases).items() if isinstance(value, np.ndarray)}
    return Cases(classes=cases.classes, **arrays)


def cases_of(dataset: Dataset, rows: NDArray[np.int64], probabilities: NDArray[np.float32]) -> Cases:
    """Return the slices ``rows`` (n,) of ``dataset`` with their ``probabilities`` (n, classes)."""
    slices = dataset.slices.select(["series_row", "patient_id", "slice_index"]).take(pa.array(rows))
    series = slices["series_row"].to_numpy().astype(np.int64)
    last = dataset.series["n_slices"].to_numpy()[series] - 1
    index = slices["slice_index"].to_numpy().astype(np.float64)
    return Cases(
        classes=dataset.classes,
        rows=rows,
        labels=dataset.labels[rows],
        slice_labels=slice_labels(dataset)[rows],
        probabilities=probabilities,
        series=series,
        series_sizes=dataset.series["n_ok"].to_numpy()[series].astype(np.int64),
        patients=_numbered(slices["patient_id"]),
        groups=_numbered(dataset.fold_groups.take(pa.array(rows))),
        # The only slice of a series is in the middle of it.
        positions=np.divide(index, last, out=np.full(len(rows), 0.5), where=last > 0),
    )


def _numbered(texts: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return a number for each distinct text."""
    numbers: NDArray[np.int64] = texts.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    return numbers
