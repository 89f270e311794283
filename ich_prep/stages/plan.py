"""Headers + labels + spec -> the plan: which row each slice gets, before any pixel is decoded.

Tables in, tables out. Equal inputs give equal plans, in whatever order the files were listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.schema import QUARANTINE_SCHEMA
from ich_prep.errors import Reason
from ich_prep.layouts.labels import LabelTable, join_labels
from ich_prep.stages import identity
from ich_prep.stages.copies import settle
from ich_prep.stages.geometry import order_slices
from ich_prep.stages.losses import lost_labels
from ich_prep.stages.plan_tables import build_tables, constant, matrix, nullable

if TYPE_CHECKING:
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
    scanned: pa.Table, *, assignment: Assignment, labels: LabelTable, spec: Spec, image: pa.Array | None = None
) -> Plan:
    """Return the plan of the files in ``scanned`` (``scan.SCHEMA``, sorted by path).

    ``assignment`` is the layout's, with one value per line of ``scanned``; ``image`` are the image hashes of slices that
    share a SOP Instance UID, one per line (see ``copies.hash_images``). Raises ``BuildError`` if one fold group
    would have most of the studies.
    """
    if image is None:
        image = pa.nulls(len(scanned), pa.string())
    placed = _with_assignment(scanned, assignment).append_column("image", image)
    is_slice = pc.is_null(placed["reason"])
    refused, slices = placed.filter(pc.invert(is_slice)), placed.filter(is_slice)

    has_reason = pc.is_valid(slices["excluded_because"])
    excluded, slices = slices.filter(has_reason), slices.filter(pc.invert(has_reason))
    excluded = _with_reason(excluded, constant(len(excluded), str(Reason.SCAN_TYPE)), excluded["excluded_because"])
    copies = settle(
        slices, slices["image"].combine_chunks(), keyed_by_uid=labels.key == "sop_instance_uid" and len(labels.keys) > 0
    )
    leaves = pc.is_valid(copies.reason)
    copied = _with_reason(slices.filter(leaves), copies.reason.filter(leaves), copies.detail.filter(leaves))
    slices = slices.append_column("sop_uid_shared", pa.array(copies.shared)).filter(pc.invert(leaves))

    slices, notes = _with_identities(slices, spec)
    slices = _sort_slices(slices)
    joined = join_labels(labels, _label_keys(labels, slices))
    tables = build_tables(slices, labels, joined, spec)
    left = pa.concat_tables([refused, excluded, copied])
    lost = lost_labels(labels, joined.without_image, _images_of(left, labels))
    train = pc.equal(slices["subset"], "train")
    return Plan(
        slices=tables.slices,
        series=tables.series,
        quarantine=_quarantine(left).sort_by("path"),
        without_image=joined.without_image.filter(pc.invert(pc.is_in(joined.without_image, value_set=lost["key"]))),
        lost=lost,
        unlabelled=slices["sop_instance_uid"].filter(pc.and_(train, pa.array(joined.unlabelled))).combine_chunks(),
        notes=notes,
    )


_PLAN_REASONS = frozenset(map(str, (Reason.SCAN_TYPE, Reason.DUPLICATE, Reason.SOP_CONFLICT)))


def _with_assignment(scanned: pa.Table, assignment: Assignment) -> pa.Table:
    """Return ``scanned`` with the layout's columns; the assigned patient is the column ``assigned_patient``."""
    return (
        scanned.append_column("subset", assignment.subset)
        .append_column("assigned_patient", assignment.patient_id)
        .append_column("subject", assignment.subject)
        .append_column("repairs", assignment.repairs)
        .append_column("excluded_because", assignment.excluded_because)
    )


def _with_reason(files: pa.Table, reason: pa.Array | pa.ChunkedArray, detail: pa.Array | pa.ChunkedArray) -> pa.Table:
    for name, values in (("reason", reason), ("detail", detail)):
        files = files.set_column(files.column_names.index(name), files.schema.field(name), values)
    return files


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


