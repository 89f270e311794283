"""Which files are CT slices: the rules by which a header is accepted, or rejected with a reason."""

from __future__ import annotations

import math
from typing import Final

from ich_prep.dicom.decode import NATIVE, missing_decoder
from ich_prep.dicom.elements import DEFLATED_LE, EXPLICIT_BE, Header
from ich_prep.errors import Reason, SliceError

LARGEST_SIDE: Final = 4096
CT_IMAGE_STORAGE: Final = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT: Final = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"
DERIVED_WORDS: Final = frozenset(("SECONDARY", "SCREEN SAVE", "DOSE_INFO", "REFORMATTED", "MPR", "PROJECTION IMAGE"))


def check_slice(header: Header) -> None:
    """Raise ``SliceError`` unless ``header`` is that of one axial CT slice whose pixels can be decoded to HU.

    According to PS3.3 A.3 (CT image), C.8.2.1 (image type), C.7.6.3 (image pixel) and C.11.1 (modality LUT).
    """
    _check_kind(header)
    _check_pixels(header)
    _check_length(header)


def _refuse(reason: Reason, expected: str, found: object) -> SliceError:
    return SliceError(reason, f"expected {expected}, found {found}")


def _check_kind(header: Header) -> None:
    storage, kind = header.sop_class_uid, header.image_type
    if storage in ENHANCED_CT:
        raise _refuse(Reason.MULTI_FRAME, "one slice a file", "an enhanced CT object")
    if storage is not None and storage.startswith(SECONDARY_CAPTURE):
        raise _refuse(Reason.DERIVED, "CT Image Storage", "a secondary capture")
    if storage not in (None, CT_IMAGE_STORAGE) or header.modality != "CT":
        raise _refuse(Reason.NOT_CT, "modality CT", f"modality {header.modality}, SOP class {storage}")
    if "LOCALIZER" in kind:
        raise _refuse(Reason.LOCALIZER, "an axial slice", "image type " + "\\".join(kind))
    # A lossy copy of an original slice is DERIVED by PS3.3 C.7.6.1.1.2, and still that slice.
    if DERIVED_WORDS.intersection(kind) or (kind[0] == "DERIVED" and header.lossy != "01"):
        raise _refuse(Reason.DERIVED, "an original slice", "image type " + "\\".join(kind))


def _check_pixels(header: Header) -> None:
    if header.pixel_offset is None:
        raise _refuse(Reason.NO_PIXELS, "PixelData", "none")
    if header.frames not in (None, 1):
        raise _refuse(Reason.MULTI_FRAME, "one frame", f"NumberOfFrames {header.frames}")
    if header.samples_per_pixel not in (None, 1) or header.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        found = f"{header.photometric} with {header.samples_per_pixel} samples"
        raise _refuse(Reason.NOT_MONOCHROME, "MONOCHROME1 or MONOCHROME2 with one sample", found)
    for name in ("sop_instance_uid", "series_instance_uid", "rows", "columns", "bits_allocated", "bits_stored"):
        if not getattr(header, name):
            raise _refuse(Reason.BAD_HEADER, f"a value of {name}", getattr(header, name))
    bits = f"{header.bits_allocated} allocated, {header.bits_stored} stored, high bit {header.high_bit}"
    if (
        header.bits_allocated not in (8, 16)
        or not 1 <= (header.bits_stored or 0) <= header.bits_allocated
        or header.high_bit not in (None, (header.bits_stored or 0) - 1)
        or header.pixel_representation not in (0, 1)
    ):
        raise _refuse(Reason.BAD_HEADER, "8 or 16 bits allocated and high bit = bits stored - 1", bits)
    if header.transfer_syntax == EXPLICIT_BE and header.bits_allocated == 8:
        # Written as words (OW) or bytes (OB), whose byte order differs: PS3.5 8.2.
        raise _refuse(Reason.UNSUPPORTED_SYNTAX, "16 bits allocated in big endian", bits)
    if max(header.rows or 0, header.columns or 0) > LARGEST_SIDE:
        raise _refuse(Reason.TOO_LARGE, f"at most {LARGEST_SIDE} pixels a side", f"{header.rows} x {header.columns}")
    slope, intercept = header.rescale_slope, header.rescale_intercept
    if slope is None or intercept is None or not (math.isfinite(slope) and math.isfinite(intercept) and slope > 0):
        raise _refuse(Reason.BAD_HEADER, "RescaleSlope > 0 and RescaleIntercept", f"{slope} and {intercept}")
    lacking = missing_decoder(header.transfer_syntax)
    if lacking:
        raise SliceError(Reason.UNSUPPORTED_SYNTAX, lacking)


def _check_length(header: Header) -> None:
    assert header.pixel_offset is not None and header.pixel_length is not None
    assert header.rows and header.columns and header.bits_allocated
    if header.transfer_syntax not in NATIVE:
        if header.pixel_offset + 16 > header.file_size:
            raise _refuse(Reason.TRUNCATED, "encapsulated pixels", f"the end of the file at {header.file_size}")
        return
    expected = header.rows * header.columns * header.bits_allocated // 8
    if header.pixel_length not in (expected, expected + expected % 2):
        raise _refuse(Reason.SIZE_MISMATCH, f"{expected} bytes of PixelData", f"a length of {header.pixel_length}")
    if header.transfer_syntax != DEFLATED_LE and header.pixel_offset + expected > header.file_size:
        available = max(0, header.file_size - header.pixel_offset)
        raise _refuse(Reason.TRUNCATED, f"{expected} bytes of pixels", available)
