"""The interface of sources, and their listings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.errors import Reason, SliceError, SourceError

if TYPE_CHECKING:
    from typing_extensions import Buffer

LARGEST_TABLE = 1 << 30  # bytes

# path: relative, "/" between its parts; equal in a folder and in an archive of it. size: in bytes, uncompressed.
# key: what ``read_into`` takes. reason, detail: why a file cannot be read, null if it can.
LISTING_SCHEMA = pa.schema(
    [
        ("path", pa.binary()),
        ("size", pa.int64()),
        ("key", pa.binary()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


class Source(Protocol):
    """A source of files. Each file has a key: bytes that only its source understands, valid in any process."""

    @property
    def name(self) -> str:
        """The name of the folder or archive, without its ending; empty for several sources."""

    def list(self) -> Listing:
        """Return every file; raises ``SourceError`` if there is none, or the source cannot be read."""

    def size(self, key: bytes) -> int:
        """Return the length of a file in bytes, uncompressed; raises ``OSError``."""

    def read_into(self, key: bytes, buffers: Sequence[Buffer], offset: int = 0, *, verify: bool = False) -> int:
        """Fill ``buffers``, one after the other, from byte ``offset`` of a file; return the number of bytes read.

        With ``verify`` (and ``offset`` 0) a file that has a checksum is read to its end and verified. Without it, a
        compressed file is inflated only as far as the buffers need. Raises ``OSError``, and ``SliceError``
        (BAD_ARCHIVE, TOO_LARGE).
        """

    def prefetch(self, key: bytes, length: int) -> None:
        """Start fetching the first ``length`` bytes of a file, or all of them if that is 0.

        Raises nothing: a file that cannot be opened is reported by the read.
        """


@dataclass(frozen=True)
class TableFile:
    """A table, mostly CSV: in a source, or given by its path. ``path`` is what messages call it."""

    source: Source
    key: bytes
    path: str

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    def read(self, length: int | None = None) -> bytes:
        """Return the first ``length`` bytes, or all; raises ``SourceError`` if that is not possible."""
        try:
            size = self.source.size(self.key)
            if size > LARGEST_TABLE:
                raise SourceError(
                    f"{self.path} is too large for a label table: {size:,} bytes, expected at most {LARGEST_TABLE:,}."
                )
            if length is not None:
                return read_first(self.source, self.key, min(length, size))
            return read_whole(self.source, self.key, limit=LARGEST_TABLE)
        except OSError as error:
            raise SourceError(
                f"Expected a table of labels at {self.path}; it cannot be read: {error.strerror}."
            ) from None
        except SliceError as error:
            raise SourceError(
                f"Expected a table of labels at {self.path}; it cannot be read: {error.detail}."
            ) from None


@dataclass(frozen=True)
class Listing:
    """The files of a source: ``files`` (``LISTING_SCHEMA``, sorted by path), and ``tables``, its CSV and TSV files.

    ``name`` is the source's.
    """

    name: str
    files: pa.Table
    tables: tuple[TableFile, ...]

    def folders(self) -> set[str]:
        """Return the folders, relative to the source, that contain files; names that are not UTF-8 are skipped."""
        names = {path[: path.rfind(b"/") + 1] for path in self.files["path"].to_pylist()}
        return {name.decode() for name in names if is_utf8(name)}


class Entries:
    """Collects the lines of a listing."""

    def __init__(self) -> None:
        self._columns: dict[str, list[object]] = {name: [] for name in LISTING_SCHEMA.names}
        self._parts: list[pa.Table] = []
        self.tables: list[TableFile] = []

    def add(self, path: bytes, size: int, key: bytes, reason: str | None = None, detail: str | None = None) -> None:
        """Add one file."""
        for column, value in zip(self._columns.values(), (path, size, key, reason, detail), strict=True):
            column.append(value)

    def add_all(self, files: pa.Table) -> None:
        """Add many files, a table of ``LISTING_SCHEMA``."""
        self._parts.append(files)

    def listing(self, name: str) -> Listing:
        """Return what was added, sorted by the bytes of the paths; equal paths keep the order of addition."""
        files = pa.concat_tables([pa.table(self._columns, schema=LISTING_SCHEMA), *self._parts])
        return listing_of(name, files, self.tables)


def listing_of(name: str, files: pa.Table, tables: Sequence[TableFile]) -> Listing:
    """Return ``files`` (``LISTING_SCHEMA``) and ``tables`` sorted by the bytes of their paths; the sort is stable."""
    ordered = files.take(pc.sort_indices(files["path"]))
    return Listing(name, ordered, tuple(sorted(tables, key=lambda table: table.path)))


def read_first(source: Source, key: bytes, length: int) -> bytes:
    """Return the first ``length`` bytes of a file, fewer if it ends earlier; not verified."""
    buffer = bytearray(length)
    got = source.read_into(key, [buffer])
    return bytes(memoryview(buffer)[:got])


def read_whole(source: Source, key: bytes, *, limit: int) -> bytes:
    """Return all bytes of a file, verified if it has a checksum; raises ``SliceError`` (TOO_LARGE) beyond ``limit``."""
    size = source.size(key)
    if size > limit:
        raise SliceError(Reason.TOO_LARGE, f"expected a file of at most {limit:,} bytes, found {size:,}")
    buffer = bytearray(size)
    got = source.read_into(key, [buffer], verify=True)
    return bytes(memoryview(buffer)[:got])


def fill(data: memoryview, buffers: Sequence[Buffer]) -> int:
    """Copy ``data`` into ``buffers``, one after the other; return how many bytes they took."""
    done = 0
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        part = data[done : done + len(view)]
        view[: len(part)] = part
        done += len(part)
    return done


def with_prefix(prefix: bytes, values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return ``values`` (binary), each with ``prefix`` before it."""
    return pc.binary_join_element_wise(pa.scalar(prefix, pa.binary()), values, pa.scalar(b"", pa.binary()))


def is_utf8(name: bytes) -> bool:
    """Return whether ``name`` can be shown as text."""
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def shown(path: bytes) -> str:
    """Return ``path`` as text, with escapes for bytes that are not UTF-8."""
    return path.decode(errors="backslashreplace")


def display_path(root: Path, path: bytes) -> str:
    """Return the name of the file ``path`` below ``root`` for messages."""
    return f"{root}/{shown(path)}"
