"""Volumes chosen by number or by a filter, as several commands take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from ich_prep.dataset.volumes import find_series
from ich_prep.errors import UsageError

if TYPE_CHECKING:
    from ich_prep.dataset.dataset import Dataset


def choose_volumes(dataset: Dataset, *, series: Sequence[int] = (), where: str | None = None) -> list[int]:
    """Return the ``series_row`` of the volumes named by ``series``, or of which ``where`` selects a slice, ascending.

    Raises ``UsageError`` if neither or both are given, for a volume that is not in the dataset, for an invalid filter,
    and if nothing is selected.
    """
    if bool(series) == (where is not None):
        raise UsageError("Expected either --series NUMBER, which may be repeated, or --where FILTER.")
    if where is not None:
        selected = dataset.slices["series_row"].take(pa.array(dataset.where(where)))
        found: list[int] = sorted(value for value in selected.unique().to_pylist() if value is not None)
        if not found:
            raise UsageError(f"No slice matches --where {where!r}.")
        return found
    for series_row in series:
        try:
            find_series(dataset.series, series_row=series_row)
        except KeyError as error:
            raise UsageError(f"{error.args[0]} `series_row` counts from 0.") from None
    return sorted(set(series))
