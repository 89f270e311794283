"""Positions of slices in a series: their order along the normal, and their spacing. Arrays in, arrays out.

Positions are ImagePositionPatient (mm), orientations ImageOrientationPatient (direction cosines of rows and columns), both
in the patient coordinate system (PS3.3 C.7.6.2.1.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAME_POSITION_MM = 0.01
GAP_SPACINGS = 1.5
SAME_DIRECTION_COSINE = 0.9998  # about one degree
_NORMAL_STEPS = 1000  # normals that agree to three decimals, a twentieth of a degree, count as equal


@dataclass(frozen=True)
class SliceOrder:
    """The order of slices; every array has n elements and, except ``order``, is in the order of the input.

    ``order``: int64, the indices that sort the slices. ``position_mm``: float64, the distance along the
    normal of the reference slice, or the slice location in a series that is ordered by it, NaN if a slice is ordered by its
    number. ``reference``: int64, the index of the slice
    whose orientation is that of the series, -1 if no slice of the series has one. ``other_orientation``: bool, has
    a position, but another orientation than the reference. ``no_position``: bool, ordered by instance number.
    ``direction_unknown``: bool, ordered by slice location or instance number: they may count towards the feet.
    """

    order: NDArray[np.int64]
    position_mm: NDArray[np.float64]
    reference: NDArray[np.int64]
    other_orientation: NDArray[np.bool_]
    no_position: NDArray[np.bool_]
    direction_unknown: NDArray[np.bool_]


@dataclass(frozen=True)
class Spacing:
    """Distances between the slices of series, in mm.

    For each slice, (n,): ``slice_spacing_mm``, float64, to the next slice, or for the last slice to the previous one, NaN if
    one of the two has no position; ``duplicate_position``, bool, within 0.01 mm of a neighbour; ``gap_before``, bool, more
    than one and a half usual spacings after the previous slice. For each series, (s,): ``series_spacing_mm``, float64, the
    median over neighbours at different positions, NaN if there are none.
    """

    slice_spacing_mm: NDArray[np.float64]
    duplicate_position: NDArray[np.bool_]
    gap_before: NDArray[np.bool_]
    series_spacing_mm: NDArray[np.float64]


def order_slices(
    position: NDArray[np.float64],
    orientation: NDArray[np.float64],
    instance_number: NDArray[np.float64],
    *,
    series: NDArray[Any],
    uid: NDArray[Any],
    slice_location: NDArray[np.float64] | None = None,
) -> SliceOrder:
    """Return the order of n slices: by series, then by position along the normal that most slices of the series share.

    ``position`` (n, 3) and ``orientation`` (n, 6) are NaN where unknown, ``instance_number`` (n,) likewise. ``series`` and
    ``uid``, (n,), are UIDs or their ranks. A series in which a slice has no position or orientation is ordered by
    ``slice_location`` (n,), in mm, if each of its slices has one; else by instance number, if each has one; else the
    slices without a position follow the others. Ties are broken by instance number, then ``uid``, so the result does not
    depend on the order of the input.
    """
    normal = normals(orientation)
    group = _group_ids(series)
    reference = _reference_slices(normal, group, uid)[group]
    shared = np.where((reference < 0)[:, np.newaxis], np.nan, normal[reference])
    with np.errstate(invalid="ignore"):
        position_mm = np.einsum("ij,ij->i", position, shared)
        other_orientation = ~(np.abs(np.einsum("ij,ij->i", normal, shared)) >= SAME_DIRECTION_COSINE)

    no_number = np.isnan(instance_number)
    no_position = np.isnan(position_mm) | np.isnan(normal[:, 0])
    direction_unknown = no_position.copy()
    if slice_location is not None and no_position.any():
        by_location = _any_in_group(no_position, group) & ~_any_in_group(np.isnan(slice_location), group)
        position_mm = np.where(by_location, slice_location, position_mm)
        no_position &= ~by_location
        direction_unknown |= by_location
    no_position |= _any_in_group(no_position, group) & ~_any_in_group(no_number, group)
    number = np.where(no_number, np.inf, instance_number)
    position_mm = np.where(no_position, np.nan, position_mm)
    key = np.where(no_position, number, position_mm)
    return SliceOrder(
        order=np.lexsort((uid, number, key, no_position, group)),
        position_mm=position_mm,
        reference=reference,
        other_orientation=other_orientation & ~direction_unknown & ~no_position,
        no_position=no_position,
        direction_unknown=direction_unknown | no_position,
    )


def number_ranks(numbers: NDArray[np.int64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return each number's rank among the ``known`` ones, (n,) float64, NaN where not known.

    As float64, numbers beyond 2**53, such as time stamps, would no longer be distinct.
    """
    ranks = np.full(len(numbers), np.nan)
    ranks[known] = _group_ids(numbers[known])
    return ranks


