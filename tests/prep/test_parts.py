"""Parts of the shards: together all of them, none twice, and about the same number in each."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ich_prep.stages.parts import ALL, Part, parse_part


@given(st.integers(1, 200), st.integers(0, 500))
def test_parts_divide_the_shards(count: int, shards: int) -> None:
    parts = [Part(number, count).numbers(shards) for number in range(1, count + 1)]
    assert sorted(number for part in parts for number in part) == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(1, 1000), st.integers(0, 1000))
def test_a_part_is_read_as_it_is_written(number: int, more: int) -> None:
    part = Part(number, number + more)
    assert parse_part(str(part)) == part


def test_all_is_one_part() -> None:
    assert list(ALL.numbers(5)) == [0, 1, 2, 3, 4]
