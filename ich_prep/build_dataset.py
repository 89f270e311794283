"""The whole build, top to bottom: list -> scan -> plan -> shards -> publish.

Each step leaves its result on disk before the next begins, so that a build that was killed resumes where it was.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ich_prep.dataset import native, open_dataset
from ich_prep.dataset.schema import OK, shard_path
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.storage import clear_leftovers, local_path, size_of, sync_file, write_whole
from ich_prep.dataset.tables import parquet_bytes, read_parquet, write_table
from ich_prep.errors import Reason, SourceError, count
from ich_prep.execute import Pool, default_workers
from ich_prep.layouts import check_layout, choose_layout
from ich_prep.layouts.label_keys import choose_key
from ich_prep.layouts.labels import LabelOptions, LabelRules, fill_any
from ich_prep.progress import NoProgress, Progress
from ich_prep.sources import Listing, TableFile, check_table_path, local_table, open_source, shown
from ich_prep.stages import ledger
from ich_prep.stages.checks import Allowances, check_damage, check_labels, check_lost
from ich_prep.stages.copies import hash_images, sharing_uid
from ich_prep.stages.output import (
    build_lock,
    check_existing,
    check_output_folder,
    invalidate,
    os_errors_explained,
    output_lock,
    reset,
)
from ich_prep.stages.plan import Plan, make_plan
from ich_prep.stages.publish import collect_tables, publish
from ich_prep.stages.rules import apply_rules
from ich_prep.stages.scan import FILES_PER_BATCH, scan_batch
from ich_prep.stages.shard import ShardReport, write_shard
from ich_prep.stages.state import BuildFolder, State, build_folder, read_state, write_state
from ich_prep.stages.units import refuse_other_units
from ich_prep.versions import all_versions

__all__ = ["Allowances", "Outcome", "build"]

SYNC_THREADS = 4
# What tasks import, loaded while files are listed; pyarrow imports pandas when it first sees a Python list.
TASK_MODULES = ("ich_prep.stages.scan", "ich_prep.stages.shard", "ich_prep.stages.units", "pandas")


@dataclass(frozen=True)
class Outcome:
    """The result of a build: the counts of the published dataset, and whether there was nothing left to do."""

    counts: dict[str, int]
    already_finished: bool
    seconds: dict[str, float]


def build(
    src: str | Path | Sequence[str | Path],
    out: str | Path,
    spec: Spec | None = None,
    *,
    labels: str | Path | None = None,
    label_options: LabelOptions | None = None,
    build_dir: str | Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
    allow: Allowances | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Build the dataset ``out`` from the DICOM files in ``src``, or resume an interrupted build.

    ``src`` is a folder or a zip archive, or several of them: then each path starts with the name of its folder or archive.
    ``labels`` is a label file instead of the one in the tree, ``label_options`` how to read it. ``build_dir`` is the
    working folder, which keeps what a resume needs (default: ``out`` with ``.build`` appended). ``workers`` are local
    processes (default: one per core; 0: all in this process), ``scheduler`` the address of a Dask cluster whose workers
    see all folders under the same paths. Raises ``SourceError``, ``BuildError`` or ``UsageError``; finished work is kept
    for the next run.
    """
    paths = [src] if isinstance(src, str | Path) else src
    sources, out = [local_path(path, "--src").absolute() for path in paths], local_path(out, "--out").absolute()
    folder = build_folder(out, build_dir)
    spec, allow, progress = spec or Spec(), allow or Allowances(), progress or NoProgress()
    count = default_workers() if workers is None else workers
    seconds: dict[str, float] = {}
    check_layout(spec)
    native.require()
    source = open_source(sources)
    if labels is not None:
        check_table_path(local_path(labels, "--labels"))
    check_output_folder(out, folder, sources, overwrite=overwrite)
    with Pool(workers=count, scheduler=scheduler, modules=TASK_MODULES) as pool:
        with _timed(seconds, "list"):
            listing = source.list()
            layout, spec = choose_layout(spec, listing, progress)
            table = fill_any(
                layout.read_labels(
                    listing,
                    None if labels is None else label_file(labels, listing),
                    LabelRules(spec.classes, allow.contradictions, allow.unlabelled, label_options or LabelOptions()),
                )
            )
        state = State(spec=spec, sources=digest_listing(listing), labels=table.digest(), versions=all_versions())
        if not overwrite and check_existing(out, folder, state, listing):
            counts = open_dataset(out).counts.model_dump()
            return Outcome(counts=counts, already_finished=True, seconds=seconds)
        with os_errors_explained(out), build_lock(folder), output_lock(out):
            if overwrite:
                invalidate(out, folder)
            state = _start_or_resume(out, folder, state, listing)
            log = partial(_log, folder.log)
            log("start", layout=spec.layout, files=len(listing.files), notes=table.notes)
            say_broken_archives(listing, progress)
            for note in table.notes:
                progress.say(f"Labels: {note}.")
            with _timed(seconds, "start workers"):
                importlib.import_module("zarr")  # publishing needs it: loaded while the workers start
                pool.check_workers(*sources, out, folder.path, say=progress.say)
            if state.plan is None:
                with _timed(seconds, "scan"):
                    scanned = scan_files(pool, folder, sources, listing, progress)
                with _timed(seconds, "plan"):
                    scanned = apply_rules(scanned, spec)
                    scanned = refuse_other_units(
                        scanned, listing.files, folder=folder, sources=sources, run=pool.map, spec=spec
                    )
                    table = choose_key(table, scanned, own_patients=spec.patients == "column")
                    for note in table.notes:
                        progress.say(f"Labels: {note}.")
                    plan = make_plan(
                        scanned,
                        assignment=layout.assign(scanned, listing.name),
                        labels=table,
                        spec=spec,
                        image=hash_copies(pool, folder, sources, scanned, listing),
                    )
                    for note in plan.notes:
                        progress.say(f"{note}.")
                    write_table(folder.quarantine, plan.quarantine)
                    hint = "`ich-prep quarantine` lists them. Fix what can be fixed and run the same command again"
                    check_damage(plan.quarantine, len(plan.slices), allow, hint)
                    check_labels(plan, table, folder, allow, progress)
                    check_lost(plan.lost, allow, progress)
                    state = write_plan(folder, state, plan)
                log("planned", slices=len(plan.slices), quarantined=len(plan.quarantine))
                del scanned, plan  # one line per file: memory that writing shards does not need
            assert state.plan is not None
            with _timed(seconds, "shards"):
                write_keys(folder, listing)
                write_shards(pool, out, folder, sources, state.plan, progress)
            with _timed(seconds, "publish"):
                tables = collect_tables(out, folder, state)
                hint = (
                    "`ich-prep quarantine` lists them. Run the same command again if the machine was at fault, and with "
                    "--overwrite if files were fixed"
                )
                check_damage(tables.quarantine, tables.ok, allow, hint)
                counts = publish(out, folder, state=state, tables=tables, found=len(listing.files))
            log("published", **counts)
    return Outcome(counts=counts, already_finished=False, seconds=seconds)


