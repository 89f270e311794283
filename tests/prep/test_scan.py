"""Which files are slices: for each reason of the quarantine table a file that has it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from ich_prep.dicom.accept import ENHANCED_CT, SECONDARY_CAPTURE, check_slice
from ich_prep.dicom.decode import PLUGINS
from ich_prep.dicom.elements import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE, Header
from ich_prep.dicom.header import read_header
from ich_prep.errors import Reason, SliceError
from ich_prep.phantom import synthesize
from ich_prep.phantom.files import CT_IMAGE
from ich_prep.sources import LISTING_SCHEMA, FolderSource
from ich_prep.stages import scan
from ich_prep.stages.scan import scan_batch, scan_file
from ich_prep.stages.state import BuildFolder

SliceBytes = Callable[..., bytes]

PIXELS = np.arange(12, dtype=np.int16).reshape(3, 4)


@pytest.fixture(scope="module")
def header(slice_bytes: SliceBytes, tmp_path_factory: pytest.TempPathFactory) -> Header:
    """The header of a good slice, 3 x 4 pixels of 16 bits."""
    path = tmp_path_factory.mktemp("slice") / "slice.dcm"
    path.write_bytes(slice_bytes(PIXELS))
    return read_header(path)


def line_of(folder: Path, name: bytes) -> dict[str, Any]:
    """The scan's line for one file of a folder."""
    return scan_file(FolderSource(folder), name, name)


def reason_of(header: Header) -> Reason | None:
    try:
        check_slice(header)
    except SliceError as error:
        assert error.detail.startswith(("expected ", "transfer syntax "))
        assert ", found " in error.detail or error.reason == Reason.UNSUPPORTED_SYNTAX
        return error.reason
    return None


# --- by attribute ----------------------------------------------------------------------------------------------------

GOOD: list[dict[str, Any]] = [
    {},
    {"ImageType": ["ORIGINAL", "PRIMARY"]},
    {"ImageType": None},  # RSNA has none
    {"SOPClassUID": None},  # RSNA has none
    {"InstanceNumber": None, "StudyInstanceUID": None, "PatientID": None, "PixelSpacing": None},
    {"ImageType": ["DERIVED", "PRIMARY", "AXIAL"], "LossyImageCompression": "01"},
    {"PhotometricInterpretation": "MONOCHROME1"},
    {"NumberOfFrames": "1"},
    {"SamplesPerPixel": None},
    {"HighBit": None},
    {"BitsStored": 12, "HighBit": 11},
    {"RescaleSlope": "0.5"},
    {"RescaleIntercept": "0"},
    {"PixelData": PIXELS.tobytes(), "Rows": 4, "Columns": 3},
    {"Modality": None},  # its SOP class is CT
    {"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]},
    {"ImageType": ["DERIVED", "PRIMARY", "AXIAL"], "LossyImageCompression": "00"},
    {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]},
    {"ImageType": ["ORIGINAL", "SECONDARY", "AXIAL"]},
    {"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED"], "LossyImageCompression": "01"},
    {"Rows": 2},  # the third row is in excess
    {"PixelData": PIXELS.tobytes() + bytes(2)},
]

