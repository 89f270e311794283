"""A synthetic head in Hounsfield units: an ellipsoid of bone with a brain in it, cut at any level.

Head frame, mm: x to the patient's left, y to the back, z to the vertex; the origin is at the widest level of the head, about
that of the third ventricle. All fields of one cut are float32 arrays of one shape (y, x).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, radians, sin, sqrt

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]

AIR_HU = -1000.0
LOWEST_MM, HIGHEST_MM = -52.0, 84.0  # what a scan covers: from the petrous bones to the vertex

_RELIEF_STEP_MM = (8.0, 6.5, 6.5)  # z, y, x
_RELIEF_ORIGIN_MM = (-80.0, -125.0, -105.0)
_RELIEF_SHAPE = (24, 40, 34)

# Ventricles as ellipsoids: centre x, y, z; half axes x, y, z; turn in degrees. x > 0 means both sides.
_VENTRICLES = (
    (8.0, -25.0, 13.0, 4.6, 15.0, 15.0, -18.0),  # frontal horns
    (11.5, -2.0, 26.0, 5.4, 28.0, 12.0, 4.0),  # bodies
    (23.0, 33.0, 12.0, 6.0, 16.0, 17.0, 16.0),  # atria and occipital horns
    (36.0, 4.0, -20.0, 2.8, 9.0, 7.0, 12.0),  # temporal horns
    (0.0, 1.0, -1.0, 2.6, 12.0, 12.0, 0.0),  # third
    (0.0, 36.0, -34.0, 7.0, 5.5, 9.0, 0.0),  # fourth
)
_DEEP_GREY = (
    (23.0, -4.0, 6.0, 8.0, 18.0, 14.0, -14.0),  # lentiform nuclei
    (14.0, -22.0, 14.0, 4.5, 11.0, 14.0, -20.0),  # caudate heads
    (9.5, 12.0, 8.0, 8.0, 13.0, 12.0, -20.0),  # thalami
)


@dataclass(frozen=True)
class Head:
    """One patient's head: outer half axes of the skull and individual traits, in mm and HU."""

    half_width_mm: float
    half_length_mm: float
    height_mm: float
    skull_mm: float
    scalp_mm: float
    egg: float  # how much wider the back is than the front, as a share
    atrophy: float  # 1: young, 2: wide sulci and cisterns
    ventricle_scale: float
    grey_hu: float
    white_hu: float
    skull_hu: float
    calcified: bool  # physiological calcification of the pineal gland and choroid plexus
    relief: Field  # (z, y, x) on a coarse grid: where the sulci run


@dataclass(frozen=True)
class Plane:
    """The pixels of one slice near the head: ``x``, ``y`` in the head frame, and their place in the image."""

    x: Field
    y: Field
    z_mm: float
    rows: slice
    columns: slice
    across_mm: Field  # column positions before the head is turned, for fields that vary along one axis
    down_mm: Field
    pixel_mm: float
    thickness_mm: float


@dataclass(frozen=True)
class Tissue:
    """One cut: HU, and what is needed to paint bleeds."""

    hu: Field
    depth_mm: Field  # below the inner table; negative in bone and outside
    relief: Field  # about -1..1, smooth; zero where a sulcus runs
    ventricles: Field  # share of the pixel that is ventricle, 0..1; likewise cisterns
    cisterns: Field
    edge_mm: float  # half the width of a soft edge
    atrophy: float  # of the head


def draw_head(rng: np.random.Generator) -> Head:
    """Return a patient's head, drawn from ``rng``."""
    atrophy = float(rng.uniform(0.9, 1.9))
    return Head(
        half_width_mm=float(rng.uniform(70.0, 77.0)),
        half_length_mm=float(rng.uniform(87.0, 96.0)),
        height_mm=float(rng.uniform(83.0, 91.0)),
        skull_mm=float(rng.uniform(5.5, 8.0)),
        scalp_mm=float(rng.uniform(4.5, 7.5)),
        egg=float(rng.uniform(0.04, 0.12)),
        atrophy=atrophy,
        ventricle_scale=float(0.75 + 0.25 * atrophy + rng.uniform(-0.1, 0.1)),
        grey_hu=float(rng.uniform(36.5, 39.5)),
        white_hu=float(rng.uniform(29.0, 32.0)),
        skull_hu=float(rng.uniform(1150.0, 1450.0)),
        calcified=bool(rng.random() < 0.4),
        relief=rng.standard_normal(_RELIEF_SHAPE, dtype=np.float32),
    )


