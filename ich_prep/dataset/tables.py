"""Parquet files: read with page checksums verified, written atomically; equal tables give equal bytes.

A *sealed* file, of a working folder, holds the SHA-256 of its other bytes in its metadata, which no page checksum covers.
Published tables need none: the root records their digests.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ich_prep.dataset.bucket_path import BucketPath, Place
from ich_prep.dataset.storage import read_whole, write_whole
from ich_prep.errors import CorruptionError
from ich_prep.files import open_regular

_REMEDY = "Run the same build command again, without --overwrite: what is damaged is made again."
_SEAL, _OPEN = "ich.sha256", "0" * 64  # the key of a seal, and its value while the other bytes are digested
HASHED_ALONE = 1 << 17  # bytes: hashing fewer takes less time than starting a thread
READ_ALONE = 1 << 20  # bytes: likewise for the columns of a file
MAX_LINES_PER_BYTE = 64  # of a Parquet file; a line of ours takes 20 bytes and more


def read_parquet(path: Place, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a Parquet file's table, with page checksums verified; unlike ``pq.read_table`` this does not import pandas."""
    with opened_parquet(path) as file:
        return file.read(columns)


@contextmanager
def opened_parquet(path: Place) -> Iterator[pq.ParquetFile]:
    """Yield the open Parquet file at ``path``, which must be a regular one; page checksums are verified.

    Arrow opens it: its threads may drop buffers after the read, and those of a Python file would abort a process that
    ends at that moment.
    """
    if isinstance(path, BucketPath):
        with pq.ParquetFile(in_arrow_memory(path.read_bytes()), page_checksum_verification=True) as file:
            yield file
        return
    os.close(open_regular(path))
    with pa.OSFile(os.fsencode(path)) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
        yield file


def rows_of(path: Place) -> pq.ParquetFile:
    """Return the Parquet file of a working folder at ``path``, open until it is closed; of a bucket it reads ranges."""
    return pq.ParquetFile(path.reader() if isinstance(path, BucketPath) else path)


def in_arrow_memory(data: bytes) -> pa.BufferReader:
    """Return a copy of ``data`` for Arrow to read.

    Arrow's threads may outlive a reader for a moment. If one of them then gives up Python's memory while the interpreter
    shuts down, the process aborts: they must not own any.
    """
    copy = pa.BufferOutputStream()
    copy.write(data)
    return pa.BufferReader(copy.getvalue())


def read_published(path: Place, *, columns: Sequence[str] | None, lines: int, sha256: str) -> pa.Table:
    """Return the table in the Parquet file at ``path``, or those of ``columns`` that it has.

    Raises ``ValueError`` if its SHA-256 is another one, or if it does not have that many ``lines``; ``OSError`` or
    ``pa.ArrowException`` if it cannot be read.
    """
    data = read_whole(path)
    if len(data) <= HASHED_ALONE:
        _require_digest(hashlib.sha256(data).hexdigest(), sha256, data)
        return _read_lines(data, columns, lines)
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
    with pq.ParquetFile(in_arrow_memory(data), page_checksum_verification=True) as file:
        # Before anything is allocated for the lines that the file says it has.
        found = file.metadata.num_rows
        if found != lines or lines > MAX_LINES_PER_BYTE * len(data):
            raise ValueError(f"expected {lines} lines, found {found} in {len(data)} bytes")
        return file.read(columns)


def with_columns(table: pa.Table, columns: Mapping[str, Any]) -> pa.Table:
    """Return ``table`` with other values in ``columns``: Arrow's, or any that its types take; one that it lacks is added."""
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        if place < 0:
            table = table.append_column(name, values)
            continue
        field = table.schema.field(place)
        column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, field.type)
        table = table.set_column(place, field, column)
    return table


