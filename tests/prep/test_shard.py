"""The report of a shard: its content, and that its JSON is read back unchanged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.dataset import open_dataset, shard_format
from ich_prep.dataset.schema import OK, shard_path
from ich_prep.dicom.elements import DEFLATED_LE
from ich_prep.stages import ledger
from ich_prep.stages.shard import RowReport, ShardReport
from tests.support.cli import working

numbers = st.floats(allow_nan=False)
ok_rows = st.builds(
    RowReport,
    status=st.just("ok"),
    hu_min=numbers,
    hu_max=numbers,
    hu_mean=numbers,
    content_hash=st.text("0123456789abcdef", min_size=32, max_size=32),
    chunk_crc32c=st.integers(0, 2**32 - 1),
    flags=st.lists(st.sampled_from(["noise", "constant"]), unique=True).map(tuple),
)
lost_rows = st.builds(RowReport, status=st.just("changed"), detail=st.text())
reports = st.builds(
    ShardReport,
    plan=st.text(max_size=8),
    bytes=st.integers(0, 2**40),
    fingerprint=st.text(max_size=8),
    rows=st.lists(ok_rows | lost_rows, max_size=4).map(tuple),
    hu_histogram=st.lists(st.integers(0, 2**40), min_size=64, max_size=64).map(tuple),
)


@given(reports)
@settings(max_examples=100, deadline=None)
def test_a_report_is_read_back_as_it_was(report: ShardReport) -> None:
    assert ShardReport.from_json(report.to_json()) == report
    for row, line in zip(report.rows, json.loads(report.to_json())["rows"], strict=True):
        assert line.items() >= {"status": row.status}.items()
        assert ("detail" in line) == (row.status != "ok")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "{}", '{"plan":1}'])
def test_an_invalid_report_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="ShardReport"):
        ShardReport.from_json(text)


def test_the_report_of_a_build_matches_its_shard(dataset_path: Path) -> None:
    dataset = open_dataset(dataset_path)
    for number in range(dataset.counts.shards):
        text = ledger.read(working(dataset_path) / "shards", number)
        report = ShardReport.from_json(text)
        data = np.fromfile(shard_path(dataset_path, number), np.uint8)
        chunks = dataset.spec.slices_per_shard
        body = len(data) - shard_format.index_bytes(chunks)
        index = shard_format.parse_index(data[body:].tobytes(), chunks=chunks, body=body)
        stored = [
            int.from_bytes(data[offset + length - 4 : offset + length].tobytes(), "little")
            for offset, length in index[: len(report.rows)].tolist()
        ]
        first = number * chunks
        assert [row.chunk_crc32c for row in report.rows] == stored
        assert dataset.slices["chunk_crc32c"].to_pylist()[first : first + len(stored)] == stored
        assert report.bytes == len(data)
        assert all(row.status == OK for row in report.rows)
        assert sum(report.hu_histogram) == len(report.rows) * 16 * 16
        assert dataset.read_table("shards")["hu_histogram"][number].as_py() == list(report.hu_histogram)


def test_a_build_in_process_leaves_no_decoding_process(slice_bytes: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "slice.dcm").write_bytes(slice_bytes(syntax=DEFLATED_LE))
    lines = f"""
from ich_prep import Spec, build
from ich_prep.build_dataset import Allowances
from ich_prep.stages.shard import shared_decoder
build("{tmp_path}/source", "{tmp_path}/data.zarr", Spec(size=16), workers=0, allow=Allowances(unlabelled=True))
print(shared_decoder()._child is not None)
"""
    command = [sys.executable, "-W", "always::ResourceWarning", "-c", lines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
    assert "ResourceWarning" not in done.stderr
