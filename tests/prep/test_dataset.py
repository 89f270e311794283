"""A finished dataset: what opens and what does not, what reads return, and that every Zarr reader sees the same bytes."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorstore
import xarray
import zarr
import zarrs
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.build_dataset import build
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import digest_of, series_schema, shard_path, slice_schema, table_name
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.tables import write_table
from ich_prep.dataset.windows import window_codes
from ich_prep.errors import CorruptionError, DatasetError, UsageError
from ich_prep.stages.state import BuildFolder, read_state, write_state
from ich_prep.summary import summary_of
from ich_train.loader import SliceLoader
from ich_train.rows import labelled_rows
from tests.support.cli import copy_with_working_folder, working
from tests.support.sealing import replace_table, reseal, rewrite_root, with_column


@pytest.fixture(scope="module")
def dataset(dataset_path: Path) -> Dataset:
    return open_dataset(dataset_path)


@pytest.fixture(scope="module")
def hu_path(phantom_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same slices as HU, compressed by another codec."""
    out = tmp_path_factory.mktemp("hu") / "hu.zarr"
    build(phantom_tree, out, Spec(size=64, store="hu", slices_per_shard=32, codec="zstd"), workers=0)
    return out


@pytest.fixture(scope="module")
def blocks_path(phantom_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same slices as HU in frames of two blocks, of which the second is the smaller one."""
    out = tmp_path_factory.mktemp("blocks") / "hu.zarr"
    build(phantom_tree, out, Spec(size=401, store="hu", slices_per_shard=32), workers=0)
    return out


@pytest.fixture
def copy(dataset_path: Path, tmp_path: Path) -> Path:
    """A copy of the dataset to damage, without its working folder."""
    out = tmp_path / "data.zarr"
    shutil.copytree(dataset_path, out)
    return out


@pytest.fixture(scope="module")
def pixels(dataset: Dataset) -> NDArray[Any]:
    return dataset.read(np.arange(len(dataset)))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_dataset_says_what_it_is(dataset: Dataset) -> None:
    assert dataset.shape == (dataset.slices.num_rows, 3, 64, 64)
    assert len(dataset) == dataset.shape[0] > 100
    assert dataset.dtype == np.uint8
    assert dataset.slices.schema.equals(slice_schema()) and dataset.series.schema.equals(series_schema())
    assert dataset.slices["row"].to_pylist() == list(range(len(dataset)))
    assert [window.name for window in dataset.spec.windows] == ["brain", "subdural", "bone"]
    assert dataset.root.format == "ich/1"
    assert dataset.digest == digest_of(dataset.attributes)
    assert "windows" in repr(dataset)


@given(data=st.data(), threads=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_any_rows_in_any_order(data: st.DataObject, threads: int, dataset: Dataset, pixels: NDArray[Any]) -> None:
    rows = data.draw(st.lists(st.integers(0, len(dataset) - 1), max_size=30))
    found = dataset.read(rows, threads=threads)
    assert found.shape == (len(rows), 3, 64, 64)
    np.testing.assert_array_equal(found, pixels[np.array(rows, np.int64)])


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64])
def test_rows_of_any_integer_type(kind: type, dataset: Dataset, pixels: NDArray[Any]) -> None:
    np.testing.assert_array_equal(dataset.read(np.array([9, 3, 9], kind)), pixels[[9, 3, 9]])


@pytest.mark.parametrize("rows", [[], (), np.array([]), np.array([], np.int64)])
def test_no_rows_are_no_pixels(rows: Any, dataset: Dataset) -> None:
    assert dataset.read(rows).shape == (0, 3, 64, 64)


def test_reads_go_into_the_callers_buffer(dataset: Dataset, pixels: NDArray[Any]) -> None:
    buffer = np.zeros((5, 3, 64, 64), np.uint8)
    assert dataset.read([40, 2], out=buffer[1:3]).base is buffer
    np.testing.assert_array_equal(buffer[1:3], pixels[[40, 2]])
    assert not buffer[[0, 3, 4]].any()


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((3, 3, 64, 64), np.uint8),
        np.zeros((2, 3, 64), np.uint8),
        np.zeros((2, 3, 64, 64), np.int8),
        np.zeros((2, 3, 64, 128), np.uint8)[..., ::2],
        np.broadcast_to(np.uint8(0), (2, 3, 64, 64)),
    ],
)
def test_a_buffer_of_another_shape_is_refused(out: NDArray[Any], dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"of shape \(2, 3, 64, 64\) and uint8"):
        dataset.read([0, 1], out=out)


@pytest.mark.parametrize("rows", [[0.0, 1.0], np.array([True, False]), ["0"], np.array([[0, 1]]), 5])
def test_rows_that_are_not_a_list_are_refused(rows: Any, dataset: Dataset) -> None:
    # A mask used as numbers would give rows 0 and 1.
    with pytest.raises(TypeError, match="row numbers"):
        dataset.read(rows)


@pytest.mark.parametrize("rows", [[-1], [10**6], np.array([2**63], np.uint64)])
def test_rows_outside_are_refused(rows: Any, dataset: Dataset) -> None:
    with pytest.raises(IndexError, match="Expected rows within"):
        dataset.read(rows)


def test_a_volume_is_a_series_in_order(dataset: Dataset, pixels: NDArray[Any]) -> None:
    series = dataset.series.to_pylist()
    rows = np.concatenate([np.arange(line["first_row"], line["first_row"] + line["n_slices"]) for line in series])
    np.testing.assert_array_equal(rows, np.arange(len(dataset)))
    for line in series:
        at = slice(line["first_row"], line["first_row"] + line["n_slices"])
        np.testing.assert_array_equal(dataset.volume(line["series_instance_uid"]), pixels[at])
        positions = np.array(dataset.slices["position_mm"].to_pylist()[at])
        assert (np.diff(positions) >= 0).all()
    with pytest.raises(KeyError, match="no series 'ID_none'"):
        dataset.volume("ID_none")


def test_windows_are_those_of_the_hu(hu_path: Path, dataset: Dataset, pixels: NDArray[Any]) -> None:
    hu = open_dataset(hu_path)
    assert (hu.shape, hu.dtype) == ((len(dataset), 1, 64, 64), np.int16)
    values = hu.read(np.arange(len(hu)))[:, 0]
    assert values.min() == -1024 and values.max() > 1000
    for channel, window in enumerate(dataset.spec.windows):
        np.testing.assert_array_equal(window_codes(values, window), pixels[:, channel])


# --- every Zarr reader -----------------------------------------------------------------------------------------------


def by_zarr_python(path: Path) -> NDArray[Any]:
    return np.asarray(zarr.open_group(path, mode="r")["images"][:])


def by_zarrs(path: Path) -> NDArray[Any]:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        images = zarr.open_group(path, mode="r")["images"]
        assert isinstance(images.async_array.codec_pipeline, zarrs.ZarrsCodecPipeline)
        return np.asarray(images[:])


def by_tensorstore(path: Path) -> NDArray[Any]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path / 'images'}/"}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


def by_xarray(path: Path) -> NDArray[Any]:
    with xarray.open_zarr(path, chunks=None, consolidated=False) as opened:
        assert opened["images"].dims == ("slice", "channel", "y", "x")
        return np.asarray(opened["images"].to_numpy())


def by_dask_array(path: Path) -> NDArray[Any]:
    return np.asarray(dask.array.from_zarr(str(path), component="images").compute(scheduler="synchronous"))


@pytest.mark.parametrize("store_kind", ["windows", "hu", "two blocks"])
@pytest.mark.parametrize("read", [by_zarr_python, by_zarrs, by_tensorstore, by_xarray, by_dask_array])
def test_every_reader_sees_the_same_bytes(
    read: Callable[[Path], NDArray[Any]], store_kind: str, dataset_path: Path, hu_path: Path, blocks_path: Path
) -> None:
    path = {"windows": dataset_path, "hu": hu_path, "two blocks": blocks_path}[store_kind]
    ours = open_dataset(path)
    theirs = read(path)
    assert theirs.dtype == ours.dtype
    np.testing.assert_array_equal(theirs, ours.read(np.arange(len(ours))))


def test_zarr_tools_open_it_without_a_warning(dataset_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = zarr.open_group(dataset_path, mode="r")
        images = root["images"]
        assert root.attrs["ich"]["format"] == "ich/1"
        assert images.metadata.dimension_names == ("slice", "channel", "y", "x")
        assert images.shards == (16, 3, 64, 64) and images.chunks == (1, 3, 64, 64)
        assert isinstance(root["labels"], zarr.Group)
        assert {"images", "labels"} <= set(root)
        assert zarr.open(str(dataset_path), mode="r")["images"].shape == images.shape
        xarray.open_zarr(dataset_path).close()
        xarray.open_dataset(dataset_path, engine="zarr").close()
        frame = pd.read_parquet(dataset_path / "labels" / "slices.parquet")
    assert len(frame) == images.shape[0]
    assert frame["subdural"].dtype in ("int8", "float64")


# --- what does not open ----------------------------------------------------------------------------------------------


def test_a_path_that_is_not_a_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="found nothing"):
        open_dataset(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(DatasetError, match="found a file"):
        open_dataset(tmp_path / "file")
    with pytest.raises(DatasetError, match=r"a folder without a zarr.json.*ich-prep build --src"):
        open_dataset(tmp_path)
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(DatasetError, match="not one that ich-prep wrote"):
        open_dataset(tmp_path / "other.zarr")


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"attributes": null}', '{"attributes": []}', "{}"])
def test_json_of_another_kind_is_refused(text: str, copy: Path) -> None:
    (copy / "zarr.json").write_text(text)
    with pytest.raises(DatasetError, match="no attribute 'ich'"):
        open_dataset(copy)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"attributes": {"ich": {"format": "ich/1"'])
def test_a_root_that_is_not_json_is_damage(data: bytes, copy: Path) -> None:
    (copy / "zarr.json").write_bytes(data)
    with pytest.raises(CorruptionError, match="it is not JSON"):
        open_dataset(copy)


def test_another_version_is_refused_by_name(copy: Path) -> None:
    rewrite_root(copy, lambda ich: ich.update(format="ich/2", created_by="ich-prep 9.0"))
    with pytest.raises(DatasetError, match=r"has format 'ich/2', written by ich-prep 9.0.*reads ich/1") as caught:
        open_dataset(copy)
    assert not isinstance(caught.value, CorruptionError)


@pytest.mark.parametrize("key", ["spec", "counts"])
def test_a_root_that_lacks_a_part_is_damage(key: str, copy: Path) -> None:
    rewrite_root(copy, lambda ich: ich.pop(key) and None)
    with pytest.raises(CorruptionError, match=rf"is damaged: {key}: Field required"):
        open_dataset(copy)


def test_readers_ignore_what_they_do_not_know(copy: Path, pixels: NDArray[Any]) -> None:
    """A dataset of a later version of the same format: one unknown of each kind."""
    table = pq.read_table(copy / "labels/slices.parquet")
    words = {
        "status": ["expired"] + table["status"].to_pylist()[1:],
        "label_level": ["lesion"] + table["label_level"].to_pylist()[1:],
        "turn": ["sideways"] + table["turn"].to_pylist()[1:],
        "flags": [["new_flag"]] + table["flags"].to_pylist()[1:],
        "repairs": [["new_repair"]] + table["repairs"].to_pylist()[1:],
    }
    for name, values in words.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
    table = table.append_column("later_column", pa.array([1] * len(table)))
    write_table(copy / "labels/slices.9.parquet", table)
    quarantine = pq.read_table(copy / "labels/quarantine.parquet")
    line = [{"path": "x", "stage": "later", "row": None, "reason": "new_reason", "detail": ""}]
    write_table(copy / "labels/quarantine.parquet", pa.Table.from_pylist(line, quarantine.schema))
    (copy / "labels/slices.parquet").unlink()

    def change(ich: dict[str, Any]) -> None:
        ich["format"] = "ich/1.4"
        ich["spec"] |= {"layout": "mimic", "orientation": "patient"}
        ich["later_key"] = {"a": [1]}
        ich["counts"] |= {"later": 3, "ok": ich["counts"]["ok"] - 1, "quarantined": 1}
        ich["tables"] |= {"slices": "labels/slices.9.parquet", "lesions": "labels/lesions.parquet"}
        ich["digests"]["labels/slices.9.parquet"] = ich["digests"].pop("labels/slices.parquet")
        ich["history"].append({"command": "annotate", "generation": 9, "reader": "x"})
        ich["generation"] = 9

    rewrite_root(copy, change)
    images = json.loads((copy / "images/zarr.json").read_text())
    images["shape"][0] += 100
    (copy / "images/zarr.json").write_text(json.dumps(images))
    reseal(copy)
    opened = open_dataset(copy)
    assert len(opened) == len(pixels) and opened.root.generation == 9
    assert not opened.is_ok[0] and opened.is_ok[1:].all()
    assert opened.slices["later_column"].to_pylist() == [1] * len(opened)
    np.testing.assert_array_equal(opened.read([1, 40]), pixels[[1, 40]])
    assert len(opened.volume(series_row=0)) == opened.series["n_slices"][0].as_py() - 1
    assert summary_of(opened)["flags"]["new_flag"] == 1
    rows = labelled_rows(opened)
    assert 0 not in rows and len(rows)
    assert (
        next(batch.rows.tolist() for batch in SliceLoader(opened, batch_size=8, order="sequential"))
        == rows[:8].tolist()
    )


@pytest.mark.parametrize("key", ["size", "store", "windows", "slices_per_shard", "codec"])
def test_a_root_spec_without_a_required_key_is_damage(key: str, copy: Path) -> None:
    rewrite_root(copy, lambda ich: ich["spec"].pop(key) and None)
    with pytest.raises(CorruptionError, match=f"the spec lacks {key}"):
        open_dataset(copy)


def test_a_root_needs_no_more_than_a_reader_uses(copy: Path, pixels: NDArray[Any]) -> None:
    def change(ich: dict[str, Any]) -> None:
        for key in ("generation", "labels_digest", "history", "created_by", "versions"):
            del ich[key]
        ich["counts"] = {key: ich["counts"][key] for key in ("rows", "ok", "quarantined", "series", "shards")}

    rewrite_root(copy, change)
    np.testing.assert_array_equal(open_dataset(copy).read([3]), pixels[[3]])


def test_volumes_are_named_by_row_or_by_a_uid_of_one_volume(copy: Path, pixels: NDArray[Any]) -> None:
    opened = open_dataset(copy)
    line = opened.series.to_pylist()[1]
    at = slice(line["first_row"], line["first_row"] + line["n_slices"])
    np.testing.assert_array_equal(opened.volume(series_row=1), pixels[at])
    with pytest.raises(TypeError, match="Write series_row=0"):
        opened.volume(0)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no series_row 99"):
        opened.volume(series_row=99)
    with pytest.raises(TypeError, match="either series_row"):
        opened.volume("uid", series_row=1)
    series = opened.series
    replace_table(copy, "series", with_column(series, "series_instance_uid", ["same"] * len(series)))
    with pytest.raises(UsageError, match=r"'same' has \d+ volumes. Choose one by series_row: 0, 1"):
        open_dataset(copy).volume("same")


def test_an_unfinished_build_says_how_to_resume(dataset_path: Path, tmp_path: Path) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "data.zarr")
    (out / "zarr.json").unlink()
    with pytest.raises(DatasetError, match=r"was finished and is no longer there.*moved or deleted"):
        open_dataset(out)
    folder = BuildFolder(working(out))
    write_state(folder, read_state(folder).model_copy(update={"published": None}))
    with pytest.raises(DatasetError, match=r"is not finished.*to resume"):
        open_dataset(out)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_an_error_and_never_zeros(copy: Path) -> None:
    shard_path(copy, 1).unlink()
    assert not by_zarr_python(copy)[16:32].any()  # as every Zarr reader sees it
    damaged = open_dataset(copy)
    with pytest.raises(CorruptionError, match=r"Shard 1 .*file not found"):
        damaged.read([17])
    with pytest.raises(CorruptionError, match="Shard 1 "):
        damaged.read([0, 40, 17], threads=2)
    damaged.read([0, 40])


def test_a_missing_chunk_of_an_ok_row_is_damage(copy: Path) -> None:
    images = zarr.open_group(copy, mode="r+")["images"]
    images[5] = 0  # zarr-python does not write a chunk that contains only the fill value
    with pytest.raises(CorruptionError, match=r"Row 5 has status ok but no chunk in shard 0"):
        open_dataset(copy).read([4, 5, 6])


def test_a_quarantined_row_is_refused_with_its_status(copy: Path) -> None:
    zarr.open_group(copy, mode="r+")["images"][5] = 0
    slices = pq.read_table(copy / table_name("slices", 1))
    status = slices["status"].to_pylist()
    status[5] = "truncated"
    replace_table(copy, "slices", with_column(slices, "status", status))
    changed = open_dataset(copy)
    with pytest.raises(DatasetError, match=r"Row 5 has the status 'truncated'") as caught:
        changed.read([5])
    assert not isinstance(caught.value, CorruptionError)
    first = changed.series.to_pylist()[0]
    volume = changed.volume(first["series_instance_uid"])
    rows = [row for row in range(first["n_slices"]) if row != 5]
    np.testing.assert_array_equal(volume, changed.read(rows))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [cut, flip_middle, lambda path: path.write_bytes(b""), Path.unlink])
@pytest.mark.parametrize("table", ["slices", "series"])
def test_a_damaged_table_is_an_error_that_names_it(spoil: Callable[[Path], Any], table: str, copy: Path) -> None:
    spoil(copy / "labels" / f"{table}.parquet")
    with pytest.raises(CorruptionError, match=rf"labels/{table}\.parquet cannot be read"):
        open_dataset(copy).read_table(table)


# --- the spec --------------------------------------------------------------------------------------------------------


def test_a_spec_survives_its_json() -> None:
    spec = Spec(layout="rsna", size=256, windows="brain,blood=75/215", codec="none", folds=3)
    assert Spec.model_validate_json(spec.model_dump_json()) == spec
    assert (spec.channels, spec.dtype) == (2, np.uint8)
    hu = Spec(store="hu")
    assert (hu.channels, hu.dtype) == (1, np.int16)


@pytest.mark.parametrize("wrong", [{"size": 8}, {"codec": "gzip"}, {"folds": 1}, {"slices_per_shard": 0}, {"sice": 5}])
def test_an_invalid_spec_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Spec.model_validate(wrong)
