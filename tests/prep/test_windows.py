"""Windows: their spelling, and their codes against exact rational arithmetic for every int16 HU."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.dataset.windows import PRESETS, Window, parse_window, parse_windows, window_codes, window_table
from ich_prep.errors import UsageError

ALL_HU = np.arange(-32768, 32768).astype(np.int16)
CUSTOM = ("blood=75/215", "narrow=35.5/1", "odd=1/3", "wide=0/65535", "low=-600/1500", "fine=50.25/0.125")


def exact_codes(window: Window) -> NDArray[np.int64]:
    """LINEAR_EXACT of PS3.3 C.11.2.1.3.2, half to even, for every HU in ``ALL_HU``, in integers.

    The window stands in units of a common denominator, so that nothing is rounded before the last step.
    """
    center, width = Fraction(window.center), Fraction(window.width)
    unit = 2 * center.denominator * width.denominator
    lower, span = int((center - width / 2) * unit), int(width * unit)
    whole, rest = np.divmod((ALL_HU.astype(np.int64) * unit - lower) * 255, span)
    up = (2 * rest > span) | ((2 * rest == span) & (whole % 2 == 1))
    codes: NDArray[np.int64] = np.clip(whole + up, 0, 255)
    return codes


@pytest.mark.parametrize("text", [*PRESETS, *CUSTOM])
def test_every_hu_has_its_exact_code(text: str) -> None:
    window = parse_window(text)
    expected = exact_codes(window)
    np.testing.assert_array_equal(window_codes(ALL_HU, window), expected)
    np.testing.assert_array_equal(window_table(window)[ALL_HU.view(np.uint16)], expected)


@pytest.mark.parametrize("text", [*PRESETS, *CUSTOM[:3]])
def test_every_code_within_a_window_is_that_of_fractions(text: str) -> None:
    window = parse_window(text)
    center, width = Fraction(window.center), Fraction(window.width)
    within = range(int(center - width / 2) - 2, int(center + width / 2) + 3)
    expected = [min(255, max(0, round((hu - (center - width / 2)) / width * 255))) for hu in within]
    assert window_table(window)[np.array(within).astype(np.int16).view(np.uint16)].tolist() == expected


def test_halves_go_to_the_even_code() -> None:
    # 25.5, 76.5, 127.5, 178.5 and 229.5.
    assert window_codes(np.array([8, 24, 40, 56, 72], np.int16), PRESETS["brain"]).tolist() == [26, 76, 128, 178, 230]


@given(center=st.integers(-4000, 4000), width=st.integers(1, 8000), half=st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_custom_window_is_exact(center: int, width: int, half: bool) -> None:
    window = Window("any", center=center + 0.5 * half, width=width)
    np.testing.assert_array_equal(window_table(window)[ALL_HU.view(np.uint16)], exact_codes(window))


def test_a_window_is_linear_exact_and_not_linear() -> None:
    # PS3.3 C.11.2.1.2.1 would subtract 0.5 from the center and 1 from the width.
    codes = window_codes(np.array([0, 40, 80], np.int16), Window("brain", center=40, width=80))
    assert codes.tolist() == [0, 128, 255]
    hu = np.arange(1, 80)
    linear = np.rint(((hu - 39.5) / 79 + 0.5) * 255)
    assert (window_codes(hu.astype(np.int16), PRESETS["brain"]) != linear).mean() > 0.8


def test_a_table_is_read_only_and_made_once() -> None:
    table = window_table(PRESETS["bone"])
    assert table.dtype == np.uint8 and table.shape == (65536,)
    assert table is window_table(Window("bone", center=600, width=2800))
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 1


def test_presets_are_the_usual_ones() -> None:
    assert {name: (window.center, window.width) for name, window in PRESETS.items()} == {
        "brain": (40, 80),
        "subdural": (80, 200),
        "bone": (600, 2800),
        "soft_tissue": (40, 380),
        "stroke": (40, 40),
    }
    assert all(name == window.name for name, window in PRESETS.items())


def test_windows_are_parsed_in_their_order() -> None:
    assert parse_windows(["bone", "blood=75/215", "brain"]) == (
        PRESETS["bone"],
        Window("blood", center=75, width=215),
        PRESETS["brain"],
    )
    assert parse_window("low=-600.5/1500") == Window("low", center=-600.5, width=1500)


@pytest.mark.parametrize(
    "text, message",
    [
        ("brian", "Did you mean 'brain'"),
        ("blood=75", "name=center/width"),
        ("blood=75/0", "greater than 0"),
        ("blood=75/-80", "name=center/width"),
        ("blood=.../1", "name=center/width"),
        ("Blood=75/215", "name=center/width"),
        ("", "name=center/width"),
    ],
)
def test_an_invalid_window_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_window(text)


@pytest.mark.parametrize(
    "center, width", [(40, 0), (40, -1), (40, float("nan")), (40, float("inf")), (float("nan"), 80)]
)
def test_a_window_has_a_finite_center_and_width(center: float, width: float) -> None:
    with pytest.raises(UsageError, match="finite center and a width greater than 0"):
        Window("any", center=center, width=width)


@pytest.mark.parametrize("texts", [[], ["brain", "brain"], ["brain", "brain=1/2"]])
def test_windows_have_different_names(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="different names"):
        parse_windows(texts)
