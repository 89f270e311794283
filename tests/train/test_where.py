"""Selections without a copy: training, evaluation, prediction and verification of the slices of a filter."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import shard_path
from ich_prep.drop import drop
from ich_prep.errors import TrainError, UsageError
from ich_prep.progress import NoProgress
from ich_prep.verify import verify
from ich_train.checkpoint import read_meta
from ich_train.config import EvalConfig, TrainConfig
from ich_train.evaluation.evaluate import evaluate_run
from ich_train.rows import labelled_rows
from ich_train.runs import settings_of
from ich_train.split import split_rows
from ich_train.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
WHERE = "slice_index >= 3"
SETTINGS = TrainConfig(epochs=1, batch_size=4, device="cpu", threads=1, where=WHERE, seed=1)


@pytest.fixture(scope="module")
def dataset(twelve: Path) -> Dataset:
    return open_dataset(twelve)


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "selected"
    train(dataset, out, SETTINGS, None, console=Console(file=io.StringIO()))
    return out


def test_a_split_has_the_slices_of_its_filter_only(dataset: Dataset) -> None:
    whole = split_rows(dataset, val_fold=0, test_fold=1, allow_series_labels=False)
    part = split_rows(dataset, val_fold=0, test_fold=1, allow_series_labels=False, where=WHERE)
    selected = dataset.where(WHERE)
    for name in ("train", "val", "test"):
        np.testing.assert_array_equal(getattr(part, name), np.intersect1d(getattr(whole, name), selected))
    assert labelled_rows(dataset, where="row == -1 or slice_index == 2").size
    for text, message in (("row < 0", "selects none of the slices"), ("colour == 1", "unknown column")):
        with pytest.raises(UsageError, match=message):
            split_rows(dataset, val_fold=0, test_fold=1, allow_series_labels=False, where=text)


def test_a_run_records_what_it_was_trained_on(dataset: Dataset, run: Path) -> None:
    meta = read_meta(run / "best")
    assert (meta.where, meta.dataset_digest) == (WHERE, dataset.digest)
    assert [(one.generation, one.digest) for one in meta.datasets] == [(1, dataset.digest)]
    assert settings_of(run)[0].where == WHERE
    with pytest.raises(UsageError, match="where"):
        train(dataset, run, SETTINGS.model_copy(update={"where": None}), None, console=Console(), resume=True)


def test_an_evaluation_is_of_the_runs_slices_or_of_another_filter(dataset: Dataset, run: Path, tmp_path: Path) -> None:
    quick = {"bootstrap": 0, "subset": "val"}
    own = evaluate_run(run, dataset, EvalConfig(**quick), out=tmp_path / "own")
    val = split_rows(dataset, val_fold=0, test_fold=1, allow_series_labels=False, where=WHERE).val
    assert own["evaluated"]["slices"] == len(val) and own["by_series_max"] is None
    assert WHERE.replace(">", "&gt;") in (tmp_path / "own" / "report.html").read_text()
    other = evaluate_run(run, dataset, EvalConfig(where="slice_index < 3", **quick), out=tmp_path / "other")
    whole = split_rows(dataset, val_fold=0, test_fold=1, allow_series_labels=False).val
    assert other["evaluated"]["slices"] == len(whole) - len(val)
    assert other["evaluated"]["where"] == "slice_index < 3"
    assert other["dataset"]["parts"]["val"]["slices"] == len(val)  # what the thresholds come from
    uid = dataset.slices["series_instance_uid"][int(whole[0])].as_py()
    series = evaluate_run(
        run, dataset, EvalConfig(where=f"series_instance_uid == '{uid}'", **quick), out=tmp_path / "s"
    )
    assert series["by_series_max"] is not None


def test_the_command_line_takes_filters(twelve: Path, run: Path, tmp_path: Path, call: Callable[..., int]) -> None:
    words = ("--data", twelve, "--device", "cpu", "--threads", 1)
    assert call("eval", run, *words, "--where", "slice_index < 3", "--subset", "val", "--out", tmp_path / "e") == 0
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["evaluated"]["where"] == "slice_index < 3"
    submission = tmp_path / "p.csv"
    assert call("predict", run, *words, "--where", "slice_index == 4", "--out", submission) == 0
    expected = open_dataset(twelve).where("slice_index == 4")
    assert len(submission.read_text().splitlines()) == 1 + 6 * len(expected)
    assert call("predict", run, *words, "--where", "slice_index == 4", "--sample", submission, "--out", submission) == 2
    assert call("predict", run, *words, "--where", "row < 0", "--out", submission) == 2
    assert call("run", *words, "--where", "colour == 1", "--out", tmp_path / "r") == 2


def test_a_filter_may_leave_nothing_to_test_on(dataset: Dataset, tmp_path: Path) -> None:
    said = io.StringIO()
    settings = SETTINGS.model_copy(update={"where": "subset == 'train' and fold != 1"})
    result = train(dataset, tmp_path / "run", settings, EvalConfig(bootstrap=0), console=Console(file=said, width=200))
    assert result.finished and result.metrics is None
    assert "will not be evaluated" in said.getvalue()


def test_a_run_is_resumed_with_the_generation_that_it_began_with(twelve: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(twelve, tmp_path / "data.zarr"))
    settings = SETTINGS.model_copy(update={"epochs": 2})
    train(open_dataset(copy), tmp_path / "run", settings, None, console=Console(file=io.StringIO()))
    drop(copy, "row == 0")
    with pytest.raises(TrainError, match=r"started with generation 1 of .* now generation 2"):
        train(open_dataset(copy), tmp_path / "run", settings, None, console=Console(file=io.StringIO()), resume=True)


def test_verify_checks_the_shards_of_a_filter(twelve: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(twelve, tmp_path / "data.zarr"))
    path = shard_path(copy, 1)
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    assert verify(copy, progress=NoProgress()).problems
    found = verify(copy, where="row < 16", progress=NoProgress())
    assert (found.problems, found.shards, found.slices) == ((), 1, 16)
    assert len(verify(copy, where="row == 16", progress=NoProgress()).problems) == 1
    with pytest.raises(UsageError, match="selects no row"):
        verify(copy, where="row < 0", progress=NoProgress())
