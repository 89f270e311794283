"""A build in three commands, for job arrays without Dask: plan, shards in parts, publish; byte for byte as ``build``.

All that the commands share is in the working folder. The shards of a build may be written in any number of parts, at the
same time on several hosts with one shared file system; any command may be killed and run again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from ich_prep.build_dataset import (
    SOURCES,
    Outcome,
    Request,
    intact_report,
    planned,
    publish_shards,
    timed,
    write_shards,
)
from ich_prep.dataset import native, open_dataset
from ich_prep.dataset.bucket_path import BucketPath, Place
from ich_prep.dataset.schema import ROOT
from ich_prep.dataset.storage import line_writer, local_path
from ich_prep.dataset.tables import read_sealed
from ich_prep.errors import BuildError, CorruptionError, SourceError, UsageError, count
from ich_prep.execute import Pool, default_workers
from ich_prep.progress import LoggedProgress, NoProgress, Progress
from ich_prep.sources import open_source
from ich_prep.stages.checks import Allowances
from ich_prep.stages.identifier_key import find_key
from ich_prep.stages.output import build_lock, os_errors_explained, output_lock
from ich_prep.stages.parts import ALL, Part, log_of, part_lock
from ich_prep.stages.state import BuildFolder, State, build_folder, plan_is_whole, read_state
from ich_prep.stages.survey import TASK_MODULES
from ich_prep.versions import all_versions

_AGAIN = "Run `ich-prep plan` with the options of the build again"


@dataclass(frozen=True)
class ShardCounts:
    """How many ``slices`` and ``shards`` a plan has, or a part of it, and how many of the shards are ``written``."""

    slices: int
    shards: int
    written: int


def plan_build(request: Request) -> ShardCounts:
    """Do what ``build`` does, as far as the plan, and leave the shards to ``write_part``; raises the same errors.

    Places in buckets are refused: parts share a file system.
    """
    for place in request.places():
        if isinstance(place, BucketPath):
            raise UsageError(
                f"{place} is in a bucket; the parts of a build share a file system. `ich-prep build` reads from buckets and "
                "writes to them."
            )
    with planned(request, {}) as work:
        if work is None:
            whole = open_dataset(request.place(request.out, "The dataset")).counts
            return ShardCounts(whole.planned, whole.shards, whole.shards)
        counts = _count(work.out, work.job.folder, work.state)
        work.job.progress.event("end", shards=counts.shards)
    return counts


def write_part(
    out: str | Path,
    part: Part = ALL,
    *,
    build_dir: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ShardCounts:
    """Write the shards of ``part`` that are missing from the planned build of ``out``; return the counts of the part.

    Processes on several hosts may write different parts at the same time; each must see the sources, the dataset and the
    working folder under the paths that they had for ``plan_build``. ``workers`` are processes on this host. Raises
    ``BuildError`` for a build without a plan, for other versions of libraries than those that planned, and while a process
    builds, plans or publishes.
    """
    out, folder = _places(out, build_dir)
    _planned_state(out, folder)
    native.require()
    processes = default_workers() if workers is None else workers
    with (
        os_errors_explained(out),
        part_lock(folder, part),
        line_writer(log_of(folder, part)) as write,
        LoggedProgress(progress or NoProgress(), write) as logged,
    ):
        state = _planned_state(out, folder)  # again: before the lock was held, another process may have planned
        if state.published is None:
            assert state.plan is not None
            sources = _sources(folder)
            logged.event("start", part=str(part))
            with Pool(workers=processes, modules=TASK_MODULES) as pool:
                write_shards(pool, out, folder, sources, state.plan, logged, part=part)
        counts = _count(out, folder, state, part)
        logged.event("end", part=str(part), shards=counts.shards)
    return counts


def publish_build(
    out: str | Path,
    *,
    build_dir: str | Path | None = None,
    key: str | Path | None = None,
    allow: Allowances | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Publish the dataset ``out``, whose shards ``write_part`` has written; ``key`` and ``allow`` are as for ``build``.

    Raises ``BuildError`` while shards are missing or being written.
    """
    out, folder = _places(out, build_dir)
    _planned_state(out, folder)
    progress = progress or NoProgress()
    with (
        os_errors_explained(out),
        build_lock(folder),
        output_lock(out, say=progress.say),
        line_writer(folder.log) as write,
        LoggedProgress(progress, write) as logged,
    ):
        state = _planned_state(out, folder)
        if (out / ROOT).exists():
            return Outcome(open_dataset(out).counts.model_dump(), already_finished=True, seconds={})
        secret = _secret(folder, None if key is None else Path(key), state)
        if not plan_is_whole(folder):
            raise BuildError(f"The plan in {folder.path} is damaged. {_AGAIN}: shards that are written are kept.")
        _require_shards(out, folder, state)
        seconds: dict[str, float] = {}
        with timed(seconds, "publish"):
            found = len(read_sealed(folder.files, ["size"]))
            counts = publish_shards(out, folder, state, found=found, secret=secret, allow=allow or Allowances())
        logged.event("published", counts=counts, seconds=seconds)
    return Outcome(counts, already_finished=False, seconds=seconds)


