"""The status of builds that run, stopped, failed or finished; the log; reports as lines of JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ich_prep.build_dataset import Allowances, Request, build
from ich_prep.build_parts import plan_build, write_part
from ich_prep.errors import DatasetError, UsageError
from ich_prep.events import EVENTS
from ich_prep.stages.parts import Part, part_lock
from ich_prep.stages.state import BuildFolder, read_state, write_state
from ich_prep.status import PartStatus, status_of
from tests.support.cli import PREP, SMALL, prep, start, working
from tests.support.pausing import pausing, wait_until_paused


def json_lines(text: str) -> list[dict[str, Any]]:
    """Return the events of a report, after checking that each has the keys that are documented."""
    events = [json.loads(line) for line in text.splitlines()]
    for event in events:
        assert event.keys() <= {"time", "event", *EVENTS[event["event"]]}, event
    return events


def status_json(dataset: Path) -> dict[str, Any]:
    done = prep("status", dataset, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_build_that_runs_is_killed_and_ends(phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    words = ["build", "--src", phantom_tree, "--out", out, "--size", 64, "--slices-per-shard", 1, "--workers", 0]
    process = start(*words, environment=pausing("*/shards/*.json", 6))
    wait_until_paused(process)
    running = status_of(out)
    assert (running.state, running.stage, running.unit) == ("running", "shards", "slices")
    assert running.done == 6 < running.total
    assert running.per_second and running.seconds_left
    assert running.seconds_left == pytest.approx((running.total - running.done) / running.per_second, rel=0.2, abs=0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stopped = status_of(out)
    assert (stopped.state, stopped.ended, stopped.error) == ("stopped", "killed", None)
    assert (stopped.per_second, stopped.seconds_left) == (None, None)
    assert stopped.done == running.done and stopped.last_write
    text = prep("status", out)
    assert f"stopped while writing slices: {running.done} of {running.total} slices" in text.stdout
    assert "The last run was killed." in text.stdout
    assert prep(*words).returncode == 0
    assert status_json(out)["state"] == "finished"


def test_the_stage_of_a_build_without_a_plan(unfinished: Path) -> None:
    folder = BuildFolder(working(unfinished))
    state = read_state(folder)
    write_state(folder, state.model_copy(update={"plan": None, "published": None}))
    files = status_of(unfinished).total
    assert (status_of(unfinished).stage, status_of(unfinished).done) == ("plan", files)
    folder.batch(0).unlink()
    assert (status_of(unfinished).stage, status_of(unfinished).done) == ("scan", 0)
    folder.state.unlink()
    assert (status_of(unfinished).stage, status_of(unfinished).share) == ("list", 0)


def test_what_is_quarantined_is_counted_by_reason(damaged_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    failed = prep("build", "--src", damaged_tree, "--out", out, "--size", 32, "--workers", 0)
    assert failed.returncode == 1
    found = status_of(out)
    assert (found.state, found.stage, found.ended) == ("stopped", "plan", "failed")
    assert found.error is not None and f"Error: {found.error}" == failed.stderr.strip().splitlines()[-1]
    assert "The last run failed: " in prep("status", out).stdout
    assert found.quarantined["truncated"] >= 1
    build(damaged_tree, out, SMALL, workers=0, allow=Allowances(max_quarantined=1, lost_labels=True))
    listed = json.loads(prep("quarantine", out, "--json").stdout)["reasons"]
    assert dict(status_of(out).quarantined) == {group["reason"]: group["files"] for group in listed}


def test_parts_are_listed_with_how_they_ended(phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    plan_build(Request(phantom_tree, out, SMALL, workers=0))
    assert (status_of(out).state, status_of(out).ended, status_of(out).done) == ("stopped", "done", 0)
    assert "left the shards to `ich-prep shards`" in prep("status", out).stdout
    folder = BuildFolder(working(out))
    write_part(out, Part(1, 3), workers=0)
    keys = folder.keys.read_bytes()
    folder.keys.write_bytes(keys[:-9])
    assert prep("shards", out, "--part", "2/3", "--workers", 0).returncode == 1
    folder.keys.write_bytes(keys)
    with part_lock(folder, Part(3, 3)):
        found = status_of(out)
        assert found.state == "running"
        assert found.parts[0] == PartStatus("1/3", "done")
        assert found.parts[1].state == "failed" and "is damaged" in str(found.parts[1].error)
        assert found.parts[2] == PartStatus("3/3", "running")
        assert 0 < found.done < found.total
        text = prep("status", out).stdout
    assert "Parts running: 3/3." in text and "Part 2/3 failed: " in text
    assert status_of(out).state == "stopped"


def test_neither_a_build_nor_a_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((DatasetError, UsageError), match="found nothing"):
        status_of(tmp_path / "data.zarr")


# --- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_in_lines_of_json(phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    done = prep("build", "--src", phantom_tree, "--out", out, "--size", 64, "--workers", 0, "--log-json")
    assert done.returncode == 0
    events = json_lines(done.stderr)
    names = [event["event"] for event in events]
    assert [name for name in names if name in ("start", "planned", "published")] == ["start", "planned", "published"]
    ends = [event for event in events if event["event"] == "stage_end"]
    assert [event["stage"] for event in ends] == ["Reading headers", "Writing slices"]
    logged = json_lines((working(out) / "log.jsonl").read_text(encoding="utf-8"))
    shards = [event["task"] for event in logged if event["event"] == "task" and event["stage"] == "Writing slices"]
    assert shards == list(range(len(shards)))
    assert len(shards) == events[-1]["counts"]["shards"]


def test_an_error_is_a_line_of_json_too(damaged_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    done = prep("build", "--src", damaged_tree, "--out", out, "--size", 32, "--workers", 0, "--log-json")
    assert done.returncode == 1
    last = json_lines(done.stderr)[-1]
    assert (last["event"], last["kind"], last["exit_code"]) == ("error", "BuildError", 1)
    assert json_lines((working(out) / "log.jsonl").read_text(encoding="utf-8"))[-1]["text"] == last["text"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_a_line_of_json_with_the_exit_code(
    number: signal.Signals, phantom_tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data.zarr"
    words = ["build", "--src", phantom_tree, "--out", out, "--size", 64, "--slices-per-shard", 1, "--workers", 0]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = pausing("*/shards/*.json", 3)
    process = subprocess.Popen(
        [PREP, *map(str, words), "--log-json"], stderr=subprocess.PIPE, text=True, env=environment
    )
    signal.signal(signal.SIGINT, before)
    wait_until_paused(process)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    last = json_lines(printed)[-1]
    assert (last["event"], last["exit_code"]) == ("interrupted", 128 + number)
    assert status_of(out).ended == "interrupted"


# --- estimates -------------------------------------------------------------------------------------------------------

SMALL_DISK = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def on_small_disk(size: str, folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a mount namespace of its own, in which ``folder`` is a file system of that size."""
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, "sh", size, str(folder)]
    done = subprocess.run([*inside, "sh", "-c", script], capture_output=True, text=True, check=False, timeout=240)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no namespaces: a disk that is too small is NOT tested ({done.stderr.strip()[:200]})")
    return done


