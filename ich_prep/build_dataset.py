"""The whole build, top to bottom: list -> scan -> plan -> shards -> publish.

Each step leaves its result on disk before the next begins, so that a build that was killed resumes where it was.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset import native, open_dataset
from ich_prep.dataset.bucket_path import Place
from ich_prep.dataset.schema import OK, shard_path
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.storage import clear_leftovers, for_each, line_writer, place_of, size_of, sync_file, write_whole
from ich_prep.dataset.tables import give_back_memory, rows_of, sealed_parquet_bytes, write_sealed
from ich_prep.errors import CorruptionError, Reason
from ich_prep.execute import Pool, Tls, default_workers
from ich_prep.layouts import check_layout, choose_layout
from ich_prep.layouts.labels import LabelOptions, LabelRules
from ich_prep.progress import LoggedProgress, NoProgress, Progress
from ich_prep.sources import Listing, check_table_path, open_source, shown
from ich_prep.stages import ledger
from ich_prep.stages.checks import Allowances, check_any_slice, check_damage, check_labels, check_lost
from ich_prep.stages.forecast import BUILD_SMALLER, check_space, forecast
from ich_prep.stages.identifier_key import key_of_build, make_key, refuse_kept_columns
from ich_prep.stages.output import (
    build_lock,
    check_existing,
    check_output_folder,
    invalidate,
    os_errors_explained,
    output_lock,
    reset,
)
from ich_prep.stages.parts import ALL, Part
from ich_prep.stages.plan import Plan
from ich_prep.stages.pseudonyms import key_id, published_state
from ich_prep.stages.publish import collect_tables, publish
from ich_prep.stages.selection import check_filters
from ich_prep.stages.shard import ShardReport, write_shard
from ich_prep.stages.state import BuildFolder, State, build_folder, write_state
from ich_prep.stages.survey import (
    TASK_MODULES,
    Job,
    digest_listing,
    join_key,
    plan_files,
    read_headers,
    read_labels,
    settle_files,
    source_keys,
    start_or_resume,
)
from ich_prep.versions import all_versions

__all__ = ["Allowances", "Outcome", "Request", "build", "run"]

SYNC_THREADS = 4
SOURCES = "ich.sources"  # the metadata of the keys that lists the paths of the sources


@dataclass(frozen=True)
class Request:
    """What a build is asked to make, from what, and how; see ``build``."""

    src: str | Place | Sequence[str | Place]
    out: str | Place
    spec: Spec = field(default_factory=Spec)
    labels: str | Place | None = None
    label_options: LabelOptions = field(default_factory=LabelOptions)
    build_dir: str | Place | None = None
    key: str | Path | None = None
    endpoint: str | None = None
    atomic: bool = True
    workers: int | None = None
    scheduler: str | None = None
    tls: Tls | None = None
    overwrite: bool = False
    allow: Allowances = field(default_factory=Allowances)
    progress: Progress = field(default_factory=NoProgress)

    def sources(self) -> list[Place]:
        """Return where the sources are; raises ``UsageError``."""
        return [self.place(each, "--src") for each in ([self.src] if isinstance(self.src, str | Place) else self.src)]

    def places(self) -> list[Place]:
        """Return where the sources, the dataset and its working folder are; raises ``UsageError``."""
        out = self.place(self.out, "--out")
        return [*self.sources(), out, self.folder(out).path]

    def folder(self, out: Place) -> BuildFolder:
        """Return the working folder of the dataset ``out``; raises ``UsageError``."""
        return build_folder(out, self.build_dir, endpoint=self.endpoint, atomic=self.atomic)

    def place(self, given: str | Place, what: str) -> Place:
        """Return where ``given`` is, absolute, which ``what`` names in errors; raises ``UsageError``."""
        return place_of(given, what, endpoint=self.endpoint, atomic=self.atomic).absolute()


@dataclass(frozen=True)
class Outcome:
    """The result of a build: the counts of the published dataset, and whether there was nothing left to do."""

    counts: dict[str, int]
    already_finished: bool
    seconds: dict[str, float]


@dataclass(frozen=True)
class PlannedBuild:
    """A build that has a plan, in this process, which holds its locks; ``secret`` is the key of pseudonyms."""

    job: Job
    out: Place
    state: State
    secret: bytes | None


def build(
    src: str | Place | Sequence[str | Place],
    out: str | Place,
    spec: Spec | None = None,
    *,
    labels: str | Place | None = None,
    label_options: LabelOptions | None = None,
    build_dir: str | Place | None = None,
    key: str | Path | None = None,
    endpoint: str | None = None,
    atomic: bool = True,
    workers: int | None = None,
    scheduler: str | None = None,
    tls: Tls | None = None,
    overwrite: bool = False,
    allow: Allowances | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Build the dataset ``out`` from the DICOM files in ``src``, or resume an interrupted build.

    ``src`` is a folder or a zip archive, or several of them: then each path starts with the name of its folder or
    archive. ``labels`` is a label file instead of the one in the tree, ``label_options`` how to read it.
    ``build_dir`` is the working folder, which keeps what a resume needs (default: ``out`` with ``.build`` appended).
    Any of these may be a URL of a bucket, s3://bucket/folder or gs://bucket/folder, at ``endpoint`` (default: the one that
    the environment names). ``atomic=False`` writes to a store that ignores conditions: then only one build may run.
    ``key`` is the file with the key of pseudonyms (default: one in the working folder, made by the first build).
    ``workers`` are local processes (default: one per core; 0: all in this process), ``scheduler`` the address
    or scheduler file of a Dask cluster whose workers see all folders under the same paths, ``tls`` the files to reach it
    at ``tls://``. Raises ``SourceError``, ``BuildError`` or
    ``UsageError``; finished work is kept for the next run.
    """
    request = Request(
        src,
        out,
        spec or Spec(),
        labels=labels,
        label_options=label_options or LabelOptions(),
        build_dir=build_dir,
        key=key,
        endpoint=endpoint,
        atomic=atomic,
        workers=workers,
        scheduler=scheduler,
        tls=tls,
        overwrite=overwrite,
        allow=allow or Allowances(),
        progress=progress or NoProgress(),
    )
    return run(request)


