"""A build depends only on its sources and spec, however often it was killed and whatever existed before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from distributed import LocalCluster

from ich_prep.build_dataset import build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.errors import BuildError, DatasetError, SourceError, UsageError
from ich_prep.phantom import synthesize
from ich_prep.stages.state import BuildFolder, read_state, write_state
from tests.support.cli import SMALL, copy_with_working_folder, prep, published, start, train_file, working
from tests.support.pausing import pausing, wait_until_paused

ROOT = Path(__file__).parents[2]

# --- equal bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_byte(workers: int, phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    build(phantom_tree, tmp_path / "data.zarr", SMALL, workers=workers)
    assert published(tmp_path / "data.zarr") == published(dataset_path)


def test_a_cluster_whose_worker_has_threads_changes_no_byte(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    with LocalCluster(n_workers=1, threads_per_worker=4, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        build(phantom_tree, tmp_path / "data.zarr", SMALL, scheduler=cluster.scheduler_address)
    assert published(tmp_path / "data.zarr") == published(dataset_path)


def test_source_paths_and_listing_order_change_no_byte(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    for path in sorted(phantom_tree.rglob("*"), reverse=True):
        if path.is_file():
            target = moved / path.relative_to(phantom_tree)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            os.utime(target, (1, 1))
    build(moved, tmp_path / "data.zarr", SMALL, workers=0)
    assert published(tmp_path / "data.zarr") == published(dataset_path)


def test_a_build_killed_twice_resumes_to_the_same_bytes(phantom_tree: Path, tmp_path: Path) -> None:
    words = ["build", "--src", phantom_tree, "--size", 64, "--slices-per-shard", 2, "--workers", 2, "--out"]
    out, done = tmp_path / "killed.zarr", tmp_path / "killed.zarr.build" / "shards"
    for pattern, times in (("*/state.json", 1), ("*/shards/*.json", 5)):
        process = start(*words, out, environment=pausing(pattern, times))
        wait_until_paused(process)  # it, or for shards one of its workers
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(DatasetError, match="not finished"):
            open_dataset(out)
    kept = len(list(done.glob("*.json")))
    resumed = prep(*words, out)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Writing slices: resuming after {2 * kept} of" in resumed.stderr
    build(phantom_tree, tmp_path / "whole.zarr", Spec(size=64, slices_per_shard=2), workers=0)
    assert published(out) == published(tmp_path / "whole.zarr")


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_a_build_killed_at_any_fsync_resumes(step: int, tmp_path: Path) -> None:
    synthesize(tmp_path / "tree", series=2, size=32)
    reference = tmp_path / "reference.zarr"
    build(tmp_path / "tree", reference, Spec(size=32, slices_per_shard=16), workers=0)
    (tmp_path / "work").mkdir()
    words = ["-m", "tests.integration.crash_points", tmp_path / "tree", reference, tmp_path / "work", step]
    tried = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert tried.returncode == 0, tried.stderr
    assert int(tried.stdout) > 30


def test_a_build_survives_a_killed_worker(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    words = ["build", "--src", phantom_tree, "--size", 64, "--slices-per-shard", 16, "--workers", 1, "--out", out]
    process = start(*words, environment=pausing("*/plan.parquet"))
    wait_until_paused(process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]
    assert workers
    for worker in workers:
        worker.kill()
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(60) == 0
    assert published(out) == published(dataset_path)


# --- a second run ----------------------------------------------------------------------------------------------------


def test_a_second_run_reports_finished_and_does_nothing(phantom_tree: Path, dataset_path: Path) -> None:
    words = ["build", "--src", phantom_tree, "--out", dataset_path, "--size", 64, "--slices-per-shard", 16]
    before = {path: path.stat().st_mtime_ns for path in dataset_path.rglob("*")}
    again = prep(*words, "--workers", 0)
    assert again.returncode == 0, again.stderr
    assert "already finished" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in dataset_path.rglob("*")} == before


def test_a_dataset_without_its_working_folder_is_compared_with_the_sources(
    tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(dataset_path, tmp_path / "data.zarr"))
    shutil.copy(train_file(tree), tree / "stage_2_train" / "ID_new.dcm")
    with pytest.raises(BuildError, match=r"the source files have changed .*only with the working folder"):
        build(tree, out, SMALL, workers=0)


def test_a_finished_dataset_needs_no_working_folder(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(dataset_path, tmp_path / "data.zarr"))
    assert build(phantom_tree, out, SMALL, workers=0).already_finished
    with pytest.raises(BuildError, match="size was 64, now 32"):
        build(phantom_tree, out, Spec(size=32, slices_per_shard=16), workers=0)
    assert published(out) == published(dataset_path)


def test_the_working_folder_may_be_elsewhere(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "data.zarr", tmp_path / "private" / "work"
    words = ["build", "--src", phantom_tree, "--out", out, "--build-dir", elsewhere, "--size", 64]
    built = prep(*words, "--slices-per-shard", 16, "--workers", 0)
    assert built.returncode == 0, built.stderr
    assert published(out) == published(dataset_path)
    assert (elsewhere / "plan.parquet").exists() and not working(out).exists()
    checked = prep("verify", out, "--src", phantom_tree, "--build-dir", elsewhere)
    assert checked.returncode == 0, checked.stderr
    without = prep("verify", out, "--src", phantom_tree)
    assert without.returncode == 2 and "needs the working folder" in without.stderr


def test_a_dataset_and_its_working_folder_may_be_renamed(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "renamed.zarr")
    assert build(phantom_tree, out, SMALL, workers=0).already_finished
    checked = prep("verify", out, "--src", phantom_tree)
    assert checked.returncode == 0, checked.stderr


def test_a_working_folder_of_another_dataset_is_refused(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "data.zarr")
    build(phantom_tree, tmp_path / "other.zarr", Spec(size=32), workers=0)
    shutil.rmtree(working(out))
    working(tmp_path / "other.zarr").rename(working(out))
    with pytest.raises(BuildError, match="belongs to another dataset"):
        build(phantom_tree, out, SMALL, workers=0)
    for command in (["verify", out, "--src", phantom_tree], ["clean", out]):
        refused = prep(*command)
        assert refused.returncode != 0 and "belongs to another dataset" in refused.stderr
    assert (working(out) / "plan.parquet").exists()


def test_the_dataset_contains_nothing_private(phantom_tree: Path, dataset_path: Path) -> None:
    assert sorted(path.name for path in dataset_path.iterdir()) == ["images", "labels", "zarr.json"]
    published_bytes = b"".join(path.read_bytes() for path in dataset_path.rglob("*.json"))
    assert str(phantom_tree).encode() not in published_bytes
    assert not [path for path in dataset_path.rglob("*") if path.suffix in (".jsonl", ".lock")]


def test_clean_removes_the_working_folder_and_nothing_else(dataset_path: Path, tmp_path: Path) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "data.zarr")
    cleaned = prep("clean", out)
    assert cleaned.returncode == 0, cleaned.stderr
    assert f"Removed {working(out)}" in cleaned.stdout
    assert not working(out).exists()
    assert published(out) == published(dataset_path)
    assert prep("clean", out).returncode == 0


def test_clean_refuses_a_folder_with_other_files(dataset_path: Path, tmp_path: Path) -> None:
    out = copy_with_working_folder(dataset_path, tmp_path / "data.zarr")
    (working(out) / "thesis.tex").write_text("mine")
    refused = prep("clean", out)
    assert refused.returncode == 2 and "thesis.tex" in refused.stderr
    assert (working(out) / "thesis.tex").exists() and (working(out) / "plan.parquet").exists()


def test_another_spec_is_refused_and_named(phantom_tree: Path, dataset_path: Path) -> None:
    other = ["--slices-per-shard", 16, "--size", 32, "--codec", "zstd"]
    refused = prep("build", "--src", phantom_tree, "--out", dataset_path, "--workers", 0, *other)
    assert refused.returncode == 1
    assert "size was 64, now 32" in refused.stderr
    assert "codec was lz4, now zstd" in refused.stderr
    assert "slices_per_shard" not in refused.stderr
    assert "--overwrite" in refused.stderr


def test_other_sources_are_refused_and_named(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    build(tree, out, SMALL, workers=0)
    before = published(out)
    gone, new = train_file(tree), tree / "stage_2_train" / "ID_new.dcm"
    shutil.copy(gone, new)
    with pytest.raises(BuildError, match=r"0 gone, 0 of another size, 1 new \(for example .*ID_new\.dcm"):
        build(tree, out, SMALL, workers=0)
    gone.rename(tmp_path / "aside.dcm")
    new.unlink()
    with pytest.raises(BuildError, match=f"1 gone, 0 of another size, 0 new.*{gone.name}"):
        build(tree, out, SMALL, workers=0)
    (tmp_path / "aside.dcm").rename(gone)
    gone.write_bytes(gone.read_bytes() + b"\0\0")
    with pytest.raises(BuildError, match=f"0 gone, 1 of another size, 0 new.*{gone.name}"):
        build(tree, out, SMALL, workers=0)
    assert published(out) == before


def test_other_labels_are_refused(tree: Path, tmp_path: Path) -> None:
    out, csv = tmp_path / "data.zarr", tree / "stage_2_train.csv"
    build(tree, out, SMALL, workers=0)
    lines = csv.read_text().splitlines()
    slices = {line.rsplit("_", 1)[0] for line in lines[1:]}
    negative = next(sop for sop in sorted(slices) if f"{sop}_any,0" in lines)
    flipped = [
        line.replace(",0", ",1") if line.startswith((f"{negative}_any", f"{negative}_sub")) else line for line in lines
    ]
    csv.write_text("\n".join(flipped) + "\n")
    with pytest.raises(BuildError, match="the labels have changed"):
        build(tree, out, SMALL, workers=0)


def test_a_build_with_a_plan_refuses_another_spec(phantom_tree: Path, unfinished: Path) -> None:
    with pytest.raises(BuildError, match=r"is an unfinished build with other settings or sources: folds was 5, now 3"):
        build(phantom_tree, unfinished, SMALL.model_copy(update={"folds": 3}), workers=0)


def test_a_build_of_other_versions_is_refused(phantom_tree: Path, dataset_path: Path, unfinished: Path) -> None:
    folder = BuildFolder(working(unfinished))
    state = read_state(folder)
    here = state.versions["numpy"]
    write_state(folder, state.model_copy(update={"versions": state.versions | {"numpy": "0.1"}}))
    with pytest.raises(BuildError, match=rf"numpy was 0\.1, now {here}.*--overwrite"):
        build(phantom_tree, unfinished, SMALL, workers=0)
    write_state(folder, state)
    build(phantom_tree, unfinished, SMALL, workers=0)
    assert published(unfinished) == published(dataset_path)


def test_a_shard_of_another_plan_is_rewritten(phantom_tree: Path, dataset_path: Path, unfinished: Path) -> None:
    entry = working(unfinished) / "shards" / "00001.json"
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"plan": "another"}))
    shard = unfinished / "images" / "c" / "1" / "0" / "0" / "0"
    shard.write_bytes(bytes(shard.stat().st_size))
    build(phantom_tree, unfinished, SMALL, workers=0)
    assert published(unfinished) == published(dataset_path)


def test_a_build_without_a_plan_takes_the_current_spec(tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out, lost = tmp_path / "data.zarr", train_file(tree)
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(SourceError, match="--allow-missing-images"):
        build(tree, out, SMALL.model_copy(update={"folds": 3}), workers=0)
    lost.write_bytes(content)
    build(tree, out, SMALL, workers=0)
    assert published(out) == published(dataset_path)


def test_overwrite_replaces_a_dataset_completely(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    build(phantom_tree, out, Spec(size=32, slices_per_shard=2, store="hu"), workers=0)
    assert not build(phantom_tree, out, SMALL, workers=0, overwrite=True).already_finished
    assert published(out) == published(dataset_path)


def test_a_killed_overwrite_is_not_a_dataset_and_resumes(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    """The old ledger must not be used for the new build's shards."""
    out = tmp_path / "data.zarr"
    build(phantom_tree, out, SMALL, workers=0)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from ich_prep.build_dataset import build\n"
        "from ich_prep.dataset.spec import Spec\n"
        "real = Path.unlink\n"
        "def die(path, missing_ok=False):\n"
        "    real(path, missing_ok=missing_ok)\n"
        "    if path.parent.name == '0':\n"  # a shard
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.unlink = die\n"
        "build(sys.argv[1], sys.argv[2], Spec(size=64, slices_per_shard=16), workers=0, overwrite=True)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, phantom_tree, out], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (working(out) / "shards").exists()
    with pytest.raises(DatasetError):
        open_dataset(out)
    build(phantom_tree, out, SMALL, workers=0)
    assert published(out) == published(dataset_path)


