"""One DICOM file -> stored values; the only module that opens PixelData.

Native pixels are read straight into a reused buffer at the offset that the scan recorded. Compressed ones are decoded in a
separate process that may crash: a decoder that crashes, hangs or runs out of memory costs one slice, not the build.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ich_prep.dataset.native import crc32c
from ich_prep.dicom import jpeg_plugin
from ich_prep.dicom.elements import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from ich_prep.dicom.frames import JPEG_2000, RLE, PixelRecord
from ich_prep.dicom.isolation import IsolatedDecoder
from ich_prep.dicom.pydicom_header import INFLATED_LIMIT
from ich_prep.errors import Reason, SliceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.sources import Source

# Transfer syntax -> pydicom's name of the plugin to decode it with; native ones need none.
NATIVE: Final = frozenset((IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED_LE))
JPEG_PLUGIN: Final = "imagecodecs"
PLUGINS: Final[dict[str, str]] = {
    **dict.fromkeys((RLE, *JPEG_2000), "pylibjpeg"),
    **dict.fromkeys(jpeg_plugin.DECODER_DEPENDENCIES, JPEG_PLUGIN),
}


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
    _child: IsolatedDecoder | None = None

    def read(self, source: PixelSource) -> NDArray[np.uint16]:
        """Return the stored values, uint16 (rows, columns), valid until the next call.

        A signed value is in two's complement over all 16 bits. Bits above BitsStored are left as they are.
        Raises ``SliceError``: UNREADABLE, BAD_ARCHIVE, CHANGED, TOO_LARGE, SIZE_MISMATCH, DECODE_FAILED or DECODER_DIED.
        """
        if source.transfer_syntax in (IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE):
            return self._read_native(source)
        if self._child is None:
            self._child = IsolatedDecoder()
        _read_unchanged(source, self._child)
        return self._child.decode(source)

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


def _read_unchanged(source: PixelSource, child: IsolatedDecoder) -> None:
    """Read the whole file of ``source`` into the buffer of ``child``; raises ``SliceError`` if it changed since the scan."""
    try:
        size = source.source.size(source.key)
        if size > INFLATED_LIMIT:
            raise SliceError(Reason.TOO_LARGE, f"expected a file of at most {INFLATED_LIMIT:,} bytes, found {size:,}")
        data = child.buffer(size)
        got = source.source.read_into(source.key, [data], verify=True)
    except OSError as error:
        raise SliceError(Reason.UNREADABLE, error.strerror or str(error)) from None
    _check_unchanged(source, got, data[: source.header_bytes])


def _check_unchanged(source: PixelSource, size: int, header: memoryview) -> None:
    if size != source.file_size or crc32c(header) != source.crc32c:
        raise SliceError(Reason.CHANGED, "the file is not the one whose header was read: it changed since the scan")


def decode_with_pydicom(data: bytes) -> NDArray[Any]:
    """Return the stored values of the DICOM file ``data``, (rows, columns), int or uint, 8 or 16 bits, by pydicom alone.

    Compressed syntaxes are decoded by the plugin that ``PLUGINS`` names. Raises ``SliceError``:
    DECODE_FAILED if pydicom or the plugin fails, DECODER_DIED if there is too little memory.
    """
    import pydicom
    from pydicom.pixels.decoders.base import get_decoder

    try:
        # What pydicom only warns about, such as extra frames, shows in the shape.
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(data), force=True)  # the scan has seen that it is DICOM
            dataset.setdefault("SamplesPerPixel", 1)  # the scan accepts a slice that does not say it
            syntax = str(dataset.file_meta.TransferSyntaxUID)
            decoder = get_decoder(syntax)
            plugin = PLUGINS.get(syntax, "")
            if plugin == JPEG_PLUGIN and plugin not in decoder.available_plugins:
                decoder.add_plugin(plugin, ("ich_prep.dicom.jpeg_plugin", "decode_frame"))
            pixels, _ = decoder.as_array(dataset, raw=True, decoding_plugin=plugin)
    except (KeyboardInterrupt, SystemExit):
        raise
    except MemoryError:
        raise SliceError(Reason.DECODER_DIED, "pydicom ran out of memory") from None
    except (
        BaseException
    ) as error:  # each plugin raises what its library raises on damaged bytes; a panic is no Exception
        raise SliceError(Reason.DECODE_FAILED, f"{type(error).__name__}: {error}"[:200]) from None
    return pixels
