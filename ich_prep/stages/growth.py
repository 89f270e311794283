"""A dataset and the tables of what is added to it -> the tables of both. Tables in, tables out.

Rows, bytes, labels and folds of the slices that are there already stay; what is new comes behind them, from a shard of its
own on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.components import codes_of, connect
from ich_prep.dataset.schema import OK, QUARANTINE_SCHEMA, SHARD_SCHEMA, UNUSED
from ich_prep.dataset.tables import stacked, with_columns
from ich_prep.errors import Reason
from ich_prep.stages import identity
from ich_prep.stages.copies import content_hash_in
from ich_prep.stages.flags import flag_lists, flags_in, with_flags
from ich_prep.stages.images import BLANK_HU, equal_images
from ich_prep.stages.patients import persons_of
from ich_prep.stages.pseudonyms import hidden
from ich_prep.stages.publish import Tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset
    from ich_prep.dataset.spec import Spec

FOLD_CONFLICT, VOLUME_CONTINUED, SOP_UID_SHARED, SAME_IMAGE = (
    "fold_conflict", "volume_continued", "sop_uid_shared", "same_image",
)  # fmt: skip
_IS_QUARANTINED = "quarantined in the dataset already: "
_IS_THERE = "of the dataset has the same SOP Instance UID"


# --- before the pixels are written: what is there already ---------------------------------------------------------------


def known_slices(dataset: Dataset) -> pa.Table:
    """Return the slices of a dataset that files may be copies of: row, UID and image hash.

    Also those that were withdrawn, which must not return, and, without a hash, those whose pixels did not decode.
    """
    columns = dataset.slices.select(["row", "sop_instance_uid", "content_hash"])
    return columns.filter(pc.not_equal(dataset.slices["status"], UNUSED))


def without_known(scanned: pa.Table, image: pa.Array, known: pa.Table, *, keyed_by_uid: bool) -> pa.Table:
    """Return ``scanned`` with a reason for each file whose SOP Instance UID one of the ``known`` slices has.

    ``image`` are the hashes of their images (``copies.hash_images``), null where a file does not decode. The same image is
    a duplicate. Another one stays, unless labels are ``keyed_by_uid``: then no label can be assigned to it. The file of a
    slice that did not decode is a duplicate until it does.
    """
    row_of: dict[str, tuple[int, set[str | None]]] = {}
    shared = known.filter(pc.is_in(known["sop_instance_uid"], value_set=scanned["sop_instance_uid"]))
    for line in shared.to_pylist():
        row_of.setdefault(line["sop_instance_uid"], (line["row"], set()))[1].add(line["content_hash"])
    if not row_of:
        return scanned
    reasons, details = scanned["reason"].to_pylist(), scanned["detail"].to_pylist()
    found = pc.is_in(scanned["sop_instance_uid"], value_set=pa.array(list(row_of), pa.string())).to_numpy()
    uids, hashes = scanned["sop_instance_uid"], image
    for index in np.flatnonzero(found & pc.is_null(scanned["reason"]).to_numpy()).tolist():
        row, images = row_of[uids[index].as_py()]
        value = hashes[index].as_py()
        if value is None or content_hash_in(value) in images:
            reasons[index] = str(Reason.DUPLICATE)
            details[index] = f"row {row} {_IS_THERE}"
        elif keyed_by_uid and images != {None}:
            reasons[index] = str(Reason.SOP_CONFLICT)
            details[index] = f"another image has its SOP Instance UID: row {row} of the dataset"
    return with_columns(scanned, {"reason": reasons, "detail": details})


def without_quarantined(scanned: pa.Table, before: pa.Table, key: bytes | None) -> pa.Table:
    """Return ``scanned`` where a damaged file that the dataset has quarantined already is a duplicate.

    ``before`` is the quarantine table, with pseudonyms by the ``key``. A file is there already if one of its path was
    quarantined for its reason with the same detail.
    """
    damage = pa.array([str(reason) for reason in Reason if reason.is_damage])
    lines = np.flatnonzero(pc.is_in(scanned["reason"], value_set=damage).to_numpy())
    repeated = _are_in(before, scanned.select(["path", "reason", "detail"]).take(pa.array(lines)), key)
    if not repeated.any():
        return scanned
    found = np.zeros(len(scanned), bool)
    found[lines] = repeated
    texts = pc.binary_join_element_wise(_IS_QUARANTINED, scanned["reason"], "")
    changed = {"reason": str(Reason.DUPLICATE), "detail": texts}
    return with_columns(
        scanned, {name: pc.if_else(pa.array(found), new, scanned[name]) for name, new in changed.items()}
    )


def without_lost(lost: pa.Table, quarantine: pa.Table, before: pa.Table, key: bytes | None) -> pa.Table:
    """Return the ``lost`` labels but for those of files that the dataset has quarantined already.

    ``quarantine`` is that of the new plan, ``before`` that of the dataset, with pseudonyms by the ``key``.
    """
    known = _are_in(before, quarantine, key)
    known |= pc.starts_with(quarantine["detail"], _IS_QUARANTINED).fill_null(False).to_numpy()
    paths = quarantine["path"].filter(pa.array(known)).combine_chunks()
    return lost.filter(pc.invert(pc.is_in(lost["path"], value_set=paths)))


def _are_in(before: pa.Table, files: pa.Table, key: bytes | None) -> NDArray[np.bool_]:
    """Return which of the quarantined ``files`` the published quarantine ``before`` has: path, reason and detail."""
    shown = files if key is None else with_columns(files, hidden(files, key))
    texts = [
        pc.binary_join_element_wise(*(pc.fill_null(table[name], "") for name in ("path", "reason", "detail")), "\0")
        for table in (shown, before)
    ]
    found: NDArray[np.bool_] = pc.is_in(texts[0], value_set=texts[1].combine_chunks()).to_numpy()
    return found


def number_there(quarantine: pa.Table) -> int:
    """Return how many files of an append's quarantine table are duplicates of slices that the dataset has."""
    lines = quarantine.filter(pc.equal(quarantine["reason"], str(Reason.DUPLICATE)))
    return pc.sum(pc.ends_with(lines["detail"], _IS_THERE)).as_py() or 0


