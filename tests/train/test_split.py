from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.errors import UsageError
from ich_train.rows import column
from ich_train.split import balanced_weights, split_rows
from tests.support.sealing import replace_table, with_column

Change = Callable[[pa.Table], pa.Table]


@pytest.fixture
def changed(dataset_path: Path, tmp_path: Path) -> Callable[[Change], Dataset]:
    """A function: a change of the slices table -> the dataset with that table."""

    def change(with_table: Change) -> Dataset:
        copy = tmp_path / "data.zarr"
        shutil.copytree(dataset_path, copy)
        replace_table(copy, "slices", with_table(open_dataset(dataset_path).slices))
        return open_dataset(copy)

    return change


def replaced(table: pa.Table, name: str, values: object) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))


def folds_of(dataset: Dataset) -> list[int]:
    """The folds that have slices, the fullest first."""
    counts = pc.value_counts(dataset.slices["fold"].drop_null()).to_pylist()
    return [count["values"] for count in sorted(counts, key=lambda count: -count["counts"])]


def test_parts_are_folds_of_labelled_slices(dataset_path: Path) -> None:
    dataset = open_dataset(dataset_path)
    val, test, *_ = folds_of(dataset)
    split = split_rows(dataset, val_fold=val, test_fold=test, allow_series_labels=False)
    assert all(rows.dtype == np.int64 and (np.diff(rows) > 0).all() for rows in vars(split).values())
    assert set(column(dataset, "fold", split.val)) == {val}
    assert set(column(dataset, "fold", split.test)) == {test}
    assert not {val, test} & set(column(dataset, "fold", split.train))
    together = np.concatenate([*vars(split).values()])
    assert set(column(dataset, "subset", together)) == {"train"}
    assert len(together) == pc.sum(pc.equal(dataset.slices["subset"], "train")).as_py()
    patients = [set(column(dataset, "patient_id", rows)) for rows in vars(split).values()]
    assert sum(map(len, patients)) == len(set.union(*patients))


def test_a_labelled_test_subset_is_the_test_part(changed: Callable[[Change], Dataset]) -> None:
    def label_test_subset(table: pa.Table) -> pa.Table:
        for name in RSNA_CLASSES:
            table = replaced(table, name, pc.fill_null(table[name], 0).to_pylist())
        return replaced(table, "label_level", ["slice"] * len(table))

    dataset = changed(label_test_subset)
    val, other, *_ = folds_of(dataset)
    split = split_rows(dataset, val_fold=val, test_fold=other, allow_series_labels=False)
    assert set(column(dataset, "subset", split.test)) == {"test"}
    assert other in column(dataset, "fold", split.train)


def test_a_patient_of_a_labelled_test_subset_is_in_no_other_part(changed: Callable[[Change], Dataset]) -> None:
    def label_test_subset(table: pa.Table) -> pa.Table:
        patients, subsets = (table[name].to_pylist() for name in ("patient_id", "subset"))
        moved, taken = (patients[subsets.index(subset)] for subset in ("test", "train"))
        for name in RSNA_CLASSES:
            table = replaced(table, name, pc.fill_null(table[name], 0).to_pylist())
        joined = [taken if patient == moved else patient for patient in patients]
        table = replaced(replaced(table, "patient_id", joined), "fold_group", joined)
        return replaced(table, "label_level", ["slice"] * len(table))

    dataset = changed(label_test_subset)
    val, other, *_ = folds_of(dataset)
    for fold in (val, other):
        split = split_rows(dataset, val_fold=fold, test_fold=9, allow_series_labels=False)
        patients = [set(column(dataset, "patient_id", rows)) for rows in vars(split).values()]
        assert (
            sum(map(len, patients)) == len(set.union(*patients)) == len(set(dataset.slices["patient_id"].to_pylist()))
        )


