"""The whole build, top to bottom: list -> scan -> plan -> shards -> publish.

Each step leaves what it made on disk before the next begins, so that a build that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ich_prep import compiled, ledger, store
from ich_prep.errors import BuildError, Reason, SourceError
from ich_prep.execute import Pool, default_workers
from ich_prep.labels import Labels, complete_any
from ich_prep.layouts import LAYOUTS, recognise
from ich_prep.plan import Plan, make_plan
from ich_prep.progress import Progress, Silence
from ich_prep.publish import gather, publish
from ich_prep.releases import all_releases
from ich_prep.scan import FILES_PER_BATCH, scan_batch
from ich_prep.shard import write_shard
from ich_prep.sources import Listing, local_path, local_table, open_source
from ich_prep.store import Spec, State
from ich_prep.target import disown, explained, is_finished, only_one, refuse_foreign

KEEPERS = 4
# What tasks import, loaded while files are listed; pyarrow imports pandas when it first sees a Python list.
TASK_MODULES = ("ich_prep.scan", "ich_prep.shard", "pandas")


@dataclass(frozen=True)
class Outcome:
    """What became of a build: the counts of the published dataset, and whether there was nothing left to do."""

    counts: dict[str, Any]
    already_finished: bool
    seconds: dict[str, float]


@dataclass(frozen=True)
class Allowances:
    """What may be wrong with the labels without ending the build, and the largest share of damaged files."""

    unlabelled: bool = False
    missing_images: bool = False
    contradictions: bool = False
    max_quarantined: float = 0.01


def build(
    src: str | Path | Sequence[str | Path],
    out: str | Path,
    spec: Spec | None = None,
    *,
    labels: str | Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
    allow: Allowances | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Build the dataset ``out`` from the DICOM files in ``src``, or resume a build that was stopped.

    ``src`` is a folder or a zip archive, or several of them, whose files then have paths below the name of each.

    ``labels`` is a label file instead of the one in the tree. ``workers`` are local processes (default: one a core; 0:
    all in this process), ``scheduler`` the address of a Dask cluster whose workers see both folders under the same
    paths. Raises ``SourceError``, ``BuildError`` or ``UsageError``; what was done by then is kept for the next run.
    """
    given = [src] if isinstance(src, str | Path) else src
    places, target = [local_path(one, option="--src") for one in given], local_path(out, option="--out")
    spec, allow, progress = spec or Spec(), allow or Allowances(), progress or Silence()
    count = default_workers() if workers is None else workers
    seconds: dict[str, float] = {}
    compiled.require()
    source = open_source(places)
    for place in places:
        refuse_foreign(target, place)
    with Pool(workers=count, scheduler=scheduler, modules=TASK_MODULES) as pool:
        with _timed(seconds, "list"):
            listing = source.list()
            found, spec = _resolve_layout(spec, listing, progress)
            known = complete_any(
                found.read_labels(
                    listing,
                    None if labels is None else local_table(Path(labels)),
                    allow_contradictions=allow.contradictions,
                )
            )
        state = State(
            spec=spec, sources=_digest_listing(listing), labels=_digest_labels(known), releases=all_releases()
        )
        folder = target / store.BUILD
        if not overwrite and is_finished(target, state, listing):
            counts = store.open_dataset(target).ich["counts"]
            return Outcome(counts=counts, already_finished=True, seconds=seconds)
        with explained(target), only_one(folder):
            if overwrite:
                disown(target)
            state = _begin(target, state, listing)
            log = partial(_log, folder / store.LOG)
            log("start", layout=spec.layout, files=len(listing.files), notes=known.notes)
            for note in known.notes:
                progress.say(f"Labels: {note}.")
            with _timed(seconds, "start workers"):
                importlib.import_module("zarr")  # publishing needs it: loaded while the workers start
                pool.admit(*places, target, say=progress.say)
            if state.plan is None:
                with _timed(seconds, "scan"):
                    scanned = _scan(pool, target, places, listing, progress)
                with _timed(seconds, "plan"):
                    plan = make_plan(scanned, placement=found.place(scanned, listing.name), labels=known, spec=spec)
                    again = f"{folder / store.SCAN} lists them. Mend what can be mended and run the same command again"
                    _check_damage(plan.quarantine, len(listing.files), allow, again)
                    _check_labels(plan, known, folder, allow, progress)
                    state = _write_plan(folder, state, plan)
                log("planned", slices=len(plan.slices), quarantined=len(plan.quarantine))
                del scanned, plan  # a line for each file, of which the shards need none
            assert state.plan is not None
            with _timed(seconds, "shards"):
                _write_keys(folder, listing)
                _write_shards(pool, target, places, state.plan, progress)
            with _timed(seconds, "publish"):
                tables = gather(target, state)
                again = (
                    f"{folder / store.DONE} and {folder / store.PLANNED_QUARANTINE} list them. Run the same command again "
                    "where the machine was at fault, and with --overwrite where files were mended"
                )
                _check_damage(tables.quarantine, len(listing.files), allow, again)
                counts = publish(target, spec=state.spec, tables=tables, found=len(listing.files))
            log("published", **counts)
    return Outcome(counts=counts, already_finished=False, seconds=seconds)


