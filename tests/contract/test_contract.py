"""Datasets that were written once and are kept: the current code, and other Zarr readers, must read them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import OK, QUARANTINE_SCHEMA, SHARD_SCHEMA, series_schema, slice_schema
from ich_prep.progress import NoProgress
from ich_prep.summary import summary_of
from ich_prep.verify import verify

HERE = Path(__file__).parent
EXPECTED: dict[str, dict[str, Any]] = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", EXPECTED)
def test_current_code_reads_the_kept_datasets(name: str) -> None:
    dataset, expected = open_dataset(HERE / f"{name}.zarr"), EXPECTED[name]
    assert list(dataset.shape) == expected["shape"]
    assert dataset.dtype == (np.uint8 if name == "windows" else np.int16)
    assert dataset.digest == expected["digest"]
    assert dataset.spec.orientation == "as-stored"  # their spec has no such key
    assert dataset.slices["status"].to_pylist() == expected["status"]
    assert dataset.slices["any"].to_pylist() == expected["any"]
    rows = [row for row, word in enumerate(expected["status"]) if word == OK]
    assert 0 < len(rows) < len(dataset)
    pixels = dataset.read(rows)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == expected["pixels"]
    for series in dataset.series.to_pylist():
        assert len(dataset.volume(series["series_instance_uid"])) == series["n_ok"]
    assert set(summary_of(dataset)["label_level"]) == {"slice", "none"}


@pytest.mark.parametrize("name", EXPECTED)
def test_zarr_reads_the_same_pixels(name: str) -> None:
    dataset = open_dataset(HERE / f"{name}.zarr")
    images = zarr.open_group(HERE / f"{name}.zarr", mode="r")["images"]
    assert isinstance(images, zarr.Array)
    rows = np.flatnonzero([word == OK for word in EXPECTED[name]["status"]])
    np.testing.assert_array_equal(images.oindex[rows], dataset.read(rows))


@pytest.mark.parametrize("name", EXPECTED)
def test_the_kept_datasets_verify(name: str) -> None:
    found = verify(HERE / f"{name}.zarr", progress=NoProgress())
    assert found.problems == ()
    assert found.slices == EXPECTED[name]["shape"][0]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_column_of_the_contract_exists(name: str) -> None:
    dataset = open_dataset(HERE / f"{name}.zarr")
    for table, form in (
        ("slices", slice_schema()),
        ("series", series_schema()),
        ("shards", SHARD_SCHEMA),
        ("quarantine", QUARANTINE_SCHEMA),
    ):
        assert dataset.read_table(table).schema == form
