"""Compare slices of a dataset with their source files, decoded again independently of the build.

By pydicom alone, and float64 arithmetic straight from the definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.native import crc32c
from ich_prep.dataset.windows import MAX_HU, MIN_HU, window_codes
from ich_prep.dicom.decode import decode_with_pydicom
from ich_prep.errors import IchError, SliceError, SourceError
from ich_prep.pixels.repairs import SIGN_12BIT, SIGN_12BIT_SHIFT, SIGN_12BIT_WRAP
from ich_prep.pixels.resize import resize_hu
from ich_prep.sources import LARGEST_MEMBER, Source, open_source, read_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset import Dataset
    from ich_prep.progress import Progress


# The turns, independently of ``TURNS``: a slice (rows, columns) -> as it is stored.
_TURNED: dict[str, Callable[[NDArray[np.int16]], NDArray[np.int16]]] = {
    "": lambda hu: hu,
    "flip_x": np.fliplr,
    "flip_y": np.flipud,
    "rotate_180": lambda hu: np.rot90(hu, 2),
    "transpose": np.transpose,
    "rotate_90_left": np.rot90,
    "rotate_90_right": lambda hu: np.rot90(hu, -1),
    "transverse": lambda hu: np.rot90(hu, 2).T,
}


@dataclass(frozen=True)
class Problem:
    """One problem: the file or row that is damaged, and what is wrong with it."""

    culprit: str
    what: str


def sample_rows(ok: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Return the rows to compare, ascending: a share of those that are ``ok``, at least one."""
    count = min(len(ok), max(1, round(share * len(ok))))
    return np.sort(np.random.default_rng(seed).choice(ok, count, replace=False))


@dataclass(frozen=True)
class SourceFile:
    """A file of one of the sources."""

    source: Source
    key: bytes


def open_sources(paths: Sequence[Path], *, grown: bool) -> tuple[Source, ...]:
    """Return the sources at ``paths`` as one; and, of a dataset that has ``grown``, each of them too.

    An append names the paths of its files without those of the build.
    """
    together = (open_source(paths),)
    return (*together, *(open_source([path]) for path in paths)) if grown and len(paths) > 1 else together


def files_of(sources: Sequence[Source], paths: Sequence[str]) -> dict[str, list[SourceFile]]:
    """Return the files at each of the ``paths`` that are in one of the ``sources`` and can be read."""
    requested = pa.array([path.encode() for path in paths], pa.binary())
    found: dict[str, list[SourceFile]] = {}
    for source in sources:
        files = source.list().files
        files = files.filter(pc.and_(pc.is_null(files["reason"]), pc.is_in(files["path"], value_set=requested)))
        for path, key in zip(files["path"].to_pylist(), files["key"].to_pylist(), strict=True):
            found.setdefault(path.decode(), []).append(SourceFile(source, key))
    return found


def compare(
    dataset: Dataset, files: Mapping[str, Sequence[SourceFile]], lines: list[dict[str, Any]], progress: Progress
) -> Iterator[Problem]:
    """Yield the rows, given as ``lines`` of the plan, whose pixels differ from those of the source ``files``, by path."""
    stored = np.empty((1, *dataset.shape[1:]), dataset.dtype)
    progress.begin("Comparing with the sources", len(lines), "slices", 0)
    for line in lines:
        try:
            dataset.read([line["row"]], stored)
            expected = reference_pixels(_content(files.get(line["path"], ()), line), line, dataset)
        except SliceError as error:
            yield Problem(f"row {line['row']}", f"{line['path']} can no longer be decoded: {error}")
        except (IchError, OSError) as error:
            yield Problem(f"row {line['row']}", f"{line['path']}: {error}")
        else:
            different = int((stored[0] != expected).sum())
            if different:
                yield Problem(f"row {line['row']}", f"{different} pixels differ from {line['path']} read by pydicom")
        progress.advance(1, 0)
    progress.end()


def _content(files: Sequence[SourceFile], line: dict[str, Any]) -> bytes:
    """Return the file of a ``line`` of the plan: of several at its path, the one whose header was read."""
    if not files:
        raise SourceError("not found in the sources")
    for file in files:
        data = read_whole(file.source, file.key, limit=LARGEST_MEMBER)
        if crc32c(data[: line["header_bytes"]]) == line["crc32c"]:
            break
    return data


def reference_pixels(data: bytes, line: dict[str, Any], dataset: Dataset) -> NDArray[Any]:
    """Return the pixels (channel, y, x) of one DICOM file computed independently of the build: pydicom, then float64.

    ``line`` is the file's line of the plan, whose repairs and turn are applied. Raises ``SliceError`` if pydicom
    cannot decode it.
    """
    stored = decode_with_pydicom(data).astype(np.int64)
    bits, signed, intercept = line["bits_stored"], line["signed"], line["rescale_intercept"]
    if SIGN_12BIT in line["repairs"]:
        stored = (stored + SIGN_12BIT_SHIFT) % SIGN_12BIT_WRAP
        intercept = -SIGN_12BIT_SHIFT
    stored &= (1 << bits) - 1
    if signed:
        stored -= (stored >> (bits - 1)) << bits
    exact = np.clip(np.rint(stored.astype(np.float64) * line["rescale_slope"] + intercept), MIN_HU, MAX_HU)
    if line["padding_low"] is not None:
        exact[(stored >= line["padding_low"]) & (stored <= line["padding_high"])] = MIN_HU
    size = dataset.spec.size
    hu = np.empty((size, size), np.int16)
    resize_hu(np.ascontiguousarray(_TURNED[line["turn"] or ""](exact.astype(np.int16))), out=hu)
    if dataset.spec.store == "hu":
        return hu[np.newaxis]
    return np.stack([window_codes(hu, window) for window in dataset.spec.windows])
