"""Folders as hospitals have them, from the command line: what leaves is told, what stays is right, and ``verify`` agrees."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ich_prep.dataset import Dataset, open_dataset
from ich_prep.dicom.decode import decode_with_pydicom
from tests.support.cli import prep
from tests.support.hospital import ct_bytes, write_files

FOLDER = ("--layout", "folder", "--size", "16", "--store", "hu", "--workers", "0")


def series(number: int, *, slices: int = 4, study: int | None = None, **attributes: Any) -> dict[str, bytes]:
    """Return the files of a series of a patient and study of its own; a function gives an attribute by slice."""
    own = {
        "PatientID": f"P{number}",
        "StudyInstanceUID": f"1.5.{number if study is None else study}",
        "SeriesInstanceUID": f"1.6.{number}",
    }
    return {
        f"{number}/{n}.dcm": ct_bytes(
            100 * number + n,
            **{
                name: value(n) if callable(value) else value
                for name, value in (own | {"ImagePositionPatient": [0.0, 0.0, 5.0 * n]} | attributes).items()
            },
        )
        for n in range(slices)
    }


def table(path: Path, lines: Sequence[Sequence[object]], *, separator: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(lines)
    return path


def build(src: Path, *options: object, ends: int = 0) -> tuple[Dataset | None, str]:
    """Build ``src`` by the command, and return the dataset, which ``verify`` accepts, and what the command printed."""
    out = src.with_name("data.zarr")
    done = prep("build", "--src", src, "--out", out, *FOLDER, *options)
    assert done.returncode == ends, done.stderr
    if ends:
        return None, done.stderr
    checked = prep("verify", out, "--src", src, "--sample", "1")
    assert checked.returncode == 0, checked.stderr
    return open_dataset(out), done.stdout


def flags(dataset: Dataset) -> set[str]:
    return {flag for line in dataset.slices["flags"].to_pylist() for flag in line}


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--include", "BodyPartExamined=HEAD,BRAIN"], {"plain", "bone"}),
        (["--exclude", "SeriesDescription~bone|thorax"], {"plain"}),
        (["--include", "BodyPartExamined=HEAD", "--include", "SeriesDescription~bone,?"], {"bone"}),
    ],
)
def test_filters_of_the_command_line(options: list[str], kept: set[str], tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number, (name, part) in enumerate([("plain", "HEAD"), ("bone", "HEAD"), ("thorax", "CHEST")]):
        files |= series(number, SeriesDescription=name, BodyPartExamined=part)
    dataset, _ = build(write_files(tmp_path / "src", files), "--allow-unlabelled", *options)
    assert dataset is not None
    assert set(dataset.series["series_description"].to_pylist()) == kept


# --- verify agrees with the build ------------------------------------------------------------------------------------


def test_samples_per_pixel_may_be_absent(tmp_path: Path) -> None:
    files = series(1, SamplesPerPixel=lambda n: None if n == 2 else 1)
    dataset, _ = build(write_files(tmp_path / "src", files), "--allow-unlabelled")
    assert dataset is not None
    assert len(dataset) == 4
    with_it, without = (decode_with_pydicom(ct_bytes(1, SamplesPerPixel=value)) for value in (1, None))
    np.testing.assert_array_equal(with_it, without)


def test_two_hospitals_with_the_same_numbers(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(4):
        files |= series(number, PatientID=str(17 + number // 2), IssuerOfPatientID="AB"[number % 2])
    dataset, _ = build(write_files(tmp_path / "src", files), "--allow-unlabelled")
    assert dataset is not None
    assert set(dataset.slices["fold_group"].to_pylist()) == {"17^^^A", "17^^^B", "18^^^A", "18^^^B"}


# --- who is who ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("also", [{}, {"PatientID": lambda n: f"X{n}"}])
def test_a_study_uid_for_every_file_does_not_multiply_the_studies(also: dict[str, Any], tmp_path: Path) -> None:
    """Three scans of a home-made de-identifier: three studies, of which one may well be in one fold."""
    files: dict[str, bytes] = {}
    for number in range(3):
        mine = {"PatientID": lambda n, number=number: f"{number}.{n}"} if also else {}
        files |= series(number, slices=6, StudyInstanceUID=lambda n, number=number: f"1.7.{number}.{n}", **mine)
    dataset, _ = build(write_files(tmp_path / "src", files), "--allow-unlabelled")
    assert dataset is not None
    assert len(dataset.series) == 3
    assert len(set(dataset.slices["fold_group"].to_pylist())) == 3


def exported_twice() -> dict[str, bytes]:
    """A study exported under two patient ids; the second one has a follow-up under that id only."""
    first = series(1, PatientID="P1")
    again = {f"again/{name}": data for name, data in series(1, PatientID="X1", StudyInstanceUID="1.5.9").items()}
    return first | again | series(2, PatientID="X1") | series(3)


def test_a_copy_links_its_patient_to_that_of_its_image(tmp_path: Path) -> None:
    dataset, printed = build(write_files(tmp_path / "src", exported_twice()), "--allow-unlabelled")
    assert dataset is not None
    assert "Quarantined: 4 duplicate." in printed
    lines = dataset.series.select(["patient_id", "fold_group", "fold"]).to_pylist()
    groups = {line["patient_id"]: line["fold_group"] for line in lines}
    assert groups == {"P1": "P1", "X1": "P1", "P3": "P3"}
    assert len({line["fold"] for line in lines if line["fold_group"] == "P1"}) == 1


def test_copies_link_nobody_where_images_are_no_links(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", exported_twice())
    dataset, _ = build(src, "--allow-unlabelled", "--link", "patient,study,series")
    assert dataset is not None
    assert set(dataset.slices["fold_group"].to_pylist()) == {"P1", "X1", "P3"}


def test_a_placeholder_of_a_copy_links_nobody(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(4):
        files |= series(number, PatientID="CLINIC")
        files |= {f"again/{name}": data for name, data in series(number, PatientID="CLINIC").items()}
    dataset, _ = build(write_files(tmp_path / "src", files), "--allow-unlabelled")
    assert dataset is not None
    assert len(set(dataset.slices["fold_group"].to_pylist())) == 4


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("located", [False, True])
def test_one_absent_position_does_not_turn_a_head_upside_down(located: bool, tmp_path: Path) -> None:
    """Numbered from the vertex down, as many scanners do; the position of one slice is absent."""
    files = series(
        1,
        slices=6,
        ImagePositionPatient=lambda n: None if n == 3 else [0.0, 0.0, 5.0 * n],
        InstanceNumber=lambda n: str(9 - n),
        SliceLocation=(lambda n: str(-5 * n)) if located else None,
    )
    dataset, _ = build(write_files(tmp_path / "src", files), "--allow-unlabelled")
    assert dataset is not None
    assert dataset.slices["position_z_mm"].to_pylist() == [0.0, 5.0, 10.0, None, 20.0, 25.0]
    assert flags(dataset) == {"no_position"}


@pytest.mark.parametrize("absent", [{0}, set(range(6))])
def test_two_passes_split_although_positions_are_absent(absent: set[int], tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(2):
        files |= series(
            number,
            slices=6,
            PatientID="P",
            StudyInstanceUID="1.5",
            SeriesInstanceUID="1.6",
            AcquisitionNumber=str(number + 1),
            InstanceNumber=lambda n: str(n + 1),
            SliceLocation=lambda n: str(5 * n),
            ImagePositionPatient=lambda n: None if n in absent else [0.0, 0.0, 5.0 * n],
        )
    dataset, _ = build(write_files(tmp_path / "src", files), "--allow-unlabelled")
    assert dataset is not None
    assert dataset.series["acquisition"].to_pylist() == ["AcquisitionNumber 1", "AcquisitionNumber 2"]
    assert dataset.series["n_slices"].to_pylist() == [6, 6]


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [".0", ",0"])
def test_ids_that_a_spreadsheet_made_decimal(point: str, tmp_path: Path) -> None:
    files = series(1, AccessionNumber="4711") | series(2, AccessionNumber="4712")
    lines = [["Accession Number", "any"], [f"4711{point}", f"1{point}"], [f"4712{point}", f"0{point}"]]
    labels = table(tmp_path / "labels.csv", lines, separator=";")
    dataset, _ = build(write_files(tmp_path / "src", files), "--labels", labels)
    assert dataset is not None
    assert dataset.slices["any"].to_pylist() == [1] * 4 + [0] * 4


# --- what leaves is told ---------------------------------------------------------------------------------------------


def test_a_series_in_another_plane_is_told(tmp_path: Path) -> None:
    files = series(1) | series(2, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    dataset, _ = build(write_files(tmp_path / "src", files), "--allow-unlabelled")
    assert dataset is not None
    assert len(dataset) == 4
    again = prep("build", "--src", tmp_path / "src", "--out", tmp_path / "b.zarr", *FOLDER, "--allow-unlabelled")
    assert "1 series without an axial slice (not_axial), for example 2/0.dcm." in again.stderr


def test_files_of_many_frames_are_told_with_a_way_out(tmp_path: Path) -> None:
    files = series(1, NumberOfFrames="3")
    _, printed = build(write_files(tmp_path / "src", files), "--allow-unlabelled", ends=1)
    assert "4 multi_frame. Convert them to one file per slice" in printed
    _, printed = build(write_files(tmp_path / "src", series(2)), "--allow-unlabelled")
    assert "Files of many frames: convert them to one file per slice" in printed


def test_the_remedy_for_lost_labels_is_that_of_their_reason(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", series(1) | series(2, ImageType=["DERIVED", "SECONDARY", "MIP"]))
    labels = table(tmp_path / "labels.csv", [["StudyInstanceUID", "any"], ["1.5.1", 0], ["1.5.2", 1]])
    _, printed = build(src, "--labels", labels, ends=1)
    assert "1 label (1 positive) by derived" in printed
    assert "--rescale-types" not in printed
    write_files(src, series(2, RescaleType="MGML"))
    _, printed = build(src, "--labels", labels, ends=1)
    assert "1 label (1 positive) by not_hu" in printed
    assert "--rescale-types" in printed


def test_slices_without_a_unit_among_those_of_another_leave_with_them(tmp_path: Path) -> None:
    files = series(1, RescaleType=lambda n: "MGML" if n % 2 else None)
    files |= series(2, RescaleType=lambda n: ["HU", "MGML", None, "HU"][n]) | series(3)
    dataset, printed = build(write_files(tmp_path / "src", files), "--allow-unlabelled")
    assert dataset is not None
    assert dataset.series["n_slices"].to_pylist() == [3, 4]
    assert "Quarantined: 5 not_hu." in printed
