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
from dataclasses import dataclass
from typing import BinaryIO, Final

from ich_prep.dataset.native import crc32c
from ich_prep.errors import Reason, SliceError

SKIM_BYTES: Final = 8 * 1024
LONGEST_SKIM: Final = 256 * 1024
INFLATED_LIMIT: Final = 64 * 1024 * 1024

IMPLICIT_LE: Final = "1.2.840.10008.1.2"
EXPLICIT_LE: Final = "1.2.840.10008.1.2.1"
DEFLATED_LE: Final = "1.2.840.10008.1.2.1.99"
EXPLICIT_BE: Final = "1.2.840.10008.1.2.2"

_PIXEL_DATA: Final = 0x7FE00010
_UNDEFINED: Final = 0xFFFFFFFF
_BLANKS: Final = " \0\t\n\v\f\r\x1c\x1d\x1e\x1f"

# Tag -> (VR, name here). PS3.6 gives the VRs; US of PixelPaddingValue may also be written SS.
_TAGS: Final[dict[int, tuple[bytes, str]]] = {
    0x00080008: (b"CS", "image_type"),
    0x00080016: (b"UI", "sop_class_uid"),
    0x00080018: (b"UI", "sop_instance_uid"),
    0x00080060: (b"CS", "modality"),
    0x00100020: (b"LO", "patient_id"),
    0x0020000D: (b"UI", "study_instance_uid"),
    0x0020000E: (b"UI", "series_instance_uid"),
    0x00200013: (b"IS", "instance_number"),
    0x00200032: (b"DS", "position"),
    0x00200037: (b"DS", "orientation"),
    0x00280002: (b"US", "samples_per_pixel"),
    0x00280004: (b"CS", "photometric"),
    0x00280008: (b"IS", "frames"),
    0x00280010: (b"US", "rows"),
    0x00280011: (b"US", "columns"),
    0x00280030: (b"DS", "pixel_spacing"),
    0x00280100: (b"US", "bits_allocated"),
    0x00280101: (b"US", "bits_stored"),
    0x00280102: (b"US", "high_bit"),
    0x00280103: (b"US", "pixel_representation"),
    0x00280120: (b"US", "padding"),
    0x00280121: (b"US", "padding_limit"),
    0x00281052: (b"DS", "rescale_intercept"),
    0x00281053: (b"DS", "rescale_slope"),
    0x00282110: (b"CS", "lossy"),
}
_AS_FOUND: Final = (
    ("sop_class_uid", "sop_instance_uid", "modality", "patient_id", "study_instance_uid", "series_instance_uid")
    + ("samples_per_pixel", "photometric", "rows", "columns", "bits_allocated", "bits_stored", "high_bit")
    + ("pixel_representation", "lossy")
)
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
class Header:
    """What a slice's file says of itself; ``None`` where it says nothing.

    ``pixel_offset`` is the byte at which native pixels begin, or the first item of encapsulated ones; ``pixel_length``
    is their length in bytes, -1 when encapsulated. Both count in the inflated stream when the file is deflated, and are
    None when there is no PixelData. ``position`` (x, y, z) and ``pixel_spacing`` (between rows, between columns) are in
    mm; ``orientation`` holds the six direction cosines of PS3.3 C.7.6.2.1.1. ``padding`` and ``padding_limit`` are
    stored values. ``crc32c`` covers the first ``header_bytes`` of the file: it tells later whether this is the file
    that was read.
    """

    transfer_syntax: str
    file_size: int
    header_bytes: int
    crc32c: int
    pixel_offset: int | None
    pixel_length: int | None
    image_type: tuple[str, ...]
    sop_class_uid: str | None
    sop_instance_uid: str | None
    modality: str | None
    patient_id: str | None
    study_instance_uid: str | None
    series_instance_uid: str | None
    instance_number: int | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    samples_per_pixel: int | None
    photometric: str | None
    frames: int | None
    rows: int | None
    columns: int | None
    pixel_spacing: tuple[float, ...] | None
    bits_allocated: int | None
    bits_stored: int | None
    high_bit: int | None
    pixel_representation: int | None
    padding: int | None
    padding_limit: int | None
    rescale_intercept: float | None
    rescale_slope: float | None
    lossy: str | None


