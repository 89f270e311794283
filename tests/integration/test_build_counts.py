"""Every file is a row, or a line of the quarantine with the reason, even if files change or the disk is full."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from ich_prep import build_dataset
from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import QUARANTINE_SCHEMA, SHARD_SCHEMA, series_schema, shard_path, slice_schema
from ich_prep.errors import BuildError, DatasetError, SourceError
from ich_prep.phantom import synthesize
from ich_prep.progress import NoProgress
from ich_prep.stages.publish import Tables
from ich_prep.stages.state import BuildFolder, State
from ich_prep.verify import verify
from tests.support.cli import PREP, SMALL, prep, published, start, train_file, working
from tests.support.pausing import pausing, wait_until_paused

ANYTHING = Allowances(max_quarantined=1.0)


@pytest.mark.parametrize("layout", ["rsna", "folder", "cq500"])
def test_every_file_is_a_row_or_a_line_of_the_quarantine(layout: str, tmp_path: Path) -> None:
    src, out = tmp_path / "tree", tmp_path / "data.zarr"
    synthesize(src, series=3, size=64, layout=layout, defects=True)
    counts = build(
        src, out, SMALL, workers=0, allow=Allowances(max_quarantined=1.0, missing_images=layout == "cq500")
    ).counts
    dataset = open_dataset(out)
    quarantine = dataset.read_table("quarantine")
    files = {str(path.relative_to(src)) for path in src.rglob("*") if path.is_file() and path.suffix != ".csv"}
    kept = set(pq.read_table(working(out) / "plan.parquet", columns=["path"])["path"].to_pylist())
    assert counts["found"] == len(files) == counts["ok"] + counts["quarantined"]
    assert counts["planned"] == len(dataset) == counts["ok"]
    assert kept | set(quarantine["path"].to_pylist()) == files
    assert len(kept) + len(quarantine) == len(files)
    assert dataset.slices.schema == slice_schema()
    assert dataset.series.schema == series_schema()
    assert quarantine.schema == QUARANTINE_SCHEMA
    assert dataset.read_table("shards").schema == SHARD_SCHEMA
    assert not verify(out, src=src, sample=1.0, progress=NoProgress()).problems


def test_known_defects_are_flagged_or_repaired(damaged_tree: Path, tmp_path: Path) -> None:
    build(damaged_tree, tmp_path / "data.zarr", SMALL, workers=0, allow=ANYTHING)
    slices = open_dataset(tmp_path / "data.zarr").slices
    flags = {flag for line in slices["flags"].to_pylist() for flag in line}
    assert {"constant", "noise", "clipped_high"} <= flags
    repaired = slices.filter(pc.greater(pc.list_value_length(slices["repairs"]), 0))
    assert len(repaired) == 3
    assert set(repaired["rescale_intercept"].to_pylist()) == {0.0, 1.0}
    # After the repair, the heads have air, brain and bone like any other.
    assert max(repaired["hu_min"].to_pylist()) <= -900
    assert all(-700 < mean < 0 for mean in repaired["hu_mean"].to_pylist())


def test_a_file_that_changes_or_vanishes_after_the_scan_keeps_its_row(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    more = ["--slices-per-shard", 2, "--workers", 0, "--max-quarantined", 0.1]
    words = ["build", "--src", tree, "--out", out, "--size", 64, *more]
    building = start(*words, environment=pausing("*/plan.parquet"))
    wait_until_paused(building)
    lines = pq.read_table(working(out) / "plan.parquet", columns=["row", "path"]).to_pylist()[-20:-5:5]
    changed, gone, shorter = (tree / line["path"] for line in lines)
    other = bytearray(changed.read_bytes())
    other[300] ^= 1  # in the header: the size stays the same
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
    quarantine = dataset.read_table("quarantine").to_pylist()
    assert [(line["stage"], line["row"], line["path"], line["reason"]) for line in quarantine] == [
        ("shard", row, path, word) for (row, path), word in zip(lost.items(), words, strict=True)
    ]
    counts = dataset.counts.model_dump()
    assert counts["found"] == counts["planned"] == counts["ok"] + counts["quarantined"]
    assert counts["quarantined"] == 3
    assert sum(dataset.series["n_ok"].to_pylist()) == counts["ok"]
    with pytest.raises(DatasetError, match="has the status 'changed'"):
        dataset.read([lines[0]["row"]])
    assert not verify(out, src=tree, sample=1.0, progress=NoProgress()).problems


def test_too_many_damaged_files_end_the_build_and_may_be_allowed(damaged_tree: Path, tmp_path: Path) -> None:
    words = ["build", "--src", damaged_tree, "--out", tmp_path / "data.zarr", "--size", 64, "--workers", 0]
    refused = prep(*words)
    assert refused.returncode == 1
    # One that is not DICOM, one empty, one truncated, one with a wrong size; a scout and a thumbnail are not damage.
    assert "4 of " in refused.stderr
    assert "; for example stage_2_train/" in refused.stderr
    assert "1 not_dicom" in refused.stderr
    assert "localizer" not in refused.stderr
    assert "--max-quarantined" in refused.stderr
    assert prep(*words, "--max-quarantined", 0.5).returncode == 0


def test_a_replaced_damaged_file_is_read_again(tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out, cut = tmp_path / "data.zarr", train_file(tree)
    content = cut.read_bytes()
    broken = [content[:-100], content[:132] + bytes(len(content) - 132)]  # shorter, and of the same length
    for damaged in broken:
        cut.write_bytes(damaged)
        with pytest.raises(BuildError, match=r"1 of .* slices damaged.*run the same command again"):
            build(tree, out, SMALL, workers=0, allow=Allowances(max_quarantined=0.0))
    cut.write_bytes(content)
    build(tree, out, SMALL, workers=0)
    assert published(out) == published(dataset_path)


@pytest.mark.parametrize("stage", ["scan", "shards"])
def test_an_unreadable_file_is_retried(
    stage: str, tree: Path, dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a lost mount or a failed disk is fixed, the same command resumes."""
    out, lost, opened = tmp_path / "data.zarr", train_file(tree), os.open

    def fail(path: Any, *rest: Any, **more: Any) -> int:
        if os.fsencode(path) == os.fsencode(lost) and (stage == "scan" or (working(out) / "plan.parquet").exists()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *rest, **more)

    with (
        monkeypatch.context() as broken,
        pytest.raises(BuildError, match=f"1 unreadable; for example .*{lost.name}"),
    ):
        broken.setattr(os, "open", fail)
        build(tree, out, SMALL, workers=0, allow=Allowances(max_quarantined=0.0))
    build(tree, out, SMALL, workers=0)
    assert published(out) == published(dataset_path)


