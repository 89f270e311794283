"""Fixtures that several test modules share: real CT files, one slice's file, a synthetic tree, a dataset built from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

from ich_prep.build_dataset import build
from ich_prep.dataset.spec import Spec
from ich_prep.phantom import synthesize
from ich_prep.phantom.files import CT_IMAGE, file_bytes

# No test depends on speed: on a busy machine, any example may take long. Each run tries the same examples, so that a test
# that fails was broken by the change it is run for; `make test-properties` looks for new ones.
PATIENT = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("repeatable", PATIENT, derandomize=True)
hypothesis.settings.register_profile("random", PATIENT, derandomize=False)
hypothesis.settings.load_profile("repeatable")

SIZE = 64
SLICES_PER_SHARD = 16


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT files: ``ICH_TEST_DATA``, or ``shared/data`` next to the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ICH_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real CT files at {folder}: set ICH_TEST_DATA to the folder that holds head_ct and encodings")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small networks on a busy machine, where threads would only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def slice_bytes() -> Callable[..., bytes]:
    """A function: stored values (rows, columns), a transfer syntax, and attributes by keyword -> a CT slice's file.

    The attributes replace those of a plain axial slice; None leaves one out. Bits and sign follow the values' dtype.
    """

    def make(
        pixels: NDArray[Any] | None = None, *, syntax: str = str(ExplicitVRLittleEndian), **attributes: object
    ) -> bytes:
        if pixels is None:
            pixels = np.arange(12, dtype=np.int16).reshape(3, 4)
        bits = 8 * pixels.itemsize
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        plain: dict[str, object] = {
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "SOPClassUID": CT_IMAGE,
            "SOPInstanceUID": "2.25.3",
            "Modality": "CT",
            "PatientID": "P1",
            "StudyInstanceUID": "2.25.1",
            "SeriesInstanceUID": "2.25.2",
            "InstanceNumber": "7",
            "ImagePositionPatient": ["-125.5", "-120", "41.25"],
            "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"],
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "Rows": pixels.shape[0],
            "Columns": pixels.shape[1],
            "PixelSpacing": ["0.5", "0.5"],
            "BitsAllocated": bits,
            "BitsStored": bits,
            "HighBit": bits - 1,
            "PixelRepresentation": int(pixels.dtype.kind == "i"),
            "RescaleIntercept": "-1024",
            "RescaleSlope": "1",
            "PixelData": pixels.astype(pixels.dtype.newbyteorder(order)).tobytes() + b"\0" * (pixels.nbytes % 2),
        }
        kept = {keyword: value for keyword, value in (plain | attributes).items() if value is not None}
        return file_bytes(kept, syntax=syntax, media_uid="2.25.3")

    return make


@pytest.fixture(scope="session")
def phantom_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean tree of six synthetic series in the layout of RSNA; read only."""
    tree = tmp_path_factory.mktemp("phantom") / "rsna"
    synthesize(tree, series=6, size=SIZE, layout="rsna", workers=0)
    return tree


@pytest.fixture(scope="session")
def dataset_path(phantom_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of three windows built from ``phantom_tree``, 16 slices per shard; read only: copy it to damage it."""
    out = tmp_path_factory.mktemp("dataset") / "data.zarr"
    build(phantom_tree, out, Spec(size=SIZE, slices_per_shard=SLICES_PER_SHARD), workers=0)
    return out