def draw_tissue(head: Head, plane: Plane, *, contrast: bool) -> Tissue:
    """Return the cut of ``head`` by ``plane`` without noise and without bleeds; ``contrast`` fills the vessels."""
    x, y, z = plane.x, plane.y, plane.z_mm
    radius = np.sqrt(x * x + y * y)
    slope = abs(_profile(head, z + 1.0, 0.0) - _profile(head, z - 1.0, 0.0)) * head.half_width_mm / 2.0
    edge = 0.35 + 0.5 * plane.pixel_mm + 0.5 * plane.thickness_mm * min(slope, 1.0)  # the partial-volume effect
    skin = _outside(head, plane, radius, offset_mm=head.scalp_mm)
    outer = _outside(head, plane, radius, offset_mm=0.0)
    inner = _outside(head, plane, radius, offset_mm=-head.skull_mm)
    depth = -inner
    relief = _relief(head, plane)

    hu = np.full_like(x, AIR_HU)
    blend(hu, ramp(skin, edge), 42.0)
    blend(hu, ramp(np.abs(skin + 0.6 * head.scalp_mm) - 0.12 * head.scalp_mm, edge), -75.0)
    diploe = np.clip(inner / np.maximum(inner - outer, 0.1), 0.0, 1.0)
    bone = head.skull_hu - 1900.0 * diploe * (1.0 - diploe)
    blend(hu, ramp(outer, edge), bone)
    inside = ramp(inner, edge)
    blend(hu, inside, 8.0)

    brain = ramp(inner + 0.6 + 0.9 * head.atrophy, edge)
    _cortex(hu, head, plane, depth_mm=depth, relief=relief, brain=brain)
    nuclei = _ellipsoids(plane, _DEEP_GREY, 1.0)
    blend(hu, nuclei, head.grey_hu)
    cisterns = _cisterns(head, plane, relief) * inside
    blend(hu, cisterns, 7.0)
    ventricles = _ellipsoids(plane, _VENTRICLES, head.ventricle_scale) * inside
    blend(hu, ventricles, 5.0)
    _midline(hu, head, plane, inside, contrast=contrast)
    if head.calcified:
        blend(hu, _ellipsoids(plane, ((0.0, 25.0, 4.0, 2.2, 2.2, 4.0, 0.0),), 1.0), 160.0)
        blend(hu, _ellipsoids(plane, ((21.0, 28.0, 13.0, 2.0, 3.2, 4.5, 20.0),), 1.0), 150.0)
    if z < -24.0:
        _skull_base(hu, head, plane, relief, inside)
    return Tissue(
        hu=hu,
        depth_mm=depth,
        relief=relief,
        ventricles=ventricles,
        cisterns=cisterns,
        edge_mm=edge,
        atrophy=head.atrophy,
    )


def blend(hu: Field, share: Field, value: Field | float) -> None:
    """Move ``hu`` towards ``value`` by ``share`` (0..1), in place."""
    hu += share * (value - hu)


def ramp(outside_mm: Field, edge_mm: float) -> Field:
    """Return 1 where ``outside_mm`` is well below zero, 0 well above, linear within ``edge_mm`` of the surface."""
    share: Field = np.clip(0.5 - outside_mm * (0.5 / edge_mm), 0.0, 1.0)
    return share


def ellipsoid(
    plane: Plane, centre_mm: tuple[float, float, float], half_mm: tuple[float, float, float], turn_deg: float
) -> Field | None:
    """Return the distance in mm (roughly; negative inside) from the cut of an ellipsoid, None if it is not cut."""
    left = 1.0 - ((plane.z_mm - centre_mm[2]) / half_mm[2]) ** 2
    if left <= 0.0:
        return None
    c, s = cos(radians(turn_deg)), sin(radians(turn_deg))
    dx, dy = plane.x - centre_mm[0], plane.y - centre_mm[1]
    a, b = half_mm[0] * sqrt(left), half_mm[1] * sqrt(left)
    u, v = (c / a) * dx + (s / a) * dy, (c / b) * dy - (s / b) * dx
    outside: Field = (np.sqrt(u * u + v * v) - 1.0) * min(a, b)
    return outside


def sulci(depth_mm: Field, relief: Field, *, atrophy: float, widening: float) -> Field:
    """Return the share of each pixel that lies in a sulcus, 0..1; ``widening`` 1 is the healthy width."""
    width = (0.115 * atrophy * widening) * np.clip(1.15 - depth_mm * (1.0 / 17.0), 0.0, 1.0)
    share: Field = np.clip((width - np.abs(relief)) * 7.0 + 0.35, 0.0, 1.0) * (width > 0.0)
    return share


def _profile(head: Head, z_mm: float, offset_mm: float) -> float:
    """Return the size of the head at a level, relative to the widest one."""
    if z_mm < 0.0:
        return 1.0 - 0.12 * (z_mm / 55.0) ** 2
    left = 1.0 - (z_mm / (head.height_mm + offset_mm)) ** 2.3
    return float(left ** (1 / 2.3)) if left > 0.0 else 0.0