def content_hashes(image: pa.Array) -> pa.Array:
    """Return of image hashes (``copies.hash_images``) the part that the slice table has, null for null."""
    return pa.array([None if value is None else content_hash_in(value) for value in image.to_pylist()], pa.string())


# --- afterwards: the tables of both --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grown:
    """The tables of a dataset after an append, and how many groups of patients the new slices would have merged."""

    tables: Tables
    fold_conflicts: int


def grow(
    dataset: Dataset, new: Tables, given_fold: NDArray[np.int64], patient_id: pa.ChunkedArray, spec: Spec
) -> Grown:
    """Return the tables of ``dataset`` and behind them the ``new`` ones, whose rows, series and shards count from 0.

    ``given_fold`` (n,) is the fold that a label table gives each new slice, -1 where it gives none; ``patient_id`` (n,)
    the patients that folds are drawn by: the tables may have pseudonyms. The new slices start in a new shard; rows between
    are unused. Slices that may be of a patient who is there already get the patient's fold group
    and fold. Groups that the new slices would merge keep their folds, and all their slices get the flag ``fold_conflict``.
    """
    first_row = dataset.counts.shards * dataset.spec.slices_per_shard
    n_series = dataset.counts.series
    old_slices, old_series = dataset.slices, dataset.series
    new_slices = _shifted(new.slices, row=first_row, series_row=n_series)
    new_series = _shifted(new.series, series_row=n_series, first_row=first_row)
    new_series, continued = _continued(old_series, new_series)
    new_slices = _flagged(
        new_slices, np.isin(new_slices["series_row"].to_numpy(), n_series + continued), VOLUME_CONTINUED
    )

    drawing = _Drawing(given_fold, patient_id, spec.folds)
    joined = _join_groups(old_slices, old_series, new_slices, new_series, drawing, spec)
    fold = pa.array(joined.fold, pa.int8(), mask=joined.fold < 0)
    new_slices = with_columns(new_slices, {"fold_group": joined.fold_group, "fold": fold})
    holes = _holes(first_row - len(dataset), start=len(dataset), schema=new_slices.schema)
    slices = stacked(old_slices, holes, new_slices)
    conflict = np.concatenate([joined.old_conflict, np.zeros(len(holes), bool), joined.new_conflict])
    uids = codes_of(slices["sop_instance_uid"])
    shared = (uids >= 0) & np.isin(uids, uids[: len(dataset)]) & np.isin(uids, uids[first_row:])
    for flag, where in ((FOLD_CONFLICT, conflict), (SOP_UID_SHARED, shared), (SAME_IMAGE, equal_images(slices) >= 0)):
        slices = _flagged(slices, where, flag)
    series = stacked(old_series, new_series)
    first = slices.select(["fold", "fold_group"]).take(series["first_row"])
    series = with_columns(series, {name: first[name] for name in first.column_names})
    shards = _shifted(new.shards, shard=dataset.counts.shards, first_row=first_row)
    old_shards = dataset.read_table("shards")
    old_shards = with_columns(old_shards, {"n_rows": np.full(len(old_shards), dataset.spec.slices_per_shard)})
    quarantine = [dataset.read_table("quarantine"), _shifted(new.quarantine, row=first_row)]
    tables = Tables(
        slices=slices,
        series=_with_flags_of(series, slices),
        shards=pa.concat_tables([old_shards.select(SHARD_SCHEMA.names), shards]),
        quarantine=pa.concat_tables([table.select(QUARANTINE_SCHEMA.names) for table in quarantine]),
        lost=new.lost,
    )
    return Grown(tables, joined.conflicts)


