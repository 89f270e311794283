"""The slices that are evaluated: what they are, their labels and their probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset


@dataclass(frozen=True)
class Cases:
    """Slices with their labels and probabilities; line i of each array is slice i."""

    classes: tuple[str, ...]
    rows: NDArray[np.int64]
    labels: NDArray[np.int8]  # (n, classes), -1 where unknown
    probabilities: NDArray[np.float32]  # (n, classes)
    series: NDArray[np.int64]
    series_sizes: NDArray[np.int64]  # slices of that series with pixels, labelled or not
    patients: NDArray[np.int64]
    groups: NDArray[np.int64]  # fold groups: patients that are one person or share images
    positions: NDArray[np.float64]  # from 0 at one end of the series to 1 at the other


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
