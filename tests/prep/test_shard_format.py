"""Shards: written chunks are read back, and every damaged byte is an error."""

from __future__ import annotations

import io
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.dataset.codecs import CODECS, LZ4, NONE, ZSTD, Codec
from ich_prep.dataset.shard_format import (
    CRC_BYTES,
    MISSING,
    ShardWriter,
    WrittenShard,
    decode_chunk,
    fingerprint,
    index_bytes,
    parse_index,
)
from ich_prep.errors import CorruptionError

SLICE = (2, 5, 3)  # (channel, y, x)
EACH_CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))


def slices(count: int, dtype: type = np.uint8, seed: int = 0) -> list[NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 120, SLICE).astype(dtype) for _ in range(count)]


def written(chunks: list[NDArray[Any] | None], *, codec: Codec, room: int) -> tuple[bytes, WrittenShard]:
    """The bytes of a shard with room for that many chunks, None a missing one; and what ``finish`` returned."""
    sink = io.BytesIO()
    writer = ShardWriter(sink, room, codec)
    for chunk in chunks:
        if chunk is None:
            writer.skip()
        else:
            writer.append(chunk)
    result = writer.finish()
    return sink.getvalue(), result


def read(shard: bytes, *, codec: Codec, room: int, dtype: type = np.uint8) -> list[NDArray[Any] | None]:
    tail = index_bytes(room)
    if len(shard) < tail:
        raise CorruptionError("too short")
    found: list[NDArray[Any] | None] = []
    for offset, length in parse_index(shard[-tail:], chunks=room, body=len(shard) - tail).tolist():
        if offset == MISSING:
            found.append(None)
            continue
        out = np.empty(SLICE, dtype)
        chunk = np.frombuffer(shard, np.uint8, length, offset)
        decode_chunk(chunk, codec=codec, out=out.reshape(-1).view(np.uint8))
        found.append(out)
    return found


def assert_same(found: list[NDArray[Any] | None], expected: list[NDArray[Any] | None], room: int) -> None:
    padded = expected + [None] * (room - len(expected))
    for one, other in zip(found, padded, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)


