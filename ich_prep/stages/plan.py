"""Headers + labels + spec -> the plan: which row each slice gets, before any pixel is decoded.

Tables in, tables out. Equal inputs give equal plans, in whatever order the files were listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.components import codes_of
from ich_prep.dataset.schema import QUARANTINE_SCHEMA
from ich_prep.dataset.tables import give_back_memory, with_columns
from ich_prep.errors import Reason, count
from ich_prep.layouts.label_keys import patients_of_table
from ich_prep.layouts.labels import LabelTable, join_labels
from ich_prep.stages import identity
from ich_prep.stages.copies import settle
from ich_prep.stages.geometry import SliceOrder, group_starts, order_slices, slice_turns
from ich_prep.stages.losses import lost_labels
from ich_prep.stages.patients import IDENTIFIERS, Copied, Given, with_identities
from ich_prep.stages.plan_tables import CARRIED, build_tables, matrix, nullable
from ich_prep.stages.scan_words import with_scan_words
from ich_prep.stages.selection import select
from ich_prep.stages.volumes import overlapping_groups

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.spec import Spec
    from ich_prep.layouts.assignment import Assignment


@dataclass(frozen=True)
class Plan:
    """``slices``: the slice table before any pixel is decoded, and ``PLAN_COLUMNS``; ``series``; ``quarantine`` so far.

    ``without_image`` are the keys of labels without a file, ``lost`` the labels whose images all left (``LOST_SCHEMA``),
    ``unlabelled`` the SOP Instance UIDs of training slices without a label, ``notes`` sentences for the user.
    """

    slices: pa.Table
    series: pa.Table
    quarantine: pa.Table
    without_image: pa.Array
    lost: pa.Table
    unlabelled: pa.Array
    notes: tuple[str, ...]


def make_plan(
    scanned: pa.Table,
    *,
    assignment: Assignment,
    labels: LabelTable,
    spec: Spec,
    image: pa.Array | None = None,
    known: pa.Table | None = None,
) -> Plan:
    """Return the plan of the files in ``scanned`` (``scan.SCHEMA``, sorted by path).

    ``assignment`` is the layout's, with one value per line of ``scanned``; ``image`` are the image hashes of slices that
    share a SOP Instance UID, one per line (see ``copies.hash_images``); ``known`` is the series table of the dataset that
    they are added to. Raises ``BuildError`` if one fold group
    would have most of the studies.
    """
    if image is None:
        image = pa.nulls(len(scanned), pa.string())
    placed = select(with_scan_words(_with_assignment(scanned, assignment).append_column("image", image)), spec)
    del scanned
    is_slice = pc.is_null(placed["reason"]).to_numpy()
    left, accepted = placed.filter(pa.array(~is_slice)), np.flatnonzero(is_slice)
    slices = _chosen(
        placed.select([name for name in placed.column_names if name in (*_DECIDING, labels.key)]), is_slice
    )

    keyed_by_uid = labels.key == "sop_instance_uid" and len(labels.keys) > 0
    copies = settle(slices, slices["image"].combine_chunks(), keyed_by_uid=keyed_by_uid)
    leaves = pc.is_valid(copies.reason)
    settled = {"reason": copies.reason.filter(leaves), "detail": copies.detail.filter(leaves)}
    stays = pc.invert(leaves).to_numpy(zero_copy_only=False)
    copied = with_columns(placed.take(pa.array(accepted[~stays])), settled)
    left = pa.concat_tables([left, copied])
    lines = np.flatnonzero(copies.copy_of >= 0)
    remaining = np.cumsum(stays) - 1
    twins = Copied(slices.select(IDENTIFIERS).take(pa.array(lines)), remaining[copies.copy_of[lines]])
    slices = slices.append_column("line", pa.array(accepted)).append_column("sop_uid_shared", pa.array(copies.shared))
    slices = _chosen(slices.drop_columns(["path", "image"]), stays)

    slices = slices.append_column("label_key", _label_keys(labels, slices))
    give_back_memory()
    slices, notes = with_identities(slices, _given(labels, slices["label_key"], spec), spec, twins, known)
    slices, orientation = _sort_slices(_with_acquisitions(slices), upright=spec.orientation == "patient")
    give_back_memory()
    for name in sorted(CARRIED & {*placed.column_names} - {*slices.column_names}):
        slices = slices.append_column(name, placed[name].take(slices["line"]))
    del placed
    give_back_memory()
    joined = join_labels(labels, slices["label_key"])
    tables = build_tables(slices, orientation, labels, joined, spec)
    lost = lost_labels(labels, joined.without_image, _images_of(left, labels))
    train = pc.equal(slices["subset"], "train")
    return Plan(
        slices=tables.slices,
        series=tables.series,
        quarantine=_quarantine(left).sort_by("path"),
        without_image=joined.without_image.filter(pc.invert(pc.is_in(joined.without_image, value_set=lost["key"]))),
        lost=lost,
        unlabelled=slices["sop_instance_uid"].filter(pc.and_(train, pa.array(joined.unlabelled))).combine_chunks(),
        notes=(*notes, *_notes_of_planes(left, slices)),
    )


def _chosen(slices: pa.Table, which: NDArray[np.bool_]) -> pa.Table:
    """Return the lines of ``slices`` where ``which`` (n,) is true; no copy if that is everywhere."""
    return slices if which.all() else slices.filter(pa.array(which))


_PLAN_REASONS = frozenset(
    map(str, (Reason.SCAN_TYPE, Reason.FILTERED, Reason.DUPLICATE, Reason.SOP_CONFLICT))
)  # what the scan of a header alone cannot tell
# Attributes of which the first that divides a series names its acquisitions.
ACQUISITIONS = {
    "acquisition_number": "AcquisitionNumber",
    "temporal_position_identifier": "TemporalPositionIdentifier",
    "acquisition_time": "AcquisitionTime",
}


# Columns that decide which slices there are, whose they are and in what order; the others are taken in that order.
_DECIDING = frozenset(
    (*IDENTIFIERS, *ACQUISITIONS, "sop_instance_uid", "instance_number", "position", "orientation", "slice_location")
    + ("patient_sex", "patient_birth_date", "subset", "path", "image")
)


_ONLY_ORDER = frozenset(
    (*ACQUISITIONS, "instance_number", "position", "orientation", "slice_location", "issuer_of_patient_id")
    + ("assigned_patient", "patient_sex", "patient_birth_date")
)


def _with_assignment(scanned: pa.Table, assignment: Assignment) -> pa.Table:
    """Return ``scanned`` with the layout's columns; the assigned patient is the column ``assigned_patient``.

    Slices that the layout excludes have the reason SCAN_TYPE.
    """
    excluded = pc.and_(pc.is_null(scanned["reason"]), pc.is_valid(assignment.excluded_because))
    reason = pc.if_else(excluded, str(Reason.SCAN_TYPE), scanned["reason"])
    detail = pc.if_else(excluded, assignment.excluded_because, scanned["detail"])
    return (
        with_columns(scanned, {"reason": reason, "detail": detail})
        .append_column("subset", assignment.subset)
        .append_column("assigned_patient", assignment.patient_id)
        .append_column("subject", assignment.subject)
        .append_column("repairs", assignment.repairs)
    )


def _given(labels: LabelTable, keys: pa.ChunkedArray, spec: Spec) -> Given:
    """Return what the label table says about slices with these label ``keys`` beside their labels."""
    joined = join_labels(labels, keys)
    patient = patients_of_table(labels, keys) if spec.patients == "column" else None
    return Given(joined.subset, joined.fold, patient)


def _notes_of_planes(left: pa.Table, slices: pa.Table) -> Iterator[str]:
    """Yield a note if there are series of which all slices lie in another plane than the axial one."""
    tilted = left.filter(pc.equal(left["reason"], str(Reason.NOT_AXIAL)))
    whole = tilted.filter(pc.invert(pc.is_in(tilted["series_instance_uid"], slices["series_instance_uid"])))
    if len(whole):
        number = len(whole["series_instance_uid"].unique())
        yield f"{count(number, 'series', 'series')} without an axial slice (not_axial), for example {whole['path'][0]}"


def _quarantine(files: pa.Table) -> pa.Table:
    stages = ["plan" if reason in _PLAN_REASONS else "scan" for reason in files["reason"].to_pylist()]
    columns = [
        files["path"],
        pa.array(stages, pa.string()),
        pa.nulls(len(files), pa.int64()),
        files["reason"],
        files["detail"],
    ]
    return pa.table(columns, schema=QUARANTINE_SCHEMA)


def _images_of(left: pa.Table, labels: LabelTable) -> pa.Table:
    """Return the label key, reason and path of each file without a row.

    A file whose header has no SOP Instance UID may still have it as its name.
    """
    keys = _label_keys(labels, left)
    if labels.key == "sop_instance_uid":
        names = [path.rsplit("/", 1)[-1].removesuffix(".dcm").strip() for path in left["path"].to_pylist()]
        keys = pc.coalesce(keys, pa.array(names, pa.string()))
    return pa.table({"key": keys, "reason": left["reason"], "path": left["path"]})


def _label_keys(labels: LabelTable, slices: pa.Table) -> pa.ChunkedArray | pa.Array:
    """Return each slice's own key of the kind that the labels have, null where its header has none."""
    return slices[labels.key] if labels.key in slices.column_names else pa.nulls(len(slices), pa.string())


