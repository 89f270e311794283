"""The working folder of a build: what it decided, what it read, and which shards are done.

It is next to the dataset (``data.zarr.build``) or at ``--build-dir``, contains paths and identifiers, and is not meant to
be shared. A dataset is complete without it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from ich_prep.dataset.bucket_path import Place
from ich_prep.dataset.dataset import STATE, working_folder
from ich_prep.dataset.file_lease import breaking
from ich_prep.dataset.schema import FORMAT
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.storage import (
    files_below,
    for_each,
    path_below,
    place_of,
    read_whole,
    remove_files,
    whole_name,
    write_whole,
)
from ich_prep.dataset.tables import read_sealed
from ich_prep.errors import CorruptionError, DatasetError
from ich_prep.files import is_litter

SEAL = "sha256"  # the key of the digest of all other keys of state.json
_BATCH, _ENTRY = re.compile(r"[0-9]{5,}\.parquet"), re.compile(r"[0-9]{5,}\.json")
_OF_PART = re.compile(r"[0-9]+-of-[0-9]+\.(lock|lease(\.breaking)?|log\.jsonl)")


@dataclass(frozen=True)
class BuildFolder:
    """The paths of a build's files in its working folder ``path``."""

    path: Place

    @property
    def state(self) -> Place:
        """What the build decided: a ``State``."""
        return self.path / STATE

    @property
    def files(self) -> Place:
        """The listing, one row group per batch of the scan."""
        return self.path / "files.parquet"

    @property
    def scan(self) -> Place:
        """The folder of the headers, one file per batch."""
        return self.path / "scan"

    def batch(self, number: int) -> Place:
        """The headers of one batch of files."""
        return self.scan / f"{number:05d}.parquet"

    @property
    def middles(self) -> Place:
        """The middle slices of series whose unit is not known, one row group per series."""
        return self.path / "middles.parquet"

    @property
    def plan(self) -> Place:
        """The plan, one row group per shard."""
        return self.path / "plan.parquet"

    @property
    def keys(self) -> Place:
        """The source keys of the planned files, one row group per shard; written by each run."""
        return self.path / "keys.parquet"

    @property
    def series(self) -> Place:
        """The planned series table."""
        return self.path / "series.parquet"

    @property
    def quarantine(self) -> Place:
        """The files quarantined before any pixel was decoded."""
        return self.path / "quarantine.parquet"

    @property
    def lost(self) -> Place:
        """The labels whose images all left before any pixel was decoded."""
        return self.path / "lost_labels.parquet"

    @property
    def copies(self) -> Place:
        """The files that share a SOP Instance UID, one row group per task that hashes their images."""
        return self.path / "copies.parquet"

    @property
    def done(self) -> Place:
        """The folder of the ledger: one entry per finished shard."""
        return self.path / "shards"

    @property
    def label_problems(self) -> Place:
        """The labels and slices that do not match."""
        return self.path / "label_problems.parquet"

    @property
    def append(self) -> BuildFolder:
        """The working folder of an append in progress, inside this one."""
        return BuildFolder(self.path / "append")

    @property
    def key(self) -> Place:
        """The key of the pseudonyms, unless the user keeps it elsewhere."""
        return self.path / "identifiers.key"

    @property
    def log(self) -> Place:
        """One line per event."""
        return self.path / "log.jsonl"

    @property
    def lock(self) -> Place:
        """The lock of the process that builds."""
        return self.path / "lock"

    @property
    def lease(self) -> Place:
        """The lease of that process, where the file system has no locks."""
        return self.path / "lease"

    @property
    def parts(self) -> Place:
        """The folder of what processes that write a part of the shards keep: locks and logs."""
        return self.path / "parts"

    def is_lock(self, path: Place) -> bool:
        """Return whether ``path`` is a lock or a lease, of the build or of a part: those that a process may hold."""
        return whole_name(path.name).endswith(("lock", "lease", "lease.breaking")) and self._is_own(path)

    def members(self) -> tuple[Place, ...]:
        """All that a build may keep in the folder."""
        return (
            self.state, self.files, self.scan, self.middles, self.plan, self.keys, self.series, self.quarantine, self.lost,
            self.copies, self.done, self.label_problems, self.key, self.log, self.lock, self.lease, breaking(self.lease),
        )  # fmt: skip

    def own_files(self) -> list[Place]:
        """Return the files in the folder that builds put there, temporary files of killed builds too."""
        return [path for path in files_below(self.path) if self._is_own(path)]

    def unknown_files(self) -> list[Place]:
        """Return the files in the folder that neither a build nor an operating system put there."""
        return [path for path in files_below(self.path) if not self._is_own(path) and not self._is_litter(path)]

    def litter(self) -> list[Place]:
        """Return the files in the folder that an operating system or a file server put there."""
        return [path for path in files_below(self.path) if self._is_litter(path) and not self._is_own(path)]

    def _is_litter(self, path: Place) -> bool:
        return is_litter(path_below(path, self.path))

    def _is_own(self, path: Place) -> bool:
        name = whole_name(path.name)
        if path.parent == self.scan:
            return _BATCH.fullmatch(name) is not None
        if path.parent == self.done:
            return _ENTRY.fullmatch(name) is not None
        if self.append.path in path.parents:
            return self.append._is_own(path)
        if path.parent == self.parts:
            return _OF_PART.fullmatch(name) is not None
        return path.with_name(name) in self.members() and path.parent == self.path


