"""The compiled library: slices to frames and back, many chunks in one call, words to window codes.

Its source is in ``native/``, what each function promises in ``native/ich.h``. None of them holds Python's lock. Memory is
the caller's, and what the caller hands over is checked here: a function in C believes what it is told.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_prep.errors import IchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_WINDOWS = 4  # in one table


class Codec(IntEnum):
    """What ``read_chunks`` does with a chunk once its checksum fits."""

    NONE = 0  # copy it
    LZ4 = 1  # decode it
    OTHER = 2  # leave it as it is, checksum and all


class Fault(IntEnum):
    """What can be wrong with a chunk; a negative number is an errno."""

    ENDS_EARLY = 1
    CHECKSUM = 2
    LENGTH = 3
    FRAME = 4


_WORDS = {
    Fault.ENDS_EARLY: "it ends early",
    Fault.CHECKSUM: "its checksum does not fit",
    Fault.LENGTH: "expected {expected} bytes, found {found}",
    Fault.FRAME: "it is no blosc frame of lz4",
}

_Pointer, _Size = ctypes.c_void_p, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "ich_crc32c": ([ctypes.c_uint32, _Pointer, _Size], ctypes.c_uint32),
    "ich_frame_room": ([_Size] * 3, _Size),
    "ich_encode_scratch": ([_Size], _Size),
    "ich_encode": ([_Pointer, _Size, _Size, _Size, _Size, _Pointer, _Pointer], _Size),
    "ich_decode": ([_Pointer, _Size, _Pointer, _Size, _Pointer], ctypes.c_int),
    "ich_windows": ([_Pointer, _Size, _Pointer, ctypes.c_int, _Pointer], None),
    "ich_chunk_room": ([ctypes.c_int, _Size], _Size),
    "ich_read": (
        [_Pointer, ctypes.c_int64, ctypes.c_int, _Pointer, _Size, _Pointer, _Size, _Pointer, _Pointer],
        ctypes.c_int,
    ),
}


@cache
def _library() -> ctypes.CDLL:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            library = ctypes.CDLL(str(path))
            for name, (arguments, result) in _SIGNATURES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, result
            return library
    raise IchError(
        f"Expected the compiled library of this package in {Path(__file__).parent}, for this Python; found none. Install "
        "the package with pip, which compiles it: `pip install .` (or `make venv`) in its folder."
    )


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def crc32c(data: NDArray[np.uint8]) -> int:
    """Return the CRC-32C of ``data``, uint8 (n,), C-contiguous."""
    return int(_library().ich_crc32c(0, _address(_contiguous(data)), data.nbytes))


class FrameEncoder:
    """Makes blosc frames (lz4, byte shuffle) of slices of one ``shape`` and ``dtype`` (1 or 2 bytes), in one buffer.

    Blocks are whole rows, ``block_bytes`` of them. Equal pixels give equal frames, which any reader of blosc can decode.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], block_bytes: int) -> None:
        if dtype.itemsize not in (1, 2) or block_bytes % (shape[-1] * dtype.itemsize):
            raise ValueError(
                f"Expected items of 1 or 2 bytes in blocks of whole rows; got {dtype} in {block_bytes} bytes."
            )
        self._shape, self._dtype, self._block = shape, dtype, block_bytes
        self._bytes = int(np.prod(shape)) * dtype.itemsize
        self._out = np.empty(_library().ich_frame_room(self._bytes, block_bytes, dtype.itemsize), np.uint8)
        self._scratch = np.empty(_library().ich_encode_scratch(block_bytes), np.uint8)

    def encode(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the frame of ``pixels``, C-contiguous, valid until the next call: uint8 (n,)."""
        if pixels.shape != self._shape or pixels.dtype != self._dtype:
            raise ValueError(f"Expected {self._dtype} of shape {self._shape}; got {pixels.dtype} of {pixels.shape}.")
        item = self._dtype.itemsize
        length = _library().ich_encode(
            _address(_contiguous(pixels)),
            self._bytes,
            item,
            self._shape[-1] * item,
            self._block,
            _address(self._out),
            _address(self._scratch),
        )
        return self._out[:length]


def decode_frame(frame: NDArray[np.uint8], out: NDArray[np.uint8]) -> bool:
    """Inflate ``frame``, uint8 (n,), into ``out``, uint8 (slice_bytes,); return whether it is a frame of so many bytes.

    A damaged frame harms nothing but ``out``.
    """
    scratch = np.empty(out.nbytes, np.uint8)
    return not _library().ich_decode(
        _address(_contiguous(frame)), frame.nbytes, _address(_writeable(out)), out.nbytes, _address(scratch)
    )


@dataclass(frozen=True)
class ChunkFault:
    """Which of the requests of a call has what wrong with it."""

    request: int
    what: str


def scratch_bytes(codec: Codec, *, longest_chunk: int, slice_bytes: int) -> int:
    """Return how much scratch ``read_chunks`` needs for chunks of up to ``longest_chunk`` bytes."""
    if codec == Codec.OTHER:
        return 0
    return int(_library().ich_chunk_room(codec, longest_chunk)) + slice_bytes


def read_chunks(
    requests: NDArray[np.int64], codec: Codec, *, out: NDArray[np.uint8], slice_bytes: int, scratch: NDArray[np.uint8]
) -> ChunkFault | None:
    """Read chunks, compare their checksums and decode each into its place; return what is wrong with one, or None.

    ``requests``, int64 (n, 4): descriptor of an open file, first byte, length with checksum, and where in ``out``,
    uint8 (m,), the slice goes (with ``Codec.OTHER`` the chunk). Chunks that lie in memory are read while the disk fetches
    the others. ``scratch``, uint8, is as long as ``scratch_bytes`` says.
    """
    lengths, places = requests[:, 2], requests[:, 3]
    longest = int(lengths.max())
    ends = places + (lengths if codec == Codec.OTHER else slice_bytes)
    needed = scratch_bytes(codec, longest_chunk=longest, slice_bytes=slice_bytes)
    if int(places.min()) < 0 or int(lengths.min()) < 0 or int(ends.max()) > out.nbytes or needed > scratch.nbytes:
        raise ValueError(
            f"Expected room for {int(ends.max())} bytes and {needed} of scratch; got {out.nbytes} and {scratch.nbytes}."
        )
    late, trouble = np.empty(len(requests), np.uint8), np.zeros(3, np.int64)
    failed = _library().ich_read(
        _address(_contiguous(requests)),
        len(requests),
        codec,
        _address(_writeable(out)),
        slice_bytes,
        _address(_writeable(scratch)),
        max(0, needed - slice_bytes),
        _address(late),
        _address(trouble),
    )
    if not failed:
        return None
    request, fault, found = trouble.tolist()
    if fault < 0:
        return ChunkFault(request, f"it cannot be read: {os.strerror(-fault)}")
    return ChunkFault(request, _WORDS[Fault(fault)].format(expected=slice_bytes, found=found))


def window_codes_by_table(words: NDArray[np.uint16], table: NDArray[np.uint32], *, out: NDArray[np.uint8]) -> None:
    """Write byte w of the table's entry for each of ``words``, (rows, columns), into plane w of ``out``.

    ``table``: uint32 (65536,). ``out``: uint8 (w, rows, columns), up to four planes.
    """
    if words.dtype != np.uint16 or table.dtype != np.uint32 or table.shape != (65536,) or len(out) > MOST_WINDOWS:
        raise ValueError("Expected uint16 words, a table of 65,536 uint32 and up to four planes.")
    if out.shape != (len(out), *words.shape) or out.dtype != np.uint8:
        raise ValueError(
            f"Expected out to be uint8 of shape (windows, *{words.shape}); got {out.dtype} of {out.shape}."
        )
    _library().ich_windows(
        _address(_contiguous(words)), words.size, _address(_contiguous(table)), len(out), _address(_writeable(out))
    )


def _contiguous(array: NDArray[Any]) -> NDArray[Any]:
    if not array.flags.c_contiguous:
        raise ValueError(f"Expected a C-contiguous array; got shape {array.shape} with strides {array.strides}.")
    return array


def _writeable(array: NDArray[Any]) -> NDArray[Any]:
    if not array.flags.writeable:
        raise ValueError("Expected memory that may be written to; got a read-only array.")
    return _contiguous(array)
