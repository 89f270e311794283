"""A dataset with unused rows and withdrawn slices, as every command that reads one sees it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ich_prep import open_dataset
from ich_prep.append import append
from ich_prep.build_dataset import build
from ich_prep.dataset.selection import choose_volumes
from ich_prep.dataset.spec import Spec
from ich_prep.drop import drop
from ich_prep.export import export
from ich_prep.phantom import synthesize
from ich_prep.report.labels import class_counts, level_bars, parts_by_fold, parts_by_scan_type
from ich_prep.report.page import write_report
from ich_prep.report.tables import read_tables
from ich_prep.view.data import ViewData
from tests.support.cli import prep


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset to which slices were appended, and from which a volume and some slices were withdrawn."""
    folder = tmp_path_factory.mktemp("changed")
    synthesize(folder / "one", series=4, size=32, workers=0)
    synthesize(folder / "two", series=2, size=32, seed=3, workers=0)
    build(folder / "one", folder / "data.zarr", Spec(size=32, slices_per_shard=100), workers=0)
    append(folder / "two", folder / "data.zarr", workers=0)
    drop(folder / "data.zarr", "series_row == 1 or row in (3, 4)")
    return folder / "data.zarr"


def test_reports_count_the_slices_that_are_present(changed: Path, tmp_path: Path) -> None:
    dataset = open_dataset(changed)
    tables, ok = read_tables(dataset), dataset.counts.ok
    assert {"unused", "withdrawn"} < set(dataset.slices["status"].to_pylist())
    for parts in (parts_by_fold(tables), parts_by_scan_type(tables)):
        assert sum(part.slices for part in parts) == ok
    assert {entry.positive + entry.negative + entry.unknown for entry in class_counts(tables)} == {ok}
    assert sum(bar.share for bar in level_bars(tables)) == pytest.approx(1)
    for rows in tables.rows_by_flag.values():
        assert dataset.is_ok[rows].all()
    write_report(changed, tmp_path / "report.html")
    withdrawn = dataset.counts.withdrawn
    assert f"{ok:,} with pixels" in (tmp_path / "report.html").read_text()
    shown = prep("info", changed)
    assert f"{withdrawn} withdrawn" in shown.stdout


def test_it_is_exported_and_viewed(changed: Path, tmp_path: Path) -> None:
    dataset = open_dataset(changed)
    volumes = choose_volumes(dataset, where="row >= 0 and n_ok > 0")
    done = export(dataset, volumes, tmp_path / "out", form="npy")
    assert done.slices == dataset.counts.ok and 1 not in volumes
    statuses = ViewData(dataset).volumes["columns"]["statuses"]
    assert len(statuses) == dataset.counts.series


def test_the_files_of_both_sources_are_found(changed: Path, tmp_path: Path) -> None:
    one, two = changed.with_name("one"), changed.with_name("two")
    assert prep("verify", changed, "--src", one, "--src", two, "--sample", 1).returncode == 0
    # Another tree with the same names: the file whose header was read is the one that is compared.
    shutil.copytree(two, tmp_path / "other")
    for path in (tmp_path / "other").rglob("*.dcm"):
        data = bytearray(path.read_bytes())
        data[200:] = np.random.default_rng(0).bytes(len(data) - 200)
        path.write_bytes(data)
    words = ("verify", changed, "--src", one, "--src", tmp_path / "other", "--src", two, "--sample", 1)
    assert prep(*words).returncode == 0
    lacking = prep("verify", changed, "--src", one, "--sample", 1)
    assert lacking.returncode == 1 and "not found in the sources" in lacking.stdout + lacking.stderr