# --- before the work -------------------------------------------------------------------------------------------------


def _resolve_layout(spec: Spec, listing: Listing, progress: Progress) -> tuple[Any, Spec]:
    if spec.layout == "auto":
        recognised = recognise(listing)
        progress.say(f"Layout: {recognised.name}, because {recognised.why}.")
        spec = spec.model_copy(update={"layout": recognised.name})
    return LAYOUTS[spec.layout], spec


def _digest_listing(listing: Listing) -> str:
    """Return a digest of the paths, sizes and problems of the files: the same for a folder and for an archive of it."""
    digest = hashlib.sha256()
    files = listing.files
    for path, size in zip(files["path"].to_pylist(), files["size"].to_pylist(), strict=True):
        digest.update(b"%d %d " % (len(path), size) + path)
    unreadable = files.filter(pc.is_valid(files["reason"]))
    for path, reason in zip(unreadable["path"].to_pylist(), unreadable["reason"].to_pylist(), strict=True):
        digest.update(b"%s %d " % (reason.encode(), len(path)) + path)
    return digest.hexdigest()


def _digest_labels(labels: Labels) -> str:
    digest = hashlib.sha256(labels.key.encode() + labels.values.tobytes())
    for keys in (labels.keys, labels.listed):
        digest.update(b"%d " % len(keys) + "\n".join(keys.to_pylist()).encode())
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


def _begin(target: Path, state: State, listing: Listing) -> State:
    """Return the state of a build in progress, or begin one: the listing first, the state that names it last.

    A build without a plan takes the spec, files and labels of now, and keeps the headers of files that are listed as before.
    """
    folder = target / store.BUILD
    if (folder / store.STATE).exists():
        before = store.read_state(folder)
        if before.plan is not None or before == state:
            return before
        _forget_headers(folder, listing, all_of_them=before.releases != state.releases)
    else:
        _clear(target)
    sink = pa.BufferOutputStream()
    pq.write_table(listing.files, sink, row_group_size=FILES_PER_BATCH)
    ledger.write_whole(folder / store.FILES, sink.getvalue().to_pybytes())
    store.write_state(folder, state)
    return state


