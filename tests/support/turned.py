"""One head stored in different ways: pixels and headers turned together, so that every voxel keeps its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import generate_uid

# What each turn does to the pixels of a slice, (rows, columns).
TURNED: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "": lambda pixels: pixels,
    "flip_x": lambda pixels: pixels[:, ::-1],
    "flip_y": lambda pixels: pixels[::-1],
    "rotate_180": lambda pixels: np.rot90(pixels, 2),
    "transpose": lambda pixels: pixels.T,
    "rotate_90_left": np.rot90,
    "rotate_90_right": lambda pixels: np.rot90(pixels, -1),
    "transverse": lambda pixels: np.rot90(pixels.T, 2),
}
# The turn that undoes each.
UNDONE = {name: name for name in TURNED} | {
    "rotate_90_left": "rotate_90_right",
    "rotate_90_right": "rotate_90_left",
}


def directions(rotation: float = 0, tilt: float = 0, lean: float = 0) -> NDArray[np.float64]:
    """The directions (2, 3) of rows and columns of a head rotated in the plane, tilted about x and about y; in degrees."""
    (sa, sb, sc), (ca, cb, cc) = (function(np.radians([rotation, tilt, lean])) for function in (np.sin, np.cos))
    about_x = np.array([[1, 0, 0], [0, cb, -sb], [0, sb, cb]])
    about_y = np.array([[cc, 0, sc], [0, 1, 0], [-sc, 0, cc]])
    about_z = np.array([[ca, -sa, 0], [sa, ca, 0], [0, 0, 1]])
    axes: NDArray[np.float64] = about_x @ about_y @ about_z
    return axes.T[:2]


def stored_as(
    turn: str, shape: tuple[int, int], across_down: NDArray[np.float64], spacing: tuple[float, float]
) -> dict[str, Any]:
    """The header of a slice after its pixels went through ``turn``: orientation, spacing, and the shift of its origin.

    ``shape``, ``across_down`` (2, 3) and ``spacing`` (rows, columns) are those before.
    """
    place = np.arange(shape[0] * shape[1]).reshape(shape)
    turned = TURNED[turn](place)

    def at(y: int, x: int) -> NDArray[np.float64]:
        j, i = divmod(int(turned[y, x]), shape[1])
        where: NDArray[np.float64] = across_down[0] * spacing[1] * i + across_down[1] * spacing[0] * j
        return where

    across, down = at(0, 1) - at(0, 0), at(1, 0) - at(0, 0)
    columns_apart, rows_apart = np.linalg.norm(across), np.linalg.norm(down)
    return {
        "orientation": np.r_[across / columns_apart, down / rows_apart],
        "spacing": (float(rows_apart), float(columns_apart)),
        "shift": at(0, 0),
    }


def write_turned(
    files: list[Path],
    folder: Path,
    turn: str,
    *,
    across_down: NDArray[np.float64] | None = None,
    shape: tuple[int, int] | None = None,
    spacing: tuple[float, float] = (0.5, 0.5),
    name: str = "",
) -> None:
    """Write the slices ``files`` to ``folder``, their pixels after ``turn``, with the headers that belong to them.

    5 mm apart in z, in the order of ``files``; ``shape`` cuts the first rows and columns out; one patient and series
    called ``name``.
    """
    folder.mkdir(parents=True)
    axes = directions() if across_down is None else across_down
    for number, path in enumerate(files):
        file = pydicom.dcmread(path)
        pixels = np.frombuffer(file.PixelData, "<u2").reshape(file.Rows, file.Columns)
        pixels = pixels[: shape[0], : shape[1]] if shape else pixels
        header = stored_as(turn, pixels.shape, axes, spacing)
        turned = np.ascontiguousarray(TURNED[turn](pixels))
        file.Rows, file.Columns = turned.shape
        file.PixelData = turned.tobytes()
        file.PixelSpacing = [f"{value:.8f}" for value in header["spacing"]]
        file.ImageOrientationPatient = [f"{value:.12f}" for value in header["orientation"]]
        position = np.array([-100, -90, 10 + 5 * number]) + header["shift"]
        file.ImagePositionPatient = [f"{value:.9f}" for value in position]
        uid = generate_uid(entropy_srcs=[name or turn, str(number)])
        file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = uid
        file.SeriesInstanceUID = generate_uid(entropy_srcs=["series", name or turn])
        file.StudyInstanceUID = generate_uid(entropy_srcs=["study", name or turn])
        file.PatientID = name or turn or "upright"
        file.save_as(folder / f"{number:03d}.dcm")
