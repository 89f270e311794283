"""From the files of the sources to a plan: what a build and a dry run do alike, before any shard is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.storage import for_each
from ich_prep.dataset.tables import read_sealed, write_sealed
from ich_prep.errors import CorruptionError, Reason
from ich_prep.layouts.label_keys import choose_key
from ich_prep.layouts.labels import fill_any
from ich_prep.sources import Listing, TableFile, table_at
from ich_prep.stages import ledger
from ich_prep.stages.copies import hash_images, sharing_uid
from ich_prep.stages.plan import Plan, make_plan
from ich_prep.stages.rules import apply_rules
from ich_prep.stages.scan import FILES_PER_BATCH, scan_batch
from ich_prep.stages.state import (
    BuildFolder,
    State,
    drop_damaged_headers,
    plan_is_whole,
    read_state,
    write_state,
)
from ich_prep.stages.units import refuse_other_units

if TYPE_CHECKING:
    from ich_prep.dataset.bucket_path import Place
    from ich_prep.dataset.spec import Spec
    from ich_prep.execute import Pool
    from ich_prep.layouts import Layout
    from ich_prep.layouts.labels import LabelRules, LabelTable
    from ich_prep.progress import Progress

# What tasks import, loaded while files are listed; pyarrow imports pandas when it first sees a Python list.
TASK_MODULES = ("ich_prep.stages.scan", "ich_prep.stages.shard", "ich_prep.stages.units", "pandas")
BATCHES_TOGETHER = 64


@dataclass(frozen=True)
class Job:
    """What every step needs: the workers, the working folder, the paths of the sources, and their listing."""

    pool: Pool
    folder: BuildFolder
    sources: Sequence[Place]
    listing: Listing
    progress: Progress


def read_labels(layout: Layout, listing: Listing, given: Place | None, rules: LabelRules) -> LabelTable:
    """Return the labels of the file ``given``, or of the one in the source; raises as ``Layout.read_labels``."""
    file = None if given is None else _label_file(given, listing)
    return fill_any(layout.read_labels(listing, file, rules))


def _label_file(given: Place, listing: Listing) -> TableFile:
    """Return the label file ``given``: one of the source, as messages name it (also inside an archive), or any other."""
    inside = (table for table in listing.tables if table.path == str(given.absolute()))
    return next(inside, None) or table_at(given)


def digest_listing(listing: Listing) -> str:
    """Return a digest of the paths, sizes and problems of the files: the same for a folder and for an archive of it."""
    digest = hashlib.sha256()
    files = listing.files
    for path, size in zip(files["path"].to_pylist(), files["size"].to_pylist(), strict=True):
        digest.update(b"%d %d " % (len(path), size) + path)
    unreadable = files.filter(pc.is_valid(files["reason"]))
    for path, reason in zip(unreadable["path"].to_pylist(), unreadable["reason"].to_pylist(), strict=True):
        digest.update(b"%s %d " % (reason.encode(), len(path)) + path)
    return digest.hexdigest()


def start_or_resume(job: Job, state: State, make_new: Callable[[], None]) -> State:
    """Return the state of the work in progress, or start it: the listing first, the state that names it last.

    ``make_new`` empties the folder of new work. Work without a plan takes the current spec, files and labels, and keeps
    the headers of unchanged files. Work whose plan is damaged is planned again, from headers that are not; equal plans keep
    the shards that are written.
    """
    folder = job.folder
    if folder.state.exists():
        before = read_state(folder)
        for path in (folder.scan, folder.done):
            path.mkdir(exist_ok=True)  # after a power cut, their names may be missing
        if before.plan is not None and plan_is_whole(folder):
            return before
        drop_damaged_headers(folder)
        if before.sources != state.sources or before.versions != state.versions:
            _drop_stale_headers(folder, job.listing, drop_all=before.versions != state.versions)
    else:
        make_new()
    write_sealed(folder.files, job.listing.files, row_group_size=FILES_PER_BATCH)
    write_state(folder, state)
    return state


def _drop_stale_headers(folder: BuildFolder, listing: Listing, *, drop_all: bool) -> None:
    """Delete the headers of each batch whose files changed, or of every batch."""
    try:
        before = read_sealed(folder.files)
    except (OSError, CorruptionError):
        before, drop_all = listing.files, True
    for batch in ledger.done(folder.scan, suffix=".parquet"):
        start = batch * FILES_PER_BATCH
        old, new = (files.slice(start, FILES_PER_BATCH) for files in (before, listing.files))
        if drop_all or not old.equals(new):
            folder.batch(batch).unlink()


def read_headers(job: Job) -> pa.Table:
    """Return the headers of all files, in the order of the listing; read those that no earlier run has read.

    Batches in which an earlier run found damage are read again: it may have been fixed. The quarantine of an earlier plan
    is removed: until there is a new one, the headers say what is quarantined.
    """
    folder, files, progress = job.folder, len(job.listing.files), job.progress
    folder.quarantine.unlink(missing_ok=True)
    batches = range(-(-files // FILES_PER_BATCH))
    written = sorted(ledger.done(folder.scan, suffix=".parquet"))
    damaged = for_each(
        lambda batch: _any_damage(read_sealed(folder.batch(batch), ["reason"])["reason"]), written, at=folder.path
    )
    done = {batch for batch, any_damage in zip(written, damaged, strict=True) if not any_damage}
    already = sum(min(FILES_PER_BATCH, files - batch * FILES_PER_BATCH) for batch in done)
    progress.begin("Reading headers", files, "files", already)
    task = partial(scan_batch, folder, tuple(job.sources))
    for batch, (slices, quarantined) in job.pool.map(task, [batch for batch in batches if batch not in done]):
        progress.advance(slices + quarantined, quarantined, batch)
    progress.end()
    together = (batches[start : start + BATCHES_TOGETHER] for start in range(0, len(batches), BATCHES_TOGETHER))
    return pa.concat_tables([_joined(folder, some) for some in together])


def _joined(folder: BuildFolder, batches: range) -> pa.Table:
    """Return the headers in these ``batches`` in one piece: a buffer for each column of each batch takes more memory."""
    tables = for_each(lambda batch: read_sealed(folder.batch(batch)), batches, at=folder.path)
    return pa.concat_tables(tables).combine_chunks()


def _any_damage(reasons: pa.ChunkedArray) -> bool:
    return any(Reason(reason).is_damage for reason in reasons.unique().to_pylist() if reason is not None)


@dataclass
class Candidates:
    """The files with the reasons that need no labels: ``scanned`` (``scan.SCHEMA``), and ``image``, hashes of copies."""

    scanned: pa.Table
    image: pa.Array

    def taken(self) -> pa.Table:
        """Return ``scanned``, and keep no line of it: who takes it decides how long so much memory is used."""
        scanned, self.scanned = self.scanned, self.scanned.schema.empty_table()
        return scanned


def settle_files(job: Job, scanned: pa.Table, spec: Spec, known: pa.Array | None = None) -> Candidates:
    """Return ``scanned`` after the rules of the build, and the image hashes of slices that share a SOP Instance UID.

    ``known`` are the UIDs of further slices: those of the dataset that files are added to.
    """
    scanned = apply_rules(scanned, spec)
    scanned = refuse_other_units(
        scanned, job.listing.files, folder=job.folder, sources=job.sources, run=job.pool.map, spec=spec
    )
    return Candidates(scanned, _hash_copies(job, scanned, known))


def plan_files(
    job: Job, found: Candidates, *, layout: Layout, labels: LabelTable, spec: Spec, known: pa.Table | None = None
) -> Plan:
    """Return the plan, with ``labels`` from ``join_key``; write the quarantine so far; raises as ``make_plan``.

    The files are ``taken`` from ``found``.
    """
    assignment = layout.assign(found.scanned, job.listing.name)
    plan = make_plan(
        found.taken(),
        assignment=assignment,
        labels=labels,
        spec=spec,
        image=found.image,
        known=known,
    )
    for note in plan.notes:
        job.progress.say(f"{note}.")
    write_sealed(job.folder.quarantine, plan.quarantine)
    return plan


def join_key(job: Job, found: Candidates, labels: LabelTable, spec: Spec) -> LabelTable:
    """Return ``labels`` by the key that matches the files; say why. Raises as ``choose_key``."""
    labels = choose_key(labels, found.scanned, own_patients=spec.patients == "column")
    for note in labels.notes:
        job.progress.say(f"Labels: {note}.")
    return labels


def _hash_copies(job: Job, scanned: pa.Table, known: pa.Array | None) -> pa.Array:
    """Return the image hash of each line of ``scanned`` whose SOP Instance UID another slice has, null for all others."""
    accepted = np.flatnonzero(pc.is_null(scanned["reason"]).to_numpy())
    slices = scanned.select(["sop_instance_uid"]).take(pa.array(accepted))
    shared = sharing_uid(slices)
    if known is not None:
        there = pc.is_in(slices["sop_instance_uid"], value_set=known).to_numpy()
        shared = np.union1d(shared, np.flatnonzero(there))
    lines = accepted[shared]
    if not len(lines):
        return pa.nulls(len(scanned), pa.string())
    slices = scanned.take(pa.array(lines))
    keys = source_keys(job.listing, slices["path"]).to_pylist()
    hashes = hash_images(slices, keys, folder=job.folder, sources=job.sources, map_tasks=job.pool.map)
    at = np.full(len(scanned), -1)
    at[lines] = np.arange(len(lines))
    return hashes.take(pa.array(at, pa.int64(), mask=at < 0))


def source_keys(listing: Listing, paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the source keys (binary) of the files with ``paths`` (string)."""
    readable = listing.files.filter(pc.is_null(listing.files["reason"]))
    return readable["key"].take(pc.index_in(paths.cast(pa.binary()), value_set=readable["path"]))
