"""One DICOM file, pixels unread -> ``Header``.

A skim reads the first 8 KiB and walks the elements (PS3.5 section 7.1, PS3.10 section 7) without building objects for
them. Whatever it does not fully understand it leaves to pydicom: both find the same elements, and one function below
makes a ``Header`` of them, so that the two can only differ in what they find.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from ich_prep.compiled import crc32c
from ich_prep.errors import Reason, SliceError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ich_prep.sources import Source

SKIM_BYTES: Final = 8 * 1024
LONGEST_SKIM: Final = 256 * 1024
INFLATED_LIMIT: Final = 64 * 1024 * 1024

IMPLICIT_LE: Final = "1.2.840.10008.1.2"
EXPLICIT_LE: Final = "1.2.840.10008.1.2.1"
DEFLATED_LE: Final = "1.2.840.10008.1.2.1.99"
EXPLICIT_BE: Final = "1.2.840.10008.1.2.2"

_PIXEL_DATA: Final = 0x7FE00010
_UNDEFINED: Final = 0xFFFFFFFF
MANY: Final = 0
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


@dataclass(frozen=True, slots=True)
class Element:
    """A data element that is read from each header: ``name`` in ``Header``, ``tag`` and ``vr`` of PS3.6.

    ``count`` is its number of values, ``MANY`` where that varies: more than one make a tuple. ``kept``: the scan writes it
    to a column of this name. ``either_sign``: of VR "US or SS", signed where PixelRepresentation says so.
    """

    name: str
    tag: int
    vr: bytes
    count: int
    kept: bool
    either_sign: bool


def _element(tag: int, vr: str, *, count: int = 1, kept: bool = False, either_sign: bool = False) -> Any:
    """Declare a field of ``Header`` that is the element ``tag``; see ``Element``."""
    return field(metadata={"element": (tag, vr.encode(), count, kept, either_sign)})


@dataclass(frozen=True, slots=True)
class Header:
    """What a slice's file says of itself; ``None`` where it says nothing.

    ``pixel_offset`` is the byte at which native pixels begin, or the first item of encapsulated ones; ``pixel_length``
    is their length in bytes, -1 when encapsulated. Both count in the inflated stream when the file is deflated, and are
    None when there is no PixelData. ``position`` (x, y, z) and ``pixel_spacing`` (between rows, between columns) are in
    mm; ``orientation`` holds the six direction cosines of PS3.3 C.7.6.2.1.1. ``padding`` and ``padding_limit`` are
    stored values. ``crc32c`` covers the first ``header_bytes`` of the file: it shows later whether this is the file
    that was read.

    Each element is declared here and nowhere else: the skim and the columns of the scan follow from it.
    """

    transfer_syntax: str
    file_size: int
    header_bytes: int
    crc32c: int
    pixel_offset: int | None
    pixel_length: int | None
    image_type: tuple[str, ...] = _element(0x00080008, "CS", count=MANY)
    sop_class_uid: str | None = _element(0x00080016, "UI")
    sop_instance_uid: str | None = _element(0x00080018, "UI", kept=True)
    modality: str | None = _element(0x00080060, "CS")
    patient_id: str | None = _element(0x00100020, "LO", kept=True)
    study_instance_uid: str | None = _element(0x0020000D, "UI", kept=True)
    series_instance_uid: str | None = _element(0x0020000E, "UI", kept=True)
    instance_number: int | None = _element(0x00200013, "IS", kept=True)
    position: tuple[float, ...] | None = _element(0x00200032, "DS", count=3, kept=True)
    orientation: tuple[float, ...] | None = _element(0x00200037, "DS", count=6, kept=True)
    samples_per_pixel: int | None = _element(0x00280002, "US")
    photometric: str | None = _element(0x00280004, "CS")
    frames: int | None = _element(0x00280008, "IS")
    rows: int | None = _element(0x00280010, "US", kept=True)
    columns: int | None = _element(0x00280011, "US", kept=True)
    pixel_spacing: tuple[float, ...] | None = _element(0x00280030, "DS", count=2, kept=True)
    bits_allocated: int | None = _element(0x00280100, "US", kept=True)
    bits_stored: int | None = _element(0x00280101, "US", kept=True)
    high_bit: int | None = _element(0x00280102, "US")
    pixel_representation: int | None = _element(0x00280103, "US")
    padding: int | None = _element(0x00280120, "US", either_sign=True)
    padding_limit: int | None = _element(0x00280121, "US", either_sign=True)
    rescale_intercept: float | None = _element(0x00281052, "DS", kept=True)
    rescale_slope: float | None = _element(0x00281053, "DS", kept=True)
    lossy: str | None = _element(0x00282110, "CS")


ELEMENTS: Final = tuple(
    Element(one.name, *one.metadata["element"]) for one in fields(Header) if "element" in one.metadata
)
# Tag -> VR, name, and whether the VR may be SS instead: what the skim asks of each element that it meets.
_WANTED: Final = {one.tag: (one.vr, one.name, one.either_sign) for one in ELEMENTS}


@dataclass(frozen=True, slots=True)
class Elements:
    """The elements that a reader found: texts stripped, numbers of VR US as they stand, nothing interpreted."""

    transfer_syntax: str
    values: dict[str, str | int]
    pixel_offset: int | None
    pixel_length: int | None


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return the header of the DICOM file at ``path``; raises what ``read_header_from`` raises."""
    from ich_prep.sources import FolderSource

    file = Path(path).absolute()
    return read_header_from(FolderSource(file.parent), os.fsencode(file.name))