def _shifted(table: pa.Table, **by: int) -> pa.Table:
    return with_columns(table, {name: pc.add(table[name], offset) for name, offset in by.items()})


def _continued(old: pa.Table, new: pa.Table) -> tuple[pa.Table, NDArray[np.int64]]:
    """Return the ``new`` series table, its volumes counted behind the old ones of their series; and which have some."""
    volumes: dict[str, int] = {}
    for uid, number in zip(
        *(old[name].to_pylist() for name in ("series_instance_uid", "volume_in_series")), strict=True
    ):
        volumes[uid] = max(volumes.get(uid, 0), 1 + (number or 0))
    before = np.array([volumes.get(uid, 0) for uid in new["series_instance_uid"].to_pylist()], np.int64)
    numbers = pc.add(new["volume_in_series"], pa.array(before, pa.int32()))
    return with_columns(new, {"volume_in_series": numbers}), np.flatnonzero(before)


def _flagged(slices: pa.Table, where: NDArray[np.bool_], flag: str) -> pa.Table:
    """Return the slices with one more flag where they do not have it yet."""
    return with_columns(slices, {"flags": with_flags(slices["flags"], {flag: where})})


def _with_flags_of(series: pa.Table, slices: pa.Table) -> pa.Table:
    """Return the series table with the flags of its slices."""
    volumes, words = flags_in(series["flags"])
    lines, words_of_slices = flags_in(slices["flags"])
    owners = slices["series_row"].fill_null(-1).to_numpy()[lines]
    united = flag_lists(
        np.concatenate([volumes, owners[owners >= 0]]),
        pa.concat_arrays([words, words_of_slices.filter(pa.array(owners >= 0))]),
        count=len(series),
    )
    return with_columns(series, {"flags": united})


def _holes(number: int, *, start: int, schema: pa.Schema) -> pa.Table:
    """Return lines for ``number`` rows from ``start`` on that belong to no slice."""
    columns = {
        "row": pa.array(np.arange(start, start + number)),
        "status": pa.array([UNUSED] * number, pa.string()),
        "label_level": pa.array(["none"] * number, pa.string()),
        "repairs": pa.array([[]] * number, pa.list_(pa.string())),
        "flags": pa.array([[]] * number, pa.list_(pa.string())),
    }
    return pa.table([columns.get(field.name, pa.nulls(number, field.type)) for field in schema], schema=schema)


@dataclass(frozen=True)
class _Joined:
    """The ``fold_group`` and ``fold`` (-1: none) of each new slice; which slices are of groups that would be merged."""

    fold_group: pa.Array
    fold: NDArray[np.int64]
    old_conflict: NDArray[np.bool_]
    new_conflict: NDArray[np.bool_]
    conflicts: int


