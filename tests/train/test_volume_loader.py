"""Batches of scans: whole, in order, padded and masked; what they hold depends on the seed alone; they resume."""

from __future__ import annotations

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
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import shard_path
from ich_prep.dataset.spec import Spec
from ich_prep.errors import CorruptionError, UsageError
from ich_prep.phantom import synthesize
from ich_train.order import bucketed_positions
from ich_train.preprocess import Preprocess
from ich_train.scans import scan_labels, scans_of, slice_labels, spacings
from ich_train.to_device import to_device
from ich_train.volume_loader import VolumeBatch, VolumeLoader
from tests.support.sealing import replace_table, with_column

Taken = list[tuple[bytes, ...]]
LABELLED = list(range(1, 12))  # the first series is of RSNA's test subset


@pytest.fixture(scope="module")
def dataset(twelve: Path) -> Dataset:
    return open_dataset(twelve)


@pytest.fixture(scope="module")
def hu_path(twelve_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hu") / "data.zarr"
    build(twelve_tree, out, Spec(size=32, slices_per_shard=16, folds=3, store="hu"), workers=0)
    return out


def taken(loader: VolumeLoader, most: int = 10**9) -> Taken:
    """What the next epoch's batches hold, ``most`` of them, byte by byte."""
    found = []
    for batch in loader:
        found.append(tuple(tensor.numpy().tobytes() for tensor in batch))
        if len(found) == most:
            break
    return found


def series_in(loader: VolumeLoader) -> list[int]:
    return [series for batch in loader for series in batch.series.tolist()]


def edited(dataset: Dataset, copy: Path, **columns: Any) -> Dataset:
    """A copy of ``dataset`` with other values in some columns of the slice table."""
    shutil.copytree(dataset.path, copy)
    table = dataset.slices
    for name, values in columns.items():
        table = with_column(table, name, values)
    replace_table(copy, "slices", table)
    return open_dataset(copy)


@pytest.mark.parametrize("order", ["sequential", "shuffled", "windowed"])
@pytest.mark.parametrize("buckets", [False, True])
def test_a_batch_holds_whole_scans_in_order(dataset: Dataset, order: str, buckets: bool) -> None:
    seen = []
    loader = VolumeLoader(dataset, batch_size=5, order=order, buckets=buckets)
    for batch in loader:
        depth = int(batch.mask.sum(dim=1).max())
        assert batch.volumes.shape == (len(batch.series), depth, *dataset.shape[1:])
        assert batch.volumes.dtype == torch.uint8
        for k, series in enumerate(batch.series.tolist()):
            expected = dataset.volume(series_row=series)
            n = len(expected)
            rows = batch.rows[k, :n].numpy()
            np.testing.assert_array_equal(batch.volumes[k, :n].numpy(), expected)
            np.testing.assert_array_equal(dataset.slices["series_row"].to_numpy()[rows], series)
            np.testing.assert_array_equal(dataset.slices["slice_index"].to_numpy()[rows], np.arange(n))
            np.testing.assert_array_equal(batch.labels[k, :n].numpy(), dataset.labels[rows])
            np.testing.assert_array_equal(batch.scan_labels[k].numpy(), dataset.labels[rows].max(axis=0))
            position = dataset.slices["position_mm"].to_numpy()[rows]
            np.testing.assert_allclose(batch.positions_mm[k, :n].numpy(), position - position[0], rtol=1e-6)
            assert batch.mask[k].tolist() == [True] * n + [False] * (depth - n)
            assert not batch.volumes[k, n:].any()
            assert (batch.labels[k, n:] == -1).all()
            assert (batch.rows[k, n:] == -1).all()
            assert not batch.positions_mm[k, n:].any()
            seen.append(series)
        assert batch.slices == int(batch.mask.sum())
    assert sorted(seen) == LABELLED
    assert (seen == sorted(seen)) == (order == "sequential")


def test_hu_are_padded_with_air_and_windowed_on_the_device(hu_path: Path, dataset: Dataset) -> None:
    hu = open_dataset(hu_path)
    windows = Preprocess(pixels="hu", windows=hu.spec.windows)
    padded = 0
    for of_hu, of_windows in zip(
        VolumeLoader(hu, batch_size=3), to_device(VolumeLoader(dataset, batch_size=3), torch.device("cpu")), strict=True
    ):
        assert of_hu.volumes.dtype == torch.int16
        assert (of_hu.volumes[~of_hu.mask] == -1024).all()
        padded += int((~of_hu.mask).sum())
        codes = windows.codes(of_hu.volumes.flatten(0, 1)).view(of_windows.volumes.shape)
        assert torch.equal(codes, of_windows.volumes)
    assert padded


@given(threads=st.integers(1, 5), prefetch=st.integers(1, 6), batch_size=st.integers(1, 14), slab=st.integers(0, 70))
@settings(max_examples=15, deadline=None)
def test_threads_and_prefetch_change_no_batch(
    threads: int, prefetch: int, batch_size: int, slab: int, dataset: Dataset
) -> None:
    of: dict[str, Any] = {"batch_size": batch_size, "seed": 3, "slab": slab}
    one, other = VolumeLoader(dataset, threads=1, **of), VolumeLoader(dataset, threads=threads, prefetch=prefetch, **of)
    for _ in range(2):
        batches = taken(one)
        assert batches == taken(other)
        assert len(batches) == len(one)


@given(stop=st.integers(0, 6), epochs=st.integers(0, 2), slab=st.sampled_from([0, 9]), weighted=st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_loader_resumes_in_mid_epoch(stop: int, epochs: int, slab: int, weighted: bool, dataset: Dataset) -> None:
    weights = np.arange(1.0, 12.0) if weighted else None
    of: dict[str, Any] = {"batch_size": 2, "seed": 2, "slab": slab, "weights": weights}
    whole = VolumeLoader(dataset, **of)
    expected = [taken(whole) for _ in range(epochs + 2)]
    loader = VolumeLoader(dataset, threads=3, **of)
    loader.set_epoch(epochs)
    before = taken(loader, stop) if stop else []
    resumed = VolumeLoader(dataset, **of)
    resumed.load_state_dict(loader.state_dict())
    if stop < len(whole):
        before += taken(resumed)
    assert before == expected[epochs]
    assert taken(resumed) == expected[epochs + 1]


def test_a_state_of_other_settings_is_refused(dataset: Dataset) -> None:
    state = VolumeLoader(dataset, batch_size=2, slab=8).state_dict()
    with pytest.raises(UsageError, match="slab was 8 and is 0"):
        VolumeLoader(dataset, batch_size=2).load_state_dict(state)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("slab", [0, 7])
def test_the_batches_of_all_ranks_are_those_of_one_process(dataset: Dataset, drop_last: bool, slab: int) -> None:
    of: dict[str, Any] = {"seed": 1, "slab": slab, "drop_last": drop_last}
    alone = list(copied(VolumeLoader(dataset, batch_size=6, **of)))
    shares = [list(copied(VolumeLoader(dataset, batch_size=3, rank=k, world_size=2, **of))) for k in range(2)]
    assert len(shares[0]) == len(shares[1]) > 0
    for k, (one, other) in enumerate(zip(*shares, strict=True)):
        for whole, *halves in zip(alone[k], one, other, strict=True):
            assert torch.equal(torch.cat(halves), torch.cat([whole[0 : 2 * len(one.series) : 2], whole[1::2]]))
    together = {tuple(rows) for batches in shares for batch in batches for rows in batch.rows.tolist()}
    assert len(together) == sum(len(batch.series) for batches in shares for batch in batches)


def copied(loader: VolumeLoader) -> list[VolumeBatch]:
    return [VolumeBatch(*(tensor.clone() for tensor in batch)) for batch in loader]


def test_weights_draw_scans_more_often(dataset: Dataset) -> None:
    weights = np.where(np.arange(11) == 3, 1.0, 0.0)
    assert set(series_in(VolumeLoader(dataset, weights=weights))) == {4}


def test_buckets_waste_less_on_padding() -> None:
    lengths = np.random.default_rng(0).integers(16, 60, 400)
    positions = np.random.default_rng(1).permutation(400)

    def padded(order: Any) -> int:
        return sum(int((batch.max() - batch).sum()) for batch in lengths[order].reshape(-1, 8))

    bucketed = bucketed_positions(positions, lengths, batch_size=8, seed=0, epoch=0)
    assert sorted(bucketed) == list(range(400))
    assert padded(bucketed) < padded(positions) / 4
    firsts = lengths[bucketed].reshape(-1, 8)[:, 0]
    assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.5, "batches come in a random order"
    ragged = bucketed_positions(positions[:397], lengths, batch_size=8, seed=0, epoch=0)
    assert ragged[392:].tolist() == positions[392:397].tolist()


@given(slab=st.integers(1, 70))
@settings(max_examples=20, deadline=None)
def test_slabs_cover_each_scan(slab: int, dataset: Dataset) -> None:
    scans = scans_of(dataset)
    loader = VolumeLoader(dataset, slab=slab, batch_size=4, order="sequential", prefetch=1, threads=1)
    seen: dict[int, list[list[int]]] = {}
    for batch in loader:
        assert batch.volumes.shape[1] <= slab
        for series, rows in zip(batch.series.tolist(), batch.rows.tolist(), strict=True):
            seen.setdefault(series, []).append([row for row in rows if row >= 0])
    for k, series in enumerate(scans.series.tolist()):
        expected = scans.of(k).tolist()
        slabs = seen[series]
        assert {len(rows) for rows in slabs} == {min(slab, len(expected))}
        assert len(slabs) == -(-len(expected) // slab)
        assert sorted({row for rows in slabs for row in rows}) == expected
        assert all(rows == list(range(rows[0], rows[0] + len(rows))) for rows in slabs)


def test_only_rows_with_pixels_and_a_position_are_in_a_scan(dataset: Dataset, tmp_path: Path) -> None:
    status = dataset.slices["status"].to_pylist()
    position = dataset.slices["position_mm"].to_pylist()
    status[3], position[5] = "truncated", None
    changed = edited(dataset, tmp_path / "data.zarr", status=status, position_mm=position)
    scans = scans_of(changed, range(12))
    assert set(range(len(dataset))) - set(scans.rows.tolist()) == {3, 5}
    (batch,) = VolumeLoader(changed, [0], batch_size=1)
    assert batch.rows[0].tolist() == [row for row in range(int(scans.lengths[0]) + 2) if row not in (3, 5)]


def test_labels_of_a_series_are_those_of_the_scan_and_of_no_slice(dataset: Dataset, tmp_path: Path) -> None:
    levels = dataset.slices["label_level"].to_pylist()
    first = int(dataset.series["first_row"][2].as_py())
    levels = ["series" if level == "slice" else level for level in levels[:first]] + levels[first:]
    changed = edited(dataset, tmp_path / "data.zarr", label_level=levels)
    assert (slice_labels(changed)[:first] == -1).all()
    np.testing.assert_array_equal(slice_labels(changed)[first:], dataset.labels[first:])
    np.testing.assert_array_equal(scan_labels(changed, scans_of(changed)), scan_labels(dataset, scans_of(dataset)))


def test_slabs_of_a_scan_that_is_labelled_as_a_whole_are_unknown(dataset: Dataset, tmp_path: Path) -> None:
    levels = ["series" if series < 8 else "slice" for series in dataset.slices["series_row"].to_pylist()]
    changed = edited(dataset, tmp_path / "data.zarr", label_level=levels)
    seen = {False: 0, True: 0}
    for batch in VolumeLoader(changed, np.arange(12), slab=4, batch_size=1):
        by_slice = bool(batch.series[0] >= 8)
        assert bool((batch.scan_labels >= 0).all()) == by_slice
        seen[by_slice] += 1
    assert min(seen.values()) > 0


def test_a_scan_is_negative_only_if_all_of_its_slices_are(dataset: Dataset, tmp_path: Path) -> None:
    scans = scans_of(dataset)
    values = dataset.slices["epidural"].to_pylist()
    negative = int(np.flatnonzero(scan_labels(dataset, scans)[:, dataset.classes.index("epidural")] == 0)[0])
    values[int(scans.of(negative)[2])] = None
    changed = edited(dataset, tmp_path / "data.zarr", epidural=values)
    assert scan_labels(changed, scans_of(changed))[negative, changed.classes.index("epidural")] == -1


def test_scans_without_labels_are_read_if_they_are_named(dataset: Dataset, tmp_path: Path) -> None:
    levels = ["none" if series == 7 else "slice" for series in dataset.slices["series_row"].to_pylist()]
    changed = edited(dataset, tmp_path / "data.zarr", label_level=levels)
    assert 7 not in scans_of(changed).series
    assert series_in(VolumeLoader(changed, np.array([7], np.uint8))) == [7]


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ([], r"series_row of one volume or more.*found \(0,\)"),
        ([12], "series_row of 0 to 11 .*; found 12"),
        ([-1], "found -1"),
        ([0.5], "float64"),
        (np.ones(2, bool), "bool"),
    ],
)
def test_volumes_that_are_not_of_the_dataset_are_refused(dataset: Dataset, series: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VolumeLoader(dataset, series)


def test_a_volume_without_a_usable_slice_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    status = ["truncated" if series == 2 else "ok" for series in dataset.slices["series_row"].to_pylist()]
    changed = edited(dataset, tmp_path / "data.zarr", status=status)
    assert 2 not in scans_of(changed).series
    with pytest.raises(UsageError, match=r"1 volume of .* such as series_row 2: no slice has both"):
        VolumeLoader(changed, [1, 2])


def test_a_dataset_without_labels_is_refused(tmp_path: Path) -> None:
    synthesize(tmp_path / "scans", series=1, size=32, layout="folder", workers=0)
    (tmp_path / "scans" / "labels.csv").unlink()
    spec = Spec(layout="folder", size=32)
    build(tmp_path / "scans", tmp_path / "data.zarr", spec, workers=0, allow=Allowances(unlabelled=True))
    with pytest.raises(UsageError, match=r"No scan of .* has a label"):
        VolumeLoader(tmp_path / "data.zarr")


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"threads": 0}, {"prefetch": 0}, {"slab": -1}, {"seed": -1}])
def test_invalid_settings_are_refused(wrong: dict[str, int], dataset: Dataset) -> None:
    with pytest.raises(UsageError, match="1 or more"):
        VolumeLoader(dataset, **wrong)  # type: ignore[arg-type]