def test_slices_set_aside_are_in_no_part(changed: Callable[[Change], Dataset]) -> None:
    dataset = changed(lambda table: replaced(table, "status", ["decode_failed", "ok"] * (len(table) // 2) + ["ok"]))
    val, test, *_ = folds_of(dataset)
    split = split_rows(dataset, val_fold=val, test_fold=test, allow_series_labels=False)
    assert set(column(dataset, "status", np.concatenate([*vars(split).values()]))) == {"ok"}


def test_series_labels_are_refused_unless_allowed(changed: Callable[[Change], Dataset]) -> None:
    dataset = changed(lambda table: replaced(table, "label_level", ["series"] * len(table)))
    val, test, *_ = folds_of(dataset)
    with pytest.raises(UsageError, match="allow_series_labels"):
        split_rows(dataset, val_fold=val, test_fold=test, allow_series_labels=False)
    assert len(split_rows(dataset, val_fold=val, test_fold=test, allow_series_labels=True).train)


def test_a_dataset_without_labels_is_called_that(changed: Callable[[Change], Dataset]) -> None:
    dataset = changed(lambda table: replaced(table, "label_level", ["none"] * len(table)))
    with pytest.raises(UsageError, match=r"has a label.*--labels"):
        split_rows(dataset, val_fold=0, test_fold=1, allow_series_labels=False)


def test_folds_that_cannot_be_meant_are_refused(dataset_path: Path) -> None:
    dataset = open_dataset(dataset_path)
    val, *_ = folds_of(dataset)
    with pytest.raises(UsageError, match="must differ"):
        split_rows(dataset, val_fold=val, test_fold=val, allow_series_labels=False)
    with pytest.raises(UsageError, match=rf"No slices for test .*test_fold 9.*{val}: \d+"):
        split_rows(dataset, val_fold=val, test_fold=9, allow_series_labels=False)


def test_a_part_that_is_not_needed_may_be_empty(dataset_path: Path) -> None:
    dataset = open_dataset(dataset_path)
    val, *_ = folds_of(dataset)
    split = split_rows(dataset, val_fold=val, test_fold=9, allow_series_labels=False, needed=["val"])
    assert len(split.test) == 0 < len(split.val)
    with pytest.raises(UsageError, match="No slices for val with val_fold 9"):
        split_rows(dataset, val_fold=9, test_fold=val, allow_series_labels=False, needed=["val"])


def test_labels_come_in_the_order_of_the_classes(dataset_path: Path) -> None:
    dataset = open_dataset(dataset_path)
    rows = np.array([40, 3, 3, 17])
    labels = dataset.labels[rows]
    assert labels.dtype == np.int8
    for row, line in zip(rows.tolist(), labels.tolist(), strict=True):
        stored = dataset.slices.slice(row, 1).to_pylist()[0]
        assert line == [-1 if stored[name] is None else stored[name] for name in RSNA_CLASSES]


@given(labels=arrays(np.int8, st.tuples(st.integers(1, 60), st.just(6)), elements=st.integers(-1, 1)))
def test_a_slice_weighs_as_its_rarest_label(labels: np.ndarray) -> None:
    weights = balanced_weights(labels)
    positives = [(labels[:, j] == 1).sum() for j in range(6)]
    kinds = [
        min((j for j in range(6) if line[j] == 1), key=lambda j: (positives[j], j), default="negative")
        for line in labels
    ]
    assert weights == pytest.approx([kinds.count(kind) ** -0.5 for kind in kinds])


def linked(table: pa.Table, patients: list[str]) -> pa.Table:
    """The slices table with ``patients`` in one fold group, and every other patient in one of its own."""
    groups = [patients[0] if patient in patients else patient for patient in table["patient_id"].to_pylist()]
    return with_column(table, "fold_group", groups)


def patients_of(dataset: Dataset, rows: np.ndarray) -> set[str]:
    return set(column(dataset, "patient_id", rows).tolist())


def test_no_fold_group_is_in_two_parts(changed: Callable[[Change], Dataset]) -> None:
    """Two patients of one fold group in different folds: whatever the table says, no part judges what another learned."""

    def link(table: pa.Table) -> pa.Table:
        first = {fold: patient for patient, fold in zip(*fold_columns(table), strict=True) if fold is not None}
        return linked(table, list(first.values())[:2])

    dataset = changed(link)
    groups = dataset.fold_groups.to_pylist()
    for val, test in [(a, b) for a in folds_of(dataset) for b in folds_of(dataset) if a != b]:
        split = split_rows(dataset, val_fold=val, test_fold=test, allow_series_labels=False, needed=())
        parts = [{groups[row] for row in rows.tolist()} for rows in vars(split).values()]
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert set(column(dataset, "fold", split.test)) == {test}


def fold_columns(table: pa.Table) -> tuple[list[str], list[int | None]]:
    return table["patient_id"].to_pylist(), table["fold"].to_pylist()


def test_a_patient_linked_to_a_labelled_test_subset_is_in_no_part(changed: Callable[[Change], Dataset]) -> None:
    linked_patients: list[str] = []

    def link_to_test(table: pa.Table) -> pa.Table:
        patients, subsets = (table[name].to_pylist() for name in ("patient_id", "subset"))
        linked_patients.extend(patients[subsets.index(subset)] for subset in ("test", "train"))
        for name in RSNA_CLASSES:
            table = replaced(table, name, pc.fill_null(table[name], 0).to_pylist())
        return linked(replaced(table, "label_level", ["slice"] * len(table)), linked_patients)

    dataset = changed(link_to_test)
    val, *_ = folds_of(dataset)
    split = split_rows(dataset, val_fold=val, test_fold=9, allow_series_labels=False, needed=())
    tested, learned = linked_patients
    assert tested in patients_of(dataset, split.test)
    assert learned not in patients_of(dataset, np.concatenate([split.train, split.val]))


def test_without_fold_groups_the_patient_is_the_group(changed: Callable[[Change], Dataset]) -> None:
    dataset = changed(lambda table: replaced(table, "fold_group", [None] * len(table)))
    assert dataset.slices["fold_group"].null_count == len(dataset)
    assert dataset.fold_groups.to_pylist() == dataset.slices["patient_id"].to_pylist()
