"""The data elements that are read from a DICOM header, each declared once as a field of ``Header``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache, lru_cache
from typing import Any, Final

from ich_prep.errors import Reason, SliceError

# Transfer syntaxes whose pixels are not compressed (PS3.6 table A-1).
IMPLICIT_LE: Final = "1.2.840.10008.1.2"
EXPLICIT_LE: Final = "1.2.840.10008.1.2.1"
DEFLATED_LE: Final = "1.2.840.10008.1.2.1.99"
EXPLICIT_BE: Final = "1.2.840.10008.1.2.2"

PIXEL_DATA: Final = 0x7FE00010
MODALITY: Final = 0x00080060
MANY: Final = 0

SHOWN: Final = 64  # characters of a value that a message shows
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,40}")
_COMMA: Final = re.compile(r"\s*[+-]?(?:[0-9]+(?:[.,][0-9]*)?|[.,][0-9]+)(?:[eE][+-]?[0-9]+)?\s*")
_THREE_DIGITS: Final = re.compile(r",[0-9]{3}\s*$")  # of a thousand or of a fraction: nobody can tell
_NUMBERS: Final = {b"DS": "numbers", b"IS": "an integer of 32 bits"}


@dataclass(frozen=True, slots=True)
class Element:
    """A data element that is read from each header: its ``name`` in ``Header``, and its ``tag`` and ``vr`` (PS3.6).

    ``count`` is its number of values, ``MANY`` if that varies; more than one value gives a tuple. ``kept``: the scan writes
    it to a column of this name. ``either_sign``: VR "US or SS", as PixelRepresentation says. ``optional``: neither HU nor
    the identity of the slice need it, so a value that cannot be used is null.
    """

    name: str
    tag: int
    vr: bytes
    count: int
    kept: bool
    either_sign: bool
    optional: bool


def _element(tag: int, vr: str, *, count: int = 1, kept: bool = False, either_sign: bool = False) -> Any:
    """Declare a field of ``Header`` that is the element ``tag``; see ``Element``."""
    return field(metadata={"element": (tag, vr.encode(), count, kept, either_sign, False)})


def _optional(tag: int, vr: str) -> Any:
    """Declare a field of ``Header`` that is the optional element ``tag``, and a column of the scan; see ``Element``."""
    return field(metadata={"element": (tag, vr.encode(), 1, True, False, True)})


@dataclass(frozen=True, slots=True)
class Header:
    """The header values of one slice; ``None`` where the file has none.

    ``pixel_offset`` is the byte at which native pixels begin, or the first item of encapsulated ones; ``pixel_length``
    is their length in bytes, -1 when encapsulated. In a deflated file both count in the inflated stream; they are None
    if there is no PixelData. ``position`` (x, y, z) and ``pixel_spacing`` (between rows, between columns) are in
    mm; ``orientation`` holds the six direction cosines of PS3.3 C.7.6.2.1.1. ``padding`` and ``padding_limit`` are
    stored values. ``crc32c`` covers the first ``header_bytes`` of the file: it shows later whether the file has
    changed. ``flags`` says what was worked around while reading it.

    Each element is declared only here: the skim and the columns of the scan are derived from it.
    """

    transfer_syntax: str
    file_size: int
    header_bytes: int
    crc32c: int
    pixel_offset: int | None
    pixel_length: int | None
    flags: tuple[str, ...]
    specific_character_set: str | None = _optional(0x00080005, "CS")
    image_type: tuple[str, ...] = _element(0x00080008, "CS", count=MANY, kept=True)
    sop_class_uid: str | None = _element(0x00080016, "UI")
    sop_instance_uid: str | None = _element(0x00080018, "UI", kept=True)
    study_date: str | None = _optional(0x00080020, "DA")
    acquisition_time: str | None = _optional(0x00080032, "TM")
    accession_number: str | None = _optional(0x00080050, "SH")
    modality: str | None = _element(0x00080060, "CS")
    manufacturer: str | None = _optional(0x00080070, "LO")
    series_description: str | None = _optional(0x0008103E, "LO")
    patient_id: str | None = _element(0x00100020, "LO", kept=True)
    issuer_of_patient_id: str | None = _optional(0x00100021, "LO")
    patient_birth_date: str | None = _optional(0x00100030, "DA")
    patient_sex: str | None = _optional(0x00100040, "CS")
    patient_age: str | None = _optional(0x00101010, "AS")
    contrast_agent: str | None = _optional(0x00180010, "LO")
    body_part: str | None = _optional(0x00180015, "CS")
    slice_thickness: float | None = _optional(0x00180050, "DS")
    kvp: float | None = _optional(0x00180060, "DS")
    protocol_name: str | None = _optional(0x00181030, "LO")
    convolution_kernel: str | None = _optional(0x00181210, "SH")
    study_instance_uid: str | None = _element(0x0020000D, "UI", kept=True)
    series_instance_uid: str | None = _element(0x0020000E, "UI", kept=True)
    acquisition_number: int | None = _optional(0x00200012, "IS")
    instance_number: int | None = _element(0x00200013, "IS", kept=True)
    position: tuple[float, ...] | None = _element(0x00200032, "DS", count=3, kept=True)
    orientation: tuple[float, ...] | None = _element(0x00200037, "DS", count=6, kept=True)
    temporal_position_identifier: int | None = _optional(0x00200100, "IS")
    slice_location: float | None = _optional(0x00201041, "DS")
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
    burned_in: str | None = _optional(0x00280301, "CS")
    rescale_intercept: float | None = _element(0x00281052, "DS", kept=True)
    rescale_slope: float | None = _element(0x00281053, "DS", kept=True)
    rescale_type: str | None = _optional(0x00281054, "LO")
    lossy: str | None = _element(0x00282110, "CS", kept=True)


ELEMENTS: Final = tuple(
    Element(one.name, *one.metadata["element"]) for one in fields(Header) if "element" in one.metadata
)


@dataclass(frozen=True, slots=True)
class Elements:
    """The elements of a header: text decoded and stripped, numbers of VR US as read, nothing interpreted.

    ``flags`` says what was worked around.
    """

    transfer_syntax: str
    values: dict[str, str | int]
    pixel_offset: int | None
    pixel_length: int | None
    flags: tuple[str, ...] = ()


def interpret(elements: Elements, size: int, header_bytes: int, crc32c: int) -> Header:
    """Return the elements as a ``Header``; raises BAD_HEADER if a value that is needed is not a number."""
    header, faults = interpret_with_faults(elements, size, header_bytes, crc32c)
    if faults:
        raise SliceError(Reason.BAD_HEADER, "; ".join(faults))
    return header


def interpret_with_faults(
    elements: Elements, size: int, header_bytes: int, crc32c: int
) -> tuple[Header, tuple[str, ...]]:
    """Return the elements as a ``Header``, and a sentence for each value that is needed and not a number: it is None."""
    signed = elements.values.get("pixel_representation") == 1
    values: list[Any] = [*map(elements.values.get, _NAMES)]
    flags = elements.flags
    faults: tuple[str, ...] = ()
    try:
        for index, convert in _CONVERTED:
            if (text := values[index]) is not None:
                values[index] = convert(text)
    except ValueError:
        values, flags, faults = _convert_each(elements)
    if values[_IMAGE_TYPE] is None:
        values[_IMAGE_TYPE] = ("",)
    if signed:
        for index in _EITHER_SIGN:
            values[index] = _as_signed(values[index])
    at = elements.pixel_offset, elements.pixel_length
    return Header(elements.transfer_syntax, size, header_bytes, crc32c, *at, flags, *values), faults


@cache
def keyword_of(name: str) -> str:
    """Return DICOM's keyword for an element, such as RescaleSlope, from its ``name`` in ``Header``."""
    from pydicom.datadict import keyword_for_tag

    return keyword_for_tag(next(one.tag for one in ELEMENTS if one.name == name))


