"""The nearest known name: what is suggested, and what is too dissimilar."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_prep.errors import did_you_mean, nearest

KNOWN = ("size", "store", "windows", "slices_per_shard", "codec")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("siez", "size"),
        ("slice_per_shard", "slices_per_shard"),
        ("window", "windows"),
        ("CODEC", "codec"),
        ("zzz", ""),
        ("", ""),
        ("x" * 10_000, ""),
    ],
)
def test_the_nearest_name(name: str, expected: str) -> None:
    assert nearest(name, KNOWN) == expected
    assert did_you_mean(name, KNOWN) == (f" Did you mean {expected!r}?" if expected else "")


def test_the_most_similar_name_is_suggested() -> None:
    assert nearest("pixel_spacing_y", ["pixel_spacing_x_mm", "pixel_spacing_y_mm"]) == "pixel_spacing_y_mm"


def test_nothing_is_suggested_if_nothing_is_known() -> None:
    assert nearest("size", []) == ""


@given(known=st.lists(st.text(alphabet="abcdeXYZ_", min_size=1, max_size=8), min_size=1, max_size=6), data=st.data())
def test_a_known_name_is_nearest_to_itself(known: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(known))
    assert nearest(name, known).casefold() == name.casefold()
    assert nearest(name.swapcase(), known).casefold() == name.casefold()
