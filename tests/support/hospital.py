"""A hospital's folder: small CT files whose headers a test chooses, and a label table beside them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset import Dataset, open_dataset
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.spec import Spec
from ich_prep.phantom.files import CT_IMAGE, EXPLICIT_LE, file_bytes

SIDE = 16
TINY = Spec(size=SIDE, slices_per_shard=16, store="hu", layout="folder")
ANY_LABELS = Allowances(unlabelled=True)


def ct_bytes(image: int, **attributes: Any) -> bytes:
    """Return a CT file of 16 x 16 pixels; equal ``image`` numbers give equal pixels. ``None`` removes an attribute."""
    pixels = np.random.default_rng(image).integers(900, 1200, (SIDE, SIDE)).astype("<i2")
    usual: dict[str, Any] = {
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SOPClassUID": CT_IMAGE,
        "SOPInstanceUID": f"1.2.3.{image}",
        "Modality": "CT",
        "PatientID": "P1",
        "StudyInstanceUID": "1.2.1",
        "SeriesInstanceUID": "1.2.2",
        "ImagePositionPatient": [0.0, 0.0, float(image)],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": SIDE,
        "Columns": SIDE,
        "PixelSpacing": [0.5, 0.5],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleIntercept": "-1024",
        "RescaleSlope": "1",
        "PixelData": pixels.tobytes(),
    }
    values = {name: value for name, value in (usual | attributes).items() if value is not None}
    return file_bytes(values, syntax=EXPLICIT_LE, media_uid="1.2.3.4")


def write_files(src: Path, files: Mapping[str, bytes]) -> Path:
    """Write ``files`` by their paths below ``src``; return ``src``."""
    for name, data in files.items():
        path = src / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return src


def write_labels(path: Path, key: str, labels: Mapping[str, Sequence[int]]) -> Path:
    """Write a table of labels, six values for each key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow([key, *RSNA_CLASSES])
        lines.writerows([name, *values] for name, values in labels.items())
    return path


def built(src: Path, out: Path, *, spec: Spec = TINY, allow: Allowances = ANY_LABELS, **options: Any) -> Dataset:
    """Build ``src`` in this process and return the dataset."""
    build(src, out, spec, workers=0, allow=allow, **options)
    return open_dataset(out)
