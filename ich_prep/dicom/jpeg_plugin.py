"""JPEG, JPEG lossless and JPEG-LS frames -> pixels, by imagecodecs; also as a plugin of pydicom.

Follows pydicom's decoder plugin interface: a module and the name of a function in it.
"""

from __future__ import annotations

import importlib.util
import struct
from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pydicom.pixels.decoders.base import DecodeRunner

DECODER_DEPENDENCIES = dict.fromkeys(
    (
        "1.2.840.10008.1.2.4.50",  # JPEG baseline, 8 bits
        "1.2.840.10008.1.2.4.51",  # JPEG extended, 12 bits
        "1.2.840.10008.1.2.4.57",  # JPEG lossless
        "1.2.840.10008.1.2.4.70",  # JPEG lossless, first-order prediction
        "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
        "1.2.840.10008.1.2.4.81",  # JPEG-LS near-lossless
    ),
    ("imagecodecs",),
)
JPEG_LS: Final = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_END_OF_IMAGE: Final = b"\xff\xd9"
_FILL: Final = b"\0\xff"
# Start of frame: SOF0 to SOF15 without DHT, JPG and DAC (ISO 10918-1 table B.1), and JPEG-LS (ISO 14495-1 annex C).
_START_OF_FRAME: Final = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
_START_OF_IMAGE: Final = 0xD8


@cache  # a scan asks once per file, and the lookup searches the whole path
def is_available(uid: str) -> bool:
    """Return whether frames of the transfer syntax ``uid`` can be decoded here."""
    return uid in DECODER_DEPENDENCIES and importlib.util.find_spec("imagecodecs") is not None


def frame_size(frame: bytes | memoryview) -> tuple[tuple[int, int, int], int]:
    """Return rows, columns and samples of the frame, and the bits of a sample, by its start-of-frame segment.

    Raises ``ValueError`` if there is none before the pixels.
    """
    position = 0
    try:
        while True:
            while frame[position] == 0xFF and frame[position + 1] == 0xFF:  # fill bytes, ISO 10918-1 B.1.1.2
                position += 1
            prefix, marker = frame[position], frame[position + 1]
            if marker in _START_OF_FRAME and prefix == 0xFF:
                bits, rows, columns, samples = struct.unpack_from(">BHHB", frame, position + 4)
                return (rows, columns, samples), bits
            if prefix != 0xFF or marker == 0xDA:
                break
            position += 2
            if marker != _START_OF_IMAGE:
                position += struct.unpack_from(">H", frame, position)[0]
    except (IndexError, struct.error):
        pass
    raise ValueError("expected the start of a JPEG frame, found none")


def decode(frame: bytes | memoryview, transfer_syntax: str, out: NDArray[np.uint16] | None = None) -> NDArray[Any]:
    """Return the pixels of one encoded frame, unsigned, as wide as the codec stored them; in ``out`` if given.

    Raises ``ValueError`` if the frame is truncated, and what imagecodecs raises.
    """
    from imagecodecs import jpeg8_decode, jpegls_decode

    # Both decoders silently fill in what a truncated stream lacks. Some encoders write fill bytes around the last marker.
    if not bytes(frame).rstrip(_FILL).endswith(_END_OF_IMAGE):
        raise ValueError("expected the marker of the end of the image, the frame is truncated")
    pixels: NDArray[Any]
    pixels = (jpegls_decode if transfer_syntax in JPEG_LS else jpeg8_decode)(frame, out=out)  # type: ignore[arg-type]
    return pixels


def decode_frame(source: bytes, runner: DecodeRunner) -> bytearray:
    """Return the pixels of one encoded frame as bytes, little endian, as wide as the codec stored them."""
    pixels = decode(source, runner.transfer_syntax)
    if pixels.shape != (runner.rows, runner.columns):
        raise ValueError(f"expected {runner.rows} x {runner.columns} pixels, the frame holds {pixels.shape}")
    runner.set_option("bits_allocated", 8 * pixels.dtype.itemsize)
    return bytearray(pixels.tobytes())
