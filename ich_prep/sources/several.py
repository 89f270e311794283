"""Several sources as one, each below a folder of its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from ich_prep.sources.source import Listing, Source, TableFile, listing_of, with_prefix

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True)
class SeveralSources:
    """The files of all ``parts``. A path begins with the name of its part; a key with the part's number and a colon.

    A name that occurs again gets a number, in the order of the parts: ``data``, ``data-2``.
    """

    parts: tuple[Source, ...]

    @property
    def name(self) -> str:
        """Empty: the names of the parts are in the paths."""
        return ""

    def list(self) -> Listing:
        """Return the files of all parts."""
        files, tables = [], list[TableFile]()
        for number, (part, name) in enumerate(zip(self.parts, self.names(), strict=True)):
            listing = part.list()
            key_prefix = b"%d:" % number
            table = _prefixed(listing.files, "path", os.fsencode(name) + b"/")
            files.append(_prefixed(table, "key", key_prefix))
            tables += [TableFile(self, key_prefix + one.key, one.path) for one in listing.tables]
        return listing_of(self.name, pa.concat_tables(files), tables)

    def names(self) -> Sequence[str]:
        """Return the folder of each part."""
        names: dict[str, None] = {}
        for part in self.parts:
            candidates = (part.name, *(f"{part.name}-{number}" for number in range(2, len(self.parts) + 2)))
            names[next(name for name in candidates if name not in names)] = None
        return tuple(names)

    def size(self, key: bytes) -> int:
        """Return the length of a file in bytes; see ``Source.size``."""
        part, own = self._part(key)
        return part.size(own)

    def read_into(self, key: bytes, buffers: Sequence[Buffer], offset: int = 0, *, verify: bool = False) -> int:
        """Fill ``buffers``; see ``Source.read_into``."""
        part, own = self._part(key)
        return part.read_into(own, buffers, offset, verify=verify)

    def prefetch(self, key: bytes, length: int) -> None:
        """Ask for a file; see ``Source.prefetch``."""
        part, own = self._part(key)
        part.prefetch(own, length)

    def _part(self, key: bytes) -> tuple[Source, bytes]:
        number, _, own = key.partition(b":")
        return self.parts[int(number)], own


def _prefixed(files: pa.Table, column: str, prefix: bytes) -> pa.Table:
    return files.set_column(files.column_names.index(column), column, with_prefix(prefix, files[column]))
