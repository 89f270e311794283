"""Values as codes, and the components that equal values link: of slices, volumes or groups. Arrays in, arrays out.

Codes are integers that stand for equal values, -1 for a value that links nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from numpy.typing import NDArray


def one_array(values: pa.Array | pa.ChunkedArray) -> Any:
    """Return ``values`` in one piece."""
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def codes_of(values: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the rank of each value among the sorted distinct values of its column (n,), -1 for null."""
    encoded = one_array(values).dictionary_encode()
    rank_of = np.full(len(encoded.dictionary) + 1, -1, np.int64)
    rank_of[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(encoded.dictionary))
    codes: NDArray[np.int64] = rank_of[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    return codes


def connect(member: NDArray[np.int64], links: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the number of each line's component (n,), the smallest of its members.

    ``member`` (n,) says from 0 which volume or group a line belongs to; lines of one member, or of members that share a
    value, are one component. Each of ``links`` (n,) are codes of values.
    """
    parent = list(range(int(member.max(initial=-1)) + 1))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for codes in links:
        values, members = pairs_of(codes, member)
        for index in np.flatnonzero(np.diff(values) == 0).tolist():
            one, other = root(int(members[index])), root(int(members[index + 1]))
            parent[max(one, other)] = min(one, other)
    roots = np.array([root(number) for number in range(len(parent))], np.int64)
    component: NDArray[np.int64] = roots[member]
    return component


def pairs_of(first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct pairs of two codes, (m,) each, sorted, without those that have a -1."""
    known = (first >= 0) & (second >= 0)
    radix = int(second.max(initial=0)) + 1
    distinct = np.unique(first[known] * radix + second[known])
    return distinct // radix, distinct % radix
