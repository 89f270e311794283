"""The synthetic cohort: the patient of each series, its bleeds, how it was scanned, and its slices.

Everything is a function of (seed, series index). What must occur even in small cohorts (each kind of bleed, both bit
depths, gantry tilt) is distributed evenly over blocks of twenty series instead of drawn, each independently of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import cos, radians, sin, tan

import numpy as np
from numpy.typing import NDArray

from ich_prep.dataset.classes import SUBTYPES
from ich_prep.phantom.anatomy import (
    AIR_HU,
    HIGHEST_MM,
    LOWEST_MM,
    Field,
    Head,
    Plane,
    blend,
    draw_head,
    draw_tissue,
    ramp,
)
from ich_prep.phantom.bleeds import MIN_AREA_MM2, Bleed, draw_bleeds, paint_bleeds
from ich_prep.phantom.hard import CUTS, NOISE_HU, THICKNESS_MM, draw_faint_bleeds, draw_mimics

BLOCK = 20

# The kinds of bleed in the twenty series of a block, by index into SUBTYPES: five series without any, each kind alone once,
# each pair once. So each kind is in a quarter of the series.
_PLANTED: tuple[tuple[int, ...], ...] = (
    *((),) * 5,
    *((kind,) for kind in range(5)),
    *((one, other) for one in range(5) for other in range(one + 1, 5)),
)

# In the hard phantom: ten series without any, and each pair once. So each kind is in a fifth of the series.
_PLANTED_HARD = (*((),) * 10, *(pair for pair in _PLANTED if len(pair) == 2))

# Streams of random numbers, one for each purpose, so that a change to one leaves the others as they are.
_COHORT, _HEAD, _BLEEDS, _SCAN, _NOISE, _MIMICS = range(6)


@dataclass(frozen=True)
class Place:
    """The position of a series in the cohort: ``patient`` counts from 0; ``follows`` marks a patient's second series."""

    index: int
    patient: int
    first_index: int  # of the patient's first series
    follows: bool
    test: bool
    kinds: tuple[str, ...]
    phase: int  # of the block: the offset of the cycles of `every`
    hard: bool = False


@dataclass(frozen=True)
class Scan:
    """How a series was acquired: sizes in mm, angles in degrees, ``heights_mm`` along the slice normal, ascending."""

    size: int
    field_mm: float
    thickness_mm: float
    heights_mm: tuple[float, ...]
    tilt_deg: float
    turn_deg: float
    shift_mm: tuple[float, float]
    noise_hu: float
    sharp: bool  # a bone kernel: strong, fine-grained noise
    contrast: bool
    cuts: int = 1  # of the head, spread over the thickness, whose mean is a slice

    @property
    def pixel_mm(self) -> float:
        """The pixel spacing, the same in both directions, rounded as in the header."""
        return round(self.field_mm / self.size, 6)


@dataclass(frozen=True)
class Slice:
    """One slice: int16 HU (size, size), its position in the patient's frame and the area in mm2 of each painted kind."""

    hu: NDArray[np.int16]
    position_mm: tuple[float, float, float]
    orientation: tuple[float, float, float, float, float, float]
    painted_mm2: dict[str, float]

    @property
    def labels(self) -> tuple[int, ...]:
        """0 or 1 in the order of ``ich_prep.dataset.classes.RSNA_CLASSES``."""
        five = tuple(int(kind in self.painted_mm2) for kind in SUBTYPES)
        return (*five, int(any(five)))