@dataclass(frozen=True, slots=True)
class _Found:
    """The elements a reader found: texts stripped, numbers of VR US as they stand, nothing interpreted."""

    transfer_syntax: str
    elements: dict[str, str | int]
    pixel_offset: int | None
    pixel_length: int | None


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return the header of the DICOM file at ``path``.

    Raises ``SliceError``: UNREADABLE, EMPTY_FILE, NOT_DICOM, BAD_HEADER (a value that is not of its VR), or TOO_LARGE (a
    deflated file beyond 64 MiB).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            if size == 0:
                raise SliceError(Reason.EMPTY_FILE, "expected a DICOM file, found 0 bytes")
            data = os.pread(descriptor, SKIM_BYTES, 0)
            found = skim(data)
            if found is None and size > len(data) and data[128:132] == b"DICM":
                data = os.pread(descriptor, LONGEST_SKIM, 0)
                found = skim(data)
            if found is None:
                found = _read_with_pydicom(descriptor, data)
            inflated = found.transfer_syntax == DEFLATED_LE
            header_bytes = min(size, SKIM_BYTES if inflated else found.pixel_offset or SKIM_BYTES)
            if header_bytes > len(data):
                data = os.pread(descriptor, header_bytes, 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SliceError(Reason.UNREADABLE, error.strerror or str(error)) from None
    return _interpret(found, size, header_bytes, crc32c(data[:header_bytes]))


def skim(data: bytes) -> _Found | None:
    """Return the elements before PixelData in the first bytes of a file, or None where pydicom must decide.

    None means: no ``DICM`` at byte 128, an element of undefined length, an unknown VR, tags out of order, text that is
    not plain ASCII, big endian data, or that ``data`` ends before PixelData begins. Deflated data is inflated no further
    than ``data`` is long: the pixels are left to whoever wants them.
    """
    if data[128:132] != b"DICM":
        return None
    elements: dict[str, str | int] = {}
    try:
        meta, position = walk_meta(data)
        if meta == IMPLICIT_LE:
            return _walk_implicit(data, position, meta, elements)
        if meta in (None, EXPLICIT_BE):
            return None
        if meta == DEFLATED_LE:
            data = zlib.decompressobj(wbits=-zlib.MAX_WBITS).decompress(data[position:], len(data))
            position = 0
        return _walk_explicit(data, position, meta, elements)
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


def _walk_explicit(data: bytes, position: int, syntax: str, elements: dict[str, str | int]) -> _Found | None:
    known, long_vrs, short_vrs, previous = _TAGS.get, _LONG_VRS, _SHORT_VRS, 0
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
                return _at_pixels(syntax, elements, position, length)
            if length == _UNDEFINED:
                return None
        else:
            return None
        if tag > _PIXEL_DATA:
            return None
        wanted = known(tag)
        if wanted is not None and not _keep(elements, wanted, vr, data[position : position + length], length):
            return None
        position += length


def _walk_implicit(data: bytes, position: int, syntax: str, elements: dict[str, str | int]) -> _Found | None:
    known, previous = _TAGS.get, 0
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
            return _at_pixels(syntax, elements, position, length)
        if length == _UNDEFINED:
            return None
        wanted = known(tag)
        if wanted is not None and not _keep(elements, wanted, wanted[0], data[position : position + length], length):
            return None
        position += length


def _at_pixels(syntax: str, elements: dict[str, str | int], position: int, length: int) -> _Found | None:
    native = syntax in (IMPLICIT_LE, EXPLICIT_LE, DEFLATED_LE)
    if native == (length == _UNDEFINED):
        return None  # encapsulated pixels in a native syntax, or the reverse
    return _Found(syntax, elements, position, length if native else -1)


def _keep(elements: dict[str, str | int], wanted: tuple[bytes, str], vr: bytes, value: bytes, length: int) -> bool:
    """Put one wanted element among the ``elements``; False where it is not of the form that the skim knows."""
    expected, name = wanted
    if len(value) != length or (vr != expected and not (vr == b"SS" and name.startswith("padding"))):
        return False
    if expected == b"US":
        if length == 2:
            elements[name] = int.from_bytes(value, "little")
        return length in (0, 2)
    if b"\x1b" in value:
        return False  # an escape sequence of ISO 2022: the bytes look like ASCII and stand for another script
    text = value.decode("ascii").strip(_BLANKS)
    if text:
        elements[name] = text
    return True


def _read_with_pydicom(descriptor: int, data: bytes) -> _Found:
    """Return the elements as pydicom finds them; raises NOT_DICOM, BAD_HEADER or TOO_LARGE."""
    import pydicom
    from pydicom.filereader import read_dataset, read_preamble

    if data[128:132] != b"DICM":
        raise SliceError(Reason.NOT_DICOM, "expected 'DICM' at byte 128, found other bytes")
    try:
        # pydicom remarks on what it works around; what cannot be used is refused by its value.
        with (
            warnings.catch_warnings(action="ignore"),
            pydicom.config.disable_value_validation(),
            open(os.dup(descriptor), "rb") as file,
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
            elements: dict[str, str | int] = {}
            for tag, (vr, name) in _TAGS.items():
                if tag in dataset:
                    _keep_pydicom(elements, vr, name, dataset, tag)
            at = stream.tell()
            tail = stream.read(12)
    except SliceError:
        raise
    except Exception as error:  # pydicom raises whatever its parts raise on damaged bytes
        raise SliceError(Reason.NOT_DICOM, f"pydicom: {type(error).__name__}: {error}"[:200]) from None
    if not syntax:
        raise SliceError(Reason.NOT_DICOM, "expected a TransferSyntaxUID in the file meta information, found none")
    # Explicit or implicit as the data set is, which need not be what its transfer syntax says.
    start = 8 if dataset.original_encoding[0] else 12
    if len(tail) < start:
        return _Found(syntax, elements, None, None)
    length = int.from_bytes(tail[start - 4 : start], "big" if big_endian else "little")
    return _Found(syntax, elements, at + start, -1 if length == _UNDEFINED else length)


def _keep_pydicom(elements: dict[str, str | int], vr: bytes, name: str, dataset: object, tag: int) -> None:
    """Put the element of ``dataset`` at ``tag`` among the ``elements``, in the form that the skim gives it."""
    from pydicom.multival import MultiValue

    try:
        value = dataset[tag].value  # type: ignore[index]
    except Exception as error:  # pydicom raises whatever its parts raise on damaged bytes
        raise SliceError(Reason.BAD_HEADER, f"pydicom: {name}: {type(error).__name__}: {error}"[:200]) from None
    if not isinstance(value, str | int | float | MultiValue):
        return  # no value, or one of another VR
    if vr == b"US":
        if isinstance(value, int):
            elements[name] = value & 0xFFFF
        return
    parts = list(value) if isinstance(value, MultiValue) else [value]
    text = "\\".join(str(getattr(part, "original_string", part)) for part in parts).strip(_BLANKS)
    if text:
        elements[name] = text


def inflate(data: bytes) -> bytes:
    """Return the inflated data set of a deflated file (PS3.5 A.5); raises TOO_LARGE beyond 64 MiB."""
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    inflated = inflater.decompress(data, INFLATED_LIMIT)
    if inflater.unconsumed_tail:
        raise SliceError(Reason.TOO_LARGE, f"expected at most {INFLATED_LIMIT} bytes after inflating, found more")
    return inflated


def _interpret(found: _Found, size: int, header_bytes: int, crc32c: int) -> Header:
    """Return the elements as a ``Header``; raises BAD_HEADER for a number that is none."""
    get = found.elements.get
    try:
        signed = get("pixel_representation") == 1
        return Header(
            transfer_syntax=found.transfer_syntax,
            file_size=size,
            header_bytes=header_bytes,
            crc32c=crc32c,
            pixel_offset=found.pixel_offset,
            pixel_length=found.pixel_length,
            image_type=tuple(part.strip() for part in str(get("image_type", "")).split("\\")),
            instance_number=_integer(get("instance_number")),
            position=_decimals(get("position")),
            orientation=_decimals(get("orientation")),
            frames=_integer(get("frames")),
            pixel_spacing=_decimals(get("pixel_spacing")),
            padding=_signed(get("padding"), signed=signed),
            padding_limit=_signed(get("padding_limit"), signed=signed),
            rescale_intercept=_decimal(get("rescale_intercept")),
            rescale_slope=_decimal(get("rescale_slope")),
            **{name: get(name) for name in _AS_FOUND},  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise SliceError(Reason.BAD_HEADER, f"expected numbers where PS3.6 has DS or IS: {error}") from None


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


def _signed(word: str | int | None, *, signed: bool) -> int | None:
    if word is None:
        return None
    return int(word) - 0x10000 if signed and int(word) > 0x7FFF else int(word)
