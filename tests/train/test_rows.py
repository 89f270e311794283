from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import OK
from ich_prep.dataset.spec import Spec
from ich_prep.errors import UsageError
from ich_prep.phantom import synthesize
from ich_train.rows import column, labelled_rows, neighbours
from tests.support.sealing import replace_table, with_column


def test_a_null_number_of_a_column_is_minus_one(dataset_path: Path) -> None:
    dataset = open_dataset(dataset_path)
    rows = np.array([5, 0, 5])
    assert column(dataset, "sop_instance_uid", rows).tolist() == [
        dataset.slices["sop_instance_uid"][int(row)].as_py() for row in rows
    ]
    test = np.flatnonzero(pc.equal(dataset.slices["subset"], "test").to_numpy(zero_copy_only=False))
    assert set(column(dataset, "fold", test)) == {-1}


def test_a_neighbour_that_is_quarantined_is_the_nearest_one_that_is_not(dataset_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data.zarr"
    shutil.copytree(dataset_path, copy)
    table = open_dataset(dataset_path).slices
    status = table["status"].to_pylist()
    status[5] = "decode_failed"
    replace_table(copy, "slices", with_column(table, "status", status))
    dataset = open_dataset(copy)
    assert 5 not in labelled_rows(dataset)
    found = neighbours(dataset, np.array([4, 6, 7]), 2)
    assert found.tolist() == [[2, 3, 4, 4, 6], [4, 6, 6, 7, 8], [6, 6, 7, 8, 9]]


def test_labels_of_whole_series_are_taken_only_when_allowed(tmp_path: Path) -> None:
    synthesize(tmp_path / "cq500", series=3, size=32, layout="cq500", workers=0)
    build(tmp_path / "cq500", tmp_path / "data.zarr", Spec(size=32), workers=0, allow=Allowances(missing_images=True))
    dataset = open_dataset(tmp_path / "data.zarr")
    with pytest.raises(UsageError, match=r"rows=labelled_rows\(dataset, allow_series_labels=True\)"):
        labelled_rows(dataset)
    ok = pc.equal(dataset.slices["status"], OK).to_numpy(zero_copy_only=False)
    assert labelled_rows(dataset, allow_series_labels=True).tolist() == np.flatnonzero(ok).tolist() != []