def _with_acquisitions(slices: pa.Table) -> pa.Table:
    """Return the slices with volumes that are divided by acquisition, as ``overlapping_groups`` says.

    Adds ``acquisition``, what separates a volume from the others of its series, as text: null if nothing does.
    """
    volume = slices["volume"].to_numpy()
    keys = [_codes(slices[name]) for name in ACQUISITIONS]
    if not any((codes >= 0).any() for codes in keys):
        return slices.append_column("acquisition", pa.nulls(len(slices), pa.string()))
    position_mm = _order(slices, foot_to_head=False, by_number=False).order_mm
    split = overlapping_groups(position_mm, volume, keys)
    texts: list[str | None] = [None] * len(slices)
    for number, (column, keyword) in enumerate(ACQUISITIONS.items()):
        value_of: dict[int, str] = {}
        codes, values = keys[number], slices[column]
        for index in np.flatnonzero(split.attribute == number).tolist():
            key = int(split.key[index])
            if key not in value_of:
                known = np.flatnonzero(codes == key)
                value_of[key] = f"{keyword} {values[int(known[0])].as_py()}" if len(known) else f"no {keyword}"
            texts[index] = value_of[key]
    joined = pa.array(identity.join(volume, split.volume))
    return with_columns(slices, {"volume": joined, "acquisition": pa.array(texts, pa.string())})


