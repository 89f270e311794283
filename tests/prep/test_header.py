"""Headers: the skim against pydicom's ordinary attribute access, for whole files and for damaged ones."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from itertools import product
from pathlib import Path

import google_crc32c
import numpy as np
import pydicom
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydicom import config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from ich_prep.dicom import header
from ich_prep.dicom.elements import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE, Header, interpret
from ich_prep.dicom.header import read_header
from ich_prep.dicom.pydicom_header import INFLATED_LIMIT, read_with_pydicom
from ich_prep.dicom.skim import LONGEST_SKIM, skim
from ich_prep.errors import Reason, SliceError
from ich_prep.phantom import LAYOUTS, synthesize

SliceBytes = Callable[..., bytes]

PYDICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"

# Field of Header -> pydicom's keyword for it.
KEYWORDS = {
    "image_type": "ImageType",
    "sop_class_uid": "SOPClassUID",
    "sop_instance_uid": "SOPInstanceUID",
    "modality": "Modality",
    "patient_id": "PatientID",
    "study_instance_uid": "StudyInstanceUID",
    "series_instance_uid": "SeriesInstanceUID",
    "instance_number": "InstanceNumber",
    "position": "ImagePositionPatient",
    "orientation": "ImageOrientationPatient",
    "samples_per_pixel": "SamplesPerPixel",
    "photometric": "PhotometricInterpretation",
    "frames": "NumberOfFrames",
    "rows": "Rows",
    "columns": "Columns",
    "pixel_spacing": "PixelSpacing",
    "bits_allocated": "BitsAllocated",
    "bits_stored": "BitsStored",
    "high_bit": "HighBit",
    "pixel_representation": "PixelRepresentation",
    "padding": "PixelPaddingValue",
    "padding_limit": "PixelPaddingRangeLimit",
    "rescale_intercept": "RescaleIntercept",
    "rescale_slope": "RescaleSlope",
    "lossy": "LossyImageCompression",
    "specific_character_set": "SpecificCharacterSet",
    "study_date": "StudyDate",
    "acquisition_time": "AcquisitionTime",
    "accession_number": "AccessionNumber",
    "manufacturer": "Manufacturer",
    "series_description": "SeriesDescription",
    "issuer_of_patient_id": "IssuerOfPatientID",
    "patient_birth_date": "PatientBirthDate",
    "patient_sex": "PatientSex",
    "patient_age": "PatientAge",
    "contrast_agent": "ContrastBolusAgent",
    "body_part": "BodyPartExamined",
    "slice_thickness": "SliceThickness",
    "kvp": "KVP",
    "protocol_name": "ProtocolName",
    "convolution_kernel": "ConvolutionKernel",
    "acquisition_number": "AcquisitionNumber",
    "temporal_position_identifier": "TemporalPositionIdentifier",
    "slice_location": "SliceLocation",
    "burned_in": "BurnedInAnnotation",
    "rescale_type": "RescaleType",
}
SCALARS = ("rescale_intercept", "rescale_slope", "slice_thickness", "kvp", "slice_location")
VECTORS = ("position", "orientation", "pixel_spacing")


def oracle(dataset: Dataset, name: str) -> object:
    """The expected value of a field of Header, by pydicom's attribute access."""
    value = dataset.get(KEYWORDS[name])
    several = list(value) if isinstance(value, MultiValue) else [value]
    if name == "image_type":
        return ("",) if value in (None, "") else tuple(part.strip() for part in several)
    if value is None or value == "":
        return None
    if name in VECTORS:
        return tuple(float(part) for part in several)
    if name in SCALARS:
        return float(value)
    if isinstance(value, int):
        return int(value)
    return "\\".join(map(str, several)).strip()