def run(request: Request) -> Outcome:
    """Do what ``build`` does with these arguments."""
    seconds: dict[str, float] = {}
    with planned(request, seconds) as work:
        if work is None:
            finished = open_dataset(request.place(request.out, "--out"))
            return Outcome(finished.counts.model_dump(), already_finished=True, seconds=seconds)
        job, state = work.job, work.state
        assert state.plan is not None
        with timed(seconds, "shards"):
            write_shards(job.pool, work.out, job.folder, job.sources, state.plan, job.progress)
        with timed(seconds, "publish"):
            found = len(job.listing.files)
            counts = publish_shards(work.out, job.folder, state, found=found, secret=work.secret, allow=request.allow)
        job.progress.event("published", counts=counts, seconds=seconds)
    return Outcome(counts=counts, already_finished=False, seconds=seconds)


@contextmanager
def planned(request: Request, seconds: dict[str, float]) -> Iterator[PlannedBuild | None]:
    """List, scan and plan, as far as no earlier run has; yield the build while its locks are held.

    Yields None if its dataset is already finished. ``seconds`` gets what each stage took.
    """
    sources = request.sources()
    out = request.place(request.out, "--out")
    folder = request.folder(out)
    labels = None if request.labels is None else request.place(request.labels, "--labels")
    spec, allow, progress = request.spec, request.allow, request.progress
    count = default_workers() if request.workers is None else request.workers
    check_layout(spec)
    check_filters(spec)
    native.require()
    source = open_source(sources)
    if labels is not None:
        check_table_path(labels)
    check_output_folder(out, folder, sources, overwrite=request.overwrite)
    refuse_kept_columns(spec, request.label_options.keep, allowed=allow.kept_columns)
    key = None if request.key is None else Path(request.key)
    secret = key_of_build(out, folder, key, spec, overwrite=request.overwrite, say=progress.say)
    with Pool(workers=count, scheduler=request.scheduler, tls=request.tls, modules=TASK_MODULES) as pool:
        with timed(seconds, "list"):
            listing = source.list()
            layout, spec = choose_layout(spec, listing, progress)
            rules = LabelRules(spec.classes, allow.contradictions, allow.unlabelled, request.label_options)
            table = read_labels(layout, listing, labels, rules)
        state = State(spec=spec, sources=digest_listing(listing), labels=table.digest(), versions=all_versions())
        published = published_state(state, secret)
        if not request.overwrite and check_existing(out, folder, state, listing, published=published):
            yield None
            return
        with (
            os_errors_explained(out),
            build_lock(folder),
            output_lock(out, say=progress.say),
            line_writer(folder.log) as write,
            LoggedProgress(progress, write) as logged,
        ):
            job = Job(pool, folder, sources, listing, logged)
            if request.overwrite:
                invalidate(out, folder)
            if spec.identifiers == "pseudonymise":
                secret = secret or make_key(folder)
                state = state.model_copy(update={"key": key_id(secret)})
            state = start_or_resume(job, state, partial(reset, out, folder))
            logged.event("start", layout=spec.layout, files=len(listing.files), notes=table.notes)
            say_broken_archives(listing, logged)
            for note in table.notes:
                logged.say(f"Labels: {note}.")
            with timed(seconds, "start workers"):
                importlib.import_module("zarr")  # publishing needs it: loaded while the workers start
                pool.check_workers(*sources, out, folder.path, say=logged.say)
            if state.plan is None:
                with timed(seconds, "scan"):
                    scanned = read_headers(job)
                with timed(seconds, "plan"):
                    found = settle_files(job, scanned, spec)
                    del scanned
                    table = join_key(job, found, table, spec)
                    plan = plan_files(job, found, layout=layout, labels=table, spec=spec)
                    hint = "`ich-prep quarantine` lists them. Fix what can be fixed and run the same command again"
                    check_damage(plan.quarantine, len(plan.slices), allow, hint)
                    check_labels(plan, table, folder, allow, logged)
                    check_lost(plan.lost, allow, logged)
                    check_any_slice(plan)
                    state = write_plan(folder, state, plan)
                logged.event("planned", slices=len(plan.slices), quarantined=len(plan.quarantine))
                del found, plan  # one line per file: memory that writing shards does not need
            with timed(seconds, "keys"):
                write_keys(folder, listing, sources)
            with timed(seconds, "estimate"):
                say_forecast(job, out, spec, allow)
            yield PlannedBuild(job, out, state, secret)


