"""The 4 x 4 affine of a volume: from stored voxels, after turn, padding and resizing, to patient coordinates.

A source pixel in column i and row j lies at ``S + X * dx * i + Y * dy * j`` (PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1): S is
ImagePositionPatient, the center of the first pixel, X and Y the direction cosines of ImageOrientationPatient, dx and dy
the distances between columns and between rows. A stored pixel is mapped back to the source pixel through the steps of
the build: turned, then centered on a square of air, then resized.

Coordinates are LPS, as in DICOM: x grows to the patient's left, y to the back (posterior), z to the head (superior).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ich_prep.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# float64 (4, 4): (column, row, slice, 1) -> (x, y, z, 1) in mm; pixel centers are at integers.
Affine: TypeAlias = "NDArray[np.float64]"

# How far a slice may be from where the affine puts it: the larger of the two, but at most a quarter of the spacing, so
# that a missing slice is always detected.
TOLERANCE_MM = 0.1
TOLERANCE_OF_SPACING = 0.02
MAX_OF_SPACING = 0.25
# Of unit length and right angle; headers have at most six decimals.
TOLERANCE_OF_COSINES = 1e-3

# A slice more than 45 degrees from the axial plane does not lie one way or another; the least z of an axial normal. The
# margin is for six decimals.
_LEAST_AXIAL_Z = np.sqrt(0.5) - 1e-5
_SCORE_DECIMALS = 5  # of the cosines that decide between turns: what differs by rounding only is a tie

# The eight turns of a slice: whether rows and columns are exchanged, then whether the source is read from its last
# column, and from its last row.
TURNS: dict[str, tuple[bool, bool, bool]] = {
    "": (False, False, False),
    "flip_x": (False, True, False),  # pixels[:, ::-1]
    "flip_y": (False, False, True),  # pixels[::-1]
    "rotate_180": (False, True, True),  # pixels[::-1, ::-1]
    "transpose": (True, False, False),  # pixels.T
    "rotate_90_left": (True, True, False),  # np.rot90(pixels), counterclockwise
    "rotate_90_right": (True, False, True),  # np.rot90(pixels, -1), clockwise
    "transverse": (True, True, True),  # pixels[::-1, ::-1].T
}


class NoAffine(StrEnum):
    """Why a volume has no affine."""

    NO_SLICES = "no_slices"
    NO_ORIENTATION = "no_orientation"
    NO_POSITION = "no_position"
    NO_PIXEL_SPACING = "no_pixel_spacing"
    NO_THICKNESS = "no_thickness"  # of a single slice
    NO_ADVANCE = "no_advance"  # all slices at one position, or shifted sideways
    SPACING_VARIES = "spacing_varies"
    NOT_ON_A_LINE = "not_on_a_line"
    SLICES_DIFFER = "slices_differ"  # in orientation, pixel spacing, source size or turn
    UNKNOWN_TURN = "unknown_turn"


class AffineError(DatasetError):
    """A volume without an affine: ``reason`` is one of ``NoAffine``, ``detail`` a sentence."""

    def __init__(self, reason: NoAffine, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[AffineError], tuple[NoAffine, str]]:
        return AffineError, (self.reason, self.detail)


def volume_affine(
    positions_mm: ArrayLike,
    orientation: Sequence[float] | None,
    pixel_spacing_mm: tuple[float, float],
    source_shape: tuple[int, int],
    *,
    turn: str | None = None,
    stored_size: int,
    thickness_mm: float | None = None,
) -> Affine:
    """Return the affine of a stored volume, (column, row, slice) -> LPS mm: float64 (4, 4).

    ``positions_mm`` (n, 3) are the ImagePositionPatient of its slices in their order, ``orientation`` the six direction
    cosines of all of them, ``pixel_spacing_mm`` the distances (between rows, between columns), ``source_shape`` (rows,
    columns) of the source. ``turn`` is a key of ``TURNS``, None or "" for none, and ``stored_size`` the side of a stored
    slice. The third column is the mean step from slice to slice; a gantry tilt makes it oblique to the slices, a shear. A
    single slice has a step of ``thickness_mm`` along its normal.

    Raises ``AffineError``, with its reason, if something is missing, or if a slice is further from that line of equal
    steps than 0.1 mm or 2% of a step, whichever is more.
    """
    rows, columns = source_shape
    across, down = _directions(orientation)
    between_rows, between_columns = pixel_spacing_mm
    if not (0 < between_rows < np.inf and 0 < between_columns < np.inf):
        raise AffineError(
            NoAffine.NO_PIXEL_SPACING,
            f"expected two distances greater than 0 mm between pixels; found {between_rows} and {between_columns}",
        )
    first, step = _line(np.asarray(positions_mm, np.float64), np.cross(across, down), thickness_mm)
    source = np.eye(4)
    source[:3] = np.column_stack([across * between_columns, down * between_rows, step, first])
    affine: Affine = source @ _stored_to_source(rows, columns, turn or "", stored_size)
    return affine


def upright_turns(orientation: NDArray[np.float64]) -> NDArray[np.str_]:
    """Return for each ``orientation``, (n, 6), the turn that brings a slice nearest to upright: (n,), keys of ``TURNS``.

    Upright are rows along (1, 0, 0) and columns along (0, 1, 0) in LPS: the patient's left on the right, the front on top.
    Nearest is the turn whose two directions have the greatest sum of cosines with these; of equal ones the first in
    ``TURNS``, so that at 45 degrees a slice stays as it is. A tilt or a rotation of less than 45 degrees is no turn. ""
    where the orientation is unknown (NaN), has no normal, or is more than 45 degrees from axial.
    """
    across, down = (unit_vectors(orientation[:, part]) for part in (slice(0, 3), slice(3, 6)))
    scores = []
    for exchanged, from_last_column, from_last_row in TURNS.values():
        columns = -across if from_last_column else across
        rows = -down if from_last_row else down
        x, y = (rows, columns) if exchanged else (columns, rows)
        scores.append(x[:, 0] + y[:, 1])
    best = np.argmax(np.round(np.nan_to_num(np.stack(scores)), _SCORE_DECIMALS), axis=0)
    names = np.array(list(TURNS))[best]
    turns: NDArray[np.str_] = np.where(is_axial(orientation), names, "")
    return turns


def is_axial(orientation: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether each ``orientation``, (n, 6), is at most 45 degrees from the axial plane; unknown ones are not."""
    normal = unit_vectors(np.cross(orientation[:, :3], orientation[:, 3:]))
    with np.errstate(invalid="ignore"):
        axial: NDArray[np.bool_] = np.abs(normal[:, 2]) >= _LEAST_AXIAL_Z
    return axial


