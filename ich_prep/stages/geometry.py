"""Positions of slices in a series: their order along the normal, and their spacing. Arrays in, arrays out.

Positions are ImagePositionPatient (mm), orientations ImageOrientationPatient (direction cosines of rows and columns), both
in the patient coordinate system (PS3.3 C.7.6.2.1.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_prep.dataset.affine import is_axial, unit_vectors, upright_turns

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAME_POSITION_MM = 0.01
GAP_SPACINGS = 1.5
BLOCK_SLICES = 1 << 16  # that are ordered at once, and those of one series more
SAME_DIRECTION_COSINE = 0.9998  # about one degree
_ROUNDING = 1e-12  # of the product of two norms: what float64 leaves of a covariance that is zero
_DIRECTION_STEPS = 1000  # directions that agree to three decimals, a twentieth of a degree, count as equal


@dataclass(frozen=True)
class SliceOrder:
    """The order of slices; every array has n elements and, except ``order``, is in the order of the input.

    ``order``: int64, the indices that sort the slices. ``position_mm``: float64, the distance along the
    normal of the reference slice, NaN if a slice is not ordered by its position. ``order_mm``: float64, the distance in mm
    that slices are ordered and spaced by: ``position_mm``, or SliceLocation for a series ordered by that; NaN for slices
    ordered by number. ``reference``: int64, the index of the slice whose orientation is that of the series, -1 if no slice
    of the series has one. ``other_orientation``: bool, has a position, but another orientation than the reference.
    ``no_position``: bool, not ordered by its position. ``direction_unknown``: bool, no slice of its series is, and the
    positions that some have do not tell either whether the first slice is the lowest or the highest.
    """

    order: NDArray[np.int64]
    position_mm: NDArray[np.float64]
    reference: NDArray[np.int64]
    other_orientation: NDArray[np.bool_]
    no_position: NDArray[np.bool_]
    order_mm: NDArray[np.float64]
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
    acquisition_number: NDArray[np.float64] | None = None,
    slice_location: NDArray[np.float64] | None = None,
    foot_to_head: bool = False,
) -> SliceOrder:
    """Return the order of n slices: by series, then by position along the normal that most slices of the series share.

    Memory beyond the result does not grow with n, but for the codes of the series: blocks of whole series are ordered one
    by one.

    ``position`` (n, 3) and ``orientation`` (n, 6) are NaN where unknown, ``instance_number``, ``acquisition_number`` and
    ``slice_location`` in mm, (n,), likewise. ``series`` and ``uid``, (n,), are UIDs or their ranks. With ``foot_to_head``
    the normal of axial slices is the one that points to the head, whatever the direction of their rows and columns.

    Slices without a position or orientation follow those with one, by instance number, unless every slice of their series
    has a number: then that orders the whole series. A series of which no slice is ordered by its position is ordered by
    SliceLocation (PS3.3 C.7.6.2.1.2) instead if all its slices have one and not all the same. Either counts in the direction
    in which the positions that are known rise. Slices of which neighbours are less than
    ``SAME_POSITION_MM`` apart count as being at one position, and are ordered among themselves by acquisition number,
    instance number, then ``uid``, unknown numbers last; so the result does not depend on the order of the input.
    """
    group = _group_ids(series)
    ordered = np.argsort(group, kind="stable")
    starts = group_starts(group[ordered])
    firsts = starts[np.diff(starts // BLOCK_SLICES, prepend=-1) > 0]
    result = SliceOrder(
        order=np.empty(len(group), np.int64),
        position_mm=np.empty(len(group)),
        reference=np.empty(len(group), np.int64),
        other_orientation=np.empty(len(group), bool),
        no_position=np.empty(len(group), bool),
        order_mm=np.empty(len(group)),
        direction_unknown=np.empty(len(group), bool),
    )
    for first, end in pairwise(np.r_[firsts, len(group)].tolist()):
        lines = np.sort(ordered[first:end])
        block = _order_block(
            position[lines],
            orientation[lines],
            instance_number[lines],
            group=_group_ids(group[lines]),
            uid=uid[lines],
            acquisition_number=None if acquisition_number is None else acquisition_number[lines],
            slice_location=None if slice_location is None else slice_location[lines],
            foot_to_head=foot_to_head,
        )
        result.order[first:end] = lines[block.order]
        result.reference[lines] = np.where(block.reference < 0, -1, lines[block.reference])
        for name in ("position_mm", "other_orientation", "no_position", "order_mm", "direction_unknown"):
            getattr(result, name)[lines] = getattr(block, name)
    return result


def _order_block(
    position: NDArray[np.float64],
    orientation: NDArray[np.float64],
    instance_number: NDArray[np.float64],
    *,
    group: NDArray[np.int64],
    uid: NDArray[Any],
    acquisition_number: NDArray[np.float64] | None,
    slice_location: NDArray[np.float64] | None,
    foot_to_head: bool,
) -> SliceOrder:
    """Return the order of the slices of some series, as ``order_slices`` does; ``group`` (n,) are ranks of series."""
    normal = normals(orientation)
    reference = _reference_slices(orientation, normal, group, uid)[group]
    shared = np.where((reference < 0)[:, np.newaxis], np.nan, normal[reference])
    if foot_to_head:
        downward = is_axial(orientation)[reference] & (shared[:, 2] < 0)
        shared[downward] *= -1
    position_mm = np.einsum("ij,ij->i", position, shared)

    no_number = np.isnan(instance_number)
    no_position = np.isnan(position_mm) | np.isnan(normal[:, 0])
    known_mm = np.where(no_position, np.nan, position_mm)
    no_position |= _any_in_group(no_position, group) & ~_any_in_group(no_number, group)
    position_mm = np.where(no_position, np.nan, position_mm)
    unplaced = ~_any_in_group(~no_position, group)
    by_location, substitute = np.zeros(len(group), bool), instance_number
    if slice_location is not None:
        by_location = unplaced & _varies_in_group(slice_location, group)
        substitute = np.where(by_location, slice_location, instance_number)
    rise = np.where(unplaced, _rise_in_group(substitute, known_mm, group), 0.0)
    substitute = np.where(rise < 0, -substitute, substitute)
    order_mm = np.where(by_location, substitute, position_mm)
    numbers = [
        np.where(np.isnan(values), np.inf, values)
        for values in (instance_number, acquisition_number)
        if values is not None
    ]
    key = np.where(np.isnan(order_mm), substitute, order_mm)
    place = _ranks(np.where(np.isnan(key), np.inf, key), no_position, group)
    return SliceOrder(
        order=np.lexsort((uid, *numbers, place)),
        position_mm=position_mm,
        reference=reference,
        other_orientation=~_same_orientation(orientation, orientation[reference]) & ~no_position,
        no_position=no_position,
        order_mm=order_mm,
        direction_unknown=unplaced & (rise == 0),
    )


def slice_turns(orientation: NDArray[np.float64], reference: NDArray[np.int64]) -> NDArray[np.str_]:
    """Return the turn of each slice that brings it upright, (n,), keys of ``TURNS``; "" where nothing is to be turned.

    ``orientation`` is (n, 6), NaN where unknown; ``reference``, (n,), as in ``SliceOrder``. All slices of a series get the
    turn of its reference, so that a volume rotated by about 45 degrees is not torn apart by rounding; only those of another
    orientation get their own.
    """
    references, number = np.unique(reference, return_inverse=True)
    shared = np.where(references < 0, "", upright_turns(orientation[references]))
    turns: NDArray[np.str_] = shared[number.reshape(-1)]
    differs = ~np.isnan(orientation).any(axis=1) & ~_same_orientation(orientation, orientation[reference])
    turns[differs] = upright_turns(orientation[differs])
    return turns


def measure_spacing(position_mm: NDArray[np.float64], starts: NDArray[np.int64]) -> Spacing:
    """Return the distances between neighbours of the same series.

    ``position_mm``, (n,): of slices in their order, NaN where unknown; with ``SliceOrder.order_mm`` a series that is ordered
    by SliceLocation is measured too. ``starts``, (s,): where each series begins.
    """
    before = np.diff(position_mm, prepend=np.nan)
    before[starts] = np.nan
    after = np.r_[before[1:], np.nan] if len(before) else before
    lengths = np.diff(np.r_[starts, len(before)])
    typical = _median_spacings(before, np.repeat(np.arange(len(starts)), lengths), series=len(starts))
    usual = np.repeat(typical, lengths)
    with np.errstate(invalid="ignore"):
        return Spacing(
            slice_spacing_mm=np.where(np.isnan(after), before, after),
            duplicate_position=(before < SAME_POSITION_MM) | (after < SAME_POSITION_MM),
            gap_before=before > GAP_SPACINGS * usual,
            series_spacing_mm=typical,
        )


def normals(orientation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the unit normal of each ``orientation``, (n, 6), as (n, 3); NaN if it is unknown or has no normal."""
    return unit_vectors(np.cross(orientation[:, :3], orientation[:, 3:]))


