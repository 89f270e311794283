"""The audit: range, mean and flags of a slice, and the histogram of its HU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.pixels.audit import Audit, HuHistogram, audit
from ich_prep.pixels.hounsfield import Rescale, rescale_table
from ich_prep.pixels.stored import min_max

PLAIN = Rescale(1.0, -1024.0, signed=False)


def audited(stored: NDArray[np.uint16], rescale: Rescale = PLAIN, bits_stored: int = 12) -> Audit:
    limits = min_max(stored, signed=rescale.signed)
    return audit(stored, rescale, limits, bits_stored=bits_stored, content_hash="hash")


def ramp(shape: tuple[int, int] = (64, 64), top: int = 1100) -> NDArray[np.uint16]:
    return np.linspace(0, top, shape[0] * shape[1]).astype(np.uint16).reshape(shape)


@given(
    seed=st.integers(0, 99),
    signed=st.booleans(),
    slope=st.sampled_from([1.0, 0.5, 2.25]),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
@settings(max_examples=60, deadline=None)
def test_range_and_mean_are_those_of_the_hu_before_clipping(
    seed: int, signed: bool, slope: float, shape: tuple[int, int]
) -> None:
    stored = np.random.default_rng(seed).integers(0, 65536, shape, np.uint16)
    hu = (stored.view(np.int16) if signed else stored).astype(np.float64) * slope - 24
    found = audited(stored, Rescale(slope, -24.0, signed, padding=(0, 9)), bits_stored=16)
    assert (found.hu_min, found.hu_max) == (hu.min(), hu.max())
    assert found.hu_mean == pytest.approx(hu.mean(), abs=1e-6)


def test_flags() -> None:
    noise = np.random.default_rng(0).integers(0, 4096, (64, 64), np.uint16)
    tail = np.vstack([ramp()[:48], noise[48:]])
    assert audited(ramp()).flags == ()
    assert audited(np.full((8, 8), 7, np.uint16)).flags == ("constant",)
    assert audited(noise).flags == ("noise",)
    assert "noise" in audited(tail).flags
    assert audited(ramp(top=4095), Rescale(1.0, -1023.0, signed=False)).flags == ("clipped_high",)
    assert audited(ramp(top=4095)).flags == ()  # 3071 HU is the highest that is kept
    assert audited(ramp(top=4095)[:, :1], bits_stored=4).flags == ()  # one column has no neighbours


def test_flags_found_before_come_first() -> None:
    stored = np.full((8, 8), 7, np.uint16)
    found = audit(stored, PLAIN, (7, 7), bits_stored=12, content_hash="hash", flags=("unused_bits",))
    assert found.flags == ("unused_bits", "constant")


@given(
    sizes=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), max_size=5),
    rescale=st.sampled_from([PLAIN, Rescale(0.5, 100.0, signed=True, padding=(-50, 900))]),
)
@settings(max_examples=60, deadline=None)
def test_a_histogram_counts_every_kth_pixel(sizes: list[tuple[int, int]], rescale: Rescale) -> None:
    rng = np.random.default_rng(len(sizes))
    histogram, counts = HuHistogram(), np.zeros(64, np.int64)
    for shape in sizes:
        stored = rng.integers(0, 65536, shape, np.uint16)
        histogram.add(stored, rescale)
        step = max(1, max(shape) // 16)
        hu = rescale_table(rescale)[stored][::step, ::step]
        counts += np.histogram(hu, bins=64, range=(-1024, 3072))[0]
    np.testing.assert_array_equal(histogram.counts(), counts)


def test_a_whole_slice_of_512_is_counted_at_256_pixels() -> None:
    histogram = HuHistogram()
    histogram.add(np.zeros((512, 512), np.uint16), PLAIN)
    assert histogram.counts().tolist() == [256] + [0] * 63