def test_shards_that_vanished_between_two_runs_are_rewritten(
    phantom_tree: Path, dataset_path: Path, unfinished: Path
) -> None:
    out = unfinished
    shard_path(out, 1).unlink()
    os.truncate(shard_path(out, 3), 1000)
    shard_path(out, 1).with_name(f".0.{0:032x}").write_bytes(b"what a killed worker left")
    build(phantom_tree, out, SMALL, workers=0)
    assert published(out) == published(dataset_path)


def test_a_shard_that_vanishes_before_the_end_is_never_published(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, collect = tmp_path / "data.zarr", build_dataset.collect_tables

    def lose_one(target: Path, folder: BuildFolder, state: State) -> Tables:
        shard_path(target, 1).unlink()
        return collect(target, folder, state)

    with (
        monkeypatch.context() as losing,
        pytest.raises(BuildError, match=r"Shard 1 was written with \d+ .* now has none"),
    ):
        losing.setattr(build_dataset, "collect_tables", lose_one)
        build(phantom_tree, out, SMALL, workers=0)
    build(phantom_tree, out, SMALL, workers=0)
    assert published(out) == published(dataset_path)


def test_labels_without_images_are_refused_listed_and_allowed(tree: Path, tmp_path: Path) -> None:
    out, lost = tmp_path / "data.zarr", train_file(tree)
    lost.unlink()
    with pytest.raises(SourceError, match=f"1 label without an image .for example {lost.stem}"):
        build(tree, out, SMALL, workers=0)
    listed = pq.read_table(working(out) / "label_problems.parquet").to_pylist()
    assert listed == [{"problem": "missing_image", "key": lost.stem}]
    build(tree, out, SMALL, workers=0, allow=Allowances(missing_images=True))
    assert len(open_dataset(out)) == len(list(tree.rglob("*.dcm")))


def test_slices_without_a_label_are_refused_or_allowed(tmp_path: Path) -> None:
    src, out = tmp_path / "tree", tmp_path / "data.zarr"
    synthesize(src, series=1, size=32, layout="folder")
    (src / "labels.csv").unlink()
    with pytest.raises(SourceError, match=r"slices without a label.*--allow-unlabelled"):
        build(src, out, SMALL, workers=0)
    build(src, out, SMALL, workers=0, allow=Allowances(unlabelled=True))
    slices = open_dataset(out).slices
    assert set(slices["label_level"].to_pylist()) == {"none"}
    assert slices["any"].null_count == len(slices)


def test_headers_are_not_read_again_when_labels_are_given_later(tmp_path: Path) -> None:
    src, out = tmp_path / "tree", tmp_path / "data.zarr"
    synthesize(src, series=1, size=32, layout="folder")
    labels = (src / "labels.csv").rename(tmp_path / "labels.csv")
    with pytest.raises(SourceError, match="slices without a label"):
        build(src, out, SMALL, workers=0)
    scanned = {path: path.stat().st_mtime_ns for path in (working(out) / "scan").iterdir()}
    build(src, out, SMALL, workers=0, labels=labels)
    assert scanned
    assert {path: path.stat().st_mtime_ns for path in (working(out) / "scan").iterdir()} == scanned
    assert open_dataset(out).slices["any"].null_count == 0


def test_contradicting_labels_are_refused_or_unknown(tree: Path, tmp_path: Path) -> None:
    csv = tree / "stage_2_train.csv"
    sop = train_file(tree).stem
    line = next(line for line in csv.read_text().splitlines() if line.startswith(f"{sop}_subdural"))
    with csv.open("a") as file:
        file.write(f"{sop}_subdural,{1 - int(line[-1])}\n")
    with pytest.raises(SourceError, match=f"contradict.*{sop} .subdural"):
        build(tree, tmp_path / "data.zarr", SMALL, workers=0)
    build(tree, tmp_path / "data.zarr", SMALL, workers=0, allow=Allowances(contradictions=True))
    slices = open_dataset(tmp_path / "data.zarr").slices
    assert slices.filter(pc.equal(slices["sop_instance_uid"], sop))["subdural"].to_pylist() == [None]


def test_a_tree_without_slices_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "notes.txt").write_text("none")
    with pytest.raises(SourceError, match="1 file quarantined: 1 not_an_image"):
        build(tmp_path / "tree", tmp_path / "data.zarr", SMALL, workers=0, allow=ANYTHING)


# --- full disk, memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_gives_a_message_and_the_build_resumes(workers: int, phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    words = ["build", "--src", phantom_tree, "--out", out, "--size", 64, "--slices-per-shard", 64]

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))

    full = subprocess.run(
        [PREP, *map(str, words), "--workers", str(workers)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=small_files_only,
    )
    assert full.returncode == 1
    assert f"Error: Building {out} failed: File too large. Finished work is kept" in full.stderr
    assert "Traceback" not in full.stderr
    with pytest.raises(DatasetError, match="not finished"):
        open_dataset(out)
    assert not [path for path in (out / "images").rglob("*") if path.is_file()]  # nothing that fills the disk further
    assert prep(*words, "--workers", 0).returncode == 0
    assert not verify(out, src=phantom_tree, sample=0.1, progress=NoProgress()).problems


MEASURE = """
import json, sys
from pathlib import Path
from ich_prep import build_dataset, execute
from ich_prep.dataset.spec import Spec

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
