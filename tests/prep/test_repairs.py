"""Repairs: which headers have a defect, and what the values are without it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ich_prep.pixels.hounsfield import Rescale, rescale_table
from ich_prep.pixels.repairs import REPAIRS, SIGN_12BIT, HeaderColumns, apply, detect


def test_the_sign_defect_is_12_bits_unsigned_with_an_intercept_above_minus_100() -> None:
    cases = [  # bits stored, signed, intercept, needs the repair
        (12, False, 0.0, True),
        (12, False, 1.0, True),
        (12, False, -99.5, True),
        (12, False, -100.0, False),
        (12, False, -1024.0, False),
        (12, False, np.nan, False),
        (12, True, 0.0, False),
        (16, False, 0.0, False),
        (0, True, np.nan, False),
    ]
    bits, signed, intercept, needed = map(np.array, zip(*cases, strict=True))
    names = detect((SIGN_12BIT,), HeaderColumns(bits, signed, intercept))
    assert names == [(SIGN_12BIT,) if need else () for need in needed]
    assert detect((), HeaderColumns(bits, signed, intercept)) == [() for _ in cases]


@given(hu=arrays(np.int16, (4, 5), elements=st.integers(-1000, 3095)), intercept=st.sampled_from([0.0, 1.0]))
def test_values_that_wrapped_get_their_hu_back(hu: np.ndarray, intercept: float) -> None:
    wrapped = (hu.astype(np.int64) % 4096).astype(np.uint16)  # as they were written: HU below zero wrapped at 12 bits
    before = wrapped.copy()
    stored, rescale = apply(wrapped, Rescale(1.0, intercept, signed=False, padding=(7, 9)), [SIGN_12BIT])
    np.testing.assert_array_equal(stored.astype(np.int64) * rescale.slope + rescale.intercept, hu)
    assert rescale == Rescale(1.0, -1000.0, signed=False, padding=(7, 9))
    np.testing.assert_array_equal(wrapped, before)
    table = rescale_table(Rescale(1.0, -1000.0, signed=False))
    np.testing.assert_array_equal(table[stored], np.minimum(hu, 3071))


def test_without_repairs_nothing_changes() -> None:
    stored, rescale = np.zeros((2, 2), np.uint16), Rescale(1.0, -1024.0, signed=True)
    same, equal = apply(stored, rescale, [])
    assert same is stored
    assert equal is rescale


def test_an_unknown_repair_is_refused() -> None:
    with pytest.raises(KeyError, match="sign_13bit"):
        apply(np.zeros((2, 2), np.uint16), Rescale(1.0, 0.0, signed=False), ["sign_13bit"])
    assert set(REPAIRS) == {SIGN_12BIT}
