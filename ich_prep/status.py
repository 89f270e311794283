"""How far a build is: read from its working folder alone, while it runs on any host, or after it stopped.

Times are those of the files, so the clocks of hosts need not agree. Nothing is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.bucket_path import Place
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.lock import HeldError, refuse_if_held
from ich_prep.dataset.schema import OK, ROOT
from ich_prep.dataset.storage import local_path, modified_at
from ich_prep.dataset.tables import opened_parquet, read_parquet
from ich_prep.errors import CorruptionError, DatasetError
from ich_prep.events import read_events
from ich_prep.stages import ledger
from ich_prep.stages.parts import Part, lock_of, log_of, parts_of, running_parts
from ich_prep.stages.scan import FILES_PER_BATCH
from ich_prep.stages.shard import ShardReport
from ich_prep.stages.state import BuildFolder, State, build_folder, has_append, read_state

if TYPE_CHECKING:
    from collections.abc import Mapping

Ended = Literal["done", "interrupted", "failed", "killed"]

RATE_SECONDS = 60.0  # the time over which a rate is measured, up to the last file that was written


@dataclass(frozen=True)
class PartStatus:
    """A part of a build's shards, such as "3/8", and how its last run goes or ended; ``error`` is its message."""

    part: str
    state: Literal["running"] | Ended
    error: str | None = None


@dataclass(frozen=True)
class Status:
    """How far the build of ``dataset`` is, or the append to it.

    ``command`` is "append" while slices are added to a finished dataset, or were when it stopped.
    ``state``: "running" while a process holds a lock of the build; "stopped" if none does, with ``ended``, how the last
    run that planned or built ended, and the message ``error``; or "finished". ``stage`` is what is done now, or what is
    next: ``done`` of ``total`` units are. ``per_second`` and ``seconds_left`` are None unless it is running and something
    was done in the last minute of its work. ``quarantined`` is by reason, so far. ``last_write`` (UTC, ISO 8601) is the
    time of the newest result, by the clock of the file system.
    """

    dataset: str
    folder: str
    command: Literal["build", "append"]
    state: Literal["running", "stopped", "finished"]
    stage: Literal["list", "scan", "plan", "shards", "publish", "finished"]
    unit: Literal["files", "slices"]
    done: int
    total: int
    per_second: float | None
    seconds_left: float | None
    quarantined: Mapping[str, int]
    last_write: str | None
    ended: Ended | None
    error: str | None
    parts: tuple[PartStatus, ...]

    @property
    def share(self) -> float:
        """How much of the stage is done, from 0 to 1."""
        return self.done / self.total if self.total else float(self.stage == "finished")


def status_of(dataset: Path, build_dir: str | Path | None = None) -> Status:
    """Return how far the build of ``dataset`` is; raises ``DatasetError`` if there is neither a build nor a dataset."""
    out = local_path(dataset, "The dataset").absolute()
    folder = build_folder(out, build_dir)
    if (out / ROOT).exists():
        return _of_append(out, folder) or _of_finished(out, folder)
    if not folder.lock.exists() and not folder.state.exists():
        open_dataset(dataset)  # raises the error that says what is there instead
    try:
        return _of_build(out, folder)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(
            f"The working folder {folder.path} cannot be read ({error}). If the build has just begun, try again."
        ) from None


def _of_append(out: Path, folder: BuildFolder) -> Status | None:
    """Return how far the append in the working ``folder`` is; None if none runs, nor was one stopped before its end."""
    with open_dataset(out) as opened:
        stopped = has_append(folder, opened.digest)
    if not stopped and not (folder.append.lock.exists() and _is_held(folder.append)):
        return None
    try:
        return replace(_of_build(out, folder.append), command="append")
    except (OSError, pa.ArrowException):  # it has just begun, or ended
        return None


def _of_finished(out: Path, folder: BuildFolder) -> Status:
    with open_dataset(out) as opened:
        reasons = pc.value_counts(opened.read_table("quarantine")["reason"]).to_pylist()
        planned = opened.counts.planned
    return Status(
        dataset=str(out),
        folder=str(folder.path),
        command="build",
        state="finished",
        stage="finished",
        unit="slices",
        done=planned,
        total=planned,
        per_second=None,
        seconds_left=None,
        quarantined=_sorted({line["values"]: line["counts"] for line in reasons}),
        last_write=_time((out / ROOT).stat().st_mtime),
        ended=None,
        error=None,
        parts=(),
    )


@dataclass(frozen=True)
class _Results:
    """What a stage has so far: its ``done`` units of ``total``, those of each result by time, what was quarantined."""

    stage: Literal["list", "scan", "plan", "shards", "publish"]
    unit: Literal["files", "slices"]
    total: int
    written: list[tuple[float, int]]
    quarantined: Mapping[str, int]

    @property
    def done(self) -> int:
        return sum(units for _, units in self.written)


