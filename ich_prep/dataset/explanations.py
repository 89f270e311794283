"""The class activation maps of a run, which `ich-train explain` writes, read by row.

::

    RUN/explanations/
      explanations.json   version, dataset digest, classes, method, layer
      rows.npy            int64 (n,), ascending
      maps.npy            uint8 (n, classes, y, x), each map scaled to 0..255 by its own maximum
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ich_prep.errors import DatasetError, UsageError
from ich_prep.files import read_regular, require_regular

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset

FOLDER, ABOUT, ROWS, MAPS = "explanations", "explanations.json", "rows.npy", "maps.npy"
# What NumPy and JSON raise for files that are no longer what was written.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, OverflowError, RecursionError, SyntaxError)


@dataclass(frozen=True)
class Explanations:
    """The maps of some rows: ``rows`` (n,) ascending, ``values`` uint8 (n, classes, y, x), read from disk when used."""

    rows: NDArray[np.int64]
    values: NDArray[np.uint8]

    def has(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return for each of ``rows`` whether it has maps."""
        found: NDArray[np.bool_] = np.isin(rows, self.rows)
        return found

    def maps(self, row: int) -> tuple[bytes, dict[str, int]] | None:
        """Return the maps of a row, uint8 (class, y, x), and their shape; None if it has none."""
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            return None
        classes, height, width = self.values.shape[1:]
        return self.values[place].tobytes(), {"classes": classes, "height": height, "width": width}


def read_explanations(run: Path, dataset: Dataset) -> Explanations | None:
    """Return the maps of the run in the folder ``run``, None if it has none.

    Raises ``UsageError`` for maps of another dataset or other classes, ``DatasetError`` for files that are damaged.
    """
    folder = run / FOLDER
    if not (folder / ABOUT).is_file():
        return None
    again = f"Write them again with `ich-train explain {run}`."
    try:
        about = json.loads(read_regular(folder / ABOUT))
        rows = np.load(io.BytesIO(read_regular(folder / ROWS)), allow_pickle=False)
        require_regular(folder / MAPS)
        values = np.load(folder / MAPS, allow_pickle=False, mmap_mode="r")
        digest, classes = about["dataset_digest"], tuple(about["classes"])
        if not (isinstance(rows, np.ndarray) and isinstance(values, np.ndarray)):
            raise TypeError("an archive instead of an array")
    except _DAMAGE as error:
        raise DatasetError(f"The explanations in {folder} cannot be read: {error}. {again}") from None
    if digest != dataset.digest or classes != dataset.classes:
        raise UsageError(f"The explanations in {folder} are of another dataset than {dataset.path}. {again}")
    if (
        rows.ndim != 1
        or values.ndim != 4
        or values.shape[:2] != (len(rows), len(classes))
        or values.dtype != np.uint8
        or rows.dtype.kind != "i"
    ):
        raise DatasetError(f"The explanations in {folder} do not fit each other. {again}")
    return Explanations(rows, values)
