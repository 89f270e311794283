"""The light half of the package: all that a reader or a trainer needs, without Dask, OpenCV, pydicom or zarr."""
