"""Who is a patient, what is a volume, and which patients share a fold: properties over random small cohorts."""

from __future__ import annotations

from collections.abc import Sequence

import networkx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.dataset.components import connect
from ich_prep.errors import BuildError
from ich_prep.stages import identity
from ich_prep.stages.folds import fold_of

CODES = st.lists(st.tuples(*[st.integers(-1, 4)] * 3), min_size=1, max_size=40)


def texts(*values: str | None) -> pa.Array:
    return pa.array(values, pa.string())


def codes(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "  ",
        "0",
        "000-000",
        "ANONYMOUS",
        "Anonymous^",
        "anon",
        "NO_ID",
        "N/A",
        "Unknown",
        "xxx",
        "De-identified",
        None,
    ],
)
def test_placeholders_identify_nobody(value: str | None) -> None:
    assert identity.is_placeholder(value)


@pytest.mark.parametrize("value", ["ID_0001", "A", "10", "0001", "Patient 7", "CQ500-CT-0", "anon4711", "ANON1"])
def test_identifiers_are_no_placeholders(value: str) -> None:
    assert not identity.is_placeholder(value)


def test_the_issuer_is_part_of_the_identity_where_it_is_known() -> None:
    named = identity.with_issuer(texts("7", "7", "7", None), texts("A", "B", None, "A"))
    assert named.to_pylist() == ["7^^^A", "7^^^B", "7", None]


def test_an_id_of_more_than_half_of_the_studies_identifies_nobody() -> None:
    assert identity.too_common(codes(0, 0, 0, 1), codes(0, 1, 2, 3)) == (0,)
    assert identity.too_common(codes(0, 0, 1, 1), codes(0, 1, 2, 3)) == ()
    assert identity.too_common(codes(0, 0), codes(0, 1)) == ()  # two studies of one patient are not a pattern
    assert identity.too_common(codes(0, 0, 0, 0), codes(5, 5, 5, 5)) == ()  # four slices of one study
    assert identity.too_common(codes(-1, -1, -1), codes(0, 1, 2)) == ()


# --- volumes ---------------------------------------------------------------------------------------------------------


def divided(*slices: tuple[int, int, int]) -> tuple[list[int], list[bool]]:
    """Return the volume numbers and flags of slices given as (series, study, patient)."""
    columns = (np.array(column, np.int64) for column in zip(*slices, strict=True))
    volume, shared = identity.divide_series(*columns)
    return volume.tolist(), shared.tolist()


def test_two_patients_or_studies_under_one_series_uid_are_two_volumes() -> None:
    by_study = [(0, 0, 0), (0, 1, 1)] * 3
    by_patient = [(0, 0, 0), (0, 0, 1)] * 3
    of_one_patient = [(0, 0, 0), (0, 1, 0)] * 3
    for slices in (by_study, by_patient, of_one_patient):
        assert divided(*slices) == ([0, 1] * 3, [True] * 6)


def test_identifiers_drawn_for_every_file_divide_nothing() -> None:
    patients = [(0, 0, number) for number in range(6)]
    studies = [(0, number, 0) for number in range(6)]
    assert divided(*patients) == divided(*studies) == ([0] * 6, [False] * 6)
    # The study still divides what the patient does not.
    both = [(0, number // 6, number) for number in range(12)]
    assert divided(*both) == ([0] * 6 + [1] * 6, [True] * 12)


def test_a_missing_identifier_is_not_another_patient() -> None:
    assert divided(*[(0, 0, 1), (0, 0, -1)] * 4) == ([0] * 8, [False] * 8)


@given(CODES)
def test_volumes_divide_series_and_are_numbered_in_their_order(slices: list[tuple[int, int, int]]) -> None:
    slices = [(abs(series), study, patient) for series, study, patient in slices]
    volumes, shared = divided(*slices)
    assert sorted(set(volumes)) == list(range(len(set(volumes))))
    series_of: dict[int, int] = {}
    for volume, (series, _, _), flag in zip(volumes, slices, shared, strict=True):
        assert series_of.setdefault(volume, series) == series
        parts = {v for v, (other, _, _) in zip(volumes, slices, strict=True) if other == series}
        assert flag == (len(parts) > 1)
    ordered = [series_of[volume] for volume in sorted(series_of)]
    assert ordered == sorted(ordered)


# --- fold groups -----------------------------------------------------------------------------------------------------


@given(CODES, st.lists(st.integers(0, 8), min_size=40, max_size=40))
def test_groups_are_the_connected_components(keys: list[tuple[int, int, int]], volumes: Sequence[int]) -> None:
    volume = np.unique(volumes[: len(keys)], return_inverse=True)[1].reshape(-1)
    links = [np.array(column, np.int64) for column in zip(*keys, strict=True)]
    group = connect(volume, links)
    graph = networkx.Graph()
    for row, values in enumerate(keys):
        graph.add_edge(("row", row), ("volume", int(volume[row])))
        for kind, value in enumerate(values):
            if value >= 0:
                graph.add_edge(("row", row), (kind, value))
    for component in networkx.connected_components(graph):
        rows = [row for kind, row in component if kind == "row"]
        assert len(set(group[rows].tolist())) == 1
        assert not set(group[rows].tolist()) & set(np.delete(group, rows).tolist())


def test_a_group_has_the_fold_of_its_smallest_patient() -> None:
    patients = texts("p3", "p1", "p2", "p4")
    names = identity.group_names(codes(0, 0, 1, 1), patients)
    assert names.to_pylist() == ["p1", "p1", "p2", "p2"]
    folds = identity.folds_of_groups(names, patients, folds=7)
    assert folds.tolist() == [fold_of("p1", folds=7)] * 2 + [fold_of("p2", folds=7)] * 2


def test_a_group_of_most_studies_ends_the_build_and_names_its_value() -> None:
    study = codes(*range(20))
    patient = codes(*[0] * 6, *range(1, 15))
    values = texts(*(f"P{code}" for code in patient))
    links = {"patient": (patient, values), "study": (study, texts(*map(str, study)))}
    group = connect(study, [patient])
    with pytest.raises(
        BuildError, match=r"6 of 20 studies .* the patient 'P0' of 6 of them.*--patients study.*--link study"
    ):
        identity.check_group_sizes(group, study, links, folds=5)
    identity.check_group_sizes(group, study, links, folds=3)
    identity.check_group_sizes(group[:10], study[:10], {"patient": (patient[:10], values[:10])}, folds=5)


def test_contradictions_need_two_values_of_one_owner() -> None:
    owner = codes(0, 0, 1, 1, 2, -1, -1)
    value = codes(5, 6, 5, -1, 5, 1, 2)
    assert identity.contradictions(owner, value).tolist() == [True, True, False, False, False, False, False]
