"""Stored values of one slice -> the pixels of a dataset: resized HU, or their window codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ich_prep.pixels.hounsfield import apply_rescale, apply_rescale_and_windows, apply_windows
from ich_prep.pixels.resize import resize_hu

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.windows import Window
    from ich_prep.pixels.hounsfield import Rescale


class Scratch:
    """Memory for the HU of a slice, reused by ``render`` from one slice to the next; for one thread at a time.

    The page faults of a new array cost more than the arithmetic on it.
    """

    def __init__(self) -> None:
        self._source = self._resized = np.empty(0, np.int16)

    def source(self, shape: tuple[int, ...]) -> NDArray[np.int16]:
        """Return int16 (rows, columns) for HU at the size of the file, contents undefined."""
        if self._source.size < shape[0] * shape[1]:
            self._source = np.empty(shape[0] * shape[1], np.int16)
        return self._source[: shape[0] * shape[1]].reshape(shape)

    def resized(self, size: int) -> NDArray[np.int16]:
        """Return int16 (size, size) for HU at the size of the dataset, contents undefined."""
        if self._resized.size != size * size:
            self._resized = np.empty((size, size), np.int16)
        return self._resized


def render(
    stored: NDArray[np.uint16],
    rescale: Rescale,
    *,
    windows: tuple[Window, ...] | None,
    out: NDArray[Any],
    scratch: Scratch | None = None,
) -> None:
    """Write the pixels of one slice into ``out``; ``stored`` (rows, columns) are its values, repaired and masked.

    With ``windows``, ``out`` is uint8 (windows, size, size) and gets their codes; without, it is int16 (1, size, size) and
    gets HU. Either must be C-contiguous. The order is fixed: rescale, clip to -1024..3071 HU, pad to a square with air,
    resize, window. Rescale and window act on each pixel alone, so a slice that already has the right size takes one lookup.
    To turn a slice, turn ``stored`` before the call.
    """
    size = out.shape[-1]
    native = stored.shape == (size, size)
    if native and windows is not None:
        apply_rescale_and_windows(stored, rescale, windows=windows, out=out)
        return
    if native:
        apply_rescale(stored, rescale, out=out[0])
        return
    scratch = scratch or Scratch()
    source = scratch.source(stored.shape)
    apply_rescale(stored, rescale, out=source)
    if windows is None:
        resize_hu(source, out=out[0])
        return
    resized = scratch.resized(size)
    resize_hu(source, out=resized)
    apply_windows(resized, windows=windows, out=out)
