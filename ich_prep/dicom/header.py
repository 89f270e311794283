"""One DICOM file -> ``Header``; its pixels are not read.

``skim`` reads the first 8 KiB and walks the elements (PS3.5 section 7.1, PS3.10 section 7) without building objects for
them. Whatever it does not fully understand it leaves to pydicom. Both return the same elements, and ``interpret`` turns
them into a ``Header``.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from ich_prep.dataset.native import crc32c
from ich_prep.dicom.elements import (
    DEFLATED_LE,
    EXPLICIT_BE,
    EXPLICIT_LE,
    IMPLICIT_LE,
    PIXEL_DATA,
    WANTED,
    Elements,
    Header,
    interpret,
)
from ich_prep.errors import Reason, SliceError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ich_prep.sources import Source

SKIM_BYTES: Final = 8 * 1024
LONGEST_SKIM: Final = 256 * 1024
INFLATED_LIMIT: Final = 64 * 1024 * 1024


_UNDEFINED: Final = 0xFFFFFFFF
_BLANKS: Final = " \0\t\n\v\f\r\x1c\x1d\x1e\x1f"

_LONG_VRS: Final = frozenset(
    (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
)
_SHORT_VRS: Final = frozenset(
    (b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL")
    + (b"SS", b"ST", b"TM", b"UI", b"UL", b"US")
)

_explicit = struct.Struct("<HH2sH").unpack_from
_implicit = struct.Struct("<HHI").unpack_from
_length32 = struct.Struct("<I").unpack_from


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return the header of the DICOM file at ``path``; raises as ``read_header_from``."""
    from ich_prep.sources import FolderSource

    file = Path(path).absolute()
    return read_header_from(FolderSource(file.parent), os.fsencode(file.name))


def read_header_from(source: Source, key: bytes) -> Header:
    """Return the header of the DICOM file with ``key`` in ``source``.

    Raises ``SliceError``: UNREADABLE, EMPTY_FILE, NOT_DICOM, BAD_HEADER (a value that does not match its VR),
    TOO_LARGE (a deflated data set beyond 64 MiB), or an archive error of ``source``.
    """

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
        if elements is None and size > len(data) and data[128:132] == b"DICM":
            data = read_first(LONGEST_SKIM)
            elements = skim(data)
        if elements is None:
            elements = _read_with_pydicom(data, read_first)
        is_deflated = elements.transfer_syntax == DEFLATED_LE
        header_bytes = min(size, SKIM_BYTES if is_deflated else elements.pixel_offset or SKIM_BYTES)
        if header_bytes > len(data):
            data = read_first(header_bytes)
    except OSError as error:
        raise SliceError(Reason.UNREADABLE, error.strerror or str(error)) from None
    return interpret(elements, size, header_bytes, crc32c(data[:header_bytes]))


def skim(data: bytes) -> Elements | None:
    """Return the elements before PixelData in the first bytes of a file, or None if pydicom must decide.

    None means: no ``DICM`` at byte 128, an element of undefined length, an unknown VR, tags out of order, text that is
    not plain ASCII, big endian data, or that ``data`` ends before PixelData begins. At most ``len(data)`` bytes
    of deflated data are inflated: the caller reads the pixels.
    """
    if data[128:132] != b"DICM":
        return None
    values: dict[str, str | int] = {}
    try:
        meta, position = walk_meta(data)
        if meta == IMPLICIT_LE:
            return _walk_implicit(data, position, meta, values)
        if meta in (None, EXPLICIT_BE):
            return None
        if meta == DEFLATED_LE:
            data = zlib.decompressobj(wbits=-zlib.MAX_WBITS).decompress(data[position:], len(data))
            position = 0
        return _walk_explicit(data, position, meta, values)
    except (struct.error, zlib.error, UnicodeDecodeError, ValueError):
        return None


