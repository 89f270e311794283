"""Several datasets as one: rows, patients and folds of both, read without a copy, recorded by the run that used them."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ich_prep.build_dataset import build
from ich_prep.dataset.components import connect
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.union import UnionDataset, open_union
from ich_prep.drop import drop
from ich_prep.errors import DatasetError, TrainError, UsageError
from ich_prep.phantom import synthesize
from ich_train.checkpoint import read_meta
from ich_train.config import EvalConfig, TrainConfig
from ich_train.evaluation.evaluate import evaluate_run
from ich_train.loader import SliceDataset, SliceLoader
from ich_train.rows import labelled_rows, neighbours
from ich_train.runs import settings_of
from ich_train.split import split_rows
from ich_train.train import train
from ich_train.volume_loader import VolumeLoader
from tests.support.sealing import replace_table, with_column

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = Spec(size=32, slices_per_shard=16, folds=3)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another dataset with the spec of ``twelve``, of which one patient has the id of a patient of that."""
    folder = tmp_path_factory.mktemp("other")
    synthesize(folder / "rsna", series=8, size=32, seed=7, workers=0)
    build(folder / "rsna", folder / "other.zarr", SPEC.model_copy(update={"slices_per_shard": 10}), workers=0)
    return folder / "other.zarr"


@pytest.fixture(scope="module")
def shared(twelve: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of ``other`` in which a training patient of another fold has the id of a patient of ``twelve``; and that id."""
    copy = Path(shutil.copytree(other, tmp_path_factory.mktemp("shared") / "other.zarr"))
    one, two = (open_dataset(path).series.to_pandas().query("subset == 'train'") for path in (twelve, copy))
    taken = one.iloc[0]
    given = two[two["fold"] != taken["fold"]].iloc[0]["patient_id"]
    opened = open_dataset(copy)
    for name in ("slices", "series"):
        table = opened.read_table(name)
        for column in ("patient_id", "fold_group"):
            texts = [taken["patient_id"] if text == given else text for text in table[column].to_pylist()]
            table = with_column(table, column, texts)
        replace_table(copy, name, table)
    return copy, str(taken["patient_id"])


def test_rows_and_tables_are_those_of_both(twelve: Path, other: Path) -> None:
    parts = open_dataset(twelve), open_dataset(other)
    both = open_union([twelve, other])
    start, series = len(parts[0]), len(parts[0].series)
    assert len(both) == len(parts[0]) + len(parts[1]) == len(both.slices) and both.parts[1].path == other
    assert both.slices["row"].to_pylist() == list(range(len(both)))
    np.testing.assert_array_equal(both.labels, np.concatenate([part.labels for part in parts]))
    assert both.series["series_row"].to_pylist() == list(range(len(both.series)))
    for line in (series, len(both.series) - 1):
        first = both.series["first_row"][line].as_py()
        assert both.slices["series_row"][first].as_py() == line
        np.testing.assert_array_equal(both.volume(series_row=line), parts[1].volume(series_row=line - series))
    rows = np.random.default_rng(0).permutation(np.flatnonzero(both.is_ok))
    expected = np.stack([parts[int(row >= start)].read([row - start * (row >= start)])[0] for row in rows])
    np.testing.assert_array_equal(both.read(rows), expected)
    np.testing.assert_array_equal(both.read(rows, np.empty_like(expected), threads=3), expected)
    np.testing.assert_array_equal(both.read([]), np.empty((0, *both.shape[1:]), both.dtype))
    assert set(both.where("dataset == 'other.zarr'")) == set(range(start, len(both)))
    assert neighbours(both, np.array([start - 1, start]), 1).tolist() == [
        [start - 2, start - 1, start - 1], [start, start, start + 1]
    ]  # fmt: skip


def test_what_cannot_be_read_from_several(twelve: Path, other: Path) -> None:
    both = open_union([twelve, other])
    for rows, error in (([len(both)], IndexError), ([-1], IndexError), ([1.5], TypeError)):
        with pytest.raises(error):
            both.read(rows)
    with pytest.raises(DatasetError, match="several datasets"):
        both.read_table("shards")
    assert len(both.read_table("quarantine")) == both.counts.quarantined
    both.close()
    with pytest.raises(ValueError, match="closed"):
        both.read([0])


def test_datasets_that_do_not_fit_are_refused(twelve: Path, twelve_tree: Path, tmp_path: Path) -> None:
    build(twelve_tree, tmp_path / "small.zarr", SPEC.model_copy(update={"size": 16}), workers=0)
    with pytest.raises(UsageError, match="size is 32 and 16"):
        open_union([twelve, tmp_path / "small.zarr"])
    with pytest.raises(UsageError, match="there twice"):
        open_union([twelve, twelve])
    build(twelve_tree, tmp_path / "again.zarr", SPEC.model_copy(update={"slices_per_shard": 8}), workers=0)
    with pytest.raises(UsageError, match="in another of the datasets"):
        open_union([twelve, tmp_path / "again.zarr"], shared_patients="apart")
    assert len(open_union([twelve, tmp_path / "again.zarr"])) == 2 * len(open_dataset(twelve))


def parts_of(dataset: UnionDataset, patient: str) -> set[str]:
    split = split_rows(dataset, val_fold=0, test_fold=1, allow_series_labels=False, needed=())
    ids = np.array(dataset.slices["patient_id"].to_pylist(), object)
    return {name for name, rows in vars(split).items() if (ids[rows] == patient).any()}


def test_one_patient_in_two_datasets_is_in_one_part_unless_kept_apart(twelve: Path, shared: tuple[Path, str]) -> None:
    path, patient = shared
    joined = open_union([twelve, path])
    assert isinstance(joined, UnionDataset) and len(parts_of(joined, patient)) == 1
    table = joined.slices.to_pandas()
    assert table.loc[table["patient_id"] == patient, "fold_group"].nunique() == 1
    assert table.groupby("fold_group")["patient_id"].nunique().max() == 1

    apart = open_union([twelve, path], shared_patients="apart")
    names = set(apart.slices["patient_id"].to_pylist())
    assert {f"data.zarr:{patient}", f"other.zarr:{patient}"} <= names and patient not in names
    assert apart.digest != joined.digest
    assert len(names) == len(set(joined.slices["patient_id"].to_pylist())) + 1


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(-1, 6), st.integers(-1, 6)), min_size=1, max_size=30))
def test_groups_are_connected_by_equal_values(lines: list[tuple[int, int, int]]) -> None:
    group, one, two = (np.array(column, np.int64) for column in zip(*lines, strict=True))
    label = np.arange(9)
    label[group] = connect(group, [one, two])
    same = [{number} for number in range(9)]
    for link in (one, two):
        for value in set(link[link >= 0].tolist()):
            joined = set().union(*(same[number] for number in group[link == value].tolist()))
            for number in joined:
                same[number] = joined
    assert label.tolist() == [min(members) for members in same]


def test_batches_and_scans_of_both(twelve: Path, other: Path) -> None:
    both = open_union([twelve, other])
    rows = labelled_rows(both)
    seen = [
        (batch.rows.numpy().copy(), batch.images.numpy().copy(), batch.labels.numpy().copy())
        for batch in SliceLoader(both, batch_size=16, order="windowed", context=1)
    ]
    order = np.concatenate([one for one, _, _ in seen])
    assert sorted(order.tolist()) == rows.tolist()
    middle = np.concatenate([images for _, images, _ in seen])[:, both.shape[1] : 2 * both.shape[1]]
    np.testing.assert_array_equal(middle, both.read(order))
    np.testing.assert_array_equal(np.concatenate([labels for _, _, labels in seen]), both.labels[order])
    series = {int(number) for batch in VolumeLoader(both, batch_size=2) for number in batch.series}
    assert max(series) >= len(open_dataset(twelve).series)


def test_it_can_be_sent_to_another_process(twelve: Path, other: Path, tmp_path: Path) -> None:
    both = open_union([twelve, other])
    sent = pickle.loads(pickle.dumps(both))
    assert sent.digest == both.digest
    np.testing.assert_array_equal(sent.read([0, len(both) - 1]), both.read([0, len(both) - 1]))
    # A worker goes on with the generation that was opened.
    copy = Path(shutil.copytree(twelve, tmp_path / "data.zarr"))
    opened = open_dataset(copy)
    slices = SliceDataset(opened)
    drop(copy, "row < 40")
    again = pickle.loads(pickle.dumps(slices))
    assert again.dataset.digest == opened.digest != open_dataset(copy).digest
    images = [image for image, _, _ in torch.utils.data.DataLoader(again, batch_size=64)]
    assert len(torch.cat(images)) == len(slices.rows)


def test_a_run_on_both_records_each_and_is_held_to_them(
    twelve: Path, other: Path, tmp_path: Path, call: Callable[..., int]
) -> None:
    words = ("--data", twelve, "--data", other, "--device", "cpu", "--threads", 1, "--batch-size", 8)
    run = tmp_path / "run"
    assert call("run", *words, "--epochs", 1, "--out", run) == 0
    meta = read_meta(run / "best")
    assert [(one.name, one.digest) for one in meta.datasets] == [
        (path.name, open_dataset(path).digest) for path in (twelve, other)
    ]
    assert settings_of(run)[0].data == (twelve, other)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["dataset"]["name"] == "data.zarr + other.zarr" and metrics["dataset"]["trained_on"]
    assert "data.zarr + other.zarr" in (run / "report.html").read_text()
    predictions = pandas.read_parquet(run / "predictions.parquet")
    assert set(predictions["dataset"]) == {"data.zarr", "other.zarr"}

    # Evaluated on both by default, or on one of them; resumed with both only.
    assert call("eval", run, "--by", "dataset", "--out", tmp_path / "e") == 0
    assert set(json.loads((tmp_path / "e" / "metrics.json").read_text())["by_value"]) == {"data.zarr", "other.zarr"}
    one = evaluate_run(run, open_dataset(other), EvalConfig(bootstrap=0), out=tmp_path / "one")
    assert one["dataset"]["name"] == "other.zarr" and not one["dataset"]["trained_on"]
    assert call("explain", run) == 2
    quiet = Console(file=io.StringIO())
    settings = settings_of(run)[0].model_copy(update={"epochs": 2})
    for paths, message in (
        ([twelve], "started with 2 datasets"),
        ([other, twelve], "another dataset"),
    ):
        with pytest.raises(TrainError, match=message):
            train(open_union(paths), run, settings, None, console=quiet, resume=True)
    train(open_union([twelve, other]), run, settings, None, console=quiet, resume=True)
    assert call("run", *words, "--shared-patients", "apart", "--epochs", 3, "--out", run, "--resume") == 2
    assert TrainConfig(data=twelve).data == TrainConfig(data=[twelve]).data == (twelve,)


def test_patients_of_different_pseudonyms_are_not_taken_for_different_people(tmp_path: Path) -> None:
    synthesize(tmp_path / "rsna", series=3, size=32, workers=0)
    hidden = SPEC.model_copy(update={"identifiers": "pseudonymise"})
    for name, spec, key in (("plain", SPEC, None), ("one", hidden, 1), ("two", hidden, 2), ("more", hidden, 1)):
        file = None if key is None else tmp_path / f"key{key}"
        if file is not None:
            file.write_bytes(bytes([key or 0]) * 32)
            file.chmod(0o600)
        shape = spec.model_copy(update={"slices_per_shard": 32 if name == "more" else 16})
        build(tmp_path / "rsna", tmp_path / f"{name}.zarr", shape, workers=0, key=file)
    paths = {name: tmp_path / f"{name}.zarr" for name in ("plain", "one", "two", "more")}
    groups = open_dataset(paths["one"]).counts.fold_groups
    joined = open_union([paths["one"], paths["more"]]).slices["fold_group"]
    assert len(set(joined.to_pylist()) - {None}) == groups
    for other, what in (("plain", "only one of them has pseudonyms"), ("two", "of different keys")):
        with pytest.raises(UsageError, match=what):
            open_union([paths["one"], paths[other]])
        assert len(open_union([paths["one"], paths[other]], shared_patients="apart")) > 0
