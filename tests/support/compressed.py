"""Compressed CT slices, made from native ones, and their stored values."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from ich_prep.dicom.decode import PIXEL_FIELDS, Decoder, PixelSource
from ich_prep.errors import SliceError
from ich_prep.sources import FolderSource
from ich_prep.stages.scan import scan_file

SliceBytes = Callable[..., bytes]

RLE, J2K_LOSSLESS, J2K = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"
JPEG_LOSSLESS, JPEG_LOSSLESS_SV1 = "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"
JPEG_LS, JPEG_8, JPEG_12 = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
COMPRESSED = [RLE, J2K_LOSSLESS, JPEG_LOSSLESS, JPEG_LOSSLESS_SV1, JPEG_LS]


def source_of(path: Path) -> PixelSource:
    """The pixel source of the file, from its scan."""
    line = line_of(path.parent, path.name.encode())
    assert line.get("reason") is None, line
    values = {name: line[name] for name in PIXEL_FIELDS}
    return PixelSource(source=FolderSource(path.parent), key=path.name.encode(), **values)


def line_of(folder: Path, name: bytes) -> dict[str, Any]:
    """The scan's line for one file of a folder."""
    return scan_file(FolderSource(folder), name, name)


def stored(words: NDArray[np.uint16], source: PixelSource) -> NDArray[Any]:
    return words.view(np.int16) if source.signed else words


def refused(decoder: Decoder, source: PixelSource) -> SliceError:
    with pytest.raises(SliceError) as caught:
        decoder.read(source)
    return caught.value


def compressed(native: bytes, syntax: str) -> bytes:
    """The slice of a native little endian file in another transfer syntax."""
    dataset = pydicom.dcmread(io.BytesIO(native))
    pixels = dataset.pixel_array
    if syntax == RLE:
        dataset.compress(UID(RLE), encoding_plugin="pydicom", generate_instance_uid=False)
    elif syntax == J2K_LOSSLESS:
        dataset.compress(UID(J2K_LOSSLESS), encoding_plugin="pylibjpeg", generate_instance_uid=False)
    else:
        words = pixels.view(f"u{pixels.itemsize}")
        if syntax == JPEG_LS:
            frame = imagecodecs.jpegls_encode(words)
        else:
            frame = imagecodecs.jpeg8_encode(words, lossless=True, predictor=1, bitspersample=8 * words.itemsize)
        set_frame(dataset, frame, syntax)
    return to_bytes(dataset)


def set_frame(dataset: pydicom.Dataset, frame: bytes, syntax: str) -> None:
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = UID(syntax)


def to_bytes(dataset: pydicom.Dataset) -> bytes:
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def slope_of_hu(side: int = 40) -> NDArray[np.int16]:
    """A slice with padding, air, water and bone, and noise on it."""
    rng = np.random.default_rng(0)
    pixels = np.linspace(-1024, 3000, side * side).reshape(side, side) + rng.normal(0, 20, (side, side))
    pixels[0] = -2000
    return pixels.astype(np.int16)
