"""The parts of a report: advice for every word, statistics against the obvious way to compute them, bounded charts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ich_prep.advice import FLAGS, REASONS, REPAIRS
from ich_prep.cli import app
from ich_prep.dataset.schema import LostLabels
from ich_prep.errors import Reason
from ich_prep.html import png_uri
from ich_prep.messages import escaped_line
from ich_prep.pixels.thumbnail import thumbnail_png
from ich_prep.report.attention import points, verdict
from ich_prep.report.charts import Band, histogram_chart, histogram_of, short, ticks
from ich_prep.report.equal_images import EqualImages, find_equal_images
from ich_prep.report.labels import MAX_CLASSES, MAX_GROUPS, ClassCounts, Part, part_rows, parts_by_fold
from ich_prep.report.pictures import LARGE, MAX_LARGE, MAX_SMALL, SMALL, sample
from ich_prep.report.tables import ReportTables

FORMAT = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


# --- advice ----------------------------------------------------------------------------------------------------------


def test_every_reason_has_advice() -> None:
    assert list(REASONS) == list(Reason)


def test_every_flag_and_repair_of_the_format_has_advice() -> None:
    text = FORMAT.split("\nFlags:\n", 1)[1].split("\nA fold group ", 1)[0]
    flags = re.findall(r"^\* `(\w+)`", text, re.MULTILINE)
    assert len(flags) > 20
    assert list(FLAGS) == flags
    (repairs,) = re.findall(r"^\| `repairs` \|[^|]*\|(.*)\|$", FORMAT, re.MULTILINE)
    assert list(REPAIRS) == re.findall(r"`(\w+)`", repairs)


@pytest.mark.parametrize("word", [*REASONS, *FLAGS, *REPAIRS])
def test_advice_is_a_sentence_and_names_what_exists(word: str) -> None:
    advice = {**REASONS, **FLAGS, **REPAIRS}[word]
    assert advice.what.endswith(".")
    assert advice.todo.endswith(".")
    assert advice.todo != "Nothing." or advice.level == "fine"
    commands = {command.callback.__name__: command for command in app.registered_commands if command.callback}
    assert set(re.findall(r"ich-prep (\w+)", advice.todo)) <= set(commands)
    help_text = "".join(
        CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output for name in ("build", "verify")
    )
    for option in re.findall(r"--[a-z-]+", advice.todo):
        assert f"{option} " in help_text or f"{option}/" in help_text, option


def test_damage_is_something_to_act_on() -> None:
    assert {reason for reason in Reason if reason.is_damage and REASONS[reason].level == "fine"} == set()
    assert {reason for reason in Reason if reason.is_filter and REASONS[reason].level != "fine"} == set()


# --- labels ---------------------------------------------------------------------------------------------------------


def test_parts_count_slices_and_volumes_of_each_fold() -> None:
    tables = tables_of(
        a=[1, 0, None, None, 1],
        series_row=[0, 0, 1, 2, 3],
        subset=["test", "test", "train", "train", "train"],
        fold=pa.array([None, None, 10, 2, 2], pa.int8()),
    )
    assert parts_by_fold(tables) == [
        Part("train 2", 2, 2, 2, (1, 0)),
        Part("train 10", 1, 1, 1, (0, 0)),
        Part("test", 2, 2, 1, (1, 0)),
    ]


def test_a_table_of_many_folds_and_classes_stays_small() -> None:
    rows = part_rows([Part(f"train {k}", 9, 9, 1, tuple(range(200))) for k in range(100)])
    assert len(rows) == MAX_GROUPS + 1
    assert len(rows[0].cells) == 3 + MAX_CLASSES
    assert rows[-1].cells == ["and 60 more"]


# --- what needs attention --------------------------------------------------------------------------------------------


def tables_of(**columns: Any) -> ReportTables:
    """Return tables of two classes; columns of slices that are not given are those of labelled slices of one series."""
    rows = len(next(iter(columns.values())))
    values: dict[str, Any] = {
        "patient_id": ["P"] * rows,
        "status": ["ok"] * rows,
        "label_level": ["slice"] * rows,
        "series_row": [0] * rows,
        "flags": pa.array([[]] * rows, pa.list_(pa.string())),
        "content_hash": [str(row) for row in range(rows)],
        "a": pa.array([0] * rows, pa.int8()),
        "b": pa.array([0] * rows, pa.int8()),
    }
    values |= {name: pa.array(v, pa.int8()) if name in "ab" else v for name, v in columns.items()}
    empty = pa.table({})
    series = pa.table({"series_row": range(max(values["series_row"]) + 1)})
    return ReportTables(classes=("a", "b"), slices=pa.table(values), series=series, shards=empty, quarantine=empty)


NONE = EqualImages(0, 0, [])
CLASSES = [ClassCounts("a", 20, 80, 0, 5, 5), ClassCounts("b", 300, 700, 0, 9, 9)]
FOLDS = [Part("train 0", 500, 500, 9, (10, 150)), Part("train 1", 500, 500, 9, (10, 150))]


def points_of(tables: ReportTables | None = None, **changed: Any) -> list[tuple[str, str]]:
    given: dict[str, Any] = {"lost": {}, "reasons": {}, "equal": NONE, "classes": CLASSES, "folds": FOLDS}
    found = points(tables or tables_of(a=[0, 1]), **{**given, **changed})
    return [(point.level, point.title) for point in found]


def test_nothing_to_say_is_said() -> None:
    assert points_of() == [("fine", "Nothing")]


def test_the_urgent_comes_first() -> None:
    lost = {"filtered": LostLabels(labels=9, positive=9), "derived": LostLabels(labels=4, positive=2)}
    found = points_of(lost=lost, reasons={"localizer": 7, "derived": 4, "truncated": 2})
    assert found == [
        ("act", "4 labels lost, 2 of them positive"),
        ("act", "2 files quarantined and may be missed"),
        ("check", "4 files quarantined by a rule that may be wrong here"),
        ("fine", "9 labels lost by an option of the build, 9 of them positive"),
    ]
    every = points(tables_of(a=[0]), lost=lost, reasons={}, equal=NONE, classes=CLASSES, folds=FOLDS)
    assert verdict(every) == "1 to act on."
    assert verdict([]) == "No reason to worry was found."


def test_folds_that_lack_a_class_or_have_most_of_it() -> None:
    folds = [Part("train 0", 500, 500, 9, (20, 290)), Part("train 1", 500, 500, 9, (0, 10))]
    assert points_of(folds=folds) == [
        ("check", "No positive slice of a in train 1"),
        ("check", "Uneven share of b in train 1"),
    ]


def test_slices_without_labels() -> None:
    none = [Part("train 0", 500, 0, 9, (0, 0)), Part("test", 500, 0, 9, (0, 0))]
    assert points_of(folds=none)[0] == ("act", "No slice to train on has a label")
    some = [Part("train 0", 500, 400, 9, (10, 10)), Part("test", 500, 0, 9, (0, 0))]
    assert points_of(folds=some) == [("check", "100 of 500 slices of the subset train have no label")]


def test_labels_of_whole_series_and_flags() -> None:
    tables = tables_of(a=[0, 1], label_level=["series"] * 2, flags=pa.array([["noise"], ["decimal_comma", "noise"]]))
    assert points_of(tables) == [
        ("act", "2 slices flagged noise"),
        ("check", "Labels of a whole series were copied to its slices"),
    ]


# --- equal images ----------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from("xyz"),
            st.sampled_from("PQ"),
            st.sampled_from([0, 1, None]),
            st.sampled_from([0, 1, None]),
            st.sampled_from(["ok", "ok", "truncated"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_equal_images_are_those_of_a_loop_over_pairs(lines: list[tuple[Any, ...]]) -> None:
    hashes, patients, a, b, status, constant = zip(*lines, strict=True)
    flags = pa.array([["constant"] if one else [] for one in constant], pa.list_(pa.string()))
    found = find_equal_images(
        tables_of(content_hash=hashes, patient_id=patients, a=list(a), b=list(b), status=status, flags=flags)
    )
    groups: dict[str, list[int]] = {}
    for row in range(len(lines)):
        if status[row] == "ok" and not constant[row]:
            groups.setdefault(hashes[row], []).append(row)
    shared = [rows for rows in groups.values() if len(rows) > 1]
    apart = [rows for rows in shared if len({patients[row] for row in rows}) > 1]
    conflicts = [rows for rows in apart if any({0, 1} <= {column[row] for row in rows} for column in (a, b))]
    assert (found.images, found.under_patients) == (len(shared), len(apart))
    assert sorted(rows.tolist() for rows in found.conflicts) == sorted(conflicts)


# --- pictures and charts ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(0, 20), st.integers(0, 2**32))
def test_a_sample_has_at_most_one_slice_of_a_volume(series: list[int], number: int, seed: int) -> None:
    series_row = np.array(series, np.int64)
    rows = np.arange(0, len(series), 2)
    drawn = sample(rows, series_row, number, seed=seed, name="any")
    assert len(drawn) == min(number, len(set(series_row[rows].tolist())))
    assert len(set(series_row[drawn].tolist())) == len(drawn)
    assert set(drawn.tolist()) <= set(rows.tolist())
    assert drawn.tolist() == sample(rows, series_row, number, seed=seed, name="any").tolist()


def test_pictures_of_noise_leave_room_for_the_rest_of_the_page() -> None:
    rng = np.random.default_rng(0)
    total = 0
    for size, most in ((SMALL, MAX_SMALL), (LARGE, MAX_LARGE)):
        png = thumbnail_png(rng.integers(0, 256, (size, size), dtype=np.uint8), size)
        total += most * len(png_uri(png))
    assert 3_000_000 < total < 4_000_000  # of 5 MB


def test_a_thumbnail_is_the_mean_of_its_area() -> None:
    codes = np.repeat(np.repeat(np.array([[0, 100], [200, 50]], np.uint8), 4, axis=0), 4, axis=1)
    assert decoded(thumbnail_png(codes, 2)) == [[0, 100], [200, 50]]
    assert decoded(thumbnail_png(codes[::4, ::4].copy(), 96)) == [[0, 100], [200, 50]]


def decoded(png: bytes) -> list[list[int]]:
    picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture is not None
    return [[int(value) for value in line] for line in picture]


FINITE = st.floats(-1e9, 1e9) | st.just(float("nan"))


@given(st.lists(FINITE, max_size=200), st.booleans())
def test_a_histogram_counts_every_value_once_in_few_bins(numbers: list[float], whole: bool) -> None:
    values = np.rint(numbers) if whole else np.array(numbers, np.float64)
    histogram = histogram_of(values, whole=whole)
    assert histogram.total == np.isfinite(values).sum()
    assert len(histogram.counts) == len(histogram.edges) - 1 <= 60
    svg = histogram_chart(histogram, name="x", unit="mm", noun="slices")
    assert svg.count("<rect") <= 60
    places = [float(place) for place in re.findall(r' (?:x|y|x1|x2|y1|y2)="([^"]*)"', svg)]
    assert all(0 <= place <= 400 for place in places)


def test_whole_numbers_have_whole_labels() -> None:
    svg = histogram_chart(histogram_of(np.full(9, 28.0), whole=True), name="x", unit="slices", noun="volumes")
    assert re.findall(r'text-anchor="middle" class="">([^<]*)<', svg) == ["28", "slices"]


def test_a_chart_of_many_values_is_as_small_as_one_of_few() -> None:
    values = np.random.default_rng(0).normal(0, 10, 500_000)
    svg = histogram_chart(histogram_of(values), name="x", unit="mm", noun="slices")
    assert len(svg) < 20_000


def test_bands_are_drawn_where_they_are_and_named() -> None:
    histogram = histogram_of(np.arange(100.0), bins=10)
    svg = histogram_chart(
        histogram, name="<b>", unit="HU", noun="n", log=True, bands=[Band("a<b", 20, 40), Band("out", 500, 600)]
    )
    assert svg.count('class="band"') == 1
    assert "a&lt;b" in svg
    assert "<b>" not in svg
    assert "out" not in svg


@given(st.floats(-1e6, 1e6), st.floats(0.001, 1e6))
def test_ticks_are_round_few_and_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert len(found) <= 7
    assert all(low - 1e-6 <= value <= low + span + 1e-6 * span for value in found)


def test_counts_are_short() -> None:
    assert [short(value) for value in (0, 950, 1000, 12_345, 3_500_000)] == ["0", "950", "1k", "12.3k", "3.5M"]


@given(st.text(st.characters(exclude_categories=[]), max_size=30))
def test_no_character_of_a_page_is_invisible(text: str) -> None:
    shown = escaped_line(text)
    shown.encode()
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]", shown)
    if text.isascii() and text.isprintable():
        assert shown == text
