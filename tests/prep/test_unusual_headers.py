"""Headers as hospitals have them: character sets, numbers of unusual form, files without a preamble, nested sequences."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from ich_prep.dicom.elements import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE, interpret
from ich_prep.dicom.header import read_header
from ich_prep.dicom.pydicom_header import read_with_pydicom
from ich_prep.dicom.skim import skim
from ich_prep.errors import Reason, SliceError
from ich_prep.sources import FolderSource
from ich_prep.stages.scan import scan_file

SliceBytes = Callable[..., bytes]


def scanned(path: Path) -> dict[str, Any]:
    """The scan's line for one file."""
    name = os.fsencode(path.name)
    return scan_file(FolderSource(path.parent), name, name)


def line_of(data: bytes, folder: Path, name: str = "slice.dcm") -> dict[str, Any]:
    (folder / name).write_bytes(data)
    return scanned(folder / name)


def with_text(make: SliceBytes, keyword: str, text: str, **others: Any) -> bytes:
    """A slice's file in which a value is ``text``, which pydicom would refuse to write."""
    digits = "12345678901234567890"[: 2 * max(5, -(-len(text) // 2))]
    data = make(**{keyword: digits}, **others)
    assert data.count(digits.encode()) == 1
    return data.replace(digits.encode(), text.ljust(len(digits)).encode())


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("charset", "text"),
    [
        ("ISO_IR 100", "Schädel nativ"),
        ("ISO_IR 192", "Schädel 頭部"),
        ("ISO_IR 144", "Голова"),
        ("ISO_IR 126", "κεφάλι"),
        ("GB18030", "头部平扫"),
        ("\\ISO 2022 IR 87", "頭部"),
        ("\\ISO 2022 IR 149", "머리"),
        ("ISO 2022 IR 100\\ISO 2022 IR 144", "Kopf Голова"),
    ],
)
def test_texts_are_decoded_without_pydicoms_reader(
    charset: str, text: str, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    data = slice_bytes(SpecificCharacterSet=charset.split("\\"), SeriesDescription=text, PatientID="p" + text)
    assert skim(data) is not None
    line = line_of(data, tmp_path)
    assert (line["series_description"], line["patient_id"]) == (text, "p" + text)
    assert (line.get("reason"), line.get("flags")) == (None, None)


@pytest.mark.parametrize(
    ("charset", "stored", "shown"),
    [
        ("ISO_IR 192", b"Sch\xe4del", "Sch\\xe4del"),
        ("\\ISO 2022 IR 87", b"a\x1b$Bz\xff\x1b(B", "a\x1b$Bz\xff\x1b(B"),
        ("NO SUCH SET", b"Sch\xe4del", "Sch\xe4del"),
        ("hex", b"Sch\xe4", "Sch\\xe4"),
    ],
)
def test_bytes_that_cannot_be_decoded_are_shown(
    charset: str, stored: bytes, shown: str, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    marker = b"Z" * (len(stored) + len(stored) % 2)
    data = slice_bytes(SpecificCharacterSet="ISO_IR 100", SeriesDescription=marker.decode())
    old = b"CS\n\0ISO_IR 100"
    assert data.count(old) == 1
    name = charset.encode() + b" " * (len(charset) % 2)
    data = data.replace(marker, stored.ljust(len(marker))).replace(old, b"CS" + struct.pack("<H", len(name)) + name)
    line = line_of(data, tmp_path)
    assert (line["series_description"], line.get("reason")) == (shown, None)


def test_a_code_string_beyond_ascii_is_escaped(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    data = slice_bytes(SpecificCharacterSet="ISO_IR 100", BodyPartExamined="SCHZZDEL")
    line = line_of(data.replace(b"SCHZZDEL", b"SCH\xc4\xc4DEL"), tmp_path)
    assert line["body_part"] == "SCH\\xc4\\xc4DEL"


@given(text=st.text(st.characters(codec="latin-1", exclude_characters="\\", min_codepoint=32), max_size=20))
@settings(max_examples=60, deadline=None)
def test_the_skim_and_pydicom_decode_alike(text: str, slice_bytes: SliceBytes) -> None:
    data = slice_bytes(SpecificCharacterSet="ISO_IR 100", SeriesDescription=text, PatientID=text)
    skimmed = skim(data)
    fallback = read_with_pydicom(data, lambda length: data[:length])
    assert skimmed is not None
    assert interpret(skimmed, 1, 1, 1) == interpret(fallback, 1, 1, 1)


# --- values that neither HU nor identity need ------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE])
@pytest.mark.parametrize(
    ("keyword", "column", "text"),
    [("KVP", "kvp", "abc"), ("SliceThickness", "slice_thickness", "nan"), ("SliceLocation", "slice_location", "1\\2"),
     ("AcquisitionNumber", "acquisition_number", "first"),
     ("TemporalPositionIdentifier", "temporal_position_identifier", "1.5")],
)  # fmt: skip
def test_an_optional_value_that_is_not_a_number_is_null(
    keyword: str, column: str, text: str, syntax: str, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    line = line_of(with_text(slice_bytes, keyword, text, syntax=syntax), tmp_path)
    assert (line[column], line.get("reason")) == (None, None)


def test_an_optional_element_of_another_vr_is_skipped(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    data = slice_bytes(KVP="120 ", SeriesDescription="head")
    kvp = b"\x18\0\x60\0DS\4\0" + b"120 "
    assert data.count(kvp) == 1
    changed = data.replace(kvp, b"\x18\0\x60\0UL\4\0" + b"\1\0\0\0")
    assert skim(changed) is not None
    line = line_of(changed, tmp_path)
    assert (line["kvp"], line["series_description"], line.get("reason")) == (None, "head", None)


def test_all_series_columns_are_read(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    line = line_of(
        slice_bytes(
            AcquisitionNumber="2", AcquisitionTime="101112.5", SliceLocation="12.5", RescaleType="HU", PatientAge="061Y",
            IssuerOfPatientID="clinic", PatientSex="F", PatientBirthDate="19600102", StudyDate="20210304", KVP="120",
            Manufacturer="maker", ConvolutionKernel=["H30s", "3"], SliceThickness="5.0", ProtocolName="head",
            BodyPartExamined="HEAD", ContrastBolusAgent="none", AccessionNumber="a1", BurnedInAnnotation="NO",
            TemporalPositionIdentifier="3",
        ),
        tmp_path,
    )  # fmt: skip
    expected = {
        "acquisition_number": 2, "acquisition_time": "101112.5", "slice_location": 12.5, "rescale_type": "HU",
        "patient_age": "061Y", "issuer_of_patient_id": "clinic", "patient_sex": "F", "patient_birth_date": "19600102",
        "study_date": "20210304", "kvp": 120.0, "manufacturer": "maker", "convolution_kernel": "H30s\\3",
        "slice_thickness": 5.0, "protocol_name": "head", "body_part": "HEAD", "contrast_agent": "none",
        "accession_number": "a1", "burned_in": "NO", "temporal_position_identifier": 3,
        "image_type": "ORIGINAL\\PRIMARY\\AXIAL",
    }  # fmt: skip
    assert {name: line[name] for name in expected} == expected
    assert line.get("flags") is None


# --- numbers that are needed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, EXPLICIT_BE])
@pytest.mark.parametrize(
    ("keyword", "column", "text", "value"),
    [
        ("RescaleSlope", "rescale_slope", "0,5", 0.5),
        ("RescaleIntercept", "rescale_intercept", "-1024,0", -1024.0),
        ("ImagePositionPatient", "position", "-1,5\\2\\3,25", [-1.5, 2.0, 3.25]),
        ("PixelSpacing", "pixel_spacing", "0,488281\\0,488281", [0.488281, 0.488281]),
    ],
)
def test_decimal_commas_are_taken_and_flagged(
    keyword: str, column: str, text: str, value: Any, syntax: str, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    line = line_of(with_text(slice_bytes, keyword, text, syntax=syntax), tmp_path)
    assert (line[column], line.get("reason"), line["flags"]) == (value, None, ["decimal_comma"])


@pytest.mark.parametrize("text", ["-1,024", "1,024", "-1,000"])
def test_a_comma_that_may_separate_thousands_is_refused(text: str, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    line = line_of(with_text(slice_bytes, "RescaleIntercept", text), tmp_path)
    assert line["reason"] == Reason.BAD_HEADER
    assert "RescaleIntercept" in line["detail"] and repr(text) in line["detail"]
    assert line["sop_instance_uid"] == "2.25.3"  # its label is accounted for


@pytest.mark.parametrize(
    ("text", "number"),
    [("20191104123456001", 20191104123456001), ("-3000000000", -3000000000), ("9" * 20, None)],
)
def test_a_long_instance_number_is_an_integer(
    text: str, number: int | None, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    line = line_of(with_text(slice_bytes, "InstanceNumber", text), tmp_path)
    assert (line["instance_number"], line.get("reason"), line["flags"]) == (number, None, ["long_instance_number"])


def test_every_attribute_at_fault_is_named(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    data = with_text(slice_bytes, "RescaleSlope", "abc", Rows=None, BitsStored=0, PixelRepresentation=7)
    detail = line_of(data, tmp_path)["detail"]
    assert all(word in detail for word in ("Rows", "BitsStored", "PixelRepresentation", "RescaleSlope", "'abc'"))


# --- sequences, preamble, modality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, IMPLICIT_LE])
def test_sequences_of_undefined_length_are_skipped(syntax: str, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    inner, outer = Dataset(), Dataset()
    inner.ReferencedSOPInstanceUID, inner.Rows = "1.2.3", 9
    outer.PurposeOfReferenceCodeSequence = Sequence([inner, inner])
    outer.PurposeOfReferenceCodeSequence.is_undefined_length = True
    inner.is_undefined_length_sequence_item = True
    outer["PurposeOfReferenceCodeSequence"].is_undefined_length = True
    data = slice_bytes(syntax=syntax, SourceImageSequence=[outer, Dataset()])
    explicit = b"\x08\0\x12\x21SQ\0\0" if syntax == EXPLICIT_LE else b"\x08\0\x12\x21"
    at = data.index(explicit) + len(explicit)
    (length,) = struct.unpack_from("<I", data, at)
    end = at + 4 + length
    changed = data[:at] + b"\xff" * 4 + data[at + 4 : end] + b"\xfe\xff\xdd\xe0" + bytes(4) + data[end:]
    elements = skim(changed)
    assert elements is not None
    assert interpret(elements, 1, 1, 1) == interpret(
        read_with_pydicom(changed, lambda length: changed[:length]), 1, 1, 1
    )
    line = line_of(changed, tmp_path)
    assert (line["rows"], line.get("reason")) == (3, None)


def test_deeply_nested_sequences_are_left_to_pydicom(slice_bytes: SliceBytes) -> None:
    data = slice_bytes()
    at = data.index(b"\x08\0\x60\0CS")
    opened = (b"\x08\0\x12\x21SQ\0\0" + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + b"\xff" * 4) * 5000
    assert skim(data[:at] + opened + data[at:]) is None


def without_meta(data: bytes) -> bytes:
    return data[144 + struct.unpack_from("<I", data, 140)[0] :]


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, DEFLATED_LE])
@pytest.mark.parametrize("lost", ["preamble", "meta"])
def test_a_file_without_a_preamble_or_meta_information_is_read(
    lost: str, syntax: str, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    whole = slice_bytes(syntax=syntax)
    if lost == "meta" and syntax == DEFLATED_LE:
        return  # it shows nothing
    line = line_of(whole[132:] if lost == "preamble" else without_meta(whole), tmp_path, "IM0001")
    assert (line.get("reason"), line["transfer_syntax"], line["flags"]) == (None, syntax, ["no_preamble"])
    assert (line["rows"], line["sop_instance_uid"]) == (3, "2.25.3")


@given(
    noise=st.binary(max_size=300), start=st.sampled_from([b"", b"\x08\0\x05\0CS\x0a\0", b"\x08\0\x16\0", b"\2\0\0\0UL"])
)
@settings(max_examples=150, deadline=None)
def test_noise_without_a_preamble_is_not_dicom(noise: bytes, start: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.dcm"
    path.write_bytes(start + noise + b"\xff")
    with pytest.raises(SliceError) as caught:
        read_header(path)
    assert caught.value.reason == Reason.NOT_DICOM


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, EXPLICIT_BE])
def test_a_damaged_file_of_another_modality_is_not_ct(syntax: str, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    mr = "1.2.840.10008.5.1.4.1.1.4"
    data = slice_bytes(syntax=syntax, Modality="MR", SOPClassUID=mr)
    damaged = [data[:-5], data[:-60], data[: data.index(b"P1") + 1], data[: data.index(b"2.25.2") + 3]]
    damaged.append(with_text(slice_bytes, "RescaleSlope", "one", Modality="MR", SOPClassUID=mr, syntax=syntax))
    for broken in damaged:
        assert line_of(broken, tmp_path)["reason"] == Reason.NOT_CT


def test_a_ct_file_that_is_cut_anywhere_is_damage(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    data = slice_bytes(np.arange(64, dtype=np.int16).reshape(8, 8))
    for cut in range(132, len(data)):
        line = line_of(data[:cut], tmp_path, "IM1")
        assert Reason(line["reason"]).is_damage, (cut, line)
