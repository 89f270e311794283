"""One DICOM file -> ``Header``; its pixels are not read.

``skim`` reads the first 8 KiB. What it does not fully understand is left to pydicom, in another process. Both return the
same elements, and ``interpret`` turns them into a ``Header``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ich_prep.dataset.native import crc32c
from ich_prep.dicom.elements import (
    DEFLATED_LE,
    ELEMENTS,
    MODALITY,
    PIXEL_DATA,
    Elements,
    Header,
    interpret_with_faults,
)
from ich_prep.dicom.skim import LONGEST_SKIM, begins_like_dicom, has_prefix, is_plausible, media_class, skim
from ich_prep.dicom.slow_header import read_slowly
from ich_prep.errors import Reason, SliceError

if TYPE_CHECKING:
    from ich_prep.sources import Source

SKIM_BYTES: Final = 8 * 1024
CT_IMAGE_STORAGE: Final = "1.2.840.10008.5.1.4.1.1.2"


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return the header of the DICOM file at ``path``; raises as ``read_header_from``."""
    from ich_prep.sources import FolderSource

    file = Path(path).absolute()
    return read_header_from(FolderSource(file.parent), os.fsencode(file.name))


def read_header_from(source: Source, key: bytes) -> Header:
    """Return the header of the DICOM file with ``key`` in ``source``.

    Raises ``SliceError``: UNREADABLE, EMPTY_FILE, NOT_DICOM, BAD_HEADER (a value that does not match its VR),
    TOO_LARGE (a deflated data set beyond 64 MiB), NOT_CT (another modality, and the rest cannot be read), or an archive
    error of ``source``.
    """
    header, faults = read_with_faults(source, key)
    if faults:
        raise SliceError(Reason.BAD_HEADER, "; ".join(faults))
    return header


def read_with_faults(source: Source, key: bytes) -> tuple[Header, tuple[str, ...]]:
    """Return the header of a file, and a sentence for each needed value that is not a number; raises as above."""

    def read_first(length: int) -> bytes:
        buffer = bytearray(length)
        got = source.read_into(key, [buffer])
        return bytes(memoryview(buffer)[:got])

    try:
        size = source.size(key)
        if size == 0:
            raise SliceError(Reason.EMPTY_FILE, "expected a DICOM file, found 0 bytes")
        data = read_first(SKIM_BYTES)
        elements = skim(data)
        if elements is None and size > len(data) and begins_like_dicom(data):
            data = read_first(LONGEST_SKIM)
            elements = skim(data)
        if elements is None:
            elements = _read_slowly(data, read_first)
        is_deflated = elements.transfer_syntax == DEFLATED_LE
        header_bytes = min(size, SKIM_BYTES if is_deflated else elements.pixel_offset or SKIM_BYTES)
        if header_bytes > len(data):
            data = read_first(header_bytes)
    except OSError as error:
        raise SliceError(Reason.UNREADABLE, error.strerror or str(error)) from None
    if elements.values.get("modality", "C") == "C":
        _check_end(elements, data)
    if elements.flags and not is_plausible(elements.values):
        raise SliceError(Reason.NOT_DICOM, "expected 'DICM' at byte 128, or a modality or SOP class, found other bytes")
    return interpret_with_faults(elements, size, header_bytes, crc32c(data[:header_bytes]))


def _check_end(elements: Elements, data: bytes) -> None:
    """Raise NOT_DICOM if a file that may be CT ends before its modality, or within its modality or SOP class."""
    if elements.pixel_offset is not None or any(one.tag > MODALITY and one.name in elements.values for one in ELEMENTS):
        return
    known = elements.values.get("sop_class_uid") or media_class(data) or ""
    if CT_IMAGE_STORAGE.startswith(str(known)):
        raise SliceError(Reason.NOT_DICOM, "expected Modality, the data set ends before it")


def _read_slowly(data: bytes, read_first: Callable[[int], bytes]) -> Elements:
    """Return the elements by pydicom; raises as it does, but NOT_CT for a broken file whose modality is not CT."""
    if not begins_like_dicom(data):
        raise SliceError(Reason.NOT_DICOM, "expected 'DICM' at byte 128, found other bytes")
    try:
        return read_slowly(data, read_first, stop=PIXEL_DATA)
    except SliceError:
        try:
            values = read_slowly(data, read_first, stop=MODALITY + 1).values
        except SliceError:
            values = {}
        modality = values.get("modality", "CT")
        if modality != "CT" and (has_prefix(data) or is_plausible(values)):
            raise SliceError(Reason.NOT_CT, f"expected modality CT, found modality {modality}") from None
        raise
