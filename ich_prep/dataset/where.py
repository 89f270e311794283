"""The grammar of ``Dataset.where``: a filter such as ``slice_spacing_mm < 6 and scan_type == 'plain'`` -> rows.

::

    condition   = conjunction {"or" conjunction}
    conjunction = negation {"and" negation}
    negation    = {"not"} predicate
    predicate   = "(" condition ")"
                | value ("<" | "<=" | ">" | ">=" | "==" | "=" | "!=") value
                | column "~" text                            a regular expression (RE2) matches anywhere in the column
                | column ["not"] "in" "(" value {"," value} ")"
                | text ["not"] "in" column                   of a list column: 'gap_before' in flags
                | column "is" ["not"] "null"
                | column | "true" | "false"                  a column of booleans
    value       = column | number | text | "true" | "false"

Text is quoted with single or double quotes; a doubled quote is one quote (``'it''s'``), and backslashes are literal. A
column whose name is a keyword, or has spaces, is quoted with backticks. Keywords may be in upper case.

Logic is that of SQL: a comparison with a missing value is neither true nor false, and only rows for which the condition
is true are selected; ``not (fold == 1)`` does not select a row whose fold is null. Integers are compared as int64,
numbers of which one is a float as float64, text by its code points. A list with a null item counts as null.

The parser is written by hand; no part of the text is ever evaluated as code.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.filter_tokens import Kind, Token, filter_error, tokenize
from ich_prep.errors import did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_DEPTH = 50  # of parentheses inside each other
SERIES_PREFIX = "series."

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_NUMBER, _TEXT, _BOOLEAN, _LIST, _OTHER = (
    "a number",
    "text",
    "a boolean",
    "a list of text",
    "of a type without comparisons",
)
_SEPARATOR = "\0"  # not in any item of a list, and not allowed in a filter


def parse_where(text: str, schema: pa.Schema) -> pc.Expression:
    """Return the condition ``text`` on the columns of ``schema`` as a pyarrow expression.

    Raises ``UsageError``, with the position in the text, for text that does not follow the grammar above, an unknown column
    (with the nearest known one), and values of types that cannot be compared.
    """
    return _Parser(text, schema).parse()


def select_rows(table: pa.Table, text: str) -> NDArray[np.int64]:
    """Return the lines of ``table`` for which ``text`` is true: int64 (n,), ascending. Raises as ``parse_where``."""
    parser = _Parser(text, table.schema)
    expression = parser.parse()
    return _matching_lines({name: table[name] for name in parser.columns}, expression, len(table))


def select_slices(slices: pa.Table, series: pa.Table, text: str) -> NDArray[np.int64]:
    """Return the lines of ``slices`` for which ``text`` is true; it may name columns of ``series`` too.

    See ``slices_with_series`` for their names. Returns int64 (n,), ascending. Raises as ``parse_where``.
    """
    parser = _Parser(text, joined_schema(slices.schema, series.schema))
    expression = parser.parse()
    joined = slices_with_series(slices, series, parser.columns)
    return _matching_lines({name: joined[name] for name in parser.columns}, expression, len(slices))


def joined_schema(slices: pa.Schema, series: pa.Schema) -> pa.Schema:
    """Return the columns available to ``slices_with_series``: those of the slices, then those of the series."""
    own = [field for field in series if field.name not in slices.names]
    prefixed = [field.with_name(SERIES_PREFIX + field.name) for field in series]
    return pa.schema([*slices, *own, *prefixed])


def slices_with_series(slices: pa.Table, series: pa.Table, columns: Iterable[str] | None = None) -> pa.Table:
    """Return ``slices`` with the columns of ``series`` that it lacks, each slice with the value of its series.

    The tables are joined by ``series_row``; a slice of a series that is not in ``series`` gets nulls. A column that both
    tables have is the slice's own; that of the series is ``series.NAME``. ``columns``, if given, limits which are
    added; it may include columns of ``slices``.
    """
    available = joined_schema(slices.schema, series.schema).names if columns is None else columns
    added = [name for name in available if name not in slices.column_names]
    if not added:
        return slices
    lines = pc.index_in(slices["series_row"], series["series_row"].combine_chunks())
    for name in added:
        slices = slices.append_column(name, series[name.removeprefix(SERIES_PREFIX)].take(lines))
    return slices


def _matching_lines(columns: dict[str, pa.ChunkedArray], expression: pc.Expression, count: int) -> NDArray[np.int64]:
    from pyarrow import acero  # slow to import, and loads pandas

    # The line numbers are in a column with an empty name, which no filter can use. No thread of Arrow may get them:
    # NumPy owns them, and a thread that gives them up while the interpreter shuts down aborts the process.
    table = pa.table({**columns, "": np.arange(count, dtype=np.int64)})
    source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
    chosen = acero.Declaration("filter", acero.FilterNodeOptions(expression), inputs=[source])
    lines: NDArray[np.int64] = np.sort(chosen.to_table(use_threads=False)[""].to_numpy())
    return lines


@dataclass(frozen=True)
class _Value:
    """One side of a comparison: a column or a literal."""

    expression: pc.Expression
    type: str
    integer: bool
    token: Token
    column_type: pa.DataType | None = None  # None for a literal

    def __str__(self) -> str:
        if self.column_type is not None:
            return f"column {self.token}"
        return f"the {'boolean' if self.type == _BOOLEAN else self.token.kind} {self.token}"

    @property
    def described(self) -> str:
        """The value and what it is, for a message: "column 'fold' is a number (int8)"."""
        return f"{self} is {self.type} ({self.column_type})" if self.column_type is not None else str(self)

    def as_number(self, *, integer: bool) -> pc.Expression:
        return self.expression.cast(pa.int64() if integer else pa.float64(), safe=False)


class _Parser:
    """Recursive descent over the tokens of one text; ``columns`` are the names seen so far."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.columns: dict[str, None] = {}  # a set in the order of the text
        self._text, self._schema = text, schema
        self._tokens = tokenize(text)
        self._next, self._depth = 0, 0

    def parse(self) -> pc.Expression:
        expression = self._condition()
        if self._token.kind is not Kind.END:
            raise self._error(f"expected 'and', 'or' or the end; found {self._token}.")
        return expression

    @property
    def _token(self) -> Token:
        return self._tokens[self._next]

    def _advance(self) -> Token:
        token = self._token
        self._next += 1
        return token

    def _accept(self, kind: Kind, *values: str) -> Token | None:
        return self._advance() if self._token.kind is kind and self._token.value in values else None

    def _error(self, message: str, token: Token | None = None) -> Exception:
        return filter_error(self._text, (token or self._token).start, message)

    def _condition(self) -> pc.Expression:
        terms = [self._conjunction()]
        while self._accept(Kind.KEYWORD, "or"):
            terms.append(self._conjunction())
        return _balanced(terms, operator.or_)

    def _conjunction(self) -> pc.Expression:
        terms = [self._negation()]
        while self._accept(Kind.KEYWORD, "and"):
            terms.append(self._negation())
        return _balanced(terms, operator.and_)

    def _negation(self) -> pc.Expression:
        negated = False
        while self._accept(Kind.KEYWORD, "not"):
            negated = not negated
        expression = self._predicate()
        return ~expression if negated else expression

    def _predicate(self) -> pc.Expression:
        opening = self._accept(Kind.OPERATOR, "(")
        if opening:
            return self._parenthesized(opening)
        value = self._value()
        comparison = self._accept(Kind.OPERATOR, *_COMPARISONS)
        if comparison:
            return self._comparison(value, comparison)
        if self._accept(Kind.OPERATOR, "~"):
            return self._regex(value)
        if self._accept(Kind.KEYWORD, "is"):
            return self._null_test(value)
        if self._accept(Kind.KEYWORD, "in"):
            return self._membership(value)
        if self._accept(Kind.KEYWORD, "not"):
            if not self._accept(Kind.KEYWORD, "in"):
                raise self._error(f"expected 'in' after 'not'; found {self._token}.")
            return ~self._membership(value)
        if value.type != _BOOLEAN:
            raise self._error(f"{value.described}, not a condition: compare it with something.", value.token)
        return value.expression

    def _parenthesized(self, opening: Token) -> pc.Expression:
        if self._depth == MAX_DEPTH:
            raise self._error(f"more than {MAX_DEPTH} parentheses inside each other. Simplify the filter.", opening)
        self._depth += 1
        expression = self._condition()
        self._depth -= 1
        self._close(opening)
        return expression

    def _close(self, opening: Token) -> None:
        if self._accept(Kind.OPERATOR, ")"):
            return
        if self._token.kind is Kind.END:
            raise self._error("this parenthesis is never closed.", opening)
        raise self._error(f"expected ')'; found {self._token}.")

    def _value(self) -> _Value:
        token = self._advance()
        if token.kind is Kind.NAME:
            return self._column(token)
        if token.kind is Kind.NUMBER:
            return _Value(pc.scalar(token.value), _NUMBER, isinstance(token.value, int), token)
        if token.kind is Kind.TEXT:
            return _Value(pc.scalar(token.value), _TEXT, False, token)
        if token.kind is Kind.KEYWORD and token.value in {"true", "false"}:
            return _Value(pc.scalar(token.value == "true"), _BOOLEAN, False, token)
        if token.kind is Kind.KEYWORD and token.value == "null":
            raise self._error("nothing is equal to null: write 'COLUMN is null' or 'COLUMN is not null'.", token)
        raise self._error(f"expected a column or a value; found {token}.", token)

    def _column(self, token: Token) -> _Value:
        name = str(token.value)
        if name not in self._schema.names:
            hint = did_you_mean(name, self._schema.names) or f" Known: {', '.join(self._schema.names)}."
            raise self._error(f"unknown column {name!r}.{hint}", token)
        self.columns[name] = None
        dtype = self._schema.field(name).type
        kind = _type_of(dtype)
        expression = pc.field(name).cast(pa.string()) if kind == _TEXT and dtype != pa.string() else pc.field(name)
        return _Value(expression, kind, pa.types.is_integer(dtype) and dtype != pa.uint64(), token, dtype)

    def _comparison(self, left: _Value, comparison: Token) -> pc.Expression:
        right = self._value()
        if self._token.kind is Kind.OPERATOR and self._token.value in {*_COMPARISONS, "~"}:
            raise self._error("comparisons cannot be chained: write 'a < b and b < c'.")
        return self._compared(left, str(comparison.value), right, comparison)

    def _compared(self, left: _Value, symbol: str, right: _Value, at: Token) -> pc.Expression:
        if left.type != right.type:
            raise self._mismatch(left, right)
        if left.type not in {_NUMBER, _TEXT, _BOOLEAN}:
            hint = " Write: 'gap_before' in flags" if left.type == _LIST else " Only 'is null' applies to it."
            raise self._error(f"{left.described}.{hint}", left.token)
        if left.type == _BOOLEAN and symbol not in {"==", "!="}:
            raise self._error(f"booleans have no order: expected '==' or '!='; found '{symbol}'.", at)
        sides = left.expression, right.expression
        if left.type == _NUMBER:
            integer = left.integer and right.integer
            sides = left.as_number(integer=integer), right.as_number(integer=integer)
        return _COMPARISONS[symbol](*sides)

    def _mismatch(self, left: _Value, right: _Value) -> Exception:
        column, other = (left, right) if left.column_type is not None else (right, left)
        if column.type == _LIST and other.type == _TEXT:
            hint = f" Write: {other.token if other.column_type is None else repr('text')} in {column.token.value}"
        else:
            hint = " Quotes make text; numbers have none." if {left.type, right.type} == {_NUMBER, _TEXT} else ""
        return self._error(f"{column.described} and cannot be compared with {other.described}.{hint}", other.token)

    def _regex(self, value: _Value) -> pc.Expression:
        pattern = self._advance()
        if value.type != _TEXT or value.column_type is None:
            raise self._error(f"{value.described}; '~' needs a column of text on its left.", value.token)
        if pattern.kind is not Kind.TEXT:
            raise self._error(f"expected a regular expression in quotes after '~'; found {pattern}.", pattern)
        try:
            pc.match_substring_regex(pa.array([""]), pattern.value)
        except pa.ArrowInvalid as error:
            raise self._error(f"{error}.", pattern) from None
        return pc.match_substring_regex(value.expression, pattern.value)

    def _null_test(self, value: _Value) -> pc.Expression:
        negated = self._accept(Kind.KEYWORD, "not")
        if not self._accept(Kind.KEYWORD, "null"):
            raise self._error(f"expected 'null' or 'not null' after 'is'; found {self._token}.")
        if value.column_type is None:
            raise self._error(f"expected a column before 'is'; found {value}.", value.token)
        # The column itself: a cast could fail, or be null for another reason.
        field = pc.field(str(value.token.value))
        return field.is_valid() if negated else field.is_null()

    def _membership(self, value: _Value) -> pc.Expression:
        opening = self._accept(Kind.OPERATOR, "(")
        if opening:
            return self._one_of(value, opening)
        if self._token.kind is not Kind.NAME:
            raise self._error(f"expected a list in parentheses or a list column after 'in'; found {self._token}.")
        column = self._column(self._advance())
        if column.type != _LIST:
            raise self._error(f"{column.described}, not a list of text.", column.token)
        if value.type != _TEXT or value.column_type is not None:
            raise self._error(
                f"expected a text in quotes before 'in {column.token.value}'; found {value}.", value.token
            )
        return _contains(column.expression, str(value.token.value))

    def _one_of(self, value: _Value, opening: Token) -> pc.Expression:
        # One comparison each, rather than is_in, which knows no null and treats -0.0 and 0.0 as different.
        terms = []
        while True:
            item = self._value()
            if item.column_type is not None:
                raise self._error(f"expected a number or text in the list; found {item}.", item.token)
            terms.append(self._compared(value, "==", item, item.token))
            if not self._accept(Kind.OPERATOR, ","):
                break
        self._close(opening)
        return _balanced(terms, operator.or_)


