"""Conditions that hospitals' folders have, as recipes beside the real CT files: each comes out right from the command line.

The same kinds are tested with inputs of this project in the other modules; without the recipes this one is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from ich_prep.dataset import Dataset, open_dataset
from ich_prep.progress import NoProgress
from ich_prep.verify import verify
from tests.support.cli import PREP, prep

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def recipes(real_data: Path) -> Path:
    folder = real_data.resolve().parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"no recipes at {folder}: conditions of hospitals' folders are NOT tested as reported")
    return folder


@pytest.fixture
def build_case(recipes: Path, tmp_path: Path) -> Run:
    """A function that makes the input of the case with this number and builds it, with more options."""

    def run(number: str, *options: str) -> subprocess.CompletedProcess[str]:
        if not (tmp_path / "case").exists():
            recipe = next(recipes.glob(f"case{number}_*.py"))
            environment = {**os.environ, "ICH_PREP": PREP}
            subprocess.run([sys.executable, recipe, tmp_path / "case"], check=True, cwd=recipes, env=environment)
        words = ["build", "--src", tmp_path / "case/src", "--out", tmp_path / "data.zarr", "--layout", "folder"]
        return prep(*words, "--labels", tmp_path / "case/labels.csv", "--size", 64, "--workers", 0, *options)

    return run


@pytest.fixture
def dataset_of(build_case: Run, tmp_path: Path) -> Callable[..., Dataset]:
    """A function that builds a case, which must succeed, and returns its verified dataset."""

    def build(number: str, *options: str) -> Dataset:
        done = build_case(number, *options)
        assert done.returncode == 0, done.stderr
        dataset = open_dataset(tmp_path / "data.zarr")
        assert not verify(dataset.path, progress=NoProgress()).problems
        return dataset

    return build


def counted(dataset: Dataset, table: str, column: str) -> Counter[str]:
    values = dataset.read_table(table)[column]
    return Counter((pc.list_flatten(values) if column == "flags" else values).to_pylist())


def test_appledouble_files_are_litter(dataset_of: Callable[..., Dataset]) -> None:
    dataset = dataset_of("01")
    assert dataset.counts.ok == 183
    assert counted(dataset, "quarantine", "reason") == {"not_an_image": 189}


@pytest.mark.parametrize("number", ["03", "09", "10", "13"])
def test_unusual_files_and_labels_lose_nothing(number: str, dataset_of: Callable[..., Dataset]) -> None:
    dataset = dataset_of(number)
    assert dataset.counts.ok == dataset.counts.found == 183
    assert dataset.slices["any"].null_count == 0
    if number == "10":
        assert dataset.slices["epidural"].null_count == 19


def test_maps_in_other_units_leave_and_are_told(build_case: Run, dataset_of: Callable[..., Dataset]) -> None:
    refused = build_case("05")
    assert refused.returncode == 1
    assert "92 labels (42 positive) by not_hu" in refused.stderr
    assert "--allow-lost-labels" in refused.stderr
    dataset = dataset_of("05", "--allow-lost-labels")
    assert dataset.counts.ok == 91
    assert counted(dataset, "quarantine", "reason") == {"not_hu": 92}


def test_two_patients_under_one_series_uid_are_two_volumes(dataset_of: Callable[..., Dataset]) -> None:
    dataset = dataset_of("06")
    assert counted(dataset, "slices", "flags")["series_uid_shared"] == 64
    owners = dataset.slices.group_by("series_row").aggregate([("patient_id", "count_distinct")])
    assert set(owners["patient_id_count_distinct"].to_pylist()) == {1}


def test_two_passes_of_one_series_are_two_volumes(dataset_of: Callable[..., Dataset]) -> None:
    dataset = dataset_of("16")
    numbers = Counter(dataset.series["series_instance_uid"].to_pylist())
    assert sorted(numbers.values()) == [1, 1, 1, 1, 1, 2]
    shared = dataset.series.filter(pc.greater(dataset.series["volume_in_series"], 0))
    (uid,) = shared["series_instance_uid"].to_pylist()
    both = dataset.series.filter(pc.equal(dataset.series["series_instance_uid"], uid))
    assert len(set(both["n_slices"].to_pylist())) == 1
    assert len(set(both["acquisition"].to_pylist())) == 2


def test_heads_that_lie_otherwise_are_turned(dataset_of: Callable[..., Dataset]) -> None:
    dataset = dataset_of("21")
    heads = [dataset.volume(series_row=row) for row in range(3)]
    assert np.array_equal(heads[0], heads[1])
    assert np.array_equal(heads[0], heads[2])
    assert set(dataset.slices["turn"].to_pylist()) == {None, "rotate_180", "flip_y"}


def test_equal_sop_uids_of_two_scans_keep_both(dataset_of: Callable[..., Dataset]) -> None:
    dataset = dataset_of("29")
    assert dataset.counts.ok == dataset.counts.found == 183
    assert counted(dataset, "slices", "flags")["sop_uid_shared"] == 62


def test_a_patient_id_for_each_file_splits_no_head(dataset_of: Callable[..., Dataset]) -> None:
    dataset = dataset_of("35")
    assert dataset.counts.series == 6
    for column in ("series_instance_uid", "study_instance_uid"):
        folds = dataset.slices.group_by(column).aggregate([("fold", "count_distinct")])
        assert set(folds["fold_count_distinct"].to_pylist()) == {1}


def test_damage_is_not_diluted_by_other_modalities(build_case: Run) -> None:
    refused = build_case("38")
    assert refused.returncode == 1
    assert "10 of 32 slices damaged (31.25%" in refused.stderr
