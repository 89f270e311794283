"""Identifiers of the headers, and of the label table -> patient, volume, fold group and conflicts of each slice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.components import codes_of, connect
from ich_prep.dataset.tables import with_columns
from ich_prep.errors import BuildError, UsageError
from ich_prep.stages import identity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.spec import Spec

_TEST_FOLD = -2  # among given folds: the test set
IDENTIFIERS = ("assigned_patient", "issuer_of_patient_id", "study_instance_uid", "series_instance_uid")


@dataclass(frozen=True)
class Given:
    """What the label table says about n slices: null, or -1 for a ``fold``, where it says nothing.

    ``subset``: train or test; ``fold``: int (n,); ``patient``: whose slices they are (``--patients column``).
    """

    subset: pa.Array | None = None
    fold: NDArray[np.int8] | None = None
    patient: pa.Array | pa.ChunkedArray | None = None


@dataclass(frozen=True)
class Copied:
    """The identifiers of m copies that leave the dataset: they, too, say whose image it is.

    ``headers``: the columns of ``IDENTIFIERS``; ``line``, int64 (m,): the line of the slice that each is a copy of.
    """

    headers: pa.Table
    line: NDArray[np.int64]


def with_identities(
    slices: pa.Table, given: Given, spec: Spec, copied: Copied, known: pa.Table | None = None
) -> tuple[pa.Table, tuple[str, ...]]:
    """Return the slices with their patient, volume and fold group, and notes for the user.

    ``known`` is the series table of the dataset that they are added to: its patients are no placeholders, and link slices.

    Adds ``patient`` (the study or else the series stands in for a missing patient id), ``unnamed_patient``,
    ``patient_conflict``, ``volume``, ``series_uid_shared``, ``fold_group`` and ``given_fold``, and sets the ``subset`` that
    is given. A copy links the identifiers of its header to those of its slice, if images are links. Raises ``BuildError`` as
    ``identity.check_group_sizes``, and if given folds or subsets split a group.
    """
    patient_id = _patient_ids(slices, given, spec)
    study_uid = identity.usable(slices["study_instance_uid"])
    issuer, own = slices["issuer_of_patient_id"], len(slices)
    person_of_slice = identity.with_issuer(patient_id, issuer)
    # Of the slices, and behind them of the known volumes.
    texts = _with_known(
        {"patient": person_of_slice, "study": study_uid, "series": slices["series_instance_uid"]}, known
    )
    codes = {name: codes_of(values) for name, values in texts.items()}
    units = identity.study_units(_volumes(codes, own)[0], codes["study"], codes["patient"])
    known_persons = set(codes["patient"][own:].tolist())
    common = tuple(code for code in identity.too_common(codes["patient"], units) if code not in known_persons)
    notes = tuple(_too_common_note(patient_id, codes["patient"], units, code) for code in common)
    is_common = np.isin(codes["patient"], common)
    placeholders = person_of_slice.filter(pa.array(is_common[:own])).unique()
    patient_id = pc.if_else(pa.array(is_common[:own]), pa.scalar(None, pa.string()), patient_id)
    texts["patient"] = pc.if_else(pa.array(is_common), pa.scalar(None, pa.string()), texts["patient"])
    codes["patient"] = np.where(is_common, -1, codes["patient"])

    person, study, series = (codes[name][:own] for name in ("patient", "study", "series"))
    values = {"patient": patient_id, "study": study_uid, "series": slices["series_instance_uid"]}
    linking = [name for name in values if name in spec.link]
    volumes, shared = _volumes(codes, own)
    group = connect(volumes, [codes[name] for name in linking])[:own]
    if "image" in spec.link and len(copied.line):
        linked = {name: texts[name] for name in linking}
        group = _groups_with_copies(volumes, linked, placeholders, copied, spec)[:own]
    identity.check_group_sizes(
        group,
        units[:own],
        {name: (codes[name][:own], values[name]) for name in linking},
        folds=spec.folds,
        others=len(np.setdiff1d(units[own:], units[:own])),
    )
    stand_in = pc.coalesce(study_uid, slices["series_instance_uid"])
    name = identity.group_names(group, pc.coalesce(identity.with_issuer(patient_id, issuer), stand_in))

    subset, fold = _given_to_groups(slices["subset"], name, group, given, spec)
    # Slices of two subsets are two volumes.
    volume, _ = identity.divide_series(identity.join(codes_of(subset), series), study, person)
    columns = {
        "patient": pc.coalesce(patient_id, stand_in),
        "unnamed_patient": pc.is_null(patient_id),
        "patient_conflict": pa.array(_conflicts(slices, codes["study"], codes["patient"])),
        "volume": pa.array(volume),
        "series_uid_shared": pa.array(shared),
        "fold_group": name,
        "given_fold": pa.array(fold, pa.int8()),
    }
    return with_columns(slices, {"subset": subset, **columns}), notes


def _with_known(
    texts: dict[str, pa.Array | pa.ChunkedArray], known: pa.Table | None
) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Return each of the ``texts`` (n,), and behind them those of the ``known`` volumes."""
    if known is None:
        return texts
    values_of_known = {
        "patient": persons_of(known),
        "study": identity.usable(known["study_instance_uid"]),
        "series": known["series_instance_uid"],
    }
    return {
        name: pa.chunked_array([*_chunks(values), *_chunks(values_of_known[name])], pa.string())
        for name, values in texts.items()
    }


