"""A dataset that is appended to, relabelled and dropped from while a network trains on it."""

from __future__ import annotations

import io
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ich_prep.dataset.dataset import open_dataset
from ich_prep.phantom import synthesize
from ich_train.checkpoint import read_meta
from ich_train.config import EvalConfig, TrainConfig
from ich_train.runs import HISTORY, read_history
from ich_train.train import train
from tests.support.cli import prep

pytestmark = pytest.mark.usefixtures("one_thread")
EPOCHS = 3


def test_a_training_finishes_with_what_it_opened(twelve: Path, tmp_path: Path) -> None:
    data, run = Path(shutil.copytree(twelve, tmp_path / "data.zarr")), tmp_path / "run"
    synthesize(tmp_path / "more", series=2, size=32, seed=9, workers=0)
    dataset = open_dataset(data)
    uid = dataset.slices["sop_instance_uid"][int(np.argmax(dataset.labels[:, -1] == 0))].as_py()
    (tmp_path / "new.csv").write_text(f"sop_instance_uid,subdural\n{uid},1\n")
    failed: list[str] = []
    ended = threading.Event()

    def change() -> None:
        while not (run / HISTORY).exists() and not ended.is_set():
            time.sleep(0.01)
        for words in (
            ("append", "--src", tmp_path / "more", "--out", data, "--workers", 0),
            ("relabel", data, "--labels", tmp_path / "new.csv"),
            ("drop", data, "--where", "row in (1, 50)"),
        ):
            done = prep(*words)
            if done.returncode:
                failed.append(done.stderr)

    changes = threading.Thread(target=change)
    changes.start()
    try:
        settings = TrainConfig(epochs=EPOCHS, batch_size=4, device="cpu", threads=2, data=data)
        result = train(dataset, run, settings, EvalConfig(bootstrap=0), console=Console(file=io.StringIO()))
    finally:
        ended.set()
        changes.join()
    assert not failed and open_dataset(data).root.generation == 4
    assert result.finished and len(read_history(run)) == EPOCHS
    assert result.metrics is not None and result.metrics["dataset"]["digest"] == dataset.digest
    assert [one.generation for one in read_meta(run / "best").datasets] == [1]
    # Also after the changes, what was opened is what is read.
    rows = np.flatnonzero(dataset.is_ok)
    np.testing.assert_array_equal(dataset.read(rows), open_dataset(twelve).read(rows))
