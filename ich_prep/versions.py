"""Library versions that can change a dataset's bytes."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGE = "ich"
# imagecodecs, which decodes some kinds of JPEG, is optional.
LIBRARIES = (
    "imagecodecs", "numcodecs", "numpy", "opencv-python-headless", "pyarrow", "pydicom", "pylibjpeg-openjpeg",
    "pylibjpeg-rle", "zarr",
)  # fmt: skip


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def library_versions() -> dict[str, str | None]:
    """Return the version of each library, None if it is not installed."""
    return {name: _version(name) for name in LIBRARIES}


def all_versions() -> dict[str, str | None]:
    """Return the versions of this package and of each library."""
    return {PACKAGE: _version(PACKAGE), **library_versions()}