def _with_identities(slices: pa.Table, spec: Spec) -> tuple[pa.Table, tuple[str, ...]]:
    """Return the slices with their patient, volume and fold group, and notes for the user.

    Adds ``patient`` (the study or else the series stands in for a missing patient id), ``unnamed_patient``,
    ``patient_conflict``, ``volume``, ``series_uid_shared`` and ``fold_group``. Raises ``BuildError`` as
    ``identity.check_group_sizes``.
    """
    patient_id = identity.usable(slices["assigned_patient"])
    if spec.patients == "study":
        patient_id = pa.nulls(len(slices), pa.string())
    study_uid = identity.usable(slices["study_instance_uid"])
    series = identity.codes_of(slices["series_instance_uid"])
    study = identity.codes_of(study_uid)
    by_subset = series + identity.codes_of(slices["subset"]) * (len(slices) + 1)
    by_subset = np.unique(by_subset, return_inverse=True)[1].reshape(-1)
    issuer = slices["issuer_of_patient_id"]
    person = identity.codes_of(identity.with_issuer(patient_id, issuer))
    unit = identity.study_units(by_subset, study, person)
    notes, common = [], identity.too_common(person, unit)
    for code in common:
        value = patient_id[int(np.argmax(person == code))].as_py()
        studies = len(np.unique(unit[person == code]))
        notes.append(
            f"PatientID {value!r} is on {studies:,} of {len(np.unique(unit)):,} studies: it is taken for a placeholder, "
            "and each study for a patient"
        )
    patient_id = pc.if_else(pa.array(np.isin(person, common)), pa.scalar(None, pa.string()), patient_id)
    person = np.where(np.isin(person, common), -1, person)
    volume, shared = identity.divide_series(by_subset, study, person)
    stand_in = pc.coalesce(study_uid, slices["series_instance_uid"])
    links = {
        "patient": (person, patient_id),
        "study": (study, study_uid),
        "series": (series, slices["series_instance_uid"]),
    }
    links = {name: link for name, link in links.items() if name in spec.link}
    group = identity.connect(volume, [codes for codes, _ in links.values()])
    identity.check_group_sizes(group, unit, links, folds=spec.folds)
    patient = pc.coalesce(patient_id, stand_in)
    named = pc.coalesce(identity.with_issuer(patient_id, issuer), stand_in)
    conflict = identity.contradictions(study, person)
    for name, length in (("patient_sex", None), ("patient_birth_date", 4)):
        value = pc.utf8_slice_codeunits(slices[name], 0, length) if length else slices[name]
        conflict |= identity.contradictions(person, identity.codes_of(_stated(value)))
    return (
        slices.append_column("patient", patient)
        .append_column("unnamed_patient", pc.is_null(patient_id))
        .append_column("patient_conflict", pa.array(conflict))
        .append_column("volume", pa.array(volume))
        .append_column("series_uid_shared", pa.array(shared))
        .append_column("fold_group", identity.group_names(group, named))
    ), tuple(notes)


def _stated(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return sexes or birth years with null where they state nothing."""
    return pc.if_else(pc.match_substring_regex(values, r"^([MF]|[0-9]{4})$"), values, pa.scalar(None, pa.string()))


def _sort_slices(slices: pa.Table) -> pa.Table:
    """Return the slices in the order of their rows: by subset, volume and position, as ``order_slices`` says.

    Adds ``position_mm``, ``other_orientation`` and ``no_position``, and the orientation of the volume's reference slice.
    """
    result = order_slices(
        matrix(slices["position"], 3),
        matrix(slices["orientation"], 6),
        slices["instance_number"].cast(pa.float64()).fill_null(np.nan).to_numpy(),
        series=slices["volume"].to_numpy(),
        uid=identity.codes_of(slices["sop_instance_uid"]),
    )
    return (
        slices.append_column("position_mm", nullable(result.position_mm))
        .append_column(
            "series_orientation", slices["orientation"].take(pa.array(result.reference, mask=result.reference < 0))
        )
        .append_column("other_orientation", pa.array(result.other_orientation))
        .append_column("no_position", pa.array(result.no_position))
        .take(pa.array(result.order))
    )
