"""Withdraw slices from a finished dataset: they are never read again, and with ``purge`` their pixels are removed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.corrections import default_file
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import UNUSED, WITHDRAWN, shard_path
from ich_prep.dataset.tables import with_columns
from ich_prep.errors import UsageError, count
from ich_prep.stages.generation import Change, changing, old_tables, publish_generation
from ich_prep.stages.purge import ShardPurge, plan_purge, purge
from ich_prep.stages.relabelling import with_series_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset import Dataset
    from ich_prep.stages.state import BuildFolder


@dataclass(frozen=True)
class Dropped:
    """What ``drop`` withdrew, or would withdraw: ``slices``, in how many ``volumes`` of how many ``patients``.

    ``already`` slices were withdrawn before; ``purged`` are those whose pixels were removed. ``generation`` is the new one,
    None if nothing was written; ``copies`` are sentences that say where copies of what was purged remain.
    """

    slices: int
    volumes: int
    patients: int
    already: int
    purged: int
    generation: int | None
    copies: tuple[str, ...]


def drop(
    path: str | Path,
    where: str,
    *,
    purge_pixels: bool = False,
    dry_run: bool = False,
    build_dir: str | Path | None = None,
) -> Dropped:
    """Withdraw the slices of the dataset at ``path`` that the filter ``where`` selects, as its next generation.

    Their rows stay, with the status ``withdrawn``, so that all others keep their numbers. With ``purge_pixels`` the pixels
    of the selected slices, also of those withdrawn before, are removed from the shards: a reader that has the dataset open
    can then no longer read them. If that is interrupted, the same command completes it. Raises ``UsageError`` for a filter
    that is not valid or selects no slice, ``CorruptionError`` for a damaged shard, and as ``stages.generation.changing``.
    """
    with changing(path, build_dir) as (dataset, folder):
        slices = dataset.slices
        selected = np.zeros(len(dataset), bool)
        selected[dataset.where(where)] = True
        withdrawn = _is(slices, WITHDRAWN)
        fresh, already = selected & dataset.is_ok, selected & withdrawn
        if not (fresh | already).any():
            raise UsageError(
                f"--where {where!r} selects {count(int(selected.sum()), 'row')} of {dataset.path}, and none that has "
                "pixels. Nothing was changed."
            )
        has_chunk = _has_chunk(slices, dataset.is_ok | withdrawn)
        gone = (fresh | already) if purge_pixels else np.zeros_like(fresh)
        plans = _plan_purges(dataset, gone, pending=withdrawn & ~has_chunk)
        taken = slices.select(["series_row", "patient_id"]).filter(pa.array(fresh))
        done = Dropped(
            slices=int(fresh.sum()),
            volumes=pc.count_distinct(taken["series_row"]).as_py(),
            patients=pc.count_distinct(taken["patient_id"]).as_py(),
            already=int(already.sum()),
            purged=sum(len(plan.ranges) for plan in plans.values()),
            generation=None,
            copies=(),
        )
        if dry_run:
            return done
        generation = None
        if fresh.any() or (gone & has_chunk).any():
            change = _change(dataset, fresh, gone & has_chunk, plans)
            generation = publish_generation(dataset, folder, change)
        linked = [plan.path for plan in plans.values() if not purge(plan)]
        copies = tuple(_copies(open_dataset(dataset.path), folder, linked)) if purge_pixels else ()
        return Dropped(**{**vars(done), "generation": generation, "copies": copies})


def _is(slices: pa.Table, status: str) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = pc.equal(slices["status"], status).fill_null(False).to_numpy()
    return found


def _has_chunk(slices: pa.Table, written: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which rows have a chunk, as the table says; in one from before it recorded that, those ``written``."""
    if "chunk_crc32c" not in slices.column_names or slices["chunk_crc32c"].null_count == len(slices):
        return written
    known: NDArray[np.bool_] = slices["chunk_crc32c"].is_valid().to_numpy()
    return known


