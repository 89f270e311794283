"""The five kinds of hemorrhage, at their anatomical sites in a synthetic head, in three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, radians, sin

import numpy as np

from ich_prep.phantom.anatomy import Field, Plane, Tissue, blend, ellipsoid, ramp, sulci

# A slice is positive for a kind if at least this area was painted; smaller areas are not painted.
MIN_AREA_MM2 = 50.0

# Blood under the bone that is thinner than this would vanish in the bone's soft edge: it is not painted.
MIN_LAYER_MM = 3.0

# Blood under the bone hides the other kinds below it, so it is painted first.
_ORDER = ("epidural", "subdural", "intraparenchymal", "intraventricular", "subarachnoid")

# Sites of blood in the tissue: x (both sides), y, z in mm of the head frame, the largest half axis there, and a weight
# (they sum to ten).
_TISSUE_SITES = (
    (25.0, -4.0, 8.0, 26.0, 4),  # lentiform nucleus
    (14.0, 12.0, 10.0, 17.0, 2),  # thalamus
    (34.0, -38.0, 22.0, 24.0, 1),  # frontal lobe
    (36.0, 32.0, 30.0, 24.0, 1),  # parietal lobe
    (44.0, 4.0, -12.0, 20.0, 1),  # temporal lobe
    (26.0, 48.0, -32.0, 20.0, 1),  # cerebellum
)


@dataclass(frozen=True)
class Bleed:
    """One bleed: its kind, HU, centre and half extents in mm of the head frame, and one trait of its kind.

    ``half_mm`` is (along the bone, thickness, z) for epidural and subdural, (x, y, z) for intraparenchymal, and the
    radius of the region whose CSF is bloody, three times, for subarachnoid and intraventricular. ``trait`` is the width
    of the dark rim in mm for intraparenchymal, the fluid level's y for intraventricular, else 0. ``blood`` is the share
    of blood in what is painted; the rest is the tissue that was there.
    """

    kind: str
    hu: float
    centre_mm: tuple[float, float, float]
    half_mm: tuple[float, float, float]
    turn_deg: float
    trait: float
    blood: float = 1.0


def draw_bleeds(rng: np.random.Generator, kinds: Sequence[str]) -> tuple[Bleed, ...]:
    """Return one bleed for each of ``kinds``; epidural and subdural blood of one head lie on opposite sides."""
    side = 1.0 if rng.random() < 0.5 else -1.0
    draw = {
        "epidural": lambda: _epidural(rng, side),
        "subdural": lambda: _subdural(rng, -side),
        "intraparenchymal": lambda: _intraparenchymal(rng, side),
        "intraventricular": lambda: _intraventricular(rng),
        "subarachnoid": lambda: _subarachnoid(rng, side),
    }
    return tuple(draw[kind]() for kind in _ORDER if kind in kinds)


def paint_bleeds(plane: Plane, tissue: Tissue, bleeds: Sequence[Bleed]) -> dict[str, float]:
    """Paint ``bleeds`` into ``tissue.hu`` and return the area of each painted kind in mm2, never below MIN_AREA_MM2."""
    free = np.ones_like(tissue.hu)
    painted: dict[str, float] = {}
    for bleed in bleeds:
        share = _SHARES[bleed.kind](bleed, plane, tissue)
        if share is None:
            continue
        share = share * free
        area = float(share.sum(dtype=np.float64)) * plane.pixel_mm**2
        if area < MIN_AREA_MM2:
            continue
        painted[bleed.kind] = area
        if bleed.kind == "intraparenchymal" and bleed.trait:
            rim = _blob(bleed, plane, tissue, grown_mm=bleed.trait)
            if rim is not None:
                blend(tissue.hu, rim * free * bleed.blood, 20.0)
        blend(tissue.hu, share * bleed.blood, bleed.hu + 2.5 * tissue.relief)
        free *= 1.0 - share
    return painted


def _acute_hu(rng: np.random.Generator) -> float:
    return float(rng.uniform(58.0, 76.0))


def _epidural(rng: np.random.Generator, side: float) -> Bleed:
    """A lens: short along the bone, thick, mostly temporal or parietal."""
    angle = radians(rng.uniform(-40.0, 45.0))
    half = (float(rng.uniform(26.0, 36.0)), float(rng.uniform(14.0, 25.0)), float(rng.uniform(20.0, 32.0)))
    centre = (side * cos(angle), sin(angle), float(rng.uniform(-8.0, 38.0)))
    return Bleed("epidural", _acute_hu(rng), centre, half, 0.0, 0.0)


def _subdural(rng: np.random.Generator, side: float) -> Bleed:
    """A crescent: long along the convexity, thin; one in three subacute and barely brighter than brain."""
    angle = radians(rng.uniform(-25.0, 25.0))
    half = (float(rng.uniform(62.0, 92.0)), float(rng.uniform(6.5, 12.0)), float(rng.uniform(30.0, 50.0)))
    hu = float(rng.uniform(48.0, 60.0)) if rng.random() < 0.33 else _acute_hu(rng)
    return Bleed("subdural", hu, (side * cos(angle), sin(angle), float(rng.uniform(10.0, 38.0))), half, 0.0, 0.0)


def _intraparenchymal(rng: np.random.Generator, side: float) -> Bleed:
    """A blob in the tissue, often with a dark rim of oedema."""
    sites = [site for site in _TISSUE_SITES for _ in range(site[4])]
    x, y, z, largest, _ = sites[int(rng.integers(len(sites)))]
    shift = rng.uniform(-4.0, 4.0, size=3)
    shape = rng.uniform(0.75, 1.05, size=3) * largest * rng.uniform(0.85, 1.1)
    rim = float(rng.uniform(2.5, 5.0)) if rng.random() < 0.65 else 0.0
    centre = (float(side * x + shift[0]), float(y + shift[1]), float(z + shift[2]))
    half = (float(shape[0]), float(shape[1]), max(18.0, float(shape[2])))
    return Bleed("intraparenchymal", _acute_hu(rng), centre, half, float(rng.uniform(-60.0, 60.0)), rim)


def _intraventricular(rng: np.random.Generator) -> Bleed:
    """A cast of one side or of all ventricles, or blood that has settled behind a fluid level."""
    form = int(rng.integers(3))
    side = 1.0 if rng.random() < 0.5 else -1.0
    centre = ((side * 26.0, 0.0, 15.0), (0.0, 8.0, 5.0), (0.0, 8.0, 5.0))[form]
    reach = (34.0, 90.0, 90.0)[form]
    level = (-200.0, -200.0, float(rng.uniform(14.0, 24.0)))[form]
    return Bleed("intraventricular", _acute_hu(rng), centre, (reach,) * 3, 0.0, level)


def _subarachnoid(rng: np.random.Generator, side: float) -> Bleed:
    """Blood in the basal cisterns and Sylvian fissures, or in the sulci of one convexity."""
    if rng.random() < 0.5:
        centre, reach = (float(rng.uniform(-12.0, 12.0)), -10.0, -12.0), float(rng.uniform(52.0, 66.0))
    else:
        angle = radians(rng.uniform(-60.0, 60.0))
        centre = (side * 52.0 * cos(angle), 62.0 * sin(angle), float(rng.uniform(18.0, 42.0)))
        reach = float(rng.uniform(42.0, 56.0))
    return Bleed("subarachnoid", _acute_hu(rng), centre, (reach,) * 3, 0.0, 0.0)


def _under_bone(bleed: Bleed, plane: Plane, tissue: Tissue, power: int) -> Field | None:
    """Return the share of a layer under the bone that thins out from its centre along the bone and in z.

    ``power`` 2 gives the parabola of a lens, higher ones the even thickness of a crescent.
    """
    half_along, thickness, half_z = bleed.half_mm
    fade = 1.0 - ((plane.z_mm - bleed.centre_mm[2]) / half_z) ** 2
    if thickness * fade < MIN_LAYER_MM:
        return None
    radius = np.sqrt(plane.x * plane.x + plane.y * plane.y)
    cosine = (plane.x * bleed.centre_mm[0] + plane.y * bleed.centre_mm[1]) / (radius + 1e-3)
    along2 = (2.0 / half_along**2) * radius * radius * (1.0 - cosine)  # the square of the chord, in half extents
    layer = thickness * (fade - along2 ** (power // 2))
    return ramp(np.maximum(tissue.depth_mm - layer, -tissue.depth_mm), tissue.edge_mm)


def _epidural_share(bleed: Bleed, plane: Plane, tissue: Tissue) -> Field | None:
    return _under_bone(bleed, plane, tissue, power=2)


def _subdural_share(bleed: Bleed, plane: Plane, tissue: Tissue) -> Field | None:
    layer = _under_bone(bleed, plane, tissue, power=4)
    # The falx stops it: subdural blood does not cross the midline.
    return None if layer is None else layer * ramp(2.0 - plane.x * (np.sign(bleed.centre_mm[0])), 1.0)


def _blob(bleed: Bleed, plane: Plane, tissue: Tissue, *, grown_mm: float) -> Field | None:
    outside = ellipsoid(plane, bleed.centre_mm, bleed.half_mm, bleed.turn_deg)
    if outside is None:
        return None
    ragged = outside - grown_mm + 2.2 * tissue.relief
    return ramp(np.maximum(ragged, 2.0 - tissue.depth_mm), 0.6 + tissue.edge_mm) * (1.0 - tissue.ventricles)


def _intraparenchymal_share(bleed: Bleed, plane: Plane, tissue: Tissue) -> Field | None:
    return _blob(bleed, plane, tissue, grown_mm=0.0)


def _region(bleed: Bleed, plane: Plane) -> Field | None:
    outside = ellipsoid(plane, bleed.centre_mm, bleed.half_mm, 0.0)
    return None if outside is None else ramp(outside, 4.0)


def _intraventricular_share(bleed: Bleed, plane: Plane, tissue: Tissue) -> Field | None:
    region = _region(bleed, plane)
    if region is None:
        return None
    return tissue.ventricles * region * ramp(bleed.trait - plane.y, 1.0 + tissue.edge_mm)


def _subarachnoid_share(bleed: Bleed, plane: Plane, tissue: Tissue) -> Field | None:
    region = _region(bleed, plane)
    if region is None:
        return None
    filled = sulci(tissue.depth_mm, tissue.relief, atrophy=tissue.atrophy, widening=2.0) * (tissue.depth_mm > 0.5)
    return np.maximum(filled, tissue.cisterns) * region * (1.0 - tissue.ventricles)


_SHARES = {
    "epidural": _epidural_share,
    "intraparenchymal": _intraparenchymal_share,
    "intraventricular": _intraventricular_share,
    "subarachnoid": _subarachnoid_share,
    "subdural": _subdural_share,
}
