"""The six labels: long lines gathered, ``any`` completed and checked, labels joined to slices."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_prep.dataset.classes import RSNA_CLASSES, SUBTYPES, UNKNOWN
from ich_prep.errors import SourceError
from ich_prep.layouts.labels import LabelTable, fill_any, join_labels, labels_from_long_table, no_labels

EPIDURAL, ANY = RSNA_CLASSES.index("epidural"), RSNA_CLASSES.index("any")
NO_KEYS = pa.array([], pa.string())

Line = tuple[str, int, int]
lines = st.tuples(st.sampled_from("abcde"), st.integers(0, len(RSNA_CLASSES) - 1), st.integers(0, 1))


def gathered(given_lines: list[Line], *, allow_contradictions: bool = False) -> LabelTable:
    keys, classes, values = zip(*given_lines, strict=True) if given_lines else ((), (), ())
    return labels_from_long_table(
        pa.array(keys, pa.string()),
        np.array(classes, np.intp),
        np.array(values, np.int8),
        allow_contradictions=allow_contradictions,
    )


def by_slice(*values: tuple[int, ...]) -> LabelTable:
    keys = pa.array([f"slice{number}" for number in range(len(values))], pa.string())
    return LabelTable("sop_instance_uid", keys, np.array(values, np.int8), NO_KEYS, NO_KEYS)


def test_the_classes_are_in_the_order_of_the_contract() -> None:
    assert RSNA_CLASSES == ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")


@given(st.lists(lines, max_size=40))
def test_a_long_table_is_gathered_like_a_dictionary(given_lines: list[Line]) -> None:
    said: dict[tuple[str, int], set[int]] = {}
    for key, label, value in given_lines:
        said.setdefault((key, label), set()).add(value)
    labels = gathered(given_lines, allow_contradictions=True)
    assert labels.keys.to_pylist() == list(dict.fromkeys(key for key, _, _ in given_lines))
    for place, key in enumerate(labels.keys.to_pylist()):
        for label in range(len(RSNA_CLASSES)):
            values = said.get((key, label), set())
            expected = values.copy().pop() if len(values) == 1 else UNKNOWN
            assert labels.values[place, label] == expected
    clashing = {key for (key, _), values in said.items() if len(values) == 2}
    assert set(labels.contradicted.to_pylist()) == clashing


@given(st.lists(lines, max_size=40))
def test_contradicting_lines_are_refused_unless_allowed(given_lines: list[Line]) -> None:
    values = {(key, label): value for key, label, value in given_lines}
    if all(values[key, label] == value for key, label, value in given_lines):
        assert gathered(given_lines).contradicted.to_pylist() == []
    else:
        with pytest.raises(SourceError, match="contradict another line of the same key and class"):
            gathered(given_lines)


def test_a_contradiction_names_the_key_and_the_class() -> None:
    with pytest.raises(SourceError, match=r"ID_1 \(epidural\).*--allow-contradictions"):
        gathered([("ID_1", EPIDURAL, 0), ("ID_1", EPIDURAL, 1)])


def test_a_third_line_does_not_settle_a_contradiction() -> None:
    labels = gathered([("a", EPIDURAL, 1), ("a", EPIDURAL, 0), ("a", EPIDURAL, 0)], allow_contradictions=True)
    assert labels.values[0, EPIDURAL] == UNKNOWN
    assert labels.contradicted.to_pylist() == ["a"]


def test_equal_lines_are_counted() -> None:
    once = [("a", number, 0) for number in range(len(RSNA_CLASSES))]
    assert gathered(once).notes == ()
    assert gathered(once + once).notes == ("6 duplicate label lines (ignored)",)


def test_any_is_filled_in_from_the_subtypes() -> None:
    unknown = (UNKNOWN,)
    labels = fill_any(
        by_slice(
            (0, 0, 1, 0, 0, *unknown),
            (0, 0, 0, 0, 0, *unknown),
            (0, 0, 0, 0, *unknown, *unknown),
            (1, 0, 0, 0, *unknown, *unknown),
        )
    )
    assert labels.values[:, ANY].tolist() == [1, 0, UNKNOWN, 1]


@pytest.mark.parametrize("wrong", [(0, 0, 1, 0, 0, 0), (0, 0, 0, 0, 0, 1)])
def test_any_that_is_not_the_or_of_the_subtypes_is_refused(wrong: tuple[int, ...]) -> None:
    with pytest.raises(SourceError, match=r"1 labels have an 'any'.*slice1"):
        fill_any(by_slice((0, 0, 0, 0, 0, 0), wrong))


def test_readers_of_a_scan_may_agree_on_a_bleed_and_not_on_its_type() -> None:
    only_any = np.array([[0] * len(SUBTYPES) + [1]], np.int8)
    labels = LabelTable("subject", pa.array(["CQ500-CT-0"]), only_any, NO_KEYS, NO_KEYS)
    assert fill_any(labels).values.tolist() == only_any.tolist()


@given(st.lists(st.lists(st.integers(-1, 1), min_size=5, max_size=5), min_size=1, max_size=10))
def test_completing_twice_changes_nothing(subtypes: list[list[int]]) -> None:
    once = fill_any(by_slice(*[(*values, UNKNOWN) for values in subtypes]))
    assert fill_any(once).values.tolist() == once.values.tolist()
    assert once.values[:, :-1].tolist() == subtypes


def test_labels_are_joined_in_the_order_of_the_slices() -> None:
    labels = LabelTable(
        "sop_instance_uid",
        pa.array(["a", "b", "c"]),
        np.array([[0] * 6, [1] * 6, [UNKNOWN] * 6], np.int8),
        listed=pa.array(["y", "x"]),
        contradicted=NO_KEYS,
    )
    joined = join_labels(labels, pa.chunked_array([["b", None], ["x", "c", "b", "nobody"]]))
    assert joined.values[:, 0].tolist() == [1, UNKNOWN, UNKNOWN, UNKNOWN, 1, UNKNOWN]
    assert joined.label_line.tolist() == [1, -1, 1, 2, 1, -1]
    assert joined.unlabelled.tolist() == [False, True, True, True, False, True]
    assert joined.without_image.to_pylist() == ["a"]


def test_no_labels_leave_every_slice_unlabelled() -> None:
    joined = join_labels(no_labels(), pa.array(["a", "b"]))
    assert (joined.values == UNKNOWN).all()
    assert joined.unlabelled.all()
    assert (joined.label_line == -1).all()
    assert len(joined.without_image) == 0
