"""Which files are CT slices: the rules by which a header is accepted, or rejected with a reason."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from operator import attrgetter
from typing import Final

from ich_prep.dicom.decode import NATIVE, missing_decoder
from ich_prep.dicom.elements import DEFLATED_LE, EXPLICIT_BE, Header, keyword_of
from ich_prep.dicom.header import CT_IMAGE_STORAGE
from ich_prep.errors import CONVERT_FRAMES, Reason, SliceError

LARGEST_SIDE: Final = 4096
ENHANCED_CT: Final = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"
AXIAL: Final = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
OTHER_RESCALE_TYPE: Final = "other_rescale_type"
BURNED_IN: Final = "burned_in"

# Words of an image type, as vendors write them: Siemens has CT_SOM5 MIP, Philips PROJECTION IMAGE.
_NOT_SLICES: Final = re.compile(
    r"\b(?:MIP|MAX ?IP|MIN ?IP|PROJECTION IMAGE|VRT|VOLUME RENDER(?:ED|ING)|SSD|3D|SCREEN ?(?:SAVE|SHOT|CAPTURE)|"
    r"DOSE (?:INFO|REPORT)|SECONDARY CAPTURE)\b"
)
_REFORMATTED: Final = re.compile(r"\b(?:MPR|REFORMAT(?:TED)?|RESAMPLED)\b")
_STEEPEST_COSINE: Final = math.cos(math.radians(45)) - 1e-9


def check_slice(header: Header, faults: tuple[str, ...] = ()) -> None:
    """Raise ``SliceError`` unless ``header`` is that of one axial CT slice whose pixels can be decoded to HU.

    According to PS3.3 A.3 (CT image), C.8.2.1 (image type), C.7.6.3 (image pixel) and C.11.1 (modality LUT). ``faults``
    are those found while the header was read.
    """
    _check_kind(header)
    _check_pixels(header, faults)
    _check_length(header)


def flags_of(header: Header) -> list[str]:
    """Return what is unusual about a slice that ``check_slice`` accepts: sorted words of the flags column."""
    flags = list(header.flags)
    if is_reformatted(header.image_type):
        flags.append("reformatted")
    if header.rescale_type is not None and not is_hounsfield(header.rescale_type):
        flags.append(OTHER_RESCALE_TYPE)
    if header.burned_in is not None and header.burned_in.upper() == "YES":
        flags.append(BURNED_IN)
    if header.orientation is None or _cosine(header.orientation) is None:
        flags.append("no_orientation")
    if header.transfer_syntax in NATIVE:
        expected = _frame_bytes(header)
        if header.pixel_length != expected + expected % 2 and header.pixel_length != expected:
            flags.append("excess_bytes")
    return sorted(flags)


def oriented(orientation: tuple[float, ...] | None) -> tuple[float, ...]:
    """Return the orientation of a slice, axial if the file has none that can be used."""
    return AXIAL if orientation is None or _cosine(orientation) is None else orientation


def is_hounsfield(rescale_type: str) -> bool:
    """Return whether a RescaleType reads as Hounsfield units (PS3.3 C.11.1.1.2), however it is spelt."""
    letters = re.sub(r"[^a-z]", "", rescale_type.lower())
    return letters in ("hu", "huunit", "huunits", "hus") or letters.startswith(("hounsf", "hunsf"))


@lru_cache(maxsize=256)
def is_reformatted(image_type: tuple[str, ...]) -> bool:
    """Return whether the image type is that of a reformatted volume."""
    return any(_REFORMATTED.search(_plain(value)) for value in image_type)


def is_original(image_type: str | None, lossy: str | None) -> bool:
    """Return whether an image type, its values joined by backslashes, is that of an original slice, or unknown.

    A lossy copy of an original slice is DERIVED by PS3.3 C.7.6.1.1.2, and still that slice.
    """
    values = tuple((image_type or "").upper().split("\\"))
    is_copy = values[:2] == ("DERIVED", "PRIMARY") and lossy == "01"
    return (values[0] in ("", "ORIGINAL") or is_copy) and not is_reformatted(values)


def _refuse(reason: Reason, expected: str, found: object) -> SliceError:
    return SliceError(reason, _sentence(expected, found))


def _sentence(expected: str, found: object) -> str:
    return f"expected {expected}, found {found}"


def _check_kind(header: Header) -> None:
    storage, modality = header.sop_class_uid, header.modality
    if storage in ENHANCED_CT:
        found = f"an enhanced CT object of {header.frames} frames: {CONVERT_FRAMES}"
        raise _refuse(Reason.MULTI_FRAME, "one slice a file", found)
    if storage is not None and storage.startswith(SECONDARY_CAPTURE):
        raise _refuse(Reason.DERIVED, "CT Image Storage", "a secondary capture")
    is_ct = storage == CT_IMAGE_STORAGE if modality is None else modality.upper() == "CT"
    if storage not in (None, CT_IMAGE_STORAGE) or not is_ct:
        raise _refuse(Reason.NOT_CT, "modality CT", f"modality {modality}, SOP class {storage}")
    reason = _reason_of(header.image_type)
    if reason is not None:
        raise _refuse(reason, "an axial slice", "image type " + "\\".join(header.image_type))
    cosine = None if header.orientation is None else _cosine(header.orientation)
    if cosine is not None and cosine < _STEEPEST_COSINE:
        degrees = math.degrees(math.acos(cosine))
        raise _refuse(Reason.NOT_AXIAL, "a slice within 45 degrees of axial", f"one at {degrees:.0f} degrees")


@lru_cache(maxsize=256)
def _reason_of(image_type: tuple[str, ...]) -> Reason | None:
    """Return why images of this type (PS3.3 C.8.2.1.1.1) are no stack of slices, or None."""
    words = [_plain(value) for value in image_type]
    if "LOCALIZER" in words:
        return Reason.LOCALIZER
    return Reason.DERIVED if any(map(_NOT_SLICES.search, words)) else None


def _plain(value: str) -> str:
    """Return a value of an image type as words: in capitals, separated by one space."""
    return re.sub(r"[^A-Z0-9]+", " ", value.upper()).strip()


@lru_cache(maxsize=256)
def _cosine(orientation: tuple[float, ...]) -> float | None:
    """Return the cosine between the plane's normal and the body axis, 0 to 1; None if there is no normal."""
    if len(orientation) != len(AXIAL) or not all(map(math.isfinite, orientation)):
        return None
    a, b, c, d, e, f = orientation
    normal = b * f - c * e, c * d - a * f, a * e - b * d
    length = math.hypot(*normal)
    return abs(normal[2]) / length if length > 1e-6 else None