def _codes(values: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the rank of each value among the distinct ones, (n,), -1 for null; of numbers by size, of text as it sorts."""
    if pa.types.is_string(values.type):
        return codes_of(values)
    known = values.is_valid().to_numpy()
    codes = np.full(len(values), -1, np.int64)
    codes[known] = np.unique(values.drop_null().to_numpy(), return_inverse=True)[1]
    return codes


def _order(slices: pa.Table, *, foot_to_head: bool, by_number: bool = True) -> SliceOrder:
    """Return the order of the slices; unless ``by_number``, one slice without a position takes it from no other."""
    numbers = (_codes(slices[name]) for name in ("instance_number", "acquisition_number"))
    # Ranks: as float64, numbers beyond 2**53, such as time stamps, would no longer be distinct.
    instance_number, acquisition_number = (np.where(codes < 0, np.nan, codes) for codes in numbers)
    if not by_number:
        instance_number = np.full(len(slices), np.nan)
    return order_slices(
        matrix(slices["position"], 3),
        matrix(slices["orientation"], 6),
        instance_number,
        series=slices["volume"].to_numpy(),
        uid=codes_of(slices["sop_instance_uid"]),
        acquisition_number=acquisition_number,
        slice_location=slices["slice_location"].fill_null(np.nan).to_numpy(),
        foot_to_head=foot_to_head,
    )


def _sort_slices(slices: pa.Table, *, upright: bool) -> tuple[pa.Table, pa.ChunkedArray]:
    """Return the slices in the order of their rows: by subset, volume and position, as ``order_slices`` says.

    Adds ``position_mm``, ``order_mm``, ``turn``, ``other_orientation``, ``no_position`` and ``direction_unknown``; what only
    the order needs is left out. And the orientation of each volume's reference slice. ``upright``: slices from foot to
    head, each turned upright.
    """
    result = _order(slices, foot_to_head=upright)
    turns = np.full(len(slices), "")
    if upright:
        turns = slice_turns(matrix(slices["orientation"], 6), result.reference)
    columns = {
        "position_mm": nullable(result.position_mm),
        "order_mm": nullable(result.order_mm),
        "turn": pa.array(turns, pa.string(), mask=turns == ""),
        "other_orientation": pa.array(result.other_orientation),
        "no_position": pa.array(result.no_position),
        "direction_unknown": pa.array(result.direction_unknown),
    }
    starts = group_starts(slices["volume"].to_numpy()[result.order])
    references = result.reference[result.order[starts]]
    orientation = slices["orientation"].take(pa.array(references, mask=references < 0))
    slices = slices.drop_columns([name for name in slices.column_names if name in _ONLY_ORDER])
    for name, values in columns.items():
        slices = slices.append_column(name, values)
    return slices.take(pa.array(result.order)), orientation
