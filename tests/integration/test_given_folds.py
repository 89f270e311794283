"""A label table may bring subset, fold and patient: they win, and may not split a fold group unless allowed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from ich_prep.dataset import Dataset
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.errors import BuildError, SourceError, UsageError
from ich_prep.progress import NoProgress
from ich_prep.stages.folds import fold_of
from ich_prep.verify import verify
from tests.support.hospital import TINY, built, ct_bytes, write_files


def scans(patients: Sequence[str]) -> dict[str, bytes]:
    """One scan of three slices for each of ``patients``."""
    return {
        f"{scan}/{n}.dcm": ct_bytes(
            100 * scan + n, PatientID=patient, StudyInstanceUID=f"1.5.{scan}", SeriesInstanceUID=f"1.6.{scan}"
        )
        for scan, patient in enumerate(patients)
        for n in range(3)
    }


def table(path: Path, **columns: Sequence[object]) -> Path:
    """Write a label table by series, without a bleed, with more ``columns``."""
    count = len(next(iter(columns.values())))
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["series_instance_uid", *RSNA_CLASSES, *columns])
        for scan in range(count):
            lines.writerow([f"1.6.{scan}", *[0] * 6, *(values[scan] for values in columns.values())])
    return path


def by_scan(dataset: Dataset, column: str) -> list[object]:
    return dataset.series[column].to_pylist()


def test_given_folds_and_subsets_win(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", scans("ABCD"))
    labels = table(tmp_path / "labels.csv", fold=[3, 2, "", 0], subset=["train", "", "", "test"])
    dataset = built(src, tmp_path / "data.zarr", labels=labels)
    lines = {line["series_instance_uid"]: line for line in dataset.series.to_pylist()}
    assert [lines[f"1.6.{scan}"]["subset"] for scan in range(4)] == ["train", "train", "train", "test"]
    assert [lines[f"1.6.{scan}"]["fold"] for scan in range(4)] == [3, 2, fold_of("C", folds=5), None]
    assert not verify(dataset.path, progress=NoProgress()).problems


def test_what_is_given_for_one_scan_holds_for_its_patient(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", scans("AAB"))
    dataset = built(src, tmp_path / "folds.zarr", labels=table(tmp_path / "folds.csv", fold=[4, "", ""]))
    assert by_scan(dataset, "fold") == [4, 4, fold_of("B", folds=5)]
    dataset = built(src, tmp_path / "test.zarr", labels=table(tmp_path / "test.csv", subset=["test", "", "train"]))
    assert by_scan(dataset, "subset") == ["test", "test", "train"]


@pytest.mark.parametrize("column", [{"fold": [0, 1, 2]}, {"subset": ["train", "test", "train"]}])
def test_splitting_a_patient_needs_an_option(column: dict[str, list[object]], tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", scans("AAB"))
    labels = table(tmp_path / "labels.csv", **column)
    with pytest.raises(BuildError, match=r"one fold group different (folds|subsets), those of 'A'.*--split-groups"):
        built(src, tmp_path / "data.zarr", labels=labels)
    dataset = built(src, tmp_path / "data.zarr", labels=labels, spec=TINY.model_copy(update={"split_groups": True}))
    lines = {line["series_instance_uid"]: line for line in dataset.series.to_pylist()}
    name, values = next(iter(column.items()))
    assert [lines[f"1.6.{scan}"][name] for scan in range(3)] == values
    assert not verify(dataset.path, progress=NoProgress()).problems


def test_a_fold_beyond_the_number_of_folds_is_refused(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", scans("AB"))
    with pytest.raises(UsageError, match=r"fold 7; with --folds 5 they are 0 to 4. Give --folds 8"):
        built(src, tmp_path / "data.zarr", labels=table(tmp_path / "labels.csv", fold=[7, 0]))


def test_patients_of_the_table_replace_those_of_the_headers(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", scans(["SAME"] * 4))
    spec = TINY.model_copy(update={"patients": "column"})
    labels = table(tmp_path / "labels.csv", patient_id=["X", "Y", "X", ""])
    dataset = built(src, tmp_path / "data.zarr", labels=labels, spec=spec)
    assert by_scan(dataset, "patient_id") == ["X", "Y", "X", "1.5.3"]
    assert by_scan(dataset, "fold_group") == ["X", "Y", "X", "1.5.3"]


def test_patients_of_the_table_need_its_column(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", scans("AB"))
    spec = TINY.model_copy(update={"patients": "column"})
    with pytest.raises(SourceError, match="expected a column patient_id beside another key"):
        built(src, tmp_path / "data.zarr", labels=table(tmp_path / "labels.csv", fold=[0, 1]), spec=spec)
    with pytest.raises(SourceError, match=r"takes the patients from a label table. Give one with --labels"):
        built(src, tmp_path / "data.zarr", spec=spec)
