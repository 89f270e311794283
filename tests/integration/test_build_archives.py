"""A build from archives equals the build from the packed folder, for every kind of archive; and the effect of damage."""

from __future__ import annotations

import gzip
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import shard_path
from ich_prep.errors import BuildError, UsageError
from ich_prep.phantom import synthesize
from ich_prep.progress import NoProgress
from ich_prep.verify import verify
from tests.support.archives import zipped
from tests.support.cli import SMALL, copy_with_working_folder, prep, published, working

ANYTHING = Allowances(max_quarantined=1.0)
SERIES = 10  # some 300 files, with each known defect among them


@pytest.fixture(scope="module")
def packed_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An RSNA tree of more than 300 files, with defects."""
    tree = tmp_path_factory.mktemp("packed") / "rsna"
    synthesize(tree, series=SERIES, size=64, seed=5, defects=True)
    return tree


@pytest.fixture(scope="module")
def from_folder(packed_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the tree itself."""
    out = tmp_path_factory.mktemp("from_folder") / "data.zarr"
    counts = build(packed_tree, out, SMALL, workers=0, allow=ANYTHING).counts
    assert counts["found"] > 300 and counts["quarantined"] > 5
    return out


def stored(tree: Path, out: Path) -> Path:
    return zipped(tree, out / "tree.zip", zipfile.ZIP_STORED)


def deflated(tree: Path, out: Path) -> Path:
    return zipped(tree, out / "tree.zip", zipfile.ZIP_DEFLATED)


def in_parts(tree: Path, out: Path) -> Path:
    """A folder in which each subfolder is replaced by an archive."""
    shutil.copytree(tree, out / "parts")
    for folder in [path for path in (out / "parts").iterdir() if path.is_dir()]:
        zipped(folder, folder.with_suffix(".zip"))
        shutil.rmtree(folder)
    return out / "parts"


def gzipped(tree: Path, out: Path) -> Path:
    """A folder of gzip files."""
    shutil.copytree(tree, out / "gzipped")
    for path in [path for path in (out / "gzipped").rglob("*.dcm") if path.is_file()]:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    return out / "gzipped"


@pytest.mark.parametrize("pack", [stored, deflated, in_parts, gzipped])
def test_an_archive_builds_the_same_dataset_as_its_folder(
    pack: Callable[[Path, Path], Path], packed_tree: Path, from_folder: Path, tmp_path: Path
) -> None:
    src, out = pack(packed_tree, tmp_path), tmp_path / "data.zarr"
    build(src, out, SMALL, workers=0, allow=ANYTHING)
    assert published(out) == published(from_folder)
    assert not verify(out, src=src, sample=0.2, progress=NoProgress()).problems


