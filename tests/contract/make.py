"""Rewrite the datasets next to this file: only for a new format, since old ones must stay readable.

``python -m tests.contract.make``. Their content is in ``expected.json``, which the tests compare with.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import encapsulate

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.phantom import synthesize
from tests.support.cli import working

HERE = Path(__file__).parent
SPECS = {
    "windows": Spec(size=32, slices_per_shard=4),
    "hu": Spec(size=32, slices_per_shard=4, store="hu", codec="zstd"),
}


def break_pixels(path: Path) -> None:
    """Replace the pixels of one file with an invalid JPEG 2000 stream: its slice keeps a row, whose chunk is missing."""
    written = io.BytesIO()
    with pydicom.config.disable_value_validation():
        dataset = pydicom.dcmread(io.BytesIO(path.read_bytes()))
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
        dataset.PixelData = encapsulate([b"\xff\x4f\xff\x51" + bytes(200)])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(written, implicit_vr=False, little_endian=True)
    path.write_bytes(written.getvalue())


def few_slices(tree: Path) -> None:
    """Write a tree of both subsets with every seventh slice of a phantom, one of them broken."""
    synthesize(tree, series=6, size=32)
    for folder in sorted(tree.glob("stage_2_*/")):
        for number, path in enumerate(sorted(folder.iterdir())):
            if number % (7 if folder.name == "stage_2_test" else 21):
                path.unlink()
    break_pixels(sorted((tree / "stage_2_train").iterdir())[2])


def main() -> None:
    """Build both stores and write what is in them to expected.json."""
    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        few_slices(tree)
        for name, spec in SPECS.items():
            out = HERE / f"{name}.zarr"
            shutil.rmtree(out, ignore_errors=True)
            build(tree, out, spec, workers=0, allow=Allowances(missing_images=True, max_quarantined=1.0))
            shutil.rmtree(working(out))
            dataset = open_dataset(out)
            status = dataset.slices["status"].to_pylist()
            rows = [row for row, word in enumerate(status) if word == "ok"]
            pixels = np.ascontiguousarray(dataset.read(rows))
            expected[name] = {
                "digest": dataset.digest,
                "shape": dataset.shape,
                "status": status,
                "any": dataset.slices["any"].to_pylist(),
                "pixels": hashlib.sha256(pixels.tobytes()).hexdigest(),
            }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
