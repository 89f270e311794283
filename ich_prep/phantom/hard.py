"""The hard phantom: what makes one slice ambiguous, where its neighbours help.

Blood is diluted until it hardly stands out of the noise, and spans several slices. Mimics look like it in one slice: they
are cut from bleeds that are drawn alike, painted in a single slice, and labelled as nothing. A thick slice is the mean of
what lies in it (the partial-volume effect). These parameters are fixed: figures of the hard phantom refer to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

import numpy as np

from ich_prep.dataset.classes import SUBTYPES
from ich_prep.phantom.bleeds import MIN_LAYER_MM, Bleed, draw_bleeds

THICKNESS_MM = (7.0, 7.5, 8.0, 8.5)  # and the distance of slices: about 18 of a head
CUTS = 3  # of which the mean makes one slice
NOISE_HU = (11.0, 14.0)
SPAN_MM = (26.0, 60.0)  # of a bleed along the slice normal: 3 to 8 slices
BLOOD = (0.45, 0.75)  # share of blood in the bleed; the rest is the tissue that was there
MIMICS = (4, 8)  # in each series


def draw_faint_bleeds(rng: np.random.Generator, kinds: Sequence[str]) -> tuple[Bleed, ...]:
    """Return one bleed for each of ``kinds``, as `draw_bleeds` does, diluted and of a span within SPAN_MM."""
    return tuple(_faint(rng, bleed) for bleed in draw_bleeds(rng, kinds))


def draw_mimics(rng: np.random.Generator, heights_mm: Sequence[float]) -> tuple[tuple[Bleed, ...], ...]:
    """Return for each slice what looks like a bleed in it, and is in no other slice."""
    mimics: list[list[Bleed]] = [[] for _ in heights_mm]
    heights = np.asarray(heights_mm)
    for _ in range(int(rng.integers(MIMICS[0], MIMICS[1] + 1))):
        (bleed,) = draw_faint_bleeds(rng, [SUBTYPES[int(rng.integers(len(SUBTYPES)))]])
        reached = np.flatnonzero(np.abs(heights - bleed.centre_mm[2]) < bleed.half_mm[2])
        if len(reached):
            mimics[int(reached[int(rng.integers(len(reached)))])].append(bleed)
    return tuple(map(tuple, mimics))


def _faint(rng: np.random.Generator, bleed: Bleed) -> Bleed:
    half = float(rng.uniform(*SPAN_MM)) / 2
    first, second, _ = bleed.half_mm
    if bleed.kind in ("epidural", "subdural"):  # the layer thins out: it ends before its half extent
        half /= sqrt(1.0 - MIN_LAYER_MM / second)
    return replace(bleed, half_mm=(first, second, half), blood=float(rng.uniform(*BLOOD)))
