"""The first bytes of a DICOM file -> its elements before PixelData, without building objects for them.

PS3.5 section 7 and PS3.10 section 7. Whatever this does not fully understand is left to pydicom.
"""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from functools import lru_cache
from typing import Final

from ich_prep.dicom.elements import (
    DEFLATED_LE,
    ELEMENTS,
    EXPLICIT_BE,
    EXPLICIT_LE,
    IMPLICIT_LE,
    PIXEL_DATA,
    Element,
    Elements,
)

LONGEST_SKIM: Final = 256 * 1024
UNDEFINED: Final = 0xFFFFFFFF
BLANKS: Final = " \0\t\n\v\f\r\x1c\x1d\x1e\x1f"
NO_PREAMBLE: Final = "no_preamble"
DEEPEST: Final = 64  # sequences within sequences


# VRs are compared as numbers of 16 bits, as they are read: that is faster than with bytes.
def _codes(vrs: str) -> frozenset[int]:
    return frozenset(int.from_bytes(vr.encode(), "little") for vr in vrs.split())


_LONG_VRS: Final = _codes("OB OD OF OL OV OW SQ SV UC UN UR UT UV")
_SHORT_VRS: Final = _codes("AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US")
_VRS: Final = _LONG_VRS | _SHORT_VRS
# Those of which a value can be read as text.
_TEXT_VRS: Final = _codes("AE AS CS DA DS DT IS LO LT PN SH ST TM UC UI UN UT")
_WITH_ITEMS: Final = _codes("SQ OB OW")
_WORD, _SIGNED_WORD, _SEQUENCE = (int.from_bytes(vr, "little") for vr in (b"US", b"SS", b"SQ"))
# Those whose characters are of SpecificCharacterSet (PS3.5 6.1.2.3); all others are of the default repertoire.
_BY_CHARACTER_SET: Final = frozenset((b"LO", b"LT", b"PN", b"SH", b"ST", b"UC", b"UT"))
# Tag -> element, and the code of its VR.
_WANTED: Final = {one.tag: (one, int.from_bytes(one.vr, "little")) for one in ELEMENTS}

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_MODALITY_FORM: Final = re.compile(r"[A-Z]{2,16}")
_UID_FORM: Final = re.compile(r"[0-9]+(?:\.[0-9]+){3,}")

_explicit = struct.Struct("<4H").unpack_from
_implicit = struct.Struct("<HHI").unpack_from
_length32 = struct.Struct("<I").unpack_from


def skim(data: bytes) -> Elements | None:
    """Return the elements before PixelData in the first bytes of a file, or None if pydicom must decide.

    None means: nothing that looks like a DICOM file, an unknown VR, tags out of order, a sequence of undefined length
    within one of unknown VR, big endian data, or that ``data`` ends before PixelData begins. At most ``len(data)`` bytes
    of deflated data are inflated: the caller reads the pixels.
    """
    values: dict[str, str | int] = {}
    flags: tuple[str, ...] = () if has_prefix(data) else (NO_PREAMBLE,)
    try:
        syntax, position = walk_meta(data)
        if syntax is None:
            syntax, flags = guess_syntax(data, position), (NO_PREAMBLE,)
        if syntax == IMPLICIT_LE:
            elements = _walk_implicit(data, position, syntax, values)
        elif syntax in (None, EXPLICIT_BE):
            return None
        else:
            if syntax == DEFLATED_LE:
                data = zlib.decompressobj(wbits=-zlib.MAX_WBITS).decompress(data[position:], len(data))
                position = 0
            elements = _walk_explicit(data, position, syntax, values)
    except (struct.error, zlib.error, ValueError):
        return None
    if not flags or elements is None:
        return elements
    return Elements(elements.transfer_syntax, values, elements.pixel_offset, elements.pixel_length, flags)


def has_prefix(data: bytes) -> bool:
    """Return whether the file has a preamble and the prefix behind it (PS3.10 section 7.1)."""
    return data[128:132] == b"DICM"


