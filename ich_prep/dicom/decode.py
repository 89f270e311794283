"""One DICOM file -> stored values; the only module that opens PixelData.

Native pixels are read straight into a reused buffer at the offset that the scan recorded. Everything else goes through
pydicom and one named plugin per transfer syntax, in a separate process that may crash: a decoder that crashes, hangs or
runs out of memory costs one slice, not the build.
"""

from __future__ import annotations

import io
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ich_prep.dataset.native import crc32c
from ich_prep.dicom import jpeg_plugin
from ich_prep.dicom.elements import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from ich_prep.dicom.pydicom_header import INFLATED_LIMIT, inflate
from ich_prep.dicom.skim import walk_meta
from ich_prep.errors import Reason, SliceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.sources import Source

# Transfer syntax -> pydicom's name of the plugin to decode it with; native ones need none.
NATIVE: Final = frozenset((IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED_LE))
JPEG_PLUGIN: Final = "imagecodecs"
PLUGINS: Final[dict[str, str]] = {
    "1.2.840.10008.1.2.5": "pylibjpeg",  # RLE lossless
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91": "pylibjpeg",  # JPEG 2000
    **dict.fromkeys(jpeg_plugin.DECODER_DEPENDENCIES, JPEG_PLUGIN),
}
SECONDS_PER_SLICE: Final = 30.0
MEMORY_LIMIT: Final = 1 << 30
_FRAME: Final = struct.Struct("<I")


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


PIXEL_FIELDS: Final = PixelRecord.__slots__


@dataclass(frozen=True, slots=True)
class PixelSource(PixelRecord):
    """A pixel record with its file: the one with ``key`` in ``source``."""

    source: Source
    key: bytes


def missing_decoder(transfer_syntax: str) -> str | None:
    """Return why the transfer syntax cannot be decoded here, or None if it can."""
    if transfer_syntax in NATIVE:
        return None
    plugin = PLUGINS.get(transfer_syntax)
    if plugin is None:
        return f"transfer syntax {transfer_syntax} has no decoder here"
    if plugin == JPEG_PLUGIN and not jpeg_plugin.is_available(transfer_syntax):
        return f"transfer syntax {transfer_syntax} needs imagecodecs: pip install imagecodecs"
    return None