def test_two_builds_of_one_dataset_at_a_time_are_refused(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data.zarr"
    words = ["build", "--src", phantom_tree, "--size", 64, "--slices-per-shard", 16, "--workers", 0, "--out", out]
    first = start(*words, environment=pausing("*/state.json"))
    wait_until_paused(first)
    try:
        for more in ([], ["--overwrite"]):
            second = prep(*words, *more)
            assert second.returncode == 1
            assert "Another process is building" in second.stderr
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    assert first.wait(60) == 0
    assert published(out) == published(dataset_path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("names", [["summer.jpg"], ["build/summer.jpg"], ["images/c/0", "labels/x", "main.c"]])
def test_an_unknown_folder_is_not_touched(
    names: list[str], overwrite: bool, phantom_tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "project"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    with pytest.raises(UsageError, match="left untouched"):
        build(phantom_tree, out, SMALL, workers=0, overwrite=overwrite)
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {*names}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_unknown_working_folder_is_not_touched(overwrite: bool, phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    working(out).mkdir()
    (working(out) / "main.c").write_text("mine")
    with pytest.raises(UsageError, match=r"not made by ich-prep \(it contains main\.c\).*--build-dir"):
        build(phantom_tree, out, SMALL, workers=0, overwrite=overwrite)
    assert [path.name for path in working(out).iterdir()] == ["main.c"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_zarr_group_is_not_touched(overwrite: bool, phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "other.zarr"
    out.mkdir()
    (out / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(DatasetError, match="not one that ich-prep wrote"):
        build(phantom_tree, out, SMALL, workers=0, overwrite=overwrite)
    assert [path.name for path in out.rglob("*")] == ["zarr.json"]


def test_an_empty_folder_may_be_built_into(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    build(phantom_tree, tmp_path, SMALL, workers=0)
    assert published(tmp_path) == published(dataset_path)
    shutil.rmtree(working(tmp_path))


@pytest.mark.parametrize("below", [".", "data.zarr", "stage_2_train/data.zarr"])
def test_the_dataset_may_not_be_inside_its_sources(below: str, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree)
    for place in (tree / below, tmp_path / "link" / below):
        with pytest.raises(UsageError, match="inside the source"):
            build(tree, place, SMALL, workers=0)
    assert not list(tree.rglob("*.build"))


def test_a_folder_that_cannot_be_created_is_an_error(phantom_tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match=r"Building .*file/data\.zarr failed: Not a directory"):
        build(phantom_tree, tmp_path / "file" / "data.zarr", SMALL, workers=0)
