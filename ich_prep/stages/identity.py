"""Whose slices these are: which values identify a patient, which slices form a volume, and which patients share a fold.

Arrays in, arrays out. Codes are integers that stand for equal values, -1 for a value that identifies nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.components import codes_of, one_array, pairs_of
from ich_prep.errors import BuildError, count
from ich_prep.stages.folds import assign_folds

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What de-identifiers and scanners write instead of an identifier, in lower case without punctuation.
PLACEHOLDER_WORDS: Final = frozenset(
    (
        "anonymous",
        "anonymized",
        "anonymised",
        "anonym",
        "anon",
        "deidentified",
        "removed",
        "redacted",
        "hidden",
        "masked",
    )
    + (
        "unknown",
        "unnamed",
        "none",
        "null",
        "nan",
        "na",
        "noid",
        "nopid",
        "nopatientid",
        "notapplicable",
        "unspecified",
    )
    + ("patient", "patientid", "id", "name", "noname", "test", "empty", "default", "pseudonym", "confidential")
)
ISSUER: Final = "^^^"  # between a patient id and its issuer (HL7's CX)
_NO_SIGN: Final = re.compile(r"[\W_]+")
_ONE_SIGN: Final = re.compile(r"(0+|x{2,})")
# One value on more than half of the studies identifies nobody. Below this number it may be one patient's follow-ups.
FEWEST_PLACEHOLDER_STUDIES: Final = 3
# A cohort of so few studies may have any number of them in one fold group.
FEW_STUDIES: Final = 10
# A series whose files disagree about their patient or study is divided by it only into volumes of so many slices, on
# average: a de-identifier that draws an identifier for every file must not make a volume of every slice.
SLICES_PER_IDENTITY: Final = 3


def is_placeholder(value: str | None) -> bool:
    """Return whether ``value`` stands for no identifier: empty, zeros, x's, or a word such as ANONYMOUS."""
    word = _NO_SIGN.sub("", value or "").casefold()
    return not word or word in PLACEHOLDER_WORDS or _ONE_SIGN.fullmatch(word) is not None


