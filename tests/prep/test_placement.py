"""Placements: slices at any distance, put on planes at equal steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.dataset.affine import AffineError, NoAffine
from ich_prep.dataset.placement import MAX_PLANES, Placement, equal_steps, onto_equal_steps
from ich_prep.dataset.windows import MIN_HU


def placed(*offsets: tuple[float, float, float]) -> Placement:
    grid = np.eye(4)
    grid[:3, 3] = -100, -90, 40
    return Placement(grid, np.array(offsets, float))


@given(
    gaps=st.lists(st.sampled_from([0.0, 1.5, 2.5, 5.0, 10.0]), min_size=2, max_size=12).filter(any),
    slope=st.floats(-20, 20),
)
@settings(max_examples=100, deadline=None)
def test_values_that_grow_linearly_with_the_distance_stay_so(gaps: list[float], slope: float) -> None:
    distances = np.concatenate([[0.0], np.cumsum(gaps)])
    volume = np.rint(distances[:, None, None] * slope * np.ones((1, 3, 4))).astype(np.int16)
    placement = placed(*((0, 0, distance) for distance in distances))
    out, affine = onto_equal_steps(volume, placement)
    step = affine[2, 2]
    assert step == placement.step_mm
    planes = np.arange(len(out)) * step
    assert planes[-1] <= distances[-1] + 1e-6 < planes[-1] + step + 1e-5
    np.testing.assert_allclose(out, np.broadcast_to((planes * slope)[:, None, None], out.shape), atol=1.01)


def test_slices_at_equal_steps_are_unchanged() -> None:
    volume = np.random.default_rng(0).integers(-1000, 3000, (5, 4, 6)).astype(np.int16)
    out, affine = onto_equal_steps(volume, placed(*((0, 0, 2.5 * k) for k in range(5))))
    np.testing.assert_array_equal(out, volume)
    assert affine[:3, 3].tolist() == [-100, -90, 40]


@pytest.mark.parametrize(("right", "down"), [(3, 0), (-2, 1), (0.5, 0.0), (0.25, -1.5)])
def test_a_shift_in_the_plane_is_undone(right: float, down: float) -> None:
    """A column of the patient, seen on each slice at another place, is upright afterwards: where the affine says."""
    volume = np.full((3, 12, 12), MIN_HU, np.int16)
    volume[:, 6, 5] = 1000
    placement = placed((0, 0, 0), (right, down, 5), (2 * right, 2 * down, 10))
    out, affine = onto_equal_steps(volume, placement)
    for k, (x, y) in enumerate([(5, 6), (5 + right, 6 + down), (5 + 2 * right, 6 + 2 * down)]):
        weight = (out[k].astype(float) - MIN_HU) / (1000 - MIN_HU)
        rows, columns = np.indices(weight.shape)
        assert weight.sum() == pytest.approx(1, abs=0.01)
        center = np.array([(weight * columns).sum(), (weight * rows).sum(), k, 1])
        np.testing.assert_allclose((affine @ center)[:3], [x - 100, y - 90, 5 * k + 40], atol=0.02)


def test_of_two_slices_at_one_position_the_first_is_used() -> None:
    volume = np.array([0, 10, 20, 30], np.int16)[:, None, None] * np.ones((1, 2, 2), np.int16)
    out, _ = onto_equal_steps(volume, placed((0, 0, 0), (0, 0, 5), (0, 0, 5.001), (0, 0, 10)))
    assert out[:, 0, 0].tolist() == [0, 10, 30]


@pytest.mark.parametrize(
    ("distances", "reason"),
    [([3.0, 3.0, 3.0], NoAffine.NO_ADVANCE), ([0, 1, 2, 3, MAX_PLANES + 5.0], NoAffine.SPACING_VARIES)],
)
def test_positions_that_make_no_volume_are_refused(distances: list[float], reason: NoAffine) -> None:
    with pytest.raises(AffineError) as refused:
        equal_steps(placed(*((0, 0, distance) for distance in distances)))
    assert refused.value.reason is reason
