"""Columns of flags: the same as with a Python set for each line."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.stages.flags import flag_lists, flags_in, with_flags

WORDS = ("gap_before", "same_image", "Z", "é", "not_head")
columns = st.lists(st.one_of(st.none(), st.lists(st.sampled_from(WORDS), unique=True).map(sorted)), max_size=12)


@given(columns, st.data())
@settings(max_examples=200, deadline=None)
def test_flags_are_added_as_to_sets(lists: list[list[str] | None], data: st.DataObject) -> None:
    masks = {
        flag: np.array(data.draw(st.lists(st.booleans(), min_size=len(lists), max_size=len(lists))), bool)
        for flag in data.draw(st.lists(st.sampled_from(WORDS), unique=True))
    }
    expected = []
    for line, before in enumerate(lists):
        added = {flag for flag, mask in masks.items() if mask[line]}
        expected.append(sorted({*(before or ()), *added}) if added else before)
    kind = pa.list_(pa.string())
    for column in (pa.array(lists, kind), pa.chunked_array([pa.array(lists[:3], kind), pa.array(lists[3:], kind)])):
        assert with_flags(column, masks).to_pylist() == expected


@given(columns)
@settings(max_examples=100, deadline=None)
def test_flags_are_collected_by_their_line(lists: list[list[str] | None]) -> None:
    lines, words = flags_in(pa.array(lists, pa.list_(pa.string())))
    assert list(zip(lines.tolist(), words.to_pylist(), strict=True)) == [
        (line, word) for line, flags in enumerate(lists) for word in flags or ()
    ]
    owners = lines // 2
    united = flag_lists(owners, words, count=len(lists) // 2 + 1)
    assert united.to_pylist() == [
        sorted({word for flags in lists[2 * owner : 2 * owner + 2] for word in flags or ()})
        for owner in range(len(lists) // 2 + 1)
    ]
