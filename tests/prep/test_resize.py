"""Resizing: padded to a square with air, averaged by area down, interpolated up, in whole HU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.dataset.windows import MAX_HU, MIN_HU
from ich_prep.pixels.resize import resize_hu


def resized(hu: NDArray[np.int16], size: int) -> NDArray[np.int16]:
    out = np.full((size, size), 12345, np.int16)
    resize_hu(hu, out=out)
    return out


def slice_of(rows: int, columns: int, seed: int = 0) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(MIN_HU, MAX_HU + 1, (rows, columns)).astype(np.int16)


def overlaps(side: int, size: int) -> NDArray[np.float64]:
    """The share of each source pixel in each target pixel, (size, side); each line adds up to 1."""
    edges = np.arange(size + 1) * side / size
    source = np.arange(side)
    covered = np.minimum(edges[1:, None], source + 1) - np.maximum(edges[:-1, None], source)
    shares: NDArray[np.float64] = np.clip(covered, 0, None) * size / side
    return shares


def taps(side: int, size: int) -> NDArray[np.float64]:
    """The weights of linear interpolation between pixel centers, (size, side); the edge is repeated."""
    weights = np.zeros((size, side))
    at = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
    low = np.floor(at).astype(int)
    weights[np.arange(size), low] += 1 - (at - low)
    weights[np.arange(size), np.minimum(low + 1, side - 1)] += at - low
    return weights


@given(side=st.integers(2, 90), share=st.floats(0.05, 0.99), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_down_is_the_mean_by_area(side: int, share: float, seed: int) -> None:
    size = max(1, int(side * share))
    hu = slice_of(side, side, seed)
    exact = overlaps(side, size) @ hu @ overlaps(side, size).T
    assert np.abs(resized(hu, size) - exact).max() <= 0.51


@given(side=st.integers(2, 40), factor=st.floats(1.01, 4), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_up_is_linear(side: int, factor: float, seed: int) -> None:
    size = max(side + 1, int(side * factor))
    hu = slice_of(side, side, seed)
    exact = taps(side, size) @ hu @ taps(side, size).T
    assert np.abs(resized(hu, size) - exact).max() <= 0.51


@given(rows=st.integers(1, 70), columns=st.integers(1, 70), size=st.integers(16, 80), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_nothing_leaves_the_range_of_the_slice_and_air(rows: int, columns: int, size: int, seed: int) -> None:
    hu = slice_of(rows, columns, seed)
    out = resized(hu, size)
    least = hu.min() if rows == columns else MIN_HU
    assert least <= out.min() and out.max() <= hu.max()


@pytest.mark.parametrize("value", [MIN_HU, -1, 0, 37, MAX_HU])
@pytest.mark.parametrize("side, size", [(512, 256), (512, 300), (512, 64), (436, 512), (768, 512), (64, 64)])
def test_one_value_stays_that_value(value: int, side: int, size: int) -> None:
    assert (resized(np.full((side, side), value, np.int16), size) == value).all()


def test_the_same_size_is_a_copy() -> None:
    hu = slice_of(64, 64)
    out = resized(hu, 64)
    np.testing.assert_array_equal(out, hu)
    hu[0, 0] ^= 1
    assert out[0, 0] != hu[0, 0]


@pytest.mark.parametrize("rows, columns, top, left", [(638, 490, 0, 74), (374, 408, 17, 0), (5, 8, 1, 0), (8, 5, 0, 1)])
def test_a_slice_that_is_not_square_is_centred_in_air(rows: int, columns: int, top: int, left: int) -> None:
    side = max(rows, columns)
    hu = slice_of(rows, columns)
    out = resized(hu, side)
    np.testing.assert_array_equal(out[top : top + rows, left : left + columns], hu)
    outside = np.ones((side, side), bool)
    outside[top : top + rows, left : left + columns] = False
    assert (out[outside] == MIN_HU).all()


def test_proportions_are_kept() -> None:
    # A square of bone stays a square whatever the shape of the slice around it.
    hu = np.full((638, 490), MIN_HU, np.int16)
    hu[270:370, 196:296] = 1000
    out = resized(hu, 319) > 500
    assert (out.sum(axis=0) > 0).sum() == (out.sum(axis=1) > 0).sum() == 50


def test_the_source_is_unchanged() -> None:
    for rows, columns, size in ((64, 48, 64), (64, 64, 32), (32, 32, 64)):
        hu = slice_of(rows, columns)
        before = hu.copy()
        resized(hu, size)
        np.testing.assert_array_equal(hu, before)
