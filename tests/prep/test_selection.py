"""The user's choice of series: filters, a least number of slices, one series of each study."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_prep.dataset.spec import Spec
from ich_prep.errors import UsageError
from ich_prep.stages.plan_tables import constant
from ich_prep.stages.scan import SCHEMA
from ich_prep.stages.selection import KEYWORDS, check_filters, parse_filter, select

Line = dict[str, Any]


def line(series: str, number: int, **values: Any) -> Line:
    """A slice of the scan with the layout's columns."""
    usual = {
        "path": f"{series}/{number}",
        "sop_instance_uid": f"{series}.{number}",
        "series_instance_uid": series,
        "study_instance_uid": "1.9",
        "assigned_patient": "P1",
        "scan_type": "unknown",
    }
    return usual | values


def series(name: str, slices: int, **values: Any) -> list[Line]:
    return [line(name, number, **values) for number in range(slices)]


def selected(lines: list[Line], **options: Any) -> dict[str, str | None]:
    """The detail of each path that the options leave out, None for those that stay."""
    columns = [*SCHEMA, *(pa.field(name, pa.string()) for name in ("assigned_patient", "scan_type", "image"))]
    placed = pa.Table.from_pylist(lines, pa.schema(columns))
    result = select(placed, Spec(**options))
    assert result.schema == placed.schema
    assert result["path"] == placed["path"]
    found = result.select(["path", "reason", "detail"]).to_pylist()
    before = placed["reason"].to_pylist()
    assert all(one["reason"] in ("filtered", old) for one, old in zip(found, before, strict=True))
    return {one["path"]: one["detail"] if one["reason"] == "filtered" else None for one in found}


def kept(lines: list[Line], **options: Any) -> set[str]:
    """The series that stay, as the part of the path before the slash."""
    return {path.split("/")[0] for path, detail in selected(lines, **options).items() if detail is None}


PARTS = [*series("a", 1, body_part="HEAD"), *series("b", 1, body_part="Brain"), *series("c", 1, body_part="CHEST")]
PARTS += series("none", 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("BodyPartExamined=HEAD", {"a"}),
        ("BodyPartExamined=head,brain,skull", {"a", "b"}),
        (" bodypartexamined = HEAD , ", {"a"}),
        ("body_part=Chest", {"c"}),
        ("BodyPartExamined=HEA", set()),
        ("BodyPartExamined~hea|RAI", {"a", "b"}),
        ("BodyPartExamined~^.+$", {"a", "b", "c"}),
    ],
)
def test_include_keeps_what_matches_and_exclude_the_rest(text: str, expected: set[str]) -> None:
    assert kept(PARTS, include=[text]) == expected
    assert kept(PARTS, exclude=[text]) == {"a", "b", "c", "none"} - expected


def test_all_of_several_includes_and_any_of_several_excludes() -> None:
    lines = [
        *series("thin", 1, body_part="HEAD", slice_thickness=1.0, kvp=120.0),
        *series("thick", 1, body_part="HEAD", slice_thickness=5.0, kvp=100.0),
        *series("chest", 1, body_part="CHEST", slice_thickness=5.0, kvp=120.0),
    ]
    assert kept(lines, include=["BodyPartExamined=HEAD", "SliceThickness=5"]) == {"thick"}
    assert kept(lines, exclude=["KVP=100", "BodyPartExamined=CHEST"]) == {"thin"}
    details = selected(lines, include=["BodyPartExamined=HEAD"], exclude=["KVP=100"])
    assert details == {
        "thin/0": None,
        "thick/0": "--exclude KVP=100",
        "chest/0": "not --include BodyPartExamined=HEAD",
    }


@pytest.mark.parametrize("number", ["5", "5.0", "5.00", " 5. "])
def test_numbers_are_equal_by_value(number: str) -> None:
    lines = [*series("a", 1, slice_thickness=5.0), *series("b", 1, slice_thickness=0.625), *series("c", 1, kvp=50.0)]
    assert kept(lines, include=[f"SliceThickness={number}"]) == {"a"}
    assert kept(lines, include=["SliceThickness=0.6250"]) == {"b"}


def test_long_numbers_and_uids_stay_exact() -> None:
    lines = [line("a", 0, acquisition_number=20190304101112), line("b", 0, acquisition_number=20190304101113)]
    assert kept(lines, include=["AcquisitionNumber=20190304101113"]) == {"b"}
    uids = [line("1.2.0", 0), line("1.2", 0)]
    assert kept(uids, include=["SeriesInstanceUID=1.2"]) == {"1.2"}


