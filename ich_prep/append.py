"""Add slices to a finished dataset: list, scan, plan, new shards behind the old ones, then the next generation.

What is there keeps its rows, bytes and folds. The append has a working folder of its own inside the dataset's, so that one
that was killed continues where it was; what it decided there holds for the generation that it began with.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.build_dataset import (
    say_broken_archives,
    say_forecast,
    timed,
    write_keys,
    write_plan,
    write_shards,
)
from ich_prep.dataset import native
from ich_prep.dataset.schema import AS_STORED, IMAGES, TABLES
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.storage import files_below, line_writer, local_path
from ich_prep.dataset.tables import give_back_memory, read_sealed, with_columns
from ich_prep.errors import DatasetError, Reason, UsageError
from ich_prep.execute import Pool, Tls, default_workers
from ich_prep.layouts import LAYOUTS
from ich_prep.layouts.labels import LabelOptions, LabelRules, LabelTable
from ich_prep.progress import LoggedProgress, NoProgress, Progress
from ich_prep.sources import check_table_path, open_source
from ich_prep.stages.checks import Allowances, check_any_slice, check_damage, check_labels, check_lost
from ich_prep.stages.generation import Change, changing, is_new_shard, joined_digest, publish_generation
from ich_prep.stages.growth import (
    Grown,
    content_hashes,
    grow,
    known_slices,
    number_there,
    without_known,
    without_lost,
    without_quarantined,
)
from ich_prep.stages.identifier_key import key_of_dataset, refuse_kept_columns
from ich_prep.stages.identity import with_issuer
from ich_prep.stages.losses import Loss, losses_by_reason
from ich_prep.stages.merge_folders import merge_append
from ich_prep.stages.output import build_lock, check_output_folder, reset_folder
from ich_prep.stages.plan import Plan
from ich_prep.stages.pseudonyms import PSEUDONYMS, WRITTEN_OPTIONS, key_id, published_state, with_originals
from ich_prep.stages.publish import Tables, collect_tables, pseudonymised
from ich_prep.stages.state import BuildFolder, State, readable_state, write_state
from ich_prep.stages.survey import (
    TASK_MODULES,
    Job,
    digest_listing,
    join_key,
    plan_files,
    read_headers,
    read_labels,
    settle_files,
    start_or_resume,
)
from ich_prep.versions import all_versions

if TYPE_CHECKING:
    from ich_prep.dataset.dataset import Dataset
    from ich_prep.layouts import Layout


@dataclass(frozen=True)
class Appended:
    """The result of an append: ``found`` files, of which ``slices`` are new and ok, ``duplicates`` there already.

    ``quarantined`` are the others; ``fold_conflicts`` the groups that the new slices would have merged; ``generation`` the
    new one, None if there was nothing new. ``reasons`` has the number of others by reason, the most frequent first, and
    ``lost`` the labels that left with them.
    """

    found: int
    slices: int
    duplicates: int
    quarantined: int
    fold_conflicts: int
    generation: int | None
    reasons: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[str, Loss] = field(default_factory=dict)


def append(
    src: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    labels: str | Path | None = None,
    label_options: LabelOptions | None = None,
    build_dir: str | Path | None = None,
    key: str | Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    tls: Tls | None = None,
    allow: Allowances | None = None,
    progress: Progress | None = None,
) -> Appended:
    """Add the DICOM files in ``src`` to the dataset ``out``, or resume an append of them that was interrupted.

    The options are those of ``build_dataset.build``; the spec is the dataset's. A file whose slice is there already is a
    duplicate. Raises as ``build``, ``DatasetError`` for a dataset of an earlier version that lacks what this needs, and as
    ``stages.generation.changing``.
    """
    paths = [src] if isinstance(src, str | Path) else src
    sources, out = [local_path(path, "--src").absolute() for path in paths], local_path(out, "--out").absolute()
    allow, progress = allow or Allowances(), progress or NoProgress()
    native.require()
    source = open_source(sources)
    file = None if labels is None else local_path(labels, "--labels").absolute()
    if file is not None:
        check_table_path(file)
    with changing(out, build_dir) as (dataset, base):
        check_output_folder(out, base, sources)
        state = readable_state(base)
        if base.state.exists() and (state is None or not state.belongs_to(dataset.digest)):
            raise UsageError(
                f"The working folder {base.path} is not that of {out} as it is now. Name another one with --build-dir, or "
                "remove it."
            )
        spec = _spec_of(dataset, state)
        refuse_kept_columns(spec, label_options.keep if label_options else (), allowed=allow.kept_columns)
        secret = key_of_dataset(dataset.root, base, None if key is None else Path(key), needed=True)
        layout = LAYOUTS[spec.layout]
        pool = Pool(
            workers=default_workers() if workers is None else workers,
            scheduler=scheduler,
            tls=tls,
            modules=TASK_MODULES,
        )
        with pool:
            listing = source.list()
            rules = LabelRules(spec.classes, allow.contradictions, allow.unlabelled, label_options or LabelOptions())
            table = read_labels(layout, listing, file, rules)
            job = Job(pool, base.append, sources, listing, progress)
            return _Append(dataset, base, job, spec, layout, table, allow, secret).run()


def _spec_of(dataset: Dataset, state: State | None) -> Spec:
    """Return the spec that the dataset was built with; ``state`` is that of its build, if it is known."""
    written = {"orientation": AS_STORED, **dataset.attributes["spec"], "classes": dataset.classes}
    lacking = {"fold_group", "content_hash", "hu_max", "hu_min"} - set(dataset.slices.column_names)
    lacking |= {"volume_in_series", "fold_group", "flags"} - set(dataset.series.column_names)
    unknown = sorted(written.keys() - Spec.model_fields.keys())
    if lacking or unknown or written.get("layout") not in LAYOUTS:
        what = (
            f"lacks {sorted(lacking)[0]}"
            if lacking
            else f"has a spec that is not this version's ({unknown or 'layout'})"
        )
        raise DatasetError(f"{dataset.path} {what}: this version cannot append to it. Build it again.")
    spec = Spec(**written)
    hidden = [name for name in WRITTEN_OPTIONS if getattr(spec, name)] if spec.identifiers == "pseudonymise" else []
    if hidden and state is None:
        raise DatasetError(
            f"{dataset.path} was built with --{hidden[0].replace('_', '-')}, of which only pseudonyms are published: to "
            "append, name the working folder of its build with --build-dir, or build it again."
        )
    texts = {name: getattr(state.spec, name) for name in hidden} if state is not None else {}
    return spec.model_copy(update=texts)


@dataclass(frozen=True)
class _Append:
    """One append to ``dataset``, whose working folder is ``base``; ``key`` is that of its pseudonyms, if it has some."""

    dataset: Dataset
    base: BuildFolder
    job: Job
    spec: Spec
    layout: Layout
    labels: LabelTable
    allow: Allowances
    key: bytes | None

    def run(self) -> Appended:
        """Do what is left of the append, as one process at a time, and keep its log with that of the build."""
        folder = self.job.folder
        with build_lock(folder):
            state = self._start_or_resume()
            with line_writer(folder.log) as write, LoggedProgress(self.job.progress, write) as logged:
                appended = replace(self, job=replace(self.job, progress=logged))._add(state)
        if self.base.state.exists():
            with line_writer(self.base.log) as write:
                write(folder.log.read_bytes().decode().removesuffix("\n"))
        self._remove_folder()
        return appended

    def _add(self, state: State) -> Appended:
        job, out, allow = self.job, self.dataset.folder, self.allow
        seconds: dict[str, float] = {}
        job.progress.event("start", layout=self.spec.layout, files=len(job.listing.files), notes=self.labels.notes)
        say_broken_archives(job.listing, job.progress)
        for note in self.labels.notes:
            job.progress.say(f"Labels: {note}.")
        with timed(seconds, "start workers"):
            importlib.import_module("zarr")  # loaded while the workers start
            job.pool.check_workers(*job.sources, out, job.folder.path, say=job.progress.say)
        if state.plan is None:
            with timed(seconds, "plan"):
                plan = self._plan()
            job.progress.event("planned", slices=len(plan.slices), quarantined=len(plan.quarantine))
            if not len(plan.slices):
                return self._nothing_new(plan)
            state = write_plan(job.folder, state, plan)
        assert state.plan is not None
        write_keys(job.folder, job.listing, job.sources)
        say_forecast(job, out, self.spec, allow, first=state.first_shard, instead="")
        with timed(seconds, "shards"):
            write_shards(job.pool, out, job.folder, job.sources, state.plan, job.progress, first=state.first_shard)
        with timed(seconds, "publish"):
            appended, counts = self._publish(state)
        job.progress.event("published", counts=counts, seconds=seconds)
        return appended

    def _publish(self, state: State) -> tuple[Appended, Mapping[str, int]]:
        """Publish the next generation, with the slices whose shards are written; return the counts that it changes."""
        job = self.job
        new = collect_tables(self.dataset.path, job.folder, state)
        there = number_there(new.quarantine)
        hint = "Run the same command again if the machine was at fault"
        check_damage(new.quarantine, new.ok + there, self.allow, hint)
        given_fold = read_sealed(job.folder.plan, ["given_fold"])["given_fold"].to_numpy().astype(np.int64)
        patients = new.slices["patient_id"]
        if self.key is not None:
            new = pseudonymised(new, self.key, self.spec)
        grown = grow(self.dataset, new, given_fold, patients, self.spec)
        give_back_memory()
        merge_append(self.base, self.dataset, state)
        change = self._change(state, new, grown, bool((given_fold >= 0).any()))
        generation = publish_generation(self.dataset, self.base, change)
        return self._appended(new.quarantine, new.lost, new.ok, grown.fold_conflicts, generation), change.counts

    def _appended(
        self, quarantine: pa.Table, lost: pa.Table, ok: int, fold_conflicts: int = 0, generation: int | None = None
    ) -> Appended:
        reasons = Counter(quarantine["reason"].to_pylist())
        duplicates = reasons.pop(str(Reason.DUPLICATE), 0)
        return Appended(
            found=len(self.job.listing.files),
            slices=ok,
            duplicates=duplicates,
            quarantined=reasons.total(),
            reasons=dict(sorted(reasons.items(), key=lambda one: (-one[1], one[0]))),
            lost=losses_by_reason(lost),
            fold_conflicts=fold_conflicts,
            generation=generation,
        )

    def _start_or_resume(self) -> State:
        """Return the state of the append in progress, or start one; headers of files that did not change are kept."""
        job, folder, dataset = self.job, self.job.folder, self.dataset
        state = State(
            spec=self.spec,
            sources=digest_listing(job.listing),
            labels=self.labels.digest(),
            versions=all_versions(),
            key=None if self.key is None else key_id(self.key),
            base=dataset.digest,
            first_shard=dataset.counts.shards,
        )
        before = readable_state(folder)
        if before is None:
            folder.state.unlink(missing_ok=True)
        elif before.plan is not None and before.model_copy(update={"plan": None}) != state:
            # Planned for another generation, or from other files or labels: only the headers can be of use.
            write_state(folder, before.model_copy(update={"plan": None}))
        state = start_or_resume(job, state, partial(reset_folder, folder))
        if state.plan is None:
            old = [folder.done / path.name for path in files_below(folder.done)]
            out = dataset.folder
            old += [path for path in files_below(out / IMAGES / "c") if is_new_shard(dataset, path.relative_to(out))]
            for path in old:
                path.unlink()
        return state

    def _plan(self) -> Plan:
        """Return the plan of the new slices, their rows counted from 0, after the checks of a build."""
        job, spec, allow = self.job, self.spec, self.allow
        before = self.dataset.read_table("quarantine")
        scanned = without_quarantined(read_headers(job), before, self.key)
        known = known_slices(self.dataset)
        known = self._resolved(known, {"sop_instance_uid": scanned["sop_instance_uid"]})
        uids = known["sop_instance_uid"].combine_chunks()
        found = settle_files(job, scanned, spec, uids)
        labels = join_key(job, found, self.labels, spec)
        known = self._resolved(known, {"content_hash": content_hashes(found.image)})
        keyed_by_uid = labels.key == "sop_instance_uid" and len(labels.keys) > 0
        found = replace(found, scanned=without_known(found.scanned, found.image, known, keyed_by_uid=keyed_by_uid))
        plan = plan_files(
            job, found, layout=self.layout, labels=labels, spec=spec, known=self._known_volumes(found.scanned)
        )
        plan = self._without_labels_of_known(plan, labels)
        plan = replace(plan, lost=without_lost(plan.lost, plan.quarantine, before, self.key))
        hint = "Fix what can be fixed and run the same command again"
        # Of all slices of the source, as in a build: a folder that grows has mostly those that are there.
        check_damage(plan.quarantine, len(plan.slices) + number_there(plan.quarantine), allow, hint)
        check_labels(plan, labels, job.folder, allow, job.progress)
        check_lost(plan.lost, allow, job.progress)
        return plan

    def _resolved(self, table: pa.Table, originals: dict[str, pa.Array | pa.ChunkedArray]) -> pa.Table:
        """Return ``table`` with the ``originals``, by the name of their column, in place of their pseudonyms."""
        columns = {
            name: with_originals(table[name], self.key, PSEUDONYMS[name], values) for name, values in originals.items()
        }
        return with_columns(table, columns)

    def _known_volumes(self, scanned: pa.Table) -> pa.Table:
        """Return the series table, with the identifiers of ``scanned`` in place of their pseudonyms."""
        if self.key is None:
            return self.dataset.series
        assigned = self.layout.assign(scanned, self.job.listing.name).patient_id
        of_table = self.labels.lines.keys.get("patient_id") if self.labels.lines is not None else None
        patients = pa.chunked_array([assigned, *([] if of_table is None else [of_table])], pa.string())
        names = with_issuer(assigned, scanned["issuer_of_patient_id"])
        uids = {name: scanned[name] for name in ("study_instance_uid", "series_instance_uid")}
        return self._resolved(self.dataset.series, {"patient_id": patients, "fold_group": names, **uids})

    def _without_labels_of_known(self, plan: Plan, labels: LabelTable) -> Plan:
        """Return the plan without those lost labels, and labels without an image, that slices of the dataset have."""
        slices, series = self.dataset.slices, self.dataset.series
        name = "patient_id" if labels.key == "subject" else labels.key
        there = pc.unique(slices[name] if name in slices.column_names else series[name])
        asked = pa.chunked_array([plan.without_image, *plan.lost["key"].chunks], pa.string())
        keys = with_originals(there, self.key, PSEUDONYMS[name], asked)
        return replace(
            plan,
            without_image=plan.without_image.filter(pc.invert(pc.is_in(plan.without_image, value_set=keys))),
            lost=plan.lost.filter(pc.invert(pc.is_in(plan.lost["key"], value_set=keys))),
        )

    def _nothing_new(self, plan: Plan) -> Appended:
        """Return that there is nothing to append; raises ``SourceError`` unless all slices are there already."""
        appended = self._appended(plan.quarantine, plan.lost, 0)
        if not appended.duplicates:
            check_any_slice(plan)
        return appended

    def _change(self, state: State, new: Tables, grown: Grown, given_folds: bool) -> Change:
        tables, before, root = grown.tables, self.dataset.counts, self.dataset.root
        shown = published_state(state, self.key)
        lost: dict[str, Any] = {name: loss.model_dump() for name, loss in root.lost_labels.items()}
        for reason, loss in losses_by_reason(new.lost).items():
            counted = lost.setdefault(reason, {"labels": 0, "positive": 0})
            counted["labels"] += loss.labels
            counted["positive"] += loss.positive
        keys: dict[str, Any] = {"lost_labels": lost, "given_folds": root.given_folds or given_folds}
        if len(self.labels.keys):
            keys["labels_digest"] = joined_digest(root.labels_digest, shown.labels)
        return Change(
            command="append",
            tables={name: getattr(tables, name) for name in TABLES},
            counts={
                "rows": len(tables.slices),
                "found": before.found + len(self.job.listing.files),
                "planned": before.planned + len(new.slices),
                "ok": before.ok + new.ok,
                "quarantined": len(tables.quarantine),
                "series": len(tables.series),
                "patients": pc.count_distinct(tables.slices["patient_id"]).as_py(),
                "fold_groups": pc.count_distinct(tables.slices["fold_group"]).as_py(),
                "shards": len(tables.shards),
                "bytes": pc.sum(tables.shards["bytes"]).as_py(),
            },
            done={"appended": new.ok, "fold_conflicts": grown.fold_conflicts},
            digests={"sources": shown.sources, "labels": shown.labels},
            keys=keys,
        )

    def _remove_folder(self) -> None:
        """Remove the append's working folder, its state first, and the dataset's if there was none."""
        folder = self.job.folder
        for path in sorted(folder.own_files(), key=lambda path: path != folder.state):
            path.unlink()
        for path in (folder.scan, folder.done, folder.path, self.base.path):
            with contextlib.suppress(OSError):  # it holds something else
                path.rmdir()
