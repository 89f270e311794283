"""The filter grammar: random conditions against plain Python with three-valued logic, and the message of each mistake."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.filter_tokens import MAX_CHARACTERS
from ich_prep.dataset.where import (
    MAX_DEPTH,
    joined_schema,
    parse_where,
    select_rows,
    select_slices,
    slices_with_series,
)
from ich_prep.errors import UsageError

SCHEMA = pa.schema(
    [
        ("fold", pa.int8()),
        ("row", pa.int64()),
        ("checksum", pa.uint32()),
        ("share", pa.float32()),
        ("spacing_mm", pa.float64()),
        ("status", pa.string()),
        ("note", pa.large_string()),
        ("subset", pa.dictionary(pa.int32(), pa.string())),
        ("blank", pa.bool_()),
        ("flags", pa.list_(pa.string())),
        ("not", pa.int8()),
        ("taken", pa.date32()),
    ]
)
TABLE = pa.table(
    {
        "fold": pa.array([0, 1, None, 3], pa.int8()),
        "row": pa.array([0, 1, 2, 3], pa.int64()),
        "checksum": pa.array([0, 2**32 - 1, 5, None], pa.uint32()),
        "share": pa.array([0.5, -0.0, None, 0.25], pa.float32()),
        "spacing_mm": pa.array([5.0, 6.0, 0.625, None]),
        "status": pa.array(["ok", "it's", None, "truncated"]),
        "note": pa.array(['say "a"', "", None, "ünï"], pa.large_string()),
        "subset": pa.array(["train", "test", None, "train"]).dictionary_encode(),
        "blank": pa.array([True, False, None, False]),
        "flags": pa.array([["gap_before"], [], None, ["noise", "gap_before_not"]], pa.list_(pa.string())),
        "not": pa.array([1, 0, 0, None], pa.int8()),
        "taken": pa.array([1, 2, None, 4], pa.int32()).cast(pa.date32()),
    },
    schema=SCHEMA,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fold == 1", [1]),
        ("fold = 1", [1]),
        ("fold != 1", [0, 3]),
        ("not fold == 1", [0, 3]),
        ("not (fold == 1 or spacing_mm < 1)", [0]),
        ("fold == 1 or spacing_mm < 1", [1, 2]),
        ("fold is null", [2]),
        ("fold is not null and not fold is null", [0, 1, 3]),
        ("taken is null", [2]),
        ("fold in (0, 3, 0.5)", [0, 3]),
        ("fold not in (0, 3)", [1]),
        ("fold < 1.5", [0, 1]),
        ("1 <= fold", [1, 3]),
        ("fold < row", []),
        ("fold == row", [0, 1, 3]),
        ("fold == 300", []),
        ("fold < 300", [0, 1, 3]),
        ("row <= 9223372036854775807", [0, 1, 2, 3]),
        ("row < 1" + "0" * 200, [0, 1, 2, 3]),
        ("checksum == 4294967295", [1]),
        ("checksum > -1", [0, 1, 2]),
        ("share == 0", [1]),
        ("share in (0)", [1]),
        ("share < +.3e0", [1, 3]),
        ("status == 'ok'", [0]),
        ('status == "it\'s"', [1]),
        ("status == 'it''s'", [1]),
        ('note == "say ""a"""', [0]),
        ("note == ''", [1]),
        ("note > 'z'", [3]),
        ("subset == 'train'", [0, 3]),
        ("subset in ('test', 'other')", [1]),
        ("status ~ '^t.*d$'", [3]),
        ("note ~ '[ïü]'", [3]),
        ("status ~ '\\w''s'", [1]),
        ("not status ~ 'k'", [1, 3]),
        ("subset ~ 'es'", [1]),
        ("blank", [0]),
        ("not blank", [1, 3]),
        ("blank == false", [1, 3]),
        ("blank in (true, false)", [0, 1, 3]),
        ("true", [0, 1, 2, 3]),
        ("false or fold == 3", [3]),
        ("'gap_before' in flags", [0]),
        ("'gap_before' not in flags", [1, 3]),
        ("not 'gap_before' in flags", [1, 3]),
        ("'' in flags", []),
        ("flags is null", [2]),
        ("`not` == 1", [0]),
        ("not `not` == 1", [1, 2]),
        ("fold IS NOT Null AND (Not fold In (1) Or TRUE)", [0, 1, 3]),
        ("fold==1\n or\tfold==3", [1, 3]),
        ("not " * 1001 + "blank", [1, 3]),
        ("(" * MAX_DEPTH + "blank" + ")" * MAX_DEPTH, [0]),
        (" or ".join(["fold == 3"] * 700), [3]),
        (f"fold in ({','.join(['1'] * 4000)})", [1]),
    ],
)
def test_a_filter_selects_rows(text: str, expected: list[int]) -> None:
    rows = select_rows(TABLE, text)
    assert rows.dtype == np.int64 and rows.tolist() == expected
    assert TABLE.filter(parse_where(text, SCHEMA))["row"].to_pylist() == expected


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("fald == 1", 1, "unknown column 'fald'. Did you mean 'fold'?"),
        ("fold == 1 and zzz == 2", 15, "unknown column 'zzz'. Known: fold, row, "),
        ("fold == 'x'", 9, "column 'fold' is a number (int8) and cannot be compared with the text 'x'"),
        ("1 == status", 1, "column 'status' is text (string) and cannot be compared with the number 1"),
        ("status == fold", 11, "cannot be compared with column 'fold' is a number"),
        ("fold == true", 9, "cannot be compared with the boolean 'true'"),
        ("fold in (1, 'x')", 13, "cannot be compared with the text 'x'"),
        ("flags == 'noise'", 10, "Write: 'noise' in flags"),
        ("flags == flags", 1, "list of text"),
        ("'x' in status", 8, "column 'status' is text (string), not a list of text"),
        ("fold in flags", 1, "expected a text in quotes before 'in flags'"),
        ("1 in flags", 1, "expected a text in quotes before 'in flags'"),
        ("fold in 3", 9, "expected a list in parentheses or a list column after 'in'; found 3"),
        ("fold in ()", 10, "expected a column or a value; found ')'"),
        ("fold in (row)", 10, "expected a number or text in the list; found column 'row'"),
        ("fold in (1", 9, "this parenthesis is never closed"),
        ("fold not 3", 10, "expected 'in' after 'not'; found 3"),
        ("fold == null", 9, "write 'COLUMN is null'"),
        ("fold in (1, null)", 13, "write 'COLUMN is null'"),
        ("fold is 3", 9, "expected 'null' or 'not null'"),
        ("3 is null", 1, "expected a column before 'is'; found the number 3"),
        ("blank < true", 7, "booleans have no order"),
        ("taken == taken", 1, "Only 'is null' applies to it"),
        ("fold", 1, "column 'fold' is a number (int8), not a condition"),
        ("'x'", 1, "the text 'x', not a condition"),
        ("fold ~ '1'", 1, "'~' needs a column of text"),
        ("'x' ~ '1'", 1, "'~' needs a column of text"),
        ("status ~ note", 10, "expected a regular expression in quotes"),
        ("status ~ '('", 10, "Invalid regular expression: missing )"),
        ("status ~ '(?<=a)b'", 10, "Invalid regular expression"),
        ("status ~ 'a{999}{999}'", 10, "Invalid regular expression"),
        ("1 < fold < 3", 10, "comparisons cannot be chained"),
        ("status == 'ok", 11, "the quote ' is never closed"),
        ("status == \"ok'", 11, 'the quote " is never closed'),
        ("`fold == 1", 1, "the quote ` is never closed"),
        ("(fold == 1", 1, "this parenthesis is never closed"),
        ("((fold == 1)", 1, "this parenthesis is never closed"),
        ("(blank, blank)", 7, "expected ')'; found ','"),
        ("fold == 1)", 10, "expected 'and', 'or' or the end; found ')'"),
        ("fold == 1 fold == 2", 11, "expected 'and', 'or' or the end; found 'fold'"),
        ("fold ==", 8, "expected a column or a value; found the end"),
        ("fold == 1 and", 14, "expected a column or a value; found the end"),
        ("status ~", 9, "expected a regular expression in quotes after '~'; found the end"),
        ("== 1", 1, "expected a column or a value; found '=='"),
        ("fold && blank", 6, "write 'and'"),
        ("fold == 1 | blank", 11, "write 'or'"),
        ("!blank", 1, "write 'not'"),
        ("fold - 1 == 0", 6, "arithmetic is not supported"),
        ("status == ‘ok’", 11, "use straight quotes"),
        ("fold == 1; drop", 10, "unexpected character ';'"),
        ("fold.__class__ == 1", 1, "unknown column 'fold.__class__'"),
        ("__import__('os')", 1, "unknown column '__import__'"),
        ("spacing_mm < 6mm", 14, "this is not a number"),
        ("fold == 1.2.3", 9, "this is not a number"),
        ("fold < 1e999", 8, "this number is too large"),
        (f"fold < {'1' * 301}", 8, "this number is too large"),
        ("status == 'a\0'", 13, "control character U+0000"),
        ("fold == 1\x1b[31m", 10, "control character U+001B"),
        ("status == '\udcff'", 12, "control character U+DCFF"),
        ("(" * (MAX_DEPTH + 1) + "blank" + ")" * (MAX_DEPTH + 1), MAX_DEPTH + 1, "parentheses inside each other"),
        ("(" * 9000, MAX_DEPTH + 1, "parentheses inside each other"),
    ],
)
def test_an_error_shows_its_position(text: str, position: int, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        select_rows(TABLE, text)
    shown = str(raised.value)
    assert shown.startswith(f"Invalid filter at character {position}: ")
    assert message in shown
    _, excerpt, caret = shown.rsplit("\n", 2)
    if position <= len(text) and text[position - 1].isprintable():
        assert excerpt[caret.index("^")] == text[position - 1]
    assert len(excerpt) <= 80


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("x" * (MAX_CHARACTERS + 1), "may have 10,000 characters; this one has 10,001"),
    ],
)
def test_empty_and_long_filters_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_where(text, SCHEMA)


