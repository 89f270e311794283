"""Parts of a build's shards, written by processes that know nothing of each other, on one or many hosts.

Each part holds a lock of its own, not that of the build. A process looks for locks of the other kind only after it has
taken its own: of two that start at the same moment, at least one sees the other, and exits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ich_prep.dataset.lock import HeldError, locked, refuse_if_held
from ich_prep.errors import BuildError, UsageError
from ich_prep.progress import NoProgress

if TYPE_CHECKING:
    from ich_prep.dataset.bucket_path import Place
    from ich_prep.stages.state import BuildFolder

MOST_PARTS = 100_000


@dataclass(frozen=True)
class Part:
    """Part ``number`` (from 1) of ``count``: every ``count``-th shard, so that parts take about the same time."""

    number: int
    count: int

    def numbers(self, shards: int) -> range:
        """Return which of ``shards`` shards belong to this part."""
        return range(self.number - 1, shards, self.count)

    @property
    def name(self) -> str:
        """The name of its files in the working folder."""
        return f"{self.number}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


ALL = Part(1, 1)


def parse_part(text: str) -> Part:
    """Return the part that ``text``, such as "3/8", names; raises ``UsageError``."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    part = Part(int(match[1]), int(match[2])) if match else Part(0, 0)
    if not 1 <= part.number <= part.count <= MOST_PARTS:
        counted = f"; parts are counted from 1 to {part.count}" if part.count else ""
        raise UsageError(f"Expected a part such as 3/8, the third of eight, with --part; found {text[:50]!r}{counted}.")
    return part


def log_of(folder: BuildFolder, part: Part) -> Place:
    """Return the path of the log of a part."""
    return folder.parts / f"{part.name}.log.jsonl"


@contextmanager
def part_lock(folder: BuildFolder, part: Part) -> Iterator[None]:
    """Hold the lock of ``part`` in the working ``folder``.

    Raises ``BuildError`` while another process holds it, while one builds, plans or publishes, and while parts of another
    count are being written: two processes would then write the same shard.
    """
    folder.parts.mkdir(exist_ok=True)
    folder.lock.touch()
    lock = lock_of(folder, part)
    lock.touch()
    try:
        with locked(lock, _lease(lock), say=NoProgress().say):
            _refuse_builds(folder)
            for other in running_parts(folder):
                if other.count != part.count:
                    raise BuildError(
                        f"Part {other} is being written. Parts that run at the same time must be of the same number: wait "
                        f"for it, or give --part N/{other.count}."
                    )
            yield
    except HeldError as error:
        raise BuildError(
            f"Another process {error}is writing part {part}. Wait for it, or stop it, then run this command again."
        ) from None


def refuse_parts(folder: BuildFolder) -> None:
    """Raise ``BuildError`` while a process writes a part of the shards of the build in ``folder``."""
    for part in running_parts(folder):
        raise BuildError(
            f"Part {part} of the shards is being written. Wait for it, or stop it, then run this command again."
        )


def running_parts(folder: BuildFolder) -> Iterator[Part]:
    """Yield the parts that processes of any host are writing, this one too."""
    for part in parts_of(folder):
        lock = lock_of(folder, part)
        try:
            refuse_if_held(lock, _lease(lock))
        except HeldError:
            yield part
        except FileNotFoundError:  # the folder is being cleaned
            continue


def parts_of(folder: BuildFolder) -> list[Part]:
    """Return the parts that any process has begun to write, sorted."""
    names = (lock.stem.split("-of-") for lock in folder.parts.glob("*-of-*.lock"))
    return sorted(
        (Part(int(number), int(count)) for number, count in names), key=lambda part: (part.count, part.number)
    )


def lock_of(folder: BuildFolder, part: Part) -> Place:
    """Return the path of the lock of a part, which the process that writes it has touched."""
    return folder.parts / f"{part.name}.lock"


def _refuse_builds(folder: BuildFolder) -> None:
    try:
        refuse_if_held(folder.lock, folder.lease)
    except HeldError as error:
        raise BuildError(
            f"Another process {error}is building, planning or publishing with the working folder {folder.path}. Wait for "
            "it, or stop it, then run this command again."
        ) from None


def _lease(lock: Place) -> Place:
    return lock.with_name(f"{lock.stem}.lease")