def begins_like_dicom(data: bytes) -> bool:
    """Return whether the first bytes of a file may be DICOM: a prefix, or an element of group 2 or 8 without one."""
    is_meta = data[:2] == b"\2\0" and int.from_bytes(data[4:6], "little") in _VRS
    return has_prefix(data) or is_meta or guess_syntax(data, 0) is not None


def is_plausible(values: dict[str, str | int]) -> bool:
    """Return whether a data set without a stated transfer syntax shows that it is DICOM: by its modality or SOP class."""
    modality, sop_class = str(values.get("modality", "")), str(values.get("sop_class_uid", ""))
    return bool(_MODALITY_FORM.fullmatch(modality) or _UID_FORM.fullmatch(sop_class))


def guess_syntax(data: bytes, position: int) -> str | None:
    """Return the native transfer syntax of the data set that begins at ``position`` with an element of group 8, or None."""
    group, length = data[position : position + 2], data[position + 4 : position + 8]
    if group in (b"\x08\0", b"\0\x08") and int.from_bytes(length[:2], "little") in _VRS:
        return EXPLICIT_LE if group == b"\x08\0" else EXPLICIT_BE
    if group == b"\x08\0" and len(length) == 4 and length[2:] == b"\0\0":
        return IMPLICIT_LE
    return None


def walk_meta(data: bytes) -> tuple[str | None, int]:
    """Return the transfer syntax (None if unknown) and the offset of the data set (PS3.10 section 7.1)."""
    _, syntax, position = _walk_meta(data)
    return syntax, position


def media_class(data: bytes) -> str | None:
    """Return the MediaStorageSOPClassUID of the file that begins with ``data``, None if there is none."""
    try:
        return _walk_meta(data)[0]
    except (struct.error, ValueError):
        return None


def _walk_meta(data: bytes) -> tuple[str | None, str | None, int]:
    position = 132 if has_prefix(data) else 0
    media, syntax = None, None
    while True:
        group, element, vr, length = _explicit(data, position)
        if group != 2:
            return media, syntax, position
        if vr in _LONG_VRS:
            (length,) = _length32(data, position + 8)
            position += 12
        elif vr in _SHORT_VRS:
            position += 8
        else:
            return media, None, position
        if element == 0x0010:
            syntax = data[position : position + length].decode("ascii").rstrip(" \0") or None
        elif element == 0x0002:
            media = data[position : position + length].decode("ascii").rstrip(" \0") or None
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
            if tag == PIXEL_DATA:
                return _at_pixels(syntax, values, position, length)
            if length == UNDEFINED:
                if vr != _SEQUENCE or tag > PIXEL_DATA:
                    return None
                position = _end_of_sequence(data, position, is_explicit=True)
                continue
        else:
            return None
        if tag > PIXEL_DATA:
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
        if tag <= previous or tag > PIXEL_DATA:
            return None
        previous = tag
        position += 8
        if tag == PIXEL_DATA:
            return _at_pixels(syntax, values, position, length)
        wanted = wanted_of(tag)
        if length == UNDEFINED:
            if wanted is not None:
                return None
            position = _end_of_sequence(data, position, is_explicit=False)
            continue
        if wanted is not None and not _store(values, wanted, wanted[1], data[position : position + length], length):
            return None
        position += length