def test_any_component_of_a_multi_valued_element_matches() -> None:
    lines = [
        *series("a", 1, image_type="ORIGINAL\\PRIMARY\\AXIAL", convolution_kernel="Hr40f\\2"),
        *series("b", 1, image_type="DERIVED\\PRIMARY\\MPR"),
    ]
    assert kept(lines, include=["ImageType=axial"]) == {"a"}
    assert kept(lines, include=[r"ImageType=DERIVED\PRIMARY\MPR"]) == {"b"}
    assert kept(lines, exclude=["ConvolutionKernel=HR40F"]) == {"b"}


def test_files_that_left_already_keep_their_reason() -> None:
    lines = [line("a", 0, reason="localizer", detail="a scout", body_part="CHEST"), line("a", 1, body_part="CHEST")]
    table = selected(lines, include=["BodyPartExamined=HEAD"])
    assert table == {"a/0": None, "a/1": "not --include BodyPartExamined=HEAD"}


@pytest.mark.parametrize(
    "text",
    ["", "HEAD", "BodyPartExamined", "BodyPartExamined=", "BodyPartExamined~ ", "=HEAD", "a b=c", "(0018,0015)=HEAD"],
)
def test_what_is_no_filter_is_refused_with_the_expected_form(text: str) -> None:
    with pytest.raises(UsageError, match="expected KEYWORD=VALUE,VALUE or KEYWORD~REGEX"):
        parse_filter(text, where="--include")


@pytest.mark.parametrize("pattern", ["(", "*", "[a", "(?P<1>a)", "a{99999999999999999999}"])
def test_what_is_no_regular_expression_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="is not a regular expression"):
        check_filters(Spec(exclude=[f"SeriesDescription~{pattern}"]))


def test_an_unknown_keyword_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(UsageError, match="Did you mean 'BodyPartExamined'") as caught:
        check_filters(Spec(include=["BodyPartExamine=HEAD"]))
    assert "--include" in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_a_filter_or_a_usage_error(text: str) -> None:
    try:
        parsed = parse_filter(text, where="--include")
    except UsageError as error:
        assert len(str(error)) < 2000
        return
    assert parsed.column in KEYWORDS.values()
    assert parsed.matches("HEAD") in (True, False)


def test_every_keyword_is_a_column_of_the_scan() -> None:
    assert set(KEYWORDS.values()) - {"scan_type"} <= set(SCHEMA.names)


# --- a least number of slices ----------------------------------------------------------------------------------------


def test_short_series_leave() -> None:
    lines = [*series("short", 3), *series("long", 4)]
    assert kept(lines, min_slices=4) == {"long"}
    assert kept(lines, min_slices=3) == {"short", "long"}
    assert selected(lines, min_slices=4)["short/0"] == "a series of fewer than 4 slices"


def test_slices_that_filters_removed_do_not_count() -> None:
    lines = [*series("a", 3, kvp=120.0), *(line("a", 10 + n, kvp=80.0) for n in range(3))]
    assert kept(lines, min_slices=4, include=["KVP=120"]) == set()


def test_copies_of_a_file_do_not_make_a_series_longer() -> None:
    twice = [line("a", number % 3, path=f"a/{number}", image=f"image {number % 3}") for number in range(6)]
    assert kept(twice, min_slices=4) == set()
    different = [line("a", number % 3, path=f"a/{number}", image=f"image {number}") for number in range(6)]
    assert kept(different, min_slices=6) == {"a"}
    without_uid = [line("a", number, sop_instance_uid=None) for number in range(6)]
    assert kept(without_uid, min_slices=6) == {"a"}


def test_one_series_uid_in_two_studies_is_two_series() -> None:
    lines = [
        *(line("a", n, path=f"one/{n}", study_instance_uid="1.1", assigned_patient="P1") for n in range(5)),
        *(line("a", 10 + n, path=f"two/{n}", study_instance_uid="1.2", assigned_patient="P2") for n in range(3)),
    ]
    assert kept(lines, min_slices=4) == {"one"}


# --- one series of each study ----------------------------------------------------------------------------------------