@given(
    codec=st.sampled_from(list(CODECS.values())),
    dtype=st.sampled_from([np.uint8, np.int16]),
    present=st.lists(st.booleans(), max_size=6),
    more=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_written_chunks_are_read_back(codec: Codec, dtype: type, present: list[bool], more: int, seed: int) -> None:
    chunks = [chunk if keep else None for chunk, keep in zip(slices(len(present), dtype, seed), present, strict=True)]
    room = max(1, len(present) + more)
    shard, result = written(chunks, codec=codec, room=room)
    assert result.size == len(shard)
    assert_same(read(shard, codec=codec, room=room, dtype=dtype), chunks, room)


@given(
    codec=st.sampled_from(list(CODECS.values())),
    at=st.integers(0, 1 << 20),
    bit=st.integers(0, 7),
    missing=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_every_flipped_bit_is_an_error(codec: Codec, at: int, bit: int, missing: bool) -> None:
    first, second, third = slices(3)
    chunks = [first, None if missing else second, third]
    shard = bytearray(written(chunks, codec=codec, room=4)[0])
    shard[at % len(shard)] ^= 1 << bit
    with pytest.raises(CorruptionError):
        read(bytes(shard), codec=codec, room=4)


@EACH_CODEC
def test_every_flipped_byte_is_an_error(codec: Codec) -> None:
    shard = written(list(slices(2)), codec=codec, room=3)[0]
    for at in range(len(shard)):
        damaged = bytearray(shard)
        damaged[at] ^= 0xFF
        with pytest.raises(CorruptionError):
            read(bytes(damaged), codec=codec, room=3)


@EACH_CODEC
def test_every_truncation_is_an_error(codec: Codec) -> None:
    shard = written(list(slices(3)), codec=codec, room=3)[0]
    for length in range(len(shard)):
        with pytest.raises(CorruptionError):
            read(shard[:length], codec=codec, room=3)
        with pytest.raises(CorruptionError):
            read(shard[length + 1 :], codec=codec, room=3)  # its beginning lost


@EACH_CODEC
def test_every_byte_too_many_is_an_error_or_changes_nothing(codec: Codec) -> None:
    chunks = list(slices(2))
    shard = written(chunks, codec=codec, room=2)[0]
    for at in range(len(shard) + 1):
        longer = shard[:at] + b"\xa5" + shard[at:]
        body = len(shard) - index_bytes(2)
        if at == body:
            assert_same(read(longer, codec=codec, room=2), chunks, 2)  # a gap between chunks and index
        else:
            with pytest.raises(CorruptionError):
                read(longer, codec=codec, room=2)


def test_the_layout_is_that_of_zarr() -> None:
    first, third = slices(2)
    shard, _ = written([first, None, third], codec=NONE, room=3)
    payload = first.tobytes()
    assert shard.startswith(payload + google_crc32c.value(payload).to_bytes(4, "little"))
    index = np.frombuffer(shard[-index_bytes(3) : -CRC_BYTES], "<u8").reshape(3, 2)
    length = first.nbytes + CRC_BYTES
    assert index.tolist() == [[0, length], [MISSING, MISSING], [length, length]]
    assert shard[-CRC_BYTES:] == google_crc32c.value(index.tobytes()).to_bytes(4, "little")


@pytest.mark.parametrize(
    "entry", [(0, 200), (100, 1), (2**63, 2**63 + 8), (MISSING - 1, 10), (0, MISSING), (0, 3), (99, 0)]
)
def test_an_index_that_points_outside_the_shard_is_an_error(entry: tuple[int, int]) -> None:
    # The checksum matches: not damage, but bytes that were never written here.
    entries = np.array([entry], "<u8").tobytes()
    data = entries + google_crc32c.value(entries).to_bytes(4, "little")
    with pytest.raises(CorruptionError, match="points outside the shard"):
        parse_index(data, chunks=1, body=100)


@EACH_CODEC
def test_a_chunk_of_another_size_is_an_error(codec: Codec) -> None:
    chunk = slices(1)[0]
    shard, _ = written([chunk], codec=codec, room=1)
    data = np.frombuffer(shard, np.uint8)[: -index_bytes(1)]
    for size in (0, chunk.nbytes - 1, chunk.nbytes + 1, 4 * chunk.nbytes):
        with pytest.raises(CorruptionError):
            decode_chunk(data, codec=codec, out=np.empty(size, np.uint8))


@pytest.mark.parametrize("codec", [LZ4, ZSTD], ids=["lz4", "zstd"])
def test_a_chunk_that_blosc_refuses_is_an_error(codec: Codec) -> None:
    for payload in (b"", b"\x02", b"\x02\x01\x01\x01", bytes(40), b"\xff" * 40):
        data = np.frombuffer(payload + google_crc32c.value(payload).to_bytes(4, "little"), np.uint8)
        with pytest.raises(CorruptionError):
            decode_chunk(data, codec=codec, out=np.empty(30, np.uint8))


class Drip:
    """A sink that takes at most seven bytes at a time, as a file near a limit does."""

    def __init__(self) -> None:
        self.taken = bytearray()

    def write(self, data: bytes | NDArray[np.uint8]) -> int:
        some = memoryview(data)[:7]
        self.taken += some
        return len(some)


@EACH_CODEC
def test_short_writes_lose_nothing(codec: Codec) -> None:
    sink = Drip()
    writer = ShardWriter(sink, 3, codec)
    for chunk in slices(2, np.int16):
        writer.append(chunk)
    result = writer.finish()
    expected, same = written(list(slices(2, np.int16)), codec=codec, room=3)
    assert (bytes(sink.taken), result.size, result.fingerprint) == (expected, same.size, same.fingerprint)


@given(
    codec=st.sampled_from(list(CODECS.values())), present=st.lists(st.booleans(), max_size=6), more=st.integers(0, 3)
)
@settings(max_examples=60, deadline=None)
def test_the_writer_returns_the_checksum_after_each_chunk(codec: Codec, present: list[bool], more: int) -> None:
    chunks = [chunk if keep else None for chunk, keep in zip(slices(len(present)), present, strict=True)]
    room = max(1, len(present) + more)
    shard, result = written(chunks, codec=codec, room=room)
    index = parse_index(shard[-index_bytes(room) :], chunks=room, body=len(shard) - index_bytes(room)).tolist()
    assert result.chunk_crc32c.dtype == np.uint32
    assert result.missing.tolist() == [offset == MISSING for offset, _ in index]
    assert result.missing.tolist() == [chunk is None for chunk in chunks] + [True] * (room - len(chunks))
    for checksum, (offset, length) in zip(result.chunk_crc32c.tolist(), index, strict=True):
        if offset == MISSING:
            assert checksum == 0
        else:
            assert checksum == int.from_bytes(shard[offset + length - CRC_BYTES : offset + length], "little")
            assert checksum == google_crc32c.value(shard[offset : offset + length - CRC_BYTES])


@EACH_CODEC
def test_a_checksum_mismatch_shows_both_values(codec: Codec) -> None:
    shard, result = written(list(slices(1)), codec=codec, room=1)
    data = np.frombuffer(shard, np.uint8)[: -index_bytes(1)].copy()
    data[0] ^= 1
    computed = google_crc32c.value(data[:-CRC_BYTES].tobytes())
    message = rf"^checksum mismatch \(stored 0x{int(result.chunk_crc32c[0]):08x}, computed 0x{computed:08x}\)$"
    with pytest.raises(CorruptionError, match=message):
        decode_chunk(data, codec=codec, out=np.empty(30, np.uint8))
    tail = bytearray(shard[-index_bytes(1) :])
    tail[3] ^= 1
    with pytest.raises(CorruptionError, match=r"^index checksum mismatch \(stored 0x[0-9a-f]{8}, computed 0x"):
        parse_index(bytes(tail), chunks=1, body=len(data))


def test_different_shards_have_different_fingerprints() -> None:
    chunks = list(slices(3))
    shard, result = written(chunks, codec=LZ4, room=4)
    tail = index_bytes(4)
    index = parse_index(shard[-tail:], chunks=4, body=len(shard) - tail)
    ends = [int(offset + length) for offset, length in index.tolist() if offset != MISSING]
    checksums = np.array([int.from_bytes(shard[end - CRC_BYTES : end], "little") for end in ends], np.uint32)
    assert fingerprint(checksums, shard[-tail:]) == result.fingerprint
    others = [[chunks[1], chunks[0], chunks[2]], chunks[:2], [None, *chunks], [chunks[0], chunks[1], chunks[2] + 1]]
    assert len({result.fingerprint, *(written(other, codec=LZ4, room=4)[1].fingerprint for other in others)}) == 5
    assert written(chunks, codec=LZ4, room=4)[1].fingerprint == result.fingerprint