# Random conditions: each has its text, and its value for a row in plain Python.
Row = dict[str, Any]
Truth = bool | None
OR, AND, ATOM = range(3)


@dataclass(frozen=True)
class Condition:
    text: str
    level: int
    truth: Callable[[Row], Truth]

    def inside(self, level: int) -> str:
        return self.text if self.level >= level else f"({self.text})"


OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
}
NUMBERS = ("fold", "row", "checksum", "share", "spacing_mm")
INTEGERS = ("fold", "row", "checksum")
TEXTS = ("status", "note", "subset")
WORDS = st.text(alphabet="ab'\" é\\", max_size=3)
# No nearest float64 of an integer beyond 2**53 is the integer itself: there Python's own comparison is exact.
INT_LITERALS = st.one_of(st.integers(-4, 4), st.integers(-(2**53), 2**53))
FLOAT_LITERALS = st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, 1.0, -2.5]), st.floats(allow_nan=False, allow_infinity=False, width=64)
)


def spelled(value: Any, quote: str = "'") -> str:
    if isinstance(value, str):
        return quote + value.replace(quote, quote * 2) + quote
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def compared(symbol: str, left: Any, right: Any) -> Truth:
    return None if left is None or right is None else OPERATORS[symbol](left, right)


def negated(truth: Truth) -> Truth:
    return None if truth is None else not truth


