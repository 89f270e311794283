from __future__ import annotations

import pytest

from ich_prep.errors import count
from ich_train.wording import text_table


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 labels"), (1, "1 label"), (2, "2 labels"), (1200, "1,200 labels"), (-1, "-1 labels")]
)
def test_a_number_and_its_noun_agree(number: int, text: str) -> None:
    assert count(number, "label") == text


def test_a_noun_can_have_a_plural_of_its_own() -> None:
    assert [count(number, "process", "processes") for number in (1, 2)] == ["1 process", "2 processes"]
    assert count(1, "series", "series") == "1 series"


def test_columns_line_up_without_trailing_spaces() -> None:
    assert text_table(("label", "n", ""), [("any", "1,200", ""), ("mass", "7", "x")]) == (
        "label      n\nany    1,200\nmass       7  x"
    )
