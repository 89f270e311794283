"""Drop: withdrawn slices are never read again, and purged ones are no longer there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import zarr

from ich_prep import open_dataset
from ich_prep.build_dataset import build
from ich_prep.dataset.schema import shard_path
from ich_prep.dataset.shard_format import MISSING, index_bytes, parse_index
from ich_prep.dataset.spec import Spec
from ich_prep.drop import drop
from ich_prep.errors import CorruptionError, DatasetError, UsageError
from ich_prep.progress import NoProgress
from ich_prep.summary import summary_of
from ich_prep.verify import verify
from ich_train.loader import SliceLoader
from ich_train.rows import labelled_rows, neighbours
from tests.support.cli import copy_with_working_folder, prep, published, working


@pytest.fixture
def dataset(dataset_path: Path, tmp_path: Path) -> Path:
    return copy_with_working_folder(dataset_path, tmp_path / "data.zarr")


def problems(path: Path) -> list[str]:
    return [f"{found.culprit}: {found.what}" for found in verify(path, progress=NoProgress()).problems]


def chunks_of(path: Path, shard: int) -> np.ndarray:
    data = shard_path(path, shard).read_bytes()
    tail = index_bytes(16)
    return parse_index(data[-tail:], chunks=16, body=len(data) - tail)


def a_training_patient(path: Path) -> tuple[str, np.ndarray]:
    slices = open_dataset(path).slices.to_pandas()
    patient = slices.loc[slices["subset"] == "train", "patient_id"].iloc[0]
    return patient, np.flatnonzero(slices["patient_id"] == patient)


def test_a_withdrawn_patient_is_never_read_again(dataset: Path) -> None:
    patient, rows = a_training_patient(dataset)
    files, before = published(dataset), open_dataset(dataset)
    others = np.setdiff1d(np.arange(len(before)), rows)
    pixels = before.read(others)
    dry = prep("drop", dataset, "--where", f"patient_id == '{patient}'", "--dry-run")
    assert dry.returncode == 0 and f"{len(rows)} slices" in dry.stdout and published(dataset) == files
    done = prep("drop", dataset, "--where", f"patient_id == '{patient}'")
    assert done.returncode == 0, done.stderr
    assert f"{len(rows)} slices in " in done.stdout and "of 1 patient withdrawn" in done.stdout
    assert "generation 2" in done.stdout
    now = published(dataset)
    assert {name for name in now if now[name] != files.get(name)} == {
        "zarr.json", "labels/slices.2.parquet", "labels/series.2.parquet", "labels/shards.2.parquet"
    }  # fmt: skip

    after = open_dataset(dataset)
    assert len(after) == len(before)
    assert set(after.slices["status"].take(rows).to_pylist()) == {"withdrawn"}
    np.testing.assert_array_equal(after.read(others), pixels)
    with pytest.raises(DatasetError, match="'withdrawn'"):
        after.read(rows[:1])
    assert not np.isin(rows, labelled_rows(after)).any()
    for row in others.tolist():
        assert not np.isin(neighbours(after, np.array([row]), 2), rows).any()
    assert after.counts.ok == before.counts.ok - len(rows) and after.counts.withdrawn == len(rows)
    assert after.series["n_ok"].to_pylist() == [
        0 if name == patient else n
        for name, n in zip(after.series["patient_id"].to_pylist(), before.series["n_ok"].to_pylist(), strict=True)
    ]
    assert sum(line["slices"] for line in summary_of(after)["folds"]) == len(others)
    assert problems(dataset) == []
    # Whoever had it open goes on with what was opened.
    assert before.read(rows).any()
    again = prep("drop", dataset, "--where", f"patient_id == '{patient}'")
    assert again.returncode == 0 and f"{len(rows)} were withdrawn already" in again.stdout
    assert published(dataset) == now


def test_purged_pixels_are_gone_and_open_readers_are_told(dataset: Path) -> None:
    _, rows = a_training_patient(dataset)
    reading, idle = open_dataset(dataset), open_dataset(dataset)
    everything = reading.read(np.arange(len(reading)))  # opens every shard
    names = {shard: shard_path(dataset, shard).read_bytes() for shard in range(reading.counts.shards)}
    gone = rows[2:5]
    text = f"row in ({', '.join(map(str, gone))})"
    dry = drop(dataset, text, purge_pixels=True, dry_run=True)
    assert (dry.slices, dry.purged, dry.generation) == (3, 3, None)
    assert {shard: shard_path(dataset, shard).read_bytes() for shard in names} == names
    done = prep("drop", dataset, "--where", text, "--purge")
    assert done.returncode == 0, done.stderr
    assert "The pixels of 3 slices were removed. Copies remain:" in done.stdout
    assert str(working(dataset)) in done.stdout and "clean --generations" in done.stdout

    others = np.setdiff1d(np.arange(len(reading)), gone)
    for shard in range(reading.counts.shards):
        index = chunks_of(dataset, shard)
        inside = gone[gone // 16 == shard] % 16
        assert (index[inside, 0] == MISSING).all()
        for place in inside.tolist():
            old = parse_index(names[shard][-index_bytes(16) :], chunks=16, body=len(names[shard]) - index_bytes(16))
            begin, length = old[place].tolist()
            assert names[shard][begin : begin + length] not in shard_path(dataset, shard).read_bytes()
    for opened in (reading, idle):
        np.testing.assert_array_equal(opened.read(others), everything[others])
        for row in gone.tolist():
            with pytest.raises(DatasetError, match=rf"Row {row} was withdrawn and purged since .* was opened"):
                opened.read([row])
    after = open_dataset(dataset)
    np.testing.assert_array_equal(after.read(others), everything[others])
    array = zarr.open_array(dataset / "images", mode="r")
    assert not np.asarray(array[gone[0]]).any()
    np.testing.assert_array_equal(np.asarray(array[int(gone[-1]) + 1]), everything[gone[-1] + 1])
    assert problems(dataset) == []
    assert after.slices["chunk_crc32c"].take(gone).null_count == 3
    listed = json.loads(prep("history", dataset, "--json").stdout)
    assert listed[1]["command"] == "drop --purge" and listed[1]["counts"]["purged"] == 3


def test_pages_and_marks_that_may_show_purged_slices_are_named(dataset: Path) -> None:
    page, marks = (dataset.with_name(f"{dataset.name}.{name}") for name in ("report.html", "corrections.csv"))
    assert not any(
        str(path) in copy for copy in drop(dataset, "row == 1", purge_pixels=True).copies for path in (page, marks)
    )
    assert prep("report", dataset).returncode == 0
    marks.write_text("row\n")
    copies = drop(dataset, "row == 2", purge_pixels=True).copies
    assert all(any(str(path) in copy for copy in copies) for path in (page, marks))


def test_slices_that_were_withdrawn_before_can_be_purged(dataset: Path) -> None:
    _, rows = a_training_patient(dataset)
    text = f"row in ({rows[0]}, {rows[3]})"
    drop(dataset, text)
    found = drop(dataset, text, purge_pixels=True)
    assert (found.slices, found.already, found.purged, found.generation) == (0, 2, 2, 3)
    assert problems(dataset) == []
    again = drop(dataset, text, purge_pixels=True)
    assert (again.purged, again.generation) == (0, None)


def test_a_hard_link_is_left_and_named(dataset: Path, tmp_path: Path) -> None:
    _, rows = a_training_patient(dataset)
    shard = shard_path(dataset, int(rows[0]) // 16)
    os.link(shard, tmp_path / "link")
    before = shard.read_bytes()
    found = drop(dataset, f"row == {rows[0]}", purge_pixels=True)
    assert (tmp_path / "link").read_bytes() == before != shard.read_bytes()
    assert any("hard link" in line and str(shard) in line for line in found.copies)


def test_a_damaged_shard_is_not_purged(dataset: Path) -> None:
    _, rows = a_training_patient(dataset)
    path = shard_path(dataset, int(rows[0]) // 16)
    other = shard_path(dataset, int(rows[0]) // 16 - 1 if rows[0] >= 16 else 1)
    path.write_bytes(other.read_bytes())
    files = published(dataset)
    with pytest.raises(CorruptionError, match="fingerprint differs"):
        drop(dataset, f"row == {rows[0]}", purge_pixels=True)
    assert published(dataset) == files


def test_filters_that_select_nothing_or_are_wrong(dataset: Path) -> None:
    for text in ("row < 0", "colour == 1", "row =="):
        with pytest.raises(UsageError):
            drop(dataset, text)
    assert prep("drop", dataset).returncode == 2


def test_a_loader_goes_on_while_slices_are_dropped(dataset: Path) -> None:
    opened = open_dataset(dataset)
    rows = labelled_rows(opened)
    expected = opened.read(rows)
    batches = iter(SliceLoader(opened, rows, batch_size=4, order="sequential"))
    seen = [next(batches).images.numpy().copy()]
    drop(dataset, "row >= 0")
    seen += [batch.images.numpy().copy() for batch in batches]
    np.testing.assert_array_equal(np.concatenate(seen), expected)
    assert open_dataset(dataset).counts.ok == 0 and problems(dataset) == []


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_whole_volumes_are_purged_whatever_the_codec(codec: str, phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    build(phantom_tree, out, Spec(size=32, slices_per_shard=16, codec=codec), workers=0)
    drop(out, "subset == 'test'", purge_pixels=True)
    assert problems(out) == []
    assert not open_dataset(out).where("subset == 'test' and status == 'ok'").size
    rows = open_dataset(out).where("subset == 'test'")
    assert not np.asarray(zarr.open_array(out / "images", mode="r")[rows.min() : rows.max() + 1]).any()
