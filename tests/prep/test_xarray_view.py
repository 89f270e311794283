"""The xarray view: named channels, one dask chunk per shard, the same pixels as our reader."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import dask
import numpy as np
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.where import select_rows
from ich_prep.dataset.xarray_view import open_xarray
from ich_prep.errors import DatasetError, UsageError


@pytest.fixture(scope="module")
def hu_path(phantom_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hu") / "data.zarr"
    build(phantom_tree, out, Spec(size=32, store="hu", slices_per_shard=7), workers=0)
    return out


def test_windows_are_channels_by_name(dataset_path: Path) -> None:
    dataset, images = open_dataset(dataset_path), open_xarray(dataset_path)
    assert images.dims == ("slice", "channel", "y", "x")
    assert images.shape == dataset.shape and images.dtype == np.uint8
    assert images.channel.values.tolist() == ["brain", "subdural", "bone"]
    assert images.slice.values.tolist() == list(range(len(dataset)))
    pixels = dataset.read(np.arange(len(dataset)))
    np.testing.assert_array_equal(images.values, pixels)
    np.testing.assert_array_equal(images.sel(channel="bone", slice=[5, 3]).values, pixels[[5, 3], 2])


def test_hu_are_one_channel_with_units(hu_path: Path) -> None:
    dataset, images = open_dataset(hu_path), open_xarray(str(hu_path))
    assert images.channel.values.tolist() == ["hu"]
    assert images.dtype == np.int16 and images.attrs["units"] == "HU"
    np.testing.assert_array_equal(images.sel(channel="hu").values, dataset.read(np.arange(len(dataset)))[:, 0])


def test_a_dask_chunk_is_one_shard(dataset_path: Path, hu_path: Path) -> None:
    for path in (dataset_path, hu_path):
        dataset, images = open_dataset(path), open_xarray(path)
        per_shard = dataset.spec.slices_per_shard
        lengths = [min(per_shard, len(dataset) - first) for first in range(0, len(dataset), per_shard)]
        assert len(lengths) > 2
        assert images.chunks == (tuple(lengths), *((side,) for side in dataset.shape[1:]))


def test_dask_computes_on_selected_rows(dataset_path: Path) -> None:
    dataset, images = open_dataset(dataset_path), open_xarray(dataset_path)
    rows = select_rows(dataset.slices, "any == 1")
    assert 0 < len(rows) < len(dataset)
    with dask.config.set(scheduler="threads", num_workers=2):
        mean = images.sel(slice=rows).mean(["slice", "y", "x"]).compute()
    np.testing.assert_allclose(mean.sel(channel="brain"), dataset.read(rows)[:, 0].mean())


def test_a_shard_is_read_only_when_it_is_asked_for(dataset_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.zarr"
    shutil.copytree(dataset_path, path)
    shard = path / "images" / "c" / "1" / "0" / "0" / "0"
    shard.write_bytes(b"not a shard" * 100)
    images = open_xarray(path)
    np.testing.assert_array_equal(images[:16].values, open_dataset(path).read(np.arange(16)))
    with pytest.raises(Exception, match=r"checksum|[Cc]rc"):
        images[16:17].load()


def test_quarantined_slices_are_marked(slice_bytes: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for number in range(5):
        damage = {"syntax": str(RLELossless), "PixelData": encapsulate([b"no RLE"])} if number == 3 else {}
        data = slice_bytes(
            np.full((32, 32), 1000 + number, np.int16),
            SOPInstanceUID=f"2.25.1{number}",
            ImagePositionPatient=["0", "0", str(number)],
            **damage,
        )
        (tmp_path / "src" / f"{number}.dcm").write_bytes(data)
    allow = Allowances(unlabelled=True, max_quarantined=1)
    spec = Spec(layout="folder", size=32, store="hu", slices_per_shard=2)
    build(tmp_path / "src", tmp_path / "data.zarr", spec, workers=0, allow=allow)
    images = open_xarray(tmp_path / "data.zarr")
    assert images.ok.values.tolist() == [True, True, True, False, True]
    assert images[:, 0, 0, 0].values.tolist() == [-24, -23, -22, -1024, -20]
    assert images[images.ok.values].slice.values.tolist() == [0, 1, 2, 4]


def test_rows_beyond_the_published_ones_are_hidden(dataset_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.zarr"
    shutil.copytree(dataset_path, path)
    document = json.loads((path / "images" / "zarr.json").read_bytes())
    document["shape"][0] += 20
    (path / "images" / "zarr.json").write_text(json.dumps(document))
    images = open_xarray(path)
    assert images.shape == open_dataset(dataset_path).shape
    np.testing.assert_array_equal(images[-1].values, open_xarray(dataset_path)[-1].values)


def test_xarray_needs_no_coordinates_on_disk(dataset_path: Path) -> None:
    """Coordinates of text are not in the Zarr group, where other readers would refuse them."""
    before = sorted(path for path in dataset_path.rglob("*"))
    open_xarray(dataset_path).isel(slice=0).load()
    assert sorted(path for path in dataset_path.rglob("*")) == before
    arrays = [
        path.parent
        for path in before
        if path.name == "zarr.json" and json.loads(path.read_bytes())["node_type"] == "array"
    ]
    assert [path.name for path in arrays] == ["images"]


def test_a_path_that_is_not_a_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="found nothing"):
        open_xarray(tmp_path / "absent.zarr")


@pytest.mark.parametrize("absent", [["xarray"], ["dask", "zarr"]])
def test_a_library_that_is_not_installed_is_named(
    absent: list[str], dataset_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UsageError, match=f"open_xarray needs {', '.join(absent)}: run `pip install {' '.join(absent)}`"
    ):
        open_xarray(dataset_path)
