"""Parquet files: read with page checksums verified, written atomically; equal tables give equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ich_prep.dataset.storage import write_whole


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a Parquet file's table, with page checksums verified; unlike ``pq.read_table`` this does not import pandas."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a published table: equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=1 << 16, write_page_checksum=True)
    write_whole(path, sink.getvalue().to_pybytes())