def write_table(path: Place, table: pa.Table) -> None:
    """Write a published table: equal tables give equal bytes."""
    write_whole(path, parquet_bytes(table, compression="zstd", row_group_size=1 << 16, write_page_checksum=True))


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """Return ``table`` as the bytes of a Parquet file; ``options`` are those of ``pq.write_table``."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def sealed_parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """Return ``table`` as ``parquet_bytes`` does, sealed; ``row_group_size`` is that of ``pq.write_table``."""
    return _sealed(table.schema, [table], **options)


def write_sealed(path: Place, table: pa.Table, **options: Any) -> None:
    """Write a table of a working folder, sealed."""
    write_whole(path, sealed_parquet_bytes(table, **options))


def write_sealed_parts(path: Place, schema: pa.Schema, parts: Iterable[pa.Table], **options: Any) -> None:
    """Write a table of a working folder, sealed, of which the ``parts``, each of whole row groups, come one by one."""
    write_whole(path, _sealed(schema, parts, **options))


def _sealed(
    schema: pa.Schema, parts: Iterable[pa.Table], *, row_group_size: int | None = None, **options: Any
) -> bytes:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for part in parts:
            writer.write_table(part, row_group_size=row_group_size)
        writer.add_key_value_metadata({_SEAL: _OPEN})
    written = memoryview(sink.getvalue())
    footer = _footer(written)
    at = len(written) - len(footer) + footer.rindex(_OPEN.encode())
    return b"".join((written[:at], hashlib.sha256(written).hexdigest().encode(), written[at + len(_OPEN) :]))


def read_sealed(path: Place, columns: Sequence[str] | None = None, *, without: Sequence[str] = ()) -> pa.Table:
    """Return the table of a sealed file, or some of its columns, or all but those of ``without``.

    Raises ``CorruptionError`` and ``OSError``.
    """
    data = read_whole(path)
    try:
        with pq.ParquetFile(in_arrow_memory(data)) as file:
            seal = (file.metadata.metadata or {}).get(_SEAL.encode(), b"")
            at = data.rfind(seal) if len(seal) == len(_OPEN) else -1
            if at < 0 or _digest_but_seal(data, at) != seal:
                raise CorruptionError(f"{path} is damaged: it is not the file that was written. {_REMEDY}")
            threads = len(data) > READ_ALONE
            del data  # Arrow has a copy
            if without:
                columns = [name for name in file.schema_arrow.names if name not in without]
            return file.read(columns, use_threads=threads)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CorruptionError(f"{path} is damaged: it cannot be read as Parquet ({error}). {_REMEDY}") from None


def _footer(file: memoryview) -> bytes:
    """Return the end of a Parquet ``file``: its metadata, their length in four bytes, and the magic bytes."""
    length = int.from_bytes(file[-8:-4], "little")
    return bytes(file[-8 - length :])


def _digest_but_seal(data: bytes, at: int) -> bytes:
    """Return the SHA-256 of a sealed file as it was before the seal at ``at``."""
    view = memoryview(data)
    digest = hashlib.sha256(view[:at])
    digest.update(_OPEN.encode())
    digest.update(view[at + len(_OPEN) :])
    return digest.hexdigest().encode()


def stacked(*tables: pa.Table) -> pa.Table:
    """Return the lines of all ``tables``; a column that one lacks is null there, a kept one of two types becomes text."""
    types: dict[str, pa.DataType] = {}
    for table in tables:
        for field in table.schema:
            types[field.name] = _common_type(types.get(field.name, field.type), field.type)
    schema = pa.schema(types.items())
    whole = []
    for table in tables:
        columns = [
            table[name].cast(kind) if name in table.column_names else pa.nulls(len(table), kind)
            for name, kind in types.items()
        ]
        whole.append(pa.table(columns, schema=schema))
    return pa.concat_tables(whole)


def _common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other:
        return one
    numbers = (pa.types.is_integer, pa.types.is_floating)
    if all(any(is_kind(kind) for is_kind in numbers) for kind in (one, other)):
        return pa.float64()
    return pa.string()


def give_back_memory() -> None:
    """Return memory that was freed to the operating system: allocators keep it, and the peak of a process counts it."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
