"""Of what the bytes of a dataset depend besides its sources and its spec: the releases of what makes them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGE = "ich"
# imagecodecs reads some kinds of JPEG, and need not be installed.
LIBRARIES = (
    "imagecodecs", "numcodecs", "numpy", "opencv-python-headless", "pyarrow", "pydicom", "pylibjpeg-openjpeg",
    "pylibjpeg-rle", "zarr",
)  # fmt: skip


@cache
def _release(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def library_releases() -> dict[str, str | None]:
    """Return the release of each library, None where it is not installed."""
    return {name: _release(name) for name in LIBRARIES}


def all_releases() -> dict[str, str | None]:
    """Return the releases of this package and of each library."""
    return {PACKAGE: _release(PACKAGE), **library_releases()}
