"""A label table to fill in: one line for each slice, series, study or patient, before any label exists.

Tables in, tables out: no file is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.errors import count
from ich_prep.layouts.labels import Key, LabelRules
from ich_prep.layouts.user_columns import KEYS, names_labels

Level = Literal["slice", "series", "study", "patient"]
LEVELS: Final[tuple[Level, ...]] = get_args(Level)
KEY_OF: Final[Mapping[Level, Key]] = {
    "slice": "sop_instance_uid",
    "series": "series_instance_uid",
    "study": "study_instance_uid",
    "patient": "patient_id",
}
# The keys that headers state, by the name of their column.
_STATED: Final[Mapping[Key, str]] = {
    "patient_id": "header_patient_id",
    "accession_number": "header_accession_number",
}
# Columns that help a reader to find the images, and that mean nothing to a build.
_OF_VOLUME: Final = ("series_description", "scan_type", "body_part", "convolution_kernel", "slice_thickness_mm")
_MOST_TEXTS: Final = 5


@dataclass(frozen=True)
class Template:
    """The ``table``, all of text: keys, classes (empty), helpful columns; and ``notes`` on what has no line of its own."""

    table: pa.Table
    notes: tuple[str, ...]


def label_template(slices: pa.Table, volumes: pa.Table, level: Level, classes: Sequence[str]) -> Template:
    """Return a label table with one line for each key of ``level`` among the ``slices`` of a dry run, in their order.

    Coarser keys are filled in where they are the same for the whole line: a build then checks them against the files.
    Slices without the key, or with a placeholder for a patient, or whose SOP Instance UID is that of another image, cannot
    be labelled at that level.
    """
    key = KEY_OF[level]
    notes = []
    usable = pc.is_valid(_column(slices, key))
    if level == "patient":  # one line for ANONYMOUS would label everybody
        usable = pc.and_(usable, pa.array(~_flagged(slices, "patient_is_study")))
    if missing := len(slices) - pc.sum(usable).as_py() if len(slices) else 0:
        what = "without a patient_id that names one patient" if level == "patient" else f"without {key}"
        notes.append(f"{count(missing, 'slice')} {what}: not in the template; choose another --level")
    if level == "slice":
        shared = _flagged(slices, "sop_uid_shared")
        if shared.any():
            notes.append(
                f"{count(int(shared.sum()), 'slice')} whose SOP Instance UID another image has: not in the template, for a "
                "label by that UID would be of both; choose another --level"
            )
        usable = pc.and_(usable, pa.array(~shared))
    slices = slices.filter(usable)
    codes, first = _groups(_column(slices, key))
    columns: dict[str, list[str]] = {key: _texts(_column(slices, key).take(pa.array(first)).to_pylist())}
    for coarser in KEYS[KEYS.index(key) + 1 :]:
        columns[coarser] = _agreed(_column(slices, coarser), codes, len(first))
    columns |= {name: [""] * len(first) for name in classes}
    rules = LabelRules(tuple(classes))
    for name, texts in _helpful(slices, volumes, level, codes, first).items():
        if not names_labels([name], rules):
            columns[name] = texts
    if level != "slice":
        several = int((_distinct(slices["series_row"].to_numpy(), codes, len(first)) > 1).sum())
        if level == "series" and several:
            notes.append(f"{count(several, 'series', 'series')} of several volumes: a label is that of all of them")
    return Template(pa.table({name: pa.array(texts, pa.string()) for name, texts in columns.items()}), tuple(notes))


def _column(slices: pa.Table, key: Key) -> pa.Array:
    return slices[_STATED.get(key, key)].combine_chunks()


def _groups(keys: pa.Array) -> tuple[Any, Any]:
    """Return the group of each line, (n,), in the order in which groups begin, and the first line of each, (m,)."""
    codes = keys.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    _, first = np.unique(codes, return_index=True)
    return codes, first


def _distinct(values: Any, codes: Any, groups: int) -> Any:
    """Return how many different ``values`` (n,) each group has, (groups,)."""
    pairs = np.unique(np.stack([codes, values]), axis=1)
    return np.bincount(pairs[0], minlength=groups)


def _agreed(values: pa.Array, codes: Any, groups: int) -> list[str]:
    """Return the value that all lines of a group have, "" where they differ or one has none."""
    numbers = values.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    single = _distinct(numbers, codes, groups) == 1
    chosen = np.zeros(groups, np.int64)
    chosen[codes] = np.arange(len(codes))
    texts = _texts(values.take(pa.array(chosen)).to_pylist()) if groups else []
    return [text if one else "" for text, one in zip(texts, single.tolist(), strict=True)]


def _helpful(slices: pa.Table, volumes: pa.Table, level: Level, codes: Any, first: Any) -> dict[str, list[str]]:
    numbers = np.bincount(codes, minlength=len(first)).tolist()
    columns: dict[str, list[str]] = {}
    if level == "slice":
        columns["slice_index"] = _texts(slices["slice_index"].take(pa.array(first)).to_pylist())
    else:
        columns["n_slices"] = _texts(numbers)
    pairs = np.unique(np.stack([codes, slices["series_row"].to_numpy()]), axis=1)
    for name in _OF_VOLUME:
        values = volumes[name].to_pylist()
        found: list[dict[str, None]] = [{} for _ in range(len(first))]
        for group, volume in pairs.T.tolist():
            if values[volume] is not None:
                found[group][_text(values[volume])] = None
        columns[name] = [" | ".join([*texts][:_MOST_TEXTS]) for texts in found]
    columns["path"] = _texts(slices["path"].take(pa.array(first)).to_pylist())
    return columns


def _flagged(slices: pa.Table, name: str) -> Any:
    lists = slices["flags"].combine_chunks()
    flagged = np.zeros(len(lists), bool)
    flagged[pc.list_parent_indices(lists).filter(pc.equal(lists.flatten(), name)).to_numpy()] = True
    return flagged


def _texts(values: Sequence[Any]) -> list[str]:
    return ["" if value is None else _text(value) for value in values]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())
