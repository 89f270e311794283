"""Parquet files: read with page checksums verified, written atomically; equal tables give equal bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ich_prep.dataset.storage import read_regular, write_whole

MAX_LINES_PER_BYTE = 64  # of a Parquet file; a line of ours takes 20 bytes and more


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a Parquet file's table, with page checksums verified; unlike ``pq.read_table`` this does not import pandas."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns)


def read_published(path: Path, *, columns: Sequence[str] | None, lines: int, sha256: str) -> pa.Table:
    """Return the table in the Parquet file at ``path``, or those of ``columns`` that it has.

    Raises ``ValueError`` if its SHA-256 is another one, or if it does not have that many ``lines``; ``OSError`` or
    ``pa.ArrowException`` if it cannot be read.
    """
    data = read_regular(path)
    # hashlib and Arrow both release the GIL: hashing takes no time of its own.
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        digest = pool.submit(lambda: hashlib.sha256(data).hexdigest())
        try:
            table = _read_lines(data, columns, lines)
        except (OSError, ValueError, pa.ArrowException):
            _require_digest(digest.result(), sha256, data)
            raise
        _require_digest(digest.result(), sha256, data)
    return table


def _require_digest(found: str, expected: str, data: bytes) -> None:
    if found != expected:
        raise ValueError(f"SHA-256 mismatch: not the file that was published ({len(data)} bytes)")


def _read_lines(data: bytes, columns: Sequence[str] | None, lines: int) -> pa.Table:
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        # Before anything is allocated for the lines that the file says it has.
        found = file.metadata.num_rows
        if found != lines or lines > MAX_LINES_PER_BYTE * len(data):
            raise ValueError(f"expected {lines} lines, found {found} in {len(data)} bytes")
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
