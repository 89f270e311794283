"""Parquet files: read with page checksums verified, written atomically; equal tables give equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ich_prep.dataset.storage import write_whole
from ich_prep.files import open_regular


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a Parquet file's table, with page checksums verified; unlike ``pq.read_table`` this does not import pandas."""
    with (
        open(open_regular(path), "rb") as opened,
        pq.ParquetFile(opened, page_checksum_verification=True) as file,
    ):
        return file.read(columns)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a published table: equal tables give equal bytes."""
    write_whole(path, parquet_bytes(table, compression="zstd", row_group_size=1 << 16, write_page_checksum=True))


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """Return ``table`` as the bytes of a Parquet file; ``options`` are those of ``pq.write_table``."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    data: bytes = sink.getvalue().to_pybytes()
    return data
