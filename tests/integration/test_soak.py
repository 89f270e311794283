"""Many builds and trainings in one process leave no memory, descriptor, process or file behind; readers under a builder."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console

from ich_prep.build_dataset import build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.errors import BuildError, DatasetError
from ich_train.config import EvalConfig, TrainConfig
from ich_train.train import train
from tests.support.cli import PREP, SMALL, published

BUILDS, TRAININGS = 200, 50
WARM_UP = 0.2  # of the rounds: libraries and allocators have what they need
GROWTH = 24 << 20  # bytes: less than any leak of a dataset's size per round


def check_rounds(rounds: int, once: Callable[[], object], folder: Path) -> None:
    """Repeat ``once``; after the first rounds nothing may grow."""
    process = psutil.Process()

    def held() -> tuple[int, int, int]:
        return process.num_fds(), len(process.children(recursive=True)), len(list(folder.rglob("*")))

    before, memory = (0, 0, 0), 0
    for number in range(rounds):
        once()
        if number == int(WARM_UP * rounds):
            before, memory = held(), process.memory_info().rss
    assert held() == before
    grown = process.memory_info().rss - memory
    assert grown < GROWTH, f"{grown / 1e6:.0f} MB more after {rounds} rounds"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_builds_leave_nothing_behind(phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "work" / "data.zarr"
    out.parent.mkdir()

    def once() -> None:
        for path in (out, out.with_name("data.zarr.build")):
            shutil.rmtree(path, ignore_errors=True)
        build(phantom_tree, out, SMALL, workers=0)
        with open_dataset(out) as dataset:
            dataset.read(np.flatnonzero(dataset.is_ok))

    check_rounds(BUILDS, once, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_trainings_leave_nothing_behind(phantom_tree: Path, one_thread: None, tmp_path: Path) -> None:
    data, out = tmp_path / "data.zarr", tmp_path / "work" / "run"
    build(phantom_tree, data, Spec(size=32, slices_per_shard=16, folds=3), workers=0)
    settings = TrainConfig(data=data, epochs=1, batch_size=32, device="cpu", threads=1, test_fold=2)

    def once() -> None:
        shutil.rmtree(out, ignore_errors=True)
        with open_dataset(data) as dataset:
            train(dataset, out, settings, EvalConfig(bootstrap=5), console=Console(quiet=True))

    check_rounds(TRAININGS, once, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_reader_under_overwrite_sees_the_old_or_the_new_dataset(phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    specs = [SMALL, SMALL.model_copy(update={"codec": "zstd"})]
    digests, pixels = set(), None
    for spec in specs:
        build(phantom_tree, out, spec, workers=0, overwrite=True)
        digests.add(open_dataset(out).digest)
        pixels = open_dataset(out).read([0, 1, 2])
    ended, seen = threading.Event(), []

    def read() -> None:
        while not ended.is_set():
            try:
                with open_dataset(out) as dataset:
                    assert dataset.digest in digests
                    np.testing.assert_array_equal(dataset.read([0, 1, 2]), pixels)  # of equal slices, in another codec
                    seen.append("whole")
            except DatasetError:
                seen.append("refused")
            except BaseException as error:
                seen.append(repr(error))
                raise

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(20):
            build(phantom_tree, out, specs[number % 2], workers=0, overwrite=True)
            time.sleep(0.05)
    finally:
        ended.set()
        reader.join()
    assert set(seen) == {"whole", "refused"}, set(seen)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_of_builders_that_start_together_at_least_one_ends_and_none_disturbs(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    words = [PREP, "build", "--src", phantom_tree, "--size", 64, "--slices-per-shard", 16, "--workers", 0, "--out"]
    for number in range(8):
        out = tmp_path / f"{number}.zarr"
        started = [subprocess.Popen([*map(str, words), str(out)], stderr=subprocess.PIPE, text=True) for _ in range(3)]
        ended = [(process.communicate(timeout=300)[1], process.returncode) for process in started]
        assert any(code == 0 for _, code in ended), ended
        assert all(code == 0 or "Another" in printed for printed, code in ended), ended
        assert published(out) == published(dataset_path)


def test_two_builders_in_one_process_are_told_apart(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out, ended = tmp_path / "data.zarr", list[str]()

    def one() -> None:
        try:
            build(phantom_tree, out, SMALL, workers=0)
            ended.append("done")
        except BuildError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "done" in ended and all(text == "done" or "Another" in text for text in ended), ended
    assert published(out) == published(dataset_path)