def assert_as_pydicom(path: Path, found: Header) -> None:
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path, force=True)
        assert found.transfer_syntax == dataset.file_meta.get("TransferSyntaxUID", found.transfer_syntax)
        for name in KEYWORDS:
            assert getattr(found, name) == oracle(dataset, name), name
        if "PixelData" not in dataset:
            assert found.pixel_offset is None
            return
        pixels: DataElement = dataset["PixelData"]
        assert found.pixel_offset is not None
        data = path.read_bytes()
        if found.transfer_syntax == DEFLATED_LE:
            data = inflated(data)
        if pixels.is_undefined_length:
            assert found.pixel_length == -1
            assert data[found.pixel_offset : found.pixel_offset + 4] == bytes.fromhex("feff00e0")  # an item
        else:
            assert found.pixel_length is not None
            assert found.pixel_length >= len(pixels.value)  # more in a truncated file
            assert data[found.pixel_offset : found.pixel_offset + found.pixel_length] == pixels.value


def inflated(data: bytes) -> bytes:
    (meta_length,) = struct.unpack_from("<I", data, 140)
    return zlib.decompress(data[144 + meta_length :], wbits=-zlib.MAX_WBITS)


def by_pydicom(path: Path) -> Header:
    """The header by the fallback only."""
    data = path.read_bytes()
    elements = read_with_pydicom(data[: header.SKIM_BYTES], lambda length: data[:length])
    return interpret(elements, len(data), 0, 0)


def by_skim(path: Path) -> Header | None:
    """The header by the skim only."""
    data = path.read_bytes()
    found = skim(data[:LONGEST_SKIM])
    return None if found is None else interpret(found, len(data), 0, 0)


def refused(path: Path) -> SliceError:
    with pytest.raises(SliceError) as caught:
        read_header(path)
    return caught.value


# --- whole files, against pydicom ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_of_the_phantom_reads_as_in_pydicom(layout: str, tmp_path: Path) -> None:
    tree = tmp_path / layout
    synthesize(tree, series=1, size=32, layout=layout, defects=True)
    skimmed = 0
    for path in sorted(tree.rglob("*.dcm")):
        try:
            found = read_header(path)
        except SliceError as error:
            assert error.reason in (Reason.EMPTY_FILE, Reason.NOT_DICOM)
            continue
        assert_as_pydicom(path, found)
        skim_alone = by_skim(path)
        assert skim_alone == by_pydicom(path)
        skimmed += 1
    assert skimmed > 20


def test_every_real_file_reads_as_in_pydicom(real_data: Path) -> None:
    read = 0
    for path in sorted(path for path in real_data.rglob("*") if path.is_file() and path.suffix != ".md"):
        found = read_header(path)
        assert_as_pydicom(path, found)
        skimmed = by_skim(path)
        assert skimmed is None or skimmed == by_pydicom(path)
        read += 1
    assert read >= 60


# Of pydicom's test files: those that intentionally are not DICOM files, or violate their VRs.
REFUSED = {
    "UN_sequence.dcm": Reason.NOT_DICOM,  # its data set has no modality, and nothing that comes after one
    "badVR.dcm": Reason.BAD_HEADER,
    "empty_charset_LEI.dcm": Reason.NOT_DICOM,
    "no_meta.dcm": Reason.NOT_DICOM,  # a stray byte before the data set
    "meta_missing_tsyntax.dcm": Reason.NOT_DICOM,
}


@pytest.mark.parametrize("path", sorted(PYDICOM_FILES.glob("*.dcm")), ids=lambda path: path.name)
def test_every_test_file_of_pydicom_reads_as_in_pydicom(path: Path) -> None:
    if path.name in REFUSED:
        assert refused(path).reason == REFUSED[path.name]
        return
    assert_as_pydicom(path, read_header(path))
    skimmed = by_skim(path)
    assert skimmed is None or skimmed == by_pydicom(path)