# --- before the work -------------------------------------------------------------------------------------------------


def say_broken_archives(listing: Listing, progress: Progress) -> None:
    """Name each archive among the files that cannot be read: how many slices are lost with it is not known."""
    broken = listing.files.filter(pc.equal(listing.files["reason"], str(Reason.BAD_ARCHIVE)))
    for path, detail in zip(broken["path"].to_pylist(), broken["detail"].to_pylist(), strict=True):
        if path.lower().endswith(b".zip"):
            progress.say(f"Cannot read the archive {shown(path)}: {detail}. None of its files are in the dataset.")


def say_forecast(
    job: Job, out: Place, spec: Spec, allow: Allowances, *, first: int = 0, instead: str = BUILD_SMALLER
) -> None:
    """Say what the missing shards will take; raises ``BuildError`` if the disk is not expected to hold them.

    The plan's are numbered from ``first``; ``instead`` is what a message says of other ways.
    """
    found = forecast(job.pool, out, job.folder, job.sources, spec, first=first)
    if found is not None:
        job.progress.say(str(found))
        job.progress.event("estimate", **found.values())
        check_space(found, out, allowed=allow.full_disk, say=job.progress.say, instead=instead)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add to ``seconds`` what the block takes, as a ``stage``; memory that it freed is no longer this process's."""
    start = time.perf_counter()
    yield
    give_back_memory()
    seconds[stage] = time.perf_counter() - start


# --- the steps -------------------------------------------------------------------------------------------------------


def write_plan(folder: BuildFolder, state: State, plan: Plan) -> State:
    """Write the plan, one row group per shard, and the state that names its digest, last; return that state."""
    data = sealed_parquet_bytes(plan.slices, row_group_size=state.spec.slices_per_shard, write_statistics=False)
    write_whole(folder.plan, data)
    write_sealed(folder.series, plan.series)
    write_sealed(folder.lost, plan.lost)
    write_sealed(folder.quarantine, plan.quarantine)
    digest = hashlib.sha256(state.spec.model_dump_json().encode() + data).hexdigest()
    state = state.model_copy(update={"plan": digest})
    write_state(folder, state)
    return state


