"""The plan: rows by position along the normal, what is flagged, what is quarantined, labels and folds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.dataset.classes import RSNA_CLASSES, UNKNOWN
from ich_prep.dataset.schema import series_schema, slice_schema
from ich_prep.dataset.spec import Spec
from ich_prep.errors import Reason
from ich_prep.layouts.assignment import Assignment
from ich_prep.layouts.labels import Key, LabelTable, no_labels
from ich_prep.stages import scan
from ich_prep.stages.folds import fold_of
from ich_prep.stages.plan import Plan, make_plan

UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
File = dict[str, Any]


def tilted(degrees: float) -> tuple[float, ...]:
    """The orientation of slices whose gantry leans by so much about the x axis."""
    angle = math.radians(degrees)
    return (1.0, 0.0, 0.0, 0.0, math.cos(angle), math.sin(angle))


def file(sop: str, z: float | None = 0.0, *, series: str = "series", **values: Any) -> File:
    """A line of the scan and its assignment, with keyword arguments for both."""
    usual: File = {
        "path": f"{series}/{sop}.dcm",
        "sop_instance_uid": sop,
        "series_instance_uid": series,
        "study_instance_uid": f"study of {series}",
        "patient_id": f"patient of {series}",
        "instance_number": None,
        "position": None if z is None else [0.0, 0.0, z],
        "orientation": list(UPRIGHT),
        "pixel_spacing": [0.5, 0.4],
        "transfer_syntax": "1.2.840.10008.1.2.1",
        "rows": 512,
        "columns": 500,
        "bits_allocated": 16,
        "bits_stored": 16,
        "signed": True,
        "monochrome1": False,
        "rescale_slope": 1.0,
        "rescale_intercept": -1024.0,
        "subset": "train",
        "subject": None,
        "repairs": [],
        "excluded_because": None,
    }
    return usual | values


def aside(path: str, reason: Reason, **values: Any) -> File:
    return {"path": path, "reason": str(reason), "detail": "why", **values}


def planned(files: Sequence[File], *, labels: LabelTable | None = None, spec: Spec | None = None) -> Plan:
    """Return the plan of files in the order of their paths, as a listing gives them."""
    lines = sorted(files, key=lambda line: line["path"])

    def column(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([line.get(name) for line in lines], kind)

    text = pa.string()
    assignment = Assignment(
        subset=column("subset", text),
        patient_id=column("patient_id", text),
        subject=column("subject", text),
        repairs=column("repairs", pa.list_(text)),
        excluded_because=column("excluded_because", text),
    )
    scanned = pa.Table.from_pylist(lines, scan.SCHEMA)
    return make_plan(scanned, assignment=assignment, labels=labels or no_labels(), spec=spec or Spec(layout="folder"))


def labelled(key: Key, values: dict[str, tuple[int, ...]], listed: Sequence[str] = ()) -> LabelTable:
    return LabelTable(
        key,
        pa.array(list(values), pa.string()),
        np.array(list(values.values()), np.int8).reshape(-1, len(RSNA_CLASSES)),
        pa.array(list(listed), pa.string()),
        pa.array([], pa.string()),
    )


def names(plan: Plan) -> list[str]:
    return list(plan.slices["sop_instance_uid"].to_pylist())


def flags(plan: Plan) -> dict[str, list[str]]:
    return dict(zip(names(plan), plan.slices["flags"].to_pylist(), strict=True))


# --- order and geometry ----------------------------------------------------------------------------------------------


def test_slices_are_sorted_by_position_and_not_by_name_or_number() -> None:
    plan = planned([file("c", 5.0, instance_number=9), file("a", 10.0, instance_number=1), file("b", -2.5)])
    assert names(plan) == ["b", "c", "a"]
    assert plan.slices["position_mm"].to_pylist() == [-2.5, 5.0, 10.0]
    assert plan.slices["slice_spacing_mm"].to_pylist() == [7.5, 5.0, 5.0]
    assert plan.slices["slice_index"].to_pylist() == [0, 1, 2]
    assert plan.slices["row"].to_pylist() == [0, 1, 2]


def test_positions_under_a_tilted_gantry_are_distances_along_the_normal() -> None:
    """A step of 5.10 mm in z is 5.00 mm between slices: shifts within the plane of the slices do not count."""
    degrees = math.degrees(math.acos(5.00 / 5.10))
    files = [
        file(str(number), position=[-125.0, -120.0, 5.10 * number], orientation=list(tilted(degrees)))
        for number in range(4)
    ]
    plan = planned(files)
    assert names(plan) == ["0", "1", "2", "3"]
    assert plan.slices["slice_spacing_mm"].to_pylist() == pytest.approx([5.0] * 4)
    assert plan.series["slice_spacing_mm"].to_pylist() == pytest.approx([5.0])
    assert plan.series["tilt_degrees"].to_pylist() == pytest.approx([degrees])
    assert set(map(tuple, flags(plan).values())) == {()}


@given(st.floats(-80, 80), st.lists(st.floats(-200, 200), min_size=2, max_size=8), st.floats(-300, 300))
@settings(max_examples=40, deadline=None)
def test_shifts_within_the_plane_change_no_position(degrees: float, heights: list[float], shift: float) -> None:
    plane = np.array(tilted(degrees))
    normal = np.cross(plane[:3], plane[3:])
    files = []
    for number, height in enumerate(heights):
        position = height * normal + shift * number * plane[3:] + 7 * plane[:3]
        files.append(file(f"{number:02d}", position=position.tolist(), orientation=plane.tolist()))
    plan = planned(files)
    # Slices less than 0.01 mm apart are at one position, in the order of their UIDs.
    assert sorted(plan.slices["position_mm"].to_pylist()) == pytest.approx(sorted(heights), abs=1e-6)
    assert sorted(names(plan)) == [line["sop_instance_uid"] for line in files]


def test_mixed_spacing_is_no_gap() -> None:
    heights = [0.0, 2.72, 5.44, 8.16, 13.59, 19.02, 24.45, 29.88]  # 2.72 mm below, 5.43 mm above
    plan = planned([file(f"{number}", z) for number, z in enumerate(heights)])
    assert plan.slices["slice_spacing_mm"].to_pylist() == pytest.approx([2.72] * 3 + [5.43] * 5)  # to the next slice
    assert plan.series["slice_spacing_mm"].to_pylist() == pytest.approx([5.43])
    assert not any(flags(plan).values())


def test_a_missing_slice_is_flagged_as_a_gap() -> None:
    plan = planned([file(f"{number}", 5.0 * number) for number in (0, 1, 2, 4, 5)])
    assert {name for name, found in flags(plan).items() if found} == {"4"}
    assert flags(plan)["4"] == ["gap_before"]
    assert plan.series["slice_spacing_mm"].to_pylist() == [5.0]


def test_duplicate_positions_are_flagged_and_kept() -> None:
    plan = planned([file("a", 0.0), file("b", 5.0), file("c", 5.004), file("d", 10.0)])
    assert names(plan) == ["a", "b", "c", "d"]
    assert flags(plan) == {"a": [], "b": ["duplicate_position"], "c": ["duplicate_position"], "d": []}
    assert plan.series["slice_spacing_mm"].to_pylist() == pytest.approx([5.0], abs=0.01)
    assert len(plan.quarantine) == 0


def test_one_slice_alone_has_no_spacing() -> None:
    plan = planned([file("a", 3.0)])
    assert plan.slices["position_mm"].to_pylist() == [3.0]
    assert plan.slices["slice_spacing_mm"].to_pylist() == [None]
    assert plan.series["slice_spacing_mm"].to_pylist() == [None]
    assert flags(plan) == {"a": []}


@pytest.mark.parametrize("lost", [{"position": None}, {"orientation": None}])
def test_a_series_in_which_a_position_is_missing_goes_by_instance_number(lost: File) -> None:
    files = [
        file("a", 10.0, instance_number=3),
        file("b", 5.0, instance_number=1) | lost,
        file("c", 0.0, instance_number=2),
        file("z", 1.0, series="whole"),
    ]
    plan = planned(files)
    assert names(plan) == ["b", "c", "a", "z"]
    assert plan.slices["position_mm"].to_pylist() == [None, None, None, 1.0]
    lost_flags = ["no_position"]
    assert flags(plan) == {"a": lost_flags, "b": lost_flags, "c": lost_flags, "z": []}


@pytest.mark.parametrize("lost", [{"position": None}, {"orientation": None}])
def test_without_all_numbers_a_slice_without_a_position_comes_last(lost: File) -> None:
    files = [file("a", 10.0), file("b", 5.0) | lost, file("c", 0.0, instance_number=7), file("d", 2.0) | lost]
    plan = planned(files)
    assert names(plan) == ["c", "a", "b", "d"]
    assert plan.slices["position_mm"].to_pylist() == [0.0, 10.0, None, None]
    assert flags(plan) == {"a": [], "b": ["no_position"], "c": [], "d": ["no_position"]}


def test_a_slice_of_another_orientation_is_flagged() -> None:
    plan = planned([file("a", 0.0), file("b", 5.0, orientation=list(tilted(20))), file("c", 10.0)])
    assert flags(plan) == {"a": [], "b": ["other_orientation"], "c": []}


def test_the_orientation_of_most_slices_is_that_of_the_series() -> None:
    """A scout has the first UID of all; along its normal the others would have one position."""
    scout = file("a", 15.0, orientation=list(tilted(90)))
    plan = planned([scout, file("b", 10.0), file("c", 0.0), file("d", 5.0)])
    assert [name for name in names(plan) if name != "a"] == ["c", "d", "b"]
    assert flags(plan)["a"] == ["other_orientation"]
    assert not any("other_orientation" in flags(plan)[name] for name in "bcd")
    assert plan.series["orientation"].to_pylist() == [list(UPRIGHT)]
    assert plan.series["tilt_degrees"].to_pylist() == [0.0]


def test_of_orientations_that_equally_many_slices_have_the_first_uid_decides() -> None:
    leaning = list(tilted(20))
    plan = planned(
        [file("a", 0.0, orientation=leaning), file("b", 5.0), file("c", 10.0, orientation=leaning), file("d")]
    )
    assert plan.series["orientation"].to_pylist() == [leaning]


def test_orientations_that_are_not_unit_vectors_are_normalised() -> None:
    plan = planned(
        [file("a", 0.0, orientation=[2.0, 0, 0, 0, 2.0, 0]), file("b", 5.0, orientation=[2.0, 0, 0, 0, 2.0, 0])]
    )
    assert plan.slices["position_mm"].to_pylist() == [0.0, 5.0]


def test_an_orientation_without_a_normal_is_ignored() -> None:
    plan = planned(
        [file("a", 0.0, orientation=[1.0, 0, 0, 1.0, 0, 0], instance_number=2), file("b", 5.0, instance_number=1)]
    )
    assert names(plan) == ["b", "a"]
    assert flags(plan) == {key: ["direction_unknown", "no_position"] for key in "ab"}


def test_inverted_slices_are_flagged_and_unchanged() -> None:
    assert flags(planned([file("a", monochrome1=True)])) == {"a": ["monochrome1"]}


# --- series, rows, determinism ---------------------------------------------------------------------------------------

headers = st.builds(
    file,
    st.integers(0, 25).map(lambda number: f"sop{number}"),
    st.one_of(st.none(), st.integers(-3, 3).map(float)),
    series=st.sampled_from(["s1", "s2", "s3"]),
    path=st.integers(0, 10**6).map("f{:07d}".format),
    instance_number=st.one_of(st.none(), st.integers(0, 5)),
    subset=st.sampled_from(["train", "test"]),
    patient_id=st.sampled_from(["p1", "p2", None]),
    orientation=st.sampled_from([list(UPRIGHT), list(tilted(15)), None]),
    excluded_because=st.sampled_from([None, None, None, "not plain"]),
)
listings = st.lists(headers, max_size=20, unique_by=lambda line: line["path"])


@given(listings)
@settings(max_examples=40, deadline=None)
def test_every_file_has_a_row_or_a_line_in_the_quarantine(files: list[File]) -> None:
    plan = planned(files)
    assert len(plan.slices) + len(plan.quarantine) == len(files)
    kept, lost = plan.slices["path"].to_pylist(), plan.quarantine["path"].to_pylist()
    assert sorted(kept + lost) == sorted(line["path"] for line in files)
    assert lost == sorted(lost)
    assert set(plan.quarantine["reason"].to_pylist()) <= {"duplicate", "scan_type"}


@given(listings)
@settings(max_examples=40, deadline=None)
def test_the_slices_of_a_series_are_contiguous_and_in_order(files: list[File]) -> None:
    plan = planned(files)
    slices = plan.slices.select(slice_schema().names).to_pylist()
    assert plan.series.schema == series_schema()
    assert [line["row"] for line in slices] == list(range(len(slices)))
    series = plan.series.to_pylist()
    assert [line["series_row"] for line in series] == list(range(len(series)))
    keys = [(line["subset"], line["series_instance_uid"], line["volume_in_series"]) for line in series]
    assert keys == sorted(set(keys))
    at = 0
    for line in series:
        assert line["first_row"] == at
        part = slices[at : at + line["n_slices"]]
        at += line["n_slices"]
        assert {(s["subset"], s["series_instance_uid"]) for s in part} == {
            (line["subset"], line["series_instance_uid"])
        }
        assert [s["slice_index"] for s in part] == list(range(len(part)))
        positions = [s["position_mm"] for s in part]
        placed = [position for position in positions if position is not None]
        assert positions == sorted(placed) + [None] * (len(positions) - len(placed))
    assert at == len(slices)


@given(listings, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_file_paths_do_not_affect_rows(files: list[File], random: Any) -> None:
    """Rows depend only on headers: other paths, and so another order of the listing, give the same rows."""
    unique = {(line["sop_instance_uid"]): line for line in files}
    files = list(unique.values())
    paths = [line["path"] for line in files]
    random.shuffle(paths)
    moved = [line | {"path": path} for line, path in zip(files, paths, strict=True)]
    before, after = planned(files), planned(moved)
    assert after.slices.drop_columns("path").equals(before.slices.drop_columns("path"))
    assert after.series.equals(before.series)


def test_test_slices_have_no_fold_and_patients_keep_theirs() -> None:
    files = [file("a", series="s1", patient_id="p"), file("b", series="s2", patient_id="p"), file("c", subset="test")]
    plan = planned(files, spec=Spec(layout="folder", folds=7))
    folds = dict(zip(names(plan), plan.slices["fold"].to_pylist(), strict=True))
    assert folds == {"a": fold_of("p", folds=7), "b": fold_of("p", folds=7), "c": None}
    assert sorted(plan.series["fold"].to_pylist(), key=str) == sorted(folds.values(), key=str)


def test_a_slice_without_a_patient_is_a_patient_by_its_study_or_series() -> None:
    plan = planned(
        [file("a", series="s1", patient_id=None), file("b", series="s2", patient_id=None, study_instance_uid=None)]
    )
    assert plan.slices["patient_id"].to_pylist() == ["study of s1", "s2"]
    assert flags(plan) == {"a": ["patient_is_study"], "b": ["patient_is_study"]}


# --- what is quarantined ---------------------------------------------------------------------------------------------


def test_the_second_file_of_an_instance_is_quarantined_and_names_the_first() -> None:
    plan = planned([file("a", path="2.dcm"), file("a", path="1.dcm"), file("a", path="3.dcm"), file("b", 5.0)])
    assert plan.slices["path"].to_pylist() == ["1.dcm", "series/b.dcm"]
    lines = plan.quarantine.to_pylist()
    assert [(line["path"], line["stage"], line["row"], line["reason"]) for line in lines] == [
        ("2.dcm", "plan", None, "duplicate"),
        ("3.dcm", "plan", None, "duplicate"),
    ]
    assert all("1.dcm" in line["detail"] for line in lines)


def test_a_slice_that_is_in_training_and_in_the_test_is_kept_in_training() -> None:
    plan = planned([file("a", path="stage_1_test/a.dcm", subset="test"), file("a", path="stage_2_train/a.dcm")])
    assert plan.slices["subset"].to_pylist() == ["train"]
    assert plan.quarantine["path"].to_pylist() == ["stage_1_test/a.dcm"]


def test_files_quarantined_by_scan_and_layout_are_listed_with_their_stage() -> None:
    plan = planned([file("a"), file("b", excluded_because="the scan type 'CT BONE'"), aside("x.txt", Reason.NOT_DICOM)])
    assert names(plan) == ["a"]
    assert [tuple(line.values()) for line in plan.quarantine.to_pylist()] == [
        ("series/b.dcm", "plan", None, "scan_type", "the scan type 'CT BONE'"),
        ("x.txt", "scan", None, "not_dicom", "why"),
    ]


def test_a_plan_without_slices_is_empty_and_complete() -> None:
    plan = planned([aside("x.txt", Reason.NOT_DICOM)])
    assert len(plan.slices) == len(plan.series) == 0
    assert len(plan.quarantine) == 1


# --- labels ----------------------------------------------------------------------------------------------------------

NEGATIVE, SUBDURAL = (0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 1, 1)


def test_labels_by_slice() -> None:
    labels = labelled("sop_instance_uid", {"b": SUBDURAL, "gone": NEGATIVE, "a": NEGATIVE}, listed=["y", "c"])
    plan = planned([file("a", 0.0), file("b", 5.0), file("c", 10.0, subset="test"), file("d", 10.0)], labels=labels)
    lines = {line["sop_instance_uid"]: line for line in plan.slices.to_pylist()}
    assert [lines["b"][name] for name in RSNA_CLASSES] == list(SUBDURAL)
    assert [lines["c"][name] for name in RSNA_CLASSES] == [None] * 6
    assert {name: line["label_level"] for name, line in lines.items()} == {
        "a": "slice",
        "b": "slice",
        "c": "none",
        "d": "none",
    }
    assert {name: line["label_line"] for name, line in lines.items()} == {"a": 2, "b": 0, "c": 1, "d": None}
    assert plan.unlabelled.to_pylist() == ["d"]  # test slices need no label
    assert plan.without_image.to_pylist() == ["gone"]
    train = plan.series.filter(pc.equal(plan.series["subset"], "train")).to_pylist()
    assert [train[0][name] for name in RSNA_CLASSES] == list(SUBDURAL)


@pytest.mark.parametrize(("key", "value"), [("series_instance_uid", "s1"), ("subject", "CQ500-CT-0")])
def test_labels_of_a_whole_scan_are_copied_to_its_slices_as_such(key: Key, value: str) -> None:
    labels = labelled(key, {value: SUBDURAL, "gone": NEGATIVE})
    files = [file("a", 0.0, series="s1", subject="CQ500-CT-0"), file("b", 5.0, series="s1", subject="CQ500-CT-0")]
    plan = planned([*files, file("c", series="s2")], labels=labels)
    assert plan.slices["label_level"].to_pylist() == ["series", "series", "none"]
    assert plan.slices["subdural"].to_pylist() == [1, 1, None]
    assert plan.series["label_level"].to_pylist() == ["series", "none"]
    assert plan.series["any"].to_pylist() == [1, None]
    assert plan.unlabelled.to_pylist() == ["c"]
    assert plan.without_image.to_pylist() == ["gone"]


def test_the_label_of_a_quarantined_file_has_an_image() -> None:
    labels = labelled("sop_instance_uid", dict.fromkeys(["a", "by_header", "by_name", "odd_name", "bone"], NEGATIVE))
    files = [
        file("a"),
        file("bone", excluded_because="bone"),
        aside("x/1.dcm", Reason.TRUNCATED, sop_instance_uid="by_header"),
        aside("x/by_name.dcm", Reason.EMPTY_FILE),
        aside("x/odd_name\n.dcm", Reason.EMPTY_FILE),
    ]
    assert planned(files, labels=labels).without_image.to_pylist() == []


def test_a_series_label_is_unknown_only_if_all_its_slices_are() -> None:
    unknown = (UNKNOWN,) * 6
    labels = labelled("sop_instance_uid", {"a": unknown, "b": (0, UNKNOWN, 1, UNKNOWN, 0, 1), "c": unknown})
    plan = planned([file("a", 0.0, series="s1"), file("b", 5.0, series="s1"), file("c", series="s2")], labels=labels)
    assert [[line[name] for name in RSNA_CLASSES] for line in plan.series.to_pylist()] == [
        [0, None, 1, None, 0, 1],
        [None] * 6,
    ]
    assert plan.series["label_level"].to_pylist() == ["slice", "none"]