def _check_pixels(header: Header, faults: tuple[str, ...]) -> None:
    if header.pixel_offset is None:
        raise _refuse(Reason.NO_PIXELS, "PixelData", "none")
    if header.frames not in (None, 1):
        found = f"NumberOfFrames {header.frames}: {CONVERT_FRAMES}"
        raise _refuse(Reason.MULTI_FRAME, "one frame", found)
    if header.samples_per_pixel not in (None, 1) or header.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        found = f"{header.photometric} with {header.samples_per_pixel} samples"
        raise _refuse(Reason.NOT_MONOCHROME, "MONOCHROME1 or MONOCHROME2 with one sample", found)
    faults = (*_missing(header), *_impossible(header), *faults)
    if faults:
        raise SliceError(Reason.BAD_HEADER, "; ".join(faults))
    if header.transfer_syntax == EXPLICIT_BE and header.bits_allocated == 8:
        # Written as words (OW) or bytes (OB), whose byte order differs: PS3.5 8.2.
        raise _refuse(Reason.UNSUPPORTED_SYNTAX, "16 bits allocated in big endian", "8 bits allocated")
    if max(header.rows or 0, header.columns or 0) > LARGEST_SIDE:
        raise _refuse(Reason.TOO_LARGE, f"at most {LARGEST_SIDE} pixels a side", f"{header.rows} x {header.columns}")
    lacking = missing_decoder(header.transfer_syntax)
    if lacking:
        raise SliceError(Reason.UNSUPPORTED_SYNTAX, lacking)


_required_of = attrgetter(
    *(_REQUIRED := ("sop_instance_uid", "series_instance_uid", "rows", "columns", "bits_allocated", "bits_stored"))
)


def _missing(header: Header) -> list[str]:
    """Return a sentence that names every required attribute without a value, if there is one."""
    if all(values := _required_of(header)):
        return []
    absent = [(keyword_of(name), value) for name, value in zip(_REQUIRED, values) if not value]
    keywords, found = zip(*absent)
    return [_sentence(f"a value of {', '.join(keywords)}", ", ".join(map(str, found)))]


def _impossible(header: Header) -> list[str]:
    """Return a sentence for each group of attributes whose values cannot be those of a CT slice."""
    allocated, stored, high, sign = (
        header.bits_allocated,
        header.bits_stored,
        header.high_bit,
        header.pixel_representation,
    )
    slope, intercept = header.rescale_slope, header.rescale_intercept
    sentences = []
    if allocated and stored and not (allocated in (8, 16) and stored <= allocated and high in (None, stored - 1)):
        found = f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {high}"
        sentences.append(_sentence("8 or 16 bits allocated and high bit = bits stored - 1", found))
    if sign not in (0, 1):
        sentences.append(_sentence("PixelRepresentation 0 or 1", sign))
    if slope is None or not (math.isfinite(slope) and slope > 0):
        sentences.append(_sentence("RescaleSlope > 0", slope))
    if intercept is None or not math.isfinite(intercept):
        sentences.append(_sentence("a finite RescaleIntercept", intercept))
    return sentences


def _frame_bytes(header: Header) -> int:
    """Return the bytes of native pixels."""
    assert header.rows and header.columns and header.bits_allocated
    return header.rows * header.columns * header.bits_allocated // 8


def _check_length(header: Header) -> None:
    assert header.pixel_offset is not None and header.pixel_length is not None
    if header.transfer_syntax not in NATIVE:
        if header.pixel_offset + 16 > header.file_size:
            raise _refuse(Reason.TRUNCATED, "encapsulated pixels", f"the end of the file at {header.file_size}")
        return
    expected = _frame_bytes(header)
    # Bytes behind the last row are ignored (PS3.5 8.1.1), unless they may be a second frame.
    if not expected <= header.pixel_length < max(2 * expected, expected + 2):
        raise _refuse(Reason.SIZE_MISMATCH, f"{expected} bytes of PixelData", f"a length of {header.pixel_length}")
    if header.transfer_syntax != DEFLATED_LE and header.pixel_offset + expected > header.file_size:
        available = max(0, header.file_size - header.pixel_offset)
        raise _refuse(Reason.TRUNCATED, f"{expected} bytes of pixels", available)
