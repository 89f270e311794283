"""A stopped build whose working folder was damaged: the same command makes the same bytes, or says what is damaged."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ich_prep.build_dataset import build
from ich_prep.errors import IchError
from tests.integration.stopped import stop_before
from tests.support.cli import SMALL, copy_with_working_folder, prep, published, working

Damage = Callable[[Path], None]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[random.Random(str(path.name)).randrange(len(data))] ^= 1 << random.Random(len(data)).randrange(8)
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = (flip, Path.unlink, *(pytest.param(slow, marks=pytest.mark.slow) for slow in (cut, zero)))


@pytest.fixture(params=["planned", "scanned", "published"])
def stopped(request: pytest.FixtureRequest, phantom_tree: Path, unfinished: Path, tmp_path: Path) -> Path:
    """A build that was stopped: before its last step, after its plan with some shards, or while it read headers."""
    if request.param == "published":
        return unfinished
    out = tmp_path / "stopped.zarr"
    stop_before("plan.parquet" if request.param == "scanned" else "00002.json", phantom_tree, out)
    return out


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_any_damaged_file_of_the_working_folder_is_made_again_or_named(
    damage: Damage, stopped: Path, phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    files = sorted(path.relative_to(working(stopped)) for path in working(stopped).rglob("*") if path.is_file())
    names = [*{(path.parent, path.suffix, path.parent.name or path.name): str(path) for path in files}.values()]
    assert {"state.json", "files.parquet"} <= {*names}
    for place, name in enumerate(names):
        out = copy_with_working_folder(stopped, tmp_path / f"{place}.zarr")
        damage(working(out) / name)
        try:
            build(phantom_tree, out, SMALL, workers=0)
        except IchError as error:
            assert name == "state.json", (name, error)
            assert str(working(out) / name) in str(error) and "--overwrite" in str(error)
            build(phantom_tree, out, SMALL, workers=0, overwrite=True)
        assert published(out) == published(dataset_path), name
        shutil.rmtree(out)


def test_only_the_shard_of_a_torn_entry_is_written_again(
    unfinished: Path, phantom_tree: Path, dataset_path: Path
) -> None:
    shards = sorted((unfinished / "images" / "c").rglob("0/0/0"))
    before = {path: path.stat().st_mtime_ns for path in shards}
    cut(working(unfinished) / "shards" / "00001.json")
    build(phantom_tree, unfinished, SMALL, workers=0)
    again = [path for path in shards if path.stat().st_mtime_ns != before[path]]
    assert [path.relative_to(unfinished).parts[2] for path in again] == ["1"]
    assert published(unfinished) == published(dataset_path)


def test_a_damaged_plan_is_made_again_without_writing_a_shard(
    unfinished: Path, phantom_tree: Path, dataset_path: Path
) -> None:
    shards = sorted((unfinished / "images" / "c").rglob("0/0/0"))
    before = {path: path.stat().st_mtime_ns for path in shards}
    flip(working(unfinished) / "series.parquet")
    resumed = prep("build", "--src", phantom_tree, "--out", unfinished, "--size", 64, "--slices-per-shard", 16,
                   "--workers", 0)  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in shards} == before
    assert published(unfinished) == published(dataset_path)
