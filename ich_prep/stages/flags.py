"""Columns of flags: a sorted list of words for each slice or volume. Arrow and NumPy in, Arrow out, no object for a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from numpy.typing import NDArray


def flag_lists(owners: NDArray[np.int64], words: pa.Array, *, count: int) -> pa.ListArray:
    """Return for each of ``count`` lines the sorted distinct ``words`` (string, (m,)) whose ``owners`` (m,) it is."""
    encoded = words.dictionary_encode()
    ascending = pc.sort_indices(encoded.dictionary)
    rank = np.empty(len(ascending), np.int64)
    rank[ascending.to_numpy()] = np.arange(len(ascending))
    radix = max(1, len(rank))
    pairs = np.unique(owners * radix + rank[encoded.indices.to_numpy()])
    starts = np.searchsorted(pairs, np.arange(count + 1) * radix)
    values = encoded.dictionary.take(ascending).take(pa.array(pairs % radix))
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)


def flags_in(lists: pa.Array | pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    """Return the line of each flag in ``lists``, (m,), and the flag, string (m,); a null list has none."""
    whole = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    return pc.list_parent_indices(whole).to_numpy().astype(np.int64), whole.flatten().cast(pa.string())


def with_flags(lists: pa.Array | pa.ChunkedArray, added: Mapping[str, NDArray[np.bool_]]) -> pa.Array | pa.ChunkedArray:
    """Return ``lists`` (n,) with each of the ``added`` flags where its mask (n,) is true; null stays null elsewhere."""
    chosen = {flag: np.flatnonzero(where) for flag, where in added.items()}
    if not any(map(len, chosen.values())):
        return lists
    lines, words = flags_in(lists)
    owners = np.concatenate([lines, *chosen.values()])
    named = [
        pa.array([flag], pa.string()).take(pa.array(np.zeros(len(where), np.int64))) for flag, where in chosen.items()
    ]
    united = flag_lists(owners, pa.concat_arrays([words, *named]), count=len(lists))
    null = lists.is_null().to_numpy() if isinstance(lists, pa.ChunkedArray) else lists.is_null().to_numpy(False)
    null &= ~np.isin(np.arange(len(lists)), owners)
    if null.any():
        united = pc.if_else(pa.array(null), pa.scalar(None, united.type), united)
    return united.cast(lists.type)