# --- before the work -------------------------------------------------------------------------------------------------


def label_file(given: str | Path, listing: Listing) -> TableFile:
    """Return the label file ``given``: one of the source, as messages name it (also inside an archive), or any other."""
    inside = (table for table in listing.tables if Path(table.path) == Path(given).absolute())
    return next(inside, None) or local_table(Path(given))


def say_broken_archives(listing: Listing, progress: Progress) -> None:
    """Name each archive among the files that cannot be read: how many slices are lost with it is not known."""
    broken = listing.files.filter(pc.equal(listing.files["reason"], str(Reason.BAD_ARCHIVE)))
    for path, detail in zip(broken["path"].to_pylist(), broken["detail"].to_pylist(), strict=True):
        if path.lower().endswith(b".zip"):
            progress.say(f"Cannot read the archive {shown(path)}: {detail}. None of its files are in the dataset.")


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


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _log(path: Path, event: str, **values: object) -> None:
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **values}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


# --- the steps -------------------------------------------------------------------------------------------------------


def _start_or_resume(out: Path, folder: BuildFolder, state: State, listing: Listing) -> State:
    """Return the state of a build in progress, or start one: the listing first, the state that names it last.

    A build without a plan takes the current spec, files and labels, and keeps the headers of unchanged files.
    """
    if folder.state.exists():
        before = read_state(folder)
        if before.plan is not None or before == state:
            return before
        drop_stale_headers(folder, listing, drop_all=before.versions != state.versions)
    else:
        reset(out, folder)
    write_whole(folder.files, parquet_bytes(listing.files, row_group_size=FILES_PER_BATCH))
    write_state(folder, state)
    return state