def write_keys(folder: BuildFolder, listing: Listing, sources: Sequence[Place]) -> None:
    """Write the source keys of the planned files, one row group per shard, and which ``sources`` they are keys of.

    They are not part of the plan: between two runs a folder may become an archive, or be repacked.
    """
    with rows_of(folder.plan) as plan:
        metadata = plan.metadata
        paths = plan.read(["path"])["path"]
    keys = pa.table({"key": source_keys(listing, paths)})
    keys = keys.replace_schema_metadata({SOURCES: json.dumps([str(path) for path in sources])})
    write_sealed(folder.keys, keys, row_group_size=metadata.row_group(0).num_rows, write_statistics=False)


def write_shards(
    pool: Pool,
    out: Place,
    folder: BuildFolder,
    sources: Sequence[Place],
    digest: str,
    progress: Progress,
    *,
    first: int = 0,
    part: Part = ALL,
) -> None:
    """Write every shard of ``part`` that is not done; the plan's are numbered from ``first``.

    A shard is recorded in the ledger when it is on disk. Threads of this process wait for that; the workers continue.
    """
    plan = rows_of(folder.plan).metadata
    sizes = {first + number: plan.row_group(number).num_rows for number in part.numbers(plan.num_row_groups)}
    recorded = sorted(ledger.done(folder.done) & sizes.keys())
    are_done = for_each(lambda number: is_done(out, folder, number, digest), recorded, at=out)
    done = {number for number, is_whole in zip(recorded, are_done, strict=True) if is_whole}
    for number in sizes:
        if number not in done:
            clear_leftovers(shard_path(out, number))
    progress.begin("Writing slices", sum(sizes.values()), "slices", sum(sizes[number] for number in done))
    task = partial(write_shard, out, folder, tuple(sources), digest)
    with ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="sync") as syncers:
        pending = deque[Future[None]]()
        for number, report in pool.map(task, [number for number in sizes if number not in done]):
            pending.append(syncers.submit(_sync_and_record, out, folder, number, report))
            progress.advance(len(report.rows), sum(row.status != OK for row in report.rows), number)
            while pending and pending[0].done():
                pending.popleft().result()
        for recording in pending:
            recording.result()
    progress.end()


def is_done(out: Place, folder: BuildFolder, number: int, digest: str) -> bool:
    """Return whether shard ``number`` is as this plan's entry records, and has no slice that a retry might fix."""
    report = intact_report(out, folder, number, digest)
    return report is not None and not any(
        Reason(status).is_transient for status in {row.status for row in report.rows} - {OK}
    )


def intact_report(out: Place, folder: BuildFolder, number: int, digest: str) -> ShardReport | None:
    """Return the ledger's entry of shard ``number`` if it is of the plan with this ``digest``, and the shard is there."""
    try:
        report = ShardReport.from_json(ledger.read(folder.done, number))
    except (OSError, ValueError, CorruptionError):
        return None
    return report if report.plan == digest and size_of(shard_path(out, number)) == report.bytes else None


def _sync_and_record(out: Place, folder: BuildFolder, number: int, report: ShardReport) -> None:
    """Wait until shard ``number`` is on disk, then record it in the ledger."""
    sync_file(shard_path(out, number), folders=3)
    ledger.record(folder.done, number, report.to_json())


def publish_shards(
    out: Place, folder: BuildFolder, state: State, *, found: int, secret: bytes | None, allow: Allowances
) -> dict[str, int]:
    """Publish the dataset, every shard of which has an entry in the ledger; return its counts.

    ``found`` is the number of files in the sources, ``secret`` the key of pseudonyms.
    """
    tables = collect_tables(out, folder, state)
    hint = (
        "`ich-prep quarantine` lists them. Run the same command again if the machine was at fault, and with "
        "--overwrite if files were fixed"
    )
    check_damage(tables.quarantine, tables.ok, allow, hint)
    return publish(out, folder, state=state, tables=tables, found=found, key=secret)
