"""Stored values: every transfer syntax against pydicom, and decoders that fail, hang, crash or are killed."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import UID

from ich_prep.dicom import decode
from ich_prep.dicom.accept import check_slice
from ich_prep.dicom.decode import PIXEL_FIELDS, PLUGINS, Decoder, PixelSource, missing_decoder
from ich_prep.dicom.elements import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from ich_prep.dicom.header import read_header
from ich_prep.dicom.pydicom_header import INFLATED_LIMIT
from ich_prep.dicom.skim import walk_meta
from ich_prep.errors import Reason, SliceError
from ich_prep.pixels.hounsfield import Rescale, rescale_table
from ich_prep.pixels.stored import mask_unused_bits, min_max
from ich_prep.sources import FolderSource
from ich_prep.stages.scan import scan_file

SliceBytes = Callable[..., bytes]

NATIVE = [IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED_LE]
RLE, J2K_LOSSLESS, J2K = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"
JPEG_LOSSLESS, JPEG_LOSSLESS_SV1 = "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"
JPEG_LS, JPEG_8, JPEG_12 = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
COMPRESSED = [RLE, J2K_LOSSLESS, JPEG_LOSSLESS, JPEG_LOSSLESS_SV1, JPEG_LS]


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    """One decoder for all tests: one slice must not affect the next."""
    shared = Decoder()
    yield shared
    shared.close()


def source_of(path: Path) -> PixelSource:
    """The pixel source of the file, from its scan."""
    line = line_of(path.parent, path.name.encode())
    assert line.get("reason") is None, line
    values = {name: line[name] for name in PIXEL_FIELDS}
    return PixelSource(source=FolderSource(path.parent), key=path.name.encode(), **values)


def line_of(folder: Path, name: bytes) -> dict[str, Any]:
    """The scan's line for one file of a folder."""
    return scan_file(FolderSource(folder), name, name)


def stored(words: NDArray[np.uint16], source: PixelSource) -> NDArray[Any]:
    return words.view(np.int16) if source.signed else words


def refused(decoder: Decoder, source: PixelSource) -> SliceError:
    with pytest.raises(SliceError) as caught:
        decoder.read(source)
    return caught.value


def compressed(native: bytes, syntax: str) -> bytes:
    """The slice of a native little endian file in another transfer syntax."""
    dataset = pydicom.dcmread(io.BytesIO(native))
    pixels = dataset.pixel_array
    if syntax == RLE:
        dataset.compress(UID(RLE), encoding_plugin="pydicom", generate_instance_uid=False)
    elif syntax == J2K_LOSSLESS:
        dataset.compress(UID(J2K_LOSSLESS), encoding_plugin="pylibjpeg", generate_instance_uid=False)
    else:
        words = pixels.view(f"u{pixels.itemsize}")
        if syntax == JPEG_LS:
            frame = imagecodecs.jpegls_encode(words)
        else:
            frame = imagecodecs.jpeg8_encode(words, lossless=True, predictor=1, bitspersample=8 * words.itemsize)
        set_frame(dataset, frame, syntax)
    return to_bytes(dataset)


def set_frame(dataset: pydicom.Dataset, frame: bytes, syntax: str) -> None:
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = UID(syntax)


def to_bytes(dataset: pydicom.Dataset) -> bytes:
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def slope_of_hu(side: int = 40) -> NDArray[np.int16]:
    """A slice with padding, air, water and bone, and noise on it."""
    rng = np.random.default_rng(0)
    pixels = np.linspace(-1024, 3000, side * side).reshape(side, side) + rng.normal(0, 20, (side, side))
    pixels[0] = -2000
    return pixels.astype(np.int16)


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
def frames(slice_bytes: SliceBytes) -> dict[str, bytes]:
    native = slice_bytes(slope_of_hu())
    return {syntax: compressed(native, syntax) for syntax in COMPRESSED}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frames") / "slice.dcm"


# --- a decoding process that crashes ---------------------------------------------------------------------------------


