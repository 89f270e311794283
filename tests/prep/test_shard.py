"""The report of a shard: what it says, and that its JSON is read back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep import sharding, store
from ich_prep.shard import RowReport, ShardReport

numbers = st.floats(allow_nan=False)
ok_rows = st.builds(
    RowReport,
    status=st.just("ok"),
    hu_min=numbers,
    hu_max=numbers,
    hu_mean=numbers,
    share_air=st.floats(0, 1),
    share_soft=st.floats(0, 1),
    share_bone=st.floats(0, 1),
    content_hash=st.text("0123456789abcdef", min_size=32, max_size=32),
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
    chunk_crc32c=st.lists(st.none() | st.integers(0, 2**32 - 1), max_size=4).map(tuple),
)


@given(reports)
@settings(max_examples=100, deadline=None)
def test_a_report_is_read_back_as_it_was(report: ShardReport) -> None:
    assert ShardReport.from_json(report.to_json()) == report
    for row, line in zip(report.rows, json.loads(report.to_json())["rows"], strict=True):
        assert line.items() >= {"status": row.status}.items()
        assert ("detail" in line) == (row.status != "ok")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "{}", '{"plan":1}'])
def test_what_is_no_report_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="ShardReport"):
        ShardReport.from_json(text)


def test_a_report_of_a_build_speaks_of_its_shard(dataset_path: Path) -> None:
    dataset = store.open_dataset(dataset_path)
    for number in range(dataset.ich["counts"]["shards"]):
        text = (dataset_path / store.BUILD / store.DONE / f"{number:05d}.json").read_text(encoding="utf-8")
        report = ShardReport.from_json(text)
        data = np.fromfile(store.shard_path(dataset_path, number), np.uint8)
        chunks = dataset.spec.slices_per_shard
        body = len(data) - sharding.index_bytes(chunks)
        index = sharding.parse_index(data[body:].tobytes(), chunks=chunks, body=body)
        behind = [
            int.from_bytes(data[offset + length - 4 : offset + length].tobytes(), "little")
            for offset, length in index[: len(report.rows)].tolist()
        ]
        assert list(report.chunk_crc32c) == behind
        assert report.bytes == len(data)
        assert all(row.status == store.OK for row in report.rows)
        shares = np.array([[row.share_air, row.share_soft, row.share_bone] for row in report.rows])
        np.testing.assert_allclose(shares.sum(axis=1), 1)
        assert (shares[:, 0] > 0.2).all()  # a head in air
        assert sum(report.hu_histogram) == len(report.rows) * 16 * 16
