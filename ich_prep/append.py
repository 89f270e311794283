"""Add slices to a finished dataset: list, scan, plan, new shards behind the old ones, then the next generation.

What is there keeps its rows, bytes and folds. The append has a working folder of its own inside the dataset's, so that one
that was killed continues where it was; what it decided there holds for the generation that it began with.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.build_dataset import (
    TASK_MODULES,
    digest_listing,
    drop_stale_headers,
    hash_copies,
    label_file,
    say_broken_archives,
    scan_files,
    write_keys,
    write_plan,
    write_shards,
)
from ich_prep.dataset import native
from ich_prep.dataset.schema import AS_STORED, IMAGES
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.storage import files_below, local_path, write_whole
from ich_prep.dataset.tables import parquet_bytes, read_parquet, write_table
from ich_prep.errors import DatasetError, Reason, SourceError, UsageError, count
from ich_prep.execute import Pool, default_workers
from ich_prep.layouts import LAYOUTS
from ich_prep.layouts.label_keys import choose_key
from ich_prep.layouts.labels import LabelOptions, LabelRules, LabelTable, fill_any
from ich_prep.progress import NoProgress, Progress
from ich_prep.sources import Listing, check_table_path, open_source
from ich_prep.stages import ledger
from ich_prep.stages.checks import Allowances, check_damage, check_labels, check_lost
from ich_prep.stages.generation import Change, changing, is_new_shard, joined_digest, publish_generation
from ich_prep.stages.growth import Grown, grow, known_slices, stacked, without_known
from ich_prep.stages.losses import losses_by_reason
from ich_prep.stages.output import check_output_folder
from ich_prep.stages.plan import Plan, make_plan
from ich_prep.stages.publish import Tables, collect_tables
from ich_prep.stages.rules import apply_rules
from ich_prep.stages.scan import FILES_PER_BATCH
from ich_prep.stages.state import BuildFolder, State, readable_state, write_state
from ich_prep.stages.units import refuse_other_units
from ich_prep.versions import all_versions

if TYPE_CHECKING:
    from ich_prep.dataset.dataset import Dataset
    from ich_prep.layouts import Layout


@dataclass(frozen=True)
class Appended:
    """The result of an append: ``found`` files, of which ``slices`` are new and ok, ``duplicates`` there already.

    ``quarantined`` are the others; ``fold_conflicts`` the groups that the new slices would have merged; ``generation`` the
    new one, None if there was nothing new.
    """

    found: int
    slices: int
    duplicates: int
    quarantined: int
    fold_conflicts: int
    generation: int | None


def append(
    src: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    labels: str | Path | None = None,
    label_options: LabelOptions | None = None,
    build_dir: str | Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
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
    if labels is not None:
        check_table_path(local_path(labels, "--labels"))
    with changing(out, build_dir) as (dataset, base):
        check_output_folder(out, base, sources)
        state = readable_state(base)
        if base.state.exists() and (state is None or not state.belongs_to(dataset.digest)):
            raise UsageError(
                f"The working folder {base.path} is not that of {out} as it is now. Name another one with --build-dir, or "
                "remove it."
            )
        spec = _spec_of(dataset)
        layout = LAYOUTS[spec.layout]
        pool = Pool(
            workers=default_workers() if workers is None else workers, scheduler=scheduler, modules=TASK_MODULES
        )
        with pool:
            listing = source.list()
            given = None if labels is None else label_file(labels, listing)
            rules = LabelRules(spec.classes, allow.contradictions, allow.unlabelled, label_options or LabelOptions())
            table = fill_any(layout.read_labels(listing, given, rules))
            run = _Append(dataset, base, sources, listing, spec, layout, table, allow, progress, pool)
            return run.run()


def _spec_of(dataset: Dataset) -> Spec:
    """Return the spec that the dataset was built with."""
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
    return Spec(**written)


@dataclass(frozen=True)
class _Append:
    """One append to ``dataset``, whose working folder is ``base``."""

    dataset: Dataset
    base: BuildFolder
    sources: Sequence[Path]
    listing: Listing
    spec: Spec
    layout: Layout
    labels: LabelTable
    allow: Allowances
    progress: Progress
    pool: Pool

    @property
    def folder(self) -> BuildFolder:
        return self.base.append

    def run(self) -> Appended:
        """Do what is left of the append."""
        state = self._start_or_resume()
        say_broken_archives(self.listing, self.progress)
        for note in self.labels.notes:
            self.progress.say(f"Labels: {note}.")
        importlib.import_module("zarr")  # loaded while the workers start
        self.pool.check_workers(*self.sources, self.dataset.path, self.folder.path, say=self.progress.say)
        if state.plan is None:
            plan = self._plan()
            if not len(plan.slices):
                return self._nothing_new(plan)
            state = write_plan(self.folder, state, plan)
        assert state.plan is not None
        write_keys(self.folder, self.listing)
        write_shards(
            self.pool,
            self.dataset.path,
            self.folder,
            self.sources,
            state.plan,
            self.progress,
            first=state.first_shard,
        )
        new = collect_tables(self.dataset.path, self.folder, state)
        hint = "Run the same command again if the machine was at fault"
        check_damage(new.quarantine, new.ok, self.allow, hint)
        given_fold = read_parquet(self.folder.plan, ["given_fold"])["given_fold"].to_numpy().astype(np.int64)
        grown = grow(self.dataset, new, given_fold, self.spec)
        self._merge_working_folders(state)
        generation = publish_generation(
            self.dataset, self.base, self._change(new, grown, bool((given_fold >= 0).any()))
        )
        self._remove_folder()
        duplicates = _number(new.quarantine, Reason.DUPLICATE)
        return Appended(
            found=len(self.listing.files),
            slices=new.ok,
            duplicates=duplicates,
            quarantined=len(new.quarantine) - duplicates,
            fold_conflicts=grown.fold_conflicts,
            generation=generation,
        )

    def _start_or_resume(self) -> State:
        """Return the state of the append in progress, or start one; headers of files that did not change are kept."""
        folder, out = self.folder, self.dataset.path
        state = State(
            spec=self.spec,
            sources=digest_listing(self.listing),
            labels=self.labels.digest(),
            versions=all_versions(),
            base=self.dataset.digest,
            first_shard=self.dataset.counts.shards,
        )
        before = readable_state(folder)
        if before is not None and before.model_copy(update={"plan": None}) == state:
            return before
        if before is not None:
            folder.state.unlink()
            drop_stale_headers(folder, self.listing, drop_all=before.versions != state.versions)
        for path in folder.own_files():
            if path.parent != folder.scan or before is None:
                path.unlink()
        for path in files_below(out / IMAGES / "c"):
            if is_new_shard(self.dataset, path):
                path.unlink()
        for path in (folder.scan, folder.done):
            path.mkdir(parents=True, exist_ok=True)
        write_whole(folder.files, parquet_bytes(self.listing.files, row_group_size=FILES_PER_BATCH))
        write_state(folder, state)
        return state

    def _plan(self) -> Plan:
        """Return the plan of the new slices, their rows counted from 0, after the checks of a build."""
        folder, spec, listing = self.folder, self.spec, self.listing
        scanned = apply_rules(scan_files(self.pool, folder, self.sources, listing, self.progress), spec)
        scanned = refuse_other_units(
            scanned, listing.files, folder=folder, sources=self.sources, run=self.pool.map, spec=spec
        )
        labels = choose_key(self.labels, scanned, own_patients=spec.patients == "column")
        known = known_slices(self.dataset)
        image = hash_copies(self.pool, folder, self.sources, scanned, listing, known=known["sop_instance_uid"])
        keyed_by_uid = labels.key == "sop_instance_uid" and len(labels.keys) > 0
        scanned = without_known(scanned, image, known, keyed_by_uid=keyed_by_uid)
        plan = make_plan(
            scanned,
            assignment=self.layout.assign(scanned, listing.name),
            labels=labels,
            spec=spec,
            image=image,
            known=self.dataset.series,
        )
        plan = self._without_labels_of_known(plan, labels)
        for note in (*labels.notes, *plan.notes):
            self.progress.say(f"{note}.")
        write_table(folder.quarantine, plan.quarantine)
        check_damage(
            plan.quarantine, len(plan.slices), self.allow, "Fix what can be fixed and run the same command again"
        )
        check_labels(plan, labels, folder, self.allow, self.progress)
        check_lost(plan.lost, self.allow, self.progress)
        return plan

    def _without_labels_of_known(self, plan: Plan, labels: LabelTable) -> Plan:
        """Return the plan without those lost labels, and labels without an image, that slices of the dataset have."""
        slices, series = self.dataset.slices, self.dataset.series
        key = "patient_id" if labels.key == "subject" else labels.key
        keys = pc.unique(slices[key] if key in slices.column_names else series[key])
        return replace(
            plan,
            without_image=plan.without_image.filter(pc.invert(pc.is_in(plan.without_image, value_set=keys))),
            lost=plan.lost.filter(pc.invert(pc.is_in(plan.lost["key"], value_set=keys))),
        )

    def _nothing_new(self, plan: Plan) -> Appended:
        """Return that there is nothing to append; raises ``SourceError`` unless all slices are there already."""
        duplicates = _number(plan.quarantine, Reason.DUPLICATE)
        if not duplicates:
            reasons = Counter(plan.quarantine["reason"].to_pylist()).most_common()
            raise SourceError(
                f"No CT slices: {count(len(plan.quarantine), 'file')} quarantined: "
                f"{', '.join(f'{number} {reason}' for reason, number in reasons)}. Point --src at axial CT."
            )
        self._remove_folder()
        return Appended(len(self.listing.files), 0, duplicates, len(plan.quarantine) - duplicates, 0, None)

    def _change(self, new: Tables, grown: Grown, given_folds: bool) -> Change:
        tables, before = grown.tables, self.dataset.counts
        digests = {"sources": digest_listing(self.listing), "labels": self.labels.digest()}
        lost: dict[str, Any] = {name: loss.model_dump() for name, loss in self.dataset.root.lost_labels.items()}
        for reason, loss in losses_by_reason(new.lost).items():
            counted = lost.setdefault(reason, {"labels": 0, "positive": 0})
            counted["labels"] += loss.labels
            counted["positive"] += loss.positive
        keys: dict[str, Any] = {"lost_labels": lost, "given_folds": self.dataset.root.given_folds or given_folds}
        if len(self.labels.keys):
            keys["labels_digest"] = joined_digest(self.dataset.root.labels_digest, digests["labels"])
        return Change(
            command="append",
            tables={name: getattr(tables, name) for name in ("slices", "series", "shards", "quarantine")},
            counts={
                "rows": len(tables.slices),
                "found": before.found + len(self.listing.files),
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
            digests=digests,
            keys=keys,
        )

    def _merge_working_folders(self, state: State) -> None:
        """Bring the plan and the ledger of the append into the dataset's working folder, if there is one.

        Until the next generation is published they still describe this one: its rows and shards come first.
        """
        base, folder = self.base, self.folder
        of_base = readable_state(base)
        if of_base is None or not of_base.belongs_to(self.dataset.digest) or not base.plan.exists():
            return
        per_shard = self.spec.slices_per_shard
        first_row = state.first_shard * per_shard
        plan, new = read_parquet(base.plan), read_parquet(folder.plan)
        if len(plan) < len(self.dataset):
            return
        plan = plan.slice(0, len(self.dataset))
        holes = pa.table({"row": np.arange(len(self.dataset), first_row)})
        new = new.set_column(new.schema.get_field_index("row"), "row", pc.add(new["row"], first_row))
        merged = stacked(plan, holes, new)
        write_whole(base.plan, parquet_bytes(merged, row_group_size=per_shard, write_statistics=False))
        for shard in sorted(ledger.done(folder.done)):
            ledger.record(base.done, shard, ledger.read(folder.done, shard))

    def _remove_folder(self) -> None:
        """Remove the append's working folder, its state first, and the dataset's if there was none."""
        folder = self.folder
        for path in sorted(folder.own_files(), key=lambda path: path != folder.state):
            path.unlink()
        for path in (folder.scan, folder.done, folder.path, self.base.path):
            with contextlib.suppress(OSError):  # it holds something else
                path.rmdir()


def _number(quarantine: pa.Table, reason: Reason) -> int:
    number: int = pc.sum(pc.equal(quarantine["reason"], str(reason))).as_py() or 0
    return number
