"""A dataset as an xarray.DataArray with named channels and dask chunks of one shard."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import IMAGES
from ich_prep.errors import UsageError

if TYPE_CHECKING:
    import xarray

NEEDED = ("xarray", "dask", "zarr")


def open_xarray(path: str | Path) -> xarray.DataArray:
    """Return the images of the dataset at ``path``, lazily, with dims (slice, channel, y, x).

    uint8 window codes or int16 HU (attribute ``units``), read by zarr-python. The coordinate ``channel`` names the windows,
    or is ["hu"]; ``slice`` is the row, the line of the slice table; ``ok`` (slice) is False for a quarantined slice,
    which has no pixels and reads as the fill value (0, or -1024 HU). A dask chunk is one shard.

    For example, the mean of each window over all slices, by dask, and all slices in napari, one layer per window:

        images = open_xarray("data.zarr")
        images[images.ok.values].mean(["slice", "y", "x"]).compute()
        napari.imshow(images.data, channel_axis=1, name=images.channel.values.tolist())

    Raises ``DatasetError`` if ``path`` is not a finished dataset, and ``UsageError`` if xarray, dask or zarr is not
    installed.
    """
    missing = [name for name in NEEDED if not _is_installed(name)]
    if missing:
        raise UsageError(f"open_xarray needs {', '.join(missing)}: run `pip install {' '.join(missing)}`.")
    import xarray

    dataset = open_dataset(path)
    count, channels, height, width = dataset.shape
    shard = {"slice": dataset.spec.slices_per_shard, "channel": channels, "y": height, "x": width}
    group = xarray.open_zarr(Path(path), chunks=shard, consolidated=False, mask_and_scale=False)
    # The array may have rows that are not published yet.
    images: xarray.DataArray = group[IMAGES].isel(slice=slice(count))
    names = list(images.attrs["channels"])
    return images.assign_coords({"slice": np.arange(count), "channel": names, "ok": ("slice", dataset.is_ok)})


def _is_installed(name: str) -> bool:
    return find_spec(name) is not None
