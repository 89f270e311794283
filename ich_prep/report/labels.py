"""The labels in numbers: how many slices, volumes and patients are positive, with what, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.html import Bar, Cell, Heat, Row
from ich_prep.report.tables import value_counts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.report.tables import ReportTables

MAX_GROUPS = 40  # lines of a table; a spec may have 127 folds
MAX_CLASSES = 30  # columns of a table


@dataclass(frozen=True)
class ClassCounts:
    """Of one class: the slices that are positive, negative and unknown, the volumes and the patients that are positive."""

    name: str
    positive: int
    negative: int
    unknown: int
    series: int
    patients: int

    @property
    def known(self) -> int:
        """The number of slices whose label is known."""
        return self.positive + self.negative

    @property
    def share(self) -> float:
        """The share of positive slices among those whose label is known; 0 if none is."""
        return self.positive / max(self.known, 1)


@dataclass(frozen=True)
class Part:
    """A part of the rows: its slices, those with a label, its volumes, and the positive slices of each class."""

    name: str
    slices: int
    labelled: int
    series: int
    positives: tuple[int, ...]


def class_counts(tables: ReportTables) -> list[ClassCounts]:
    """Return the counts of each class."""
    patients = tables.slices["patient_id"].combine_chunks().fill_null("").dictionary_encode().indices.to_numpy()
    found = []
    for name, column in zip(tables.classes, tables.labels.T, strict=True):
        positive = column == 1
        found.append(
            ClassCounts(
                name=name,
                positive=int(positive.sum()),
                negative=int((column == 0).sum()),
                unknown=int(((column < 0) & tables.is_present).sum()),
                series=len(np.unique(tables.series_row[positive])),
                patients=len(np.unique(patients[positive])),
            )
        )
    return found


def parts_by_fold(tables: ReportTables) -> list[Part]:
    """Return the parts by subset and fold: train first, its folds in order."""
    fold = pc.coalesce(pc.cast(tables.slices["fold"], pa.string()), "")
    names = pc.binary_join_element_wise(tables.slices["subset"].fill_null("unknown"), fold, " ")
    parts = _parts(tables, names.combine_chunks())
    return sorted(parts, key=_place)


def _place(part: Part) -> tuple[bool, str, int]:
    subset, _, fold = part.name.partition(" ")
    return subset != "train", subset, int(fold or -1)


def parts_by_scan_type(tables: ReportTables) -> list[Part]:
    """Return the parts by scan type, the most frequent first."""
    types = tables.series["scan_type"].fill_null("not known").take(pa.array(tables.series_row))
    return sorted(_parts(tables, types.combine_chunks()), key=lambda part: (-part.slices, part.name))


def _parts(tables: ReportTables, names: pa.Array) -> list[Part]:
    present = tables.is_present
    coded = names.filter(pa.array(present)).dictionary_encode()
    codes = coded.indices.to_numpy()
    words = coded.dictionary.to_pylist()
    labels = tables.labels[present]
    positive, labelled = labels == 1, (labels >= 0).any(axis=1)
    lines = max(len(tables.series), 1)
    series = np.unique(codes.astype(np.int64) * lines + tables.series_row[present]) // lines
    columns = [np.bincount(codes, column, len(words)).astype(np.int64) for column in positive.T]
    slices, known = (np.bincount(codes, weights, len(words)) for weights in (None, labelled))
    volumes = np.bincount(series, minlength=len(words))
    return [
        Part(
            name=word.strip(),
            slices=int(slices[k]),
            labelled=int(known[k]),
            series=int(volumes[k]),
            positives=tuple(int(column[k]) for column in columns),
        )
        for k, word in enumerate(words)
    ]


def part_rows(parts: Sequence[Part]) -> list[Row]:
    """Return the lines of a table of parts, those beyond ``MAX_GROUPS`` in one line."""
    rows = [
        Row(
            [
                part.name,
                f"{part.slices:,}",
                f"{part.series:,}",
                *(_positive(n, part) for n in part.positives[:MAX_CLASSES]),
            ]
        )
        for part in parts[:MAX_GROUPS]
    ]
    more = len(parts) - MAX_GROUPS
    return [*rows, Row([f"and {more} more"])] if more > 0 else rows


def _positive(number: int, part: Part) -> Cell:
    if not part.labelled:
        return Cell("no labels", undefined=True)
    return Cell(f"{number:,}", (f"{number / part.labelled:.1%}",))


def co_occurrence(tables: ReportTables) -> list[Heat]:
    """Return for each of the first classes the share of its positive slices that each other one has too."""
    positive = (tables.labels[:, :MAX_CLASSES] == 1).astype(np.float32)
    together: NDArray[np.int64] = np.rint(_gram(positive)).astype(np.int64)
    own = np.maximum(together.diagonal(), 1)
    return [
        Heat(
            name,
            [(int(n) / int(own[k]), f"{int(n) / int(own[k]):.0%}" if together[k, k] else "-") for n in together[k]],
        )
        for k, name in enumerate(tables.classes[:MAX_CLASSES])
    ]


def _gram(positive: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return how often two columns are 1 together: exact, because a block has fewer lines than float32 can count."""
    total = np.zeros((positive.shape[1],) * 2)
    for start in range(0, len(positive), 1 << 20):
        block = positive[start : start + (1 << 20)]
        total += block.T @ block
    return total


def level_bars(tables: ReportTables) -> list[Bar]:
    """Return what the labels describe: slices by label level."""
    levels = tables.present("label_level")
    return [Bar(str(name), number / len(levels), f"{number:,}") for name, number in value_counts(levels).items()]
