"""Pictures of quarantined files: those whose header could be read and whose pixels can be decoded."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_prep.dicom.decode import Decoder
from ich_prep.errors import Reason, SliceError
from ich_prep.pixels.png import png_bytes
from ich_prep.stages.scan import SCHEMA, scan_file
from ich_prep.stages.shard import pixel_source
from ich_prep.stages.source_files import SourceFiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_PIXELS = 4096 * 4096
NEEDED = ("rows", "columns", "transfer_syntax", "file_size", "pixel_offset", "bits_allocated", "bits_stored", "signed")
DARKEST, BRIGHTEST = 1, 99  # percentiles of the stored values


class Pictures:
    """Pictures of the files of the sources at ``src``; safe to share between threads.

    Files are found by the paths of the quarantine table, never by a path from the browser. ``secret`` is the key of the
    pseudonyms of these paths, None if they are the originals.
    """

    def __init__(self, src: Sequence[Path], secret: bytes | None = None) -> None:
        self._files = SourceFiles(src, secret)
        self._lock = threading.Lock()

    def png(self, path: str) -> bytes:
        """Return the file at ``path`` of the sources as a PNG, its grey levels stretched to what it contains.

        Raises ``SliceError``, with the reason, if the file is not in the sources, has no header or cannot be decoded.
        """
        found = [*self._files.at(path).values()]
        if len(found) != 1:
            what = f"{len(found)} sources have a file of this path" if found else "the file is not in the sources"
            raise SliceError(Reason.UNREADABLE, what)
        source, key = found[0].source, found[0].key
        line: dict[str, Any] = dict.fromkeys(SCHEMA.names) | scan_file(source, key, found[0].path)
        if any(line[field] is None for field in NEEDED) or not line["header_bytes"]:
            raise SliceError(Reason(line["reason"] or Reason.BAD_HEADER), line["detail"] or "the header is incomplete")
        if not 0 < line["rows"] * line["columns"] <= MAX_PIXELS:
            raise SliceError(Reason.TOO_LARGE, f"{line['rows']} x {line['columns']} pixels")
        with self._lock:  # a decoder reuses its buffers
            decoder = Decoder()
            try:
                stored = decoder.read(pixel_source(source, key, line))
                return png_bytes(_stretched(stored, signed=line["signed"], inverted=bool(line["monochrome1"])))
            finally:
                decoder.close()


def _stretched(stored: NDArray[np.uint16], *, signed: bool, inverted: bool) -> NDArray[np.uint8]:
    values = (stored.view(np.int16) if signed else stored).astype(np.float32)
    low, high = np.percentile(values, [DARKEST, BRIGHTEST])
    codes: NDArray[np.uint8] = np.clip((values - low) / max(float(high - low), 1.0) * 255, 0, 255).astype(np.uint8)
    return ~codes if inverted else codes