def _plan_purges(dataset: Dataset, gone: NDArray[np.bool_], *, pending: NDArray[np.bool_]) -> dict[int, ShardPurge]:
    """Return by shard how to remove the rows ``gone`` (n,), and with them those ``pending``, from their shards."""
    per_shard = dataset.spec.slices_per_shard
    recorded = dataset.read_table("shards", ["shard", "fingerprint"])["fingerprint"]
    plans = {}
    for shard in np.unique(np.flatnonzero(gone) // per_shard).tolist():
        first = shard * per_shard
        removed, left = np.zeros(per_shard, bool), np.zeros(per_shard, bool)
        rows = slice(first, min(first + per_shard, len(gone)))
        left[: rows.stop - first] = pending[rows]
        removed[: rows.stop - first] = gone[rows]
        plans[shard] = plan_purge(
            shard_path(dataset.folder, shard),
            removed | left,
            chunks=per_shard,
            recorded=recorded[shard].as_py(),
            pending=left,
        )
    return plans


def _change(
    dataset: Dataset, fresh: NDArray[np.bool_], purged: NDArray[np.bool_], plans: dict[int, ShardPurge]
) -> Change:
    """Return the next generation, without the rows ``fresh``; those ``purged`` have no checksum any more."""
    slices, shards = dataset.slices, dataset.read_table("shards")
    ok = dataset.is_ok & ~fresh
    slices = with_columns(slices, {"status": pc.if_else(pa.array(fresh), WITHDRAWN, slices["status"])})
    if purged.any() and "chunk_crc32c" in slices.column_names:
        nothing = pa.scalar(None, pa.uint32())
        slices = with_columns(slices, {"chunk_crc32c": pc.if_else(pa.array(purged), nothing, slices["chunk_crc32c"])})
    counted = ~_is(slices, WITHDRAWN) & ~_is(slices, UNUSED)
    series = with_series_labels(dataset.series, slices, dataset.classes, counted)
    owners = slices["series_row"].filter(pa.array(ok)).to_numpy()
    series = with_columns(series, {"n_ok": np.bincount(owners, minlength=len(series))})
    starts = np.arange(0, len(ok), dataset.spec.slices_per_shard)
    fingerprints = shards["fingerprint"].to_pylist()
    for shard, plan in plans.items():
        fingerprints[shard] = plan.fingerprint
    shards = with_columns(shards, {"n_ok": np.add.reduceat(ok.astype(np.int64), starts), "fingerprint": fingerprints})
    return Change(
        command="drop --purge" if plans else "drop",
        tables={"slices": slices, "series": series, "shards": shards},
        counts={"ok": int(ok.sum()), "withdrawn": dataset.counts.withdrawn + int(fresh.sum())},
        done={"dropped": int(fresh.sum()), "purged": int(purged.sum())},
    )


def _copies(dataset: Dataset, folder: BuildFolder, linked: list[Path]) -> list[str]:
    """Return where copies of purged slices, or of what is known about them, remain."""
    found = [f"{path} had another name, a hard link, which still has the pixels" for path in linked]
    if folder.path.is_dir():
        found.append(f"the working folder {folder.path} has the paths and headers of their files (`ich-prep clean`)")
    if old_tables(dataset):
        found.append(
            f"earlier generations in {dataset.path} have their labels and identifiers (`ich-prep clean --generations`)"
        )
    page = dataset.folder.absolute().with_name(f"{dataset.path.name}.report.html")
    if page.exists():
        found.append(f"{page} may show them: write it again with `ich-prep report`")
    marks = default_file(dataset.folder)
    if marks.exists():
        found.append(f"{marks} may have marks and notes about them")
    return [
        *found,
        "the tables of this generation keep their lines, with identifiers, labels and measurements",
        "the source files, copies and backups of the dataset, exported volumes and viewer pages, and what runs wrote about "
        "them (predictions, pictures) are not touched",
    ]