def test_a_weight_for_each_scan_is_needed(dataset: Dataset) -> None:
    with pytest.raises(UsageError, match=r"a weight for each of 11 scans; got \(3,\)"):
        VolumeLoader(dataset, order="shuffled", weights=np.ones(3))


def test_buffers_are_used_again_and_no_thread_is_left(dataset: Dataset) -> None:
    before = threading.active_count()
    loader = VolumeLoader(dataset, batch_size=1, threads=2, prefetch=2)
    places = {batch.volumes.data_ptr() for batch in loader}
    assert len(places) <= 6 < len(loader)
    for _batch in loader:
        break
    assert threading.active_count() == before


def test_damage_ends_the_epoch_with_its_name(dataset: Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "data.zarr"
    shutil.copytree(dataset.path, copy)
    shard_path(copy, 3).unlink()
    with pytest.raises(CorruptionError, match="Shard 3 "):
        taken(VolumeLoader(copy))


def test_the_spacing_is_that_of_the_stored_voxels(dataset: Dataset) -> None:
    scans = scans_of(dataset)
    found = spacings(dataset, scans)
    for k, series in enumerate(scans.series.tolist()):
        affine = dataset.affine(series)
        if affine is not None:
            x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
            np.testing.assert_allclose(found[k, 1:], [y, x], rtol=1e-4)
            if not dataset.series["tilt_degrees"][series].as_py():
                np.testing.assert_allclose(found[k, 0], z, rtol=1e-3)
