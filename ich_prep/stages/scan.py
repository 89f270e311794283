"""Task 1: read the headers of one batch of files, and say which of them are slices."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ich_prep.dataset.storage import write_whole
from ich_prep.decode import NATIVE, missing_decoder
from ich_prep.errors import Reason, SliceError
from ich_prep.header import DEFLATED_LE, EXPLICIT_BE, SKIM_BYTES, Header, read_header
from ich_prep.sources import read_ahead
from ich_prep.stages.state import BuildFolder

FILES_PER_BATCH = 512
FILES_AHEAD = 64  # at a tenth of a millisecond a header: what hides the latency of a remote disk
LARGEST_SIDE = 4096
CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
DERIVED_WORDS = frozenset(("SECONDARY", "SCREEN SAVE", "DOSE_INFO", "REFORMATTED", "MPR", "PROJECTION IMAGE"))

# One line a file. What a quarantined file's header says is kept where it could be read: its label is then accounted for.
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("sop_instance_uid", pa.string()),
        ("series_instance_uid", pa.string()),
        ("study_instance_uid", pa.string()),
        ("patient_id", pa.string()),
        ("instance_number", pa.int64()),
        ("position", pa.list_(pa.float64())),
        ("orientation", pa.list_(pa.float64())),
        ("pixel_spacing", pa.list_(pa.float64())),
        ("transfer_syntax", pa.string()),
        ("file_size", pa.int64()),
        ("header_bytes", pa.int64()),
        ("crc32c", pa.int64()),
        ("pixel_offset", pa.int64()),
        ("rows", pa.int32()),
        ("columns", pa.int32()),
        ("bits_allocated", pa.int32()),
        ("bits_stored", pa.int32()),
        ("signed", pa.bool_()),
        ("monochrome1", pa.bool_()),
        ("padding_low", pa.int32()),
        ("padding_high", pa.int32()),
        ("rescale_slope", pa.float64()),
        ("rescale_intercept", pa.float64()),
    ]
)


def scan_batch(folder: str, src: str, batch: int) -> tuple[int, int]:
    """Read the headers of files ``batch`` x 512 and following; write ``scan/<batch>.parquet`` in the working folder.

    Returns how many slices and how many quarantined files there are among them.
    """
    build = BuildFolder(Path(folder))
    listed = pq.ParquetFile(build.files)  # opened anew: a worker may outlive the build that wrote it
    paths = listed.read_row_group(batch, columns=["path"])["path"].to_pylist()
    root = os.fsencode(src)
    ahead = read_ahead(paths, lambda path: os.path.join(root, path), files=FILES_AHEAD, length=SKIM_BYTES)
    lines = [scan_file(src, path) for path in ahead]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(lines, SCHEMA), sink, write_statistics=False)
    write_whole(build.batch(batch), sink.getvalue().to_pybytes())
    quarantined = sum(line.get("reason") is not None for line in lines)
    return len(lines) - quarantined, quarantined


def scan_file(src: str, name: bytes) -> dict[str, Any]:
    """Return the line of one file, ``name`` relative to ``src``, in the form of ``SCHEMA``."""
    try:
        path = name.decode()
    except UnicodeDecodeError:
        shown = name.decode(errors="backslashreplace")
        return {"path": shown, "reason": Reason.BAD_PATH, "detail": "expected a file name in UTF-8"}
    line: dict[str, Any] = {"path": path}
    try:
        header = read_header(os.path.join(src, path))
        line.update(_columns(header))
        check_slice(header)
    except SliceError as error:
        line.update(reason=error.reason, detail=error.detail)
    return line


def _columns(header: Header) -> dict[str, Any]:
    padding = header.padding, header.padding if header.padding_limit is None else header.padding_limit
    low, high = (None, None) if padding[0] is None else (min(padding), max(padding))  # type: ignore[type-var]
    return {
        "sop_instance_uid": header.sop_instance_uid,
        "series_instance_uid": header.series_instance_uid,
        "study_instance_uid": header.study_instance_uid,
        "patient_id": header.patient_id,
        "instance_number": header.instance_number,
        "position": _finite(header.position, 3),
        "orientation": _finite(header.orientation, 6),
        "pixel_spacing": _finite(header.pixel_spacing, 2),
        "transfer_syntax": header.transfer_syntax,
        "file_size": header.file_size,
        "header_bytes": header.header_bytes,
        "crc32c": header.crc32c,
        "pixel_offset": header.pixel_offset,
        "rows": header.rows,
        "columns": header.columns,
        "bits_allocated": header.bits_allocated,
        "bits_stored": header.bits_stored,
        "signed": header.pixel_representation == 1,
        "monochrome1": header.photometric == "MONOCHROME1",
        "padding_low": low,
        "padding_high": high,
        "rescale_slope": header.rescale_slope,
        "rescale_intercept": header.rescale_intercept,
    }


def _finite(numbers: tuple[float, ...] | None, count: int) -> list[float] | None:
    if numbers is None or len(numbers) != count or not all(map(math.isfinite, numbers)):
        return None
    return list(numbers)


def check_slice(header: Header) -> None:
    """Raise ``SliceError`` unless ``header`` is that of one axial CT slice whose pixels can be decoded to HU.

    Read by PS3.3 A.3 (CT image), C.8.2.1 (image type), C.7.6.3 (image pixel) and C.11.1 (modality LUT).
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
        # Written as words (OW) or as bytes (OB), which differ in their order: PS3.5 8.2.
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
        held = max(0, header.file_size - header.pixel_offset)
        raise _refuse(Reason.TRUNCATED, f"{expected} bytes of pixels", held)