def place(seed: int, index: int, *, second_series: int, hard: bool = False) -> Place:
    """Return the place of series ``index``; in each block ``second_series`` patients are scanned twice (at most 9)."""
    block, position = divmod(index, BLOCK)
    rng = np.random.default_rng((seed, _COHORT, block))
    planted = rng.permutation(BLOCK)
    second = {2 * int(pair) + 1 for pair in rng.permutation(BLOCK // 2)[:second_series]}
    in_block = position - sum(1 for other in second if other <= position)
    test = {int(rng.integers(1, 5)), int(rng.integers(9, BLOCK - second_series))}  # never the first patient
    follows = position in second
    return Place(
        index=index,
        patient=block * (BLOCK - second_series) + in_block,
        first_index=index - 1 if follows else index,
        follows=follows,
        test=in_block in test,
        kinds=tuple(SUBTYPES[kind] for kind in (_PLANTED_HARD if hard else _PLANTED)[planted[position]]),
        phase=int(rng.integers(BLOCK)),
        hard=hard,
    )


def every(where: Place, period: int, salt: int) -> bool:
    """Return whether a trait that every ``period``-th series has applies to this one; ``salt`` separates traits."""
    return (where.index + where.phase * (salt + 1) + salt) % period == 0


def draw_scan(seed: int, where: Place, *, size: int, thickness_mm: float | None = None) -> Scan:
    """Return the acquisition of a series: a spacing of about 5 mm, finer at the base in some; ``thickness_mm`` fixes it."""
    rng = np.random.default_rng((seed, _SCAN, where.index))
    if where.hard and thickness_mm is None:
        thickness_mm = float(rng.choice(THICKNESS_MM))
    low = LOWEST_MM + float(rng.uniform(0.0, 10.0))
    high = HIGHEST_MM + float(rng.uniform(-4.0, 6.0))
    fine, coarse = ((2.72, 5.43), (5.24, 3.93))[int(rng.integers(2))]
    step = float(rng.choice([4.0, 4.5, 5.0, 5.0, 5.43, 5.5]))
    heights = [low]
    while heights[-1] < high:
        if thickness_mm is not None:
            heights.append(heights[-1] + thickness_mm)
        elif every(where, 4, 1):
            heights.append(heights[-1] + (fine if len(heights) <= 10 else coarse))
        else:
            heights.append(heights[-1] + step)
    if thickness_mm is None and every(where, 5, 2):  # a level scanned twice, because the patient moved
        repeated = int(rng.integers(3, len(heights) - 3))
        heights.insert(repeated, heights[repeated])
    tilt = float(rng.choice([-1.0, 1.0]) * rng.uniform(6.0, 16.0))
    return Scan(
        size=size,
        field_mm=float(rng.uniform(232.0, 262.0)),
        thickness_mm=thickness_mm or step,
        heights_mm=tuple(round(height, 3) for height in heights),
        tilt_deg=round(tilt, 1) if every(where, 3, 3) else 0.0,
        turn_deg=float(rng.normal(0.0, 4.0)),
        shift_mm=(float(rng.uniform(-6.0, 6.0)), float(rng.uniform(-7.0, 4.0))),
        noise_hu=float(rng.uniform(*(NOISE_HU if where.hard else (3.2, 4.8)))),
        sharp=False,
        contrast=False,
        cuts=CUTS if where.hard else 1,
    )


def draw_patient(seed: int, where: Place) -> tuple[Head, tuple[Bleed, ...]]:
    """Return the patient's head and the bleeds that the series shows."""
    head = draw_head(np.random.default_rng((seed, _HEAD, where.patient)))
    draw = draw_faint_bleeds if where.hard else draw_bleeds
    return head, draw(np.random.default_rng((seed, _BLEEDS, where.index)), where.kinds)


def draw_slices(seed: int, where: Place, scan: Scan, head: Head, bleeds: tuple[Bleed, ...]) -> Iterator[Slice]:
    """Yield the slices of a series from base to vertex."""
    rng = np.random.default_rng((seed, _NOISE, where.index))
    c, s = cos(radians(scan.tilt_deg)), sin(radians(scan.tilt_deg))
    orientation = (1.0, 0.0, 0.0, 0.0, round(c, 6), round(s, 6))
    corner = -0.5 * (scan.size - 1) * scan.pixel_mm
    couch_mm = float(rng.uniform(-900.0, 300.0))  # z of the table's origin
    holder = _head_holder(scan, head)
    mimics = _mimics(seed, where, scan)
    previous = None
    for height, alike in zip(scan.heights_mm, mimics, strict=True):
        # The table moves along z, the head's axis is along the slice normal: so the head drifts in tilted images.
        drift = -height * tan(radians(scan.tilt_deg))
        moved = rng.uniform(-1.5, 1.5, size=2) if height == previous else (0.0, 0.0)
        previous = height
        shift = (scan.shift_mm[0] + float(moved[0]), scan.shift_mm[1] + drift + float(moved[1]))
        hu, painted = _image(rng, scan, head, bleeds, alike, holder=holder, height_mm=height, shift_mm=shift)
        centre_z = couch_mm + height / c
        position = (round(corner, 6), round(corner * c, 6), round(centre_z + corner * s, 6))
        yield Slice(hu=hu, position_mm=position, orientation=orientation, painted_mm2=painted)


def in_field(size: int) -> NDArray[np.bool_]:
    """Return (size, size) true within the circular field of view."""
    axis = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    within: NDArray[np.bool_] = axis[:, None] ** 2 + axis**2 <= np.float32(size / 2) ** 2
    return within


def _mimics(seed: int, where: Place, scan: Scan) -> Sequence[tuple[Bleed, ...]]:
    """Return what looks like a bleed in each slice, and is none."""
    if not where.hard:
        return [()] * len(scan.heights_mm)
    return draw_mimics(np.random.default_rng((seed, _MIMICS, where.index)), scan.heights_mm)


def _image(
    rng: np.random.Generator,
    scan: Scan,
    head: Head,
    bleeds: Sequence[Bleed],
    mimics: Sequence[Bleed],
    *,
    holder: Field,
    height_mm: float,
    shift_mm: tuple[float, float],
) -> tuple[NDArray[np.int16], dict[str, float]]:
    """Return the HU of a slice, and the area in mm2 of each kind of bleed in it."""
    offsets = (np.arange(scan.cuts) - (scan.cuts - 1) / 2) * (scan.thickness_mm / scan.cuts)
    cuts = [
        _cut(scan, head, bleeds, mimics, height_mm=height_mm + float(offset), shift_mm=shift_mm) for offset in offsets
    ]
    plane = _plane(scan, head, height_mm, shift_mm)
    hu = holder.copy()
    box = hu[plane.rows, plane.columns]
    np.maximum(box, sum(tissue for tissue, _ in cuts) / np.float32(scan.cuts), out=box)
    hu += _noise(rng, scan)
    areas = {kind: sum(painted.get(kind, 0.0) for _, painted in cuts) / scan.cuts for kind in SUBTYPES}
    return np.rint(hu).astype(np.int16), {kind: area for kind, area in areas.items() if area >= MIN_AREA_MM2}


def _cut(
    scan: Scan,
    head: Head,
    bleeds: Sequence[Bleed],
    mimics: Sequence[Bleed],
    *,
    height_mm: float,
    shift_mm: tuple[float, float],
) -> tuple[Field, dict[str, float]]:
    plane = _plane(scan, head, height_mm, shift_mm)
    tissue = draw_tissue(head, plane, contrast=scan.contrast)
    painted = paint_bleeds(plane, tissue, bleeds)
    paint_bleeds(plane, tissue, mimics)
    return tissue.hu, painted


def _plane(scan: Scan, head: Head, height_mm: float, shift_mm: tuple[float, float]) -> Plane:
    """Return the pixels in the box around the head."""
    axis = ((np.arange(scan.size) - (scan.size - 1) / 2) * scan.pixel_mm).astype(np.float32)
    across, down = axis - np.float32(shift_mm[0]), axis - np.float32(shift_mm[1])
    reach = head.scalp_mm + 0.2 * head.half_length_mm  # room for a turned head
    columns = _within(across, head.half_width_mm + reach)
    rows = _within(down, head.half_length_mm + reach)
    c, s = np.float32(cos(radians(scan.turn_deg))), np.float32(sin(radians(scan.turn_deg)))
    across, down = across[columns], down[rows]
    return Plane(
        x=c * across + s * down[:, None],
        y=c * down[:, None] - s * across,
        z_mm=height_mm,
        rows=rows,
        columns=columns,
        across_mm=across,
        down_mm=down,
        pixel_mm=scan.pixel_mm,
        thickness_mm=scan.thickness_mm,
    )


def _within(axis_mm: NDArray[np.float32], reach_mm: float) -> slice:
    inside = np.flatnonzero(np.abs(axis_mm) <= reach_mm)
    return slice(int(inside[0]), int(inside[-1]) + 1)


def _head_holder(scan: Scan, head: Head) -> Field:
    """Return air with the arc of the head-holder below the head, HU (size, size)."""
    axis = ((np.arange(scan.size) - (scan.size - 1) / 2) * scan.pixel_mm).astype(np.float32)
    hu = np.full((scan.size, scan.size), AIR_HU, np.float32)
    # A circle wider than the head that touches it from below.
    below = scan.shift_mm[1] + head.half_length_mm + head.scalp_mm + 3.0
    lower = axis > below - 45.0
    gap = np.hypot(axis - np.float32(scan.shift_mm[0]), axis[lower, None] - np.float32(below - 104.0)) - 104.0
    edge = 0.4 + 0.5 * scan.pixel_mm
    part = hu[lower]
    blend(part, ramp(np.abs(gap - 7.0) - 4.5, edge), -930.0)
    blend(part, ramp(np.abs(gap - 1.6) - 1.3, edge), 110.0)
    hu[lower] = part
    return hu


def _noise(rng: np.random.Generator, scan: Scan) -> Field:
    """Return noise in HU (size, size), correlated between neighbours as by a smooth reconstruction kernel."""
    n = scan.size + 1
    grain: Field = rng.standard_normal((n, n), dtype=np.float32)
    if scan.sharp:
        return grain[1:, 1:] * np.float32(3.0 * scan.noise_hu)
    mixed = grain[1:] + np.float32(0.7) * grain[:-1]
    noise: Field = (mixed[:, 1:] + np.float32(0.7) * mixed[:, :-1]) * np.float32(scan.noise_hu / 1.49)
    return noise
