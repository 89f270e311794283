"""The compiled library: other libraries read what it writes, and no input makes it access memory outside of its buffers."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import blosc
from numpy.typing import NDArray

from ich_prep.dataset import native
from ich_prep.dataset.codecs import block_bytes
from ich_prep.dataset.native import (
    ENCODER,
    FAULT,
    IN_MEMORY,
    INTERFACE,
    REQUEST,
    ChunkCodec,
    ChunkFault,
    FrameEncoder,
    crc32c,
    decode_frame,
    mismatch,
    read_chunks,
    scratch_bytes,
    window_codes_by_table,
)
from ich_prep.errors import IchError
from tests.support.images import SHAPES, picture
from tests.support.page_cache import evict, pages_in_memory

NATIVE = Path(native.__file__).with_name("native")


@pytest.fixture(scope="module", params=["as installed", "portable"])
def _library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The installed library, and one compiled for processors without SSE2 and CRC instructions."""
    if request.param == "as installed":
        yield
        return
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("SKIPPED: no C compiler to build the portable library with")
    target = tmp_path_factory.mktemp("portable") / "_native.so"
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-DICH_PORTABLE", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(target), *map(str, NATIVE.glob("*.c"))], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "__file__", str(target))
        native.require.cache_clear()
        yield
    native.require.cache_clear()


pytestmark = pytest.mark.usefixtures("_library")


def frame_of(pixels: NDArray[Any], block: int | None = None) -> NDArray[np.uint8]:
    encoder = FrameEncoder(pixels.shape, pixels.dtype, block or block_bytes(pixels.shape, pixels.itemsize))
    return encoder.encode(pixels).copy()


