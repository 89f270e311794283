"""Headers that cost pydicom minutes or gigabytes cost one file."""

from __future__ import annotations

import os
import resource
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ich_prep.dicom import slow_header
from ich_prep.dicom.elements import DEFLATED_LE, EXPLICIT_BE
from ich_prep.dicom.header import read_header
from ich_prep.errors import Reason, SliceError

SliceBytes = Callable[..., bytes]


def empty_elements(count: int) -> bytes:
    """So many private elements without a value, explicit VR little endian, in the order of their tags."""
    number = np.arange(count, dtype=np.uint32)
    elements = np.empty(count, np.dtype("<u2, <u2, S2, <u2"))
    elements["f0"], elements["f1"] = 0x0021 + 2 * (number >> 16), number & 0xFFFF
    elements["f2"], elements["f3"] = b"LO", 0
    return elements.tobytes()


def with_many(data: bytes, many: bytes) -> bytes:
    """The file with ``many`` elements before group 0028."""
    at = data.index(b"\x28\0\x02\0US")
    return data[:at] + many + data[at:]


def deflated(data: bytes, many: bytes) -> bytes:
    start = 144 + struct.unpack_from("<I", data, 140)[0]
    deflater = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    body = with_many(zlib.decompress(data[start:], wbits=-zlib.MAX_WBITS), many)
    return data[:start] + deflater.compress(body) + deflater.flush()


@pytest.mark.parametrize("kind", ["plain", "deflated"])
def test_very_many_elements_cost_one_file(
    kind: str, slice_bytes: SliceBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_header, "SECONDS_PER_HEADER", 1.0)
    many = empty_elements(500_000)
    if kind == "plain":
        data = with_many(slice_bytes(), many)
    else:
        data = deflated(slice_bytes(syntax=DEFLATED_LE), many)
    (tmp_path / "slice.dcm").write_bytes(data)
    with pytest.raises(SliceError) as caught:
        read_header(tmp_path / "slice.dcm")
    assert caught.value.reason == Reason.DECODER_DIED
    (tmp_path / "next.dcm").write_bytes(slice_bytes(syntax=EXPLICIT_BE))
    monkeypatch.undo()
    assert read_header(tmp_path / "next.dcm").rows == 3


def test_memory_is_limited(slice_bytes: SliceBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_header, "SECONDS_PER_HEADER", 200.0)
    (tmp_path / "small.dcm").write_bytes(slice_bytes(syntax=EXPLICIT_BE))
    assert read_header(tmp_path / "small.dcm").rows == 3
    process = slow_header._reader._process
    assert process is not None
    assert resource.prlimit(process.pid, resource.RLIMIT_AS) == (slow_header.MEMORY_LIMIT,) * 2
    pages = int(Path(f"/proc/{process.pid}/statm").read_text(encoding="ascii").split()[0])
    less = pages * resource.getpagesize() + (24 << 20)  # a lower limit, so that the test is quick
    resource.prlimit(process.pid, resource.RLIMIT_AS, (less, less))
    (tmp_path / "slice.dcm").write_bytes(with_many(slice_bytes(), empty_elements(150_000)))
    with pytest.raises(SliceError, match=r"memory|exit status") as caught:
        read_header(tmp_path / "slice.dcm")
    assert caught.value.reason == Reason.DECODER_DIED


def test_deep_nesting_costs_one_file(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    data = slice_bytes()
    at = data.index(b"\x08\0\x60\0CS")
    opened = (b"\x08\0\x12\x21SQ\0\0" + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + b"\xff" * 4) * 20_000
    (tmp_path / "slice.dcm").write_bytes(data[:at] + opened + data[at:])
    with pytest.raises(SliceError):
        read_header(tmp_path / "slice.dcm")


def test_a_reading_process_that_died_is_replaced(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "slice.dcm"
    path.write_bytes(slice_bytes(syntax=EXPLICIT_BE))
    assert read_header(path).rows == 3
    process = slow_header._reader._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert read_header(path).rows == 3


def test_a_long_header_is_sent_in_parts(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "slice.dcm"
    note = b"\x21\0\x01\0LT" + struct.pack("<H", 60_000) + b"x" * 60_000
    notes = b"".join(note[:2] + struct.pack("<H", number) + note[4:] for number in range(1, 30))
    path.write_bytes(with_many(slice_bytes(), notes))
    found = read_header(path)
    assert (found.rows, found.pixel_offset) == (3, path.stat().st_size - 24)