def test_a_disk_that_is_too_small_is_refused_before_a_shard_is_written(phantom_tree: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = f"{PREP} build --src {phantom_tree} --out {disk}/data.zarr --build-dir {tmp_path}/work"
    words = f"{words} --size 256 --workers 0 --codec none"
    done = on_small_disk(
        "4m", disk, f"{words}; echo $?; ls {disk}/data.zarr/images/c; {words} --allow-full-disk; echo $?"
    )
    assert "The disk of" in done.stderr and "--allow-full-disk tries nevertheless" in done.stderr
    assert done.stdout.split() == ["1", "1"]
    assert "; allowed." in done.stderr and "No space left on device" in done.stderr


def test_the_estimate_is_near_what_the_build_takes(phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    done = prep("build", "--src", phantom_tree, "--out", out, "--size", 64, "--workers", 0)
    assert done.returncode == 0
    assert "Estimate, from 4 slices: " in done.stderr
    (estimate,) = [
        event for event in json_lines((working(out) / "log.jsonl").read_text()) if event["event"] == "estimate"
    ]
    folders = (out, working(out) / "shards")
    actual = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    assert 0.5 * actual < estimate["bytes"] < 2 * actual
    assert estimate["seconds"] > 0 and estimate["free_bytes"] > estimate["bytes"]
