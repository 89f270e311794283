"""Batches: what they hold depends on the seed alone; they resume where they were; damage is reported by shard."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import shard_path
from ich_prep.dataset.spec import Spec
from ich_prep.errors import CorruptionError, UsageError
from ich_prep.phantom import synthesize
from ich_train.loader import SliceDataset, SliceLoader
from ich_train.rows import labelled_rows


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    synthesize(folder / "rsna", series=5, size=32, seed=1, workers=0)
    build(folder / "rsna", folder / "data.zarr", Spec(size=32, slices_per_shard=16), workers=0)
    return folder / "data.zarr"


@pytest.fixture(scope="module")
def dataset(path: Path) -> Dataset:
    return open_dataset(path)


def taken(loader: SliceLoader, most: int = 10**9) -> list[tuple[list[int], bytes, bytes]]:
    """What the next epoch's batches hold, ``most`` of them: rows, and the bytes of images and labels."""
    found = []
    for batch in loader:
        found.append((batch.rows.tolist(), batch.images.numpy().tobytes(), batch.labels.numpy().tobytes()))
        if len(found) == most:
            break
    return found


def rows_of(batches: list[tuple[list[int], bytes, bytes]]) -> list[int]:
    return [row for rows, _, _ in batches for row in rows]


@pytest.mark.parametrize("order", ["sequential", "shuffled", "windowed"])
def test_a_batch_holds_the_pixels_and_labels_of_its_rows(dataset: Dataset, order: str) -> None:
    labels = dataset.labels
    seen = []
    for batch in SliceLoader(dataset, batch_size=7, order=order):
        rows = batch.rows.numpy()
        assert batch.images.dtype == torch.uint8
        assert batch.labels.dtype == torch.int8
        np.testing.assert_array_equal(batch.images.numpy(), dataset.read(rows))
        np.testing.assert_array_equal(batch.labels.numpy(), labels[rows])
        seen += rows.tolist()
    assert sorted(seen) == labelled_rows(dataset).tolist()
    assert (seen == sorted(seen)) == (order == "sequential")


@given(threads=st.integers(1, 5), prefetch=st.integers(1, 6), batch_size=st.integers(1, 40), context=st.integers(0, 1))
@settings(max_examples=20, deadline=None)
def test_threads_and_prefetch_change_no_batch(
    threads: int, prefetch: int, batch_size: int, context: int, dataset: Dataset
) -> None:
    of: dict[str, Any] = {"batch_size": batch_size, "seed": 3, "context": context}
    one, other = SliceLoader(dataset, threads=1, **of), SliceLoader(dataset, threads=threads, prefetch=prefetch, **of)
    for _ in range(2):
        batches = taken(one)
        assert batches == taken(other)
        assert len(batches) == len(one)


def test_each_epoch_has_an_order_of_its_own_and_each_seed(dataset: Dataset) -> None:
    loader = SliceLoader(dataset, batch_size=16, seed=5)
    first, second = taken(loader), taken(loader)
    assert rows_of(first) != rows_of(second)
    assert sorted(rows_of(first)) == sorted(rows_of(second))
    loader.set_epoch(0)
    assert taken(loader) == first
    assert rows_of(taken(SliceLoader(dataset, batch_size=16, seed=6))) != rows_of(first)


@given(stop=st.integers(0, 12), epochs=st.integers(0, 2), order=st.sampled_from(["shuffled", "windowed"]))
@settings(max_examples=20, deadline=None)
def test_a_loader_resumes_in_mid_epoch(stop: int, epochs: int, order: str, dataset: Dataset) -> None:
    of: dict[str, Any] = {"batch_size": 16, "order": order, "seed": 2}
    whole = SliceLoader(dataset, **of)
    expected = [taken(whole) for _ in range(epochs + 2)]
    loader = SliceLoader(dataset, threads=3, **of)
    loader.set_epoch(epochs)
    before = taken(loader, stop) if stop else []
    resumed = SliceLoader(dataset, **of)
    resumed.load_state_dict(loader.state_dict())
    if stop < len(whole):
        before += taken(resumed)
    assert before == expected[epochs]
    assert taken(resumed) == expected[epochs + 1]


def test_a_state_of_other_settings_is_refused(dataset: Dataset) -> None:
    state = SliceLoader(dataset, batch_size=16, seed=2).state_dict()
    with pytest.raises(UsageError, match="batch_size was 16 and is 8; seed was 2 and is 0"):
        SliceLoader(dataset, batch_size=8).load_state_dict(state)


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_rows(dataset: Dataset, drop_last: bool) -> None:
    loaders = [SliceLoader(dataset, batch_size=8, rank=rank, world_size=3, drop_last=drop_last) for rank in range(3)]
    shares = [rows_of(taken(loader)) for loader in loaders]
    assert len({len(share) for share in shares}) == 1
    together = [row for share in shares for row in share]
    assert len(set(together)) == len(together)
    lost = len(labelled_rows(dataset)) - len(together)
    assert lost <= (3 * 8 if drop_last else 2)


def test_weights_draw_rows_more_often(dataset: Dataset) -> None:
    rows = labelled_rows(dataset)
    weights = np.where(np.arange(len(rows)) < 3, 1.0, 0.0)
    assert set(rows_of(taken(SliceLoader(dataset, batch_size=8, weights=weights)))) == set(rows[:3].tolist())


