"""Identity is checked: copies, conflicts, volumes and fold groups of folders as hospitals have them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ich_prep.dataset import Dataset
from ich_prep.dataset.dataset import open_dataset
from ich_prep.errors import BuildError, SourceError
from ich_prep.progress import NoProgress
from ich_prep.stages.checks import Allowances
from ich_prep.verify import verify
from tests.support.hospital import TINY, built, ct_bytes, write_files, write_labels

NO, YES = (0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 1, 1)


def flags_of(dataset: Dataset) -> Counter[str]:
    return Counter(pc.list_flatten(dataset.slices["flags"]).to_pylist())


def reasons_of(dataset: Dataset) -> Counter[str]:
    return Counter(dataset.read_table("quarantine")["reason"].to_pylist())


# --- copies and conflicts ----------------------------------------------------------------------------------------------


def test_copies_of_an_image_leave_one_row(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", {f"{folder}/{n}.dcm": ct_bytes(n) for n in range(3) for folder in "ab"})
    dataset = built(src, tmp_path / "data.zarr")
    assert len(dataset) == 3
    assert reasons_of(dataset) == {"duplicate": 3}


def test_a_copy_stands_by_for_a_file_that_does_not_decode(tmp_path: Path) -> None:
    """The first path is a truncated JPEG 2000 stream: its copy takes the row."""
    files = {f"b/{n}.dcm": ct_bytes(n) for n in range(3)}
    files["a/1.dcm"] = ct_bytes(1).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.4.90\0")  # not its syntax
    src = write_files(tmp_path / "src", files)
    dataset = built(src, tmp_path / "data.zarr", allow=Allowances(unlabelled=True, max_quarantined=1.0))
    assert len(dataset) == 3
    assert dataset.counts.ok == 3


def numbered(patient: str, images: range) -> dict[str, bytes]:
    """A de-identifier that numbers SOP Instance UIDs within each scan."""
    return {
        f"{patient}/{image}.dcm": ct_bytes(
            image,
            SOPInstanceUID=f"1.2.9.{n}",
            PatientID=patient,
            StudyInstanceUID=f"1.1.{images.start}",
            SeriesInstanceUID=f"1.2.{images.start}",
        )
        for n, image in enumerate(images)
    }


def test_different_images_of_one_uid_are_kept_and_flagged(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", numbered("A", range(4)) | numbered("B", range(10, 15)))
    labels = write_labels(tmp_path / "labels.csv", "series_instance_uid", {"1.2.0": NO, "1.2.10": YES})
    dataset = built(src, tmp_path / "data.zarr", labels=labels, allow=Allowances())
    assert len(dataset) == 9
    assert flags_of(dataset) == {"sop_uid_shared": 8}
    assert dataset.slices["any"].to_pylist() == [0] * 4 + [1] * 5


def test_labels_by_that_uid_make_it_a_conflict(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", numbered("A", range(4)) | numbered("B", range(10, 15)))
    labels = write_labels(tmp_path / "labels.csv", "sop_instance_uid", {f"1.2.9.{n}": YES for n in range(5)})
    with pytest.raises(BuildError, match=r"8 of 9 slices damaged .* 8 sop_conflict; for example"):
        built(src, tmp_path / "data.zarr", labels=labels, allow=Allowances())
    with pytest.raises(BuildError, match=r"4 labels \(4 positive\) by sop_conflict"):
        built(src, tmp_path / "data.zarr", labels=labels, allow=Allowances(max_quarantined=1.0))
    allow = Allowances(max_quarantined=1.0, lost_labels=True)
    dataset = built(src, tmp_path / "data.zarr", labels=labels, allow=allow)
    assert len(dataset) == 1
    assert dataset.root.lost_labels["sop_conflict"].model_dump() == {"labels": 4, "positive": 4}
    details = dataset.read_table("quarantine").filter(pc.field("path") == "A/2.dcm")["detail"].to_pylist()
    assert details == ["another image has its SOP Instance UID: B/12.dcm"]


def test_equal_images_of_two_uids_stay_flagged_and_linked(tmp_path: Path) -> None:
    files = {
        f"{patient}/{n}.dcm": ct_bytes(
            n if n == 7 else n + 100 * ord(patient),
            SOPInstanceUID=f"1.2.{ord(patient)}.{n}",
            PatientID=patient,
            StudyInstanceUID=f"1.3.{ord(patient)}",
            SeriesInstanceUID=f"1.4.{ord(patient)}",
        )
        for patient in "ABC"
        for n in range(5 if patient == "C" else 8)
    }
    src = write_files(tmp_path / "src", files)
    dataset = built(src, tmp_path / "data.zarr")
    assert flags_of(dataset)["same_image"] == 2
    groups = dict(zip(dataset.slices["patient_id"].to_pylist(), dataset.slices["fold_group"].to_pylist(), strict=True))
    assert groups == {"A": "A", "B": "A", "C": "C"}
    assert not verify(dataset.path, progress=NoProgress()).problems
    unlinked = TINY.model_copy(update={"link": ("patient", "study", "series")})
    dataset = built(src, tmp_path / "unlinked.zarr", spec=unlinked)
    assert set(dataset.slices["fold_group"].to_pylist()) == {"A", "B", "C"}


def test_blank_images_link_nobody(tmp_path: Path) -> None:
    air = np.zeros((16, 16), "<i2").tobytes()
    files = {
        f"{patient}/{n}.dcm": ct_bytes(
            n + 100 * ord(patient),
            PatientID=patient,
            StudyInstanceUID=f"1.3.{patient}",
            SeriesInstanceUID=f"1.4.{patient}",
            **({"PixelData": air} if n == 0 else {}),
        )
        for patient in "123"
        for n in range(4)
    }
    dataset = built(write_files(tmp_path / "src", files), tmp_path / "data.zarr")
    assert flags_of(dataset)["same_image"] == 3
    assert set(dataset.slices["fold_group"].to_pylist()) == {"1", "2", "3"}


# --- patients ----------------------------------------------------------------------------------------------------------


def scans(count: int, **attributes: Any) -> dict[str, bytes]:
    """Scans of three slices each, each of a patient of its own unless ``attributes`` says otherwise."""
    return {
        f"{scan:02d}/{n}.dcm": ct_bytes(
            100 * scan + n,
            **{
                "PatientID": f"P{scan}",
                "StudyInstanceUID": f"1.5.{scan}",
                "SeriesInstanceUID": f"1.6.{scan}",
                **{name: value(scan) if callable(value) else value for name, value in attributes.items()},
            },
        )
        for scan in range(count)
        for n in range(3)
    }


def test_one_id_for_everybody_is_reported_and_each_study_is_a_patient(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", scans(6, PatientID="HOSPITAL"))
    told: list[str] = []

    class Told(NoProgress):
        def say(self, text: str) -> None:
            told.append(text)

    dataset = built(src, tmp_path / "data.zarr", progress=Told())
    assert any("PatientID 'HOSPITAL' is on 6 of 6 studies" in text for text in told)
    assert set(dataset.slices["patient_id"].to_pylist()) == {f"1.5.{scan}" for scan in range(6)}
    assert flags_of(dataset) == {"patient_is_study": 18}


@pytest.mark.parametrize("value", ["", "ANONYMOUS", "0000"])
def test_placeholders_link_no_studies(value: str, tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", scans(4, PatientID=lambda scan: value if scan < 2 else f"P{scan}"))
    dataset = built(src, tmp_path / "data.zarr")
    assert dataset.counts.fold_groups == 4


def test_an_id_on_too_many_studies_ends_the_build(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", scans(12, PatientID=lambda scan: "SAME" if scan < 5 else f"P{scan}"))
    with pytest.raises(BuildError, match=r"5 of 12 studies.* the patient 'SAME' of 5 of them"):
        built(src, tmp_path / "data.zarr")
    dataset = built(src, tmp_path / "data.zarr", spec=TINY.model_copy(update={"patients": "study"}))
    assert dataset.counts.fold_groups == 12


def test_contradicting_sex_or_birth_year_is_flagged(tmp_path: Path) -> None:
    sexes = scans(3, PatientID=lambda scan: f"P{scan // 2}", PatientSex=lambda scan: "MF"[scan % 2])
    dataset = built(write_files(tmp_path / "a", sexes), tmp_path / "a.zarr")
    assert flags_of(dataset) == {"patient_conflict": 6}
    years = scans(3, PatientID=lambda scan: f"P{scan // 2}", PatientBirthDate=lambda scan: f"19{5 + scan}00101")
    dataset = built(write_files(tmp_path / "b", years), tmp_path / "b.zarr")
    assert flags_of(dataset) == {"patient_conflict": 6}


def test_equal_ids_of_two_issuers_are_two_patients(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", scans(2, PatientID="7", IssuerOfPatientID=lambda scan: f"H{scan}"))
    dataset = built(src, tmp_path / "data.zarr")
    assert set(dataset.slices["fold_group"].to_pylist()) == {"7^^^H0", "7^^^H1"}
    labels = write_labels(tmp_path / "labels.csv", "PatientID", {"7": [1, 0, 0, 0, 0, 1]})
    with pytest.raises(SourceError, match=r"two issuers gave.*00/0\.dcm and 01/0\.dcm.*by study_instance_uid"):
        built(src, tmp_path / "labelled.zarr", labels=labels)
    by_study = write_labels(tmp_path / "by-study.csv", "StudyInstanceUID", {"1.5.0": [1, 0, 0, 0, 0, 1]})
    assert built(src, tmp_path / "labelled.zarr", labels=by_study).slices["any"].to_pylist() == [1] * 3 + [None] * 3


# --- any folder --------------------------------------------------------------------------------------------------------

COHORT = st.lists(
    st.tuples(
        st.integers(0, 5), st.sampled_from(["A", "B", "C", ""]), st.integers(0, 2), st.integers(0, 2), st.integers(0, 6)
    ),
    min_size=2,
    max_size=24,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=COHORT, by_series=st.booleans())
def test_no_group_is_split_no_file_and_no_label_is_lost(
    files: list[tuple[int, str, int, int, int]], by_series: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Random files of few identifiers: found = rows + quarantined, labels = in the dataset + told, folds by group."""
    folder = tmp_path_factory.mktemp("cohort")
    src = write_files(
        folder / "src",
        {
            f"{number}.dcm": ct_bytes(
                image,
                SOPInstanceUID=f"1.7.{sop}",
                PatientID=patient,
                StudyInstanceUID=f"1.8.{study}",
                SeriesInstanceUID=f"1.9.{series}",
                ImageType=["DERIVED", "SECONDARY", "MIP"] if image == 6 else ["ORIGINAL", "PRIMARY", "AXIAL"],
            )
            for number, (sop, patient, study, series, image) in enumerate(files)
        },
    )
    key, prefix, column = ("series_instance_uid", "1.9.", 3) if by_series else ("sop_instance_uid", "1.7.", 0)
    keys = {f"{prefix}{line[column]}" for line in files}
    labels = write_labels(folder / "labels.csv", key, dict.fromkeys(sorted(keys), YES))
    allow = Allowances(lost_labels=True, max_quarantined=1.0)
    if all(line[4] == 6 for line in files):
        return
    try:
        dataset = built(src, folder / "data.zarr", labels=labels, allow=allow)
    except Exception as error:
        assert "No CT slices" in str(error)
        return
    slices = dataset.slices
    assert dataset.counts.found == len(files) == dataset.counts.ok + dataset.counts.quarantined
    kept = set(slices[key].to_pylist())
    assert len(kept) + sum(loss.labels for loss in dataset.root.lost_labels.values()) == len(keys)
    folds = {}
    for group, fold in zip(slices["fold_group"].to_pylist(), slices["fold"].to_pylist(), strict=True):
        assert folds.setdefault(group, fold) == fold
    for value in ("study_instance_uid", "series_instance_uid"):
        groups: dict[str, str] = {}
        for one, group in zip(slices[value].to_pylist(), slices["fold_group"].to_pylist(), strict=True):
            assert groups.setdefault(one, group) == group
    assert not verify(open_dataset(dataset.path).path, progress=NoProgress()).problems