def read_header_from(source: Source, key: bytes) -> Header:
    """Return the header of the DICOM file that ``source`` has by ``key``.

    Raises ``SliceError``: UNREADABLE, EMPTY_FILE, NOT_DICOM, BAD_HEADER (a value that is not of its VR), TOO_LARGE (a
    deflated data set beyond 64 MiB), or what ``source`` raises of an archive.
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
    return _interpret(elements, size, header_bytes, crc32c(data[:header_bytes]))


def skim(data: bytes) -> Elements | None:
    """Return the elements before PixelData in the first bytes of a file, or None where pydicom must decide.

    None means: no ``DICM`` at byte 128, an element of undefined length, an unknown VR, tags out of order, text that is
    not plain ASCII, big endian data, or that ``data`` ends before PixelData begins. Deflated data is inflated no further
    than ``data`` is long: the pixels are left to whoever wants them.
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
    """Return the transfer syntax, None where it cannot be told, and where the data set begins (PS3.10 section 7.1)."""
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
    wanted_of, long_vrs, short_vrs, previous = _WANTED.get, _LONG_VRS, _SHORT_VRS, 0
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
            if tag == _PIXEL_DATA:
                return _at_pixels(syntax, values, position, length)
            if length == _UNDEFINED:
                return None
        else:
            return None
        if tag > _PIXEL_DATA:
            return None
        wanted = wanted_of(tag)
        if wanted is not None and not _store(values, wanted, vr, data[position : position + length], length):
            return None
        position += length


def _walk_implicit(data: bytes, position: int, syntax: str, values: dict[str, str | int]) -> Elements | None:
    wanted_of, previous = _WANTED.get, 0
    if data[position + 4 : position + 6].isalpha():
        return None  # explicit VR under the name of implicit VR
    while True:
        group, element, length = _implicit(data, position)
        tag = group << 16 | element
        if tag <= previous or tag > _PIXEL_DATA:
            return None
        previous = tag
        position += 8
        if tag == _PIXEL_DATA:
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
    """Put a wanted element into ``values``; False where it is not of the form that the skim knows."""
    expected, name, either_sign = wanted
    if len(value) != length or (vr != expected and not (vr == b"SS" and either_sign)):
        return False
    if expected == b"US":
        if length == 2:
            values[name] = int.from_bytes(value, "little")
        return length in (0, 2)
    if b"\x1b" in value:
        return False  # an escape sequence of ISO 2022: the bytes look like ASCII and stand for another script
    text = value.decode("ascii").strip(_BLANKS)
    if text:
        values[name] = text
    return True


