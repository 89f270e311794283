"""A dataset that is not, byte for byte, the one that was written: verify names the culprit and exits with 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ich_prep.build_dataset import build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import ROOT, TABLES, shard_path, table_name
from ich_prep.dataset.shard_format import index_bytes
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.tables import write_table
from ich_prep.errors import DatasetError, SourceError, UsageError
from ich_prep.phantom import synthesize
from ich_prep.progress import NoProgress
from ich_prep.verify import Verification, verify
from tests.support.cli import copy_with_working_folder, prep, working

FILES = [ROOT, "images/zarr.json", "labels/zarr.json", *(table_name(table, 1) for table in TABLES)]
SHARD = "images/c/1/0/0/0"


@pytest.fixture
def dataset(dataset_path: Path, tmp_path: Path) -> Path:
    """A copy of the dataset to damage."""
    return copy_with_working_folder(dataset_path, tmp_path / "data.zarr")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def checked(dataset: Path) -> Verification | DatasetError:
    """Return the problems that verify reports; a dataset too damaged to be opened is an error."""
    try:
        return verify(dataset, progress=NoProgress())
    except DatasetError as error:
        return error


def blamed(dataset: Path) -> str:
    """Return the culprits, or the message that names them."""
    found = checked(dataset)
    return str(found) if isinstance(found, DatasetError) else "\n".join(problem.culprit for problem in found.problems)


def test_a_clean_dataset_is_ok(dataset_path: Path, phantom_tree: Path) -> None:
    found = prep("verify", dataset_path, "--src", phantom_tree, "--sample", 0.05)
    assert found.returncode == 0, found.stderr
    count = len(open_dataset(dataset_path))
    assert (
        f"OK ({-(-count // 16)} shards, {count} slices verified; {round(0.05 * count)} slices compared" in found.stdout
    )
    as_json = json.loads(prep("verify", dataset_path, "--json").stdout)
    assert as_json["ok"] is True
    assert as_json["problems"] == []


def test_a_damaged_dataset_ends_with_1_and_names_the_culprit(dataset: Path) -> None:
    flip(dataset / SHARD, 100)
    found = prep("verify", dataset)
    assert found.returncode == 1
    assert f"{dataset}: verification failed: 1 problem. " in found.stderr
    assert f"{dataset / SHARD}: shard 1: row 16: checksum mismatch (stored 0x" in found.stderr
    as_json = prep("verify", dataset, "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["ok"] is False
    assert [problem["culprit"] for problem in json.loads(as_json.stdout)["problems"]] == [str(dataset / SHARD)]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("name", [*FILES, SHARD])
def test_a_flipped_bit_is_reported_in_every_file(name: str, share: float, dataset: Path) -> None:
    path = dataset / name
    flip(path, round(share * (path.stat().st_size - 1)))
    assert str(path) in blamed(dataset)


def test_a_flipped_bit_is_reported_in_every_part_of_a_shard(dataset: Path) -> None:
    path = dataset / SHARD
    whole = path.read_bytes()
    index = len(whole) - index_bytes(16)
    places = [0, 15, 16, 17, index // 2, index - 4, index - 1, index, index + 8, len(whole) - 5, len(whole) - 1]
    for at in places:
        flip(path, at)
        assert blamed(dataset) == str(path), at
        path.write_bytes(whole)
    assert blamed(dataset) == ""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("harm", [cut, halve, empty, lengthen, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, SHARD])
def test_other_lengths_are_reported_for_every_file(name: str, harm: Callable[[Path], None], dataset: Path) -> None:
    harm(dataset / name)
    assert str(dataset if name == ROOT else dataset / name) in blamed(dataset)


def test_swapped_shards_are_both_reported(dataset: Path) -> None:
    one, other = shard_path(dataset, 0), shard_path(dataset, 1)
    one.rename(dataset / "aside")
    other.rename(one)
    (dataset / "aside").rename(other)
    assert blamed(dataset).splitlines() == [str(one), str(other)]


def test_the_same_shard_of_another_dataset_is_reported(dataset: Path, tmp_path: Path) -> None:
    """Valid, of the same length and with the same missing chunks: only its content differs."""
    src = tmp_path / "tree"
    spec = Spec(size=32, slices_per_shard=16, codec="none")
    pair = []
    for seed in (0, 1):
        synthesize(src, series=1, size=32, seed=seed)
        build(src, tmp_path / f"{seed}.zarr", spec, workers=0)
        shutil.rmtree(src)
        pair.append(shard_path(tmp_path / f"{seed}.zarr", 0))
    shutil.copy(pair[1], pair[0])
    found = checked(tmp_path / "0.zarr")
    assert isinstance(found, Verification)
    assert [problem.culprit for problem in found.problems] == [str(pair[0])]
    assert "swapped" in found.problems[0].what


@pytest.mark.parametrize(
    "name",
    ["extra", "labels/extra.parquet", "images/extra", "images/c/extra", "images/c/0/0/1/0", "images/c/99/0/0/0"],
)
def test_an_unknown_file_is_reported(name: str, dataset: Path) -> None:
    (dataset / name).parent.mkdir(parents=True, exist_ok=True)
    (dataset / name).write_bytes(b"extra")
    assert blamed(dataset) == str(dataset / name)


def test_a_dataset_without_its_working_folder_is_ok(dataset: Path) -> None:
    shutil.rmtree(working(dataset))
    assert blamed(dataset) == ""


def test_an_edited_but_well_formed_table_is_reported(dataset: Path) -> None:
    path = dataset / table_name("slices", 1)
    table = pq.read_table(path)
    place = table.schema.get_field_index("any")
    flipped = [None if value is None else 1 - value for value in table["any"].to_pylist()]
    write_table(path, table.set_column(place, table.schema.field(place), pa.array(flipped, pa.int8())))
    assert blamed(dataset) == str(path)


def test_a_damaged_table_does_not_hide_a_damaged_shard(dataset: Path) -> None:
    flip(dataset / table_name("quarantine", 1), 40)
    flip(dataset / SHARD, 100)
    assert blamed(dataset).splitlines() == [str(dataset / table_name("quarantine", 1)), str(dataset / SHARD)]


def test_a_damaged_plan_does_not_hide_other_damage(dataset: Path, phantom_tree: Path) -> None:
    plan = working(dataset) / "plan.parquet"
    plan.write_bytes(b"PAR1")
    flip(dataset / SHARD, 100)
    found = verify(dataset, src=phantom_tree, progress=NoProgress())
    assert [problem.culprit for problem in found.problems] == [str(dataset / SHARD), str(plan)]
    assert found.compared == 0


def test_an_edited_but_well_formed_root_is_reported(dataset: Path) -> None:
    path = dataset / ROOT
    document = json.loads(path.read_text())
    document["attributes"]["ich"]["counts"]["found"] += 1
    path.write_text(json.dumps(document, indent=2, sort_keys=True))
    assert f"{path} is damaged: digest mismatch: it was changed" in blamed(dataset)


def test_a_ledger_mismatch_is_reported(dataset: Path) -> None:
    path = working(dataset) / "shards" / "00001.json"
    path.write_text(path.read_text().replace('"ok"', '"changed"', 1))
    assert blamed(dataset) == str(path)
    path.write_text("{")
    assert blamed(dataset) == str(path)


def test_a_changed_source_is_reported(dataset: Path, phantom_tree: Path, tmp_path: Path) -> None:
    src = Path(shutil.copytree(phantom_tree, tmp_path / "tree"))
    plan = pq.read_table(working(dataset) / "plan.parquet", columns=["path"])["path"].to_pylist()
    flip(src / plan[3], -(64 * 64) + 64)  # the pixel in the middle, by 16 HU
    (src / plan[5]).write_bytes(b"not DICOM")
    (src / plan[7]).unlink()
    found = verify(dataset, src=src, sample=1.0, progress=NoProgress())
    assert [problem.culprit for problem in found.problems] == ["row 3", "row 5", "row 7"]
    assert "pixels differ" in found.problems[0].what
    assert found.compared == len(plan)


def test_a_folder_without_the_sources_is_a_usage_error(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"None of the \d+ sampled source files .*for example stage_2_t"):
        verify(dataset, src=tmp_path, sample=1.0, progress=NoProgress())
    with pytest.raises(SourceError, match="Expected a folder of DICOM files"):
        verify(dataset, src=tmp_path / "nowhere", progress=NoProgress())


def test_the_sample_is_drawn_by_its_seed(dataset_path: Path, phantom_tree: Path) -> None:
    compared = [
        verify(dataset_path, src=phantom_tree, sample=share, seed=3, progress=NoProgress()).compared
        for share in (1e-9, 0.1)
    ]
    assert compared == [1, round(0.1 * len(open_dataset(dataset_path)))]


@pytest.mark.parametrize("sample", [0.0, -1.0, 1.5, float("nan")])
def test_an_invalid_sample_is_refused(sample: float, dataset_path: Path) -> None:
    with pytest.raises(UsageError, match=r"within 0..1"):
        verify(dataset_path, sample=sample, progress=NoProgress())


def test_without_the_plan_nothing_can_be_compared(dataset: Path, phantom_tree: Path) -> None:
    shutil.rmtree(working(dataset))
    with pytest.raises(UsageError, match="needs the working folder of the build"):
        verify(dataset, src=phantom_tree, progress=NoProgress())


def test_litter_of_an_operating_system_is_a_note_and_survives_overwrite(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "d.zarr")
    names = (".DS_Store", "images/._zarr.json", "labels/Thumbs.db", "images/c/@eaDir/x", "desktop.ini")
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"litter")
    (working(out) / ".DS_Store").write_bytes(b"litter")
    done = prep("verify", out)
    assert done.returncode == 0, done.stderr
    assert all(f"Note: {out / name} is litter" in done.stderr for name in names)
    again = prep("build", "--src", phantom_tree, "--out", out, "--size", 64, "--slices-per-shard", 16, "--workers", 0,
                 "--overwrite")  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert all((out / name).exists() for name in names)
    assert prep("clean", out).returncode == 0
    assert not working(out).exists()