@dataclass
class Decoder:
    """Reads stored values. Reuses its buffers and, once started, its decoding process."""

    _stored: NDArray[np.uint16] = field(default_factory=lambda: np.empty(512 * 512, np.uint16))
    _header: bytearray = field(default_factory=lambda: bytearray(64 * 1024))
    _child: _Child | None = None

    def read(self, source: PixelSource) -> NDArray[np.uint16]:
        """Return the stored values, uint16 (rows, columns), valid until the next call.

        A signed value is in two's complement over all 16 bits. Bits above BitsStored are left as they are.
        Raises ``SliceError``: UNREADABLE, BAD_ARCHIVE, CHANGED, TOO_LARGE, SIZE_MISMATCH, DECODE_FAILED or DECODER_DIED.
        """
        if source.transfer_syntax in (IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE):
            return self._read_native(source)
        if self._child is None:
            self._child = _Child()
        payload = self._child.decode(source, _read_unchanged(source))
        return np.frombuffer(payload, np.uint16).reshape(source.rows, source.columns)

    def close(self) -> None:
        """End the decoding process, if there is one."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _read_native(self, source: PixelSource) -> NDArray[np.uint16]:
        count = source.rows * source.columns
        if count > self._stored.size:
            self._stored = np.empty(count, np.uint16)
        if source.header_bytes > len(self._header):
            self._header = bytearray(source.header_bytes)
        stored = self._stored[:count]
        wide = source.bits_allocated == 16
        pixels = stored.view(np.uint8) if wide else np.empty(count, np.uint8)
        header = memoryview(self._header)[: source.header_bytes]
        try:
            size = source.source.size(source.key)
            got = source.source.read_into(source.key, [header, pixels.data], verify=True)
        except OSError as error:
            raise SliceError(Reason.UNREADABLE, error.strerror or str(error)) from None
        _check_unchanged(source, size, header)
        if got != source.header_bytes + pixels.nbytes:
            raise SliceError(Reason.UNREADABLE, f"expected {pixels.nbytes} bytes of pixels, the read ended early")
        if not wide:
            stored.view(np.int16)[:] = pixels.view(np.int8 if source.signed else np.uint8)
        elif source.transfer_syntax == EXPLICIT_BE:
            stored.byteswap(inplace=True)
        return stored.reshape(source.rows, source.columns)


def _read_unchanged(source: PixelSource) -> bytearray:
    """Return the whole file of ``source``; raises ``SliceError`` if it changed since the scan."""
    try:
        size = source.source.size(source.key)
        if size > INFLATED_LIMIT:
            raise SliceError(Reason.TOO_LARGE, f"expected a file of at most {INFLATED_LIMIT:,} bytes, found {size:,}")
        data = bytearray(size)
        got = source.source.read_into(source.key, [data], verify=True)
    except OSError as error:
        raise SliceError(Reason.UNREADABLE, error.strerror or str(error)) from None
    _check_unchanged(source, got, memoryview(data)[: source.header_bytes])
    return data


def _check_unchanged(source: PixelSource, size: int, header: memoryview) -> None:
    if size != source.file_size or crc32c(header) != source.crc32c:
        raise SliceError(Reason.CHANGED, "the file is not the one whose header was read: it changed since the scan")


class _Child:
    """A process that decodes compressed pixels, one request at a time; it is restarted after a crash.

    A slice fails if it crashes a fresh process, so earlier slices cannot affect it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, source: PixelSource, data: bytearray) -> bytes:
        """Return the stored values of ``source``, rows x columns x 2 bytes, from its file; raises ``SliceError``."""
        used = self._process is not None
        try:
            return self._ask(source, data)
        except SliceError as error:
            if not used or error.reason != Reason.DECODER_DIED:
                raise
        self.close()
        return self._ask(source, data)

    def _ask(self, source: PixelSource, data: bytearray) -> bytes:
        if self._process is None:
            # The stacks of NumPy's threads, one per core, would count towards the memory limit.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ich_prep.dicom.decode"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
            os.set_blocking(self._process.stdin.fileno(), False)  # type: ignore[union-attr]
        fields = {name: getattr(source, name) for name in PIXEL_FIELDS}
        request = json.dumps({"bytes": len(data), "record": fields}).encode()
        deadline = time.monotonic() + SECONDS_PER_SLICE
        try:
            self._send(_FRAME.pack(len(request)) + request, deadline)
            self._send(data, deadline)
            answer = json.loads(self._receive(_FRAME.unpack(self._receive(_FRAME.size, deadline))[0], deadline))
            if "reason" in answer:
                raise SliceError(Reason(answer["reason"]), answer["detail"])
            return self._receive(source.rows * source.columns * 2, deadline)
        except (BrokenPipeError, EOFError) as error:
            code = self.close()
            raise SliceError(Reason.DECODER_DIED, f"the decoder ended with exit status {code}") from error
        except TimeoutError as error:
            self.close()
            raise SliceError(Reason.DECODER_DIED, f"no pixels after {SECONDS_PER_SLICE:g} s") from error
        except SliceError:
            raise  # the process's answer
        except BaseException:
            self.close()  # such as Ctrl-C: an unread answer would be mistaken for the next slice's
            raise

    def _send(self, data: bytes | bytearray, deadline: float) -> None:
        stdin = self._process.stdin.fileno()  # type: ignore[union-attr]
        left = memoryview(data)
        while left:
            if not select.select([], [stdin], [], max(0.0, deadline - time.monotonic()))[1]:
                raise TimeoutError
            left = left[os.write(stdin, left) :]

    def _receive(self, size: int, deadline: float) -> bytes:
        stdout = self._process.stdout.fileno()  # type: ignore[union-attr]
        parts, missing = [], size
        while missing:
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(stdout, min(missing, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def close(self) -> int | None:
        """End the process and return its exit status, None if there was none."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        code = process.wait()
        process.stdin.close()  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        return code


def decode_with_pydicom(data: bytes) -> NDArray[Any]:
    """Return the stored values of the DICOM file ``data``, (rows, columns), int or uint, 8 or 16 bits, by pydicom alone.

    Compressed syntaxes are decoded by the plugin that ``PLUGINS`` names. Raises ``SliceError`` (DECODE_FAILED) if
    pydicom or the plugin fails.
    """
    import pydicom
    from pydicom.pixels.decoders.base import get_decoder

    try:
        # What pydicom only warns about, such as extra frames, shows in the shape.
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)  # the scan has seen that it is DICOM
            syntax = str(dataset.file_meta.TransferSyntaxUID)
            decoder = get_decoder(syntax)
            plugin = PLUGINS.get(syntax, "")
            if plugin == JPEG_PLUGIN and plugin not in decoder.available_plugins:
                decoder.add_plugin(plugin, ("ich_prep.dicom.jpeg_plugin", "decode_frame"))
            pixels, _ = decoder.as_array(dataset, raw=True, decoding_plugin=plugin)
    except Exception as error:  # each plugin raises what its C library raises on damaged bytes
        raise SliceError(Reason.DECODE_FAILED, f"{type(error).__name__}: {error}"[:200]) from None
    return pixels


def _decode(record: PixelRecord, data: bytes) -> bytes:
    """Return the stored values of a compressed slice; runs in the decoding process."""
    if record.transfer_syntax == DEFLATED_LE:
        return _read_deflated(record, data)
    pixels = decode_with_pydicom(data)
    if pixels.shape != (record.rows, record.columns):
        detail = f"expected {record.rows} x {record.columns} pixels, the stream holds {pixels.shape}"
        raise SliceError(Reason.SIZE_MISMATCH, detail)
    wide = pixels.astype(np.int16 if record.signed else np.uint16, copy=False)
    return np.ascontiguousarray(wide).tobytes()


def _read_deflated(record: PixelRecord, data: bytes) -> bytes:
    kind = f"<{'i' if record.signed else 'u'}{record.bits_allocated // 8}"
    try:
        _, start = walk_meta(data)
        pixels = np.frombuffer(inflate(data[start:]), kind, record.rows * record.columns, record.pixel_offset)
    except (struct.error, zlib.error, ValueError) as error:
        raise SliceError(Reason.DECODE_FAILED, f"deflated pixels: {error}") from None
    return pixels.astype(np.int16 if record.signed else np.uint16, copy=False).tobytes()


def _serve() -> None:
    """Answer requests on standard input until it ends: the main loop of the decoding process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # handled by the parent; this process ends with its input
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not write into the answers
    while prefix := requests.read(_FRAME.size):
        request = json.loads(requests.read(_FRAME.unpack(prefix)[0]))
        data = requests.read(request["bytes"])
        payload = b""
        try:
            payload = _decode(PixelRecord(**request["record"]), data)
            answer: dict[str, object] = {"bytes": len(payload)}
        except SliceError as error:
            answer = {"reason": str(error.reason), "detail": error.detail}
        except MemoryError:
            answer = {"reason": str(Reason.DECODER_DIED), "detail": f"more than {MEMORY_LIMIT >> 20} MiB of memory"}
        text = json.dumps(answer).encode()
        answers.write(_FRAME.pack(len(text)) + text + payload)
        answers.flush()


if __name__ == "__main__":
    _serve()
