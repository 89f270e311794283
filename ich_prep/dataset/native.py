"""The compiled library: frames of slices, many chunks in one call, stored values to window codes.

The C sources are in ``native/``; ``native/ich.h`` documents each function, ``native/README.md`` the rules. Every call
releases the GIL. C trusts its arguments: buffers belong to the caller, and their sizes are checked here.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_prep.errors import IchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# As in ich.h: the version of the functions and structs, and that of the frames that they make.
INTERFACE = 3
ENCODER = 1
MAX_WINDOWS = 4  # in one table
MAX_SLICE_BYTES = (1 << 31) - 17  # BLOSC_MAX_BUFFERSIZE of c-blosc

IN_MEMORY = -1  # the ``fd`` of a request whose ``offset`` is an address

# struct ich_request: ``out_offset`` is where in ``out`` a slice goes; ``crc32c`` is compared if ``check_crc`` is 1.
REQUEST = np.dtype(
    [
        ("fd", "<i8"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("out_offset", "<i8"),
        ("crc32c", "<u4"),
        ("check_crc", "<u4"),
    ]
)
# struct ich_fault.
FAULT = np.dtype([("request", "<i8"), ("status", "<i8"), ("expected", "<i8"), ("found", "<i8")])


class ChunkCodec(IntEnum):
    """What ``read_chunks`` does with a chunk after its checksum is verified: ``enum ich_codec``."""

    RAW = 0  # copy the payload
    LZ4 = 1  # decode the payload
    UNDECODED = 2  # leave the chunk as it is, checksum included


class Status(IntEnum):
    """What is wrong with a chunk: ``enum ich_status``; a negative number is a negated errno."""

    TRUNCATED = 1
    CHECKSUM = 2
    LENGTH = 3
    FRAME = 4
    OTHER_CHUNK = 5


INVALID_FRAME = "not a valid LZ4 blosc frame"
_MESSAGES = {
    Status.TRUNCATED: "truncated: the file ends inside this chunk",
    Status.CHECKSUM: "checksum mismatch (stored 0x{expected:08x}, computed 0x{found:08x})",
    Status.LENGTH: "expected {expected} bytes, found {found}",
    Status.FRAME: INVALID_FRAME,
    Status.OTHER_CHUNK: (
        "this is not the chunk that was written here (checksum 0x{found:08x}, expected 0x{expected:08x})"
    ),
}

_Pointer, _Size = ctypes.c_void_p, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "ich_interface": ([], ctypes.c_int),
    "ich_encoder": ([], ctypes.c_int),
    "ich_request_bytes": ([], _Size),
    "ich_fault_bytes": ([], _Size),
    "ich_crc32c": ([ctypes.c_uint32, _Pointer, _Size], ctypes.c_uint32),
    "ich_frame_bound": ([_Size] * 3, _Size),
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
    """Return the library; raises ``IchError`` if it is missing or was compiled from the sources of another version."""
    path = Path(__file__).with_name("_native.so")
    if not path.exists():
        raise _unusable("it was not compiled")
    try:
        library = ctypes.CDLL(str(path))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        raise _unusable(f"{path.name} cannot be used ({error})") from None
    versions = (library.ich_interface(), library.ich_encoder())
    sizes = (library.ich_request_bytes(), library.ich_fault_bytes())
    if versions != (INTERFACE, ENCODER) or sizes != (REQUEST.itemsize, FAULT.itemsize):
        raise _unusable(
            f"{path.name} is of another version (interface and encoder {versions}, expected {(INTERFACE, ENCODER)}; "
            f"structs of {sizes} bytes, expected {(REQUEST.itemsize, FAULT.itemsize)})"
        )
    return library


def _unusable(what: str) -> IchError:
    return IchError(
        f"Cannot load the compiled library in {Path(__file__).parent}: {what}. Install the package with pip, which "
        "compiles it: `pip install .` (or `make venv`) in the project's folder."
    )


def _address(array: NDArray[Any]) -> int:
    plain = array if array.dtype.fields is None else array.view(np.uint8)  # the interface of records is slow to make
    return int(plain.__array_interface__["data"][0])


def crc32c(data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> int:
    """Return the CRC-32C of bytes, or of a C-contiguous array of them."""
    array = np.frombuffer(data, np.uint8)
    return int(require().ich_crc32c(0, _address(array), array.nbytes))


class FrameEncoder:
    """Encodes slices of one ``shape`` and ``dtype`` (1 or 2 bytes) as blosc frames (LZ4, byte shuffle), in one buffer.

    Blocks are whole rows, ``block_bytes`` long. Equal pixels give equal frames on every processor; any blosc can decode
    them. Raises ``ValueError`` for a shape, dtype or block size that a frame cannot have.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], block_bytes: int) -> None:
        item, size = dtype.itemsize, int(np.prod(shape)) * dtype.itemsize
        if item not in (1, 2) or block_bytes % (shape[-1] * item) or not 0 < block_bytes <= size <= MAX_SLICE_BYTES:
            raise ValueError(
                f"Expected a slice of 1 to {MAX_SLICE_BYTES} bytes, items of 1 or 2 bytes, and blocks of whole rows; got "
                f"{shape} {dtype} in blocks of {block_bytes} bytes."
            )
        self._shape, self._dtype, self._block = shape, dtype, block_bytes
        self._bytes = size
        self._out = np.empty(require().ich_frame_bound(size, block_bytes, item), np.uint8)
        self._scratch = np.empty(require().ich_encode_scratch(block_bytes), np.uint8)

    def encode(self, pixels: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the frame of ``pixels``, valid until the next call: uint8 (n,).

        Raises ``ValueError`` for another shape or dtype, or an array that is not C-contiguous.
        """
        if pixels.shape != self._shape or pixels.dtype != self._dtype:
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
    """Decode ``frame``, uint8 (n,), into ``out``, uint8 (slice_bytes,); return whether it is a valid frame of that size.

    An invalid frame may leave anything in ``out``, and changes no other memory. Raises ``ValueError`` if ``out`` is
    read-only or either array is not C-contiguous.
    """
    scratch = np.empty(out.nbytes, np.uint8)
    return not require().ich_decode(
        _address(_contiguous(frame)), frame.nbytes, _address(_writeable(out)), out.nbytes, _address(scratch)
    )


@dataclass(frozen=True)
class ChunkFault:
    """The first invalid chunk of a call: the index of its request, and what is wrong with it."""

    request: int
    what: str


def scratch_bytes(codec: ChunkCodec, *, max_chunk: int, slice_bytes: int) -> int:
    """Return how much scratch memory ``read_chunks`` needs for chunks of up to ``max_chunk`` bytes."""
    return int(require().ich_read_scratch(codec, max_chunk, slice_bytes))


def read_chunks(
    requests: NDArray[np.void],
    codec: ChunkCodec,
    *,
    out: NDArray[np.uint8],
    slice_bytes: int,
    scratch: NDArray[np.uint8],
) -> ChunkFault | None:
    """Read chunks, verify their checksums and decode each to its place; return the first fault, or None.

    ``requests``: ``REQUEST`` (n,), n > 0. ``out``: uint8 (m,); a slice of ``slice_bytes`` bytes (of ``UNDECODED`` chunks
    the whole chunk) goes to each ``out_offset``. ``scratch``: uint8, at least ``scratch_bytes`` long. Chunks in the page
    cache are read while the disk fetches the others. Raises ``ValueError`` if a buffer is too small.
    """
    if requests.dtype != REQUEST or requests.ndim != 1:
        raise ValueError(f"Expected requests as {REQUEST} (n,); got {requests.dtype} {requests.shape}.")
    lengths, out_offsets = requests["length"], requests["out_offset"]
    longest = int(lengths.max())
    needed = scratch_bytes(codec, max_chunk=longest, slice_bytes=slice_bytes)
    last = out.nbytes - (lengths if codec == ChunkCodec.UNDECODED else slice_bytes)
    if int(lengths.min()) < 0 or int(out_offsets.min()) < 0 or (out_offsets > last).any() or needed > scratch.nbytes:
        raise ValueError(
            f"Expected room for each chunk in {out.nbytes} bytes, and {needed} bytes of scratch; got {scratch.nbytes}."
        )
    deferred, fault = np.empty(len(requests), np.uint8), np.zeros(1, FAULT)
    failed = require().ich_read(
        _address(_contiguous(requests)),
        len(requests),
        codec,
        _address(_writeable(out)),
        slice_bytes,
        longest,
        _address(_writeable(scratch)),
        _address(deferred),
        _address(fault),
    )
    if not failed:
        return None
    request, status, expected, found = fault[0].item()
    if status < 0:
        return ChunkFault(request, f"cannot be read: {os.strerror(-status)}")
    return ChunkFault(request, _MESSAGES[Status(status)].format(expected=expected, found=found))


def mismatch(stored: int, computed: int) -> str:
    """Return the message for a checksum that does not match the bytes before it."""
    return _MESSAGES[Status.CHECKSUM].format(expected=stored, found=computed)


def window_codes_by_table(stored: NDArray[np.uint16], table: NDArray[np.uint32], *, out: NDArray[np.uint8]) -> None:
    """Write byte w of the table's entry for each stored value, (rows, columns), to plane w of ``out``.

    ``table``: uint32 (65536,). ``out``: uint8 (w, rows, columns), up to four planes. Raises ``ValueError`` for any other
    shape or dtype.
    """
    if stored.dtype != np.uint16 or table.dtype != np.uint32 or table.shape != (65536,) or len(out) > MAX_WINDOWS:
        raise ValueError("Expected uint16 stored values, a table of 65,536 uint32 and up to four planes.")
    if out.shape != (len(out), *stored.shape) or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(
            f"Expected out to be uint8 {(len(out), *stored.shape)}, C-contiguous; got {out.dtype} {out.shape}."
        )
    require().ich_windows(
        _address(_contiguous(stored)), stored.size, _address(_contiguous(table)), len(out), _address(_writeable(out))
    )


def _contiguous(array: NDArray[Any]) -> NDArray[Any]:
    if not array.flags.c_contiguous:
        raise ValueError(f"Expected a C-contiguous array; got shape {array.shape} with strides {array.strides}.")
    return array


def _writeable(array: NDArray[Any]) -> NDArray[Any]:
    if not array.flags.writeable:
        raise ValueError("Expected a writeable array; got a read-only one.")
    return _contiguous(array)