def measure_spacing(position_mm: NDArray[np.float64], starts: NDArray[np.int64]) -> Spacing:
    """Return the distances between neighbours of the same series.

    ``position_mm``, (n,): slices in their order, NaN where unknown. ``starts``, (s,): where each series begins.
    """
    before = np.diff(position_mm, prepend=np.nan)
    before[starts] = np.nan
    after = np.r_[before[1:], np.nan] if len(before) else before
    parts = np.split(before, starts[1:]) if len(starts) else []
    typical = np.array([_median_spacing(part[1:]) for part in parts])
    usual = np.repeat(typical, np.diff(np.r_[starts, len(before)]))
    with np.errstate(invalid="ignore"):
        return Spacing(
            slice_spacing_mm=np.where(np.isnan(after), before, after),
            duplicate_position=(before < SAME_POSITION_MM) | (after < SAME_POSITION_MM),
            gap_before=before > GAP_SPACINGS * usual,
            series_spacing_mm=typical,
        )


def normals(orientation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the unit normal of each ``orientation``, (n, 6), as (n, 3); NaN if it is unknown or has no normal."""
    normal = np.cross(orientation[:, :3], orientation[:, 3:])
    with np.errstate(invalid="ignore", divide="ignore"):
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return normal


def tilt_degrees(orientation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the angle between each slice's normal and the axis of the scanner, (n,); ``orientation`` is (n, 6)."""
    degrees: NDArray[np.float64] = np.degrees(np.arccos(np.clip(np.abs(normals(orientation)[:, 2]), 0, 1)))
    return degrees


def group_starts(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return the indices, ascending, at which a new value begins in ``values`` (n,), where equal values are adjacent."""
    if not len(values):
        return np.empty(0, np.int64)
    return np.flatnonzero(np.r_[True, values[1:] != values[:-1]])


def _reference_slices(normal: NDArray[np.float64], group: NDArray[np.int64], uid: NDArray[Any]) -> NDArray[np.int64]:
    """Return for each group the index of a slice whose normal, (n, 3), most slices of the group share, -1 if none has one.

    Ties, between slices and between normals, are broken by the least ``uid``. A scout or a reformatted slice among the
    others must not be the reference.
    """
    references = np.full(group.max(initial=-1) + 1, -1, np.int64)
    known = np.flatnonzero(~np.isnan(normal[:, 0]))
    steps = np.rint(normal[known] * _NORMAL_STEPS).astype(np.int64) + _NORMAL_STEPS
    radix = 2 * _NORMAL_STEPS + 1
    same_normal = _group_ids(group[known] * radix**3 + steps @ np.array([radix**2, radix, 1]))
    votes = np.bincount(same_normal)[same_normal]
    order = known[np.lexsort((uid[known], -votes, group[known]))]
    first = order[group_starts(group[order])]
    references[group[first]] = first
    return references


def _group_ids(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return each value's rank among the distinct values, from 0."""
    return np.unique(values, return_inverse=True)[1].reshape(-1)


def _any_in_group(values: NDArray[np.bool_], group: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each element whether ``values`` is true for any element of its group."""
    any_in_group = np.zeros(len(values), bool)
    any_in_group[group[values]] = True
    return any_in_group[group]


def _median_spacing(steps: NDArray[np.float64]) -> float:
    """Return the median distance between neighbours at different positions, in mm; NaN if there are none."""
    distinct = steps[steps >= SAME_POSITION_MM]
    return float(np.median(distinct)) if len(distinct) else np.nan
