"""The whole build, on files: equal bytes whoever ran it and however often it was killed, and nothing lost unsaid."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from commands import PREP, prep, published, start

from ich_prep import store
from ich_prep.build_dataset import Allowances, build
from ich_prep.errors import BuildError, DatasetError, SourceError, UsageError
from ich_prep.phantom import synthesize
from ich_prep.progress import Silence
from ich_prep.store import Spec, open_dataset
from ich_prep.verify import verify

SMALL = Spec(size=64, slices_per_shard=16)
ANYTHING = Allowances(max_quarantined=1.0)


@pytest.fixture
def tree(phantom_tree: Path, tmp_path: Path) -> Path:
    """A copy of the phantom that a test may change."""
    return Path(shutil.copytree(phantom_tree, tmp_path / "tree"))


@pytest.fixture(scope="module")
def damaged_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two series with every known defect."""
    out = tmp_path_factory.mktemp("damaged") / "rsna"
    synthesize(out, series=2, size=64, defects=True)
    return out


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def train_file(tree: Path, place: int = 0) -> Path:
    return sorted((tree / "stage_2_train").glob("*.dcm"))[place]


# --- equal bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_byte(workers: int, phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    build(phantom_tree, tmp_path / "data.zarr", SMALL, workers=workers)
    assert published(tmp_path / "data.zarr") == published(dataset_path)


def test_where_the_sources_lie_and_how_they_are_listed_changes_no_byte(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    for path in sorted(phantom_tree.rglob("*"), reverse=True):
        if path.is_file():
            target = moved / path.relative_to(phantom_tree)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            os.utime(target, (1, 1))
    build(moved, tmp_path / "data.zarr", SMALL, workers=0)
    assert published(tmp_path / "data.zarr") == published(dataset_path)


def test_a_build_killed_twice_goes_on_to_the_same_bytes(phantom_tree: Path, tmp_path: Path) -> None:
    words = ["build", "--src", phantom_tree, "--size", 64, "--slices-per-shard", 2, "--workers", 2, "--out"]
    out, done = tmp_path / "killed.zarr", tmp_path / "killed.zarr" / "build" / "shards"
    moments: list[Callable[[], bool]] = [
        (out / "build" / "state.json").exists,
        lambda: len(list(done.glob("*.json"))) > 10,
    ]
    for moment in moments:
        process = start(*words, out)
        wait_for(moment, process)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(DatasetError, match="not finished"):
            open_dataset(out)
    kept = len(list(done.glob("*.json")))
    resumed = prep(*words, out)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Writing slices: going on after {kept} of" in resumed.stderr
    assert prep(*words[:-3], "--workers", 0, "--out", tmp_path / "whole.zarr").returncode == 0
    assert published(out) == published(tmp_path / "whole.zarr")


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_build_may_be_killed_at_every_moment(step: int, tmp_path: Path) -> None:
    synthesize(tmp_path / "tree", series=2, size=32)
    reference, program = tmp_path / "reference.zarr", Path(__file__).with_name("crash_points.py")
    build(tmp_path / "tree", reference, Spec(size=32, slices_per_shard=16), workers=0)
    (tmp_path / "work").mkdir()
    words = [program, tmp_path / "tree", reference, tmp_path / "work", step]
    tried = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=280, check=False)
    assert tried.returncode == 0, tried.stderr
    assert int(tried.stdout) > 30