def _places(out: str | Path, build_dir: str | Path | None) -> tuple[Path, BuildFolder]:
    out = local_path(out, "The dataset").absolute()
    return out, build_folder(out, build_dir)


def _planned_state(out: Path, folder: BuildFolder) -> State:
    """Return the state of the build of ``out``, which has a plan.

    Raises ``BuildError`` if there is none, if it was made with other versions, or if it is that of another dataset.
    """
    if not folder.state.exists():
        raise BuildError(
            f"Found no build in the working folder {folder.path}. Run `ich-prep plan` first, or give the folder of the "
            "build with --build-dir."
        )
    state = read_state(folder)
    if state.plan is None:
        raise BuildError(f"The build in {folder.path} has no plan yet. {_AGAIN}.")
    if state.published is not None and (out / ROOT).exists() and open_dataset(out).digest != state.published:
        raise BuildError(
            f"The working folder {folder.path} belongs to another dataset than {out}. Name the right one with --build-dir."
        )
    for name, here in all_versions().items():
        if state.versions.get(name) != here:
            raise BuildError(
                f"The plan in {folder.path} was made with {name} {state.versions.get(name)}, this machine has {here}: "
                "different versions can produce different bytes. Install the same version on all hosts."
            )
    return state


def _sources(folder: BuildFolder) -> tuple[Path, ...]:
    """Return the paths of the sources that ``plan_build`` was given, all of which this host sees."""
    try:
        read_sealed(folder.keys, [])
        metadata = pq.read_schema(folder.keys).metadata or {}
        paths = tuple(map(Path, json.loads(metadata[SOURCES.encode()])))
    except (CorruptionError, OSError, KeyError, ValueError) as error:
        raise BuildError(f"The list of files in {folder.path} is damaged ({error}). {_AGAIN}.") from None
    try:
        open_source(paths)
    except SourceError as error:
        raise BuildError(
            f"This host does not see the sources of the plan: {error} Mount them under the same path as where "
            "`ich-prep plan` ran."
        ) from None
    return paths


def _count(out: Place, folder: BuildFolder, state: State, part: Part = ALL) -> ShardCounts:
    plan = pq.ParquetFile(folder.plan).metadata
    numbers = part.numbers(plan.num_row_groups)
    return ShardCounts(
        slices=sum(plan.row_group(number).num_rows for number in numbers),
        shards=len(numbers),
        written=len(numbers) - len(_missing(out, folder, state, numbers)),
    )


def _missing(out: Place, folder: BuildFolder, state: State, numbers: Sequence[int]) -> list[int]:
    """Return those of the shards ``numbers`` without an intact entry in the ledger."""
    assert state.plan is not None
    return [number for number in numbers if intact_report(out, folder, number, state.plan) is None]


def _require_shards(out: Path, folder: BuildFolder, state: State) -> None:
    shards = pq.ParquetFile(folder.plan).metadata.num_row_groups
    missing = _missing(out, folder, state, range(shards))
    if missing:
        raise BuildError(
            f"{len(missing):,} of {count(shards, 'shard')} are not written, such as shard {missing[0]}. Run the parts that "
            f"did not end again, or `ich-prep shards {out}`, which writes all that are missing."
        )


def _secret(folder: BuildFolder, given: Path | None, state: State) -> bytes | None:
    """Return the key of the build's pseudonyms, None if it has none; raises as ``find_key``."""
    if state.key is not None:
        return find_key(folder, given, recorded=state.key)
    if given is not None:
        raise UsageError("--key is for pseudonyms: this build was planned with --identifiers keep. Leave --key out.")
    return None
