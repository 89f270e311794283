"""Head-CT DICOM files in, one sharded Zarr v3 dataset with a label table out.

``build`` makes a dataset according to a ``Spec``, ``open_dataset`` opens one, ``open_xarray`` opens its
images as xarray, and a ``Window`` is a range of HU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ich_prep.build_dataset import build
    from ich_prep.dataset import open_dataset
    from ich_prep.dataset.spec import Spec
    from ich_prep.dataset.windows import Window
    from ich_prep.dataset.xarray_view import open_xarray
    from ich_prep.scans import render_file

    __version__: str

__all__ = ["Spec", "Window", "__version__", "build", "open_dataset", "open_xarray", "render_file"]

# Imported on first use: a training job that opens a dataset loads neither Dask nor pydicom.
_HOMES = {
    "build": "ich_prep.build_dataset",
    "Spec": "ich_prep.dataset.spec",
    "open_dataset": "ich_prep.dataset",
    "open_xarray": "ich_prep.dataset.xarray_view",
    "render_file": "ich_prep.scans",
    "Window": "ich_prep.dataset.windows",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("ich")
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ich_prep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