def _type_of(dtype: pa.DataType) -> str:
    types = pa.types
    if types.is_boolean(dtype):
        return _BOOLEAN
    if types.is_integer(dtype) or types.is_floating(dtype):
        return _NUMBER
    if _is_text(dtype.value_type if types.is_dictionary(dtype) else dtype):
        return _TEXT
    if (types.is_list(dtype) or types.is_large_list(dtype)) and _is_text(dtype.value_type):
        return _LIST
    return _OTHER


def _is_text(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype))


def _contains(column: pc.Expression, item: str) -> pc.Expression:
    """Return whether ``item`` is in each list of ``column``, by a search in its joined items: Arrow has no such test."""
    separator = pc.scalar(_SEPARATOR)
    joined = pc.binary_join_element_wise(separator, pc.binary_join(column, separator), separator, pc.scalar(""))
    match = pc.match_substring(joined, f"{_SEPARATOR}{item}{_SEPARATOR}")
    # An empty list looks like a list of one empty text once it is joined.
    return match & (pc.list_value_length(column) > pc.scalar(0))


def _balanced(terms: Sequence[pc.Expression], combine: Callable[[Any, Any], Any]) -> pc.Expression:
    """Return ``terms`` combined as a tree of low depth: a chain of thousands would overflow the stack in C++."""
    while len(terms) > 1:
        pairs = [combine(*terms[index : index + 2]) for index in range(0, len(terms) - 1, 2)]
        terms = [*pairs, terms[-1]] if len(terms) % 2 else pairs
    return terms[0]