def tilt_degrees(orientation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the angle between each slice's normal and the axis of the scanner, (n,); ``orientation`` is (n, 6)."""
    degrees: NDArray[np.float64] = np.degrees(np.arccos(np.clip(np.abs(normals(orientation)[:, 2]), 0, 1)))
    return degrees


def group_starts(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return the indices, ascending, at which a new value begins in ``values`` (n,), where equal values are adjacent."""
    if not len(values):
        return np.empty(0, np.int64)
    return np.flatnonzero(np.r_[True, values[1:] != values[:-1]])


def _reference_slices(
    orientation: NDArray[np.float64], normal: NDArray[np.float64], group: NDArray[np.int64], uid: NDArray[Any]
) -> NDArray[np.int64]:
    """Return for each group the index of a slice whose orientation most slices of the group share, -1 if none has one.

    The ``normal``, (n, 3), that most slices share comes first, then of the slices with it the direction of their rows.
    Ties, between slices and between directions, are broken by the least ``uid``. A scout or a reformatted slice among the
    others must not be the reference, nor one that was turned within its plane.
    """
    references = np.full(group.max(initial=-1) + 1, -1, np.int64)
    known = np.flatnonzero(~np.isnan(normal[:, 0]))
    same_normal = _same_directions(group[known], normal[known])
    same_rows = _same_directions(same_normal, unit_vectors(orientation[known, :3]))
    votes, row_votes = (np.bincount(same)[same] for same in (same_normal, same_rows))
    order = known[np.lexsort((uid[known], -row_votes, -votes, group[known]))]
    first = order[group_starts(group[order])]
    references[group[first]] = first
    return references


def _same_directions(group: NDArray[np.int64], directions: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return numbers, (n,), that are equal where ``group`` and the unit vectors ``directions``, (n, 3), are."""
    radix = 2 * _DIRECTION_STEPS + 1
    steps = np.rint(directions * _DIRECTION_STEPS).astype(np.int64) + _DIRECTION_STEPS
    return _group_ids(group * radix**3 + steps @ np.array([radix**2, radix, 1]))


def _same_orientation(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether rows and columns have the same directions, about a degree apart at most; orientations are (n, 6)."""
    cosines = [
        np.einsum("ij,ij->i", unit_vectors(one[:, part]), unit_vectors(other[:, part]))
        for part in (slice(3), slice(3, 6))
    ]
    same: NDArray[np.bool_] = np.minimum(*cosines) >= SAME_DIRECTION_COSINE
    return same


def _ranks(key: NDArray[np.float64], last: NDArray[np.bool_], group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each slice's place by group, then those that are not ``last``, then ``key``; the same for one position."""
    first = np.lexsort((key, last, group))
    with np.errstate(invalid="ignore"):
        apart = np.diff(key[first], prepend=np.nan) >= SAME_POSITION_MM  # unknown numbers, all infinite, are not
    apart |= np.diff(group[first], prepend=-1) > 0
    apart |= np.diff(last[first], prepend=False)
    place = np.empty(len(key), np.int64)
    place[first] = np.cumsum(apart)
    return place


def _varies_in_group(values: NDArray[np.float64], group: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each element whether all values of its group are known and not all at one position."""
    low, high = np.full((2, group.max(initial=-1) + 1), np.nan)
    np.fmin.at(low, group, values)
    np.fmax.at(high, group, values)
    with np.errstate(invalid="ignore"):
        varies: NDArray[np.bool_] = (high - low >= SAME_POSITION_MM)[group] & ~_any_in_group(np.isnan(values), group)
    return varies


def _rise_in_group(
    values: NDArray[np.float64], position_mm: NDArray[np.float64], group: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return for each element 1 if ``values`` rise with the known positions of its group, -1 if they fall, else 0.

    The sign is that of the covariance, summed in one order whatever the order of the input; where it is no more than
    rounding leaves, the positions tell nothing.
    """
    known = np.flatnonzero(~np.isnan(values) & ~np.isnan(position_mm))
    known = known[np.lexsort((values[known], position_mm[known], group[known]))]
    members, size = group[known], group.max(initial=-1) + 1
    counts = np.maximum(np.bincount(members, minlength=size), 1)
    product = np.ones(len(known))
    scale = np.ones(size)
    for column in (values[known], position_mm[known]):
        # Weights of no elements give integers.
        centred = column - (np.bincount(members, weights=column, minlength=size) / counts)[members]
        product *= centred
        scale *= np.bincount(members, weights=column**2, minlength=size)
    covariance = np.bincount(members, weights=product, minlength=size)
    rises: NDArray[np.float64] = np.where(np.abs(covariance) > _ROUNDING * np.sqrt(scale), np.sign(covariance), 0.0)
    return rises[group]


def _group_ids(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return each value's rank among the distinct values, from 0."""
    return np.unique(values, return_inverse=True)[1].reshape(-1)


def _any_in_group(values: NDArray[np.bool_], group: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each element whether ``values`` is true for any element of its group."""
    any_in_group = np.zeros(len(values), bool)
    any_in_group[group[values]] = True
    return any_in_group[group]


def _median_spacings(steps: NDArray[np.float64], group: NDArray[np.int64], *, series: int) -> NDArray[np.float64]:
    """Return for each of the ``series`` the median of its ``steps``, (n,), between different positions; NaN without one."""
    distinct = np.flatnonzero(steps >= SAME_POSITION_MM)
    distinct = distinct[np.lexsort((steps[distinct], group[distinct]))]
    counts = np.bincount(group[distinct], minlength=series)
    known = np.flatnonzero(counts)
    first = (np.cumsum(counts) - counts)[known]
    lower, upper = (steps[distinct[first + middle]] for middle in ((counts[known] - 1) // 2, counts[known] // 2))
    medians = np.full(series, np.nan)
    medians[known] = (lower + upper) / 2
    return medians
