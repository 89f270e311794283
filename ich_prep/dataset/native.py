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

INTERFACE = 1  # ICH_INTERFACE of ich.h
MOST_WINDOWS = 4  # in one table
MOST_BYTES = (1 << 31) - 17  # of a slice: BLOSC_MAX_BUFFERSIZE of c-blosc


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
    "ich_interface": ([], ctypes.c_int),
    "ich_crc32c": ([ctypes.c_uint32, _Pointer, _Size], ctypes.c_uint32),
    "ich_frame_room": ([_Size] * 3, _Size),
    "ich_encode_scratch": ([_Size], _Size),
    "ich_encode": ([_Pointer, _Size, _Size, _Size, _Size, _Pointer, _Pointer], _Size),
    "ich_decode": ([_Pointer, _Size, _Pointer, _Size, _Pointer], ctypes.c_int),
    "ich_windows": ([_Pointer, _Size, _Pointer, ctypes.c_int, _Pointer], None),
    "ich_read_scratch": ([ctypes.c_int, _Size, _Size], _Size),
    "ich_read": (
        [_Pointer, ctypes.c_int64, ctypes.c_int, _Pointer, _Size, _Size, _Pointer, _Pointer, _Pointer],
        ctypes.c_int,
    ),
}


@cache
def require() -> ctypes.CDLL:
    """Return the library; raises ``IchError`` where it is not there, or is not the one that this module is written for."""
    found = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name(f"_native{suffix}")).exists()]
    try:
        library = ctypes.CDLL(str(found[0]))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
        if library.ich_interface() == INTERFACE:
            return library
        what = "one of another release"
    except IndexError:
        what = "none for this Python"
    except (OSError, AttributeError) as error:
        what = f"one that cannot be used ({error})"
    raise IchError(
        f"Expected the compiled library of this release in {Path(__file__).parent}; found {what}. Install the package "
        "with "
        "pip, which compiles it: `pip install .` (or `make venv`) in its folder."
    )


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def crc32c(data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> int:
    """Return the CRC-32C of bytes, or of a C-contiguous array of them."""
    array = np.frombuffer(data, np.uint8)
    return int(require().ich_crc32c(0, _address(array), array.nbytes))


class FrameEncoder:
    """Makes blosc frames (lz4, byte shuffle) of slices of one ``shape`` and ``dtype`` (1 or 2 bytes), in one buffer.

    Blocks are whole rows, ``block_bytes`` of them. Equal pixels give equal frames, which any reader of blosc can decode.
    Raises ``ValueError`` for a shape, type or blocks that no frame can have.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], block_bytes: int) -> None:
        item, size = dtype.itemsize, int(np.prod(shape)) * dtype.itemsize
        if item not in (1, 2) or block_bytes % (shape[-1] * item) or not 0 < block_bytes <= size <= MOST_BYTES:
            raise ValueError(
                f"Expected a slice of 1 to {MOST_BYTES} bytes, of items of 1 or 2, in blocks of whole rows; got "
                f"{shape} of "
                f"{dtype} in blocks of {block_bytes} bytes."
            )
        self._shape, self._dtype, self._block = shape, dtype, block_bytes
        self._bytes = size
        self._out = np.empty(require().ich_frame_room(size, block_bytes, item), np.uint8)
        self._scratch = np.empty(require().ich_encode_scratch(block_bytes), np.uint8)

    def takes(self, pixels: NDArray[Any]) -> bool:
        """Return whether ``pixels`` are of the shape and type that this encoder is for."""
        return pixels.shape == self._shape and pixels.dtype == self._dtype

    def encode(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the frame of ``pixels``, valid until the next call: uint8 (n,).

        Raises ``ValueError`` where they are of another shape or type, or not C-contiguous.
        """
        if not self.takes(pixels):
            raise ValueError(f"Expected {self._dtype} of shape {self._shape}; got {pixels.dtype} of {pixels.shape}.")
        item = self._dtype.itemsize
        length = require().ich_encode(
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

    A damaged frame harms nothing but ``out``. Raises ``ValueError`` for memory that cannot be written to as a whole.
    """
    scratch = np.empty(out.nbytes, np.uint8)
    return not require().ich_decode(
        _address(_contiguous(frame)), frame.nbytes, _address(_writeable(out)), out.nbytes, _address(scratch)
    )


@dataclass(frozen=True)
class ChunkFault:
    """Which of the requests of a call has what wrong with it."""

    request: int
    what: str


def scratch_bytes(codec: Codec, *, longest_chunk: int, slice_bytes: int) -> int:
    """Return how much scratch ``read_chunks`` needs for chunks of up to ``longest_chunk`` bytes."""
    return int(require().ich_read_scratch(codec, longest_chunk, slice_bytes))


def read_chunks(
    requests: NDArray[np.int64], codec: Codec, *, out: NDArray[np.uint8], slice_bytes: int, scratch: NDArray[np.uint8]
) -> ChunkFault | None:
    """Read chunks, compare their checksums and decode each into its place; return what is wrong with one, or None.

    ``requests``, int64 (n, 4), n > 0: descriptor of an open file, first byte, length with checksum, and where in ``out``,
    uint8 (m,), the slice goes (with ``Codec.OTHER`` the chunk). Chunks that lie in memory are read while the disk fetches
    the others. ``scratch``, uint8, is as long as ``scratch_bytes`` says. Raises ``ValueError`` where memory is too small.
    """
    if requests.dtype != np.int64 or requests.shape[1:] != (4,):
        raise ValueError(f"Expected requests as int64 (n, 4); got {requests.dtype} of {requests.shape}.")
    lengths, places = requests[:, 2], requests[:, 3]
    longest = int(lengths.max())
    needed = scratch_bytes(codec, longest_chunk=longest, slice_bytes=slice_bytes)
    room = out.nbytes - (lengths if codec == Codec.OTHER else slice_bytes)
    if int(lengths.min()) < 0 or int(places.min()) < 0 or (places > room).any() or needed > scratch.nbytes:
        raise ValueError(
            f"Expected room for each chunk in {out.nbytes} bytes, and {needed} bytes of scratch; got {scratch.nbytes}."
        )
    late, trouble = np.empty(len(requests), np.uint8), np.zeros(3, np.int64)
    failed = require().ich_read(
        _address(_contiguous(requests)),
        len(requests),
        codec,
        _address(_writeable(out)),
        slice_bytes,
        longest,
        _address(_writeable(scratch)),
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

    ``table``: uint32 (65536,). ``out``: uint8 (w, rows, columns), up to four planes. Raises ``ValueError`` for others.
    """
    if words.dtype != np.uint16 or table.dtype != np.uint32 or table.shape != (65536,) or len(out) > MOST_WINDOWS:
        raise ValueError("Expected uint16 words, a table of 65,536 uint32 and up to four planes.")
    if out.shape != (len(out), *words.shape) or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(
            f"Expected out to be uint8 {(len(out), *words.shape)}, C-contiguous; got {out.dtype} {out.shape}."
        )
    require().ich_windows(
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
