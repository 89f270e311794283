"""Selects the row of a volume in the series table, and computes the affine of its slices: tables in, numbers out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.affine import Affine, AffineError, NoAffine, upright_turns, volume_affine
from ich_prep.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

POSITION = ("position_x_mm", "position_y_mm", "position_z_mm")
# Relative tolerance of a volume's pixel spacing: over 512 pixels it adds up to a twentieth of a pixel.
SAME_SPACING = 1e-4


def find_series(series: pa.Table, series_instance_uid: str | None = None, *, series_row: int | None = None) -> int:
    """Return the line of the table ``series`` with this ``series_row`` or Series Instance UID.

    Raises ``TypeError`` unless exactly one of the two is given, a UID as text or a row as an integer, ``KeyError``
    for a series that is not in the table, and ``UsageError`` for a UID that several volumes share.
    """
    if isinstance(series_instance_uid, int | np.integer):
        raise TypeError(
            f"A volume is named by its series_row or its Series Instance UID; {series_instance_uid} is not a UID. "
            f"Write series_row={series_instance_uid}."
        )
    if (series_instance_uid is None) == (series_row is None):
        raise TypeError("Expected either series_row=NUMBER or a Series Instance UID.")
    if series_row is not None:
        if isinstance(series_row, bool) or not isinstance(series_row, int | np.integer):
            raise TypeError(f"Expected series_row as an integer; got {series_row!r}.")
        line = int(pc.index(series["series_row"], pa.scalar(int(series_row), pa.int64())).as_py())
        if line < 0:
            raise KeyError(f"There is no series_row {series_row}: the dataset has {len(series)} series.")
        return line
    if not isinstance(series_instance_uid, str):
        raise TypeError(f"Expected a Series Instance UID as text; got {series_instance_uid!r}.")
    lines = np.flatnonzero(pc.equal(series["series_instance_uid"], series_instance_uid).fill_null(False).to_numpy())
    if not len(lines):
        raise KeyError(f"There is no series {series_instance_uid!r} in the dataset.")
    if len(lines) > 1:
        rows = ", ".join(map(str, series["series_row"].take(pa.array(lines)).to_pylist()))
        raise UsageError(f"Series {series_instance_uid!r} has {len(lines)} volumes. Choose one by series_row: {rows}.")
    return int(lines[0])


def affine_of_slices(
    slices: pa.Table,
    orientation: Sequence[float] | None,
    *,
    stored_size: int,
    thickness_mm: float | None = None,
) -> Affine:
    """Return the affine of the volume that consists of ``slices``, lines of the slice table in their order.

    Only slices with pixels are included: a quarantined one in the middle leaves a gap, and so no affine. For the other
    parameters see ``volume_affine``. Raises ``AffineError`` if slices differ in orientation, pixel spacing, source size
    or turn, and as ``volume_affine``.
    """
    _check_flags(slices)
    return volume_affine(
        np.column_stack([_numbers(slices, name) for name in POSITION]),
        orientation,
        (_shared_spacing(slices, "pixel_spacing_y_mm"), _shared_spacing(slices, "pixel_spacing_x_mm")),
        (int(_shared(slices, "source_rows", 0)), int(_shared(slices, "source_columns", 0))),
        turn=str(_shared(slices, "turn", "")) if "turn" in slices.column_names else None,
        stored_size=stored_size,
        thickness_mm=thickness_mm,
    )


def volumes_not_upright(slices: pa.Table, series: pa.Table) -> NDArray[np.int64]:
    """Return the ``series_row``, ascending, of the volumes whose files do not lie upright: see ``upright_turns``.

    These are the volumes whose pixels differ between the orientations "patient" and "as-stored".
    """
    known = np.flatnonzero(pc.is_valid(series["orientation"]).to_numpy(zero_copy_only=False))
    cosines = np.array(series["orientation"].take(pa.array(known)).to_pylist(), np.float64).reshape(-1, 6)
    lying = series["series_row"].to_numpy()[known[upright_turns(cosines) != ""]]
    turned = slices["series_row"].filter(pc.not_equal(slices["turn"], "").fill_null(False)).to_numpy()
    return np.union1d(lying, turned).astype(np.int64)


def _check_flags(slices: pa.Table) -> None:
    if not len(slices):
        raise AffineError(NoAffine.NO_SLICES, "the volume has no slice with pixels")
    flags = {flag for line in slices["flags"].to_pylist() for flag in line or ()}
    if "no_position" in flags:
        raise AffineError(NoAffine.NO_POSITION, "some slices have no position, or are not ordered by it")
    if "other_orientation" in flags:
        raise AffineError(NoAffine.SLICES_DIFFER, "some slices have another orientation than most of the series")


def _shared(slices: pa.Table, name: str, missing: int | str) -> int | str:
    """Return the one value of a column, ``missing`` for null; raises ``AffineError`` if there are several."""
    values: list[int | str] = pc.unique(slices[name].fill_null(missing)).to_pylist()
    if len(values) > 1:
        shown = ", ".join(map(repr, values))
        raise AffineError(NoAffine.SLICES_DIFFER, f"slices differ in {name}: {shown}")
    return values[0]


def _numbers(slices: pa.Table, name: str) -> NDArray[np.float64]:
    """Return a column as float64, NaN for null."""
    numbers: NDArray[np.float64] = slices[name].cast(pa.float64()).fill_null(float("nan")).to_numpy()
    return numbers


def _shared_spacing(slices: pa.Table, name: str) -> float:
    spacing = _numbers(slices, name)
    low, high = spacing.min(), spacing.max()  # NaN if one is missing, which volume_affine refuses
    if high - low > SAME_SPACING * low:
        raise AffineError(NoAffine.SLICES_DIFFER, f"slices have different pixel spacings: {low:g} to {high:g} mm")
    return float("nan") if np.isnan(low) else float(spacing[0])
