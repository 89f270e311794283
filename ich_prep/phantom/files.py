"""DICOM files of the phantom: attributes by keyword and stored values -> the bytes of one file."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ich_prep.phantom.series import Slice, in_field

# Attribute values as written to the file: strings, numbers, lists of either, or the bytes of pixels.
Attributes = dict[str, Any]

CT_IMAGE = str(CTImageStorage)
EXPLICIT_LE = str(ExplicitVRLittleEndian)
IMPLICIT_LE = str(ImplicitVRLittleEndian)

PADDING = -2000  # the stored value outside the circular field of view of scanners that store 16 bits

_IMPLEMENTATION_UID = "2.25.136823021379502398237519253719283745012"
_IMPLEMENTATION_NAME = "ICH_PHANTOM"


def uid(*parts: object) -> str:
    """Return a valid UID under 2.25 (PS3.5 B.2) that depends on ``parts`` only."""
    return f"2.25.{int.from_bytes(_digest(parts, 16), 'big')}"


def token(length: int, *parts: object) -> str:
    """Return ``length`` hexadecimal digits that depend on ``parts`` only."""
    return _digest(parts, 16).hex()[:length]


def file_bytes(attributes: Mapping[str, Any], *, syntax: str, media_uid: str) -> bytes:
    """Return a whole DICOM file (PS3.10) with these attributes; equal arguments give equal bytes.

    ``media_uid`` is the SOP Instance UID of the file meta information, which differs from the data set's in
    archives that renamed instances. Values that violate their VR are written unchanged.
    """
    dataset = Dataset()
    # Anonymised archives contain UIDs like ID_0a1b2c3d4: values are not checked against their VR.
    with config.disable_value_validation():
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        if "PixelData" in dataset:
            dataset["PixelData"].VR = "OW"
        meta = FileMetaDataset()
        meta.FileMetaInformationGroupLength = 0  # the writer fills it in
        meta.FileMetaInformationVersion = b"\x00\x01"
        meta.MediaStorageSOPClassUID = attributes.get("SOPClassUID", CT_IMAGE)
        meta.MediaStorageSOPInstanceUID = UID(media_uid)
        meta.TransferSyntaxUID = UID(syntax)
        meta.ImplementationClassUID = UID(_IMPLEMENTATION_UID)
        meta.ImplementationVersionName = _IMPLEMENTATION_NAME
        dataset.file_meta = meta
        dataset.preamble = bytes(128)
        out = BytesIO()
        # Not `enforce_file_format`: that would overwrite the file meta's SOP Instance UID with the data set's.
        dcmwrite(out, dataset, enforce_file_format=False)
    return out.getvalue()


def stored_values(
    hu: NDArray[np.int16], *, bits: int, intercept: int, padded: bool
) -> NDArray[np.uint16] | NDArray[np.int16]:
    """Return what a scanner stores for ``hu``: 12 bits unsigned, or 16 bits signed; slope 1.

    ``padded`` marks what is outside the circular field of view: PADDING if signed, 0 if unsigned.
    """
    values = hu - np.int16(intercept)
    if bits == 12:
        values = np.clip(values, 0, 4095)
    if padded:
        values[~in_field(hu.shape[0])] = PADDING if bits == 16 else 0
    return values.astype("<u2") if bits == 12 else values.astype("<i2")


def image_attributes(
    drawn: Slice, *, pixel_mm: float, bits: int, intercept: str, slope: str, window: tuple[list[str], list[str]]
) -> Attributes:
    """Return the attributes of geometry and pixels that every layout's slices share, in the order of their tags."""
    pixels = stored_values(drawn.hu, bits=bits, intercept=int(float(intercept)), padded=True)
    center, width = window
    spacing = f"{pixel_mm:.6f}"
    return {
        "ImagePositionPatient": [f"{value:.6f}" for value in drawn.position_mm],
        "ImageOrientationPatient": [f"{value:.6f}" for value in drawn.orientation],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "PixelSpacing": [spacing, spacing],
        "BitsAllocated": 16,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": 0 if bits == 12 else 1,
        "WindowCenter": center,
        "WindowWidth": width,
        "RescaleIntercept": intercept,
        "RescaleSlope": slope,
        "PixelData": pixels.tobytes(),
    }


def _digest(parts: tuple[object, ...], size: int) -> bytes:
    return blake2b("/".join(map(str, parts)).encode(), digest_size=size).digest()