@given(data=st.binary(max_size=300), times=st.integers(1, 60), skip=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_checksums_are_those_of_crc32c(data: bytes, times: int, skip: int) -> None:
    whole = np.frombuffer(data * times, np.uint8)[skip:]
    assert crc32c(whole) == crc32c(whole.tobytes()) == google_crc32c.value(whole.tobytes())


def test_the_checksum_of_rfc_3720() -> None:
    assert crc32c(np.arange(32, dtype=np.uint8)) == 0x46DD794E
    assert crc32c(np.zeros(0, np.uint8)) == 0


@given(shape=st.sampled_from(SHAPES), dtype=st.sampled_from([np.uint8, np.int16]), seed=st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_frames_are_read_by_blosc_and_by_us(shape: tuple[int, ...], dtype: type, seed: int) -> None:
    pixels = picture(shape, dtype, seed)
    frame = frame_of(pixels)
    assert blosc.decompress(frame.tobytes()) == pixels.tobytes()
    out = np.full(pixels.nbytes, 255, np.uint8)
    assert decode_frame(frame, out)
    np.testing.assert_array_equal(out.view(dtype).reshape(shape), pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize("rows", [1, 7, 64, 299])
def test_any_blocks_of_whole_rows(rows: int, dtype: type) -> None:
    pixels = picture((3, 100, 90), dtype, rows)
    frame = frame_of(pixels, rows * 90 * pixels.itemsize)
    assert blosc.decompress(frame.tobytes()) == pixels.tobytes()
    out = np.empty(pixels.nbytes, np.uint8)
    assert decode_frame(frame, out)
    assert out.tobytes() == pixels.tobytes()


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([np.uint8, np.int16]),
    seed=st.integers(0, 10_000),
    level=st.integers(0, 9),
    shuffle=st.sampled_from([blosc.SHUFFLE, blosc.NOSHUFFLE]),
    block=st.sampled_from([0, 256, 4096, 65536]),
)
@settings(max_examples=150, deadline=None)
def test_frames_of_blosc_are_read(
    shape: tuple[int, ...], dtype: type, seed: int, level: int, shuffle: int, block: int
) -> None:
    pixels = picture(shape, dtype, seed)
    frame = np.frombuffer(blosc.compress(pixels, b"lz4", level, shuffle, block), np.uint8)
    out = np.full(pixels.nbytes, 255, np.uint8)
    assert decode_frame(frame, out)
    assert out.tobytes() == pixels.tobytes()


def test_equal_pixels_give_equal_frames_on_every_processor() -> None:
    """The bytes of a dataset depend on it. If they must change, raise ICH_ENCODER in native/ich.h as well."""
    rows, columns = np.mgrid[:900, :500]
    noise = (rows * 40_503 + columns * 2_654_435) % 65_521
    plain = np.where(((rows // 60 + columns // 45) % 3 > 0) | (noise % 7 == 0), noise, 1000).reshape(3, 300, 500)
    made = b"".join(frame_of(plain.astype(dtype)).tobytes() for dtype in (np.uint8, np.int16))
    assert (ENCODER, len(made), google_crc32c.value(made)) == (1, 1_328_599, 2_094_878_361)


@pytest.mark.parametrize("cname", [b"zstd", b"zlib", b"blosclz"])
def test_frames_of_another_codec_are_refused(cname: bytes) -> None:
    pixels = np.arange(4096, dtype=np.uint8).reshape(1, 64, 64)
    frame = np.frombuffer(blosc.compress(pixels, cname, 5, blosc.SHUFFLE), np.uint8)
    assert not decode_frame(frame, np.empty(pixels.nbytes, np.uint8))
    bits = np.frombuffer(blosc.compress(pixels, b"lz4", 5, blosc.BITSHUFFLE), np.uint8)
    assert not decode_frame(bits, np.empty(pixels.nbytes, np.uint8))


EDITS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6)


@given(
    shape=st.sampled_from(SHAPES[:4]), dtype=st.sampled_from([np.uint8, np.int16]), edits=EDITS, cut=st.integers(0, 40)
)
@settings(max_examples=400, deadline=None)
def test_damaged_frames_write_only_to_out(
    shape: tuple[int, ...], dtype: type, edits: list[tuple[int, int]], cut: int
) -> None:
    pixels = picture(shape, dtype, 1)
    frame = frame_of(pixels)
    for at, byte in edits:
        frame[at % len(frame)] = byte
    frame = frame[: len(frame) - cut].copy()
    frame[12:16] = np.frombuffer(len(frame).to_bytes(4, "little"), np.uint8)
    room = np.full(pixels.nbytes + 2048, 171, np.uint8)
    decode_frame(frame, room[1024:-1024])
    assert (room[:1024] == 171).all()
    assert (room[-1024:] == 171).all()


@given(data=st.binary(max_size=400), size=st.integers(1, 3000))
@settings(max_examples=300, deadline=None)
def test_any_bytes_write_only_to_out(data: bytes, size: int) -> None:
    room = np.full(size + 2048, 171, np.uint8)
    header = bytes([2, 1, 0x20, 1]) + b"".join(n.to_bytes(4, "little") for n in (size, size, 24 + len(data), 20))
    frame = header + len(data).to_bytes(4, "little") + data
    decode_frame(np.frombuffer(frame, np.uint8), room[1024:-1024])
    assert (room[:1024] == 171).all()
    assert (room[-1024:] == 171).all()


# --- reads -----------------------------------------------------------------------------------------------------------


def with_checksum(payload: bytes) -> bytes:
    return payload + google_crc32c.value(payload).to_bytes(4, "little")


def requests_of(*lines: tuple[int, int, int, int]) -> NDArray[np.void]:
    """Requests of (fd, offset, length, out_offset), without an expected checksum."""
    return np.array([(*line, 0, 0) for line in lines], REQUEST)


class Chunks:
    """Chunks of a few slices, one after the other in a file."""

    def __init__(
        self, path: Path, codec: ChunkCodec, shape: tuple[int, ...] = (3, 60, 60), dtype: type = np.uint8
    ) -> None:
        self.pixels = [picture(shape, dtype, seed) for seed in range(6)]
        payloads = [frame_of(one).tobytes() if codec != ChunkCodec.RAW else one.tobytes() for one in self.pixels]
        self.chunks = [with_checksum(payload) for payload in payloads]
        path.write_bytes(b"".join(self.chunks))
        self.codec, self.path = codec, path
        self.slice_bytes = self.pixels[0].nbytes
        self.begins = np.cumsum([0, *map(len, self.chunks)])

    def checksum(self, row: int) -> int:
        return int.from_bytes(self.chunks[row][-4:], "little")

    def read(
        self, rows: list[int], file: int | None = None, *, expected_crc: list[int] | None = None
    ) -> tuple[ChunkFault | None, list[bytes]]:
        opened = os.open(self.path, os.O_RDONLY) if file is None else file
        lengths = [len(self.chunks[row]) for row in rows]
        sizes = lengths if self.codec == ChunkCodec.UNDECODED else [self.slice_bytes] * len(rows)
        places = np.cumsum([0, *sizes])
        requests = requests_of(*[(opened, self.begins[row], len(self.chunks[row]), 0) for row in rows])
        requests["out_offset"] = places[:-1]
        if expected_crc is not None:
            requests["crc32c"], requests["check_crc"] = expected_crc, 1
        out = np.full(int(places[-1]), 7, np.uint8)
        needed = scratch_bytes(self.codec, max_chunk=max(lengths), slice_bytes=self.slice_bytes)
        scratch = np.empty(needed, np.uint8)
        try:
            fault = read_chunks(requests, self.codec, out=out, slice_bytes=self.slice_bytes, scratch=scratch)
        finally:
            if file is None:
                os.close(opened)
        return fault, [out[place : place + size].tobytes() for place, size in zip(places[:-1], sizes, strict=True)]

    def expected(self, rows: list[int]) -> list[bytes]:
        return [self.chunks[row] if self.codec == ChunkCodec.UNDECODED else self.pixels[row].tobytes() for row in rows]


CODECS = pytest.mark.parametrize("codec", list(ChunkCodec))


@CODECS
@pytest.mark.parametrize(
    "shape, dtype", [((3, 60, 60), np.uint8), ((1, 300, 500), np.int16), ((3, 301, 303), np.uint8)]
)
@given(rows=st.lists(st.integers(0, 5), min_size=1, max_size=9))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_chunks_in_any_order(
    rows: list[int], shape: tuple[int, ...], dtype: type, codec: ChunkCodec, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chunks = Chunks(tmp_path_factory.mktemp("chunks") / "file", codec, shape, dtype)
    assert chunks.read(rows) == (None, chunks.expected(rows))


@CODECS
def test_chunks_outside_the_page_cache(codec: ChunkCodec, tmp_path: Path) -> None:
    chunks = Chunks(tmp_path / "file", codec, (1, 300, 500), np.int16)
    evict(chunks.path)
    assert chunks.read([5, 0, 3]) == (None, chunks.expected([5, 0, 3]))
    evict(chunks.path)
    with chunks.path.open("rb") as file:
        os.pread(file.fileno(), 100, int(chunks.begins[3]))  # some of it is in the page cache
    assert chunks.read([4, 3, 0]) == (None, chunks.expected([4, 3, 0]))


@CODECS
def test_all_uncached_chunks_are_requested_before_the_first_is_awaited(codec: ChunkCodec, tmp_path: Path) -> None:
    """The first chunk is invalid, which ends the call. The second is fetched nevertheless."""
    bad, good = (Chunks(tmp_path / name, codec, (1, 300, 500), np.int16) for name in ("bad", "good"))
    data = bytearray(bad.path.read_bytes())
    data[20] ^= 1
    bad.path.write_bytes(data)
    evict(bad.path, good.path)
    files = [os.open(one.path, os.O_RDONLY) for one in (bad, good)]
    length, size = len(bad.chunks[0]), bad.slice_bytes
    requests = requests_of((files[0], 0, length, 0), (files[1], 0, len(good.chunks[0]), size))
    out = np.empty(2 * size + 1000, np.uint8)
    scratch = np.empty(scratch_bytes(codec, max_chunk=int(requests["length"].max()), slice_bytes=size), np.uint8)
    fault = read_chunks(requests, codec, out=out, slice_bytes=size, scratch=scratch)
    for file in files:
        os.close(file)
    assert fault == ChunkFault(0, mismatch(bad.checksum(0), google_crc32c.value(bytes(data[: length - 4]))))
    deadline = time.monotonic() + 20
    while pages_in_memory(good.path) < len(good.chunks[0]) // mmap.PAGESIZE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@CODECS
def test_chunks_in_memory(codec: ChunkCodec, tmp_path: Path) -> None:
    chunks = Chunks(tmp_path / "file", codec, (1, 300, 500), np.int16)
    memory = np.frombuffer(b"".join(chunks.chunks), np.uint8)
    chunks.begins = chunks.begins + memory.ctypes.data
    rows = [5, 0, 3, 3]
    assert chunks.read(rows, IN_MEMORY) == (None, chunks.expected(rows))
    right = [chunks.checksum(row) for row in rows]
    assert chunks.read(rows, IN_MEMORY, expected_crc=right) == (None, chunks.expected(rows))
    fault, _ = chunks.read(rows, IN_MEMORY, expected_crc=[*right[:2], 7, right[3]])
    assert fault is not None and fault.request == 2 and "not the chunk that was written here" in fault.what


@CODECS
def test_a_file_system_without_nowait_reads(codec: ChunkCodec) -> None:
    if not Path("/proc/self/mem").exists():
        pytest.skip("SKIPPED: no /proc")
    chunks = Chunks.__new__(Chunks)
    # A process's own memory is such a file: preadv2 refuses RWF_NOWAIT.
    source = [with_checksum(frame_of(picture((1, 40, 40), np.uint8, seed)).tobytes()) for seed in range(3)]
    if codec == ChunkCodec.RAW:
        source = [with_checksum(picture((1, 40, 40), np.uint8, seed).tobytes()) for seed in range(3)]
    memory = np.frombuffer(b"".join(source), np.uint8)
    chunks.codec, chunks.chunks, chunks.slice_bytes = codec, source, 1600
    chunks.pixels = [picture((1, 40, 40), np.uint8, seed) for seed in range(3)]
    chunks.begins = np.cumsum([memory.ctypes.data, *map(len, source)])
    file = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=r"not supported|Invalid"):
            os.preadv(file, [bytearray(4)], memory.ctypes.data, os.RWF_NOWAIT)
        assert chunks.read([2, 0], file) == (None, chunks.expected([2, 0]))
    finally:
        os.close(file)


@CODECS
@pytest.mark.parametrize("cold", [False, True])
def test_an_invalid_chunk_is_reported(codec: ChunkCodec, cold: bool, tmp_path: Path) -> None:
    chunks = Chunks(tmp_path / "file", codec)
    data = bytearray(chunks.path.read_bytes())
    data[chunks.begins[3] + 50] ^= 1
    chunks.path.write_bytes(data)
    if cold:
        evict(chunks.path)
    computed = google_crc32c.value(bytes(data[chunks.begins[3] : chunks.begins[4] - 4]))
    message = f"checksum mismatch (stored 0x{chunks.checksum(3):08x}, computed 0x{computed:08x})"
    assert chunks.read([1, 3, 4])[0] == ChunkFault(1, message)
    os.truncate(chunks.path, int(chunks.begins[4]) + 9)
    assert chunks.read([1, 4, 2])[0] == ChunkFault(1, "truncated: the file ends inside this chunk")
    assert chunks.read([2, 5])[0] == ChunkFault(1, "truncated: the file ends inside this chunk")
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        assert chunks.read([0, 1], folder)[0] == ChunkFault(0, "cannot be read: Is a directory")
    finally:
        os.close(folder)
    assert chunks.read([2, 0])[0] is None


@pytest.mark.parametrize("codec", [ChunkCodec.RAW, ChunkCodec.LZ4])
def test_a_chunk_of_another_length_is_reported(codec: ChunkCodec, tmp_path: Path) -> None:
    chunks = Chunks(tmp_path / "file", codec)
    held, chunks.slice_bytes = chunks.slice_bytes, chunks.slice_bytes + 60
    assert chunks.read([0, 1])[0] == ChunkFault(0, f"expected {held + 60} bytes, found {held}")


@CODECS
@pytest.mark.parametrize("cold", [False, True])
def test_a_chunk_that_was_written_elsewhere_is_reported(codec: ChunkCodec, cold: bool, tmp_path: Path) -> None:
    """A valid chunk, whose checksum is not the one that is expected at its place."""
    chunks = Chunks(tmp_path / "file", codec, (1, 300, 500), np.int16)
    if cold:
        evict(chunks.path)
    rows = [4, 0, 2]
    expected = [chunks.checksum(row) for row in rows]
    assert chunks.read(rows, expected_crc=expected) == (None, chunks.expected(rows))
    other = chunks.checksum(5)
    message = f"this is not the chunk that was written here (checksum 0x{expected[1]:08x}, expected 0x{other:08x})"
    assert chunks.read(rows, expected_crc=[expected[0], other, expected[2]])[0] == ChunkFault(1, message)
    assert chunks.read(rows) == (None, chunks.expected(rows))


@CODECS
def test_a_damaged_chunk_is_not_taken_for_another_one(codec: ChunkCodec, tmp_path: Path) -> None:
    chunks = Chunks(tmp_path / "file", codec)
    data = bytearray(chunks.path.read_bytes())
    data[chunks.begins[1] + 20] ^= 1
    chunks.path.write_bytes(data)
    fault, _ = chunks.read([0, 1], expected_crc=[chunks.checksum(0), chunks.checksum(1)])
    assert fault is not None
    assert fault.what.startswith("checksum mismatch (stored")


def test_requests_are_laid_out_as_in_c() -> None:
    assert (REQUEST.itemsize, FAULT.itemsize) == (40, 32)
    assert [REQUEST.fields[name][1] for name in REQUEST.names] == [0, 8, 16, 24, 32, 36]  # type: ignore[index, union-attr]


def test_a_chunk_too_short_for_a_frame(tmp_path: Path) -> None:
    chunks = Chunks(tmp_path / "file", ChunkCodec.LZ4)
    for payload in (b"", b"\x02", bytes(15), b"\xff" * 40):
        chunks.chunks, chunks.begins = [with_checksum(payload)], np.array([0])
        chunks.path.write_bytes(chunks.chunks[0])
        fault, _ = chunks.read([0])
        assert fault is not None
        assert fault.request == 0
        assert "frame" in fault.what or "expected" in fault.what


# --- buffers of the wrong size ----------------------------------------------------------------------------------------


def test_buffers_of_the_wrong_size_are_refused() -> None:
    pixels = picture((1, 16, 16), np.uint8, 0)
    frame = frame_of(pixels)
    read_only = np.empty(256, np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        decode_frame(frame, read_only)
    with pytest.raises(ValueError, match="C-contiguous"):
        decode_frame(frame, np.empty(512, np.uint8)[::2])
    with pytest.raises(ValueError, match="whole rows"):
        FrameEncoder((1, 16, 16), np.dtype(np.uint8), 24)
    with pytest.raises(ValueError, match="items of 1 or 2 bytes"):
        FrameEncoder((1, 16, 16), np.dtype(np.float32), 64)
    for block in (0, 512):
        with pytest.raises(ValueError, match="in blocks of"):
            FrameEncoder((1, 16, 16), np.dtype(np.uint8), block)
    with pytest.raises(ValueError, match="of shape"):
        FrameEncoder((1, 16, 16), np.dtype(np.uint8), 256).encode(pixels[:, :8])
    requests = requests_of((0, 0, 100, 200))
    for out, scratch in ((300, 5000), (456, 100)):
        with pytest.raises(ValueError, match="Expected room for each chunk in"):
            read_chunks(
                requests,
                ChunkCodec.LZ4,
                out=np.empty(out, np.uint8),
                slice_bytes=256,
                scratch=np.empty(scratch, np.uint8),
            )
    for other in (np.zeros((1, 4), np.int64), requests[["fd", "offset"]], requests.reshape(1, 1)):
        with pytest.raises(ValueError, match="Expected requests as"):
            read_chunks(
                other, ChunkCodec.LZ4, out=np.empty(456, np.uint8), slice_bytes=256, scratch=np.empty(5000, np.uint8)
            )
    far = requests_of((0, 0, 100, 2**63 - 1))
    for codec in ChunkCodec:
        with pytest.raises(ValueError, match="Expected room for each chunk in"):
            read_chunks(far, codec, out=np.empty(456, np.uint8), slice_bytes=256, scratch=np.empty(1 << 20, np.uint8))
    table = np.zeros(65536, np.uint32)
    with pytest.raises(ValueError, match=r"uint8 \(2, 4, 4\)"):
        window_codes_by_table(np.zeros((4, 4), np.uint16), table, out=np.zeros((2, 4, 5), np.uint8))
    with pytest.raises(ValueError, match="65,536"):
        window_codes_by_table(np.zeros((4, 4), np.uint16), table[:100], out=np.zeros((2, 4, 4), np.uint8))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 16), (37, 41)])
@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_planes_are_the_bytes_of_table_entries(shape: tuple[int, int], planes: int) -> None:
    rng = np.random.default_rng(planes)
    stored = rng.integers(0, 65536, shape).astype(np.uint16)
    table = rng.integers(0, 1 << 32, 65536, dtype=np.uint64).astype(np.uint32)
    out = np.zeros((planes, *shape), np.uint8)
    window_codes_by_table(stored, table, out=out)
    for plane in range(planes):
        np.testing.assert_array_equal(out[plane], (table[stored] >> (8 * plane)).astype(np.uint8))


@pytest.mark.parametrize(
    "case, message",
    [
        ("no file", "it was not compiled"),
        ("not a library", "cannot be used"),
        ("INTERFACE", rf"of another version \(interface and encoder \({INTERFACE}, {ENCODER}\), expected \(0, "),
        ("ENCODER", rf"of another version \(interface and encoder \({INTERFACE}, {ENCODER}\), expected .*, 0\)"),
        ("REQUEST", r"structs of \(40, 32\) bytes, expected \(48, 32\)"),
        ("FAULT", r"structs of \(40, 32\) bytes, expected \(40, 40\)"),
    ],
)
def test_an_unusable_library_is_refused(
    case: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "not a library":
        (tmp_path / "_native.so").write_bytes(b"no library")
    if case in ("INTERFACE", "ENCODER"):
        monkeypatch.setattr(native, case, 0)
    elif case in ("REQUEST", "FAULT"):
        monkeypatch.setattr(native, case, np.dtype([*getattr(native, case).descr, ("more", "<i8")]))
    else:
        monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.require.cache_clear()
    with pytest.raises(IchError, match=rf"{message}.*Install the package"):
        crc32c(b"123")
    native.require.cache_clear()