def walk_meta(data: bytes) -> tuple[str | None, int]:
    """Return the transfer syntax (None if unknown) and the offset of the data set (PS3.10 section 7.1)."""
    position, syntax = 132, None
    while True:
        group, element, vr, length = _explicit(data, position)
        if group != 2:
            return syntax, position
        if vr in _LONG_VRS:
            (length,) = _length32(data, position + 8)
            position += 12
        elif vr in _SHORT_VRS:
            position += 8
        else:
            return None, position
        if element == 0x0010:
            syntax = data[position : position + length].decode("ascii").rstrip(" \0")
        position += length


def _walk_explicit(data: bytes, position: int, syntax: str, values: dict[str, str | int]) -> Elements | None:
    wanted_of, long_vrs, short_vrs, previous = WANTED.get, _LONG_VRS, _SHORT_VRS, 0
    while True:
        group, element, vr, length = _explicit(data, position)
        tag = group << 16 | element
        if tag <= previous:
            return None
        previous = tag
        if vr in short_vrs:
            position += 8
        elif vr in long_vrs:
            (length,) = _length32(data, position + 8)
            position += 12
            if tag == PIXEL_DATA:
                return _at_pixels(syntax, values, position, length)
            if length == _UNDEFINED:
                return None
        else:
            return None
        if tag > PIXEL_DATA:
            return None
        wanted = wanted_of(tag)
        if wanted is not None and not _store(values, wanted, vr, data[position : position + length], length):
            return None
        position += length


def _walk_implicit(data: bytes, position: int, syntax: str, values: dict[str, str | int]) -> Elements | None:
    wanted_of, previous = WANTED.get, 0
    if data[position + 4 : position + 6].isalpha():
        return None  # explicit VR under the name of implicit VR
    while True:
        group, element, length = _implicit(data, position)
        tag = group << 16 | element
        if tag <= previous or tag > PIXEL_DATA:
            return None
        previous = tag
        position += 8
        if tag == PIXEL_DATA:
            return _at_pixels(syntax, values, position, length)
        if length == _UNDEFINED:
            return None
        wanted = wanted_of(tag)
        if wanted is not None and not _store(values, wanted, wanted[0], data[position : position + length], length):
            return None
        position += length


def _at_pixels(syntax: str, values: dict[str, str | int], position: int, length: int) -> Elements | None:
    native = syntax in (IMPLICIT_LE, EXPLICIT_LE, DEFLATED_LE)
    if native == (length == _UNDEFINED):
        return None  # encapsulated pixels in a native syntax, or the reverse
    return Elements(syntax, values, position, length if native else -1)


def _store(values: dict[str, str | int], wanted: tuple[bytes, str, bool], vr: bytes, value: bytes, length: int) -> bool:
    """Put a wanted element into ``values``; return False if the skim does not support its form."""
    expected, name, either_sign = wanted
    if len(value) != length or (vr != expected and not (vr == b"SS" and either_sign)):
        return False
    if expected == b"US":
        if length == 2:
            values[name] = int.from_bytes(value, "little")
        return length in (0, 2)
    if b"\x1b" in value:
        return False  # an escape sequence of ISO 2022: the bytes look like ASCII but encode another script
    text = value.decode("ascii").strip(_BLANKS)
    if text:
        values[name] = text
    return True


