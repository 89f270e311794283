"""The output of a build and its working folder: nothing of the user's is deleted, whatever is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ich_prep.build_dataset import build
from ich_prep.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.errors import BuildError, DatasetError, UsageError
from ich_prep.phantom import synthesize
from ich_prep.progress import NoProgress
from ich_prep.stages.output import clean, output_lock
from ich_prep.stages.state import build_folder
from ich_prep.verify import verify
from tests.support.archives import zipped
from tests.support.cli import SMALL, copy_with_working_folder, prep, published, working


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "names",
    [[".bashrc", ".ssh/id"], ["scan/1.dcm", "shards/notes.txt"], ["scan/00000.parquet.bak"], ["scan/a/00000.parquet"]],
)
def test_a_folder_with_files_of_the_user_is_no_working_folder(
    names: list[str], overwrite: bool, phantom_tree: Path, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("mine")
    before = files_of(tmp_path / "mine")
    with pytest.raises(UsageError, match="left untouched"):
        build(phantom_tree, tmp_path / "d.zarr", SMALL, build_dir=tmp_path / "mine", workers=0, overwrite=overwrite)
    assert files_of(tmp_path / "mine") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_working_folder_of_another_dataset_does_not_vouch_for_a_folder_of_the_user(
    overwrite: bool, phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    other = copy_with_working_folder(dataset_path, tmp_path / "other.zarr")
    for name in ("images/1.png", "labels/1.txt"):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("mine")
    before = files_of(tmp_path / "project"), files_of(working(other))
    with pytest.raises(UsageError):
        build(phantom_tree, tmp_path / "project", SMALL, build_dir=working(other), workers=0, overwrite=overwrite)
    with pytest.raises(UsageError, match="belongs to another dataset"):
        build(phantom_tree, tmp_path / "new.zarr", SMALL, build_dir=working(other), workers=0, overwrite=overwrite)
    assert (files_of(tmp_path / "project"), files_of(working(other))) == before


def test_overwrite_deletes_only_what_a_build_made(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "d.zarr")
    for name in ("README.md", "labels/notes.txt", "images/preview.png"):
        (out / name).write_text("mine")
    build(phantom_tree, out, Spec(size=32, slices_per_shard=16), workers=0, overwrite=True)
    assert open_dataset(out).spec.size == 32
    assert {(out / name).read_text() for name in ("README.md", "labels/notes.txt", "images/preview.png")} == {"mine"}


@pytest.mark.parametrize("name", [".precious/f", "scan/mine.txt", "mine.txt"])
def test_clean_refuses_a_folder_with_other_files(name: str, dataset_path: Path, tmp_path: Path) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "d.zarr")
    (working(out) / name).parent.mkdir(exist_ok=True)
    (working(out) / name).write_text("mine")
    before = files_of(working(out))
    with pytest.raises(UsageError, match=name):
        clean(out, build_folder(out))
    assert files_of(working(out)) == before


def test_clean_may_be_repeated_after_it_was_interrupted(
    dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "d.zarr")
    unlink, left = Path.unlink, 5

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", interrupted)
        clean(out, build_folder(out))
    assert clean(out, build_folder(out)) > 0
    assert not working(out).exists()


def test_clean_follows_a_link_to_the_working_folder(dataset_path: Path, tmp_path: Path) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "d.zarr")
    working(out).rename(tmp_path / "elsewhere")
    working(out).symlink_to(tmp_path / "elsewhere")
    assert clean(out, build_folder(out)) > 0
    assert not files_of(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("out", "folder"),
    [
        ("a.zarr", "a.zarr/work"),
        ("a.zarr", "b/../a.zarr"),
        ("work/a.zarr", "work"),
        ("done.zarr/x.zarr", "w"),
        ("x", "done.zarr/w"),
    ],
)
def test_a_dataset_and_a_working_folder_do_not_lie_in_each_other(
    out: str, folder: str, phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset_path, tmp_path / "done.zarr")
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match=r"inside"):
        build(phantom_tree, tmp_path / out, SMALL, build_dir=tmp_path / folder, workers=0)
    assert published(tmp_path / "done.zarr") == published(dataset_path)


def test_two_builds_into_one_dataset_with_two_working_folders(phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "d.zarr"
    with output_lock(out), pytest.raises(BuildError, match="with another working folder"):
        build(phantom_tree, out, SMALL, build_dir=tmp_path / "w", workers=0)
    assert not build(phantom_tree, out, SMALL, build_dir=tmp_path / "w", workers=0).already_finished


def test_a_resume_without_its_working_folder_says_so(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(dataset_path, tmp_path / "d.zarr"))
    (out / "zarr.json").unlink()
    with pytest.raises(UsageError, match=r"unfinished build whose working folder is not .*--build-dir"):
        build(phantom_tree, out, SMALL, workers=0)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "ich/9"}'])
def test_a_finished_dataset_does_not_need_a_state_that_can_be_read(
    text: str, phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "d.zarr")
    (working(out) / "state.json").write_text(text)
    assert not verify(out, progress=NoProgress()).problems
    assert build(phantom_tree, out, SMALL, workers=0).already_finished
    with pytest.raises(DatasetError, match="remove the working folder"):
        clean(out, build_folder(out))


@pytest.mark.parametrize("change", ["not json", "codec", "format", "windows"])
def test_a_damaged_dataset_is_replaced_with_overwrite(
    change: str, phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "d.zarr")
    document = json.loads((out / "zarr.json").read_text())
    ich = document["attributes"]["ich"]
    ich["spec"] |= {"codec": "rar"} if change == "codec" else {"windows": []} if change == "windows" else {}
    ich["format"] = "ich/2" if change == "format" else ich["format"]
    (out / "zarr.json").write_text("{" if change == "not json" else json.dumps(document))
    with pytest.raises(DatasetError):
        build(phantom_tree, out, SMALL, workers=0)
    build(phantom_tree, out, SMALL, workers=0, overwrite=True)
    assert published(out) == published(dataset_path)


def test_commands_work_in_the_folder_of_the_dataset(
    dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "d.zarr")
    monkeypatch.chdir(out)
    assert prep("info", ".").returncode == 0
    assert prep("verify", ".").returncode == 0
    assert prep("clean", ".").returncode == 0 and not working(out).exists()
    monkeypatch.chdir(tmp_path)
    for words in (["info", "."], ["info", "/"], ["verify", ""], ["clean", "/"]):
        done = prep(*words)
        assert done.returncode == 1 and "Expected a dataset at" in done.stderr and "Traceback" not in done.stderr
    done = prep("build", "--src", tmp_path / "d.zarr", "--out", "/", "--workers", 0)
    assert done.returncode == 2 and "root of the file system" in done.stderr


def test_info_fits_into_eighty_columns_without_cutting_a_name(dataset_path: Path) -> None:
    shown = prep("info", dataset_path).stdout
    table = shown.split("Positive slices")[1].splitlines()
    assert max(map(len, table)) <= 80
    for name in open_dataset(dataset_path).classes:
        assert any(line.strip().startswith(f"{name} ") for line in table)
    assert not [line for line in shown.splitlines() if line != line.rstrip()]


def test_a_broken_archive_among_the_files_is_named(phantom_tree: Path, tmp_path: Path) -> None:
    tree = Path(shutil.copytree(phantom_tree, tmp_path / "tree"))
    (tree / "more.zip").write_bytes(b"PK\x03\x04 cut off")
    done = prep("build", "--src", tree, "--out", tmp_path / "d.zarr", "--size", 32, "--workers", 0)
    assert done.returncode == 0, done.stderr
    assert "Cannot read the archive more.zip: " in done.stderr


def test_a_label_file_in_an_archive_is_named_as_messages_name_it(tmp_path: Path) -> None:
    synthesize(tmp_path / "tree", series=1, size=32, layout="folder")
    shutil.copy(tmp_path / "tree" / "labels.csv", tmp_path / "tree" / "second.csv")
    archive = zipped(tmp_path / "tree", tmp_path / "tree.zip")
    words = ["build", "--src", archive, "--out", tmp_path / "d.zarr", "--size", 32, "--workers", 0]
    refused = prep(*words)
    assert refused.returncode == 1 and f"{archive}/second.csv" in refused.stderr
    built = prep(*words, "--labels", f"{archive}/second.csv")
    assert built.returncode == 0, built.stderr
