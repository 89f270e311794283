"""The frame of a compressed slice in its file, and the stored values in the frame; runs in the decoding process.

The encapsulated format is that of PS3.5 A.4. Each transfer syntax has one library that decodes it.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ich_prep.dicom import jpeg_plugin
from ich_prep.dicom.elements import DEFLATED_LE
from ich_prep.dicom.pydicom_header import inflate
from ich_prep.dicom.skim import walk_meta
from ich_prep.errors import Reason, SliceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

RLE: Final = "1.2.840.10008.1.2.5"
JPEG_2000: Final = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")

_ITEM: Final = 0xE000FFFE
_DELIMITER: Final = 0xE0DDFFFE
_UNDEFINED: Final = 0xFFFFFFFF
_JP2_SIGNATURE: Final = b"\0\0\0\x0cjP  "
_JP2, _CODESTREAM = 2, 0

_word = struct.Struct("<I").unpack_from


@dataclass(frozen=True, slots=True)
class PixelRecord:
    """What the scan recorded about the pixels of one slice: their format, and the checksum of the file's header."""

    transfer_syntax: str
    file_size: int
    header_bytes: int
    crc32c: int
    pixel_offset: int
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    signed: bool


def decode_into(record: PixelRecord, data: memoryview, stored: NDArray[np.uint16]) -> None:
    """Fill ``stored`` (rows, columns) from the compressed file ``data``; signed values are in two's complement.

    Raises ``SliceError`` (SIZE_MISMATCH, TOO_LARGE, DECODE_FAILED), and whatever the library raises on damaged bytes.
    """
    if record.transfer_syntax == DEFLATED_LE:
        _read_deflated(record, bytes(data), stored)
        return
    frame = only_frame(data, record.pixel_offset)
    if record.transfer_syntax == RLE:
        bits = _decode_rle(record, frame, stored)
    elif record.transfer_syntax in JPEG_2000:
        bits = _decode_jpeg_2000(record, frame, stored)
    else:
        bits = _decode_jpeg(record, frame, stored)
    _mask(stored, bits, signed=record.signed)


# --- the frame -------------------------------------------------------------------------------------------------------


def only_frame(data: memoryview, offset: int) -> memoryview | bytes:
    """Return the one frame of the encapsulated pixels whose first item, the Basic Offset Table, is at ``offset``.

    All fragments between the table and the sequence delimiter are the frame's, unless the table says that there are more
    frames: SIZE_MISMATCH. With one frame, the Extended Offset Table only repeats where the frame begins. Raises
    DECODE_FAILED if the items are damaged or not ended.
    """
    (length,) = _word(data, offset - 4)
    end = len(data) if length == _UNDEFINED else min(offset + length, len(data))
    try:
        items = _items(data[:end], offset, must_end=length == _UNDEFINED)
    except struct.error:
        raise SliceError(
            Reason.DECODE_FAILED, "expected a sequence delimiter after the fragments, found none"
        ) from None
    if not items:
        raise SliceError(Reason.DECODE_FAILED, "expected an item with the Basic Offset Table, found none")
    (start, size), *fragments = items
    if size % 4:
        raise SliceError(
            Reason.DECODE_FAILED, f"expected offsets of 4 bytes in the Basic Offset Table, found {size} bytes"
        )
    offsets = struct.unpack_from(f"<{size // 4}I", data, start)
    frames = 1 + _frames_after_the_first(fragments, offsets)
    if frames > 1:
        raise SliceError(Reason.SIZE_MISMATCH, f"expected one frame, the Basic Offset Table divides it into {frames}")
    parts = [data[start : start + size] for start, size in fragments]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _items(data: memoryview, position: int, *, must_end: bool) -> list[tuple[int, int]]:
    """Return offset and length of the value of each item up to the delimiter; raises ``struct.error`` at the end of data."""
    items = []
    while must_end or position < len(data):
        (tag,) = _word(data, position)
        if tag == _DELIMITER:
            break
        (length,) = _word(data, position + 4)
        if tag != _ITEM or length == _UNDEFINED:
            raise SliceError(Reason.DECODE_FAILED, f"expected an item of known length at byte {position}, found none")
        if position + 8 + length > len(data):
            detail = f"expected a fragment of {length} bytes at byte {position}, found the end of the data"
            raise SliceError(Reason.DECODE_FAILED, detail)
        items.append((position + 8, length))
        position += 8 + length
    return items