def test_a_worker_that_is_killed_during_the_build_is_survived(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data.zarr"
    words = ["build", "--src", phantom_tree, "--size", 64, "--slices-per-shard", 16, "--workers", 1, "--out", out]
    process = start(*words)
    wait_for((out / "build" / "plan.parquet").exists, process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]
    assert workers
    for worker in workers:
        worker.kill()
    assert process.wait(60) == 0
    assert published(out) == published(dataset_path)


# --- a second run ----------------------------------------------------------------------------------------------------


def test_a_plain_second_run_says_finished_and_does_nothing(phantom_tree: Path, dataset_path: Path) -> None:
    words = ["build", "--src", phantom_tree, "--out", dataset_path, "--size", 64, "--slices-per-shard", 16]
    before = {path: path.stat().st_mtime_ns for path in dataset_path.rglob("*")}
    again = prep(*words, "--workers", 0)
    assert again.returncode == 0, again.stderr
    assert "finished already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in dataset_path.rglob("*")} == before


def test_a_finished_dataset_needs_no_build_folder(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(dataset_path, tmp_path / "data.zarr"))
    shutil.rmtree(out / "build")
    assert build(phantom_tree, out, SMALL, workers=0).already_finished
    with pytest.raises(BuildError, match="size was 64 and is now 32"):
        build(phantom_tree, out, Spec(size=32, slices_per_shard=16), workers=0)
    assert published(out) == published(dataset_path)


def test_another_spec_is_refused_and_named(phantom_tree: Path, dataset_path: Path) -> None:
    other = ["--slices-per-shard", 16, "--size", 32, "--codec", "zstd"]
    refused = prep("build", "--src", phantom_tree, "--out", dataset_path, "--workers", 0, *other)
    assert refused.returncode == 1
    assert "size was 64 and is now 32" in refused.stderr
    assert "codec was 'lz4' and is now 'zstd'" in refused.stderr
    assert "slices_per_shard" not in refused.stderr
    assert "--overwrite" in refused.stderr


def test_other_sources_are_refused_and_named(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    build(tree, out, SMALL, workers=0)
    before = published(out)
    gone, new = train_file(tree), tree / "stage_2_train" / "ID_new.dcm"
    shutil.copy(gone, new)
    with pytest.raises(BuildError, match=r"0 are gone, 0 have another size and 1 are new \(for one, .*ID_new\.dcm"):
        build(tree, out, SMALL, workers=0)
    gone.rename(tmp_path / "aside.dcm")
    new.unlink()
    with pytest.raises(BuildError, match=f"1 are gone, 0 have another size and 0 are new.*{gone.name}"):
        build(tree, out, SMALL, workers=0)
    (tmp_path / "aside.dcm").rename(gone)
    gone.write_bytes(gone.read_bytes() + b"\0\0")
    with pytest.raises(BuildError, match=f"0 are gone, 1 have another size and 0 are new.*{gone.name}"):
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
    with pytest.raises(BuildError, match="the labels are not the same"):
        build(tree, out, SMALL, workers=0)


def test_a_build_in_progress_is_refused_to_another_spec(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    train_file(tree).unlink()
    with pytest.raises(SourceError, match="--allow-missing-images"):
        build(tree, out, SMALL, workers=0)
    with pytest.raises(BuildError, match=r"is the build of something else: folds was 5 and is now 3"):
        build(tree, out, SMALL.model_copy(update={"folds": 3}), workers=0)


def test_overwrite_replaces_a_dataset_and_leaves_nothing_of_it(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data.zarr"
    build(phantom_tree, out, Spec(size=32, slices_per_shard=2, store="hu"), workers=0)
    assert not build(phantom_tree, out, SMALL, workers=0, overwrite=True).already_finished
    assert published(out) == published(dataset_path)


def test_an_overwrite_that_is_killed_is_no_dataset_and_goes_on(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    """The old ledger may not vouch for the new build's shards."""
    out = tmp_path / "data.zarr"
    build(phantom_tree, out, SMALL, workers=0)
    script = (
        "import os, shutil, signal, sys\n"
        "from ich_prep.build_dataset import build\n"
        "from ich_prep.store import Spec\n"
        "real = shutil.rmtree\n"
        "def die(path):\n"
        "    real(path)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "shutil.rmtree = die\n"
        "build(sys.argv[1], sys.argv[2], Spec(size=64, slices_per_shard=16), workers=0, overwrite=True)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, phantom_tree, out], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (out / "build" / "shards").exists()
    with pytest.raises(DatasetError):
        open_dataset(out)
    build(phantom_tree, out, SMALL, workers=0)
    assert published(out) == published(dataset_path)


def test_two_builds_of_one_dataset_at_a_time_are_refused(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data.zarr"
    words = ["build", "--src", phantom_tree, "--size", 64, "--slices-per-shard", 16, "--workers", 0, "--out", out]
    first = start(*words)
    wait_for((out / "build" / "state.json").exists, first)
    os.killpg(first.pid, signal.SIGSTOP)
    try:
        for more in ([], ["--overwrite"]):
            second = prep(*words, *more)
            assert second.returncode == 1
            assert "Another process is building" in second.stderr
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    assert first.wait(60) == 0
    assert published(out) == published(dataset_path)


@pytest.mark.parametrize("more", [{}, {"overwrite": True}])
def test_a_folder_that_is_not_ours_is_not_touched(more: dict[str, bool], phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos"
    (out / "build").mkdir(parents=True)
    (out / "build" / "summer.jpg").write_bytes(b"photo")
    with pytest.raises(UsageError, match="Nothing in it was touched"):
        build(phantom_tree, out, SMALL, workers=0, **more)
    assert [path.name for path in out.rglob("*")] == ["build", "summer.jpg"]


@pytest.mark.parametrize("more", [{}, {"overwrite": True}])
def test_another_zarr_group_is_not_touched(more: dict[str, bool], phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "other.zarr"
    out.mkdir()
    (out / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(DatasetError, match="another Zarr group"):
        build(phantom_tree, out, SMALL, workers=0, **more)
    assert [path.name for path in out.rglob("*")] == ["zarr.json"]


def test_an_empty_folder_may_be_built_into(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    build(phantom_tree, tmp_path, SMALL, workers=0)
    assert published(tmp_path) == published(dataset_path)


@pytest.mark.parametrize("below", [".", "data.zarr", "stage_2_train/data.zarr"])
def test_the_dataset_may_not_lie_among_its_sources(below: str, tree: Path) -> None:
    with pytest.raises(UsageError, match="outside of the source tree"):
        build(tree, tree / below, SMALL, workers=0)
    assert not list(tree.rglob("build"))


def test_a_place_where_no_folder_can_be_made(phantom_tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match=r"Writing .*file/data\.zarr failed: Not a directory"):
        build(phantom_tree, tmp_path / "file" / "data.zarr", SMALL, workers=0)


# --- nothing is lost unsaid ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rsna", "folder", "cq500"])
def test_every_file_is_a_row_or_a_line_of_the_quarantine(layout: str, tmp_path: Path) -> None:
    src, out = tmp_path / "tree", tmp_path / "data.zarr"
    synthesize(src, series=3, size=64, layout=layout, defects=True)
    counts = build(
        src, out, SMALL, workers=0, allow=Allowances(max_quarantined=1.0, missing_images=layout == "cq500")
    ).counts
    dataset = open_dataset(out)
    quarantine = dataset.read_table(store.QUARANTINE)
    files = {str(path.relative_to(src)) for path in src.rglob("*") if path.is_file() and path.suffix != ".csv"}
    kept = set(pq.read_table(out / "build" / "plan.parquet", columns=["path"])["path"].to_pylist())
    assert counts["found"] == len(files) == counts["ok"] + counts["quarantined"]
    assert counts["planned"] == len(dataset) == counts["ok"]
    assert kept | set(quarantine["path"].to_pylist()) == files
    assert len(kept) + len(quarantine) == len(files)
    assert dataset.slices.schema == store.SLICE_SCHEMA
    assert dataset.series.schema == store.SERIES_SCHEMA
    assert quarantine.schema == store.QUARANTINE_SCHEMA
    assert dataset.read_table(store.SHARDS).schema == store.SHARD_SCHEMA
    assert not verify(out, src=src, sample=1.0, progress=Silence()).problems


def test_known_defects_are_flagged_or_repaired(damaged_tree: Path, tmp_path: Path) -> None:
    build(damaged_tree, tmp_path / "data.zarr", SMALL, workers=0, allow=ANYTHING)
    slices = open_dataset(tmp_path / "data.zarr").slices
    flags = {flag for line in slices["flags"].to_pylist() for flag in line}
    assert {"constant", "noise", "clipped_high"} <= flags
    repaired = slices.filter(pc.greater(pc.list_value_length(slices["repairs"]), 0))
    assert len(repaired) == 3
    assert set(repaired["rescale_intercept"].to_pylist()) == {0.0, 1.0}
    # Repaired, the heads hold air, brain and bone like any other.
    assert max(repaired["hu_min"].to_pylist()) <= -900
    assert all(-700 < mean < 0 for mean in repaired["hu_mean"].to_pylist())


def test_a_file_that_changes_or_vanishes_after_the_scan_keeps_its_row(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    more = ["--slices-per-shard", 2, "--workers", 0, "--max-quarantined", 0.1]
    building = start("build", "--src", tree, "--out", out, "--size", 64, *more)
    plan = out / "build" / "plan.parquet"
    wait_for(plan.exists, building)
    os.killpg(building.pid, signal.SIGSTOP)  # the plan is written, the last shards are not
    lines = pq.read_table(plan, columns=["row", "path"]).to_pylist()[-20:-5:5]
    changed, gone, shorter = (tree / line["path"] for line in lines)
    other = bytearray(changed.read_bytes())
    other[300] ^= 1  # in the header: the size stays what it was
    changed.write_bytes(other)
    gone.unlink()
    shorter.write_bytes(shorter.read_bytes()[:-100])
    os.killpg(building.pid, signal.SIGCONT)
    assert building.wait(60) == 0

    dataset = open_dataset(out)
    lost = {line["row"]: line["path"] for line in lines}
    status = dict(enumerate(dataset.slices["status"].to_pylist()))
    words = ["changed", "unreadable", "changed"]
    assert {row: word for row, word in status.items() if word != "ok"} == dict(zip(lost, words, strict=True))
    quarantine = dataset.read_table(store.QUARANTINE).to_pylist()
    assert [(line["stage"], line["row"], line["path"], line["reason"]) for line in quarantine] == [
        ("shard", row, path, word) for (row, path), word in zip(lost.items(), words, strict=True)
    ]
    counts = dataset.ich["counts"]
    assert counts["found"] == counts["planned"] == counts["ok"] + counts["quarantined"]
    assert counts["quarantined"] == 3
    assert sum(dataset.series["n_ok"].to_pylist()) == counts["ok"]
    with pytest.raises(DatasetError, match="was set aside with the status 'changed'"):
        dataset.read([lines[0]["row"]])
    assert not verify(out, src=tree, sample=1.0, progress=Silence()).problems


def test_too_many_damaged_files_end_the_build_and_may_be_allowed(damaged_tree: Path, tmp_path: Path) -> None:
    words = ["build", "--src", damaged_tree, "--out", tmp_path / "data.zarr", "--size", 64, "--workers", 0]
    refused = prep(*words)
    assert refused.returncode == 1
    # Two that are no DICOM, one empty, one truncated, one that lies about its size; a scout is no damage.
    assert "5 of " in refused.stderr
    assert "2 not_dicom" in refused.stderr
    assert "localizer" not in refused.stderr
    assert "--max-quarantined" in refused.stderr
    assert prep(*words, "--max-quarantined", 0.5).returncode == 0


def test_labels_that_do_not_fit_are_refused_listed_and_allowed(tree: Path, tmp_path: Path) -> None:
    out, lost = tmp_path / "data.zarr", train_file(tree)
    lost.unlink()
    with pytest.raises(SourceError, match=f"1 labels have no image .for one, {lost.stem}"):
        build(tree, out, SMALL, workers=0)
    listed = pq.read_table(out / "build" / "label_problems.parquet").to_pylist()
    assert listed == [{"problem": "missing_image", "key": lost.stem}]
    build(tree, out, SMALL, workers=0, allow=Allowances(missing_images=True))
    assert len(open_dataset(out)) == len(list(tree.rglob("*.dcm")))


def test_slices_without_a_label_are_refused_or_allowed(tmp_path: Path) -> None:
    src, out = tmp_path / "tree", tmp_path / "data.zarr"
    synthesize(src, series=1, size=32, layout="folder")
    (src / "labels.csv").unlink()
    with pytest.raises(SourceError, match=r"slices have no label.*--allow-unlabelled"):
        build(src, out, SMALL, workers=0)
    build(src, out, SMALL, workers=0, allow=Allowances(unlabelled=True))
    slices = open_dataset(out).slices
    assert set(slices["label_level"].to_pylist()) == {"none"}
    assert slices["any"].null_count == len(slices)


def test_contradicting_labels_are_refused_or_unknown(tree: Path, tmp_path: Path) -> None:
    csv = tree / "stage_2_train.csv"
    sop = train_file(tree).stem
    said = next(line for line in csv.read_text().splitlines() if line.startswith(f"{sop}_subdural"))
    with csv.open("a") as file:
        file.write(f"{sop}_subdural,{1 - int(said[-1])}\n")
    with pytest.raises(SourceError, match=f"contradict.*{sop} .subdural"):
        build(tree, tmp_path / "data.zarr", SMALL, workers=0)
    build(tree, tmp_path / "data.zarr", SMALL, workers=0, allow=Allowances(contradictions=True))
    slices = open_dataset(tmp_path / "data.zarr").slices
    assert slices.filter(pc.equal(slices["sop_instance_uid"], sop))["subdural"].to_pylist() == [None]


def test_a_tree_without_slices_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "notes.txt").write_text("none")
    with pytest.raises(SourceError, match="every one of the 1 files was set aside: 1 not_dicom"):
        build(tmp_path / "tree", tmp_path / "data.zarr", SMALL, workers=0, allow=ANYTHING)


# --- full disk, memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_is_full_gives_a_message_and_the_build_goes_on_later(
    workers: int, phantom_tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data.zarr"
    words = ["--src", phantom_tree, "--out", out, "--size", 64, "--slices-per-shard", 64, "--workers", workers]

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))

    full = subprocess.run(
        [PREP, "build", *map(str, words)], capture_output=True, text=True, check=False, preexec_fn=small_files_only
    )
    assert full.returncode == 1
    assert f"Error: Writing {out} failed: File too large. What is finished is kept" in full.stderr
    assert "Traceback" not in full.stderr
    with pytest.raises(DatasetError, match="not finished"):
        open_dataset(out)
    assert prep("build", *words).returncode == 0
    assert not verify(out, src=phantom_tree, sample=0.1, progress=Silence()).problems


MEASURE = """
import json, sys
from pathlib import Path
from ich_prep import build_dataset, execute
from ich_prep.store import Spec

def peak(_=0):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

real = execute.Pool.__exit__
def measured(pool, *details):
    peaks.update(pool._client.run(peak))
    real(pool, *details)

if __name__ == "__main__":
    peaks = {}
    execute.Pool.__exit__ = measured
    build_dataset.build(sys.argv[1], sys.argv[2], Spec(), workers=2)
    print(json.dumps([peak(), *peaks.values()]))
"""


@pytest.mark.slow
def test_driver_and_workers_stay_below_a_gibibyte(tmp_path: Path) -> None:
    synthesize(tmp_path / "tree", series=10, size=512, workers=2)
    slices = len(list((tmp_path / "tree").rglob("*.dcm")))
    assert slices > 256  # more than one shard of the usual size
    program = tmp_path / "measure.py"
    program.write_text(MEASURE)
    done = subprocess.run(
        [sys.executable, program, tmp_path / "tree", tmp_path / "data.zarr"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert len(peaks) == 3
    assert max(peaks) < 1024 * 1024, f"{peaks} KiB"


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "size"), [("lz4", 64), ("zstd", 32), ("none", 100)])
def test_every_store_holds_what_the_definitions_give(codec: str, size: int, phantom_tree: Path, tmp_path: Path) -> None:
    """Smaller, as it is, larger; the windowed store is the windows of the HU store."""
    stores = {}
    for kind in ("windows", "hu"):
        spec = Spec(size=size, store=kind, codec=codec, slices_per_shard=32)
        build(phantom_tree, tmp_path / kind, spec, workers=0)
        stores[kind] = open_dataset(tmp_path / kind)
        assert not verify(tmp_path / kind, src=phantom_tree, sample=0.1, progress=Silence()).problems
    windows, hu = stores["windows"], stores["hu"]
    rows = range(len(hu))
    codes, values = windows.read(rows), hu.read(rows)
    assert (codes.dtype, codes.shape[1:]) == (np.uint8, (3, size, size))
    assert (values.dtype, values.shape[1:]) == (np.int16, (1, size, size))
    for channel, window in enumerate(windows.spec.windows):
        np.testing.assert_array_equal(codes[:, channel], window_of(values[:, 0], window.center, window.width))
    assert windows.slices.equals(hu.slices)


def window_of(hu: np.ndarray, center: float, width: float) -> np.ndarray:
    """LINEAR_EXACT of PS3.3 C.11.2.1.3.2, written out once more."""
    return np.rint(np.clip((hu - (center - width / 2)) / width, 0, 1) * 255).astype(np.uint8)


def test_the_label_table_says_what_the_csv_says(phantom_tree: Path, dataset_path: Path) -> None:
    lines = (phantom_tree / "stage_2_train.csv").read_text().splitlines()[1:]
    said = {tuple(line.split(",")[0].rsplit("_", 1)): int(line[-1]) for line in lines}
    listed = (phantom_tree / "stage_2_sample_submission.csv").read_text().splitlines()[1:]
    order = list(dict.fromkeys(line.rsplit("_", 1)[0] for line in listed))
    for line in open_dataset(dataset_path).slices.to_pylist():
        sop = line["sop_instance_uid"]
        if line["subset"] == "train":
            assert {name: line[name] for name in store.CLASSES} == {name: said[sop, name] for name in store.CLASSES}
            assert line["fold"] is not None
        else:
            assert [line[name] for name in store.CLASSES] == [None] * 6
            assert order[line["label_line"]] == sop
            assert line["fold"] is None


def test_equal_pixels_under_two_patients_have_equal_hashes(damaged_tree: Path, tmp_path: Path) -> None:
    build(damaged_tree, tmp_path / "data.zarr", SMALL, workers=0, allow=ANYTHING)
    slices = open_dataset(tmp_path / "data.zarr").slices
    groups = slices.group_by("content_hash").aggregate([("patient_id", "count_distinct"), ("row", "count")])
    twice = groups.filter(pc.greater(groups["row_count"], 1))
    assert twice["row_count"].to_pylist() == [2]
    assert twice["patient_id_count_distinct"].to_pylist() == [2]


# --- real files ------------------------------------------------------------------------------------------------------


def test_real_heads(real_data: Path, tmp_path: Path) -> None:
    src, out = real_data / "head_ct", tmp_path / "data.zarr"
    words = ["--layout", "folder", "--allow-unlabelled", "--slices-per-shard", 16, "--workers", 0]
    built = prep("build", "--src", src, "--out", out, *words)
    assert built.returncode == 0, built.stderr
    dataset = open_dataset(out)
    assert len(dataset) == 56
    assert dataset.series["n_ok"].to_pylist() == [28, 28]
    quarantine = dataset.read_table(store.QUARANTINE).to_pylist()
    reasons = {(line["path"].split("/")[1].split("_")[0], line["reason"]) for line in quarantine}
    assert {reason for _, reason in reasons} == {"localizer", "derived", "not_ct"}
    assert all(line["stage"] == "scan" for line in quarantine)
    checked = prep("verify", out, "--src", src, "--sample", 1)
    assert checked.returncode == 0, checked.stderr
    assert "56 slices compared" in checked.stdout


def test_the_brain_of_a_real_head_has_the_hu_of_brain(real_data: Path, tmp_path: Path) -> None:
    """GE's files have a rescale intercept of 0 and a padding of -1500; the brain is at 20 to 40 HU all the same."""
    out = tmp_path / "data.zarr"
    build(
        real_data / "head_ct" / "ge_hispeed",
        out,
        Spec(store="hu", layout="folder"),
        workers=0,
        allow=Allowances(unlabelled=True),
    )
    dataset = open_dataset(out)
    slices, series = dataset.slices, dataset.series
    assert set(slices["rescale_intercept"].to_pylist()) == {0.0}
    assert series["tilt_degrees"].to_pylist() == pytest.approx([18.5], abs=0.2)
    volume = dataset.volume(series["series_instance_uid"][0].as_py())[:, 0]
    middle = volume[14:24, 200:312, 200:312]
    brain = middle[(middle > 0) & (middle < 80)]
    assert len(brain) > 0.8 * middle.size
    assert 20 <= np.median(brain) <= 40
    assert volume.min() == -1024