def test_context_brings_the_neighbours_of_the_series(dataset: Dataset) -> None:
    series = dataset.slices["series_row"].to_numpy()
    for batch in SliceLoader(dataset, batch_size=16, context=2):
        for images, row in zip(batch.images.numpy(), batch.rows.tolist(), strict=True):
            first, last = np.flatnonzero(series == series[row])[[0, -1]].tolist()
            wanted = np.clip(np.arange(row - 2, row + 3), first, last)
            np.testing.assert_array_equal(images, dataset.read(wanted).reshape(images.shape))


def test_breaking_off_leaves_no_thread(dataset: Dataset) -> None:
    before = threading.active_count()
    for _ in range(3):
        for _batch in SliceLoader(dataset, batch_size=4, threads=3):
            break
    assert threading.active_count() == before


def test_buffers_are_used_again(dataset: Dataset) -> None:
    loader = SliceLoader(dataset, batch_size=2, threads=2, prefetch=2)
    places = {batch.images.data_ptr() for batch in loader}
    assert len(places) <= 6 < len(loader)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda shard: os.truncate(shard, 5000)])
def test_damage_ends_the_epoch_with_its_name(spoil: Any, path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data.zarr"
    shutil.copytree(path, copy)
    spoil(shard_path(copy, 3))
    before = threading.active_count()
    with pytest.raises(CorruptionError, match="Shard 3 "):
        taken(SliceLoader(open_dataset(copy), batch_size=8))
    assert threading.active_count() == before


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"threads": 0}, {"prefetch": 0}, {"context": -1}])
def test_invalid_settings_are_refused(wrong: dict[str, int], dataset: Dataset) -> None:
    with pytest.raises(UsageError, match="1 or more"):
        SliceLoader(dataset, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [SliceLoader, SliceDataset])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows is empty"),
        (np.empty(0, np.int64), "rows is empty"),
        ("any == 1", r"pass rows=dataset\.where\('any == 1'\)"),
        ([0, 10**6], r"Expected rows of 0 to \d+ of .*; found 1000000\.$"),
        ([-1, 3], r"Expected rows of 0 to .*; found -1\.$"),
        ([0.5, 1.0], r"an integer type; found \(2,\) float64"),
        (np.ones(3, bool), r"numpy\.flatnonzero\(mask\)"),
        (np.zeros((2, 2), int), r"found \(2, 2\) int64"),
    ],
)
def test_rows_that_are_not_rows_of_the_dataset_are_refused(
    kind: Any, rows: Any, message: str, dataset: Dataset
) -> None:
    with pytest.raises(UsageError, match=message):
        kind(dataset, rows)


def test_rows_of_any_integer_type_are_taken(dataset: Dataset) -> None:
    for rows in ([2, 1], np.array([2, 1], np.uint8), dataset.where("slice_index >= 0")[:2]):
        assert rows_of(taken(SliceLoader(dataset, rows, order="sequential"))) == [int(row) for row in rows]


def test_an_unknown_order_is_refused_when_the_loader_is_made(dataset: Dataset) -> None:
    with pytest.raises(UsageError, match="Unknown order 'foo'; expected sequential, shuffled, windowed"):
        SliceLoader(dataset, order="foo")
    with pytest.raises(UsageError, match="cannot be sequential"):
        SliceLoader(dataset, order="sequential", weights=np.ones(len(labelled_rows(dataset))))


@pytest.mark.parametrize("kind", [SliceLoader, SliceDataset])
def test_what_is_not_a_dataset_is_refused(kind: Any) -> None:
    with pytest.raises(TypeError, match="Expected an open dataset or the path of one; found int"):
        kind(3)


def test_a_loader_of_no_labelled_slice_is_refused_unless_rows_are_named(tmp_path: Path) -> None:
    synthesize(tmp_path / "cq500", series=3, size=32, layout="cq500", workers=0)
    (tmp_path / "cq500" / "reads.csv").unlink()
    spec = Spec(layout="folder", size=32)
    build(tmp_path / "cq500", tmp_path / "data.zarr", spec, workers=0, allow=Allowances(unlabelled=True))
    dataset = open_dataset(tmp_path / "data.zarr")
    with pytest.raises(UsageError, match="with pixels has a label"):
        SliceLoader(dataset)
    for named in (dataset, dataset.path):
        with pytest.raises(UsageError, match="with pixels has a label"):
            SliceDataset(named)
    assert rows_of(taken(SliceLoader(dataset, np.arange(9), batch_size=4, order="sequential"))) == [*range(9)]


def test_a_dataset_is_named_by_its_path_or_open(path: Path, dataset: Dataset) -> None:
    assert taken(SliceLoader(str(path), batch_size=16)) == taken(SliceLoader(dataset, batch_size=16))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("opened", [False, True])
def test_a_data_loader_of_ones_own(path: Path, dataset: Dataset, workers: int, opened: bool) -> None:
    slices = SliceDataset(dataset if opened else path)
    assert len(slices) == len(labelled_rows(dataset))
    images, labels, rows = [], [], []
    loader = torch.utils.data.DataLoader(
        slices, batch_size=16, num_workers=workers, multiprocessing_context="spawn" if workers else None
    )
    for image, label, row in loader:
        images.append(image)
        labels.append(label)
        rows += row.tolist()
    assert rows == labelled_rows(dataset).tolist()
    np.testing.assert_array_equal(torch.cat(images).numpy(), dataset.read(rows))
    np.testing.assert_array_equal(torch.cat(labels).numpy(), dataset.labels[rows])
    image, label, row = slices[3]
    assert row == rows[3]
    assert image.shape == dataset.shape[1:]
    assert label.shape == (len(RSNA_CLASSES),)
