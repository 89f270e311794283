"""The data elements that are read from a DICOM header, each declared once as a field of ``Header``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Final

from ich_prep.errors import Reason, SliceError

# Transfer syntaxes whose pixels are not compressed (PS3.6 table A-1).
IMPLICIT_LE: Final = "1.2.840.10008.1.2"
EXPLICIT_LE: Final = "1.2.840.10008.1.2.1"
DEFLATED_LE: Final = "1.2.840.10008.1.2.1.99"
EXPLICIT_BE: Final = "1.2.840.10008.1.2.2"

PIXEL_DATA: Final = 0x7FE00010
MANY: Final = 0


@dataclass(frozen=True, slots=True)
class Element:
    """A data element that is read from each header: its ``name`` in ``Header``, and its ``tag`` and ``vr`` (PS3.6).

    ``count`` is its number of values, ``MANY`` if that varies; more than one value gives a tuple. ``kept``: the scan writes
    it to a column of this name. ``either_sign``: VR "US or SS", as PixelRepresentation says.
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
    """The header values of one slice; ``None`` where the file has none.

    ``pixel_offset`` is the byte at which native pixels begin, or the first item of encapsulated ones; ``pixel_length``
    is their length in bytes, -1 when encapsulated. In a deflated file both count in the inflated stream; they are None
    if there is no PixelData. ``position`` (x, y, z) and ``pixel_spacing`` (between rows, between columns) are in
    mm; ``orientation`` holds the six direction cosines of PS3.3 C.7.6.2.1.1. ``padding`` and ``padding_limit`` are
    stored values. ``crc32c`` covers the first ``header_bytes`` of the file: it shows later whether the file has
    changed.

    Each element is declared only here: the skim and the columns of the scan are derived from it.
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
# Tag -> VR, name, and whether the VR may be SS instead.
WANTED: Final = {one.tag: (one.vr, one.name, one.either_sign) for one in ELEMENTS}


@dataclass(frozen=True, slots=True)
class Elements:
    """The elements of a header: text stripped, numbers of VR US as read, nothing interpreted."""

    transfer_syntax: str
    values: dict[str, str | int]
    pixel_offset: int | None
    pixel_length: int | None


def interpret(elements: Elements, size: int, header_bytes: int, crc32c: int) -> Header:
    """Return the elements as a ``Header``; raises BAD_HEADER if a numeric value is not a number."""
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
    """Return 16 bits interpreted as a signed number in two's complement."""
    return word - 0x10000 if word is not None and word > 0x7FFF else word


def _converter(element: Element) -> Callable[[str | int | None], Any] | None:
    """Return the function that converts the element's text; None if it needs no conversion."""
    if element.vr == b"IS":
        return _integer
    if element.vr == b"DS":
        return _decimal if element.count == 1 else _decimals
    return None if element.count == 1 else _texts


# The elements are the last fields of Header, in this order.
_NAMES: Final = tuple(one.name for one in ELEMENTS)
_CONVERTED: Final = tuple((index, convert) for index, one in enumerate(ELEMENTS) if (convert := _converter(one)))
_EITHER_SIGN: Final = tuple(index for index, one in enumerate(ELEMENTS) if one.either_sign)
