"""Head-CT DICOM files in, one sharded Zarr v3 dataset with a label table out.

``build`` makes a dataset, ``Spec`` says what it contains, ``render_file`` renders one file in the same way;
``ich_prep.store.open_dataset`` opens a dataset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ich_prep.build_dataset import build
    from ich_prep.scans import render_file
    from ich_prep.store import Spec

__all__ = ["Spec", "build", "render_file"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: a training job that opens a dataset loads neither Dask nor pydicom.
    if name == "build":
        from ich_prep.build_dataset import build

        return build
    if name == "render_file":
        from ich_prep.scans import render_file

        return render_file
    if name == "Spec":
        from ich_prep.store import Spec

        return Spec
    raise AttributeError(f"module 'ich_prep' has no attribute {name!r}")
