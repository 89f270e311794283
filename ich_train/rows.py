"""The labelled rows of a dataset, and their neighbours in the series."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.errors import UsageError, count

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ich_prep.dataset.dataset import Dataset


def labelled_rows(
    dataset: Dataset, *, allow_series_labels: bool = False, where: str | None = None
) -> NDArray[np.int64]:
    """Return the rows whose status is ok and that have a known label, ascending; only those of the filter ``where``.

    Raises ``UsageError`` if there are none, if the filter is not valid, or if labels are those of a whole series, study or
    patient, which are weak labels of their slices, unless allowed.
    """
    levels = dataset.slices["label_level"]
    ok = dataset.is_ok if where is None else selected_rows(dataset, where)
    weak = ok & ~_equal(levels, "slice") & ~_equal(levels, "none")
    if weak.any() and not allow_series_labels:
        level = levels[int(np.argmax(weak))].as_py()
        raise UsageError(
            f"Expected labels of slices; in {dataset.path} {count(int(weak.sum()), 'slice')} have the label of the "
            f"whole {level}. To use those as labels of each slice, set allow_series_labels = true in [train], or in Python "
            "pass rows=labelled_rows(dataset, allow_series_labels=True)."
        )
    rows = np.flatnonzero(ok & ~_equal(levels, "none"))
    if not len(rows):
        raise UsageError(_why_none(dataset, int(ok.sum()), where))
    return rows


def _why_none(dataset: Dataset, ok: int, where: str | None) -> str:
    """Return why there are no labelled rows: ``ok`` is the number of those with pixels that the filter selects."""
    if ok:
        of_filter = "" if where is None else f" where {where}"
        return (
            f"No labelled slices in {dataset.path}{of_filter}: none of the {count(ok, 'slice')} with pixels has a label. "
            "Build again with --labels, or give labels with `ich-prep relabel`; to read slices without labels, pass their "
            "rows."
        )
    if where is not None and dataset.is_ok.any():
        return f"The filter {where!r} selects none of the slices of {dataset.path} that have pixels. Give another one."
    return f"No slice of {dataset.path} has pixels: all were withdrawn, or could not be decoded."


def selected_rows(dataset: Dataset, where: str) -> NDArray[np.bool_]:
    """Return whether each row has pixels and is one of the filter ``where``, (slices,); raises ``UsageError``."""
    selected = np.zeros(len(dataset.is_ok), bool)
    selected[dataset.where(where)] = True
    return selected & dataset.is_ok


def checked_rows(dataset: Dataset, rows: ArrayLike) -> NDArray[np.int64]:
    """Return the row numbers ``rows``, (n,) integers of any type, as int64.

    Raises ``UsageError`` if there are none, if they are not integers, or if one is not a row of ``dataset``.
    """
    if isinstance(rows, str):
        raise UsageError(f"rows takes row numbers, not a filter: pass rows=dataset.where({rows!r}).")
    array = np.asarray(rows)
    if not array.size:
        raise UsageError("rows is empty: expected at least one row number.")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(
            f"Expected rows of shape (n,) and an integer type; found {array.shape} {array.dtype}. For a mask, pass "
            "numpy.flatnonzero(mask)."
        )
    outside = array[(array < 0) | (array >= len(dataset.slices))]
    if len(outside):
        raise UsageError(f"Expected rows of 0 to {len(dataset.slices) - 1} of {dataset.path}; found {outside[0]}.")
    return array.astype(np.int64, copy=False)


def draw_rows(rows: NDArray[np.int64], *, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Return ``limit`` of ``rows``, ascending, drawn by ``seed`` without repeats; all of them if there are no more."""
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, size=limit, replace=False))


def neighbours(dataset: Dataset, rows: NDArray[np.int64], context: int) -> NDArray[np.int64]:
    """Return for each of ``rows`` the rows from ``context`` below to ``context`` above in its series, (n, 2 context + 1).

    A neighbour that is missing, or whose status is not ok, is replaced by the nearest one towards the slice.
    """
    ok = dataset.is_ok
    series = dataset.slices["series_row"].to_numpy()
    taken = np.repeat(rows[:, np.newaxis], 2 * context + 1, axis=1)
    for sign in (-1, 1):
        for distance in range(1, context + 1):
            wanted = rows + sign * distance
            inside = np.clip(wanted, 0, len(series) - 1)
            exists = (inside == wanted) & (series[inside] == series[rows]) & ok[inside]
            nearer = taken[:, context + sign * (distance - 1)]
            taken[:, context + sign * distance] = np.where(exists, wanted, nearer)
    return taken


def column(dataset: Dataset, name: str, rows: NDArray[np.int64]) -> NDArray[np.generic]:
    """Return the column ``name`` of the label table at ``rows``, (n,); a null number is -1."""
    values = dataset.slices[name].take(pa.array(rows))
    if not pa.types.is_string(values.type) and not pa.types.is_dictionary(values.type):
        values = values.fill_null(-1)
    array: NDArray[np.generic] = np.asarray(values.to_numpy(zero_copy_only=False))
    return array


def _equal(values: pa.ChunkedArray, word: str) -> NDArray[np.bool_]:
    equal: NDArray[np.bool_] = pc.equal(values, word).fill_null(False).to_numpy(zero_copy_only=False)
    return equal
