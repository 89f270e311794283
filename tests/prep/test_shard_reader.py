"""The reader of shards: any rows in any order, by any number of threads; damage is an error that names shard and row."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.dataset import shard_reader
from ich_prep.dataset.codecs import CODECS, LZ4, Codec
from ich_prep.dataset.native import ChunkFault, read_chunks
from ich_prep.dataset.shard_format import ShardWriter, index_bytes
from ich_prep.dataset.shard_reader import ShardReader
from ich_prep.errors import CorruptionError
from tests.support.page_cache import evict

SLICES, PER_SHARD = 23, 5
SLICE_BYTES = 96
ABSENT = (3, 4, 11)
SIZES = (96, 3 * 40 * 40)  # too small to compress; one that is
EACH_CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
SHAPES = {96: (1, 8, 12), 48: (1, 4, 12), 4800: (3, 40, 40), 2400: (3, 20, 40)}


def some_pixels(slice_bytes: int = SLICE_BYTES) -> NDArray[np.uint8]:
    """Slices half of noise, so that no two are alike and their chunks differ in length."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (SLICES, slice_bytes), np.uint8)
    values[:, slice_bytes // 2 :] = 7
    values[::3, 20:] = 0
    return values


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return some_pixels()


def write_shards(folder: Path, pixels: NDArray[np.uint8], codec: Codec) -> NDArray[np.uint32]:
    """Write the shards of ``pixels``; return the checksum of each row's chunk, with those of the unused chunks."""
    checksums = []
    for number in range(-(-SLICES // PER_SHARD)):
        with open(folder / str(number), "wb", buffering=0) as file:
            writer = ShardWriter(file, PER_SHARD, codec)
            for row in range(number * PER_SHARD, min(SLICES, (number + 1) * PER_SHARD)):
                if row in ABSENT:
                    writer.skip()
                else:
                    writer.append(pixels[row].reshape(SHAPES[pixels.shape[1]]))
            checksums.append(writer.finish().chunk_crc32c)
    return np.concatenate(checksums)


def open_reader(
    folder: Path,
    codec: Codec = LZ4,
    slice_bytes: int = SLICE_BYTES,
    *,
    slices: int = SLICES,
    expected_crc: NDArray[np.uint32] | None = None,
) -> ShardReader:
    return ShardReader(
        lambda shard: folder / str(shard),
        slices=slices,
        slice_bytes=slice_bytes,
        slices_per_shard=PER_SHARD,
        codec=codec,
        expected_crc=expected_crc,
    )


Opened = tuple[ShardReader, NDArray[np.uint8]]


@pytest.fixture(scope="module", params=[(name, size) for name in CODECS for size in SIZES], ids=str)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    name, size = request.param
    codec = CODECS[name]
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, some_pixels(size), codec)
    return open_reader(folder, codec, size), some_pixels(size)


@pytest.fixture
def folder(tmp_path: Path, pixels: NDArray[np.uint8]) -> Path:
    write_shards(tmp_path, pixels, LZ4)
    return tmp_path


ROWS = st.lists(st.integers(0, SLICES - 1), max_size=60)


@pytest.mark.parametrize("most_open", [1, 64, 4096])
@given(rows=ROWS, threads=st.integers(1, 4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_in_any_order(rows: list[int], threads: int, most_open: int, opened: Opened) -> None:
    shared, pixels = opened
    out = np.full((len(rows), pixels.shape[1]), 255, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "_max_open", most_open)
        missing = shared.read(np.array(rows, np.int64), out, threads=threads)
    assert missing == sorted(set(rows) & set(ABSENT))
    # If a chunk is missing nothing is decoded: a row is never zeros instead.
    np.testing.assert_array_equal(out, np.full_like(out, 255) if missing else pixels[np.array(rows, np.int64)])


@EACH_CODEC
def test_a_batch_is_one_call(codec: Codec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_shards(tmp_path, some_pixels(SIZES[1]), codec)
    shared, rows = open_reader(tmp_path, codec, SIZES[1]), np.array([22, 0, 2, 17, 9, 12, 0], np.int64)
    counted = []

    def read(requests: NDArray[np.int64], *asked: object, **named: object) -> ChunkFault | None:
        counted.append(len(requests))
        return read_chunks(requests, *asked, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_reader, "read_chunks", read)
    out = np.empty((len(rows), SIZES[1]), np.uint8)
    assert shared.read(rows, out) == []
    np.testing.assert_array_equal(out, some_pixels(SIZES[1])[rows])
    assert counted == [7]


@EACH_CODEC
def test_cold_shards(codec: Codec, tmp_path: Path) -> None:
    write_shards(tmp_path, some_pixels(SIZES[1]), codec)
    evict(*tmp_path.iterdir())
    rows = np.setdiff1d(np.arange(SLICES), ABSENT)
    out = np.empty((len(rows), SIZES[1]), np.uint8)
    assert open_reader(tmp_path, codec, SIZES[1]).read(rows, out, threads=2) == []
    np.testing.assert_array_equal(out, some_pixels(SIZES[1])[rows])


@EACH_CODEC
def test_a_part_of_a_batch_may_be_uncached(codec: Codec, tmp_path: Path) -> None:
    write_shards(tmp_path, some_pixels(SIZES[1]), codec)
    shared, rows = open_reader(tmp_path, codec, SIZES[1]), np.array([22, 0, 2, 17, 9, 12, 0, 20], np.int64)
    out = np.empty((len(rows), SIZES[1]), np.uint8)
    for cold in [("0", "3"), ("1",), ("4", "2", "0")]:
        evict(*(tmp_path / name for name in cold))
        assert shared.read(rows, out) == []
        np.testing.assert_array_equal(out, some_pixels(SIZES[1])[rows])
    evict(tmp_path / "0", tmp_path / "3")
    os.truncate(tmp_path / "3", 10)
    with pytest.raises(
        CorruptionError, match=rf"Shard 3 \({tmp_path / '3'}\), row 17: truncated: the file ends inside"
    ):
        shared.read(rows, out)


@pytest.mark.parametrize("most_open", [1, 100])
def test_many_calling_threads_share_one_reader(
    most_open: int, folder: Path, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "MAX_OPEN", most_open)
    monkeypatch.setattr(shard_reader, "MIN_SCRATCH", 1)
    there = np.setdiff1d(np.arange(SLICES), ABSENT)

    def read(seed: int) -> bool:
        rows = np.random.default_rng(seed).choice(there, 40)
        out = np.empty((40, SLICE_BYTES), np.uint8)
        shared.read(rows, out, threads=2)
        return bool((out == pixels[rows]).all())

    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            shared = open_reader(folder)  # each time all open its shards at once
            assert all(pool.map(read, range(20)))


def test_shards_are_closed_when_many_are_open(
    monkeypatch: pytest.MonkeyPatch, folder: Path, pixels: NDArray[np.uint8]
) -> None:
    monkeypatch.setattr(shard_reader, "MAX_OPEN", 2)
    small = open_reader(folder)
    before = len(list(Path("/proc/self/fd").iterdir()))
    rows = np.setdiff1d(np.arange(SLICES), ABSENT)
    out = np.empty((len(rows), SLICE_BYTES), np.uint8)
    most = before

    def read(*asked: object, **named: object) -> ChunkFault | None:
        nonlocal most
        most = max(most, len(list(Path("/proc/self/fd").iterdir())))
        return read_chunks(*asked, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_reader, "read_chunks", read)
    for _ in range(3):
        small.read(rows, out)
        np.testing.assert_array_equal(out, pixels[rows])
    assert most <= before + 3  # one of them is being read
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


@pytest.mark.parametrize("rows", [[-1], [SLICES], [0, SLICES], [2**40]])
def test_a_row_out_of_range_is_an_error(rows: list[int], opened: Opened) -> None:
    shared, pixels = opened
    with pytest.raises(IndexError, match=f"0..{SLICES - 1}"):
        shared.read(np.array(rows, np.int64), np.empty((len(rows), pixels.shape[1]), np.uint8))


@pytest.mark.parametrize("threads", [1, 3])
@EACH_CODEC
@pytest.mark.parametrize("size", SIZES)
def test_a_flipped_byte_names_shard_and_row(size: int, codec: Codec, threads: int, tmp_path: Path) -> None:
    write_shards(tmp_path, some_pixels(size), codec)
    shard = tmp_path / "1"
    data = bytearray(shard.read_bytes())
    index = np.frombuffer(bytes(data[-index_bytes(PER_SHARD) : -4]), "<u8").reshape(-1, 2)
    data[int(index[2].sum()) - 6] ^= 1  # in the chunk of row 7
    shard.write_bytes(data)
    damaged = open_reader(tmp_path, codec, size)
    with pytest.raises(CorruptionError, match=rf"Shard 1 \({shard}\), row 7: checksum mismatch \(stored 0x"):
        damaged.read(np.array([12, 5, 6, 7, 8, 20, 21, 22]), np.empty((8, size), np.uint8), threads=threads)
    assert damaged.read(np.array([5, 6, 8, 9]), np.empty((4, size), np.uint8)) == []


def lose_last_byte(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def flip_index(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (Path.unlink, "file not found"),
        (lambda shard: shard.write_bytes(b""), "expected at least 84 bytes, found 0"),
        (lambda shard: shard.write_bytes(bytes(83)), "expected at least 84 bytes, found 83"),
        (lambda shard: shard.write_bytes(bytes(500)), r"index checksum mismatch \(stored"),
        (lose_last_byte, r"index checksum mismatch \(stored"),
        (flip_index, r"index checksum mismatch \(stored"),
        (lambda shard: (shard.unlink(), shard.mkdir()), "cannot be opened: Is a directory"),
        (lambda shard: (shard.unlink(), os.mkfifo(shard)), "cannot be opened: expected a regular file, found a FIFO"),
        (lambda shard: (shard.unlink(), shard.symlink_to(shard)), "cannot be opened: Too many levels"),
    ],
)
def test_a_shard_that_cannot_be_read_names_itself(spoil: object, message: str, folder: Path) -> None:
    spoil(folder / "2")  # type: ignore[operator]
    damaged = open_reader(folder)
    with pytest.raises(CorruptionError, match=message) as caught:
        damaged.read(np.array([1, 12]), np.empty((2, SLICE_BYTES), np.uint8))
    assert f"Shard 2 ({folder / '2'})" in str(caught.value)
    assert "ich-prep verify" in str(caught.value)
    assert damaged.read(np.array([1, 16]), np.empty((2, SLICE_BYTES), np.uint8)) == []


def test_a_shard_that_shrinks_while_it_is_open_is_an_error(folder: Path) -> None:
    shared = open_reader(folder)
    out = np.empty((1, SLICE_BYTES), np.uint8)
    assert shared.read(np.array([14]), out) == []
    with open(folder / "2", "r+b") as file:
        file.truncate(10)
    with pytest.raises(CorruptionError, match="row 14: truncated"):
        shared.read(np.array([14]), out)


@EACH_CODEC
@pytest.mark.parametrize("size", SIZES)
def test_a_shard_of_another_shape_is_an_error(size: int, codec: Codec, folder: Path) -> None:
    with open(folder / "0", "wb", buffering=0) as file:
        writer = ShardWriter(file, PER_SHARD, codec)
        writer.append(np.ones(SHAPES[size], np.uint8))
        writer.append(np.ones(SHAPES[size // 2], np.uint8))
        writer.finish()
    out = np.full((2, size), 77, np.uint8)
    with pytest.raises(CorruptionError, match=f"row 1: expected {size} bytes, found {size // 2}"):
        open_reader(folder, codec, size).read(np.array([0, 1]), out)


@pytest.mark.parametrize("at", [2, 4, 8, 16, 20])
def test_a_valid_frame_from_elsewhere_is_an_error(at: int, tmp_path: Path) -> None:
    """Its checksum matches; its header or one of its offsets is invalid."""
    size = SIZES[1]
    write_shards(tmp_path, some_pixels(size), LZ4)
    data = bytearray((tmp_path / "0").read_bytes())
    index = np.frombuffer(bytes(data[-index_bytes(PER_SHARD) : -4]), "<u8").reshape(-1, 2)
    start, length = index[1].tolist()
    data[start + at : start + at + 1] = bytes([data[start + at] ^ 0xFF])
    checksum = google_crc32c.value(bytes(data[start : start + length - 4])).to_bytes(4, "little")
    data[start + length - 4 : start + length] = checksum
    (tmp_path / "0").write_bytes(data)
    with pytest.raises(CorruptionError, match=r"row 1: "):
        open_reader(tmp_path, LZ4, size).read(np.array([0, 1, 2]), np.empty((3, size), np.uint8))


@pytest.mark.parametrize("spoil", ["short", "strided", "read-only"])
def test_an_unsuitable_out_is_not_written_to(spoil: str, opened: Opened) -> None:
    shared, pixels = opened
    room = np.zeros((8, pixels.shape[1]), np.uint8)
    out = {"short": room[:3], "strided": room[::2], "read-only": room[:4]}[spoil]
    out.flags.writeable = spoil != "read-only"
    with pytest.raises(ValueError, match=r"C-contiguous, of shape .* with strides"):
        shared.read(np.array([0, 1, 2, 5]), out)
    assert not room.any()


def test_an_open_reader_is_not_pickled(opened: Opened) -> None:
    with pytest.raises(TypeError, match="open it in the other process"):
        pickle.dumps(opened[0])


# --- expected checksums ----------------------------------------------------------------------------------------------


@EACH_CODEC
@pytest.mark.parametrize("threads", [1, 3])
def test_expected_checksums_are_those_that_the_writer_returned(codec: Codec, threads: int, tmp_path: Path) -> None:
    pixels = some_pixels(SIZES[1])
    checksums = write_shards(tmp_path, pixels, codec)
    assert len(checksums) > SLICES
    rows = np.setdiff1d(np.arange(SLICES), ABSENT)[::-1].copy()
    out = np.empty((len(rows), SIZES[1]), np.uint8)
    with open_reader(tmp_path, codec, SIZES[1], expected_crc=checksums) as shared:
        assert shared.read(rows, out, threads=threads) == []
    np.testing.assert_array_equal(out, pixels[rows])


@EACH_CODEC
@pytest.mark.parametrize("threads", [1, 3])
def test_swapped_shards_are_an_error_if_checksums_are_expected(codec: Codec, threads: int, tmp_path: Path) -> None:
    checksums = write_shards(tmp_path, some_pixels(), codec)
    (tmp_path / "1").rename(tmp_path / "spare")
    (tmp_path / "3").rename(tmp_path / "1")
    (tmp_path / "spare").rename(tmp_path / "3")
    rows, out = np.array([0, 21, 7, 20, 22, 1]), np.empty((6, SLICE_BYTES), np.uint8)
    with open_reader(tmp_path, codec) as trusting:
        assert trusting.read(rows, out) == []
    message = (
        rf"Shard 1 \({tmp_path / '1'}\), row 7: this is not the chunk that was written here "
        rf"\(checksum 0x{int(checksums[17]):08x}, expected 0x{int(checksums[7]):08x}\)"
    )
    with (
        open_reader(tmp_path, codec, expected_crc=checksums) as checking,
        pytest.raises(CorruptionError, match=message),
    ):
        checking.read(rows, out, threads=threads)


@pytest.mark.parametrize(
    "checksums, message",
    [
        (np.zeros(SLICES - 1, np.uint32), f"a checksum for each of {SLICES} rows; got {SLICES - 1}"),
        (np.zeros(SLICES, np.int64), r"as uint32 \(n,\); got int64"),
        (np.zeros((SLICES, 1), np.uint32), r"as uint32 \(n,\); got uint32 \(23, 1\)"),
    ],
)
def test_unsuitable_checksums_are_refused(checksums: NDArray[np.uint32], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_reader(folder, expected_crc=checksums)


# --- more chunks than rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [1, 5, 18, 22])
def test_shards_may_contain_more_chunks_than_there_are_rows(
    slices: int, folder: Path, pixels: NDArray[np.uint8]
) -> None:
    """The number of rows is given: the array in the store may be longer."""
    rows = np.setdiff1d(np.arange(slices), ABSENT)
    out = np.empty((len(rows), SLICE_BYTES), np.uint8)
    with open_reader(folder, slices=slices) as shorter:
        assert shorter.read(rows, out, threads=2) == []
        np.testing.assert_array_equal(out, pixels[rows])
        with pytest.raises(IndexError, match=rf"within 0..{slices - 1}; got {slices}..{slices}"):
            shorter.read(np.array([slices]), out[:1])


# --- closing ---------------------------------------------------------------------------------------------------------


def open_files(folder: Path) -> int:
    """The number of files of ``folder`` that this process has open."""
    paths = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return sum(path.startswith(f"{folder}/") for path in paths)


def read_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("read_")}


def test_a_pool_has_as_many_threads_as_each_call_asks_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, out = np.tile([0, 1, 2, 5], 12), np.empty((48, SLICE_BYTES), np.uint8)
    barrier = threading.Barrier(1)

    def read(*asked: object, **named: object) -> ChunkFault | None:
        barrier.wait(60)  # until so many threads are in a call at once
        return read_chunks(*asked, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_reader, "read_chunks", read)
    with open_reader(folder) as shared:
        for threads in (1, 2, 5, 3, 2):
            barrier = threading.Barrier(threads)
            assert shared.read(rows, out, threads=threads) == []


def test_a_closed_reader_has_no_threads_and_no_files(folder: Path) -> None:
    rows, out = np.tile([0, 7, 12, 20], 6), np.empty((24, SLICE_BYTES), np.uint8)
    before = read_threads()
    with open_reader(folder) as shared:
        for number in (1, 2, 4):
            shared.read(rows, out, threads=number)
        assert open_files(folder) == 4
        assert read_threads() - before
    assert open_files(folder) == 0
    assert not read_threads() - before
    for number in (1, 4):
        with pytest.raises(ValueError, match="was closed: open it again"):
            shared.read(rows, out, threads=number)
    shared.close()


def test_a_reader_that_is_dropped_ends_its_threads_and_closes_its_files(folder: Path) -> None:
    rows, out = np.tile([0, 7, 12, 20], 6), np.empty((24, SLICE_BYTES), np.uint8)
    before = read_threads()
    shared = open_reader(folder)
    shared.read(rows, out, threads=4)
    assert open_files(folder) == 4
    del shared
    gc.collect()
    deadline = time.monotonic() + 60
    while open_files(folder) or read_threads() - before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_reads_in_progress_are_finished_when_a_reader_is_closed(
    folder: Path, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, closing = threading.Event(), threading.Event()

    def read(*asked: object, **named: object) -> ChunkFault | None:
        started.set()
        assert closing.wait(60)
        return read_chunks(*asked, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_reader, "read_chunks", read)
    rows, out = np.tile([0, 7, 12, 20], 6), np.empty((24, SLICE_BYTES), np.uint8)
    shared = open_reader(folder)
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(shared.read, rows, out, threads=2)
        assert started.wait(60)
        closed = pool.submit(shared.close)
        while not shared._closed:
            time.sleep(0.001)
        closing.set()
        assert reading.result(60) == []
        closed.result(60)
    np.testing.assert_array_equal(out, pixels[rows])