def any_true(truths: list[Truth]) -> Truth:
    return True if True in truths else None if None in truths else False


def all_true(truths: list[Truth]) -> Truth:
    return negated(any_true([negated(truth) for truth in truths]))


@st.composite
def comparisons(draw: st.DrawFn) -> Condition:
    names, literals = draw(
        st.sampled_from(
            [(NUMBERS, st.one_of(INT_LITERALS, FLOAT_LITERALS)), (TEXTS, WORDS), (("blank",), st.booleans())]
        )
    )
    name = draw(st.sampled_from(names))
    symbol = draw(st.sampled_from(["==", "=", "!="] if name == "blank" else list(OPERATORS)))
    if draw(st.booleans()):
        other = draw(st.sampled_from(names))
        return Condition(f"{name} {symbol} {other}", ATOM, lambda row: compared(symbol, row[name], row[other]))
    value = draw(literals)
    written = spelled(value, draw(st.sampled_from("'\"")))
    if draw(st.booleans()):
        return Condition(f"{written}{symbol}{name}", ATOM, lambda row: compared(symbol, value, row[name]))
    return Condition(f"{name}{symbol}{written}", ATOM, lambda row: compared(symbol, row[name], value))


@st.composite
def memberships(draw: st.DrawFn) -> Condition:
    word = draw(st.sampled_from(["in", "not in"]))
    finish = negated if word == "not in" else lambda truth: truth
    if draw(st.booleans()):
        item = draw(WORDS)
        return Condition(
            f"{spelled(item)} {word} flags",
            ATOM,
            lambda row: finish(None if row["flags"] is None else item in row["flags"]),
        )
    names, literals = draw(st.sampled_from([(NUMBERS, st.one_of(INT_LITERALS, FLOAT_LITERALS)), (TEXTS, WORDS)]))
    name = draw(st.sampled_from(names))
    values = draw(st.lists(literals, min_size=1, max_size=4))
    return Condition(
        f"{name} {word} ({', '.join(map(spelled, values))})",
        ATOM,
        lambda row: finish(any_true([compared("==", row[name], value) for value in values])),
    )


