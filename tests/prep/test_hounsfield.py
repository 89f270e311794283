"""HU and window codes of every 16-bit stored value, against exact arithmetic and the float64 reference."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.dataset.windows import MAX_HU, MIN_HU, PRESETS, Window, window_codes
from ich_prep.pixels.hounsfield import (
    Rescale,
    apply_rescale,
    apply_rescale_and_windows,
    apply_windows,
    rescale_table,
)

ALL_BITS = np.arange(65536, dtype=np.uint16).reshape(256, 256)
WINDOWS = (*PRESETS.values(), Window("blood", center=75, width=215), Window("fine", center=35.5, width=3))

# Slopes and intercepts of real files: RSNA, GE with intercept 0, the sign defect, and fractions that float64 holds exactly.
RESCALES = [(1.0, -1024.0), (1.0, 0.0), (1.0, -1000.0), (2.0, -4047.0), (0.5, -1024.0), (0.25, 0.5), (1.0, -8192.0)]
PADDINGS = [None, (-2000, -2000), (-1500, -1500), (0, 0), (63536, 63536), (-2000, -1500), (0, 24)]


def all_values(*, signed: bool) -> NDArray[np.int64]:
    """The value of each pattern of 16 bits, (65536,)."""
    bits = np.arange(65536)
    return np.where(signed & (bits > 32767), bits - 65536, bits)


def exact_hu(rescale: Rescale) -> NDArray[np.int16]:
    """The HU of every stored value, half to even, in integers: slope and intercept are brought to a common denominator."""
    values = all_values(signed=rescale.signed)
    slope, intercept = Fraction(rescale.slope), Fraction(rescale.intercept)
    unit = slope.denominator * intercept.denominator
    whole, rest = np.divmod(values * int(slope * unit) + int(intercept * unit), unit)
    hu = whole + ((2 * rest > unit) | ((2 * rest == unit) & (whole % 2 == 1)))
    if rescale.padding is not None:
        hu[(values >= rescale.padding[0]) & (values <= rescale.padding[1])] = MIN_HU
    return np.clip(hu, MIN_HU, MAX_HU).astype(np.int16)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("slope, intercept", RESCALES)
def test_every_stored_value_has_its_exact_hu(signed: bool, slope: float, intercept: float) -> None:
    rescale = Rescale(slope, intercept, signed)
    expected = exact_hu(rescale)
    np.testing.assert_array_equal(rescale_table(rescale), expected)
    out = np.empty(ALL_BITS.shape, np.int16)
    apply_rescale(ALL_BITS, rescale, out=out)
    np.testing.assert_array_equal(out.reshape(-1), expected)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_becomes_air_and_nothing_else_does(signed: bool, padding: tuple[int, int] | None) -> None:
    rescale = Rescale(1.0, 0.0, signed, padding)
    found = rescale_table(rescale)
    np.testing.assert_array_equal(found, exact_hu(rescale))
    if padding == (0, 24):
        assert found[:26].tolist() == [MIN_HU] * 25 + [25]


@given(
    signed=st.booleans(),
    slope=st.floats(0.001, 40),
    intercept=st.floats(-9000, 9000),
    padding=st.none() | st.tuples(st.integers(-32768, 65535), st.integers(0, 3000)).map(lambda p: (p[0], p[0] + p[1])),
)
@settings(max_examples=60, deadline=None)
def test_any_rescale_is_the_nearest_whole_hu(
    signed: bool, slope: float, intercept: float, padding: tuple[int, int] | None
) -> None:
    values = all_values(signed=signed)
    exact = np.clip(values * np.longdouble(slope) + np.longdouble(intercept), MIN_HU, MAX_HU)
    if padding is not None:
        exact[(values >= padding[0]) & (values <= padding[1])] = MIN_HU
    found = rescale_table(Rescale(slope, intercept, signed, padding))
    assert np.abs(found - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("slope, intercept", [(2.0002442, -4047.0), (32.1216, -4047.0), (0.1, 0.0)])
def test_a_fractional_slope_is_not_rounded_before_it_is_applied(slope: float, intercept: float) -> None:
    table = rescale_table(Rescale(slope, intercept, signed=False))
    for stored in (0, 1, 1000, 2023, 2047, 3000, 4095):
        exact = stored * Fraction(str(slope)) + Fraction(str(intercept))
        assert table[stored] == min(MAX_HU, max(MIN_HU, round(exact)))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "slope, intercept, padding", [(1.0, -1024.0, None), (1.0, 0.0, (-2000, -1500)), (0.5, 7.0, None)]
)
def test_every_stored_value_has_the_code_of_its_hu(
    signed: bool, slope: float, intercept: float, padding: tuple[int, int] | None
) -> None:
    rescale = Rescale(slope, intercept, signed, padding)
    hu = exact_hu(rescale).reshape(ALL_BITS.shape)
    expected = np.stack([window_codes(hu, window) for window in WINDOWS])
    at_once = np.zeros_like(expected)
    apply_rescale_and_windows(ALL_BITS, rescale, windows=WINDOWS, out=at_once)
    np.testing.assert_array_equal(at_once, expected)
    in_two_steps = np.zeros_like(expected)
    apply_windows(hu, windows=WINDOWS, out=in_two_steps)
    np.testing.assert_array_equal(in_two_steps, expected)


def test_every_int16_hu_has_its_code() -> None:
    hu = ALL_BITS.view(np.int16)
    out = np.zeros((len(WINDOWS), 256, 256), np.uint8)
    apply_windows(hu, windows=WINDOWS, out=out)
    for plane, window in zip(out, WINDOWS, strict=True):
        np.testing.assert_array_equal(plane, window_codes(hu, window))


def test_halves_go_to_the_even_hu() -> None:
    table = rescale_table(Rescale(0.5, 0.0, signed=True))
    assert table[:8].tolist() == [0, 0, 1, 2, 2, 2, 3, 4]
    assert table[-4:].tolist() == [-2, -2, -1, 0]


def test_a_table_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        rescale_table(Rescale(1.0, 0.0, signed=True))[0] = 1


# Some have fewer pixels than one step (16), some a number that 16 does not divide.
SHAPES = [(1, 7), (7, 1), (3, 5), (512, 512), (300, 513), (2, 70_000)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_written_into_the_callers_buffer(shape: tuple[int, int], count: int) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, shape, np.uint16)
    hu = np.zeros(shape, np.int16)
    rescale = Rescale(1.0, -1024.0, signed=False)
    apply_rescale(stored, rescale, out=hu)
    np.testing.assert_array_equal(hu, stored.astype(np.int16) - 1024)
    windows = tuple(Window(f"w{index}", center=30 + 10 * index, width=80 + 50 * index) for index in range(count))
    of_hu, of_stored = np.zeros((2, count, *shape), np.uint8)
    apply_windows(hu, windows=windows, out=of_hu)
    apply_rescale_and_windows(stored, rescale, windows=windows, out=of_stored)
    for index, window in enumerate(windows):
        np.testing.assert_array_equal(of_hu[index], window_codes(hu, window))
    np.testing.assert_array_equal(of_stored, of_hu)


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((2, 8, 8), np.uint8),  # two planes for three windows
        np.zeros((3, 8, 9), np.uint8),
        np.zeros((3, 8, 8), np.int16),
        np.zeros((3, 8, 16), np.uint8)[:, :, ::2],
    ],
    ids=["planes", "columns", "dtype", "order"],
)
def test_a_buffer_of_another_shape_is_refused(out: NDArray[np.uint8]) -> None:
    windows = tuple(PRESETS[name] for name in ("brain", "subdural", "bone"))
    with pytest.raises(ValueError, match=r"Expected out to be uint8 \(3, 8, 8\)"):
        apply_windows(np.zeros((8, 8), np.int16), windows=windows, out=out)
