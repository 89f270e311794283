"""Task 1: read the headers of one batch of files -> one line per file: its header, or why it is quarantined."""

from __future__ import annotations

import math
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ich_prep.dataset.tables import rows_of, write_sealed
from ich_prep.dicom.accept import check_slice, flags_of, oriented
from ich_prep.dicom.elements import ELEMENTS, Element, Header
from ich_prep.dicom.header import SKIM_BYTES, read_with_faults
from ich_prep.dicom.litter import FIRST_BYTES, judge_unreadable
from ich_prep.errors import Reason, SliceError
from ich_prep.sources import Source, open_source, read_ahead, read_first, shown

if TYPE_CHECKING:
    from ich_prep.dataset.bucket_path import Place
    from ich_prep.stages.state import BuildFolder

FILES_PER_BATCH = 512
FILES_AHEAD = 64  # at a tenth of a millisecond per header, enough to hide the latency of a remote disk
_COLUMN_TYPES = {b"IS": pa.int64(), b"US": pa.int32(), b"DS": pa.float64()}  # by VR; all others are text
_KEPT = tuple(element for element in ELEMENTS if element.kept)
_LISTS = tuple((element.name, element.count) for element in _KEPT if element.count != 1 and element.vr == b"DS")
# Fields of Header that become columns unchanged, except that those of _LISTS are checked.
_FIELDS = (*(one.name for one in _KEPT), "transfer_syntax", "file_size", "header_bytes", "crc32c", "pixel_offset")
_values_of = attrgetter(*_FIELDS)
_MAYBE_LITTER = (Reason.EMPTY_FILE, Reason.NOT_DICOM)


def _column_type(element: Element) -> pa.DataType:
    kind = _COLUMN_TYPES.get(element.vr, pa.string())
    return kind if element.count == 1 or kind == pa.string() else pa.list_(kind)


# One line per file. The header of a quarantined file is kept if it could be read: its label is then accounted for.
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        *((element.name, _column_type(element)) for element in _KEPT),
        ("transfer_syntax", pa.string()),
        ("file_size", pa.int64()),
        ("header_bytes", pa.int64()),
        ("crc32c", pa.int64()),
        ("pixel_offset", pa.int64()),
        ("signed", pa.bool_()),
        ("monochrome1", pa.bool_()),
        ("padding_low", pa.int32()),
        ("padding_high", pa.int32()),
        ("flags", pa.list_(pa.string())),  # sorted; null for most slices
    ]
)


def scan_batch(folder: BuildFolder, sources: tuple[Place, ...], batch: int) -> tuple[int, int]:
    """Read the headers of files ``batch`` x 512 and following; write ``scan/<batch>.parquet`` in the working folder.

    ``sources`` are the folders and archives. Returns the number of slices and of quarantined files among
    these files.
    """
    source = open_source(sources)
    with rows_of(folder.files) as listed:  # reopened each time: a worker may outlive the build that wrote it
        files = listed.read_row_group(batch).to_pylist()
    scanned = scan_files(source, files)
    write_sealed(folder.batch(batch), scanned, write_statistics=False)
    slices: int = scanned["reason"].null_count
    return slices, len(scanned) - slices


def scan_files(source: Source, files: list[dict[str, Any]]) -> pa.Table:
    """Return one line (``SCHEMA``) for each of ``files``, lines of the listing of ``source``."""
    ahead = read_ahead(source, files, itemgetter("key"), files=FILES_AHEAD, length=SKIM_BYTES)
    return pa.Table.from_pylist([_scan_listed(source, file) for file in ahead], SCHEMA)


def _scan_listed(source: Source, file: dict[str, Any]) -> dict[str, Any]:
    if file["reason"] is None:
        return scan_file(source, file["key"], file["path"])
    return {"path": shown(file["path"]), "reason": file["reason"], "detail": file["detail"]}


def scan_file(source: Source, key: bytes, path: bytes) -> dict[str, Any]:
    """Return the line of the file with ``key`` in ``source``, with the columns of ``SCHEMA``."""
    try:
        name = path.decode()
    except UnicodeDecodeError:
        return {"path": shown(path), "reason": Reason.BAD_PATH, "detail": "expected a file name in UTF-8"}
    line: dict[str, Any] = {}
    try:
        header, faults = read_with_faults(source, key)
        line = _columns(header)
        check_slice(header, faults)
        if flags := flags_of(header):
            line["flags"] = flags
    except SliceError as error:
        judged = _judge(source, key, name, error) if error.reason in _MAYBE_LITTER else error
        line["reason"], line["detail"] = judged.reason, judged.detail
    line["path"] = name
    return line


def _judge(source: Source, key: bytes, name: str, error: SliceError) -> SliceError:
    """Return why a file is quarantined that could not be read as DICOM."""
    try:
        return judge_unreadable(name, read_first(source, key, min(source.size(key), FIRST_BYTES)), error)
    except (OSError, SliceError):
        return error


def _columns(header: Header) -> dict[str, Any]:
    line: dict[str, Any] = dict(zip(_FIELDS, _values_of(header)))
    for name, count in _LISTS:
        line[name] = _finite(line[name], count)
    line["orientation"] = list(oriented(header.orientation))
    line["image_type"] = "\\".join(header.image_type) or None
    line["signed"] = header.pixel_representation == 1
    line["monochrome1"] = header.photometric == "MONOCHROME1"
    line["padding_low"], line["padding_high"] = _padding_range(header.padding, header.padding_limit)
    return line


def _padding_range(padding: int | None, limit: int | None) -> tuple[int | None, int | None]:
    """Return the least and the greatest stored value that count as padding (PS3.3 C.7.5.1.1.2)."""
    if padding is None or limit is None:
        return padding, padding
    return min(padding, limit), max(padding, limit)


def _finite(numbers: tuple[float, ...] | None, count: int) -> list[float] | None:
    if numbers is None or len(numbers) != count or not all(map(math.isfinite, numbers)):
        return None
    return list(numbers)