@pytest.mark.parametrize("layout", ["cq500", "folder"])
def test_a_layout_is_recognised_in_an_archive(layout: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    synthesize(tree, series=3, size=64, layout=layout)
    allow = Allowances(missing_images=layout == "cq500")
    build(tree, tmp_path / "folder.zarr", SMALL, workers=0, allow=allow)
    build(deflated(tree, tmp_path), tmp_path / "archive.zarr", SMALL, workers=0, allow=allow)
    assert published(tmp_path / "archive.zarr") == published(tmp_path / "folder.zarr")
    assert open_dataset(tmp_path / "archive.zarr").attributes["spec"]["layout"] == layout


def test_a_dataset_of_a_folder_is_finished_for_its_archive(
    packed_tree: Path, from_folder: Path, tmp_path: Path
) -> None:
    assert build(deflated(packed_tree, tmp_path), from_folder, SMALL, workers=0, allow=ANYTHING).already_finished


def test_a_build_resumes_from_another_container(packed_tree: Path, from_folder: Path, tmp_path: Path) -> None:
    out = copy_with_working_folder(from_folder, tmp_path / "data.zarr")
    (out / "zarr.json").unlink()
    for number in (1, 3):
        (working(out) / "shards" / f"{number:05d}.json").unlink()
        shard_path(out, number).unlink()
    build(stored(packed_tree, tmp_path), out, SMALL, workers=0, allow=ANYTHING)
    assert published(out) == published(from_folder)


def test_an_archive_with_an_unreadable_member_is_another_source(tree: Path, unfinished: Path, tmp_path: Path) -> None:
    src = stored(tree, tmp_path)
    data = bytearray(src.read_bytes())
    at = data.index(b"stage_2_test/ID_", data.index(b"PK\x01\x02")) - 46
    data[at + 8] |= 1  # the first slice is encrypted now
    src.write_bytes(data)
    with pytest.raises(BuildError, match=r"0 of another size, 0 new, 1 damaged in one of the archives only"):
        build(src, unfinished, SMALL, workers=0)


def test_several_sources_are_one_dataset(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    """The same slices, from one folder for each subset: the paths differ, and only the quarantine shows paths."""
    labels = phantom_tree / "stage_2_train.csv"
    parts = [phantom_tree / "stage_2_test", zipped(phantom_tree / "stage_2_train", tmp_path / "stage_2_train.zip")]
    out = tmp_path / "data.zarr"
    words = [word for part in parts for word in ("--src", part)]
    done = prep(
        "build", *words, "--out", out, "--labels", labels, "--size", 64, "--slices-per-shard", 16, "--workers", 1
    )
    assert done.returncode == 0, done.stderr
    found, expected = open_dataset(out), open_dataset(dataset_path)
    for column in ("sop_instance_uid", "subset", "content_hash", "any"):
        assert found.slices[column].equals(expected.slices[column])
    checked = prep("verify", out, *words, "--sample", 0.2)
    assert checked.returncode == 0, checked.stderr


def test_damage_in_an_archive_costs_only_the_damaged_slices(
    packed_tree: Path, from_folder: Path, tmp_path: Path
) -> None:
    src = deflated(packed_tree, tmp_path)
    names = sorted(path.name for path in (packed_tree / "stage_2_train").glob("*.dcm"))
    with zipfile.ZipFile(src) as file:
        infos = [file.getinfo(f"stage_2_train/{name}") for name in names[40:43]]
    damaged = bytearray(src.read_bytes())
    for info in infos:
        damaged[info.header_offset + 30 + len(info.filename) + info.compress_size - 9] ^= 0xFF  # among the pixels
    src.write_bytes(damaged)
    before = open_dataset(from_folder).slices
    build(src, tmp_path / "data.zarr", SMALL, workers=0, allow=ANYTHING)
    dataset = open_dataset(tmp_path / "data.zarr")
    assert len(dataset) == len(before)
    assert Counter(dataset.slices["status"].to_pylist())["bad_archive"] == 3
    lines = [line for line in dataset.read_table("quarantine").to_pylist() if line["reason"] == "bad_archive"]
    assert sorted(line["path"] for line in lines) == [info.filename for info in infos]
    assert all(line["stage"] == "shard" for line in lines)


def test_a_broken_archive_among_others_counts_as_damage(tree: Path, tmp_path: Path) -> None:
    src = in_parts(tree, tmp_path)
    data = zipped(tree / "stage_2_test", src / "more.zip").read_bytes()
    (src / "more.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(BuildError, match=r"1 bad_archive; for example more\.zip: it has no end record"):
        build(src, tmp_path / "data.zarr", SMALL, workers=0, allow=Allowances(max_quarantined=0.0))
    build(src, tmp_path / "data.zarr", SMALL, workers=0, allow=ANYTHING)
    (line,) = open_dataset(tmp_path / "data.zarr").read_table("quarantine").to_pylist()
    assert (line["path"], line["stage"], line["reason"]) == ("more.zip", "scan", "bad_archive")


def test_a_broken_archive_as_the_source_is_an_error(tree: Path, tmp_path: Path) -> None:
    src = stored(tree, tmp_path)
    src.write_bytes(src.read_bytes()[:5000])
    done = prep("build", "--src", src, "--out", tmp_path / "data.zarr", "--workers", 0)
    assert done.returncode == 1
    assert "Cannot read the archive" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data.zarr").exists()


@pytest.mark.parametrize(
    "words", [("--src", "https://host/rsna", "--out", "x.zarr"), ("--src", ".", "--out", "ftp://host/x.zarr")]
)
def test_a_url_of_no_bucket_is_refused_before_anything_is_written(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = prep("build", *words)
    assert done.returncode == 2
    assert f"{words[1 if '://' in words[1] else 3]} is not a place in a bucket" in done.stderr
    assert not [*tmp_path.iterdir()]
    with pytest.raises(UsageError):
        build(words[1], words[3], SMALL, workers=0)
