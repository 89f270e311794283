"""Zip archives, valid and invalid ones, and the scan's lines for their members."""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from ich_prep.sources import Source

UNIX, WINDOWS = 3, 0


@dataclass
class Raw:
    """A member to write, whose headers may contradict its data."""

    name: bytes
    data: bytes = b"content"
    method: int = 8
    flags: int = 0
    made_on: int = UNIX
    mode: int = 0o100644
    size: int | None = None
    compressed_size: int | None = None
    crc32: int | None = None
    extra: bytes = b""
    local_extra: bytes = b""
    offset: int | None = None
    local_method: int | None = None
    zip64: bool = False


def deflate(data: bytes) -> bytes:
    """Return ``data`` as a raw deflate stream."""
    deflater = zlib.compressobj(9, wbits=-15)
    return deflater.compress(data) + deflater.flush()


def raw_zip(members: list[Raw], *, before: bytes = b"", zip64_end: bool = False, count: int | None = None) -> bytes:
    """Return an archive of exactly these members."""
    body, directory = bytearray(before), bytearray()
    for member in members:
        payload = deflate(member.data) if member.method == 8 else member.data
        crc32 = zlib.crc32(member.data) if member.crc32 is None else member.crc32
        size = len(member.data) if member.size is None else member.size
        compressed_size = len(payload) if member.compressed_size is None else member.compressed_size
        offset = len(body) - len(before) if member.offset is None else member.offset
        extra, numbers = member.extra, (compressed_size, size)
        written_offset = offset
        if member.zip64:
            extra += struct.pack("<HHQQQ", 1, 24, size, compressed_size, offset)
            numbers, written_offset = (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF
        method = member.method if member.local_method is None else member.local_method
        lengths = len(member.name), len(member.local_extra)
        body += struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 45, member.flags, method, 0, 0, crc32, 0, 0, *lengths)
        body += member.name + member.local_extra + payload
        fields = (45, member.made_on, 45, member.flags, member.method, 0, 0, crc32, *numbers)
        directory += struct.pack("<4sBBHHHHHIII", b"PK\x01\x02", *fields)
        rest = (len(member.name), len(extra), 3, 0, 0, member.mode << 16, written_offset)
        directory += struct.pack("<HHHHHII", *rest) + member.name + extra + b"why"
    number = len(members) if count is None else count
    begin = len(body) - len(before)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, number, number, len(directory), begin, 4) + b"note"
    if zip64_end:
        at = len(body) + len(directory)
        record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, number, number, len(directory), begin)
        nowhere = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        end = record + struct.pack("<4sIQI", b"PK\x06\x07", 0, at, 1) + nowhere
    return bytes(body + directory + end)


def zipped(tree: Path, archive: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Return ``archive``, with all files below ``tree``."""
    with zipfile.ZipFile(archive, "w", method) as file:
        for path in sorted(tree.rglob("*")):
            file.write(path, path.relative_to(tree))
    return archive


def content(source: Source) -> dict[str, bytes | str]:
    """Return the content of each file of a source, or the reason why it cannot be read."""
    found: dict[str, bytes | str] = {}
    for line in source.list().files.to_pylist():
        path = line["path"].decode(errors="backslashreplace")
        if line["reason"] is not None:
            found[path if path not in found else f"{path} again"] = line["reason"]
            continue
        buffer = bytearray(source.size(line["key"]))
        got = source.read_into(line["key"], [buffer], verify=True)
        found[path] = bytes(buffer[:got])
    return found