def _read_with_pydicom(data: bytes, read_first: Callable[[int], bytes]) -> Elements:
    """Return the elements as pydicom finds them in the file that begins with ``data``; ``read_first`` reads more of it.

    Raises NOT_DICOM, BAD_HEADER or TOO_LARGE.
    """
    import pydicom
    from pydicom.filereader import read_dataset, read_preamble

    if data[128:132] != b"DICM":
        raise SliceError(Reason.NOT_DICOM, "expected 'DICM' at byte 128, found other bytes")
    try:
        # pydicom remarks on what it works around; what cannot be used is refused by its value.
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
                stream, syntax == IMPLICIT_LE, not big_endian, stop_when=lambda tag, _vr, _length: tag == _PIXEL_DATA
            )
            values: dict[str, str | int] = {}
            for tag, (vr, name, _) in _WANTED.items():
                if tag in dataset:
                    _store_pydicom(values, vr, name, dataset, tag)
            at = stream.tell()
            tail = stream.read(12)
    except (SliceError, OSError):
        raise
    except Exception as error:  # pydicom raises whatever its parts raise on damaged bytes
        raise SliceError(Reason.NOT_DICOM, f"pydicom: {type(error).__name__}: {error}"[:200]) from None
    if not syntax:
        raise SliceError(Reason.NOT_DICOM, "expected a TransferSyntaxUID in the file meta information, found none")
    # Explicit or implicit as the data set is, which need not be what its transfer syntax says.
    start = 8 if dataset.original_encoding[0] else 12
    if len(tail) < start:
        return Elements(syntax, values, None, None)
    length = int.from_bytes(tail[start - 4 : start], "big" if big_endian else "little")
    return Elements(syntax, values, at + start, -1 if length == _UNDEFINED else length)


def _store_pydicom(values: dict[str, str | int], vr: bytes, name: str, dataset: object, tag: int) -> None:
    """Put the element of ``dataset`` at ``tag`` into ``values``, in the form that the skim gives it."""
    from pydicom.multival import MultiValue

    try:
        value = dataset[tag].value  # type: ignore[index]
    except Exception as error:  # pydicom raises whatever its parts raise on damaged bytes
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
    """A file that is read from its beginning, each time at least twice as far as before, and never beyond 64 MiB."""

    def __init__(self, data: bytes, read_first: Callable[[int], bytes]) -> None:
        self._data, self._read_first = data, read_first
        self._position, self._is_whole = 0, False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            self._reach(INFLATED_LIMIT)
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        self._reach(self._position + len(view))
        part = self._data[self._position : self._position + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _reach(self, end: int) -> None:
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


def _interpret(elements: Elements, size: int, header_bytes: int, crc32c: int) -> Header:
    """Return the elements as a ``Header``; raises BAD_HEADER where a number is not one."""
    signed = elements.values.get("pixel_representation") == 1
    values: list[Any] = [*map(elements.values.get, _NAMES)]
    try:
        for index, convert in _CONVERTED:
            values[index] = convert(values[index])
    except ValueError as error:
        raise SliceError(Reason.BAD_HEADER, f"expected numbers where PS3.6 has DS or IS: {error}") from None
    if signed:
        for index in _EITHER_SIGN:
            values[index] = _as_signed(values[index])
    at = elements.pixel_offset, elements.pixel_length
    return Header(elements.transfer_syntax, size, header_bytes, crc32c, *at, *values)


def _texts(text: str | int | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in str(text or "").split("\\"))


def _integer(text: str | int | None) -> int | None:
    if text is None:
        return None
    number = float(text)
    if not (number.is_integer() and abs(number) < 2**31):  # PS3.5 6.2, IS
        raise ValueError(f"not an integer of 32 bits: {text!r}")
    return int(number)


def _decimal(text: str | int | None) -> float | None:
    return None if text is None else float(text)


def _decimals(text: str | int | None) -> tuple[float, ...] | None:
    return None if text is None else tuple([float(part) for part in str(text).split("\\")])


def _as_signed(word: int | None) -> int | None:
    """Return 16 bits as the signed number that they are in two's complement."""
    return word - 0x10000 if word is not None and word > 0x7FFF else word


def _converter(element: Element) -> Callable[[str | int | None], Any] | None:
    """Return what makes a value of the element's text; None where it stays as it is."""
    if element.vr == b"IS":
        return _integer
    if element.vr == b"DS":
        return _decimal if element.count == 1 else _decimals
    return None if element.count == 1 else _texts


# The elements are the last fields of Header, in this order.
_NAMES: Final = tuple(one.name for one in ELEMENTS)
_CONVERTED: Final = tuple((index, convert) for index, one in enumerate(ELEMENTS) if (convert := _converter(one)))
_EITHER_SIGN: Final = tuple(index for index, one in enumerate(ELEMENTS) if one.either_sign)