def _chunks(values: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return values.chunks if isinstance(values, pa.ChunkedArray) else [values]


def _volumes(codes: dict[str, NDArray[np.int64]], own: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the volume of each slice, the first ``own`` of the ``codes``, then of each known volume a number of its own.

    And for each slice whether its series UID is shared, as ``identity.divide_series``.
    """
    volume, shared = identity.divide_series(*(codes[name][:own] for name in ("series", "study", "patient")))
    added = len(codes["series"]) - own
    return np.r_[volume, int(volume.max(initial=-1)) + 1 + np.arange(added)], shared


def persons_of(series: pa.Table) -> pa.Array:
    """Return the patient of each line of a series table, with the issuer where its fold group names one.

    Null for a patient that the study stands in for.
    """
    patient, group = series["patient_id"], series["fold_group"]
    issued = pa.array(
        [
            name is not None and group_name is not None and group_name.startswith(f"{name}{identity.ISSUER}")
            for name, group_name in zip(patient.to_pylist(), group.to_pylist(), strict=True)
        ]
    )
    unnamed = pa.array(["patient_is_study" in (flags or ()) for flags in series["flags"].to_pylist()])
    person = pc.if_else(issued, group, patient)
    named = pc.if_else(unnamed, pa.scalar(None, pa.string()), person)
    return named.combine_chunks() if isinstance(named, pa.ChunkedArray) else named


def _patient_ids(slices: pa.Table, given: Given, spec: Spec) -> pa.Array:
    """Return the patient ids that identify somebody, null for all others."""
    if spec.patients == "study":
        return pa.nulls(len(slices), pa.string())
    if spec.patients == "column":
        assert given.patient is not None
        return identity.usable(given.patient)
    return identity.usable(slices["assigned_patient"])


def _groups_with_copies(
    volume: NDArray[np.int64],
    texts: Mapping[str, pa.Array | pa.ChunkedArray],
    placeholders: pa.Array,
    copied: Copied,
    spec: Spec,
) -> NDArray[np.int64]:
    """Return the number of each slice's fold group (n,), where a copy counts as one more slice of its image's volume.

    ``texts`` are the values that link slices, (n,) each; ``placeholders`` the patients that identify nobody.
    """
    headers = copied.headers
    patient_id = _patient_ids(headers, Given(patient=pa.nulls(len(headers), pa.string())), spec)
    person = identity.with_issuer(patient_id, headers["issuer_of_patient_id"])
    of_copies = {
        "patient": pc.if_else(pc.is_in(person, value_set=placeholders), pa.scalar(None, pa.string()), person),
        "study": identity.usable(headers["study_instance_uid"]),
        "series": headers["series_instance_uid"].combine_chunks(),
    }
    links = [
        codes_of(pa.chunked_array([*_chunks(values), of_copies[name]], pa.string())) for name, values in texts.items()
    ]
    return connect(np.r_[volume, volume[copied.line]], links)[: len(volume)]


def _too_common_note(patient_id: pa.Array, person: NDArray[np.int64], unit: NDArray[np.int64], code: int) -> str:
    value = patient_id[int(np.argmax(person == code))].as_py()
    studies, total = len(np.unique(unit[person == code])), len(np.unique(unit))
    return (
        f"PatientID {value!r} is on {studies:,} of {total:,} studies: it is taken for a placeholder, and each study for a "
        "patient"
    )


def _conflicts(slices: pa.Table, study: NDArray[np.int64], person: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether a slice's study has several patients, or its patient several sexes or birth years.

    ``study`` and ``person`` are codes of the slices, and behind them of known volumes.
    """
    sex = pc.if_else(pc.is_in(slices["patient_sex"], value_set=pa.array(["M", "F"])), slices["patient_sex"], None)
    year = pc.utf8_slice_codeunits(slices["patient_birth_date"], 0, 4)
    year = pc.if_else(pc.match_substring_regex(year, "^[0-9]{4}$"), year, None)
    own = len(slices)
    conflict = identity.contradictions(study, person)[:own]
    person = person[:own]
    for value in (sex, year):
        conflict |= identity.contradictions(person, codes_of(value.cast(pa.string())))
    return conflict


def _given_to_groups(
    subset: pa.ChunkedArray, name: pa.Array, group: NDArray[np.int64], given: Given, spec: Spec
) -> tuple[pa.ChunkedArray, NDArray[np.int8]]:
    """Return each slice's subset, and its given fold, -1 where none is given.

    What is given for one slice of a fold ``group`` (n,) holds for all of it. Raises ``BuildError`` if two slices of a group
    are given different ones, unless the spec allows it, and ``UsageError`` for a fold beyond the spec's.
    """
    fold = np.full(len(group), -1, np.int64) if given.fold is None else given.fold.astype(np.int64)
    if (fold >= spec.folds).any():
        raise UsageError(
            f"The label table has fold {int(fold.max())}; with --folds {spec.folds} they are 0 to {spec.folds - 1}. "
            f"Give --folds {int(fold.max()) + 1}."
        )
    stated = pa.nulls(len(group), pa.string()) if given.subset is None else given.subset
    test = pc.equal(stated, "test").fill_null(False).to_numpy(zero_copy_only=False)
    trains = pc.equal(stated, "train").fill_null(False).to_numpy(zero_copy_only=False)
    wanted = agreed(np.where(test, _TEST_FOLD, np.where(trains, 0, -1)), group, name, "subsets", spec)
    subset = pc.coalesce(
        pc.if_else(pa.array(wanted == _TEST_FOLD), "test", pc.if_else(pa.array(wanted == 0), "train", None)), subset
    )
    return subset, agreed(fold, group, name, "folds", spec).astype(np.int8)


def agreed(
    values: NDArray[np.int64], group: NDArray[np.int64], name: pa.Array, what: str, spec: Spec
) -> NDArray[np.int64]:
    """Return for each slice its own of the ``values`` (n,), or the one of its group; -1 is none."""
    stated = np.flatnonzero(values != -1)
    if not len(stated):
        return values
    split = identity.contradictions(group, np.where(values == -1, -1, values + 3))
    if split.any() and not spec.split_groups:
        raise BuildError(
            f"The label table gives slices of one fold group different {what}, those of "
            f"{name[int(np.argmax(split))].as_py()!r}. "
            "Expected one for all slices that may be of one patient: correct the table, or let it split them with "
            "--split-groups."
        )
    of_group = np.full(int(group.max()) + 1, -1)
    of_group[group[stated]] = values[stated]
    return np.where((values == -1) & ~split, of_group[group], values)
