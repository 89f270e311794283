"""Deflate streams -> bytes, up to a given number (RFC 1951, RFC 1952)."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterable
from typing import Any

from ich_prep.errors import Reason, SliceError


def _fastest() -> Any:
    """Return ISA-L's replacement for zlib, twice as fast, if it is installed (x86-64 and ARM), else zlib."""
    try:
        return importlib.import_module("isal.isal_zlib")
    except ImportError:
        return zlib


_engine = _fastest()
RAW, GZIP = -15, 31  # zlib's codes for the formats: window bits


def crc32(buffers: Iterable[Any]) -> int:
    """Return the CRC-32 of ``buffers``, one after the other (ISO 3309, as zip and gzip use it)."""
    value = 0
    for buffer in buffers:
        value = _engine.crc32(buffer, value)
    return value


def inflate_first(chunks: Iterable[bytes], length: int, *, wbits: int) -> bytes:
    """Return the first ``length`` bytes of a stream given in ``chunks``; fewer if it ends earlier.

    Raises ``SliceError`` (BAD_ARCHIVE).
    """
    inflater = zlib.decompressobj(wbits=wbits)  # faster for a few kilobytes: ISA-L takes longer to start
    parts: list[bytes] = []
    missing = length
    try:
        for chunk in chunks:
            part = inflater.decompress(chunk, missing)
            parts.append(part)
            missing -= len(part)
            if missing == 0 or inflater.eof:
                break
    except zlib.error as error:
        raise SliceError(Reason.BAD_ARCHIVE, f"damaged deflate stream: {error}") from None
    return b"".join(parts)


def inflate_whole(data: bytes, size: int, *, wbits: int) -> bytes:
    """Return the ``size`` bytes that ``data`` inflates to; raises ``SliceError`` (BAD_ARCHIVE) for another size.

    The checksum of a gzip stream is verified too.
    """
    inflater = _engine.decompressobj(wbits=wbits)
    try:
        inflated: bytes = inflater.decompress(data, size + 1)
    except _engine.error as error:
        raise SliceError(Reason.BAD_ARCHIVE, f"damaged deflate stream: {error}") from None
    if len(inflated) != size or not inflater.eof:
        found = "more" if len(inflated) > size else f"{len(inflated):,}"
        raise SliceError(Reason.BAD_ARCHIVE, f"expected {size:,} bytes after inflating, found {found}")
    if inflater.unused_data.strip(b"\0"):
        raise SliceError(Reason.BAD_ARCHIVE, "expected one deflate stream, found data after its end")
    return inflated