@st.composite
def null_tests(draw: st.DrawFn) -> Condition:
    name = draw(st.sampled_from([field.name for field in SCHEMA if field.name != "not"]))
    if draw(st.booleans()):
        return Condition(f"{name} is null", ATOM, lambda row: row[name] is None)
    return Condition(f"{name} is not null", ATOM, lambda row: row[name] is not None)


@st.composite
def searches(draw: st.DrawFn) -> Condition:
    name, word = draw(st.sampled_from(TEXTS)), draw(st.text(alphabet="abé ", max_size=2))
    return Condition(f"{name} ~ '{word}'", ATOM, lambda row: None if row[name] is None else word in row[name])


def combined(conditions: st.SearchStrategy[Condition]) -> st.SearchStrategy[Condition]:
    def disjunction(parts: list[Condition]) -> Condition:
        text = " or ".join(part.inside(AND) for part in parts)
        return Condition(text, OR, lambda row: any_true([part.truth(row) for part in parts]))

    def conjunction(parts: list[Condition]) -> Condition:
        text = " AND ".join(part.inside(ATOM) for part in parts)
        return Condition(text, AND, lambda row: all_true([part.truth(row) for part in parts]))

    def negation(part: Condition) -> Condition:
        return Condition(f"not {part.inside(ATOM)}", ATOM, lambda row: negated(part.truth(row)))

    several = st.lists(conditions, min_size=2, max_size=4)
    return st.one_of(several.map(disjunction), several.map(conjunction), conditions.map(negation))


BARE = st.sampled_from(
    [
        Condition("blank", ATOM, lambda row: row["blank"]),
        Condition("true", ATOM, lambda row: True),
        Condition("false", ATOM, lambda row: False),
    ]
)
CONDITIONS = st.recursive(
    st.one_of(comparisons(), memberships(), null_tests(), searches(), BARE), combined, max_leaves=12
)
VALUES = {
    "fold": st.integers(-4, 4),
    "row": st.integers(-(2**53), 2**53) | st.integers(-4, 4),
    "checksum": st.integers(0, 2**32 - 1) | st.integers(0, 4),
    "share": st.floats(width=32) | st.sampled_from([0.0, -0.0, 0.5, 1.0]),
    "spacing_mm": st.floats() | st.sampled_from([0.0, -0.0, 0.5, 1.0]),
    **dict.fromkeys(TEXTS, WORDS),
    "blank": st.booleans(),
    "flags": st.lists(WORDS, max_size=3),
    "not": st.just(0),
    "taken": st.dates(),
}
ROWS = st.lists(st.fixed_dictionaries({name: st.none() | values for name, values in VALUES.items()}), max_size=6)


@given(condition=CONDITIONS, rows=ROWS)
@settings(max_examples=400, deadline=None)
def test_any_condition_agrees_with_plain_python(condition: Condition, rows: list[Row]) -> None:
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    exact = table.to_pylist()  # as float32 has them
    assert select_rows(table, condition.text).tolist() == [
        index for index, row in enumerate(exact) if condition.truth(row) is True
    ]
    assert select_rows(table, f"not ({condition.text})").tolist() == [
        index for index, row in enumerate(exact) if condition.truth(row) is False
    ]