def usable(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return ``values`` (string, (n,)) with null for each placeholder."""
    encoded = one_array(values).dictionary_encode()
    words = encoded.dictionary.to_pylist()
    kept = pa.array([None if is_placeholder(word) else word for word in words], pa.string())
    return kept.take(encoded.indices)


def with_issuer(patient_id: pa.Array, issuer: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return each patient's identity: the PatientID, and behind it its issuer where the header names one (HL7's CX)."""
    qualified = pc.binary_join_element_wise(patient_id, one_array(issuer), ISSUER)
    return pc.coalesce(qualified, patient_id)


def too_common(patient: NDArray[np.int64], study: NDArray[np.int64]) -> tuple[int, ...]:
    """Return the codes of ``patient`` (n,) that more than half of the studies have: they identify nobody.

    ``study`` (n,) are codes of studies. At least three studies must have the value.
    """
    _, patients = pairs_of(study, patient)
    studies = len(np.unique(study))
    numbers = np.bincount(patients) if len(patients) else np.empty(0, np.int64)
    common = np.flatnonzero((numbers >= FEWEST_PLACEHOLDER_STUDIES) & (2 * numbers > studies))
    return tuple(common.tolist())


def divide_series(
    series: NDArray[np.int64], study: NDArray[np.int64], patient: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the volume number of each slice (n,), and whether its series UID is shared by several studies or patients.

    Slices of one series belong to one volume if they have one study and one patient. Where the values vary from file to
    file, so that a volume had fewer than three slices on average, the value that varies does not count.
    """
    study, patient = _filled(series, study), _filled(series, patient)
    part, undecided = np.full(len(series), -1), np.ones(len(series), bool)
    slices = np.bincount(series, minlength=1)
    for whose in (join(study, patient), study, patient):
        owners, _ = pairs_of(series, whose)
        parts = np.bincount(owners, minlength=len(slices))
        divides = (parts > 1) & (parts * SLICES_PER_IDENTITY <= slices)
        chosen = undecided & divides[series]
        part[chosen] = whose[chosen]
        undecided &= ~chosen
    return join(series, part), ~undecided


def contradictions(owner: NDArray[np.int64], value: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each slice (n,) whether its ``owner`` has more than one ``value``; -1 is no owner, and no value."""
    owners, _ = pairs_of(owner, value)
    several = np.bincount(owners, minlength=int(owner.max(initial=-1)) + 2) > 1
    result: NDArray[np.bool_] = several[owner] & (owner >= 0)
    return result


def study_units(volume: NDArray[np.int64], study: NDArray[np.int64], patient: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return codes of what counts as one study (n,): the first study UID and patient of the ``volume``.

    A volume without a study UID is a study. One UID on the studies of many patients is thus counted as many, and
    identifiers drawn for every file as one study.
    """
    study = np.where(study < 0, study.max(initial=-1) + 1 + volume, study)
    first = np.full((2, int(volume.max(initial=-1)) + 1), np.iinfo(np.int64).max)
    np.minimum.at(first[0], volume, study)
    np.minimum.at(first[1], volume, patient)
    return join(first[0][volume], first[1][volume])


def group_names(group: NDArray[np.int64], identity: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return the name of each slice's ``group`` (n,): its smallest ``identity``, by code points."""
    codes = codes_of(identity)
    least = np.full(int(group.max(initial=-1)) + 1, np.iinfo(np.int64).max, np.int64)
    np.minimum.at(least, group, codes)
    ranked = one_array(identity).dictionary_encode().dictionary
    return ranked.take(pc.sort_indices(ranked)).take(pa.array(least[group], pa.int64()))


def folds_of_groups(
    group: pa.Array | pa.ChunkedArray, patient_id: pa.Array | pa.ChunkedArray, *, folds: int
) -> NDArray[np.int8]:
    """Return the fold of each slice, int8 (n,): that of the smallest patient id of its fold ``group``.

    A patient alone in a group thus has the fold of its id, whoever else is in the cohort.
    """
    if not len(group):
        return np.empty(0, np.int8)
    return assign_folds(group_names(codes_of(group), patient_id), folds=folds)


def check_group_sizes(
    group: NDArray[np.int64],
    study: NDArray[np.int64],
    links: Mapping[str, tuple[NDArray[np.int64], pa.Array | pa.ChunkedArray]],
    *,
    folds: int,
    others: int = 0,
) -> None:
    """Raise ``BuildError`` if one group has more than 1/``folds`` of more than ten studies; name the value that links it.

    ``links`` are, by the name of a value, its codes (n,) and the values themselves; ``others`` counts studies beside these.
    """
    groups, _ = pairs_of(group, study)
    studies = len(groups) + others
    sizes = np.bincount(groups, minlength=1)
    largest = int(sizes.argmax())
    if studies <= FEW_STUDIES or sizes[largest] * folds <= studies or sizes[largest] == 1:
        return
    inside = group == largest
    name, value, shared = "", "", 0
    for kind, (codes, values) in links.items():
        owners, _ = pairs_of(codes[inside], study[inside])
        numbers = np.bincount(owners, minlength=1)
        if numbers.max() > max(shared, 1):
            name, shared = kind, int(numbers.max())
            value = values[int(np.flatnonzero(inside & (codes == numbers.argmax()))[0])].as_py()
    linked = f"above all by the {name} {value!r} of {shared:,} of them" if shared else "by copies of images"
    raise BuildError(
        f"{sizes[largest]:,} of {count(studies, 'study', 'studies')} would be in one fold: they are linked, {linked}. "
        f"Expected at most 1/{folds} of the studies in one group. If that value "
        f"is a placeholder, use another one for patients (--patients study), or link by others (--link "
        f"{','.join(kind for kind in links if kind != name)}); with fewer --folds a group may be larger."
    )


# --- arrays ----------------------------------------------------------------------------------------------------------


def join(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return one code for each pair of codes, (n,), in the order of the pairs; -1 counts as a value."""
    joined = (first + 1) * (int(second.max(initial=0)) + 2) + second + 1
    codes: NDArray[np.int64] = np.unique(joined, return_inverse=True)[1].reshape(-1)
    return codes


def _filled(series: NDArray[np.int64], codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``codes`` (n,) with the smallest other code of its series in place of each -1, if there is one."""
    known = np.flatnonzero(codes >= 0)
    least = np.full(int(series.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(least, series[known], codes[known])
    least[least == np.iinfo(np.int64).max] = -1
    return np.where(codes < 0, least[series], codes)
