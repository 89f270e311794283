"""Compressed files that changed, are truncated, or hold damaged frames."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.encaps import generate_frames

from ich_prep.dicom.decode import Decoder
from ich_prep.dicom.elements import DEFLATED_LE, EXPLICIT_LE
from ich_prep.dicom.pydicom_header import INFLATED_LIMIT
from ich_prep.dicom.skim import walk_meta
from ich_prep.errors import Reason, SliceError
from tests.support.compressed import (
    COMPRESSED,
    J2K_LOSSLESS,
    JPEG_LOSSLESS,
    JPEG_LS,
    RLE,
    SliceBytes,
    compressed,
    refused,
    set_frame,
    slope_of_hu,
    source_of,
    to_bytes,
)

# --- files that changed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, DEFLATED_LE, RLE])
def test_a_file_that_changed_since_the_scan_is_refused(
    syntax: str, decoder: Decoder, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    path = tmp_path / "slice.dcm"
    native = slice_bytes(slope_of_hu(), syntax=EXPLICIT_LE if syntax == RLE else syntax)
    data = compressed(native, RLE) if syntax == RLE else native
    path.write_bytes(data)
    source = source_of(path)
    decoder.read(source)
    for other in (
        data + b"\0\0",
        data[:-2],
        data.replace(b"P1", b"P2"),
        data[:200] + b"x" + data[201:],
        b"",
        data[:100],
    ):
        path.write_bytes(other)
        if other != data:
            assert refused(decoder, source).reason == Reason.CHANGED
    path.unlink()
    assert refused(decoder, source).reason == Reason.UNREADABLE
    path.write_bytes(data)
    decoder.read(source)


@pytest.mark.parametrize("syntax", COMPRESSED)
@pytest.mark.parametrize("kept", [2, 6, 0.4, 0.95])
def test_a_truncated_frame_is_refused(
    kept: float, syntax: str, decoder: Decoder, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    dataset = pydicom.dcmread(io.BytesIO(compressed(slice_bytes(slope_of_hu()), syntax)))
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    set_frame(dataset, frame[: int(kept * len(frame)) if kept < 1 else int(kept)], syntax)
    path = tmp_path / "slice.dcm"
    path.write_bytes(to_bytes(dataset))
    assert refused(decoder, source_of(path)).reason == Reason.DECODE_FAILED


def test_a_truncated_deflated_file_is_refused(decoder: Decoder, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "slice.dcm"
    path.write_bytes(slice_bytes(slope_of_hu(96), syntax=DEFLATED_LE)[:-3000])
    assert refused(decoder, source_of(path)).reason == Reason.DECODE_FAILED


def test_a_deflated_bomb_behind_pixels_is_refused(decoder: Decoder, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "slice.dcm"
    data = slice_bytes(syntax=DEFLATED_LE)
    _, start = walk_meta(data)
    deflater = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = deflater.compress(zlib.decompress(data[start:], -zlib.MAX_WBITS)) + deflater.compress(bytes(INFLATED_LIMIT))
    path.write_bytes(data[:start] + bomb + deflater.flush())
    assert path.stat().st_size < 100_000
    assert refused(decoder, source_of(path)).reason == Reason.TOO_LARGE


@pytest.mark.parametrize("syntax", [RLE, J2K_LOSSLESS, JPEG_LOSSLESS, JPEG_LS])
def test_a_frame_of_another_size_is_refused(
    syntax: str, decoder: Decoder, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    dataset = pydicom.dcmread(io.BytesIO(compressed(slice_bytes(slope_of_hu()), syntax)))
    dataset.Rows = 24  # pylibjpeg's RLE decoder panics over this: a real crash
    path = tmp_path / "slice.dcm"
    path.write_bytes(to_bytes(dataset))
    reasons = (Reason.DECODE_FAILED, Reason.SIZE_MISMATCH, Reason.DECODER_DIED)
    assert refused(decoder, source_of(path)).reason in reasons


@given(syntax=st.sampled_from(COMPRESSED), at=st.floats(0, 1), byte=st.integers(0, 255))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_frame_costs_one_slice_at_most(
    syntax: str, at: float, byte: int, frames: dict[str, bytes], decoder: Decoder, scratch: Path
) -> None:
    data = bytearray(frames[syntax])
    start = data.rindex(bytes.fromhex("feff00e0"))
    place = start + int(at * (len(data) - start - 1))
    data[place] = byte
    scratch.write_bytes(data)
    source = source_of(scratch)
    try:
        assert decoder.read(source).shape == (source.rows, source.columns)
    except SliceError as error:
        assert error.reason in (Reason.DECODE_FAILED, Reason.SIZE_MISMATCH, Reason.DECODER_DIED)
    scratch.write_bytes(frames[syntax])
    np.testing.assert_array_equal(decoder.read(source_of(scratch)).view(np.int16), slope_of_hu())


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frames") / "slice.dcm"
