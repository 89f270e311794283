"""A build as far as its plan, without labels if need be: the volumes, conflicts, what would leave, and a cost estimate.

Nothing is written but the working folder. The steps are those of a build (``stages.survey``).
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset import native
from ich_prep.dataset.bucket_path import Place
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.storage import place_of, size_of
from ich_prep.dataset.tables import with_columns
from ich_prep.errors import BuildError, Reason, SourceError, UsageError
from ich_prep.execute import Pool, Tls, default_workers
from ich_prep.layouts import Layout, check_layout, choose_layout
from ich_prep.layouts.labels import LabelOptions, LabelRules, LabelTable, no_labels
from ich_prep.progress import NoProgress, Progress
from ich_prep.sources import Listing, check_table_path, open_source
from ich_prep.stages import ledger
from ich_prep.stages.checks import Allowances, check_any_slice, check_damage, check_labels, check_lost
from ich_prep.stages.output import build_lock, check_working_folder, reset_folder
from ich_prep.stages.plan import Plan
from ich_prep.stages.publish import series_flags
from ich_prep.stages.sample import Sample, measure, sampled_rows
from ich_prep.stages.scan import FILES_PER_BATCH
from ich_prep.stages.selection import check_filters
from ich_prep.stages.state import BuildFolder, State
from ich_prep.stages.survey import (
    TASK_MODULES,
    Candidates,
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

# Flags of slices whose identity or place contradicts that of others.
CONFLICTS = ("patient_conflict", "series_uid_shared", "sop_uid_shared", "duplicate_position")


@dataclass(frozen=True)
class Conflict:
    """A conflict: the flag or quarantine reason, the slices and volumes that have it (None: not planned), one path."""

    name: str
    slices: int
    volumes: int | None
    path: str


@dataclass(frozen=True)
class Estimate:
    """What a build of the plan would take on this machine with ``processes``, extrapolated from a sample.

    ``dataset_bytes`` and ``slice_seconds`` are None if no slice of the sample decoded; ``header_seconds`` if an earlier
    run read the headers. ``source_bytes`` are the files to be read whole, ``folder_bytes`` the working folder so far.
    """

    processes: int
    sample: Sample
    dataset_bytes: int | None
    uncompressed_bytes: int
    source_bytes: int
    folder_bytes: int
    header_seconds: float | None
    slice_seconds: float | None


@dataclass(frozen=True)
class DryRun:
    """What a build of ``sources`` would do, as far as headers tell.

    ``volumes`` has the columns of the series table; ``slices`` those of the plan, and ``header_...``, the identifiers as
    the header states them; ``quarantine`` (``QUARANTINE_SCHEMA``) what would leave. ``labels`` is the table that was read,
    if any. ``stops`` are the messages with which a build would end.
    """

    sources: tuple[Place, ...]
    spec: Spec
    files: int
    volumes: pa.Table
    slices: pa.Table
    quarantine: pa.Table
    labels: LabelTable
    notes: tuple[str, ...]
    stops: tuple[str, ...]
    estimate: Estimate

    def conflicts(self) -> list[Conflict]:
        """Return the conflicts between files, in the order of ``CONFLICTS``, then those that leave."""
        found = [conflict for name in CONFLICTS if (conflict := self._flagged(name)) is not None]
        leaving = self.quarantine.filter(pc.equal(self.quarantine["reason"], str(Reason.SOP_CONFLICT)))
        if len(leaving):
            found.append(Conflict(str(Reason.SOP_CONFLICT), len(leaving), None, pc.min(leaving["path"]).as_py()))
        return found

    def flags(self) -> dict[str, int]:
        """Return the number of slices by flag, the most frequent first."""
        counted = pc.value_counts(pc.list_flatten(self.slices["flags"])).to_pylist()
        return {
            line["values"]: line["counts"] for line in sorted(counted, key=lambda one: (-one["counts"], one["values"]))
        }

    def _flagged(self, name: str) -> Conflict | None:
        lists = self.slices["flags"].combine_chunks()
        rows = pc.unique(pc.list_parent_indices(lists).filter(pc.equal(lists.flatten(), name)))
        if not len(rows):
            return None
        slices = self.slices.take(rows)
        return Conflict(name, len(slices), len(pc.unique(slices["series_row"])), pc.min(slices["path"]).as_py())


def dry_run(
    src: str | Place | Sequence[str | Place],
    spec: Spec | None = None,
    *,
    labels: str | Place | None = None,
    label_options: LabelOptions | None = None,
    build_dir: str | Place | None = None,
    endpoint: str | None = None,
    atomic: bool = True,
    workers: int | None = None,
    scheduler: str | None = None,
    tls: Tls | None = None,
    allow: Allowances | None = None,
    check: Callable[[Spec], None] | None = None,
    progress: Progress | None = None,
) -> DryRun:
    """Return what ``build`` would do with these arguments, as far as headers and a few slices tell.

    Labels are taken into account if ``labels`` names a table or the source has one. ``build_dir`` is a working folder
    that keeps the headers for a later build, else they go to a temporary folder. ``check`` is called with the spec once
    the layout is known, before headers are read. Raises ``SourceError``, ``BuildError`` or
    ``UsageError``; what would end a build after the headers are read is in ``stops`` instead.
    """
    paths = [src] if isinstance(src, str | Place) else src
    at = partial(place_of, endpoint=endpoint, atomic=atomic)
    sources = tuple(at(path, "--src").absolute() for path in paths)
    file = None if labels is None else at(labels, "--labels")
    kept = None if build_dir is None else BuildFolder(at(build_dir, "--build-dir").absolute())
    spec, allow, progress = spec or Spec(), allow or Allowances(), progress or NoProgress()
    check_layout(spec)
    check_filters(spec)
    native.require()
    source = open_source(sources)
    if file is not None:
        check_table_path(file)
    processes = default_workers() if workers is None else workers
    with (
        _working_folder(kept, sources, shared=scheduler is not None) as folder,
        Pool(workers=processes, scheduler=scheduler, tls=tls, modules=TASK_MODULES) as pool,
    ):
        listing = source.list()
        layout, spec = choose_layout(spec, listing, progress)
        if check is not None:
            check(spec)
        rules = LabelRules(spec.classes, allow.contradictions, True, label_options or LabelOptions())
        table, stops = _labels(layout, listing, file, rules)
        job = Job(pool, folder, sources, listing, progress)
        state = State(spec=spec, sources=digest_listing(listing), labels=table.digest(), versions=all_versions())
        with build_lock(folder):
            start_or_resume(job, state, partial(reset_folder, folder))
            pool.check_workers(*sources, folder.path, say=progress.say)
            start = time.perf_counter()
            unread = len(listing.files) - _already_read(folder, listing)
            scanned = read_headers(job)
            header_seconds = (time.perf_counter() - start) * len(listing.files) / unread if unread else None
            found = settle_files(job, scanned, spec)
            table, plan, more = _plan(job, found, layout, table, spec)
            stops += [*more, *_stops(plan, table, kept, allow, progress)]
            rows = sampled_rows(len(plan.slices))
            chosen = plan.slices.take(pa.array(rows, pa.int64()))
            sample = measure(chosen, source_keys(listing, chosen["path"]).to_pylist(), sources, spec)
            slices = _with_headers(plan.slices, scanned)
            estimate = _estimate(slices, sample, folder, spec, max(1, pool.wait_until_started()), header_seconds)
    return DryRun(
        sources=sources,
        spec=spec,
        files=len(listing.files),
        volumes=_volumes(plan),
        slices=slices,
        quarantine=plan.quarantine,
        labels=table,
        notes=(*(f"Labels: {note}" for note in table.notes), *plan.notes),
        stops=tuple(stops),
        estimate=estimate,
    )


@contextlib.contextmanager
def _working_folder(given: BuildFolder | None, sources: Sequence[Place], *, shared: bool) -> Iterator[BuildFolder]:
    """Yield the folder ``given``, which is kept, or a temporary one."""
    if given is not None:
        check_working_folder(given, sources)
        yield given
        return
    if shared:
        raise UsageError("The workers of --scheduler need a folder that all of them see: name one with --build-dir.")
    place = Path(tempfile.gettempdir()).resolve()
    if any(source.resolve() in (place, *place.parents) for source in sources):
        raise UsageError(
            f"The folder for temporary files {place} lies inside the source. Name a working folder elsewhere with "
            "--build-dir."
        )
    with tempfile.TemporaryDirectory(prefix="ich-prep-scan-") as temporary:
        yield BuildFolder(Path(temporary) / "headers.build")


def _labels(layout: Layout, listing: Listing, given: Place | None, rules: LabelRules) -> tuple[LabelTable, list[str]]:
    """Return the labels and no message, or no labels and the message with which a build would end."""
    try:
        return read_labels(layout, listing, given, rules), []
    except SourceError as error:
        if given is not None:
            raise
        return no_labels(rules.classes), [str(error)]


def _already_read(folder: BuildFolder, listing: Listing) -> int:
    """Return how many files' headers an earlier run left in ``folder``."""
    batches = ledger.done(folder.scan, suffix=".parquet")
    return sum(min(FILES_PER_BATCH, len(listing.files) - number * FILES_PER_BATCH) for number in batches)


