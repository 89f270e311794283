"""Files of the sources by the paths that a dataset published, which may be pseudonyms, or of one source of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ich_prep.sources import Source, open_source, shown
from ich_prep.sources.several import SeveralSources
from ich_prep.stages.pseudonyms import Level, pseudonyms


@dataclass(frozen=True)
class NamedFile:
    """A file at ``path`` of ``source``, which reads it by its ``key``; ``name`` is its path as text.

    ``is_damaged`` is true if its archive has no readable file of this path, or more than one.
    """

    source: Source
    key: bytes
    path: bytes
    name: str
    is_damaged: bool


class SourceFiles:
    """The files of the sources at ``paths`` by their published paths.

    Several sources are first taken as one, as by a build: then each path starts with the name of its source. A path that is
    in none of them so is sought in each source alone, as an append names it. ``secret`` is the key of the pseudonyms, None
    if the dataset has the paths themselves.
    """

    def __init__(self, paths: Sequence[str | Path], secret: bytes | None = None) -> None:
        source = open_source(paths)
        self._together = _by_name(source, secret)
        parts = zip(source.names(), source.parts, strict=True) if isinstance(source, SeveralSources) else ()
        self._apart = {name: _by_name(part, secret) for name, part in parts}

    def at(self, path: str) -> dict[str, NamedFile]:
        """Return the files of a published ``path``, none if it is in no source, by what tells them apart.

        That is "" unless several sources have the path: then it is the name of the source.
        """
        if path in self._together:
            return {"": self._together[path]}
        found = {name: files[path] for name, files in self._apart.items() if path in files}
        return found if len(found) > 1 else dict(zip([""], found.values(), strict=False))


def _by_name(source: Source, secret: bytes | None) -> dict[str, NamedFile]:
    files = source.list().files.select(["path", "key", "reason"]).to_pylist()
    damaged = {line["path"] for line in files if line["reason"] is not None}
    found = [
        NamedFile(source, line["key"], line["path"], shown(line["path"]), line["path"] in damaged) for line in files
    ]
    names = pa.array([file.name for file in found], pa.string())
    published = names if secret is None else pseudonyms(secret, Level.PATH, names)
    return dict(zip(published.to_pylist(), found, strict=True))
