"""How a series splits into volumes: passes over the same place become volumes; tiles, re-scans and stray slices do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.stages.volumes import VolumeSplit, overlapping_groups

NONE = -1


def split(*groups: tuple[int, Any], others: tuple[NDArray[np.int64], ...] = ()) -> VolumeSplit:
    """Split one series that consists of (value, positions) groups."""
    position = np.concatenate([np.asarray(positions, np.float64) for _, positions in groups])
    keys = np.concatenate([np.full(len(positions), key, np.int64) for key, positions in groups])
    return overlapping_groups(position, np.zeros(len(position), np.int64), [keys, *others])


HEAD = np.arange(0.0, 150, 5)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5, 40.0])
def test_two_passes_over_one_head_are_two_volumes(shift: float) -> None:
    found = split((4, HEAD), (7, HEAD + shift))
    assert found.volume.tolist() == [0] * 30 + [1] * 30
    assert found.key.tolist() == [4] * 30 + [7] * 30
    assert set(found.attribute.tolist()) == {0}


def test_three_phases_are_three_volumes() -> None:
    assert split((0, HEAD), (1, HEAD), (2, HEAD)).volume.tolist() == [0] * 30 + [1] * 30 + [2] * 30


def test_passes_of_different_lengths_are_compared_with_the_shorter_one() -> None:
    assert split((0, HEAD), (1, np.arange(60.0, 80, 1.25))).volume.max() == 1
    assert split((0, HEAD), (1, np.arange(140.0, 240, 5))).volume.max() == 0  # 5 mm of 95
    assert split((0, HEAD), (1, [130.0, 140.0, 150.0, 160.0])).volume.max() == 0  # 15 of 30 is not more than half
    assert split((0, HEAD), (1, [129.0, 139.0, 149.0, 159.0])).volume.max() == 1


def test_acquisitions_that_tile_are_one_volume() -> None:
    tiles = [(number, np.arange(4) * 5.0 + 20 * number) for number in range(21)]
    found = split(*tiles)
    assert not found.volume.any()
    assert (found.attribute == -1).all() and (found.key == -1).all()


def test_a_second_pass_of_tiles_is_one_volume() -> None:
    tiles = [(number, np.arange(4) * 5.0 + 20 * (number % 5)) for number in range(10)]
    found = split(*tiles)
    assert found.volume.tolist() == [0] * 20 + [1] * 20
    assert found.key.tolist() == [0] * 20 + [5] * 20


def test_one_or_two_slices_scanned_again_are_no_volume() -> None:
    for again in ([70.0], [70.0, 75.0], [70.0, 70.0, 70.005]):
        assert not split((0, HEAD), (1, again)).volume.any()


def test_a_time_of_its_own_for_each_slice_splits_nothing() -> None:
    position = np.r_[HEAD, HEAD + 1]
    found = overlapping_groups(position, np.zeros(60, np.int64), [np.full(60, NONE), np.arange(60)])
    assert not found.volume.any()


def test_without_attributes_nothing_is_split() -> None:
    found = overlapping_groups(np.r_[HEAD, HEAD], np.zeros(60, np.int64), [np.full(60, NONE)] * 3)
    assert not found.volume.any()
    none = overlapping_groups(np.empty(0), np.empty(0, np.int64), [np.empty(0, np.int64)])
    assert len(none.volume) == len(none.attribute) == len(none.key) == 0


def test_the_first_attribute_that_splits_is_used() -> None:
    position, phase = np.r_[HEAD, HEAD], np.repeat([0, 1], 30)
    one_number, per_slice = np.zeros(60, np.int64), np.arange(60)
    for attributes, used in (
        ([one_number, phase, per_slice], 1),
        ([np.full(60, NONE), np.full(60, NONE), phase], 2),
        ([phase, per_slice, np.tile([0, 1], 30)], 0),
    ):
        found = overlapping_groups(position, np.zeros(60, np.int64), attributes)
        assert found.volume.tolist() == phase.tolist()
        assert set(found.attribute.tolist()) == {used}


def test_a_stray_slice_joins_the_volume_around_it_or_the_nearest() -> None:
    low, high = np.arange(0.0, 100, 5), np.arange(30.0, 150, 5)
    found = split((1, low), (2, high), (3, [10.0]), (4, [140.0]), (5, [-20.0]), (NONE, [170.0]))
    assert found.volume[-4:].tolist() == [0, 1, 0, 1]
    assert found.key[-4:].tolist() == [1, 2, 1, 2]


def test_slices_without_a_value_fill_the_gaps() -> None:
    """One slice of each pass has no AcquisitionNumber."""
    found = split((0, np.delete(HEAD, 9)), (1, np.delete(HEAD, 20)), (NONE, HEAD[[9, 20]]))
    assert [np.sort(HEAD).tolist()] * 2 == [
        sorted(np.r_[np.delete(HEAD, 9), np.delete(HEAD, 20), HEAD[[9, 20]]][found.volume == number].tolist())
        for number in (0, 1)
    ]
    both = split((0, np.delete(HEAD, 9)), (1, np.delete(HEAD, 9)), (NONE, HEAD[[9, 9]]))
    assert both.volume[-2:].tolist() == [0, 1]


def test_a_slice_without_a_position_is_not_lost() -> None:
    found = split((0, HEAD), (1, [*HEAD, np.nan]), (NONE, [np.nan]), (5, [np.nan] * 9))
    assert found.volume.tolist() == [0] * 30 + [1] * 31 + [0] * 10
    assert not split((0, [np.nan] * 9), (1, [np.nan] * 9)).volume.any()


def test_each_series_is_split_for_itself() -> None:
    position = np.r_[HEAD, HEAD, HEAD]
    series = np.repeat([9, 3, 9], 30)
    found = overlapping_groups(position, series, [np.repeat([0, 1, 1], 30)])
    assert found.volume.tolist() == [0] * 60 + [1] * 30
    assert found.attribute.tolist() == [0] * 30 + [-1] * 30 + [0] * 30


def test_a_real_head_of_many_acquisitions_is_one_volume(real_data: Path) -> None:
    paths = sorted((real_data / "head_ct" / "ge_hispeed").glob("*.dcm"))
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    numbers = np.array([header.AcquisitionNumber for header in headers], np.int64)
    assert len(set(numbers.tolist())) > 10
    position = np.array([header.ImagePositionPatient[2] for header in headers], np.float64)
    series = np.unique([header.SeriesInstanceUID for header in headers], return_inverse=True)[1]
    assert not overlapping_groups(position, series, [numbers]).volume.any()


series_of_slices = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.one_of(st.just(np.nan), st.integers(0, 9).map(float)),
        st.integers(-1, 3),
        st.integers(-1, 2),
    ),
    max_size=60,
)


@given(series_of_slices, st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_no_slice_is_lost_and_groups_stay_together(lines: list[tuple[int, float, int, int]], random: Any) -> None:
    random.shuffle(lines)
    series, position, first, second = (np.array([line[i] for line in lines]) for i in range(4))
    series, first, second = (values.astype(np.int64) for values in (series, first, second))
    position = position.astype(np.float64)
    found = overlapping_groups(position, series, [first, second])
    assert len(found.volume) == len(lines)
    for number in set(series.tolist()):
        inside = series == number
        volumes = np.unique(found.volume[inside]).tolist()
        assert volumes == list(range(len(volumes)))
        used = set(found.attribute[inside].tolist())
        assert len(used) == 1
        assert (used == {-1}) == (len(volumes) == 1)
        if used == {-1}:
            continue
        keys = [first, second][used.pop()]
        for volume in volumes:
            (name,) = set(found.key[inside & (found.volume == volume)].tolist())
            mine = position[inside & (found.volume == volume) & (keys == name)]
            assert len(np.unique(mine[~np.isnan(mine)])) >= 3
        for key in set(keys[inside].tolist()) - {-1}:
            places = position[inside & (keys == key)]
            if len(np.unique(places[~np.isnan(places)])) >= 3:
                assert len(set(found.volume[inside & (keys == key)].tolist())) == 1


@given(series_of_slices, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_the_split_does_not_depend_on_how_slices_are_given(
    lines: list[tuple[int, float, int, int]], random: Any
) -> None:
    lines = list({(line[0], str(line[1]), *line[2:]): line for line in lines}.values())  # alike ones keep their order
    shuffled = list(range(len(lines)))
    random.shuffle(shuffled)
    columns = [np.array([line[i] for line in lines], np.float64) for i in range(4)]

    def of(order: list[int]) -> VolumeSplit:
        series, position, first, second = (column[order] for column in columns)
        return overlapping_groups(position, series.astype(np.int64), [first.astype(np.int64), second.astype(np.int64)])

    before, after = of(list(range(len(lines)))), of(shuffled)
    for name in ("volume", "attribute", "key"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name)[shuffled])


def test_a_pass_without_a_number_over_one_with_a_number_is_a_volume() -> None:
    position = np.r_[np.arange(8) * 5.0, np.arange(8) * 5.0 + 0.0003]
    keys = np.r_[np.full(8, -1), np.full(8, 0)]
    split = overlapping_groups(position, np.zeros(16, np.int64), [keys])
    assert len(set(split.volume[:8].tolist())) == len(set(split.volume[8:].tolist())) == 1
    assert split.volume[0] != split.volume[8]


def test_numbers_lost_here_and_there_divide_no_head() -> None:
    keys = np.where(np.arange(16) % 2, 0, -1)
    assert not overlapping_groups(np.arange(16) * 5.0, np.zeros(16, np.int64), [keys]).volume.any()