def _end_of_sequence(data: bytes, position: int, *, is_explicit: bool) -> int:
    """Return the offset behind a sequence of undefined length whose items begin at ``position`` (PS3.5 section 7.5).

    Raises ``ValueError`` for what is not one, ``struct.error`` if ``data`` ends within it.
    """
    inside = [_SEQUENCE_END]  # the delimiter that ends each open sequence or item
    while inside:
        group, element, length = _implicit(data, position)
        tag = group << 16 | element
        position += 8
        if tag == inside[-1]:
            inside.pop()
        elif inside[-1] == _SEQUENCE_END:
            if tag != _ITEM:
                raise ValueError(f"expected an item of a sequence, found ({group:04x},{element:04x})")
            if length == UNDEFINED:
                inside.append(_ITEM_END)
            else:
                position += length
        else:
            if is_explicit:
                vr, length = length & 0xFFFF, length >> 16
                if vr in _LONG_VRS:
                    (length,) = _length32(data, position)
                    position += 4
                if vr not in _VRS or (length == UNDEFINED and vr not in _WITH_ITEMS):
                    raise ValueError(f"unknown form of an element within a sequence: VR {vr:04x}")
            if length == UNDEFINED:
                inside.append(_SEQUENCE_END)
            else:
                position += length
        if len(inside) > DEEPEST:
            raise ValueError(f"more than {DEEPEST} sequences within each other")
    return position


def _at_pixels(syntax: str, values: dict[str, str | int], position: int, length: int) -> Elements | None:
    native = syntax in (IMPLICIT_LE, EXPLICIT_LE, DEFLATED_LE)
    if native == (length == UNDEFINED):
        return None  # encapsulated pixels in a native syntax, or the reverse
    return Elements(syntax, values, position, length if native else -1)


def _store(values: dict[str, str | int], wanted: tuple[Element, int], vr: int, value: bytes, length: int) -> bool:
    """Put a wanted element into ``values``; return False if the skim does not support its form."""
    element, expected = wanted
    if len(value) != length:
        return False
    if vr != expected and not (vr == _SIGNED_WORD and element.either_sign):
        if not element.optional:
            return False
        if vr not in _TEXT_VRS:
            return True
    if expected == _WORD:
        if length == 2:
            values[element.name] = int.from_bytes(value, "little")
        return length in (0, 2)
    try:
        text = value.decode("ascii")
    except UnicodeDecodeError:
        text = decode_text(value, element.vr, values.get("specific_character_set"))
    else:
        if "\x1b" in text:
            text = decode_text(value, element.vr, values.get("specific_character_set"))
    text = text.strip(BLANKS)
    if text:
        values[element.name] = text
    return True


def is_text(vr: bytes) -> bool:
    """Return whether a value of ``vr`` can be read as text."""
    return int.from_bytes(vr, "little") in _TEXT_VRS


@lru_cache(maxsize=1024)
def decode_text(value: bytes, vr: bytes, character_set: str | int | None) -> str:
    r"""Return the text of an element of ``vr`` in the SpecificCharacterSet ``character_set``; bad bytes as ``\xe4``.

    An escape sequence of ISO 2022 announces another script by bytes that look like ASCII (PS3.5 section 6.1.2).
    """
    if vr not in _BY_CHARACTER_SET:
        return value.decode("ascii", "backslashreplace")
    encodings = _encodings(str(character_set or ""))
    if b"\x1b" not in value:
        return _escaped(value, encodings[0])
    import pydicom
    from pydicom.charset import decode_bytes
    from pydicom.valuerep import TEXT_VR_DELIMS

    settings = pydicom.config.settings
    before = settings.reading_validation_mode
    settings.reading_validation_mode = pydicom.config.RAISE
    try:
        return decode_bytes(value, encodings, TEXT_VR_DELIMS)
    except (LookupError, ValueError):
        return _escaped(value, encodings[0])
    finally:
        settings.reading_validation_mode = before


@lru_cache(maxsize=64)
def _encodings(character_set: str) -> list[str]:
    """Return Python's names of the encodings of a SpecificCharacterSet."""
    from pydicom.charset import convert_encodings

    with warnings.catch_warnings(action="ignore"):
        return convert_encodings(character_set.split("\\"))


def _escaped(value: bytes, encoding: str) -> str:
    try:
        return value.decode(encoding, "backslashreplace")
    except (LookupError, ValueError):  # an encoding that Python does not have, or not for text
        return value.decode("ascii", "backslashreplace")
