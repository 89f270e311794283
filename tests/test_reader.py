"""The reader of shards: any rows in any order, by any number of threads; damage is an error that names its place."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep import reader
from ich_prep.errors import CorruptionError
from ich_prep.reader import ShardReader
from ich_prep.sharding import CODECS, ShardWriter, index_bytes

SLICES, PER_SHARD, SLICE_BYTES = 23, 5, 96
HOLES = (3, 4, 11)


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    """Slices of noise, so that no two are alike and their chunks differ in length."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (SLICES, SLICE_BYTES), np.uint8)
    values[::3, 20:] = 0
    return values


def write_shards(folder: Path, pixels: NDArray[np.uint8], codec: str) -> None:
    for number in range(-(-SLICES // PER_SHARD)):
        with open(folder / str(number), "wb", buffering=0) as file:
            writer = ShardWriter(file, PER_SHARD, codec)
            for row in range(number * PER_SHARD, min(SLICES, (number + 1) * PER_SHARD)):
                if row in HOLES:
                    writer.skip()
                else:
                    writer.append(pixels[row])
            writer.finish()


def open_reader(folder: Path, codec: str = "lz4") -> ShardReader:
    return ShardReader(
        lambda shard: folder / str(shard),
        slices=SLICES,
        slice_bytes=SLICE_BYTES,
        slices_per_shard=PER_SHARD,
        codec=codec,
    )


@pytest.fixture(scope="module", params=CODECS)
def opened(
    request: pytest.FixtureRequest, pixels: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory
) -> ShardReader:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, pixels, request.param)
    return open_reader(folder, request.param)


@pytest.fixture
def folder(tmp_path: Path, pixels: NDArray[np.uint8]) -> Path:
    write_shards(tmp_path, pixels, "lz4")
    return tmp_path


ROWS = st.lists(st.integers(0, SLICES - 1), max_size=60)


@given(rows=ROWS, threads=st.integers(1, 4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rows_in_any_order(rows: list[int], threads: int, opened: ShardReader, pixels: NDArray[np.uint8]) -> None:
    out = np.full((len(rows), SLICE_BYTES), 255, np.uint8)
    holes = opened.read(np.array(rows, np.int64), out, threads=threads)
    assert sorted(holes) == sorted(row for row in rows if row in HOLES)
    for line, row in zip(out, rows, strict=True):
        # What is a hole leaves its line as it was: it is never zeros.
        np.testing.assert_array_equal(line, 255 if row in HOLES else pixels[row])


def test_short_reads_of_one_shard_are_joined_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, folder: Path, pixels: NDArray[np.uint8]
) -> None:
    monkeypatch.setattr(reader, "LONGEST_READ", 100)  # less than two chunks
    rows = np.array([0, 1, 2, 2, 1, 0, 5, 6, 7, 22], np.int64)
    out = np.empty((len(rows), SLICE_BYTES), np.uint8)
    assert open_reader(folder).read(rows, out) == []
    np.testing.assert_array_equal(out, pixels[rows])


def test_many_threads_of_the_caller_share_one_reader(folder: Path, pixels: NDArray[np.uint8]) -> None:
    shared = open_reader(folder)
    there = np.setdiff1d(np.arange(SLICES), HOLES)

    def read(seed: int) -> bool:
        rows = np.random.default_rng(seed).choice(there, 40)
        out = np.empty((40, SLICE_BYTES), np.uint8)
        shared.read(rows, out, threads=2)
        return bool((out == pixels[rows]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))


def test_shards_are_closed_when_many_are_open(
    monkeypatch: pytest.MonkeyPatch, folder: Path, pixels: NDArray[np.uint8]
) -> None:
    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    small = open_reader(folder)
    before = len(list(Path("/proc/self/fd").iterdir()))
    rows = np.setdiff1d(np.arange(SLICES), HOLES)
    out = np.empty((len(rows), SLICE_BYTES), np.uint8)
    for _ in range(3):
        small.read(rows, out)
        np.testing.assert_array_equal(out, pixels[rows])
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


@pytest.mark.parametrize("rows", [[-1], [SLICES], [0, SLICES], [2**40]])
def test_a_row_that_is_not_there_is_an_error(rows: list[int], opened: ShardReader) -> None:
    with pytest.raises(IndexError, match=f"0..{SLICES - 1}"):
        opened.read(np.array(rows, np.int64), np.empty((len(rows), SLICE_BYTES), np.uint8))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_flipped_byte_names_shard_and_row(threads: int, folder: Path) -> None:
    shard = folder / "1"
    data = bytearray(shard.read_bytes())
    index = np.frombuffer(bytes(data[-index_bytes(PER_SHARD) : -4]), "<u8").reshape(-1, 2)
    data[int(index[2].sum()) - 6] ^= 1  # in the chunk of row 7
    shard.write_bytes(data)
    damaged = open_reader(folder)
    with pytest.raises(CorruptionError, match=rf"Shard 1 \({shard}\), row 7: its checksum does not fit"):
        damaged.read(np.array([12, 5, 6, 7, 8, 20, 21, 22]), np.empty((8, SLICE_BYTES), np.uint8), threads=threads)
    assert damaged.read(np.array([5, 6, 8, 9]), np.empty((4, SLICE_BYTES), np.uint8)) == []


def lose_last_byte(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def flip_index(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (Path.unlink, "there is no such file"),
        (lambda shard: shard.write_bytes(b""), "expected at least 84 bytes, found 0"),
        (lambda shard: shard.write_bytes(bytes(83)), "expected at least 84 bytes, found 83"),
        (lambda shard: shard.write_bytes(bytes(500)), "checksum of its index"),
        (lose_last_byte, "checksum of its index"),
        (flip_index, "checksum of its index"),
        (lambda shard: (shard.unlink(), shard.mkdir()), "there is no such file"),
    ],
)
def test_a_shard_that_cannot_be_read_names_itself(spoil: object, said: str, folder: Path) -> None:
    spoil(folder / "2")  # type: ignore[operator]
    damaged = open_reader(folder)
    with pytest.raises(CorruptionError, match=said) as caught:
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
    with pytest.raises(CorruptionError, match="ends early"):
        shared.read(np.array([14]), out)


def test_a_shard_of_another_shape_is_an_error(folder: Path) -> None:
    with open(folder / "0", "wb", buffering=0) as file:
        writer = ShardWriter(file, PER_SHARD, "lz4")
        writer.append(np.ones(SLICE_BYTES // 2, np.uint8))
        writer.finish()
    out = np.full((1, SLICE_BYTES), 77, np.uint8)
    with pytest.raises(CorruptionError, match="row 0: expected 96 bytes, found 48"):
        open_reader(folder).read(np.array([0]), out)


def test_an_open_reader_is_not_pickled(opened: ShardReader) -> None:
    with pytest.raises(TypeError, match="open it in the other process"):
        pickle.dumps(opened)