def drop_stale_headers(folder: BuildFolder, listing: Listing, *, drop_all: bool) -> None:
    """Delete the headers of each batch whose files changed, or of every batch."""
    before = read_parquet(folder.files)
    for batch in ledger.done(folder.scan, suffix=".parquet"):
        start = batch * FILES_PER_BATCH
        old, new = (files.slice(start, FILES_PER_BATCH) for files in (before, listing.files))
        if drop_all or not old.equals(new):
            folder.batch(batch).unlink()


def scan_files(
    pool: Pool, folder: BuildFolder, sources: Sequence[Path], listing: Listing, progress: Progress
) -> pa.Table:
    """Return the headers of all files, in the order of the listing; read those that no earlier run has read.

    Batches in which an earlier run found damage are read again: it may have been fixed.
    """
    batches = range(-(-len(listing.files) // FILES_PER_BATCH))
    done = {
        batch
        for batch in ledger.done(folder.scan, suffix=".parquet")
        if not _any_damage(read_parquet(folder.batch(batch), ["reason"])["reason"])
    }
    already = sum(min(FILES_PER_BATCH, len(listing.files) - batch * FILES_PER_BATCH) for batch in done)
    progress.begin("Reading headers", len(listing.files), "files", already)
    task = partial(scan_batch, str(folder.path), tuple(map(str, sources)))
    for _, (slices, quarantined) in pool.map(task, [batch for batch in batches if batch not in done]):
        progress.advance(slices + quarantined, quarantined)
    progress.end()
    return pa.concat_tables([read_parquet(folder.batch(batch)) for batch in batches])


def _any_damage(reasons: pa.ChunkedArray) -> bool:
    return any(Reason(reason).is_damage for reason in reasons.unique().to_pylist() if reason is not None)


def hash_copies(
    pool: Pool,
    folder: BuildFolder,
    sources: Sequence[Path],
    scanned: pa.Table,
    listing: Listing,
    *,
    known: pa.ChunkedArray | None = None,
) -> pa.Array:
    """Return the image hash of each line of ``scanned`` whose SOP Instance UID another slice has, null for all others.

    ``known`` are UIDs of further slices, those that a dataset has already.
    """
    accepted = np.flatnonzero(pc.is_null(scanned["reason"]).to_numpy())
    slices = scanned.select(["sop_instance_uid"]).take(pa.array(accepted))
    lines = sharing_uid(slices)
    if known is not None:
        lines = np.union1d(lines, np.flatnonzero(pc.is_in(slices["sop_instance_uid"], value_set=known).to_numpy()))
    lines = accepted[lines]
    if not len(lines):
        return pa.nulls(len(scanned), pa.string())
    slices = scanned.take(pa.array(lines))
    keys = source_keys(listing, slices["path"]).to_pylist()
    hashes = hash_images(slices, keys, folder=folder, sources=sources, map_tasks=pool.map)
    at = np.full(len(scanned), -1)
    at[lines] = np.arange(len(lines))
    return hashes.take(pa.array(at, pa.int64(), mask=at < 0))


def source_keys(listing: Listing, paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the source keys (binary) of the files with ``paths`` (string)."""
    readable = listing.files.filter(pc.is_null(listing.files["reason"]))
    return readable["key"].take(pc.index_in(paths.cast(pa.binary()), value_set=readable["path"]))


def write_plan(folder: BuildFolder, state: State, plan: Plan) -> State:
    """Write the plan, one row group per shard, and the state that names its digest, last; return that state."""
    if not len(plan.slices):
        counts = Counter(plan.quarantine["reason"].to_pylist())
        raise SourceError(
            f"No CT slices: {count(len(plan.quarantine), 'file')} quarantined: "
            f"{', '.join(f'{count} {reason}' for reason, count in counts.most_common())}. Point --src at axial CT."
        )
    data = parquet_bytes(plan.slices, row_group_size=state.spec.slices_per_shard, write_statistics=False)
    write_whole(folder.plan, data)
    write_table(folder.series, plan.series)
    write_table(folder.lost, plan.lost)
    digest = hashlib.sha256(state.spec.model_dump_json().encode() + data).hexdigest()
    state = state.model_copy(update={"plan": digest})
    write_state(folder, state)
    return state


def write_keys(folder: BuildFolder, listing: Listing) -> None:
    """Write the source keys of the planned files, one row group per shard.

    They are not part of the plan: between two runs a folder may become an archive, or be repacked.
    """
    with pq.ParquetFile(folder.plan) as plan:
        metadata = plan.metadata
        paths = plan.read(["path"])["path"]
    keys = pa.table({"key": source_keys(listing, paths)})
    data = parquet_bytes(keys, row_group_size=metadata.row_group(0).num_rows, write_statistics=False)
    write_whole(folder.keys, data)


def write_shards(
    pool: Pool,
    out: Path,
    folder: BuildFolder,
    sources: Sequence[Path],
    digest: str,
    progress: Progress,
    *,
    first: int = 0,
) -> None:
    """Write every shard that is not done; the plan's are numbered from ``first``.

    A shard is recorded in the ledger when it is on disk. Threads of this process wait for that; the workers continue.
    """
    plan = pq.ParquetFile(folder.plan).metadata
    sizes = {first + number: plan.row_group(number).num_rows for number in range(plan.num_row_groups)}
    done = {number for number in ledger.done(folder.done) if _is_done(out, folder, number, digest)}
    for number in sizes:
        if number not in done:
            clear_leftovers(shard_path(out, number))
    progress.begin("Writing slices", plan.num_rows, "slices", sum(sizes[number] for number in done))
    task = partial(write_shard, str(out), str(folder.path), tuple(map(str, sources)), digest)
    with ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="sync") as syncers:
        pending = deque[Future[None]]()
        for number, report in pool.map(task, [number for number in sizes if number not in done]):
            pending.append(syncers.submit(_sync_and_record, out, folder, number, report))
            progress.advance(len(report.rows), sum(row.status != OK for row in report.rows))
            while pending and pending[0].done():
                pending.popleft().result()
        for recording in pending:
            recording.result()
    progress.end()


def _is_done(out: Path, folder: BuildFolder, number: int, digest: str) -> bool:
    """Return whether shard ``number`` is as this plan's entry records, and has no slice that a retry might fix."""
    report = ShardReport.from_json(ledger.read(folder.done, number))
    statuses = {row.status for row in report.rows} - {OK}
    intact = report.plan == digest and size_of(shard_path(out, number)) == report.bytes
    return intact and not any(Reason(status).is_transient for status in statuses)


def _sync_and_record(out: Path, folder: BuildFolder, number: int, report: ShardReport) -> None:
    """Wait until shard ``number`` is on disk, then record it in the ledger."""
    sync_file(shard_path(out, number), folders=3)
    ledger.record(folder.done, number, report.to_json())
