"""The frame of a compressed file and the sign of its values: pydicom is the reference."""

from __future__ import annotations

import io
import struct
from itertools import pairwise
from pathlib import Path

import imagecodecs
import numpy as np
import openjpeg
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, generate_frames

from ich_prep.dicom.decode import PLUGINS, Decoder, decode_with_pydicom
from ich_prep.dicom.frames import decode_into, only_frame
from ich_prep.dicom.header import read_header
from ich_prep.errors import Reason, SliceError
from tests.support.compressed import (
    COMPRESSED,
    J2K_LOSSLESS,
    JPEG_8,
    JPEG_12,
    JPEG_LOSSLESS,
    JPEG_LS,
    RLE,
    SliceBytes,
    refused,
    set_frame,
    slope_of_hu,
    source_of,
    stored,
    to_bytes,
)

ITEM, DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0" + bytes(4)


def item(value: bytes) -> bytes:
    return ITEM + struct.pack("<I", len(value)) + value


def decode_both(path: Path) -> tuple[NDArray[np.generic] | Reason, NDArray[np.generic] | Reason]:
    """The stored values of a file by this project, in this process, and by pydicom; or the reason of the failure."""
    source, data = source_of(path), path.read_bytes()
    words = np.zeros((source.rows, source.columns), np.uint16)
    results: list[NDArray[np.generic] | Reason] = []
    try:
        decode_into(source, memoryview(data), words)
        results.append(stored(words, source))
    except SliceError as error:
        results.append(error.reason)
    except Exception:  # a library's, which the decoding process turns into this reason
        results.append(Reason.DECODE_FAILED)
    try:
        results.append(decode_with_pydicom(data))
    except SliceError as error:
        results.append(error.reason)
    return results[0], results[1]


# --- fragments -------------------------------------------------------------------------------------------------------


@st.composite
def encapsulations(draw: st.DrawFn) -> tuple[str, list[float], str, str, bytes]:
    """A syntax, where its frame is cut, the Basic Offset Table, the end, and the fill bytes behind the frame."""
    cuts = sorted(draw(st.lists(st.floats(0, 1), max_size=4)))
    table = draw(st.sampled_from(["empty", "one", "second", "beyond", "odd", "none"]))
    end = draw(st.sampled_from(["delimiter", "tag only", "none", "cut", "junk", "another tag", "defined length"]))
    fill = draw(st.sampled_from([b"", b"", b"\0", b"\xff", b"\xff\0\xff\0", bytes(600)]))
    return draw(st.sampled_from(COMPRESSED)), cuts, table, end, fill