def _read_with_pydicom(data: bytes, read_first: Callable[[int], bytes]) -> Elements:
    """Return the elements of the file that begins with ``data``, read by pydicom; ``read_first`` reads more of the file.

    Raises NOT_DICOM, BAD_HEADER or TOO_LARGE.
    """
    import pydicom
    from pydicom.filereader import read_dataset, read_preamble

    if data[128:132] != b"DICM":
        raise SliceError(Reason.NOT_DICOM, "expected 'DICM' at byte 128, found other bytes")
    try:
        # pydicom warns about what it works around; unusable values are rejected later.
        with (
            warnings.catch_warnings(action="ignore"),
            pydicom.config.disable_value_validation(),
            io.BufferedReader(_Beginning(data, read_first)) as file,
        ):
            read_preamble(file, force=False)
            meta = pydicom.filereader._read_file_meta_info(file)
            uid = meta.get("TransferSyntaxUID")
            syntax = uid.rstrip(" \0") if isinstance(uid, str) else ""
            stream: BinaryIO = file
            if syntax == DEFLATED_LE:
                stream = io.BytesIO(inflate(file.read()))
            big_endian = syntax == EXPLICIT_BE
            dataset = read_dataset(
                stream, syntax == IMPLICIT_LE, not big_endian, stop_when=lambda tag, _vr, _length: tag == PIXEL_DATA
            )
            values: dict[str, str | int] = {}
            for tag, (vr, name, _) in WANTED.items():
                if tag in dataset:
                    _store_pydicom(values, vr, name, dataset, tag)
            at = stream.tell()
            tail = stream.read(12)
    except (SliceError, OSError):
        raise
    except Exception as error:  # damaged bytes can raise any exception within pydicom
        raise SliceError(Reason.NOT_DICOM, f"pydicom: {type(error).__name__}: {error}"[:200]) from None
    if not syntax:
        raise SliceError(Reason.NOT_DICOM, "expected a TransferSyntaxUID in the file meta information, found none")
    # Explicit or implicit VR as found in the data set, which may contradict its transfer syntax.
    start = 8 if dataset.original_encoding[0] else 12
    if len(tail) < start:
        return Elements(syntax, values, None, None)
    length = int.from_bytes(tail[start - 4 : start], "big" if big_endian else "little")
    return Elements(syntax, values, at + start, -1 if length == _UNDEFINED else length)


def _store_pydicom(values: dict[str, str | int], vr: bytes, name: str, dataset: object, tag: int) -> None:
    """Put the element of ``dataset`` at ``tag`` into ``values``, in the same form as the skim does."""
    from pydicom.multival import MultiValue

    try:
        value = dataset[tag].value  # type: ignore[index]
    except Exception as error:  # damaged bytes can raise any exception within pydicom
        raise SliceError(Reason.BAD_HEADER, f"pydicom: {name}: {type(error).__name__}: {error}"[:200]) from None
    if not isinstance(value, str | int | float | MultiValue):
        return  # no value, or one of another VR
    if vr == b"US":
        if isinstance(value, int):
            values[name] = value & 0xFFFF
        return
    parts = list(value) if isinstance(value, MultiValue) else [value]
    text = "\\".join(str(getattr(part, "original_string", part)) for part in parts).strip(_BLANKS)
    if text:
        values[name] = text


class _Beginning(io.RawIOBase):
    """A file of which ever longer prefixes are read, each at least twice as long as the last, up to 64 MiB."""

    def __init__(self, data: bytes, read_first: Callable[[int], bytes]) -> None:
        self._data, self._read_first = data, read_first
        self._position, self._is_whole = 0, False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            self._read_up_to(INFLATED_LIMIT)
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        self._read_up_to(self._position + len(view))
        part = self._data[self._position : self._position + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _read_up_to(self, end: int) -> None:
        if end <= len(self._data) or self._is_whole:
            return
        length = min(max(end, 2 * len(self._data), LONGEST_SKIM), INFLATED_LIMIT)
        self._data = self._read_first(length)
        self._is_whole = len(self._data) < length or length == INFLATED_LIMIT


def inflate(data: bytes) -> bytes:
    """Return the inflated data set of a deflated file (PS3.5 A.5); raises TOO_LARGE beyond 64 MiB."""
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    inflated = inflater.decompress(data, INFLATED_LIMIT)
    if inflater.unconsumed_tail:
        raise SliceError(Reason.TOO_LARGE, f"expected at most {INFLATED_LIMIT} bytes after inflating, found more")
    return inflated
