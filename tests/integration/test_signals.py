"""Signals to real builds with workers: one message, how to resume, no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from tests.support.cli import PREP, prep, published, wait_for
from tests.support.pausing import pausing, wait_until_paused

WORDS = ("--size", "64", "--slices-per-shard", "16", "--workers", "2")


def start_build(
    src: Path, out: Path, *before: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, PREP, "build", "--src", str(src), "--out", str(out), *WORDS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the worker processes that have been started, however little they have done yet."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


@pytest.mark.parametrize("moment", ["starting", "writing"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_of_a_build_is_one_message(
    number: signal.Signals, moment: str, phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data.zarr"
    if moment == "starting":
        process = start_build(phantom_tree, out)
        wait_for(lambda: workers_of(process), process)
    else:
        process = start_build(phantom_tree, out, environment=pausing("*/plan.parquet"))
        wait_until_paused(process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    os.killpg(process.pid, signal.SIGCONT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "Interrupted. Run the same command again to resume."
    assert not output
    assert_gone(children)
    if moment == "writing" and number == signal.SIGTERM:
        resumed = prep("build", "--src", phantom_tree, "--out", out, *WORDS)
        assert resumed.returncode == 0, resumed.stderr
        assert published(out) == published(dataset_path)


def test_two_signals_in_a_row_are_one_message(phantom_tree: Path, tmp_path: Path) -> None:
    """A terminal that closes sends SIGHUP, and its shell does so again."""
    process = start_build(phantom_tree, tmp_path / "data.zarr")
    wait_for(lambda: workers_of(process), process)
    children = psutil.Process(process.pid).children(recursive=True)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP, errors
    assert "Traceback" not in errors
    assert_gone(children)


def test_under_nohup_a_hangup_is_ignored(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    process = start_build(phantom_tree, tmp_path / "data.zarr", "nohup")
    wait_for(lambda: workers_of(process), process)
    os.killpg(process.pid, signal.SIGHUP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert published(tmp_path / "data.zarr") == published(dataset_path)


def test_a_worker_that_is_killed_while_it_starts_is_named(phantom_tree: Path, tmp_path: Path) -> None:
    process = start_build(phantom_tree, tmp_path / "data.zarr")
    wait_for(lambda: workers_of(process), process)
    for worker in workers_of(process):
        worker.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "A worker process was killed by SIGKILL while it started." in errors
    assert "__main__" not in errors
    assert "Traceback" not in errors
