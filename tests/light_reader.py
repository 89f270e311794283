"""Open a dataset and read it where only the light libraries are installed: a program, not a test module.

``python light_reader.py DATASET``; run by ``make test-light`` in an environment without the libraries that it names.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np

HEAVY = ("dask", "distributed", "cv2", "pydicom", "pylibjpeg", "zarr", "pandas", "torch")


def main(path: str) -> None:
    """Read every row that has pixels, and the tables."""
    installed = [name for name in HEAVY if find_spec(name) is not None]
    assert not installed, f"installed, so this shows nothing: {installed}"
    from ich_prep import open_dataset

    with open_dataset(path) as dataset:
        rows = np.flatnonzero(dataset.is_ok)
        pixels = dataset.read(rows, threads=2)
        assert pixels.shape == (len(rows), *dataset.shape[1:]) and pixels.any()
        assert len(dataset.labels) == len(dataset.slices) == len(dataset)
        assert len(dataset.where("status == 'ok'")) == len(rows)
        print(f"{path}: {len(rows)} slices read without {', '.join(HEAVY)}.")


if __name__ == "__main__":
    main(sys.argv[1])