def _outside(head: Head, plane: Plane, radius: Field, *, offset_mm: float) -> Field:
    """Return the distance in mm, along the ray from the head's axis, from the skull grown by ``offset_mm``."""
    a, b = head.half_width_mm + offset_mm, head.half_length_mm + offset_mm
    along = plane.y * (1.0 / b)
    widened = plane.x / (a * (1.0 + head.egg * np.clip(along, -1.2, 1.2)))
    rho = np.sqrt(widened * widened + along * along)
    outside: Field = radius * (1.0 - _profile(head, plane.z_mm, offset_mm) / (rho + 1e-6))
    return outside


def _taps(position: NDArray[np.float64], count: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the first of four grid points and the four cubic B-spline weights, (4, n), of each position."""
    position = np.clip(position, 1.0, count - 2.001)
    start = np.floor(position).astype(np.intp)
    t = position - start
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6.0
    return start - 1, weights.astype(np.float32)


def _relief(head: Head, plane: Plane) -> Field:
    """Return the patient's relief at the plane's pixels; plain sums, not BLAS, so that thread counts do not matter."""
    (z0, y0, x0), (dz, dy, dx) = _RELIEF_ORIGIN_MM, _RELIEF_STEP_MM
    start, weight = _taps(np.array([(plane.z_mm - z0) / dz]), _RELIEF_SHAPE[0])
    cut = sum(weight[k, 0] * head.relief[start[0] + k] for k in range(4))
    start, weight = _taps((plane.down_mm.astype(np.float64) - y0) / dy, _RELIEF_SHAPE[1])
    tall = sum(weight[k][:, None] * np.take(cut, start + k, axis=0) for k in range(4))
    start, weight = _taps((plane.across_mm.astype(np.float64) - x0) / dx, _RELIEF_SHAPE[2])
    field: Field = sum(weight[k] * np.take(tall, start + k, axis=1) for k in range(4))
    return field * 2.0


def _ellipsoids(plane: Plane, parts: tuple[tuple[float, ...], ...], scale: float) -> Field:
    """Return the share of each pixel inside any of ``parts``; a part with x > 0 is drawn on both sides."""
    share = np.zeros_like(plane.x)
    edge = 0.5 + 0.5 * plane.pixel_mm
    for x, y, z, a, b, c, turn in parts:
        for side in (1.0, -1.0) if x else (1.0,):
            grown = (a * scale, b * sqrt(scale), c * sqrt(scale))
            outside = ellipsoid(plane, (side * x, y, z), grown, side * turn)
            if outside is not None:
                np.maximum(share, ramp(outside, edge), out=share)
    return share


def _cortex(hu: Field, head: Head, plane: Plane, *, depth_mm: Field, relief: Field, brain: Field) -> None:
    """Paint white matter, the grey ribbon around it and the sulci between; the cerebellum is grey and finely folded."""
    near_sulci = np.clip(2.2 - np.abs(relief) * 5.0, 0.0, 1.0) * ramp(depth_mm - 20.0, 3.0)
    ribbon: Field = np.maximum(ramp(depth_mm - 6.0, 1.5), near_sulci)
    blend(hu, brain, head.white_hu + (head.grey_hu - head.white_hu) * ribbon)
    # Narrow in the cerebellum, wide over the vertex.
    widening = 0.55 if plane.z_mm < -18.0 else 1.0 + max(0.0, plane.z_mm) / 120.0
    folded = sulci(depth_mm, relief, atrophy=head.atrophy, widening=widening)
    blend(hu, folded * brain, 9.0)


def _segment(plane: Plane, start: tuple[float, float], end: tuple[float, float]) -> Field:
    """Return the distance in mm from a straight line in the plane."""
    ex, ey = end[0] - start[0], end[1] - start[1]
    dx, dy = plane.x - start[0], plane.y - start[1]
    t = np.clip((dx * ex + dy * ey) * (1.0 / (ex * ex + ey * ey)), 0.0, 1.0)
    off_x, off_y = dx - t * ex, dy - t * ey
    distance: Field = np.sqrt(off_x * off_x + off_y * off_y)
    return distance


def _cisterns(head: Head, plane: Plane, relief: Field) -> Field:
    """Return the share of each pixel in the basal cisterns, the Sylvian fissures and the interhemispheric fissure."""
    z, edge = plane.z_mm, 0.6 + 0.5 * plane.pixel_mm
    wide = head.atrophy
    share = np.zeros_like(plane.x)
    wobble = 1.6 * relief

    def add(outside: Field | None) -> None:
        if outside is not None:
            np.maximum(share, ramp(outside + wobble, edge), out=share)

    add(ellipsoid(plane, (0.0, -13.0, -20.0), (12.0, 8.5, 8.5), 0.0))  # suprasellar
    add(ellipsoid(plane, (0.0, 26.5, -12.0), (9.0, 3.4, 8.0), 0.0))  # quadrigeminal
    midbrain = ellipsoid(plane, (0.0, 8.0, -22.0), (18.0, 17.0, 18.0), 0.0)
    if midbrain is not None and z < -8.0:
        ambient: Field = np.abs(midbrain + 1.5 * wobble) - wobble
        add(ambient - 0.8 * wide)  # ambient
    if -16.0 < z < 18.0:  # Sylvian
        lift = 0.35 * z
        for side in (1.0, -1.0):
            add(_segment(plane, (side * 58.0, -10.0 - lift), (side * 36.0, -2.0 - lift)) - 1.2 * wide)
            add(_segment(plane, (side * 36.0, -16.0), (side * 36.0, 10.0)) - 0.9 * wide)
    if z > -16.0:
        front_end = -22.0 if z < 34.0 else 200.0  # above the corpus callosum the fissure runs through
        gap = np.abs(plane.x + 0.6 * relief) - 0.9 * wide
        add(np.maximum(gap, np.minimum(plane.y - front_end, 46.0 - plane.y)) - wobble)
    return share


def _midline(hu: Field, head: Head, plane: Plane, inside: Field, *, contrast: bool) -> None:
    """Paint the falx and the sagittal sinus at its back edge."""
    z, edge = plane.z_mm, 0.4 + 0.5 * plane.pixel_mm
    blood = 150.0 if contrast else 48.0
    if z > 4.0:
        front_end = -38.0 if z < 40.0 else 200.0
        gap = np.maximum(np.abs(plane.x) - 0.45, np.minimum(plane.y - front_end, 42.0 - plane.y))
        blend(hu, ramp(gap, edge) * inside, 70.0 if contrast else 44.0)
    if z > -20.0:
        back = (head.half_length_mm - head.skull_mm) * _profile(head, z, -head.skull_mm) - 2.0
        from_back = plane.y - back
        vessel: Field = np.sqrt(plane.x * plane.x + from_back * from_back) - 3.4
        blend(hu, ramp(vessel, edge) * inside, blood)


def _skull_base(hu: Field, head: Head, plane: Plane, relief: Field, inside: Field) -> None:
    """Paint petrous pyramids with their air cells, sphenoid wings, orbits and the ethmoid air."""
    z, edge = plane.z_mm, 0.8 + 0.5 * plane.pixel_mm
    below = min(1.0, (-24.0 - z) / 12.0)
    size = _profile(head, z, 0.0)
    for side in (1.0, -1.0):
        pyramid = _segment(plane, (side * 15.0, 4.0), (side * 66.0 * size, 26.0))
        pyramid -= below * (3.0 + 0.09 * np.abs(plane.x))
        blend(hu, ramp(pyramid, edge) * inside, 900.0)
        cells = ramp(pyramid + 2.0, edge) * (np.abs(plane.x) > 40.0) * np.clip(np.abs(relief) * 4.0 - 0.6, 0.0, 1.0)
        blend(hu, cells * inside, -600.0)
        wing = _segment(plane, (side * 10.0, -22.0), (side * 60.0 * size, -38.0)) - 2.2 * below
        blend(hu, ramp(wing, edge) * inside, 750.0)
        orbit = ellipsoid(plane, (side * 30.0, -60.0, -52.0), (17.0, 24.0, 17.0), side * 20.0)
        if orbit is not None:
            blend(hu, ramp(orbit - 1.5, edge), 550.0)
            blend(hu, ramp(orbit, edge), -85.0)
        globe = ellipsoid(plane, (side * 32.0, -70.0, -52.0), (11.5, 11.5, 11.5), 0.0)
        if globe is not None:
            blend(hu, ramp(globe, edge), 18.0)
    ethmoid = ellipsoid(plane, (0.0, -60.0, -58.0), (11.0, 24.0, 18.0), 0.0)
    if ethmoid is not None:
        blend(hu, ramp(ethmoid - 2.0, edge), 500.0)
        blend(hu, ramp(ethmoid, edge) * np.clip(np.abs(relief) * 6.0 - 0.5, 0.0, 1.0), -800.0)
    clivus = ellipsoid(plane, (0.0, -10.0, -52.0), (13.0, 9.0, 22.0), 0.0)
    if clivus is not None:
        blend(hu, ramp(clivus, edge) * inside, 650.0)