BAD: list[tuple[Reason, dict[str, Any]]] = [
    (Reason.NOT_CT, {"Modality": "MR"}),
    (Reason.NOT_CT, {"Modality": None, "SOPClassUID": None}),
    (Reason.NOT_CT, {"Modality": "PR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.11.1", "PixelData": None}),
    (Reason.NOT_CT, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}),
    (Reason.LOCALIZER, {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
    (Reason.LOCALIZER, {"ImageType": ["DERIVED", "SECONDARY", "LOCALIZER"]}),
    (Reason.DERIVED, {"ImageType": ["ORIGINAL", "PRIMARY", "DOSE_INFO"]}),
    (Reason.DERIVED, {"SOPClassUID": SECONDARY_CAPTURE}),
    (Reason.DERIVED, {"SOPClassUID": SECONDARY_CAPTURE + ".2", "Modality": "OT"}),
    (Reason.MULTI_FRAME, {"SOPClassUID": ENHANCED_CT[0]}),
    (Reason.MULTI_FRAME, {"NumberOfFrames": "3", "PixelData": 3 * PIXELS.tobytes()}),
    (Reason.MULTI_FRAME, {"NumberOfFrames": "0"}),
    (Reason.NO_PIXELS, {"PixelData": None}),
    (Reason.NOT_MONOCHROME, {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}),
    (Reason.NOT_MONOCHROME, {"PhotometricInterpretation": "PALETTE COLOR"}),
    (Reason.NOT_MONOCHROME, {"PhotometricInterpretation": None}),
    (Reason.BAD_HEADER, {"SOPInstanceUID": None}),
    (Reason.BAD_HEADER, {"SeriesInstanceUID": ""}),
    (Reason.BAD_HEADER, {"Rows": None}),
    (Reason.BAD_HEADER, {"Columns": 0}),
    (Reason.BAD_HEADER, {"BitsAllocated": None}),
    (Reason.BAD_HEADER, {"BitsAllocated": 12}),
    (Reason.BAD_HEADER, {"BitsAllocated": 32}),
    (Reason.BAD_HEADER, {"BitsStored": 17, "HighBit": 16}),
    (Reason.BAD_HEADER, {"BitsStored": 0}),
    (Reason.BAD_HEADER, {"BitsStored": 12, "HighBit": 15}),
    (Reason.BAD_HEADER, {"PixelRepresentation": None}),
    (Reason.BAD_HEADER, {"PixelRepresentation": 2}),
    (Reason.BAD_HEADER, {"RescaleSlope": None}),
    (Reason.BAD_HEADER, {"RescaleIntercept": None}),
    (Reason.BAD_HEADER, {"RescaleSlope": "0"}),
    (Reason.BAD_HEADER, {"RescaleSlope": "-1"}),
    (Reason.BAD_HEADER, {"RescaleSlope": "1e400"}),
    (Reason.TOO_LARGE, {"Rows": 4097}),
    (Reason.TOO_LARGE, {"Columns": 65535}),
    (Reason.SIZE_MISMATCH, {"Rows": 4}),
    (Reason.SIZE_MISMATCH, {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}),
    (Reason.SIZE_MISMATCH, {"PixelData": PIXELS.tobytes() * 2}),
    (Reason.SIZE_MISMATCH, {"PixelData": b""}),
]


def label_of(attributes: dict[str, Any]) -> str:
    return ",".join(f"{keyword}={str(value)[:30]}" for keyword, value in attributes.items()) or "plain"


@pytest.mark.parametrize("attributes", GOOD, ids=label_of)
def test_a_ct_slice_is_accepted(attributes: dict[str, Any], slice_bytes: SliceBytes, tmp_path: Path) -> None:
    (tmp_path / "slice").write_bytes(slice_bytes(PIXELS, **attributes))
    assert reason_of(read_header(tmp_path / "slice")) is None


@pytest.mark.parametrize(
    "reason, attributes", BAD, ids=lambda value: label_of(value) if isinstance(value, dict) else value
)
def test_each_kind_of_other_file_has_its_reason(
    reason: Reason, attributes: dict[str, Any], slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    (tmp_path / "slice").write_bytes(slice_bytes(PIXELS, **attributes))
    line = line_of(tmp_path, b"slice")
    assert line["reason"] == reason
    assert reason_of(read_header(tmp_path / "slice")) == reason


@pytest.mark.parametrize("syntax", [IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE])
def test_every_missing_byte_is_an_error(syntax: str, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    data = slice_bytes(PIXELS, syntax=syntax)
    for lost in (1, 2, 12, 24):
        (tmp_path / "slice").write_bytes(data[:-lost])
        assert reason_of(read_header(tmp_path / "slice")) == Reason.TRUNCATED
    (tmp_path / "slice").write_bytes(data + b"\0" * 100)  # padding after the data set, PS3.10 7.2
    assert reason_of(read_header(tmp_path / "slice")) is None


def test_an_odd_number_of_bytes_is_padded(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    data = slice_bytes(np.zeros((3, 3), np.uint8))
    (tmp_path / "slice").write_bytes(data)
    assert read_header(tmp_path / "slice").pixel_length == 10
    assert reason_of(read_header(tmp_path / "slice")) is None
    (tmp_path / "slice").write_bytes(data[:-1])  # only the padding is lost
    assert reason_of(read_header(tmp_path / "slice")) is None
    (tmp_path / "slice").write_bytes(data[:-2])
    assert reason_of(read_header(tmp_path / "slice")) == Reason.TRUNCATED


@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55", "1.2.840.10008.1.2.4.202", "9.9"]
)
def test_a_syntax_without_a_decoder_has_its_reason(syntax: str, header: Header) -> None:
    unknown = replace(header, transfer_syntax=syntax, pixel_length=-1)
    assert reason_of(unknown) == Reason.UNSUPPORTED_SYNTAX


def test_eight_bits_in_big_endian_have_no_known_order(header: Header) -> None:
    small = replace(header, transfer_syntax=EXPLICIT_BE, bits_allocated=8, bits_stored=8, high_bit=7, pixel_length=12)
    assert reason_of(small) == Reason.UNSUPPORTED_SYNTAX


@pytest.mark.parametrize("syntax", sorted(PLUGINS))
def test_encapsulated_pixels_have_no_length_to_check(syntax: str, header: Header) -> None:
    offset = header.pixel_offset
    assert offset is not None
    coded = replace(header, transfer_syntax=syntax, pixel_length=-1)
    assert reason_of(coded) is None
    assert reason_of(replace(coded, file_size=offset + 15)) == Reason.TRUNCATED


# Fields for which every value must give a reason or None.
ODD = {
    "rows": st.none() | st.integers(0, 65535),
    "columns": st.none() | st.integers(0, 65535),
    "bits_allocated": st.none() | st.integers(0, 65535),
    "bits_stored": st.none() | st.integers(0, 65535),
    "high_bit": st.none() | st.integers(0, 65535),
    "pixel_representation": st.none() | st.integers(0, 65535),
    "pixel_offset": st.none() | st.integers(0, 2**32),
    "frames": st.none() | st.integers(-(2**31), 2**31 - 1),
    "rescale_slope": st.none() | st.floats(),
    "rescale_intercept": st.none() | st.floats(),
    "image_type": st.lists(st.text(max_size=4), min_size=1, max_size=3).map(tuple),
    "transfer_syntax": st.sampled_from([EXPLICIT_LE, EXPLICIT_BE, DEFLATED_LE, *PLUGINS, "", "1.2.3"]),
}


@given(changes=st.fixed_dictionaries({}, optional=ODD))
@settings(max_examples=200, deadline=None)
def test_a_header_that_passes_can_be_decoded(changes: dict[str, Any], header: Header) -> None:
    changed = replace(header, **changes)
    if reason_of(changed) is not None:
        return
    assert changed.rows and changed.columns and changed.bits_allocated in (8, 16)
    assert changed.pixel_offset is not None
    if changed.transfer_syntax in (EXPLICIT_LE, EXPLICIT_BE):
        assert changed.pixel_offset + changed.rows * changed.columns * changed.bits_allocated // 8 <= changed.file_size
    assert changed.rescale_slope is not None and 0 < changed.rescale_slope < float("inf")


# --- whole files -----------------------------------------------------------------------------------------------------


def test_a_line_has_what_the_plan_needs(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "slice\n.dcm"
    path.write_bytes(slice_bytes(PIXELS, SOPClassUID=CT_IMAGE))
    line = line_of(tmp_path, b"a/slice\n.dcm")
    assert line.keys() <= set(scan.SCHEMA.names)
    assert line["path"] == "a/slice\n.dcm"
    assert (line["position"], line["pixel_spacing"]) == ([-125.5, -120.0, 41.25], [0.5, 0.5])
    assert (line["rows"], line["columns"], line["signed"], line["instance_number"]) == (3, 4, True, 7)
    assert pa.Table.from_pylist([line], scan.SCHEMA).num_rows == 1


@pytest.mark.parametrize("text", ["nan", "inf", "1e400"])
def test_a_position_that_is_not_finite_is_ignored(text: str, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    data = slice_bytes(PIXELS, ImagePositionPatient=["1234567890", "0", "0"])
    (tmp_path / "slice").write_bytes(data.replace(b"1234567890", text.ljust(10).encode()))
    line = line_of(tmp_path, b"slice")
    assert line["position"] is None and line.get("reason") is None


@pytest.mark.parametrize("position", [["1", "2"], ["1", "2", "3", "4"], "5"])
def test_a_position_of_another_length_is_ignored(position: Any, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    (tmp_path / "slice").write_bytes(slice_bytes(PIXELS, ImagePositionPatient=position))
    assert line_of(tmp_path, b"slice")["position"] is None


def test_a_quarantined_file_keeps_its_identifiers(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    (tmp_path / "slice").write_bytes(slice_bytes(PIXELS)[:-5])
    line = line_of(tmp_path, b"slice")
    assert (line["reason"], line["sop_instance_uid"]) == (Reason.TRUNCATED, "2.25.3")
    assert line["detail"] == "expected 24 bytes of pixels, found 19"


def test_files_that_cannot_be_read_have_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("no DICOM")
    assert line_of(tmp_path, b"empty")["reason"] == Reason.EMPTY_FILE
    assert line_of(tmp_path, b"text")["reason"] == Reason.NOT_AN_IMAGE
    assert line_of(tmp_path, b"gone")["reason"] == Reason.UNREADABLE
    line = line_of(tmp_path, b"caf\xe9.dcm")
    assert (line["reason"], line["path"]) == (Reason.BAD_PATH, "caf\\xe9.dcm")


def test_a_dicomdir_is_not_ct(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    record = Dataset()
    record.DirectoryRecordType = "IMAGE"
    nothing = dict.fromkeys(("ImageType", "SOPInstanceUID", "Modality", "SeriesInstanceUID", "PixelData", "Rows"))
    media = "1.2.840.10008.1.3.10"
    (tmp_path / "DICOMDIR").write_bytes(
        slice_bytes(**nothing | {"SOPClassUID": media}, DirectoryRecordSequence=[record])
    )
    assert line_of(tmp_path, b"DICOMDIR")["reason"] == Reason.NOT_CT


EXPECTED_OF_DEFECTS = {
    "truncated": {Reason.TRUNCATED},
    "zero_length": {Reason.EMPTY_FILE},
    "not_dicom": {Reason.NOT_DICOM, Reason.NOT_AN_IMAGE},
    "localizer": {Reason.LOCALIZER},
    "dose_page": {Reason.DERIVED},
    "multi_frame": {Reason.MULTI_FRAME},
    "size_lie": {Reason.SIZE_MISMATCH},
}


@pytest.mark.parametrize("layout", ["rsna", "folder"])
def test_the_defects_of_the_phantom_have_their_reasons(layout: str, tmp_path: Path) -> None:
    summary = synthesize(tmp_path / "tree", series=1, size=32, layout=layout, defects=True)
    names = [
        os.fsencode(path.relative_to(tmp_path / "tree")) for path in (tmp_path / "tree").rglob("*") if path.is_file()
    ]
    lines = [line_of(tmp_path / "tree", name) for name in names]
    found = [line["reason"] for line in lines if line.get("reason")]
    expected = {reason for name in summary.defects for reason in EXPECTED_OF_DEFECTS.get(name, set())}
    assert set(found) == expected == set.union(*EXPECTED_OF_DEFECTS.values())
    assert len(lines) - len(found) >= summary.slices


def test_real_files_have_the_right_reasons(real_data: Path) -> None:
    tree = real_data / "head_ct"
    lines = [line_of(tree, os.fsencode(path.relative_to(tree))) for path in tree.rglob("*") if path.is_file()]
    aside = {line["path"]: line["reason"] for line in lines if line.get("reason")}
    assert len(lines) - len(aside) == 56
    assert aside["philips_ingenuity/S2010/DIRFILE"] == Reason.NOT_CT
    assert aside["philips_ingenuity/S1000/I10"] == Reason.LOCALIZER
    assert {aside[path] for path in aside if "/S4010/" in path} == {Reason.DERIVED}


# --- a batch ---------------------------------------------------------------------------------------------------------


def test_a_batch_writes_one_line_per_file(
    slice_bytes: SliceBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    for number in range(5):
        (src / f"{number}.dcm").write_bytes(slice_bytes(PIXELS, SOPInstanceUID=f"2.25.{number}"))
    (src / "3.dcm").write_bytes(b"")
    shutil.copy(src / "0.dcm", src / "9.dcm")
    (BuildFolder(out).scan).mkdir(parents=True)
    files = FolderSource(src).list().files
    pq.write_table(files, BuildFolder(out).files, row_group_size=4)
    assert scan_batch(BuildFolder(out), (src,), 0) == (3, 1)
    assert scan_batch(BuildFolder(out), (src,), 1) == (2, 0)
    written = sorted((BuildFolder(out).scan).iterdir())
    assert [path.name for path in written] == ["00000.parquet", "00001.parquet"]
    table = pa.concat_tables([pq.read_table(path) for path in written])
    assert table.schema.equals(scan.SCHEMA)
    assert table["path"].to_pylist() == ["0.dcm", "1.dcm", "2.dcm", "3.dcm", "4.dcm", "9.dcm"]
    assert table["reason"].to_pylist() == [None, None, None, "empty_file", None, None]
    first = written[0].read_bytes()
    scan_batch(BuildFolder(out), (src,), 0)
    assert written[0].read_bytes() == first


def test_a_process_that_scans_another_source_reads_its_own_listing(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr.build"
    (BuildFolder(out).scan).mkdir(parents=True)
    for name in (b"first", b"second"):
        (tmp_path / name.decode()).write_bytes(slice_bytes())
        files = pa.Table.from_pylist([{"path": name, "size": 1, "key": name}], LISTING_SCHEMA)
        pq.write_table(files, BuildFolder(out).files)
        scan_batch(BuildFolder(out), (tmp_path,), 0)
        assert pq.read_table(BuildFolder(out).scan / "00000.parquet")["path"].to_pylist() == [name.decode()]