@given(encapsulation=encapsulations())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_encapsulation_gives_what_pydicom_gives(
    encapsulation: tuple[str, list[float], str, str, bytes], frames: dict[str, bytes], tmp_path: Path
) -> None:
    syntax, cuts, table, end, fill = encapsulation
    path = tmp_path / "slice.dcm"
    path.write_bytes(frames[syntax])
    at = read_header(path).pixel_offset
    assert at is not None
    frame = next(generate_frames(frames[syntax][at:], number_of_frames=1)) + fill
    places = [0, *(int(cut * len(frame)) // 2 * 2 for cut in cuts), len(frame)]
    fragments = [item(frame[start:stop]) for start, stop in pairwise(places)]
    offsets = {"one": [0], "second": [0, len(fragments[0])], "beyond": [0, 1 << 30]}.get(table, [])
    first = b"" if table == "none" else item(b"abc" if table == "odd" else struct.pack(f"<{len(offsets)}I", *offsets))
    items = first + b"".join(fragments)
    tail = {"tag only": DELIMITER[:4], "none": b"", "junk": DELIMITER + b"\1" * 50}.get(end, DELIMITER)
    if end == "another tag":
        tail = struct.pack("<HHI", 0x0008, 0x0018, 4) + bytes(4) + DELIMITER
    value = items[:-3] if end == "cut" else items + tail
    length = len(value) if end == "defined length" else 0xFFFFFFFF
    path.write_bytes(frames[syntax][: at - 4] + struct.pack("<I", length) + value)
    ours, theirs = decode_both(path)
    if isinstance(ours, Reason):
        # pydicom also returns two frames, or one and what cannot be a second.
        assert isinstance(theirs, Reason) or (ours == Reason.SIZE_MISMATCH and table == "second")
    else:
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(ours, slope_of_hu())


def test_a_frame_in_several_fragments_is_joined() -> None:
    value = bytes(4) + b"\xff" * 4 + item(b"") + item(b"ab") + item(b"cdef") + item(b"") + DELIMITER
    assert bytes(only_frame(memoryview(value), 8)) == b"abcdef"


@pytest.mark.parametrize(
    "value, reason",
    [
        (item(struct.pack("<2I", 0, 10)) + item(b"ab") + item(b"cd") + DELIMITER, Reason.SIZE_MISMATCH),
        (item(b"ab") + item(b"ab") + DELIMITER, Reason.DECODE_FAILED),
        (item(b"") + item(b"ab"), Reason.DECODE_FAILED),
        (item(b"") + item(b"abcd")[:-1], Reason.DECODE_FAILED),
        (item(b"") + ITEM + b"\xff" * 4 + b"ab" + DELIMITER, Reason.DECODE_FAILED),
        (DELIMITER, Reason.DECODE_FAILED),
        (b"", Reason.DECODE_FAILED),
    ],
)
def test_damaged_items_are_named(value: bytes, reason: Reason) -> None:
    with pytest.raises(SliceError) as caught:
        only_frame(memoryview(bytes(4) + b"\xff" * 4 + value), 8)
    assert caught.value.reason == reason


def test_an_extended_offset_table_changes_nothing(frames: dict[str, bytes], decoder: Decoder, tmp_path: Path) -> None:
    dataset = pydicom.dcmread(io.BytesIO(frames[JPEG_LS]))
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([frame], has_bot=False)
    dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = bytes(8), struct.pack("<Q", len(frame))
    path = tmp_path / "slice.dcm"
    path.write_bytes(to_bytes(dataset))
    source = source_of(path)
    np.testing.assert_array_equal(stored(decoder.read(source), source), slope_of_hu())


# --- the end of a JPEG frame -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [b"\xff\xd9\xff", b"\xff\xff\xd9", b"\xff\xd9\0", b"\xff\xff\xff\xd9\xff\0\xff\0"])
@pytest.mark.parametrize("syntax", [JPEG_LS, JPEG_LOSSLESS])
def test_fill_bytes_around_the_end_of_the_image_are_skipped(
    syntax: str, fill: bytes, frames: dict[str, bytes], decoder: Decoder, tmp_path: Path
) -> None:
    dataset = pydicom.dcmread(io.BytesIO(frames[syntax]))
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1)).rstrip(b"\0")
    assert frame.endswith(b"\xff\xd9")
    path = tmp_path / "slice.dcm"
    set_frame(dataset, frame[:-2] + fill, syntax)
    path.write_bytes(to_bytes(dataset))
    np.testing.assert_array_equal(decoder.read(source_of(path)).view(np.int16), slope_of_hu())
    np.testing.assert_array_equal(decode_with_pydicom(path.read_bytes()), slope_of_hu())
    set_frame(dataset, frame[:-2] + b"\xff\0", syntax)
    path.write_bytes(to_bytes(dataset))
    assert "truncated" in refused(decoder, source_of(path)).detail


# --- bits and signs --------------------------------------------------------------------------------------------------


def encoded(pixels: NDArray[np.generic], syntax: str, bits: int) -> bytes:
    """A frame of ``bits`` a sample."""
    words = pixels.view(f"u{pixels.itemsize}") & np.array((1 << bits) - 1, f"u{pixels.itemsize}")
    if syntax == JPEG_LS:
        return bytes(imagecodecs.jpegls_encode(words))
    if syntax == JPEG_LOSSLESS:
        return bytes(imagecodecs.jpeg8_encode(words, lossless=True, predictor=1, bitspersample=bits))
    return bytes(imagecodecs.jpeg8_encode(words, level=95, bitspersample=bits))