def _clear(target: Path) -> None:
    """Remove what is of a build that ended before its first step, or that is to be replaced; make the folders of one."""
    folder = target / store.BUILD
    for path in (target / store.IMAGES, target / store.LABELS, *folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != store.LOCK:
            path.unlink(missing_ok=True)
    for path in (folder / store.SCAN, folder / store.DONE, target / store.IMAGES / "c"):
        path.mkdir(parents=True)


def _forget_headers(folder: Path, listing: Listing, *, all_of_them: bool) -> None:
    """Remove the headers of each batch of files that is not listed in ``folder`` as it is listed now, or of all."""
    before = store.read_parquet(folder / store.FILES)
    for batch in ledger.done(folder / store.SCAN, suffix=".parquet"):
        begin = batch * FILES_PER_BATCH
        then, now = (files.slice(begin, FILES_PER_BATCH) for files in (before, listing.files))
        if all_of_them or not then.equals(now):
            (folder / store.SCAN / f"{batch:05d}.parquet").unlink()


def _scan(pool: Pool, target: Path, places: Sequence[Path], listing: Listing, progress: Progress) -> pa.Table:
    """Return the headers of all files, in the order of the listing; reads those that no earlier run has read.

    Batches in which an earlier run met damage are read again: it may be mended since.
    """
    folder = target / store.BUILD / store.SCAN
    batches = range(-(-len(listing.files) // FILES_PER_BATCH))
    done = {
        batch
        for batch in ledger.done(folder, suffix=".parquet")
        if not _any_damage(store.read_parquet(folder / f"{batch:05d}.parquet", ["reason"])["reason"])
    }
    already = sum(min(FILES_PER_BATCH, len(listing.files) - batch * FILES_PER_BATCH) for batch in done)
    progress.begin("Reading headers", len(listing.files), "files", already)
    task = partial(scan_batch, str(target), tuple(map(str, places)))
    for _, (slices, set_aside) in pool.map(task, [batch for batch in batches if batch not in done]):
        progress.advance(slices + set_aside, set_aside)
    progress.end()
    return pa.concat_tables([store.read_parquet(folder / f"{batch:05d}.parquet") for batch in batches])


def _any_damage(reasons: pa.ChunkedArray) -> bool:
    return any(Reason(reason).is_damage for reason in reasons.unique().to_pylist() if reason is not None)


def _check_labels(plan: Plan, labels: Labels, folder: Path, allow: Allowances, progress: Progress) -> None:
    """Raise ``SourceError`` where labels and slices do not fit; all cases are listed in ``build/label_problems.parquet``."""
    problems = {
        "unlabelled": (plan.unlabelled, allow.unlabelled),
        "missing_image": (plan.without_image, allow.missing_images),
        "contradictory": (labels.contradicted, allow.contradictions),
    }
    path = folder / store.LABEL_PROBLEMS
    names = pa.array(np.repeat(list(problems), [len(keys) for keys, _ in problems.values()]), pa.string())
    store.write_table(path, pa.table({"problem": names, "key": pa.concat_arrays([k for k, _ in problems.values()])}))
    told = {
        "unlabelled": ("slices have no label", "give them labels, or keep them with --allow-unlabelled"),
        "missing_image": ("labels have no image", "fetch the files, or go on with --allow-missing-images"),
        "contradictory": ("keys have contradictory labels", "correct the label file"),
    }
    for problem, (keys, allowed) in problems.items():
        if not len(keys):
            continue
        what, remedy = told[problem]
        text = f"{len(keys)} {what} (for one, {keys[0].as_py()}; all are listed in {path})"
        if not allowed:
            raise SourceError(f"Expected every slice to have a label and every label an image; {text}: {remedy}.")
        progress.say(f"Labels: {text}; allowed.")


def _check_damage(quarantine: pa.Table, found: int, allow: Allowances, again: str) -> None:
    """Raise ``BuildError`` where more of the found files are damaged than allowed; ``again`` says where they stand, and how
    to go on once they are mended.
    """
    lines = [line for line in quarantine.to_pylist() if Reason(line["reason"]).is_damage]
    damaged = Counter(line["reason"] for line in lines)
    share = damaged.total() / max(1, found)
    if share > allow.max_quarantined:
        reasons_text = ", ".join(f"{count} {reason}" for reason, count in damaged.most_common())
        raise BuildError(
            f"Expected at most {allow.max_quarantined:.2%} of the files to be damaged; {damaged.total()} of {found} are "
            f"({share:.2%}): {reasons_text}; for one, {lines[-1]['path']}: {lines[-1]['detail']}. {again}; or, if "
            "that is what the source is like, the same command with a higher --max-quarantined."
        )


def _write_plan(folder: Path, state: State, plan: Plan) -> State:
    """Write the plan, one row group a shard, and the state that names its digest, last."""
    if not len(plan.slices):
        counts = Counter(plan.quarantine["reason"].to_pylist())
        raise SourceError(
            f"Expected CT slices; every one of the {len(plan.quarantine)} files was set aside: "
            f"{', '.join(f'{count} {reason}' for reason, count in counts.most_common())}. Point --src at axial CT."
        )
    sink = pa.BufferOutputStream()
    pq.write_table(plan.slices, sink, row_group_size=state.spec.slices_per_shard, write_statistics=False)
    data = sink.getvalue().to_pybytes()
    ledger.write_whole(folder / store.PLAN, data)
    store.write_table(folder / store.PLANNED_SERIES, plan.series)
    store.write_table(folder / store.PLANNED_QUARANTINE, plan.quarantine)
    digest = hashlib.sha256(state.spec.model_dump_json().encode() + data).hexdigest()
    state = state.model_copy(update={"plan": digest})
    store.write_state(folder, state)
    return state


def _write_keys(folder: Path, listing: Listing) -> None:
    """Write by which keys the source has the files of the plan, one row group a shard.

    They are no part of the plan: between two runs a folder may become an archive, or be packed anew.
    """
    with pq.ParquetFile(folder / store.PLAN) as plan:
        metadata = plan.metadata
        paths = plan.read(["path"])["path"].cast(pa.binary())
    readable = listing.files.filter(pc.is_null(listing.files["reason"]))
    keys = readable.select(["key"]).take(pc.index_in(paths, value_set=readable["path"]))
    sink = pa.BufferOutputStream()
    pq.write_table(keys, sink, row_group_size=metadata.row_group(0).num_rows, write_statistics=False)
    ledger.write_whole(folder / store.KEYS, sink.getvalue().to_pybytes())


def _write_shards(pool: Pool, target: Path, places: Sequence[Path], digest: str, progress: Progress) -> None:
    """Write every shard that is not done.

    A shard goes into the ledger when it is on disk. Waiting for that is left to threads here, while the workers go on.
    """
    plan = pq.ParquetFile(target / store.BUILD / store.PLAN).metadata
    sizes = [plan.row_group(number).num_rows for number in range(plan.num_row_groups)]
    done = {number for number in ledger.done(target / store.BUILD / store.DONE) if _is_done(target, number, digest)}
    for number in range(len(sizes)):
        if number not in done:
            ledger.clear_leftovers(store.shard_path(target, number))
    progress.begin("Writing slices", plan.num_rows, "slices", sum(sizes[number] for number in done))
    task = partial(write_shard, str(target), tuple(map(str, places)), digest)
    with ThreadPoolExecutor(KEEPERS, thread_name_prefix="keep") as keepers:
        kept = deque[Future[None]]()
        for number, entry in pool.map(task, [number for number in range(len(sizes)) if number not in done]):
            kept.append(keepers.submit(_keep, target, number, entry))
            progress.advance(len(entry["rows"]), sum(row["status"] != store.OK for row in entry["rows"]))
            while kept and kept[0].done():
                kept.popleft().result()
        for keeping in kept:
            keeping.result()
    progress.end()


def _is_done(target: Path, number: int, digest: str) -> bool:
    """Return whether shard ``number`` is there as its entry of this plan says, none of whose slices may be mended since."""
    entry = ledger.read(target / store.BUILD / store.DONE, number)
    statuses = {row["status"] for row in entry["rows"]} - {store.OK}
    there = entry["plan"] == digest and store.shard_bytes(target, number) == entry["bytes"]
    return there and not any(Reason(status).may_pass for status in statuses)


def _keep(target: Path, number: int, entry: dict[str, Any]) -> None:
    """Wait until shard ``number`` is on disk, then say so in the ledger."""
    ledger.sync_file(store.shard_path(target, number), folders=3)
    ledger.record(target / store.BUILD / store.DONE, number, entry)
