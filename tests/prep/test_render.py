"""Rendering: the steps in their order, for any size, kind of pixels and reused memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.dataset.windows import PRESETS, Window, window_codes
from ich_prep.pixels.hounsfield import Rescale, rescale_table
from ich_prep.pixels.render import Scratch, render
from ich_prep.pixels.resize import resize_hu

WINDOWS = (*PRESETS.values(), Window("blood", center=75, width=215))
RESCALES = [Rescale(1.0, -1024.0, signed=False), Rescale(0.5, 7.0, signed=True, padding=(-2000, -1500))]

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
counts = st.integers(0, len(WINDOWS))


def values(shape: tuple[int, int], seed: int) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, 4096, shape, np.uint16)


def expected(
    stored: NDArray[np.uint16], rescale: Rescale, size: int, windows: tuple[Window, ...]
) -> NDArray[np.int16] | NDArray[np.uint8]:
    hu = np.empty((size, size), np.int16)
    resize_hu(rescale_table(rescale)[stored], out=hu)
    return np.stack([window_codes(hu, window) for window in windows]) if windows else hu[np.newaxis]


def rendered(
    stored: NDArray[np.uint16],
    rescale: Rescale,
    size: int,
    windows: tuple[Window, ...],
    scratch: Scratch | None = None,
) -> NDArray[np.int16] | NDArray[np.uint8]:
    out: NDArray[np.int16] | NDArray[np.uint8] = np.full((1, size, size), 12345, np.int16)
    if windows:
        out = np.full((len(windows), size, size), 123, np.uint8)
    render(stored, rescale, windows=windows or None, out=out, scratch=scratch)
    return out


@given(shape=shapes, size=st.integers(16, 48), count=counts, rescale=st.sampled_from(RESCALES), seed=st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_a_slice_is_rescaled_resized_and_windowed(
    shape: tuple[int, int], size: int, count: int, rescale: Rescale, seed: int
) -> None:
    stored = values(shape, seed)
    found = rendered(stored, rescale, size, WINDOWS[:count])
    np.testing.assert_array_equal(found, expected(stored, rescale, size, WINDOWS[:count]))


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_slice_of_the_right_size_is_only_rescaled_and_windowed(count: int) -> None:
    stored = values((64, 64), 0)
    found = rendered(stored, RESCALES[0], 64, WINDOWS[:count])
    np.testing.assert_array_equal(found, expected(stored, RESCALES[0], 64, WINDOWS[:count]))


@given(slices=st.lists(st.tuples(shapes, st.integers(16, 48), counts), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_reused_memory_does_not_change_results(slices: list[tuple[tuple[int, int], int, int]]) -> None:
    scratch = Scratch()
    for seed, (shape, size, count) in enumerate(slices):
        stored = values(shape, seed)
        found = rendered(stored, RESCALES[1], size, WINDOWS[:count], scratch)
        np.testing.assert_array_equal(found, expected(stored, RESCALES[1], size, WINDOWS[:count]))


def test_the_stored_values_are_unchanged() -> None:
    for shape in ((64, 64), (80, 50)):
        stored = values(shape, 1)
        before = stored.copy()
        rendered(stored, RESCALES[0], 64, WINDOWS)
        np.testing.assert_array_equal(stored, before)


def test_a_buffer_for_another_number_of_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected out to be uint8"):
        render(values((64, 64), 0), RESCALES[0], windows=WINDOWS[:2], out=np.empty((3, 64, 64), np.uint8))