@pytest.fixture
def good(frames: dict[str, bytes], tmp_path: Path) -> PixelSource:
    path = tmp_path / "good.dcm"
    path.write_bytes(frames[J2K_LOSSLESS])
    return source_of(path)


def child_of(decoder: Decoder) -> int:
    assert decoder._child is not None and decoder._child._process is not None
    return decoder._child._process.pid


def test_a_decoder_killed_between_two_slices_costs_none(good: PixelSource) -> None:
    decoder = Decoder()
    before = decoder.read(good).copy()
    for _ in range(3):
        os.kill(child_of(decoder), signal.SIGKILL)
        np.testing.assert_array_equal(decoder.read(good), before)
    decoder.close()


class Stopper(threading.Thread):
    """Stops each decoding process as soon as it exists, so that it hangs on its slice; ``kill``: also kills it."""

    def __init__(self, decoder: Decoder, *, kill: bool, times: int) -> None:
        super().__init__()
        self.decoder, self.kill, self.times = decoder, kill, times
        self.stopped: list[int] = []

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while len(self.stopped) < self.times and time.monotonic() < deadline:
            process = self.decoder._child._process if self.decoder._child else None
            if process is None or process.pid in self.stopped:  # there is none between the two
                time.sleep(0.001)
                continue
            os.kill(process.pid, signal.SIGSTOP)
            self.stopped.append(process.pid)
            if self.kill:
                time.sleep(0.3)
                os.kill(process.pid, signal.SIGKILL)


def test_a_decoder_killed_over_a_slice_costs_that_slice(good: PixelSource) -> None:
    decoder = Decoder()
    before = decoder.read(good).copy()
    # Once in the process that had decoded before, once in the new one for the retry.
    stopper = Stopper(decoder, kill=True, times=2)
    os.kill(child_of(decoder), signal.SIGSTOP)
    stopper.start()
    error = refused(decoder, good)
    stopper.join()
    assert (error.reason, error.detail) == (Reason.DECODER_DIED, "the decoder ended with exit status -9")
    np.testing.assert_array_equal(decoder.read(good), before)
    decoder.close()


@pytest.mark.parametrize("padding", [0, 1 << 20])
def test_a_decoder_that_hangs_is_ended(
    padding: int, frames: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it decodes, and before it has read the file: a pipe buffers 64 KiB."""
    path = tmp_path / "slice.dcm"
    path.write_bytes(frames[J2K_LOSSLESS] + bytes(padding))
    source, decoder = source_of(path), Decoder()
    stopper = Stopper(decoder, kill=False, times=1)
    monkeypatch.setattr(decode, "SECONDS_PER_SLICE", 0.5)
    stopper.start()
    begun = time.monotonic()
    error = refused(decoder, source)
    stopper.join()
    assert 0.4 < time.monotonic() - begun < 5
    assert (error.reason, error.detail) == (Reason.DECODER_DIED, "no pixels after 0.5 s")
    monkeypatch.undo()
    np.testing.assert_array_equal(decoder.read(source).view(np.int16), slope_of_hu())
    decoder.close()


def test_an_unread_answer_is_discarded(
    good: PixelSource, slice_bytes: SliceBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example Ctrl-C in a notebook: the next slice must not get the pixels of the interrupted one."""
    decoder = Decoder()
    before = decoder.read(good).copy()
    other = tmp_path / "other.dcm"
    other.write_bytes(compressed(slice_bytes(slope_of_hu()[::-1].copy()), J2K_LOSSLESS))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(decode.select, "select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.read(source_of(other))
    np.testing.assert_array_equal(decoder.read(good), before)
    decoder.close()


def test_closing_ends_the_process(good: PixelSource) -> None:
    decoder = Decoder()
    decoder.read(good)
    pid = child_of(decoder)
    decoder.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    decoder.close()
    decoder.read(good)
    decoder.close()


def test_native_pixels_need_no_process(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "slice.dcm"
    path.write_bytes(slice_bytes())
    decoder = Decoder()
    decoder.read(source_of(path))
    assert decoder._child is None
