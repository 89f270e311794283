"""Patient -> fold: never split, never moved, roughly balanced."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.stages.folds import assign_folds, fold_of

patients = st.lists(st.text(max_size=12), min_size=1, max_size=30)
fold_counts = st.integers(2, 127)


@given(patients, fold_counts)
@settings(deadline=None)
def test_every_slice_of_a_patient_is_in_the_patients_fold(ids: list[str], folds: int) -> None:
    assigned = assign_folds(pa.array(ids, pa.string()), folds=folds)
    assert assigned.dtype == np.int8
    assert assigned.tolist() == [fold_of(patient, folds=folds) for patient in ids]
    assert 0 <= assigned.min() <= assigned.max() < folds


@given(patients, patients, fold_counts)
@settings(deadline=None)
def test_folds_are_stable_when_patients_are_added(ids: list[str], more: list[str], folds: int) -> None:
    before = assign_folds(pa.array(ids, pa.string()), folds=folds)
    after = assign_folds(pa.array(more + ids, pa.string()), folds=folds)
    assert after[len(more) :].tolist() == before.tolist()


def test_chunks_of_a_column_change_nothing() -> None:
    ids = ["a", "b", "c", "a"]
    whole = assign_folds(pa.array(ids), folds=5)
    assert assign_folds(pa.chunked_array([ids[:1], ids[1:]]), folds=5).tolist() == whole.tolist()


def test_the_folds_of_published_datasets_are_pinned() -> None:
    """A change of the hash would move patients between the folds of published datasets."""
    assert [fold_of(f"ID_{number:08x}", folds=5) for number in range(10)] == [3, 2, 3, 3, 2, 1, 3, 0, 4, 1]


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_folds_are_roughly_balanced(folds: int) -> None:
    ids = pa.array([f"ID_{number:08x}" for number in range(20_000)])
    counts = np.bincount(assign_folds(ids, folds=folds), minlength=folds)
    expected = len(ids) / folds
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()  # five standard deviations