def _plan(
    job: Job, found: Candidates, layout: Layout, labels: LabelTable, spec: Spec
) -> tuple[LabelTable, Plan, list[str]]:
    """Return the labels joined, the plan, and the messages of a build that cannot join them or make it.

    The plan is then one without the labels, or without links between volumes.
    """
    stops: list[str] = []
    try:
        labels = join_key(job, found, labels, spec)
    except SourceError as error:
        stops.append(str(error))
        labels = no_labels(spec.classes)
    try:
        return labels, plan_files(job, replace(found), layout=layout, labels=labels, spec=spec), stops
    except BuildError as error:
        stops.append(str(error))
    unlinked = spec.model_copy(update={"link": (), "split_groups": True, "folds": 2})
    bare = replace(labels, subset=None, fold=None)
    plan = plan_files(job, found, layout=layout, labels=bare, spec=unlinked)
    return labels, replace(plan, series=_without_folds(plan.series)), stops


def _without_folds(series: pa.Table) -> pa.Table:
    return with_columns(series, {name: [None] * len(series) for name in ("fold", "fold_group")})


def _stops(
    plan: Plan, labels: LabelTable, folder: BuildFolder | None, allow: Allowances, progress: Progress
) -> list[str]:
    """Return the messages with which a build would end at its checks; without labels, those of labels do not apply."""
    checks = [partial(check_damage, plan.quarantine, len(plan.slices), allow, "Fix what can be fixed")]
    if len(labels.keys):
        checks.append(partial(check_labels, plan, labels, folder, allow, progress))
        checks.append(partial(check_lost, plan.lost, allow, progress))
    checks.append(partial(check_any_slice, plan))
    stops = []
    for check in checks:
        try:
            check()
        except (BuildError, SourceError) as error:
            stops.append(str(error))
    return stops