def unit_vectors(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``vectors``, (n, 3), at unit length; NaN for those without a length."""
    with np.errstate(invalid="ignore", divide="ignore"):
        unit: NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def to_ras(affine: Affine) -> Affine:
    """Return an LPS affine as RAS, or the reverse: NIfTI's x grows to the patient's right, its y to the front."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _directions(orientation: Sequence[float] | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    cosines = np.full(6, np.nan) if orientation is None else np.asarray(orientation, np.float64)
    if cosines.shape != (6,) or not np.isfinite(cosines).all():
        raise AffineError(NoAffine.NO_ORIENTATION, "expected six direction cosines; the volume has none")
    across, down = cosines.reshape(2, 3)
    lengths = float(np.linalg.norm(across)), float(np.linalg.norm(down))
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(float(across @ down))) > TOLERANCE_OF_COSINES:
        raise AffineError(
            NoAffine.NO_ORIENTATION,
            f"expected two unit vectors at a right angle as direction cosines; found {cosines.tolist()}",
        )
    return across / lengths[0], down / lengths[1]


def _line(
    positions: NDArray[np.float64], normal: NDArray[np.float64], thickness_mm: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the position of the first slice and the step from slice to slice, (3,) each."""
    if positions.ndim != 2 or positions.shape[1] != 3 or not len(positions):
        raise AffineError(NoAffine.NO_SLICES, f"expected positions of one or more slices; found {positions.shape}")
    missing = np.flatnonzero(~np.isfinite(positions).all(axis=1))
    if len(missing):
        raise AffineError(
            NoAffine.NO_POSITION,
            f"{len(missing)} of {len(positions)} slices have no position; the first is {missing[0]}",
        )
    if len(positions) == 1:
        if thickness_mm is None or not 0 < thickness_mm < np.inf:
            raise AffineError(NoAffine.NO_THICKNESS, "a single slice has no spacing, and its thickness is not known")
        return positions[0], normal * thickness_mm
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    _check_line(positions, step, normal)
    return positions[0], step


def _check_line(positions: NDArray[np.float64], step: NDArray[np.float64], normal: NDArray[np.float64]) -> None:
    spacing = float(np.linalg.norm(step))
    # No gantry tilts by 60 degrees: such slices shift sideways rather than advance.
    if spacing == 0 or abs(step @ normal) < spacing / 2:
        raise AffineError(
            NoAffine.NO_ADVANCE, f"the slices do not advance along their normal: the mean step is {spacing:g} mm"
        )
    tolerance = min(max(TOLERANCE_MM, TOLERANCE_OF_SPACING * spacing), MAX_OF_SPACING * spacing)
    offsets = positions - (positions[0] + np.arange(len(positions))[:, np.newaxis] * step)  # (n, 3)
    along = offsets @ (step / spacing)
    sideways = np.linalg.norm(offsets - along[:, np.newaxis] * (step / spacing), axis=1)
    for reason, distances, what in (
        (NoAffine.NOT_ON_A_LINE, sideways, "off the line from the first slice to the last"),
        (NoAffine.SPACING_VARIES, np.abs(along), "from where equal steps would put it"),
    ):
        worst = int(distances.argmax())
        if distances[worst] > tolerance:
            raise AffineError(
                reason,
                f"slice {worst} lies {distances[worst]:.2f} mm {what} ({len(positions)} slices with a mean spacing of "
                f"{spacing:.3f} mm); expected {tolerance:.2f} mm or less",
            )


def _stored_to_source(rows: int, columns: int, turn: str, size: int) -> Affine:
    """Return (column, row, slice) of the stored grid -> that of the source, as a homogeneous matrix, (4, 4)."""
    if turn not in TURNS:
        raise AffineError(NoAffine.UNKNOWN_TURN, f"expected one of {', '.join(filter(None, TURNS))}; found {turn!r}")
    exchanged, from_last_column, from_last_row = TURNS[turn]
    turned_rows, turned_columns = (columns, rows) if exchanged else (rows, columns)
    side = max(rows, columns)
    scale = side / size
    resized = np.diag([scale, scale, 1.0, 1.0])
    resized[:2, 3] = 0.5 * scale - 0.5 - np.array([(side - turned_columns) // 2, (side - turned_rows) // 2])
    turned = np.eye(4)
    if exchanged:
        turned[:2, :2] = [[0, 1], [1, 0]]
    if from_last_column:
        turned[0] = [0, 0, 0, columns - 1] - turned[0]
    if from_last_row:
        turned[1] = [0, 0, 0, rows - 1] - turned[1]
    matrix: Affine = turned @ resized
    return matrix
