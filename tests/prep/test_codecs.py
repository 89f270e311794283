"""Codecs: encoding and decoding round-trip, and the metadata is what zarr-python would write."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import zarr.codecs
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc

from ich_prep.dataset.codecs import CODECS, LZ4, MAX_BLOCK_BYTES, NONE, ZSTD, Codec, block_bytes
from ich_prep.dataset.native import ChunkCodec
from ich_prep.dataset.spec import Spec
from ich_prep.errors import CorruptionError
from tests.support.images import SHAPES, picture

EACH_CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))


def test_codecs_are_those_that_a_spec_may_name() -> None:
    assert set(CODECS) == set(get_args(Spec.model_fields["codec"].annotation))
    assert all(codec.name == name for name, codec in CODECS.items())


@given(
    codec=st.sampled_from(list(CODECS.values())),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([np.uint8, np.int16]),
    seeds=st.lists(st.integers(0, 10_000), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_encode_and_decode_round_trip(codec: Codec, shape: tuple[int, ...], dtype: type, seeds: list[int]) -> None:
    encode = codec.encoder(shape, np.dtype(dtype))
    for pixels in (picture(shape, dtype, seed) for seed in seeds):
        payload = encode(pixels)
        assert payload.dtype == np.uint8
        out = np.full(pixels.nbytes, 255, np.uint8)
        codec.decode(payload, out=out)
        assert out.tobytes() == pixels.tobytes()
        if codec is not NONE:
            assert blosc.decompress(payload.tobytes()) == pixels.tobytes()


@EACH_CODEC
@pytest.mark.parametrize("more", [-1, 1, 400])
def test_a_payload_of_another_length_is_an_error(codec: Codec, more: int) -> None:
    pixels = picture((1, 40, 40), np.uint8, 0)
    payload = codec.encoder(pixels.shape, pixels.dtype)(pixels)
    with pytest.raises(CorruptionError, match=f"expected {1600 + more} bytes, found 1600"):
        codec.decode(payload, out=np.empty(1600 + more, np.uint8))


@pytest.mark.parametrize(("codec", "message"), [(LZ4, "not a valid LZ4 blosc frame"), (ZSTD, "blosc: ")])
def test_an_invalid_payload_is_an_error(codec: Codec, message: str) -> None:
    payload = np.zeros(60, np.uint8)
    payload[4:8] = np.frombuffer((1600).to_bytes(4, "little"), np.uint8)
    with pytest.raises(CorruptionError, match=message):
        codec.decode(payload, out=np.empty(1600, np.uint8))


@EACH_CODEC
@pytest.mark.parametrize("dtype", [np.dtype(np.uint8), np.dtype(np.int16)])
def test_the_metadata_is_that_of_zarr(codec: Codec, dtype: np.dtype[Any]) -> None:
    shape = (3, 512, 512)
    metadata = codec.zarr_metadata(shape, dtype)
    if codec is NONE:
        assert metadata == []
        return
    by_zarr = zarr.codecs.BloscCodec(
        cname=codec.name,
        clevel=codec.blosc_level or 0,
        shuffle="shuffle",
        typesize=dtype.itemsize,
        blocksize=block_bytes(shape, dtype.itemsize),
    )
    assert metadata == [by_zarr.to_dict()]


@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 700), st.integers(1, 700)), item_bytes=st.sampled_from([1, 2]))
def test_blocks_are_whole_rows_that_fit_in_the_cache(shape: tuple[int, ...], item_bytes: int) -> None:
    size, row = block_bytes(shape, item_bytes), shape[-1] * item_bytes
    assert size % row == 0
    assert row <= size <= MAX_BLOCK_BYTES
    total = int(np.prod(shape)) * item_bytes
    blocks = -(-total // size)
    assert blocks == -(-(total // row) // (MAX_BLOCK_BYTES // row))  # as few as possible
    assert size * blocks - total < blocks * row  # of about equal size


def test_the_native_reader_decodes_all_codecs_except_zstd() -> None:
    kinds = {codec.name: codec.native for codec in CODECS.values()}
    assert kinds == {"lz4": ChunkCodec.LZ4, "zstd": ChunkCodec.UNDECODED, "none": ChunkCodec.RAW}
