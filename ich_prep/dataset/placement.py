"""Where the slices of a volume lie: for each, its shift in the plane and its distance along the normal.

The affine of a volume needs equal steps from slice to slice. A placement does not: it describes volumes whose spacing
varies, or that lack a slice, and can bring their pixels onto a grid with equal steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ich_prep.dataset.affine import Affine, AffineError, NoAffine
from ich_prep.dataset.volumes import POSITION, affine_of_slices
from ich_prep.dataset.windows import MIN_HU

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

# Slices closer than this are at one position, and the first of them is used.
SAME_POSITION_MM = 0.01
# A volume with more planes than this has a position that is wrong, not a gap.
MAX_PLANES = 2048
NEGLIGIBLE_SHIFT = 1e-3  # of a pixel
RESAMPLED = frozenset((NoAffine.SPACING_VARIES, NoAffine.NOT_ON_A_LINE))  # what equal steps mend


@dataclass(frozen=True)
class Placement:
    """Where the slices of a volume lie.

    ``grid``: the affine of the first slice, (x, y, mm along the normal) -> LPS mm. ``offsets``: of each slice from the
    first, float64 (n, 3): columns to the right, rows down, mm along the normal.
    """

    grid: Affine
    offsets: NDArray[np.float64]

    @property
    def step_mm(self) -> float:
        """The median distance between neighbouring positions along the normal, in mm; NaN if there is only one."""
        gaps = np.diff(np.sort(self.offsets[:, 2]))
        gaps = gaps[gaps > SAME_POSITION_MM]
        return float(np.median(gaps)) if len(gaps) else float("nan")


def place_slices(slices: pa.Table, orientation: Sequence[float] | None, *, stored_size: int) -> Placement:
    """Return where ``slices``, lines of the slice table, lie; all are taken to have the first one's orientation and size.

    Raises ``AffineError`` if the volume has no slices, no orientation or no pixel spacing, or a slice has no position.
    """
    grid = affine_of_slices(slices.slice(0, 1), orientation, stored_size=stored_size, thickness_mm=1.0)
    positions = np.column_stack(
        [slices[name].cast("float64").fill_null(float("nan")).to_numpy() for name in POSITION]
    )  # (n, 3)
    if not np.isfinite(positions).all():
        raise AffineError(NoAffine.NO_POSITION, "some slices have no position")
    offsets = np.linalg.solve(grid[:3, :3], (positions - positions[0]).T).T
    return Placement(grid, offsets)


def onto_equal_steps(volume: NDArray[np.int16], placement: Placement) -> tuple[NDArray[np.int16], Affine]:
    """Return HU (n, y, x) resampled to planes at equal steps along the normal, int16 (m, y', x'), and their affine (LPS).

    The step is the median spacing. A plane is interpolated linearly between the two nearest slices, each first moved in
    the plane to where it lies, which undoes a gantry tilt; the planes are larger than the slices by that shift, and
    filled with air. Raises ``AffineError`` for positions that are all the same, or too far apart to be one volume.
    """
    order, distances, planes = equal_steps(placement)
    step = placement.step_mm
    shifts = placement.offsets[order, :2]
    low = np.floor(shifts.min(axis=0)).astype(int)
    more = np.ceil(shifts.max(axis=0)).astype(int) - low

    @lru_cache(maxsize=2)  # planes are made in order, each from two neighbours
    def moved(k: int) -> NDArray[np.float32]:
        return _moved(volume[order[k]], *(shifts[k] - low), *more)

    targets = distances[0] + step * np.arange(planes)
    above = np.clip(np.searchsorted(distances, targets, side="right"), 1, len(distances) - 1)
    weights = np.clip((targets - distances[above - 1]) / (distances[above] - distances[above - 1]), 0, 1)
    out = np.empty((planes, *moved(0).shape), np.int16)
    for plane, (k, weight) in enumerate(zip(above.tolist(), weights.tolist(), strict=True)):
        out[plane] = np.rint(moved(k - 1) * (1 - weight) + moved(k) * weight)
    affine = placement.grid @ np.array(
        [[1, 0, 0, low[0]], [0, 1, 0, low[1]], [0, 0, step, distances[0]], [0, 0, 0, 1]], np.float64
    )
    return out, affine


def equal_steps(placement: Placement) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
    """Return the slices to resample from, by increasing distance, their distances in mm, and the number of planes.

    Of several slices at one position, the first is used. Raises ``AffineError`` as ``onto_equal_steps``.
    """
    order, distances = _distinct(placement.offsets[:, 2])
    if len(order) < 2:
        raise AffineError(NoAffine.NO_ADVANCE, "all slices are at one position")
    planes = int((distances[-1] - distances[0]) / placement.step_mm + 1e-6) + 1
    if planes > MAX_PLANES:
        raise AffineError(
            NoAffine.SPACING_VARIES,
            f"{planes:,} planes with a spacing of {placement.step_mm:.3f} mm; expected {MAX_PLANES:,} or fewer",
        )
    return order, distances, planes


def _distinct(along: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the slices by increasing distance, one for each position, and their distances."""
    order = np.argsort(along, kind="stable")
    kept = [0]
    for k in range(1, len(order)):
        if along[order[k]] - along[order[kept[-1]]] > SAME_POSITION_MM:
            kept.append(k)
    order = order[kept]
    return order, along[order]


def _moved(
    image: NDArray[np.int16], right: float, down: float, more_columns: int, more_rows: int
) -> NDArray[np.float32]:
    """Return ``image`` moved by a fraction of pixels on a plane larger by ``more``; linear, air outside."""
    rows, columns = image.shape
    plane = np.full((rows + more_rows, columns + more_columns), MIN_HU, np.float32)
    whole_right, whole_down = int(right + NEGLIGIBLE_SHIFT), int(down + NEGLIGIBLE_SHIFT)
    plane[whole_down : whole_down + rows, whole_right : whole_right + columns] = image
    for axis, part in ((1, right - whole_right), (0, down - whole_down)):
        if part > NEGLIGIBLE_SHIFT:
            before = np.roll(plane, 1, axis=axis)  # air rolls in: there is a free column or row at the end
            plane = plane * np.float32(1 - part) + before * np.float32(part)
    return plane
