"""Stored values: every transfer syntax against pydicom, and what pixels mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from ich_prep.dicom.accept import check_slice
from ich_prep.dicom.decode import PLUGINS, Decoder, missing_decoder
from ich_prep.dicom.elements import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from ich_prep.dicom.header import read_header
from ich_prep.errors import Reason, SliceError
from ich_prep.pixels.hounsfield import Rescale, rescale_table
from ich_prep.pixels.stored import mask_unused_bits, min_max
from tests.support.compressed import (
    COMPRESSED,
    J2K,
    JPEG_8,
    JPEG_12,
    SliceBytes,
    compressed,
    line_of,
    slope_of_hu,
    source_of,
    stored,
)

NATIVE = [IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED_LE]


# --- every transfer syntax -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.uint8, np.int8])
def test_native_pixels_are_those_that_were_written(
    kind: type, syntax: str, decoder: Decoder, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    info = np.iinfo(kind)
    pixels = np.random.default_rng(1).integers(info.min, info.max + 1, (7, 5)).astype(kind)  # an odd count
    path = tmp_path / "slice.dcm"
    path.write_bytes(slice_bytes(pixels, syntax=syntax))
    if syntax == EXPLICIT_BE and pixels.itemsize == 1:
        assert line_of(tmp_path, b"slice.dcm")["reason"] == Reason.UNSUPPORTED_SYNTAX
        return
    source = source_of(path)
    words = decoder.read(source)
    assert words.dtype == np.uint16 and words.shape == (7, 5)
    np.testing.assert_array_equal(stored(words, source), pixels)
    with pydicom.config.disable_value_validation():
        np.testing.assert_array_equal(stored(words, source), pydicom.dcmread(path).pixel_array)


@pytest.mark.parametrize("syntax", COMPRESSED)
@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.uint8])
def test_compressed_pixels_are_those_that_were_written(
    kind: type, syntax: str, decoder: Decoder, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    pixels = slope_of_hu()
    if kind != np.int16:
        pixels = np.clip(pixels // (16 if kind == np.uint8 else 1), 0, None).astype(kind)
    path = tmp_path / "slice.dcm"
    path.write_bytes(compressed(slice_bytes(pixels), syntax))
    source = source_of(path)
    assert source.transfer_syntax == syntax
    np.testing.assert_array_equal(stored(decoder.read(source), source), pixels)


LOSSLESS = ("1.2.840.10008.1.2", "1.2.1", "1.2.1.99", "1.2.2", "4.57", "4.70", "4.80", "4.90", "1.2.5")


def test_every_lossless_syntax_of_a_real_slice_gives_the_same_pixels(real_data: Path, decoder: Decoder) -> None:
    files = {path.stem.rpartition("_")[2]: path for path in (real_data / "encodings").glob("*.dcm")}
    truth = pydicom.dcmread(files[EXPLICIT_LE]).pixel_array
    assert (truth.min(), truth.max()) == (-2000, 2402)
    same = [syntax for syntax in files if any(syntax.endswith(end) for end in LOSSLESS)]
    assert len(same) == 9
    for syntax in same:
        source = source_of(files[syntax])
        assert source.transfer_syntax == syntax
        np.testing.assert_array_equal(stored(decoder.read(source), source), truth, syntax)


@pytest.mark.parametrize("syntax", [J2K, "1.2.840.10008.1.2.4.81", JPEG_8, JPEG_12])
def test_lossy_pixels_follow_the_rescale_of_their_header(syntax: str, real_data: Path, decoder: Decoder) -> None:
    files = {path.stem.rpartition("_")[2]: path for path in (real_data / "encodings").glob("*.dcm")}
    hu = {}
    for name in (EXPLICIT_LE, syntax):
        source, header = source_of(files[name]), read_header(files[name])
        assert header.rescale_slope is not None and header.rescale_intercept is not None
        table = rescale_table(Rescale(header.rescale_slope, header.rescale_intercept, source.signed))
        hu[name] = table[decoder.read(source)].astype(int)
    inside = hu[EXPLICIT_LE] > -900  # what is padding has another value in each file
    error = np.abs(hu[syntax] - hu[EXPLICIT_LE])[inside]
    assert error.mean() < {JPEG_8: 32, JPEG_12: 6}.get(syntax, 1.5)  # 8 bits hold steps of 32 HU


@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55", "1.2.840.10008.1.2.4.100", "1.2"]
)
def test_a_syntax_without_a_decoder_is_named(syntax: str) -> None:
    assert missing_decoder(syntax) == f"transfer syntax {syntax} has no decoder here"


def test_retired_syntaxes_of_real_files_have_a_reason(real_data: Path) -> None:
    for end in ("4.53", "4.55"):
        (path,) = (real_data / "encodings").glob(f"*{end}.dcm")
        with pytest.raises(SliceError) as caught:
            check_slice(read_header(path))
        assert caught.value.reason == Reason.UNSUPPORTED_SYNTAX


@pytest.mark.parametrize("syntax", [*NATIVE, *PLUGINS])
def test_a_syntax_with_a_decoder_is_not_missing(syntax: str) -> None:
    assert missing_decoder(syntax) is None


# --- what pixels mean ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize("signed", [True, False])
def test_unused_bits_are_masked(
    signed: bool, syntax: str, decoder: Decoder, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    values = np.array([[-2048, -1], [0, 2047]], np.int16) if signed else np.array([[0, 1], [2048, 4095]], np.int16)
    # An overlay in the upper four bits, as PS3.5 8.1.1 once allowed.
    words = (values.view(np.uint16) & 0x0FFF) | np.uint16(0x5000)
    written = words.view(np.int16) if signed else words
    path = tmp_path / "slice.dcm"
    path.write_bytes(slice_bytes(written, syntax=syntax, BitsStored=12, HighBit=11))
    source = source_of(path)
    words = decoder.read(source)
    masked, limits = mask_unused_bits(words, bits_stored=12, signed=signed)
    np.testing.assert_array_equal(stored(masked, source), values)
    assert limits == (values.min(), values.max())


@pytest.mark.parametrize("bits, signed", [(8, True), (8, False), (12, True), (12, False), (16, True), (16, False)])
def test_values_within_their_bits_are_left_alone(
    bits: int, signed: bool, decoder: Decoder, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    kind = f"{'i' if signed else 'u'}{1 if bits == 8 else 2}"
    path = tmp_path / "slice.dcm"
    pixels = np.array([[low, 0], [1, high]], kind)
    path.write_bytes(slice_bytes(pixels, BitsStored=bits, HighBit=bits - 1))
    source = source_of(path)
    words = decoder.read(source)
    masked, limits = mask_unused_bits(words, bits_stored=bits, signed=signed)
    assert masked is words
    assert limits == min_max(words, signed=signed) == (low, high)
    np.testing.assert_array_equal(stored(words, source), pixels)


def test_monochrome1_is_a_way_to_show_and_not_another_hu(
    decoder: Decoder, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    pixels = slope_of_hu()
    words = []
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        path = tmp_path / photometric
        path.write_bytes(slice_bytes(pixels, PhotometricInterpretation=photometric))
        assert line_of(tmp_path, photometric.encode())["monochrome1"] == (photometric == "MONOCHROME1")
        words.append(decoder.read(source_of(path)).copy())
    np.testing.assert_array_equal(*words)


@pytest.mark.parametrize(
    "attributes, padding",
    [
        ({}, (None, None)),
        ({"PixelPaddingValue": -2000}, (-2000, -2000)),
        ({"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1500}, (-2000, -1500)),
        ({"PixelPaddingValue": -1500, "PixelPaddingRangeLimit": -2000}, (-2000, -1500)),
        ({"PixelPaddingRangeLimit": -1500}, (None, None)),
    ],
)
@pytest.mark.parametrize("syntax", [EXPLICIT_LE, EXPLICIT_BE])
def test_padding_of_the_header_is_air(
    attributes: dict[str, int],
    padding: tuple[int | None, int | None],
    syntax: str,
    decoder: Decoder,
    slice_bytes: SliceBytes,
    tmp_path: Path,
) -> None:
    path = tmp_path / "slice.dcm"
    pixels = np.array([[-2001, -2000], [-1600, -1000]], np.int16)
    path.write_bytes(slice_bytes(pixels, syntax=syntax, RescaleIntercept="2000", **attributes))
    line = line_of(tmp_path, b"slice.dcm")
    low, high = line["padding_low"], line["padding_high"]
    assert (low, high) == padding
    between = None if low is None else (low, high)
    table = rescale_table(Rescale(1.0, 2000.0, signed=True, padding=between))
    hu = table[decoder.read(source_of(path))].reshape(-1).tolist()
    expected = [-1, 0, 400, 1000]
    for place, value in enumerate(pixels.reshape(-1).tolist()):
        if between and between[0] <= value <= between[1]:
            expected[place] = -1024
    assert hu == expected