@dataclass(frozen=True)
class _Drawing:
    """What gives a new slice its fold where its group has none: the one ``given``, -1 for none, or its patient's hash."""

    given: NDArray[np.int64]
    patient_id: pa.ChunkedArray
    folds: int

    def folds_of(self, group: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the fold of each new slice (n,), of which ``group`` are the codes of the groups."""
        drawn = identity.folds_of_groups(pa.array(group).cast(pa.string()), self.patient_id, folds=self.folds)
        return np.where(self.given >= 0, self.given, drawn)


def _join_groups(
    old_slices: pa.Table,
    old_series: pa.Table,
    new_slices: pa.Table,
    new_series: pa.Table,
    drawing: _Drawing,
    spec: Spec,
) -> _Joined:
    names = pa.concat_arrays([_names(old_slices), _names(new_slices)])
    group = codes_of(names)  # of each slice, -1 in a row of no slice
    ranked = names.dictionary_encode().dictionary
    ranked = ranked.take(pc.sort_indices(ranked))
    own = len(old_slices)
    links = _links(old_slices, old_series, new_slices, new_series, spec)
    inside = np.flatnonzero(group >= 0)
    component = np.full(len(group), -1)
    component[inside] = connect(group[inside], [codes[inside] for codes in links.values()])
    mine = component[own:]  # of the new slices

    pairs = np.unique(np.stack([component[:own], group[:own]], axis=1)[group[:own] >= 0], axis=0)
    old_groups = np.bincount(pairs[:, 0], minlength=int(component.max(initial=-1)) + 1)
    joins = old_groups[mine] > 0
    merged = (old_groups > 1) & np.isin(np.arange(len(old_groups)), mine)
    chosen = np.where(joins, _chosen_groups(group, component, pairs, links, own)[group[own:]], group[own:])

    fold_of_group = _folds_of(group[:own], old_slices, len(ranked))
    known = fold_of_group[chosen]
    planned = new_slices["fold"].fill_null(-1).to_numpy().astype(np.int64)
    fold = np.where(joins, np.where(known >= 0, known, drawing.folds_of(chosen)), planned)
    in_test = pc.equal(new_slices["subset"], "test").to_numpy()
    overruled = joins & ~in_test & (drawing.given >= 0) & (known >= 0) & (drawing.given != known)
    return _Joined(
        fold_group=ranked.take(pa.array(chosen)),
        fold=np.where(in_test, -1, fold),
        old_conflict=(group[:own] >= 0) & merged[component[:own]],
        new_conflict=merged[mine] | overruled,
        conflicts=len(np.unique(mine[merged[mine] | overruled])),
    )


def _chosen_groups(
    group: NDArray[np.int64],
    component: NDArray[np.int64],
    pairs: NDArray[np.int64],
    links: dict[str, NDArray[np.int64]],
    own: int,
) -> NDArray[np.int64]:
    """Return for each new group, by its code, the old one it joins: of its patient, else its study, series or image.

    A group that is linked to old ones through other new slices only joins the first of its component. ``pairs`` (m, 2) are
    the components and their old groups; the slices from ``own`` on are new.
    """
    none = np.iinfo(np.int64).max
    least = np.full(int(component.max(initial=-1)) + 2, none)
    np.minimum.at(least, pairs[:, 0], pairs[:, 1])
    chosen = np.full(int(group.max(initial=-1)) + 1, none)
    chosen[group[own:]] = least[component[own:]]
    for codes in reversed(list(links.values())):  # the patient decides last
        old = np.flatnonzero((codes[:own] >= 0) & (group[:own] >= 0))
        of_value = np.full(int(codes.max(initial=-1)) + 2, none)  # -1 selects the last, which no slice has
        np.minimum.at(of_value, codes[old], group[old])
        found = np.full(len(chosen), none)
        np.minimum.at(found, group[own:], of_value[codes[own:]])
        chosen = np.where(found < none, found, chosen)
    return chosen


def _names(slices: pa.Table) -> pa.Array:
    patients = slices["patient_id"]
    names = pc.coalesce(slices["fold_group"], patients) if "fold_group" in slices.column_names else patients
    return names.combine_chunks() if isinstance(names, pa.ChunkedArray) else names


def _folds_of(group: NDArray[np.int64], slices: pa.Table, number: int) -> NDArray[np.int64]:
    """Return the fold of each of that ``number`` of groups in the old slices, -1 where none of them has one."""
    fold = slices["fold"].fill_null(-1).to_numpy().astype(np.int64)
    folds = np.full(number, -1)
    known = (group >= 0) & (fold >= 0)
    np.maximum.at(folds, group[known], fold[known])
    return folds


def _links(
    old_slices: pa.Table, old_series: pa.Table, new_slices: pa.Table, new_series: pa.Table, spec: Spec
) -> dict[str, NDArray[np.int64]]:
    """Return the codes, of the old slices and then of the new ones, of each value that links slices; -1 for none."""
    owner = np.concatenate(
        [table["series_row"].fill_null(-1).to_numpy().astype(np.int64) for table in (old_slices, new_slices)]
    )
    volumes = stacked(
        *(table.select(["patient_id", "study_instance_uid", "series_instance_uid", "fold_group", "flags"])
          for table in (old_series, new_series))
    )  # fmt: skip
    values = {
        "patient": persons_of(volumes),
        "study": identity.usable(volumes["study_instance_uid"]),
        "series": volumes["series_instance_uid"],
    }
    links = {name: np.r_[codes_of(column), -1][owner] for name, column in values.items() if name in spec.link}
    if "image" in spec.link:
        both = stacked(
            *(table.select(["content_hash", "hu_max", "hu_min", "status"]) for table in (old_slices, new_slices))
        )
        high, low = (both[name].fill_null(np.nan).to_numpy() for name in ("hu_max", "hu_min"))
        shown = pc.equal(both["status"], OK).to_numpy() & ~((high < BLANK_HU) | (high == low))
        links["image"] = np.where(shown, equal_images(both), -1)
    return links