HEADS = {"scan_type": "plain", "slice_thickness": 5.0, "convolution_kernel": "H31s", "image_type": "ORIGINAL\\PRIMARY"}


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"slice_thickness": 1.0}, {"scan_type": "contrast"}),
        ({"slice_thickness": 1.0}, {"scan_type": "unknown"}),
        ({"scan_type": "unknown", "slice_thickness": 1.0}, {"scan_type": "bone"}),
        ({"slice_thickness": 5.0}, {"slice_thickness": 0.625}),
        ({"slice_thickness": 2.0}, {"slice_thickness": None}),
        ({"image_type": "DERIVED\\PRIMARY\\MPR"}, {"convolution_kernel": "H60s"}),
        ({}, {"image_type": "DERIVED\\PRIMARY\\MPR"}),
        ({}, {"convolution_kernel": None}),
    ],
)
def test_the_better_series_of_a_study_is_chosen(better: Line, worse: Line) -> None:
    lines = [*series("z", 3, **(HEADS | better)), *series("a", 9, **(HEADS | worse))]
    assert kept(lines, one_series_per_study="thickest") == {"z"}
    assert selected(lines, one_series_per_study="thickest")["a/0"] == "another series of its study was chosen"


def test_then_the_longest_series_by_images_and_then_the_first_uid() -> None:
    assert kept([*series("z", 4), *series("a", 3)], one_series_per_study="thickest") == {"z"}
    copies = [line("a", number % 3, path=f"a/{number}", image=f"image {number % 3}") for number in range(9)]
    assert kept([*series("z", 4), *copies], one_series_per_study="thickest") == {"z"}
    assert kept([*series("z", 4), *series("a", 4)], one_series_per_study="thickest") == {"a"}


def test_a_lossy_copy_counts_as_original() -> None:
    lines = [
        *series("z", 3, image_type="DERIVED\\PRIMARY\\AXIAL", lossy="01"),
        *series("a", 3, image_type="DERIVED\\PRIMARY\\AXIAL", lossy="00"),
    ]
    assert kept(lines, one_series_per_study="thickest") == {"z"}


def test_each_study_keeps_one_also_where_study_uids_identify_nothing() -> None:
    for study in (None, "", "0", "ANONYMOUS"):
        lines = [*series("a", 3, study_instance_uid=study), *series("b", 3, study_instance_uid=study)]
        assert kept(lines, one_series_per_study="thickest") == {"a", "b"}


def test_one_study_uid_on_many_patients_is_many_studies() -> None:
    lines = [one for number in range(6) for one in series(f"s{number}", 3, assigned_patient=f"P{number}")]
    assert kept(lines, one_series_per_study="thickest") == {f"s{number}" for number in range(6)}


def test_a_patient_id_for_every_file_does_not_divide_a_series() -> None:
    lines = [line(name, n, assigned_patient=f"{name}{n}") for name in ("a", "b") for n in range(6)]
    assert len(kept(lines, one_series_per_study="thickest", min_slices=6)) >= 1
    assert all(detail is None for path, detail in selected(lines, min_slices=6).items())


def test_a_series_is_chosen_among_those_that_other_options_left() -> None:
    lines = [*series("thick", 2, slice_thickness=5.0), *series("thin", 9, slice_thickness=1.0)]
    assert kept(lines, one_series_per_study="thickest", min_slices=5) == {"thin"}
    assert kept(lines, one_series_per_study="thickest", exclude=["SliceThickness=5"]) == {"thin"}


def test_nothing_to_choose_from_is_no_error() -> None:
    everything = {"min_slices": 3, "one_series_per_study": "thickest", "include": ["KVP=120"]}
    assert kept([], **everything) == set()
    assert kept([line("a", 0, reason="not_ct", series_instance_uid=None)], **everything) == {"a"}
    assert kept(series("a", 9), **everything) == set()


COHORT = st.lists(
    st.builds(
        lambda which, number, study, patient, thickness, kind: line(
            which, number, study_instance_uid=study, assigned_patient=patient, slice_thickness=thickness, scan_type=kind
        ),
        st.sampled_from("abcd"),
        st.integers(0, 5),
        st.sampled_from(["1.1", "1.2", None]),
        st.sampled_from(["P1", "P2", None]),
        st.sampled_from([None, 1.0, 5.0]),
        st.sampled_from(["plain", "contrast", "unknown"]),
    ),
    max_size=40,
)


@given(COHORT, st.integers(1, 4), st.booleans())
def test_what_is_kept_does_not_depend_on_the_order_of_the_files(lines: list[Line], least: int, one: bool) -> None:
    numbered = [entry | {"path": f"{entry['series_instance_uid']}/{n}"} for n, entry in enumerate(lines)]
    options: Line = {"min_slices": least, "one_series_per_study": "thickest" if one else "off"}
    assert selected(numbered, **options) == selected(numbered[::-1], **options)
    if numbered and least == 1:
        assert any(detail is None for detail in selected(numbered, **options).values())


def test_without_options_the_table_is_returned_as_it_is() -> None:
    placed = pa.table({"reason": constant(3, "x")})
    assert select(placed, Spec()) is placed
