"""The codecs of chunks: encode the pixels of a slice as a payload, and decode it.

Codecs are declared only here; ``CODECS`` finds them by the name in a spec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numcodecs import blosc

from ich_prep.dataset.native import INVALID_FRAME, ChunkCodec, FrameEncoder, decode_frame
from ich_prep.errors import CorruptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_BLOCK_BYTES = 1 << 18  # a block fits in L2
FRAME_HEADER_BYTES = 16  # of blosc 1: byte 3 is the length of an item, bytes 4 to 8 the decoded length

# Pixels of one slice -> payload, uint8 (n,), valid until the next call.
Encode = Callable[["NDArray[Any]"], "NDArray[np.uint8]"]


def block_bytes(shape: tuple[int, ...], item_bytes: int) -> int:
    """Return the block size of a slice's frame: whole rows, in as few blocks as possible, of about equal size."""
    row, rows = shape[-1] * item_bytes, int(np.prod(shape[:-1]))
    blocks = -(-rows // max(1, MAX_BLOCK_BYTES // row))
    return -(-rows // blocks) * row


@dataclass(frozen=True)
class Codec:
    """A codec of chunks.

    ``name`` is the word in a spec. ``blosc_level`` is the ``clevel`` of its Zarr metadata, None for a codec without
    blosc. ``native`` says what the compiled reader does with a chunk.
    """

    name: str
    blosc_level: int | None
    native: ChunkCodec
    _make_encoder: Callable[[tuple[int, ...], np.dtype[Any]], Encode] = field(repr=False)
    _decode: Callable[[NDArray[np.uint8], NDArray[np.uint8]], None] = field(repr=False)

    def encoder(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Encode:
        """Return a function that encodes slices of that ``shape``, (channel, y, x), and ``dtype``, C-contiguous.

        It reuses its buffer: the payload that it returns is valid until its next call.
        """
        return self._make_encoder(shape, dtype)

    def decode(self, payload: NDArray[np.uint8], *, out: NDArray[np.uint8]) -> None:
        """Decode a payload, uint8 (n,), into ``out``: the bytes of one slice, uint8 (slice_bytes,).

        Raises ``CorruptionError`` for a payload that is invalid or of another length.
        """
        # A shorter frame would leave a part of ``out`` unchanged.
        size, _ = self.decoded_form(payload, payload_bytes=payload.nbytes)
        if size != out.nbytes:
            raise CorruptionError(f"expected {out.nbytes} bytes, found {size}")
        self._decode(payload, out)

    def decoded_form(self, payload: NDArray[np.uint8], *, payload_bytes: int) -> tuple[int, int | None]:
        """Return the length in bytes of a decoded payload, uint8 (n,), and of one of its items if the payload says so.

        Of ``payload_bytes`` bytes the first ``FRAME_HEADER_BYTES`` are enough.
        """
        if self.blosc_level is None:
            return payload_bytes, None
        if payload.nbytes < FRAME_HEADER_BYTES:
            return 0, None
        return int.from_bytes(payload[4:8].data, "little"), int(payload[3])

    def zarr_metadata(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[dict[str, Any]]:
        """Return the compressors of slices of that ``shape`` and ``dtype``, as Zarr v3 metadata writes them."""
        if self.blosc_level is None:
            return []
        configuration = {
            "cname": self.name,
            "clevel": self.blosc_level,
            "shuffle": "shuffle",
            "blocksize": block_bytes(shape, dtype.itemsize),
            "typesize": dtype.itemsize,
        }
        return [{"name": "blosc", "configuration": configuration}]


def _none_encoder(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Encode:
    del shape, dtype
    return lambda pixels: pixels.reshape(-1).view(np.uint8)


def _lz4_encoder(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Encode:
    return FrameEncoder(shape, dtype, block_bytes(shape, dtype.itemsize)).encode


def _zstd_encoder(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Encode:
    blocks = block_bytes(shape, dtype.itemsize)

    def encode(pixels: NDArray[Any]) -> NDArray[np.uint8]:
        blosc.use_threads = False  # one task, one core; and equal bytes on any number of cores
        return np.frombuffer(blosc.compress(pixels, b"zstd", ZSTD.blosc_level, blosc.SHUFFLE, blocks), np.uint8)

    return encode


def _decode_none(payload: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    np.copyto(out, payload)


def _decode_lz4(payload: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    if not decode_frame(payload, out):
        raise CorruptionError(INVALID_FRAME)


def _decode_zstd(payload: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    blosc.use_threads = False  # many threads decode at once, one slice each
    try:
        blosc.decompress(payload, out)
    except (RuntimeError, ValueError) as error:
        raise CorruptionError(f"blosc: {error}") from None


# The level of lz4 is nominal: our encoder has none, and decoders ignore it. For zstd see docs/benchmarks.md: level 5 takes
# six times as long to encode, for 5% fewer bytes.
LZ4 = Codec("lz4", 5, ChunkCodec.LZ4, _lz4_encoder, _decode_lz4)
ZSTD = Codec("zstd", 1, ChunkCodec.UNDECODED, _zstd_encoder, _decode_zstd)
NONE = Codec("none", None, ChunkCodec.RAW, _none_encoder, _decode_none)

CODECS = MappingProxyType({codec.name: codec for codec in (LZ4, ZSTD, NONE)})
