"""SIGKILL at any moment to a build's driver, worker or nanny, also over ``--scheduler``: the same bytes in the end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ich_prep.dataset.dataset import open_dataset
from ich_prep.errors import DatasetError
from tests.support.cli import PREP, published
from tests.support.commands import Inputs, commands
from tests.support.faults import Programs

ROOT = Path(__file__).parents[2]
DRIVER_KILLS, WORKER_KILLS, CLUSTER_KILLS = 70, 15, 15


def seeded() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


def require_absent_or_whole(out: Path, *wholes: dict[str, str]) -> None:
    """A reader sees no dataset, or one of ``wholes``."""
    try:
        open_dataset(out)
    except DatasetError:
        return
    assert dict(published(out)) in wholes, "visible, and neither the old nor the new dataset"


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", ["build", "overwrite"])
def test_a_driver_killed_at_any_moment(name: str, server: Programs, inputs: Inputs, tmp_path: Path) -> None:
    out, rng = tmp_path / "out", seeded()
    command = commands(inputs, out)[name]
    command.prepare(out)
    before = [dict(published(out / "d.zarr"))] if command.copies else []
    began = time.monotonic()
    assert server.run(*command.words).status == 0
    seconds, whole = time.monotonic() - began, dict(published(out / "d.zarr"))
    killed = 0
    for _ in range(DRIVER_KILLS // 2):
        command.prepare(out)
        words = command.words
        for _ in range(rng.choice((1, 1, 3))):  # some builds are killed again while they resume
            ended = server.run(*words, killed_after=rng.uniform(0, seconds))
            killed += ended.status == -signal.SIGKILL
            require_absent_or_whole(out / "d.zarr", whole, *before)
            words = command.resumed
        resumed = server.run(*command.resumed)
        assert resumed.status == 0, resumed.output
        assert dict(published(out / "d.zarr")) == whole
    print(f"{killed} kills")
    assert killed > DRIVER_KILLS // 4


def descendants(process: psutil.Process, word: str) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [child for child in process.children(recursive=True) if word in " ".join(child.cmdline())]
    return []


def kill_one(processes: list[psutil.Process], rng: random.Random) -> bool:
    with contextlib.suppress(psutil.Error):
        if processes:
            rng.choice(processes).kill()
            return True
    return False


def build_words(inputs: Inputs, out: Path, *more: object) -> list[str]:
    words = (PREP, "build", "--src", inputs.src, "--out", out, "--size", 32, "--slices-per-shard", 16, "--folds", 3)
    return [*map(str, (*words, "--store", "hu", *more))]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_workers_killed_at_any_moment(inputs: Inputs, tmp_path: Path) -> None:
    """Also while they start: then the build ends with a message, and the next one resumes."""
    out, rng, kills = tmp_path / "data.zarr", seeded(), 0
    while kills < WORKER_KILLS:
        subprocess.run(["rm", "-rf", out, f"{out}.build"], check=True)
        words = build_words(inputs, out, "--workers", 2)
        started = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        while started.poll() is None:
            time.sleep(rng.uniform(0, 1.5))
            kills += kill_one(descendants(psutil.Process(started.pid), "spawn_main"), rng)
        _, printed = started.communicate()
        assert "Traceback" not in printed, printed
        assert started.returncode in (0, 1), printed
        finish(words, out, inputs)


def finish(words: list[str], out: Path, inputs: Inputs) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert published(out) == published(inputs.data)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_cluster_of_which_parts_are_killed(inputs: Inputs, tmp_path: Path) -> None:
    """The driver, a worker, or a nanny of a cluster started elsewhere; nannies are started again."""
    out, rng, kills = tmp_path / "data.zarr", seeded(), {"driver": 0, "worker": 0, "nanny": 0}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    file = tmp_path / "scheduler.json"
    scheduling = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--scheduler-file", str(file)]
    working = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1"]

    def launch(words: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*words, "--no-dashboard"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )

    scheduler = launch([*scheduling, "--port", "0", "--host", "127.0.0.1"])
    nannies = [launch(working) for _ in range(2)]
    try:
        while not file.exists():
            time.sleep(0.05)
        address = json.loads(file.read_text())["address"]
        words = build_words(inputs, out, "--scheduler", address)
        while sum(kills.values()) < CLUSTER_KILLS:
            subprocess.run(["rm", "-rf", out, f"{out}.build"], check=True)
            driver = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
            victim = rng.choice(("driver", "worker", "nanny"))
            time.sleep(rng.uniform(1, 4))
            if victim == "driver":
                driver.kill()
                kills[victim] += 1
            elif victim == "nanny":
                nannies[0].kill()
                nannies[0].wait()
                nannies[0] = launch(working)
                kills[victim] += 1
            else:
                workers = [child for nanny in nannies for child in descendants(psutil.Process(nanny.pid), "spawn_main")]
                kills[victim] += kill_one(workers, rng)
            _, printed = driver.communicate(timeout=300)
            assert "Traceback" not in printed, printed
            assert driver.returncode in (0, 1, -signal.SIGKILL), printed
            finish(words, out, inputs)
    finally:
        for process in (*nannies, scheduler):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()
    print(kills)