def build_folder(
    out: Place, given: str | Place | None = None, *, endpoint: str | None = None, atomic: bool = True
) -> BuildFolder:
    """Return the working folder of the dataset ``out``: the one ``given``, else the one next to it.

    ``endpoint`` and ``atomic`` are those of a bucket, as for ``place_of``.
    """
    if given is None:
        return BuildFolder(working_folder(out))
    return BuildFolder(place_of(given, "--build-dir", endpoint=endpoint, atomic=atomic).absolute())


class State(BaseModel):
    """What a build in progress has decided.

    ``sources`` and ``labels`` are digests of the file listing and of the labels, ``versions`` those of the libraries that
    can change the bytes, ``key`` the id of the key of pseudonyms, ``plan`` the digest of the plan once there is one,
    ``published`` that of the dataset it became.
    ``before`` is the digest of the generation that ``published`` follows: until its root is written, that is the dataset.
    ``base`` is the digest of the dataset that an append adds to, ``first_shard`` the number of its first shard.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = FORMAT
    spec: Spec
    sources: str
    labels: str
    versions: dict[str, str | None]
    key: str | None = None
    plan: str | None = None
    published: str | None = None
    before: str | None = None
    base: str | None = None
    first_shard: int = 0

    def belongs_to(self, digest: str) -> bool:
        """Return whether the dataset with this ``digest`` is the one that the build made."""
        return digest in (self.published, self.before)


def read_state(folder: BuildFolder) -> State:
    """Return the state of the build in ``folder``; raises ``DatasetError`` if it cannot be read."""
    try:
        return _unsealed(read_whole(folder.state))
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is damaged, or of another version"
        raise DatasetError(
            f"Cannot read the state of a build at {folder.state}: {what}. A finished dataset does not need it: remove the "
            "working folder. An unfinished build can only be built again, with --overwrite."
        ) from None


def readable_state(folder: BuildFolder) -> State | None:
    """Return the state of the build in ``folder``, None where there is none or it cannot be read."""
    try:
        return read_state(folder) if folder.state.exists() else None
    except DatasetError:
        return None


def has_append(folder: BuildFolder, digest: str) -> bool:
    """Return whether ``folder`` has an append to the generation with this ``digest``: one runs, or can be resumed."""
    state = readable_state(folder.append)
    return state is not None and state.base == digest


def write_state(folder: BuildFolder, state: State) -> None:
    """Write the state of the build in ``folder``, whole or not at all."""
    content = state.model_dump(mode="json")
    write_whole(folder.state, json.dumps({**content, SEAL: _digest(content)}, indent=2).encode())


def _unsealed(data: bytes) -> State:
    """Return the state that ``write_state`` wrote; raises ``ValueError`` for anything else."""
    content = json.loads(data)
    if not isinstance(content, dict) or content.pop(SEAL, None) != _digest(content):
        raise ValueError("not the file that was written")
    return State.model_validate(content)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plan_is_whole(folder: BuildFolder) -> bool:
    """Return whether all tables of the plan are there and undamaged; if not, it can be made again from the scan."""
    return all(_is_whole(path) for path in (folder.plan, folder.series, folder.lost, folder.quarantine))


def drop_damaged_headers(folder: BuildFolder) -> None:
    """Delete the batches of headers that are damaged, to be read again."""
    paths: list[Place] = sorted(folder.scan.glob("*.parquet"))
    whole = for_each(_is_whole, paths, at=folder.path)
    remove_files(path for path, is_whole in zip(paths, whole, strict=True) if not is_whole)


def _is_whole(path: Place) -> bool:
    try:
        read_sealed(path, [])
    except (OSError, CorruptionError):
        return False
    return True