# --- text -> numbers -------------------------------------------------------------------------------------------------


def _convert_each(elements: Elements) -> tuple[list[Any], tuple[str, ...], tuple[str, ...]]:
    """Return the values of a header with unusual numbers, the flags of those accepted, and a sentence for each other."""
    values: list[Any] = [*map(elements.values.get, _NAMES)]
    flags, faults = set(elements.flags), []
    for index, convert in _CONVERTED:
        element, text = ELEMENTS[index], values[index]
        if text is None:
            continue
        try:
            values[index] = convert(text)
        except ValueError:
            values[index], flag = _unusual(element, str(text))
            if flag:
                flags.add(flag)
            elif not element.optional:
                shown = repr(text if len(str(text)) <= SHOWN else f"{str(text)[:SHOWN]}...")
                faults.append(f"expected {_NUMBERS[element.vr]} in {keyword_of(element.name)}, found {shown}")
    return values, tuple(sorted(flags)), tuple(faults)


def _unusual(element: Element, text: str) -> tuple[Any, str | None]:
    """Return the number that is meant by a ``text`` of unusual form, and its flag; (None, None) if none is."""
    if element.name == "instance_number" and _INTEGER.fullmatch(text.strip()):
        number = int(text)
        return (number if abs(number) < 2**63 else None), "long_instance_number"
    is_thousands = element.name == "rescale_intercept" and _THREE_DIGITS.search(text)
    if element.vr == b"DS" and not is_thousands and all(map(_COMMA.fullmatch, text.split("\\"))):
        numbers = tuple(float(part.replace(",", ".")) for part in text.split("\\"))
        if element.count != 1:
            return numbers, "decimal_comma"
        if len(numbers) == 1:
            return numbers[0], "decimal_comma"
    return None, None


@lru_cache(maxsize=256)
def _texts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("\\"))


def _integer(text: str) -> int:
    number = float(text)
    if not (number.is_integer() and abs(number) < 2**31):  # PS3.5 6.2, IS
        raise ValueError(f"not an integer of 32 bits: {text!r}")
    return int(number)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"not a finite number: {text!r}")
    return number


def _decimals(text: str) -> tuple[float, ...]:
    return tuple([float(part) for part in text.split("\\")])


_shared_decimals = lru_cache(maxsize=256)(_decimals)  # orientation and spacing are those of a whole series


def _as_signed(word: int | None) -> int | None:
    """Return 16 bits interpreted as a signed number in two's complement."""
    return word - 0x10000 if word is not None and word > 0x7FFF else word


def _converter(element: Element) -> Callable[[str], Any] | None:
    """Return the function that converts the element's text; None if it needs no conversion."""
    if element.vr == b"IS":
        return _integer
    if element.vr == b"DS" and element.optional:
        return _finite
    if element.vr == b"DS":
        if element.count == 1:
            return float
        return _decimals if element.name == "position" else _shared_decimals
    return None if element.count == 1 else _texts


# The elements are the last fields of Header, in this order.
_NAMES: Final = tuple(one.name for one in ELEMENTS)
_CONVERTED: Final = tuple((index, convert) for index, one in enumerate(ELEMENTS) if (convert := _converter(one)))
_EITHER_SIGN: Final = tuple(index for index, one in enumerate(ELEMENTS) if one.either_sign)
_IMAGE_TYPE: Final = _NAMES.index("image_type")
