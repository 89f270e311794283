"""Head-CT DICOM files in, one sharded Zarr v3 dataset with a label table out.

``build`` makes a dataset from a ``Spec``; ``open_dataset`` opens one, ``open_xarray`` its images as xarray; ``Window`` is
a window in HU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ich_prep.build_dataset import build
    from ich_prep.dataset import open_dataset
    from ich_prep.dataset.schema import Spec
    from ich_prep.dataset.windows import Window
    from ich_prep.dataset.xarray_view import open_xarray

__all__ = ["Spec", "Window", "build", "open_dataset", "open_xarray"]

_HOMES = {
    "Spec": "ich_prep.dataset.schema",
    "Window": "ich_prep.dataset.windows",
    "build": "ich_prep.build_dataset",
    "open_dataset": "ich_prep.dataset",
    "open_xarray": "ich_prep.dataset.xarray_view",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: a training job that opens a dataset loads neither Dask nor pydicom.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ich_prep' has no attribute {name!r}")