def _of_build(out: Path, folder: BuildFolder) -> Status:
    state = read_state(folder) if folder.state.exists() else None
    if state is None:
        results = _Results("list", "files", 0, [], {})
    elif state.plan is None:
        results = _of_scan(folder)
    else:
        results = _of_shards(folder, state)
    running = list(_running(folder))
    parts = tuple(_part(folder, part, running=part in running) for part in parts_of(folder))
    is_running = bool(running) or _is_held(folder)
    rate = _rate(results.written, _start(folder, running, results.stage)) if is_running else None
    ended, error = (None, None) if is_running else _end(folder.log)
    newest = max((moment for moment, _ in results.written), default=None)
    return Status(
        dataset=str(out),
        folder=str(folder.path),
        command="build",
        state="running" if is_running else "stopped",
        stage=results.stage,
        unit=results.unit,
        done=results.done,
        total=results.total,
        per_second=None if rate is None else round(rate, 1),
        seconds_left=round((results.total - results.done) / rate, 1) if rate else None,
        quarantined=_sorted(results.quarantined),
        last_write=None if newest is None else _time(newest),
        ended=ended,
        error=error,
        parts=parts,
    )


def _of_scan(folder: BuildFolder) -> _Results:
    total = _lines(folder.files)
    batches = ledger.done(folder.scan, suffix=".parquet")
    written = [
        (modified_at(folder.batch(number)), min(FILES_PER_BATCH, total - number * FILES_PER_BATCH))
        for number in batches
    ]
    reasons = [read_parquet(folder.batch(number), ["reason"])["reason"].drop_null() for number in batches]
    counted = Counter(reason for column in reasons for reason in column.to_pylist())
    stage: Literal["scan", "plan"] = "scan" if sum(units for _, units in written) < total else "plan"
    return _Results(stage, "files", total, written, counted)


def _of_shards(folder: BuildFolder, state: State) -> _Results:
    counted = Counter(read_parquet(folder.quarantine, ["reason"])["reason"].to_pylist())
    total, written = _lines(folder.plan), []
    for number in ledger.done(folder.done):
        try:
            report = ShardReport.from_json(ledger.read(folder.done, number))
        except (CorruptionError, ValueError):
            continue  # written again by the next run
        if report.plan == state.plan:
            counted.update(row.status for row in report.rows if row.status != OK)
            written.append((modified_at(ledger.entry_path(folder.done, number)), len(report.rows)))
    stage: Literal["shards", "publish"] = "shards" if sum(units for _, units in written) < total else "publish"
    return _Results(stage, "slices", total, written, counted)


def _lines(path: Place) -> int:
    with opened_parquet(path) as file:
        lines: int = file.metadata.num_rows
    return lines


def _rate(written: Iterable[tuple[float, int]], start: float) -> float | None:
    """Return the units per second of the last minute of work that began at ``start``; None if nothing was done."""
    recent = [(moment, units) for moment, units in written if moment >= start]
    if not recent:
        return None
    newest = max(moment for moment, _ in recent)
    since = max(start, newest - RATE_SECONDS)
    done = sum(units for moment, units in recent if moment >= since)
    return done / (newest - since) if newest > since else None


def _start(folder: BuildFolder, running: Iterable[Part], stage: str) -> float:
    """Return when the process that works now began its stage: it then touched its lock, or wrote the keys."""
    locks = [lock_of(folder, part) for part in running]
    mark = folder.keys if stage in ("shards", "publish") else folder.lock
    return min((modified_at(path) for path in locks or [mark] if path.exists()), default=0.0)


def _running(folder: BuildFolder) -> Iterator[Part]:
    try:
        yield from running_parts(folder)
    except PermissionError:  # a lease: only a process that can write there can determine its age
        return


def _is_held(folder: BuildFolder) -> bool:
    try:
        refuse_if_held(folder.lock, folder.lease)
    except (HeldError, PermissionError):
        return True
    except FileNotFoundError:
        return False
    return False


def _part(folder: BuildFolder, part: Part, *, running: bool) -> PartStatus:
    ended, error = (None, None) if running else _end(log_of(folder, part))
    return PartStatus(str(part), "running" if running else ended or "killed", error)


def _end(log: Place) -> tuple[Ended | None, str | None]:
    """Return how the last run in ``log`` ended, and the message of its error; None if there was none."""
    ends: dict[str, Ended] = {"start": "killed", "interrupted": "interrupted", "error": "failed", "end": "done"}
    last = None
    for event in read_events(log):
        if event.get("event") in ends:
            last = event
    if last is None:
        return None, None
    return ends[last["event"]], str(last["text"]) if last["event"] == "error" and "text" in last else None


def _sorted(reasons: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(reasons.items(), key=lambda one: (-one[1], one[0])))


def _time(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
