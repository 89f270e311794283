"""Remove the pixels of some rows from a finished shard: the other chunks keep their bytes and their places.

So a reader that has read the shard's index goes on reading the others, and is refused the ones that are gone.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ich_prep.dataset import shard_format
from ich_prep.dataset.native import crc32c
from ich_prep.dataset.shard_format import CRC_BYTES, MISSING
from ich_prep.dataset.storage import clear_leftovers, renamed_when_whole, sync_folder
from ich_prep.errors import CorruptionError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class ShardPurge:
    """What a shard is to become: ``ranges`` (offset, length) of bytes to be zeros, then its index, ``tail``.

    ``fingerprint`` is then the shard's.
    """

    path: Path
    ranges: tuple[tuple[int, int], ...]
    tail: bytes
    fingerprint: str


def plan_purge(
    path: Path, gone: NDArray[np.bool_], *, chunks: int, recorded: str, pending: NDArray[np.bool_]
) -> ShardPurge:
    """Return how to remove the chunks ``gone``, bool (chunks,), from the shard at ``path``; its fingerprint is ``recorded``.

    ``pending`` (chunks,), among ``gone``, are those that a purge which was interrupted may have left in the file. Raises
    ``CorruptionError`` if the shard is not the one that is recorded, or cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        body = size - shard_format.index_bytes(chunks)
        if body < 0:
            raise CorruptionError(f"{path} is too short for a shard ({size} bytes). Restore it first.")
        index = shard_format.parse_index(os.pread(file.fileno(), size - body, body), chunks=chunks, body=body)
        checksums = np.zeros(chunks, np.uint32)
        for inside in np.flatnonzero(index[:, 0] != MISSING).tolist():
            end = int(index[inside].sum())
            checksums[inside] = _CRC.unpack(os.pread(file.fileno(), CRC_BYTES, end - CRC_BYTES))[0]
    if recorded not in (_fingerprint(index, checksums), _fingerprint(_without(index, pending), checksums)):
        raise CorruptionError(
            f"{path} is not the shard that the dataset records (fingerprint differs). Run `ich-prep verify`, and restore it "
            "before slices are purged."
        )
    after = _without(index, gone)
    removed = index[(index[:, 0] != MISSING) & gone]
    return ShardPurge(path, tuple(map(tuple, removed.tolist())), _tail(after), _fingerprint(after, checksums))


def _without(index: NDArray[np.uint64], gone: NDArray[np.bool_]) -> NDArray[np.uint64]:
    after = index.copy()
    after[gone] = MISSING
    return after


def _tail(index: NDArray[np.uint64]) -> bytes:
    entries = index.astype("<u8").tobytes()
    return entries + _CRC.pack(crc32c(entries))


def _fingerprint(index: NDArray[np.uint64], checksums: NDArray[np.uint32]) -> str:
    return shard_format.fingerprint(checksums[index[:, 0] != MISSING], _tail(index))


def purge(plan: ShardPurge) -> bool:
    """Replace the shard by one without the chunks, then overwrite them in the file that it was; return if that is done.

    A process that has that file open finds zeros, which are not what it expects. Where the file has another name, a hard
    link, it is left as it is, and False is returned.
    """
    if not plan.ranges:
        return True
    clear_leftovers(plan.path)
    with plan.path.open("r+b") as old:
        alone = os.fstat(old.fileno()).st_nlink == 1
        data = bytearray(old.read())
        for offset, length in plan.ranges:
            data[offset : offset + length] = bytes(length)
        data[-len(plan.tail) :] = plan.tail
        with renamed_when_whole(plan.path) as temporary, temporary.open("xb") as new:
            new.write(data)
            new.flush()
            os.fsync(new.fileno())
        sync_folder(plan.path.parent)
        if alone:
            for offset, length in plan.ranges:
                os.pwrite(old.fileno(), bytes(length), offset)
            os.fsync(old.fileno())
    return alone
