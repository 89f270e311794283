"""Heads lie one way: however a head is stored, a build stores it upright and from foot to head, and knows where it was."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from numpy.typing import NDArray

from ich_prep import render_file
from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import shard_path
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.tables import read_parquet
from ich_prep.errors import BuildError
from ich_prep.phantom import synthesize
from ich_prep.progress import NoProgress
from ich_prep.verify import verify
from tests.support.cli import working
from tests.support.sealing import rewrite_root
from tests.support.turned import TURNED, UNDONE, directions, write_turned

SIZE = 64


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six slices of a synthetic head, from foot to head."""
    tree = tmp_path_factory.mktemp("head") / "tree"
    synthesize(tree, series=1, size=SIZE, layout="folder", workers=0)
    return sorted(tree.rglob("*.dcm"))[4:22:3]


def built(tree: Path, out: Path, **spec: object) -> Dataset:
    build(
        tree,
        out,
        Spec.model_validate({"layout": "folder", "size": SIZE, "store": "hu", "slices_per_shard": 16} | spec),
        allow=Allowances(unlabelled=True),
        workers=0,
    )
    return open_dataset(out)


def by_patient(dataset: Dataset) -> dict[str, int]:
    return dict(zip(dataset.series["patient_id"].to_pylist(), dataset.series["series_row"].to_pylist(), strict=True))


