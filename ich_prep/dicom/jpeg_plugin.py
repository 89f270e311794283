"""pydicom plugin for imagecodecs: JPEG, JPEG lossless and JPEG-LS frames -> pixel bytes.

Follows pydicom's decoder plugin interface: a module and the name of a function in it.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
_END_OF_IMAGE = b"\xff\xd9"
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")


@cache  # a scan asks once per file, and the lookup searches the whole path
def is_available(uid: str) -> bool:
    """Return whether frames of the transfer syntax ``uid`` can be decoded here."""
    return uid in DECODER_DEPENDENCIES and importlib.util.find_spec("imagecodecs") is not None


def decode_frame(source: bytes, runner: DecodeRunner) -> bytearray:
    """Return the pixels of one encoded frame as bytes, little endian, as wide as the codec stored them."""
    from imagecodecs import jpeg8_decode, jpegls_decode

    # Both decoders silently fill in what a truncated stream lacks. Some encoders add fill bytes behind the marker.
    if not source.rstrip(b"\0\xff").endswith(_END_OF_IMAGE):
        raise ValueError("expected the marker of the end of the image, the frame is truncated")
    decode = jpegls_decode if runner.transfer_syntax in _JPEG_LS else jpeg8_decode
    pixels = decode(source)
    if pixels.shape != (runner.rows, runner.columns):
        raise ValueError(f"expected {runner.rows} x {runner.columns} pixels, the frame holds {pixels.shape}")
    runner.set_option("bits_allocated", 8 * pixels.dtype.itemsize)
    return bytearray(pixels.tobytes())