@given(condition=CONDITIONS, data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_filter_is_an_expression_or_a_usage_error(condition: Condition, data: st.DataObject) -> None:
    text = condition.text
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 5)))
    inserted = data.draw(st.text(max_size=2) | st.sampled_from(["(", ")", "'", " not ", " in ", "~", ","]))
    damaged = text[:start] + inserted + text[end:]
    try:
        rows = select_rows(TABLE, damaged)
    except UsageError as error:
        assert str(error)
    else:
        assert set(rows.tolist()) <= set(range(len(TABLE)))


@given(text=st.text(max_size=60))
@example(text="fold == ²")
@example(text="fold == ١")
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parse_where(text, SCHEMA)
    except UsageError as error:
        assert str(error)


SLICES = pa.table(
    {
        "row": pa.array([0, 1, 2, 3], pa.int64()),
        "series_row": pa.array([0, 0, 1, 7], pa.int64()),
        "slice_spacing_mm": [5.0, 7.0, 5.0, 5.0],
        "flags": pa.array([["noise"], [], [], []], pa.list_(pa.string())),
    }
)
SERIES = pa.table(
    {
        "series_row": pa.array([0, 1], pa.int64()),
        "slice_spacing_mm": [5.5, 5.0],
        "scan_type": ["plain", "contrast"],
        "flags": pa.array([[], ["mixed"]], pa.list_(pa.string())),
    }
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slice_spacing_mm < 6 and scan_type == 'plain'", [0]),
        ("series.slice_spacing_mm > 5.2", [0, 1]),
        ("'mixed' in series.flags or 'noise' in flags", [0, 2]),
        ("scan_type is null", [3]),
        ("not scan_type == 'plain'", [2]),
        ("row >= 0", [0, 1, 2, 3]),
    ],
)
def test_slices_are_selected_by_columns_of_their_series(text: str, expected: list[int]) -> None:
    assert select_slices(SLICES, SERIES, text).tolist() == expected
    joined = slices_with_series(SLICES, SERIES)
    assert joined.schema.names == joined_schema(SLICES.schema, SERIES.schema).names
    assert select_rows(joined, text).tolist() == expected


def test_only_the_columns_that_are_used_are_joined() -> None:
    joined = slices_with_series(SLICES, SERIES, ["scan_type", "row"])
    assert joined.column_names == [*SLICES.column_names, "scan_type"]
    assert joined["scan_type"].to_pylist() == ["plain", "plain", "contrast", None]
    assert slices_with_series(SLICES, SERIES, ["row"]) is SLICES


def test_an_unknown_column_is_named_with_the_nearest_of_both_tables() -> None:
    with pytest.raises(UsageError, match=r"unknown column 'scan_typ'\. Did you mean 'scan_type'\?"):
        select_slices(SLICES, SERIES, "scan_typ == 'plain'")


@given(
    spacing=st.lists(st.none() | st.integers(3, 7), max_size=8),
    of=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    kinds=st.permutations(["plain", "contrast", "bone", None]),
)
def test_a_join_is_a_lookup_by_series_row(spacing: list[int | None], of: list[int], kinds: list[str | None]) -> None:
    slices = pa.table({"series_row": pa.array(of[: len(spacing)], pa.int64()), "mm": pa.array(spacing, pa.int32())})
    series = pa.table({"series_row": pa.array([0, 1, 2, 3], pa.int64()), "scan_type": pa.array(kinds, pa.string())})
    expected = [
        index
        for index, (mm, line) in enumerate(zip(spacing, of, strict=False))
        if mm is not None and mm < 6 and line < 4 and kinds[line] == "plain"
    ]
    assert select_slices(slices, series, "mm < 6 and scan_type == 'plain'").tolist() == expected


def test_the_tables_of_a_dataset_are_filtered(dataset_path: Path) -> None:
    dataset = open_dataset(dataset_path)
    rows = select_slices(
        dataset.slices, dataset.series, "n_slices > 0 and status == 'ok' and any == 1 and fold in (0, 1, 2)"
    )
    table = dataset.slices
    expected = pc.and_(
        pc.and_(pc.equal(table["status"], "ok"), pc.equal(table["any"], 1)), pc.less(table["fold"].fill_null(99), 3)
    )
    expected_rows = np.flatnonzero(expected.to_numpy(zero_copy_only=False))
    assert len(expected_rows)
    np.testing.assert_array_equal(rows, expected_rows)
