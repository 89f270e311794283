"""Files that share a SOP Instance UID: which are copies of one image, and which are different images.

Before the plan is made, the images of all such files are decoded and hashed: only a hash can tell a copy from a conflict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from ich_prep.dataset.storage import write_whole
from ich_prep.dataset.tables import parquet_bytes, rows_of
from ich_prep.dicom.decode import PIXEL_FIELDS
from ich_prep.errors import Reason, SliceError
from ich_prep.sources import open_source, read_ahead
from ich_prep.stages.shard import FILES_AHEAD, pixel_source, shared_decoder
from ich_prep.stages.state import BuildFolder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.bucket_path import Place

FILES_PER_TASK = 64
# What the scan reads of a header that changes what the stored values mean.
_MEANING = ("rescale_slope", "rescale_intercept", "signed", "bits_stored", "rows", "columns")
_BLANK, _CONTENT_HASH = "blank", 32  # how a hash of a blank image begins; characters of that of the stored values
MapTasks = Callable[[Callable[[int], Any], Sequence[int]], Iterable[tuple[int, Any]]]


def sharing_uid(slices: pa.Table) -> NDArray[np.int64]:
    """Return the lines of ``slices`` whose SOP Instance UID another line has, ascending."""
    encoded = slices["sop_instance_uid"].combine_chunks().dictionary_encode().indices.fill_null(-1)
    codes = encoded.to_numpy(zero_copy_only=False)
    numbers = np.bincount(codes + 1, minlength=2)
    return np.flatnonzero((codes >= 0) & (numbers[codes + 1] > 1))


def hash_images(
    slices: pa.Table, keys: Sequence[bytes], *, folder: BuildFolder, sources: Sequence[Place], map_tasks: MapTasks
) -> pa.Array:
    """Return the image hash of each line of ``slices`` (n,): null where its file does not decode.

    ``keys`` are the source keys of the files. Equal hashes mean equal stored values with an equal meaning in HU.
    """
    table = slices.select([*PIXEL_FIELDS, "rescale_slope", "rescale_intercept"]).append_column(
        "key", pa.array(keys, pa.binary())
    )
    write_whole(folder.copies, parquet_bytes(table, row_group_size=FILES_PER_TASK, write_statistics=False))
    task = partial(hash_batch, folder, tuple(sources))
    parts = dict(map_tasks(task, range(-(-len(slices) // FILES_PER_TASK))))
    return pa.array([value for number in sorted(parts) for value in parts[number]], pa.string())


def hash_batch(folder: BuildFolder, sources: tuple[Place, ...], batch: int) -> list[str | None]:
    """Task: return the image hashes of files ``batch`` x 64 and following of the list in the working folder."""
    source = open_source(sources)
    with rows_of(folder.copies) as listed:
        lines = listed.read_row_group(batch).to_pylist()
    ahead = read_ahead(source, lines, lambda line: line["key"], files=FILES_AHEAD)
    return [_hash(source, line) for line in ahead]


def _hash(source: Any, line: dict[str, Any]) -> str | None:
    try:
        stored = shared_decoder().read(pixel_source(source, line["key"], line))
    except SliceError:
        return None
    meaning = repr([line[name] for name in _MEANING]).encode()
    blank = _BLANK if (stored == stored.flat[0]).all() else ""
    return f"{blank}{xxhash.xxh3_128_hexdigest(stored.data)}{xxhash.xxh3_64_hexdigest(meaning)}"


def content_hash_in(image: str) -> str:
    """Return the part of an image hash that is the hash of the stored values, ``content_hash`` of the slice table."""
    return image.removeprefix(_BLANK)[:_CONTENT_HASH]


@dataclass(frozen=True)
class Copies:
    """What becomes of files that share a SOP Instance UID: one value per slice in each array.

    ``reason`` is DUPLICATE or SOP_CONFLICT, null for a slice that is kept; ``detail`` names the other file; ``shared``
    (bool) marks slices that are kept although other images have their UID; ``copy_of`` (int64) is the line of the image
    that a duplicate is a copy of, -1 for all others.
    """

    reason: pa.Array
    detail: pa.Array
    shared: NDArray[np.bool_]
    copy_of: NDArray[np.int64]


def settle(slices: pa.Table, image: pa.Array, *, keyed_by_uid: bool) -> Copies:
    """Return what becomes of each line of ``slices``; ``image`` (n,) are their hashes, null where unknown.

    Of equal images the first readable one is kept, but a training slice rather than a test slice: RSNA's test slices of
    stage 1 are also among the training slices of stage 2, where they have labels. Different images with one UID are all
    kept, unless labels are ``keyed_by_uid``: then no label can be assigned to them. Blank images of different series are
    different images.
    """
    count = len(slices)
    reasons: list[str | None] = [None] * count
    details: list[str | None] = [None] * count
    shared = np.zeros(count, bool)
    original = np.full(count, -1, np.int64)
    lines = sharing_uid(slices)
    subset = (
        slices.select(["sop_instance_uid", "series_instance_uid", "subset", "path"]).take(pa.array(lines)).to_pylist()
    )
    hashes = image.take(pa.array(lines)).to_pylist()
    groups: dict[str, list[int]] = {}
    for index, line in enumerate(subset):
        groups.setdefault(line["sop_instance_uid"], []).append(index)
    for members in groups.values():
        members.sort(key=lambda index: subset[index]["subset"] == "test")
        images: dict[str, int] = {}
        copy_of: dict[int, int] = {}
        for index in members:
            value = hashes[index]
            if value is None:
                continue
            if value.startswith(_BLANK):
                value += subset[index]["series_instance_uid"]
            if images.setdefault(value, index) != index:
                copy_of[index] = images[value]
        kept = list(images.values()) or members[:1]
        if len(kept) > 1 and keyed_by_uid:
            for index in members:
                other = next(one for one in (*kept, *members) if one != index)
                reasons[lines[index]] = str(Reason.SOP_CONFLICT)
                details[lines[index]] = f"another image has its SOP Instance UID: {subset[other]['path']}"
            continue
        for index in members:
            if index in kept:
                shared[lines[index]] = len(kept) > 1
                continue
            reasons[lines[index]] = str(Reason.DUPLICATE)
            if index in copy_of:
                original[lines[index]] = lines[copy_of[index]]
            details[lines[index]] = f"the same SOP Instance UID as {subset[copy_of.get(index, kept[0])]['path']}"
    return Copies(pa.array(reasons, pa.string()), pa.array(details, pa.string()), shared, original)
