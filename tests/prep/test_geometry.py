"""The order of slices and the distances between them, as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.stages.geometry import (
    SliceOrder,
    group_starts,
    measure_spacing,
    normals,
    order_slices,
    tilt_degrees,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
TILTED = (1.0, 0.0, 0.0, 0.0, np.cos(np.radians(20)), np.sin(np.radians(20)))
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
UNKNOWN = (np.nan,) * 6

slices = st.lists(
    st.tuples(
        st.sampled_from(["s1", "s2", "s3"]),
        st.sampled_from([np.nan, -2.5, 0.0, 5.0, 10.0]),
        st.sampled_from([AXIAL, AXIAL, TILTED, CORONAL, UNKNOWN]),
        st.sampled_from([np.nan, 1.0, 2.0, 3.0]),
    ),
    max_size=16,
)


def ordered(lines: list[tuple[str, float, Any, float]], uids: NDArray[Any]) -> SliceOrder:
    z = np.array([line[1] for line in lines], np.float64)
    return order_slices(
        np.stack([np.where(np.isnan(z), np.nan, 0.0), np.where(np.isnan(z), np.nan, 0.0), z], axis=1),
        np.array([line[2] for line in lines], np.float64).reshape(-1, 6),
        np.array([line[3] for line in lines], np.float64),
        series=np.array([line[0] for line in lines], str),
        uid=uids,
    )


@given(slices, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_does_not_depend_on_how_slices_are_given(
    lines: list[tuple[str, float, Any, float]], random: Any
) -> None:
    uids = np.array([f"uid{number:02d}" for number in range(len(lines))], str)
    before = ordered(lines, uids)
    shuffled = list(range(len(lines)))
    random.shuffle(shuffled)
    after = ordered([lines[number] for number in shuffled], uids[shuffled])
    assert uids[shuffled][after.order].tolist() == uids[before.order].tolist()
    for name in ("position_mm", "other_orientation", "no_position"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name)[shuffled])


@given(slices)
@settings(max_examples=100, deadline=None)
def test_ranks_order_as_uids_do(lines: list[tuple[str, float, Any, float]]) -> None:
    uids = np.array([f"uid{number:02d}" for number in range(len(lines))][::-1], str)
    by_uid, by_rank = ordered(lines, uids), ordered(lines, np.arange(len(lines))[::-1])
    np.testing.assert_array_equal(by_uid.order, by_rank.order)


@given(slices)
@settings(max_examples=100, deadline=None)
def test_a_series_is_sorted_by_position_and_then_by_number(lines: list[tuple[str, float, Any, float]]) -> None:
    found = ordered(lines, np.arange(len(lines)))
    series = np.array([line[0] for line in lines], str)[found.order]
    assert series.tolist() == sorted(series.tolist())
    starts = group_starts(series)
    for part in np.split(found.order, starts[1:]) if len(starts) else []:
        positions, unplaced = found.position_mm[part], found.no_position[part]
        np.testing.assert_array_equal(np.isnan(positions), unplaced)
        placed = positions[~unplaced]
        assert positions.tolist()[: len(placed)] == sorted(placed.tolist())
        numbers = [lines[index][3] for index in part[unplaced]]
        known = [number for number in numbers if not np.isnan(number)]
        assert numbers[: len(known)] == sorted(known)


def test_the_reference_is_a_slice_whose_orientation_most_share() -> None:
    lines = [("s", 0.0, CORONAL, np.nan), ("s", 5.0, AXIAL, np.nan), ("s", 1.0, AXIAL, np.nan)]
    found = ordered(lines, np.arange(3))
    assert found.reference.tolist() == [1, 1, 1]
    assert found.other_orientation.tolist() == [True, False, False]
    nowhere = ordered([("s", 0.0, UNKNOWN, 2.0), ("s", 1.0, UNKNOWN, 1.0)], np.arange(2))
    assert nowhere.reference.tolist() == [-1, -1]
    assert nowhere.order.tolist() == [1, 0]
    assert nowhere.no_position.all()
    assert not nowhere.other_orientation.any()


def test_no_slices_have_an_order_too() -> None:
    found = ordered([], np.empty(0, np.int64))
    assert len(found.order) == len(found.position_mm) == len(found.reference) == 0
    spacing = measure_spacing(np.empty(0), group_starts(np.empty(0)))
    assert len(spacing.slice_spacing_mm) == len(spacing.series_spacing_mm) == 0


def test_spacing_stays_within_a_series() -> None:
    position = np.array([0.0, 5.0, 10.0, 25.0, 100.0, 100.005, 104.0, np.nan, 7.0])
    found = measure_spacing(position, np.array([0, 4, 8]))
    np.testing.assert_allclose(found.slice_spacing_mm, [5, 5, 15, 15, 0.005, 3.995, 3.995, np.nan, np.nan])
    assert np.flatnonzero(found.duplicate_position).tolist() == [4, 5]
    assert np.flatnonzero(found.gap_before).tolist() == [3]
    np.testing.assert_allclose(found.series_spacing_mm, [5, 3.995, np.nan])


def test_normals_are_unit_vectors_or_unknown() -> None:
    orientation = np.array([AXIAL, np.array(AXIAL) * 2, CORONAL, TILTED, (1, 0, 0, 1, 0, 0), UNKNOWN], np.float64)
    found = normals(orientation)
    np.testing.assert_allclose(found[:3], [(0, 0, 1), (0, 0, 1), (0, 1, 0)], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(found[:4], axis=1), 1)
    assert np.isnan(found[4:]).all()
    assert tilt_degrees(orientation)[:4].tolist() == pytest.approx([0, 0, 90, 20])


@pytest.mark.parametrize(("values", "starts"), [([], []), ([3], [0]), ([3, 3, 1, 1, 1, 3], [0, 2, 5])])
def test_groups_begin_where_the_value_changes(values: list[int], starts: list[int]) -> None:
    assert group_starts(np.array(values, np.int64)).tolist() == starts