def _volumes(plan: Plan) -> pa.Table:
    """Return the series table of the plan with the flags of its slices; how many slices decode is not known."""
    series = plan.series
    return with_columns(series, {"flags": series_flags(series, plan.slices), "n_ok": [None] * len(series)})


def _with_headers(slices: pa.Table, scanned: pa.Table) -> pa.Table:
    """Return the slices with what their headers state: the keys that a label table may have, and the file's size."""
    accepted = scanned.filter(pc.is_null(scanned["reason"]))
    lines = accepted.take(pc.index_in(slices["path"], value_set=accepted["path"].combine_chunks()))
    for name in ("patient_id", "accession_number", "file_size"):
        slices = slices.append_column(f"header_{name}", lines[name])
    return slices


def _estimate(
    slices: pa.Table, sample: Sample, folder: BuildFolder, spec: Spec, processes: int, header_seconds: float | None
) -> Estimate:
    count = len(slices)
    return Estimate(
        processes=processes,
        sample=sample,
        dataset_bytes=None if sample.bytes is None else round(sample.bytes * count),
        uncompressed_bytes=count * spec.channels * spec.size**2 * spec.dtype.itemsize,
        source_bytes=pc.sum(slices["header_file_size"]).as_py() or 0,
        folder_bytes=sum(size_of(path) or 0 for path in folder.own_files()),
        header_seconds=header_seconds,
        slice_seconds=None if sample.seconds is None else sample.seconds * count / processes,
    )