@pytest.mark.parametrize("syntax", [IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED_LE])
def test_each_native_syntax_reads_as_in_pydicom(syntax: str, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "slice.dcm"
    pixels = np.arange(-6, 6, dtype=np.int16).reshape(3, 4)
    data = slice_bytes(pixels, syntax=syntax, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1500)
    path.write_bytes(data)
    found = read_header(path)
    assert_as_pydicom(path, found)
    assert (found.transfer_syntax, found.rows, found.columns) == (syntax, 3, 4)
    assert (found.padding, found.padding_limit) == (-2000, -1500)
    assert found.position == (-125.5, -120.0, 41.25)
    assert found.pixel_length == pixels.nbytes
    assert (skim(data) is None) == (syntax == EXPLICIT_BE)
    assert found.file_size == len(data)
    assert found.crc32c == google_crc32c.value(data[: found.header_bytes])


def test_a_header_longer_than_one_read_is_read_to_its_pixels(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "slice.dcm"
    for notes in (0, 1, LONGEST_SKIM // 10_000):  # one read; a second one; pydicom
        note = Dataset()
        note.ImageComments = "x" * 10_000
        data = slice_bytes(SourceImageSequence=[note] * notes)
        path.write_bytes(data)
        found = read_header(path)
        assert_as_pydicom(path, found)
        assert found.pixel_offset == len(data) - 24
        assert found.header_bytes == found.pixel_offset
        assert found.crc32c == google_crc32c.value(data[:-24])


def test_a_header_without_pixels_has_no_offset(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "report.dcm"
    path.write_bytes(slice_bytes(PixelData=None))
    assert (read_header(path).pixel_offset, read_header(path).pixel_length) == (None, None)


def test_an_empty_value_is_none(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "slice.dcm"
    path.write_bytes(slice_bytes(PatientID="", InstanceNumber="", ImagePositionPatient="", ImageType="", Rows=None))
    found = read_header(path)
    assert (found.patient_id, found.instance_number, found.position, found.rows) == (None,) * 4
    assert found.image_type == ("",)


@pytest.mark.parametrize(
    "charset, patient", [("\\ISO 2022 IR 87", "山田"), ("ISO_IR 100", "Müller"), ("ISO_IR 192", "Łu")]
)
def test_text_beyond_ascii_is_read_by_its_character_set(
    charset: str, patient: str, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    # ISO 2022 announces other scripts by escape sequences of bytes that are all ASCII.
    path = tmp_path / "slice.dcm"
    path.write_bytes(slice_bytes(SpecificCharacterSet=charset.split("\\"), PatientID=patient))
    assert read_header(path).patient_id == patient
    assert_as_pydicom(path, read_header(path))


# --- files that are refused ------------------------------------------------------------------------------------------


def test_a_file_that_is_not_dicom_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert refused(path).reason == Reason.UNREADABLE
    assert refused(tmp_path).reason == Reason.UNREADABLE
    path.write_bytes(b"")
    assert refused(path).reason == Reason.EMPTY_FILE
    for data in (b"D", bytes(200), bytes(128) + b"DICM", b"\x89PNG" * 5000, bytes(128) + b"DICM" + b"\xff" * 9000):
        path.write_bytes(data)
        assert refused(path).reason == Reason.NOT_DICOM


def with_text(make: SliceBytes, syntax: str, keyword: str, text: str) -> bytes:
    """A slice's file in which a number is ``text``, which pydicom would refuse to write."""
    data = make(syntax=syntax, **{keyword: "1234567890"})
    assert data.count(b"1234567890") == 1
    return data.replace(b"1234567890", text.ljust(10).encode())


BY_SKIM_AND_BY_PYDICOM = pytest.mark.parametrize("syntax", [EXPLICIT_LE, EXPLICIT_BE])


INVALID_NUMBERS = [
    *product(("InstanceNumber", "NumberOfFrames"), ("1,5", "1.5", "inf", "nan", "1e400", "one", "1\\2")),
    ("NumberOfFrames", "9999999999"),
    *product(("RescaleSlope", "ImagePositionPatient"), ("1,5,2", "one", "1 2", "1\\\\2")),
]


@BY_SKIM_AND_BY_PYDICOM
@pytest.mark.parametrize("keyword, text", INVALID_NUMBERS)
def test_an_invalid_number_is_refused(
    keyword: str, text: str, syntax: str, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    path = tmp_path / "slice.dcm"
    path.write_bytes(with_text(slice_bytes, syntax, keyword, text))
    assert refused(path).reason == Reason.BAD_HEADER


@BY_SKIM_AND_BY_PYDICOM
@pytest.mark.parametrize("text, number", [(" 1.0", 1), ("00036", 36), ("1e3", 1000), ("-12", -12), ("+12", 12)])
def test_spellings_of_an_integer(text: str, number: int, syntax: str, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "slice.dcm"
    path.write_bytes(with_text(slice_bytes, syntax, "InstanceNumber", text))
    assert read_header(path).instance_number == number


@pytest.mark.parametrize("truth, name", [(IMPLICIT_LE, EXPLICIT_LE), (EXPLICIT_LE, IMPLICIT_LE)])
def test_a_file_that_contradicts_its_transfer_syntax_is_read_as_found(
    truth: str, name: str, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    path = tmp_path / "slice.dcm"
    honest, other = slice_bytes(syntax=truth), slice_bytes(syntax=name)
    body = honest[144 + struct.unpack_from("<I", honest, 140)[0] :]
    path.write_bytes(other[: 144 + struct.unpack_from("<I", other, 140)[0]] + body)
    found = read_header(path)
    assert (found.transfer_syntax, found.rows, found.patient_id) == (name, 3, "P1")
    assert (found.pixel_length, found.pixel_offset) == (24, path.stat().st_size - 24)


def test_a_deflated_bomb_is_refused_before_it_unfolds(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "bomb.dcm"
    data = slice_bytes(syntax=DEFLATED_LE)
    (meta_length,) = struct.unpack_from("<I", data, 140)
    deflater = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    long = struct.pack("<HH2sHI", 4, 0x1130, b"OB", 0, INFLATED_LIMIT)
    bomb = deflater.compress(long) + deflater.compress(bytes(INFLATED_LIMIT))
    bomb += deflater.compress(inflated(data)) + deflater.flush()
    path.write_bytes(data[: 144 + meta_length] + bomb)
    assert len(bomb) < 100_000
    assert refused(path).reason == Reason.TOO_LARGE


def test_a_deflated_stream_of_noise_is_refused(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "noise.dcm"
    data = slice_bytes(syntax=DEFLATED_LE)
    (meta_length,) = struct.unpack_from("<I", data, 140)
    path.write_bytes(data[: 144 + meta_length] + b"\xff" * 500)
    assert refused(path).reason == Reason.NOT_DICOM


# --- damaged and unusual files ---------------------------------------------------------------------------------------


def damage(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    """The file after each edit: (what, where, amount), positions counted around the file's length."""
    changed = bytearray(data)
    for what, where, amount in edits:
        at = where % max(1, len(changed))
        if what == "flip" and changed:
            changed[at] ^= 1 << amount % 8
        elif what == "set" and changed:
            changed[at] = amount
        elif what == "cut":
            del changed[at:]
        elif what == "remove":
            del changed[at : at + amount % 16]
        elif what == "insert":
            changed[at:at] = bytes((amount,)) * (1 + amount % 8)
    return bytes(changed)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "flip", "set", "cut", "remove", "insert"]),
        st.integers(0, 4000),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "slice.dcm"


@pytest.fixture(scope="module")
def whole(slice_bytes: SliceBytes) -> dict[str, bytes]:
    """A good file of each native syntax."""
    return {syntax: slice_bytes(syntax=syntax) for syntax in (IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED_LE)}


@given(
    syntax=st.sampled_from([IMPLICIT_LE, IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED_LE]), edits=EDITS
)
@settings(max_examples=500, deadline=2000)
def test_a_damaged_file_is_read_or_refused(
    syntax: str, edits: list[tuple[str, int, int]], whole: dict[str, bytes], scratch: Path
) -> None:
    scratch.write_bytes(damage(whole[syntax], edits))
    try:
        found = read_header(scratch)
    except SliceError:
        found = None
    try:
        skimmed = by_skim(scratch)
        fallback = by_pydicom(scratch)
    except SliceError:
        return
    assert skimmed is None or skimmed == fallback
    assert skimmed is None or found is not None


# Text as in files: values, separators, padding, and what a VR forbids.
TEXTS = st.text(st.sampled_from("0123456789.-+eE\\ \0\t\n\x1fABCxyz_^~"), max_size=24)


@given(
    syntax=st.sampled_from([IMPLICIT_LE, EXPLICIT_LE]),
    keyword=st.sampled_from(sorted({"ImageType", "Modality", "PatientID", "SOPInstanceUID", "StudyInstanceUID"})),
    text=TEXTS,
)
@settings(max_examples=200, deadline=2000)
def test_texts_are_read_alike(syntax: str, keyword: str, text: str, slice_bytes: SliceBytes, scratch: Path) -> None:
    assume(keyword != "PatientID" or "\\" not in text)  # of one value; pydicom splits and trims it anyway
    scratch.write_bytes(slice_bytes(syntax=syntax, **{keyword: text}))
    skimmed = by_skim(scratch)
    assert skimmed is not None
    assert skimmed == by_pydicom(scratch)


@given(
    syntax=st.sampled_from([IMPLICIT_LE, EXPLICIT_LE]),
    position=st.lists(st.floats(-1e4, 1e4).map(lambda value: f"{value:.9g}"), min_size=1, max_size=4),
    spaces=st.sampled_from(["", " ", "  "]),
    slope=st.floats(1e-6, 1e6).map(lambda value: f"{value:.10g}"),
)
@settings(max_examples=100, deadline=2000)
def test_decimal_numbers_are_read_exactly(
    syntax: str, position: list[str], spaces: str, slope: str, slice_bytes: SliceBytes, scratch: Path
) -> None:
    scratch.write_bytes(
        slice_bytes(
            syntax=syntax, ImagePositionPatient=[spaces + text + spaces for text in position], RescaleSlope=slope
        )
    )
    found = read_header(scratch)
    assert found.position == tuple(float(text) for text in position)
    assert found.rescale_slope == float(slope)
    assert found == read_header(scratch)
    assert by_skim(scratch) == by_pydicom(scratch)


@given(cut=st.integers(0, 1 << 16))
@settings(max_examples=100, deadline=None)
def test_the_skim_of_a_shorter_prefix_agrees_or_gives_up(cut: int, slice_bytes: SliceBytes) -> None:
    data = slice_bytes()
    whole = skim(data)
    assert whole is not None and whole.pixel_offset is not None
    part = skim(data[: cut % len(data)])
    assert part is None or part == whole
    assert (part is not None) == (cut % len(data) >= whole.pixel_offset)


def test_elements_out_of_order_are_left_to_pydicom(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    data = slice_bytes()
    rows, columns = (bytes.fromhex(f"2800{element}00") + b"US\x02\0" for element in ("10", "11"))
    in_order = rows + b"\x03\0" + columns + b"\x04\0"
    assert data.count(in_order) == 1
    path = tmp_path / "slice.dcm"
    path.write_bytes(data.replace(in_order, columns + b"\x04\0" + rows + b"\x03\0"))
    assert skim(path.read_bytes()) is None
    assert (read_header(path).rows, read_header(path).columns) == (3, 4)


@pytest.mark.parametrize("vr", [b"\0I", b"ui", b"ZZ"])
def test_meta_information_of_unknown_form_is_left_to_pydicom(vr: bytes, slice_bytes: SliceBytes) -> None:
    data = slice_bytes()
    uid_of_implementation = bytes.fromhex("02001200")
    assert data.count(uid_of_implementation + b"UI") == 1
    assert skim(data.replace(uid_of_implementation + b"UI", uid_of_implementation + vr)) is None


def test_pixels_of_an_icon_are_not_the_slices(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    icon = Dataset()
    icon.Rows, icon.Columns, icon.PixelData = 2, 2, b"icon"
    icon["PixelData"].VR = "OW"
    path = tmp_path / "slice.dcm"
    path.write_bytes(slice_bytes(IconImageSequence=[icon]))
    found = read_header(path)
    assert (found.rows, found.columns, found.pixel_length) == (3, 4, 24)
    assert_as_pydicom(path, found)
