"""The order of slices and the distances between them, as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.stages import geometry
from ich_prep.stages.geometry import (
    SliceOrder,
    group_starts,
    measure_spacing,
    normals,
    order_slices,
    slice_turns,
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
    for name in ("position_mm", "other_orientation", "no_position", "order_mm", "direction_unknown"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name)[shuffled])


@given(slices, st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_the_order_does_not_depend_on_how_many_slices_are_ordered_at_once(
    lines: list[tuple[str, float, Any, float]], block: int
) -> None:
    uids = np.array([f"uid{number % 3:02d}" for number in range(len(lines))], str)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(geometry, "BLOCK_SLICES", block)
        in_blocks = ordered(lines, uids)
    at_once = ordered(lines, uids)
    for name in vars(at_once):
        np.testing.assert_array_equal(getattr(in_blocks, name), getattr(at_once, name))


def test_positions_that_tell_nothing_give_no_direction() -> None:
    """Positions and numbers without a covariance: whatever the order of the files, rounding does not turn the series."""
    lines: list[tuple[str, float, Any, float]] = [
        ("s", z, AXIAL, number)
        for z, number in [(np.nan, 9.0), *((0.1 * k, n) for k in (1, 3, 7) for n in (0.1, 0.3, 0.7))]
    ]
    for seed in range(50):
        shuffled = np.random.default_rng(seed).permutation(len(lines))
        after = ordered([lines[number] for number in shuffled], np.array([f"u{number}" for number in shuffled], str))
        assert after.direction_unknown.all()
        assert np.all(np.diff(np.array([lines[shuffled[number]][3] for number in after.order])) >= 0)


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
        rising, falling = (sorted(known, reverse=reverse) for reverse in (False, True))
        assert numbers[: len(known)] in ([rising] if len(placed) else [rising, falling])  # as known positions rise


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


def test_the_reference_is_not_a_slice_that_was_turned_within_its_plane() -> None:
    upside_down = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
    mirrored = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
    found = ordered([("s", 0.0, upside_down, 1.0), ("s", 5.0, AXIAL, 2.0), ("s", 9.0, AXIAL, 3.0)], np.arange(3))
    assert found.reference.tolist() == [1, 1, 1]
    assert found.other_orientation.tolist() == [True, False, False]
    found = ordered([("s", 0.0, mirrored, 1.0), ("s", 5.0, AXIAL, 2.0), ("s", 9.0, AXIAL, 3.0)], np.arange(3))
    assert found.other_orientation.tolist() == [True, False, False]


def along_z(z: list[float], orientation: Any = AXIAL, **others: Any) -> SliceOrder:
    """The order of slices of one series at these heights; UIDs ascend."""
    count = len(z)
    given: dict[str, Any] = {"instance_number": np.full(count, np.nan), "uid": np.arange(count)} | others
    position = np.zeros((count, 3))
    position[:, 2] = z
    position[np.isnan(position[:, 2])] = np.nan
    return order_slices(
        position,
        np.tile(np.array(orientation, float), (count, 1)),
        given.pop("instance_number"),
        series=np.zeros(count, np.int64),
        **given,
    )


def test_slices_at_one_position_are_ordered_by_acquisition_number_and_uid() -> None:
    z = [5.0, 5.004, 5.008, 0.0, 9.0]
    assert along_z(z).order.tolist() == [3, 0, 1, 2, 4]
    assert along_z(z, uid=np.array([4, 3, 2, 1, 0])).order.tolist() == [3, 2, 1, 0, 4]
    number = np.array([3.0, 2.0, 1.0, 7.0, 8.0])
    assert along_z(z, instance_number=number).order.tolist() == [3, 2, 1, 0, 4]
    acquisition = np.array([1.0, np.nan, 2.0, 9.0, 0.0])
    assert along_z(z, instance_number=number, acquisition_number=acquisition).order.tolist() == [3, 0, 2, 1, 4]


def test_positions_are_equal_below_a_hundredth_of_a_millimetre() -> None:
    backwards = np.array([1, 0])
    assert along_z([0.0, 0.0099], uid=backwards).order.tolist() == [1, 0]
    assert along_z([0.0, 0.0101], uid=backwards).order.tolist() == [0, 1]
    assert along_z([4.9999, 5.0001], uid=backwards).order.tolist() == [1, 0]  # rounding would not tell


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([np.nan, 1.0, 2.0]), st.sampled_from([np.nan, 1.0, 2.0]))),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_each_run_of_close_positions_is_sorted_by_numbers(lines: list[tuple[int, float, float]], random: Any) -> None:
    z = [line[0] * 0.006 for line in lines]
    uid = list(range(len(lines)))
    random.shuffle(uid)
    found = along_z(
        z,
        instance_number=np.array([line[1] for line in lines]),
        acquisition_number=np.array([line[2] for line in lines]),
        uid=np.array(uid, np.int64),
    )
    runs: list[list[int]] = []
    for index in sorted(range(len(z)), key=lambda index: z[index]):
        if not runs or z[index] - z[runs[-1][-1]] >= 0.01:
            runs.append([])
        runs[-1].append(index)
    last = {True: np.inf}
    expected = [
        index
        for run in runs
        for index in sorted(
            run, key=lambda i: (*(last.get(np.isnan(value), value) for value in lines[i][:0:-1]), uid[i])
        )
    ]
    assert found.order.tolist() == expected


def test_from_foot_to_head_whatever_the_normal() -> None:
    """Rows mirrored: the normal points to the feet."""
    mirrored = (1.0, 0.0, 0.0, 0.0, -np.cos(np.radians(20)), -np.sin(np.radians(20)))
    z = [10.0, 0.0, 5.0]
    assert along_z(z, mirrored).order.tolist() == [0, 2, 1]
    found = along_z(z, mirrored, foot_to_head=True)
    assert found.order.tolist() == [1, 2, 0]
    assert (np.diff(found.position_mm[found.order]) > 0).all()
    for orientation in (AXIAL, TILTED, CORONAL):
        before, after = along_z(z, orientation), along_z(z, orientation, foot_to_head=True)
        np.testing.assert_array_equal(before.order, after.order)
        np.testing.assert_array_equal(before.position_mm, after.position_mm)


def test_without_positions_the_slice_location_orders_a_series() -> None:
    nowhere, number = [np.nan] * 3, np.array([1.0, 2.0, 3.0])
    found = along_z(nowhere, instance_number=number, slice_location=np.array([7.5, 2.5, 5.0]))
    assert found.order.tolist() == [1, 2, 0]
    assert found.order_mm.tolist() == [7.5, 2.5, 5.0]
    assert found.no_position.all() and np.isnan(found.position_mm).all() and found.direction_unknown.all()
    spacing = measure_spacing(found.order_mm[found.order], np.array([0]))
    assert spacing.series_spacing_mm.tolist() == [2.5]
    for location in ([7.5, np.nan, 5.0], [0.0, 0.0, 0.0], nowhere):
        found = along_z(nowhere, instance_number=number, slice_location=np.array(location))
        assert found.order.tolist() == [0, 1, 2]
        assert np.isnan(found.order_mm).all() and found.direction_unknown.all()


def test_slice_locations_do_not_matter_where_there_are_positions() -> None:
    location = np.array([9.0, 5.0, 1.0])
    found = along_z([0.0, 5.0, 9.0], slice_location=location)
    assert found.order.tolist() == [0, 1, 2] and not found.direction_unknown.any()
    np.testing.assert_array_equal(found.order_mm, found.position_mm)
    some = along_z([0.0, np.nan, 9.0], slice_location=location)
    assert some.order.tolist() == [0, 2, 1] and not some.direction_unknown.any()
    numbered = along_z([0.0, np.nan, 9.0], instance_number=np.array([3.0, 2.0, 1.0]), slice_location=location)
    assert (
        numbered.order.tolist() == [0, 1, 2] and not numbered.direction_unknown.any()
    )  # locations fall as positions rise


def test_slices_of_a_series_are_turned_alike_unless_they_differ() -> None:
    """Rotated by 45 degrees and rounded, slices of one series would need different turns."""
    rotated = [np.r_[np.cos(a), np.sin(a), 0, -np.sin(a), np.cos(a), 0] for a in np.radians([44.9, 45.1, 45.2])]
    upside_down, unknown = np.array([-1.0, 0, 0, 0, -1.0, 0]), np.full(6, np.nan)
    orientation = np.array([*rotated, upside_down, unknown])
    assert slice_turns(orientation, np.zeros(5, np.int64)).tolist() == ["", "", "", "rotate_180", ""]
    assert slice_turns(orientation, np.full(5, 2)).tolist() == ["rotate_90_right"] * 3 + [
        "rotate_180",
        "rotate_90_right",
    ]
    assert slice_turns(orientation[4:], np.array([-1])).tolist() == [""]
    assert slice_turns(np.empty((0, 6)), np.empty(0, np.int64)).tolist() == []


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