def _frames_after_the_first(fragments: list[tuple[int, int]], offsets: tuple[int, ...]) -> int:
    """Return at how many fragments another frame begins; offsets count from the first fragment's item."""
    frames, at = 0, 0
    for _, length in fragments:
        if frames + 1 < len(offsets) and at >= offsets[frames + 1]:
            frames += 1
        at += 8 + length
    return frames


# --- the stored values -----------------------------------------------------------------------------------------------


def _decode_rle(record: PixelRecord, frame: memoryview | bytes, stored: NDArray[np.uint16]) -> int:
    """PS3.5 annex G."""
    from rle.rle import decode_frame

    pixels = decode_frame(bytes(frame), record.rows * record.columns, record.bits_allocated, "<")
    _widen(np.frombuffer(pixels, f"u{record.bits_allocated // 8}"), stored, signed=record.signed)
    return record.bits_stored


def _decode_jpeg_2000(record: PixelRecord, frame: memoryview | bytes, stored: NDArray[np.uint16]) -> int:
    from openjpeg.utils import decode_pixel_data, get_parameters

    stream = bytes(frame)
    found = get_parameters(io.BytesIO(stream), _JP2 if stream.startswith(_JP2_SIGNATURE) else _CODESTREAM)
    size, precision = (found["rows"], found["columns"], found["samples_per_pixel"]), int(found["precision"])
    _check_frame(record, size, precision)
    pixels = decode_pixel_data(stream, version=2)
    _widen(np.frombuffer(pixels, "u1" if precision <= 8 else "u2"), stored, signed=record.signed)
    # A stream whose sign is the header's extends it itself.
    return 16 if found["is_signed"] == record.signed else precision


def _decode_jpeg(record: PixelRecord, frame: memoryview | bytes, stored: NDArray[np.uint16]) -> int:
    """JPEG (ISO 10918-1), whose values have the bits of the header, and JPEG-LS (ISO 14495-1), where the stream says."""
    size, precision = jpeg_plugin.frame_size(frame)
    _check_frame(record, size, precision)
    if precision > 8:
        jpeg_plugin.decode(frame, record.transfer_syntax, stored)
    else:
        _widen(jpeg_plugin.decode(frame, record.transfer_syntax), stored, signed=record.signed)
    if record.transfer_syntax not in jpeg_plugin.JPEG_LS:
        return record.bits_stored
    return precision if record.signed else 16


def _check_frame(record: PixelRecord, size: tuple[object, ...], precision: int) -> None:
    expected = (record.rows, record.columns, 1)
    if size != expected or not 1 <= precision <= record.bits_allocated:
        detail = f"expected {expected} rows, columns and samples of up to {record.bits_allocated} bits"
        raise SliceError(Reason.DECODE_FAILED, f"{detail}, the frame holds {size} of {precision} bits")


def _widen(pixels: NDArray[Any], stored: NDArray[np.uint16], *, signed: bool) -> None:
    """Copy unsigned words of 8 or 16 bits to ``stored``, with the sign of 8 bits extended if they are signed."""
    kind = "i" if signed else "u"
    stored.view(f"{kind}2")[:] = pixels.view(f"{kind}{pixels.itemsize}").reshape(stored.shape)


def _mask(stored: NDArray[np.uint16], bits: int, *, signed: bool) -> None:
    """Clear the bits above the ``bits`` lowest ones, or fill them with the sign."""
    if bits < 16:
        words = stored.view(np.int16) if signed else stored
        np.left_shift(words, 16 - bits, out=words)
        np.right_shift(words, 16 - bits, out=words)


def _read_deflated(record: PixelRecord, data: bytes, stored: NDArray[np.uint16]) -> None:
    try:
        _, start = walk_meta(data)
        words = f"<u{record.bits_allocated // 8}"
        pixels = np.frombuffer(inflate(data[start:]), words, record.rows * record.columns, record.pixel_offset)
    except (struct.error, zlib.error, ValueError) as error:
        raise SliceError(Reason.DECODE_FAILED, f"deflated pixels: {error}") from None
    _widen(pixels, stored, signed=record.signed)