@given(
    syntax=st.sampled_from([J2K_LOSSLESS, JPEG_LS, JPEG_LOSSLESS, JPEG_8, JPEG_12]),
    bits=st.integers(2, 16),
    stream_signed=st.booleans(),
    header_signed=st.booleans(),
    allocated=st.sampled_from([8, 16, 16]),
    header_bits=st.integers(1, 16),
    seed=st.integers(0, 9),
)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bits_and_sign_of_header_and_stream_may_differ(
    syntax: str,
    bits: int,
    stream_signed: bool,
    header_signed: bool,
    allocated: int,
    header_bits: int,
    seed: int,
    slice_bytes: SliceBytes,
    tmp_path: Path,
) -> None:
    bits = {JPEG_8: 8, JPEG_12: 12}.get(syntax, bits)
    container = f"{'i' if stream_signed else 'u'}{1 if bits <= 8 else 2}"
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if stream_signed else (0, (1 << bits) - 1)
    pixels = np.random.default_rng(seed).integers(low, high + 1, (40, 36)).astype(container)
    if syntax == J2K_LOSSLESS:
        frame = bytes(openjpeg.encode(pixels, bits_stored=bits))
    else:
        frame = encoded(pixels, syntax, bits)
    dataset = pydicom.dcmread(io.BytesIO(slice_bytes(np.zeros((40, 36), f"u{allocated // 8}"))))
    dataset.BitsStored = min(header_bits, allocated)
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(header_signed)
    set_frame(dataset, frame, syntax)
    path = tmp_path / "slice.dcm"
    path.write_bytes(to_bytes(dataset))
    ours, theirs = decode_both(path)
    if syntax == JPEG_LS:
        (bits,) = frame[frame.index(b"\xff\xf7") + 4 :][:1]  # as many as the largest value needs
    if bits > allocated:
        assert ours == Reason.DECODE_FAILED  # pydicom drops the upper bits
    else:
        assert not isinstance(ours, Reason)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("syntax", [JPEG_8, JPEG_LS, J2K_LOSSLESS])
def test_colour_in_the_frame_is_refused(syntax: str, slice_bytes: SliceBytes, decoder: Decoder, tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (40, 36, 3)).astype(np.uint8)
    dataset = pydicom.dcmread(io.BytesIO(slice_bytes(colours[..., 0])))
    if syntax == J2K_LOSSLESS:
        frame = bytes(openjpeg.encode(colours, bits_stored=8, photometric_interpretation=1))
    else:
        frame = encoded(colours, syntax, 8)
    set_frame(dataset, frame, syntax)
    path = tmp_path / "slice.dcm"
    path.write_bytes(to_bytes(dataset))
    error = refused(decoder, source_of(path))
    assert error.reason == Reason.DECODE_FAILED and "(40, 36, 3)" in error.detail
    assert decode_both(path)[1] == Reason.DECODE_FAILED


@pytest.mark.parametrize("bits, signed", [(16, True), (16, False), (12, True), (12, False), (8, True), (8, False)])
def test_rle_follows_the_bits_of_the_header(bits: int, signed: bool, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 1 << max(bits, 8), (40, 36)).astype(f"u{1 if bits == 8 else 2}")
    dataset = pydicom.dcmread(io.BytesIO(slice_bytes(pixels)))
    dataset.compress(pydicom.uid.UID(RLE), encoding_plugin="pydicom", generate_instance_uid=False)
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, int(signed)
    path = tmp_path / "slice.dcm"
    path.write_bytes(to_bytes(dataset))
    ours, theirs = decode_both(path)
    np.testing.assert_array_equal(ours, theirs)


def test_every_real_compressed_file_has_the_values_of_pydicom(real_data: Path) -> None:
    compared = set()
    for path in sorted((real_data / "encodings").glob("*.dcm")):
        syntax = read_header(path).transfer_syntax
        if syntax in PLUGINS:
            ours, theirs = decode_both(path)
            np.testing.assert_array_equal(ours, theirs, path.name)
            compared.add(syntax)
    assert compared == PLUGINS.keys()
