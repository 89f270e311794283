"""How a series splits into volumes: by acquisition, where one series holds several scans of the same place.

A pass with and one without contrast, three phases, or a scan that was repeated half a slice further may share a Series
Instance UID. Sorted by position, their slices would alternate. Arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ich_prep.stages.geometry import SAME_POSITION_MM, group_starts

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST_SLICES = 3  # at different positions, of an acquisition that is a volume
OVERLAP_OF_SHORTER = 0.5


@dataclass(frozen=True)
class VolumeSplit:
    """The volume of each of n slices.

    ``volume``: int64 (n,), its number within the series, from 0. ``attribute``: int64 (n,), which of the attributes split
    the series, -1 if it is one volume. ``key``: int64 (n,), the value of that attribute that names the volume, the first
    one if the volume has several; -1 if the series is one volume.
    """

    volume: NDArray[np.int64]
    attribute: NDArray[np.int64]
    key: NDArray[np.int64]


def overlapping_groups(
    position_mm: NDArray[np.float64], series: NDArray[np.int64], attributes: Sequence[NDArray[np.int64]]
) -> VolumeSplit:
    """Return how each series splits into volumes.

    ``position_mm``, (n,): along the normal of the series, NaN where unknown. ``series``, (n,): ids. ``attributes``: for
    each attribute that may tell acquisitions apart the values of the slices, (n,), as ranks from 0, -1 where a slice has
    none. The first attribute by which a series splits is the one that splits it.

    A series splits where at least two values of the attribute have three or more slices at different positions each, and
    two of these groups overlap: by more than half of the extent of the shorter one. Groups in the order of their values go
    to the first volume in which they overlap with none. So acquisitions that tile the body, as in step and shoot, stay one
    volume, and the second of two passes that each consist of tiles becomes the second volume as a whole.

    Slices without a value are a group of their own if most of them lie where slices with one do: a second pass whose
    number was lost, or never written.

    A slice of a smaller group (one that was scanned again), and any other without a value, goes to the volume whose extent
    it is in or nearest to; of several, to the one that has no slice close to it. Slices that have the same position and
    value are taken in the order of the input. A slice without a position goes to the volume of its group, else to the
    first.
    """
    split = VolumeSplit(
        volume=np.zeros(len(series), np.int64),
        attribute=np.full(len(series), -1, np.int64),
        key=np.full(len(series), -1, np.int64),
    )
    for number, keys in enumerate(_missing_named(position_mm, series, one) for one in attributes):
        for members in _candidates(position_mm, series, keys):
            if split.attribute[members[0]] >= 0:
                continue
            volumes = _volumes_of(position_mm[members], keys[members])
            if len(volumes) > 1:
                split.volume[members] = _assign(position_mm[members], keys[members], volumes)
                split.attribute[members] = number
                names = np.array([volume[0].key for volume in volumes])
                split.key[members] = names[split.volume[members]]
    return split


def _missing_named(
    position_mm: NDArray[np.float64], series: NDArray[np.int64], keys: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return ``keys``, above those given, where slices without one repeat the positions of slices that have one."""
    missing = keys < 0
    order = np.argsort(series, kind="stable")
    concerned = np.isin(series[order], np.intersect1d(series[missing], series[~missing]))
    members = order[concerned]
    named = keys.copy()
    for one in np.split(members, group_starts(series[members])[1:]) if len(members) else []:
        known = np.sort(position_mm[one[~missing[one]]])
        known = known[~np.isnan(known)]
        lost = one[missing[one]]
        if not len(known):
            continue
        at = np.searchsorted(known, position_mm[lost])
        before, after = known[np.maximum(at - 1, 0)], known[np.minimum(at, len(known) - 1)]
        nearest = np.minimum(np.abs(before - position_mm[lost]), np.abs(after - position_mm[lost]))
        if 2 * np.count_nonzero(nearest < SAME_POSITION_MM) > len(lost):
            named[lost] = keys.max() + 1
    return named


@dataclass(frozen=True)
class _Group:
    """The slices of one ``key``, from ``low`` to ``high`` mm."""

    key: int
    low: float
    high: float

    def overlaps(self, other: _Group) -> bool:
        """Return whether the two share more than half of the shorter extent."""
        shared = min(self.high, other.high) - max(self.low, other.low)
        return shared > OVERLAP_OF_SHORTER * min(self.high - self.low, other.high - other.low)


def _candidates(
    position_mm: NDArray[np.float64], series: NDArray[np.int64], keys: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Return the slices of each series, ascending, in which two keys have at least three slices with a position."""
    rank = np.unique(series, return_inverse=True)[1].reshape(-1)
    width = keys.max(initial=0) + 1
    usable = (keys >= 0) & ~np.isnan(position_mm)
    groups, sizes = np.unique(rank[usable] * width + keys[usable], return_counts=True)
    ids, counts = np.unique(groups[sizes >= LEAST_SLICES] // width, return_counts=True)
    members = np.flatnonzero(np.isin(rank, ids[counts > 1]))
    members = members[np.argsort(rank[members], kind="stable")]
    return np.split(members, group_starts(rank[members])[1:]) if len(members) else []


def _volumes_of(position_mm: NDArray[np.float64], keys: NDArray[np.int64]) -> list[list[_Group]]:
    """Return the groups of each volume of one series, in the order of their keys."""
    volumes: list[list[_Group]] = []
    for group in _groups(position_mm, keys):
        for volume in volumes:
            if not any(map(group.overlaps, volume)):
                volume.append(group)
                break
        else:
            volumes.append([group])
    return volumes


def _groups(position_mm: NDArray[np.float64], keys: NDArray[np.int64]) -> list[_Group]:
    """Return the keys with enough slices at different positions, ascending."""
    groups = []
    for key in np.unique(keys[keys >= 0]).tolist():
        positions = np.sort(position_mm[(keys == key) & ~np.isnan(position_mm)])
        if 1 + np.count_nonzero(np.diff(positions) >= SAME_POSITION_MM) >= LEAST_SLICES:
            groups.append(_Group(key, float(positions[0]), float(positions[-1])))
    return groups


def _assign(
    position_mm: NDArray[np.float64], keys: NDArray[np.int64], volumes: list[list[_Group]]
) -> NDArray[np.int64]:
    """Return the volume of each slice of one series."""
    volume_of_key = {group.key: number for number, volume in enumerate(volumes) for group in volume}
    assigned = np.array([volume_of_key.get(key, -1) for key in keys.tolist()], np.int64)
    extents = [(min(group.low for group in volume), max(group.high for group in volume)) for volume in volumes]
    strays = np.flatnonzero(assigned < 0)
    for stray in strays[np.lexsort((keys[strays], position_mm[strays]))].tolist():
        position = float(position_mm[stray])
        if np.isnan(position):
            assigned[stray] = 0
            continue
        outside = [round(max(low - position, position - high, 0.0), 3) for low, high in extents]
        free = [
            round(float(np.nanmin(np.abs(position_mm[assigned == number] - position))), 3)
            for number in range(len(volumes))
        ]
        assigned[stray] = min(range(len(volumes)), key=lambda number: (outside[number], -free[number], number))
    return assigned