def write_all(head: list[Path], tree: Path, **how: object) -> None:
    for turn in TURNED:
        write_turned(head, tree / (turn or "upright"), turn, **how)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def lying(head: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The head stored in the eight ways, each a patient."""
    tree = tmp_path_factory.mktemp("lying") / "tree"
    write_all(head, tree)
    return tree


@pytest.mark.parametrize("seed", range(3))
def test_a_head_stored_in_any_way_has_the_same_pixels(head: list[Path], tmp_path: Path, seed: int) -> None:
    """The eight turns of a head, each rotated and tilted at random, as a supine head may be."""
    rng = np.random.default_rng(seed)
    for turn in TURNED:
        axes = directions(*rng.uniform(-20, 20, 3))
        write_turned(head, tmp_path / "tree" / (turn or "upright"), turn, across_down=axes)
    dataset = built(tmp_path / "tree", tmp_path / "data.zarr")
    volumes = by_patient(dataset)
    expected = dataset.volume(series_row=volumes["upright"])
    assert len(np.unique(expected[3])) > 50 and not np.array_equal(expected[3], expected[3][:, ::-1])
    for turn in TURNED:
        series_row = volumes[turn or "upright"]
        np.testing.assert_array_equal(dataset.volume(series_row=series_row), expected)
        rows = dataset.where(f"series_row == {series_row}")
        assert set(dataset.slices["turn"].take(rows).to_pylist()) == {UNDONE[turn] or None}
        heights = dataset.slices["position_z_mm"].take(rows).to_numpy()
        along = dataset.slices["position_mm"].take(rows).to_numpy()
        assert (np.diff(heights) > 4).all() and (np.diff(along) > 2).all()
        assert dataset.affine_problem(series_row) is None


@pytest.mark.parametrize(
    ("shape", "size", "off"),
    [((64, 64), 32, 0), ((48, 64), 64, 0), ((64, 45), 64, 0), ((64, 40), 32, 0), ((40, 64), 96, 1)],
)
def test_a_turned_volume_agrees_with_the_one_as_stored(
    head: list[Path], tmp_path: Path, shape: tuple[int, int], size: int, off: int
) -> None:
    """The voxel of a place in the patient has the same HU in both, and pixel spacings and sizes stay those of the file."""
    axes = directions(8, -12, 3)
    write_all(head, tmp_path / "tree", shape=shape, spacing=(0.5, 0.75), across_down=axes)
    upright = built(tmp_path / "tree", tmp_path / "upright.zarr", size=size)
    as_stored = built(tmp_path / "tree", tmp_path / "stored.zarr", size=size, orientation="as-stored")
    assert (upright.spec.orientation, as_stored.spec.orientation) == ("patient", "as-stored")
    assert as_stored.slices["turn"].null_count == len(as_stored)
    for turn in TURNED:
        one, other = (by_patient(dataset)[turn or "upright"] for dataset in (upright, as_stored))
        compared = agreeing(upright, one, as_stored, other, off)
        assert compared >= 6 * shape[0] * shape[1] * (size / max(shape)) ** 2
    for name in (
        "pixel_spacing_y_mm",
        "pixel_spacing_x_mm",
        "source_rows",
        "source_columns",
        "content_hash",
        "hu_mean",
    ):
        one_column, other_column = (
            dict(zip(dataset.slices["sop_instance_uid"].to_pylist(), dataset.slices[name].to_pylist(), strict=True))
            for dataset in (upright, as_stored)
        )
        assert one_column == other_column


def agreeing(one: Dataset, one_row: int, other: Dataset, other_row: int, off: int) -> int:
    """Compare the voxels of two volumes that are at one place; return how many there are."""
    affine, stored = one.affine(one_row), other.affine(other_row)
    assert affine is not None and stored is not None
    pixels, voxels = one.volume(series_row=one_row)[:, 0], other.volume(series_row=other_row)[:, 0]
    z, y, x = np.indices(pixels.shape).reshape(3, -1)
    there: NDArray[np.float64] = (np.linalg.solve(stored, affine) @ np.stack([x, y, z, np.ones_like(x)]))[:3]
    index = np.rint(there).astype(int)
    assert np.abs(there - index).max() < 1e-3
    inside = ((index >= 0) & (index < np.array(voxels.shape[::-1])[:, np.newaxis])).all(axis=0)
    found = voxels[index[2, inside], index[1, inside], index[0, inside]].astype(int)
    assert np.abs(found - pixels.reshape(-1)[inside]).max() <= off
    return int(inside.sum())


def test_slices_that_lie_upright_keep_their_bytes(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    spec = Spec(size=SIZE, slices_per_shard=16, orientation="as-stored")
    build(phantom_tree, tmp_path / "stored.zarr", spec, workers=0)
    dataset = open_dataset(dataset_path)
    assert dataset.slices["turn"].null_count == len(dataset)
    for shard in range(dataset.counts.shards):
        both = [hashlib.sha256(shard_path(out, shard).read_bytes()) for out in (dataset_path, tmp_path / "stored.zarr")]
        assert both[0].digest() == both[1].digest()


@pytest.mark.parametrize("store", ["hu", "windows"])
def test_a_turned_dataset_verifies_and_a_file_is_rendered_as_in_it(lying: Path, tmp_path: Path, store: str) -> None:
    dataset = built(lying, tmp_path / "data.zarr", store=store)
    spec = Spec(layout="folder", size=SIZE, store=dataset.spec.store)
    found = verify(tmp_path / "data.zarr", src=lying, sample=1, progress=NoProgress())
    assert found.problems == () and found.compared == 48
    paths = read_parquet(working(tmp_path / "data.zarr") / "plan.parquet", ["path"])["path"].to_pylist()
    for row in range(0, 48, 5):
        np.testing.assert_array_equal(render_file(lying / paths[row], spec), dataset.read([row])[0])


def test_a_slice_of_another_orientation_is_turned_by_its_own(head: list[Path], tmp_path: Path) -> None:
    """A series of which one slice is stored upside down: its pixels are upright, and the volume has no affine."""
    tree = tmp_path / "tree"
    write_turned(head, tree, "", name="mixed")
    write_turned(head, tmp_path / "turned", "rotate_180", name="mixed")
    (tmp_path / "turned" / "002.dcm").replace(tree / "002.dcm")
    dataset = built(tree, tmp_path / "data.zarr")
    assert dataset.slices["turn"].to_pylist() == [None, None, "rotate_180", None, None, None]
    assert [line for line in dataset.slices["flags"].to_pylist() if line] == [["other_orientation"]]
    write_turned(head, tmp_path / "plain", "", name="mixed")
    plain = built(tmp_path / "plain", tmp_path / "plain.zarr")
    np.testing.assert_array_equal(dataset.volume(series_row=0), plain.volume(series_row=0))
    problem = dataset.affine_problem(0)
    assert problem is not None and problem.reason == "slices_differ"


def test_a_turn_is_a_filter(lying: Path, tmp_path: Path) -> None:
    dataset = built(lying, tmp_path / "data.zarr")
    assert len(dataset.where("turn == 'rotate_180'")) == 6
    assert pc.count_distinct(dataset.slices["turn"], mode="only_valid").as_py() == 7


def test_a_dataset_from_before_orientations_is_as_stored(lying: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    built(lying, out, orientation="as-stored")
    shutil.rmtree(working(out))
    rewrite_root(out, lambda ich: ich["spec"].pop("orientation"))
    before = open_dataset(out).digest
    with pytest.raises(BuildError, match="orientation was as-stored, now patient"):
        built(lying, out)
    assert built(lying, out, orientation="as-stored").digest == before
