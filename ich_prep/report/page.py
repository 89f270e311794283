"""One self-contained HTML page that shows a dataset: what was built, what is in it, and what needs attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ich_prep.dataset.classes import ANY, UNKNOWN
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.storage import local_path, write_whole
from ich_prep.errors import UsageError, count
from ich_prep.html import Cell, Row, Thumb, Tile, render
from ich_prep.report import labels, sections
from ich_prep.report.attention import points, verdict
from ich_prep.report.equal_images import EqualImages, find_equal_images
from ich_prep.report.pictures import LARGE, MAX_LARGE, MAX_SMALL, SMALL, sample, thumbnails
from ich_prep.report.tables import ReportTables, read_tables
from ich_prep.report.timing import build_timing
from ich_prep.stages.state import build_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset import Dataset
    from ich_prep.report.labels import ClassCounts

TEMPLATE = "report.html.jinja"
SUFFIX = ".report.html"
PER_SHEET, PER_FLAG, PER_CONFLICT = 16, 4, 4  # pictures, at most
MAX_CONFLICTS = 6  # images
NEGATIVE, UNLABELLED = "no finding", "no label"
IDENTITY_FLAGS = ("patient_conflict", "series_uid_shared", "sop_uid_shared", "patient_is_study", "same_image")


@dataclass(frozen=True)
class Sheet:
    """Pictures under a name, with the number of slices that they were drawn from."""

    name: str
    text: str
    thumbs: Sequence[Thumb]


@dataclass(frozen=True)
class Drawn:
    """The rows to show: by sheet and by flag, one of each class, and those of equal images, a list for each image."""

    cards: Mapping[str, int]
    sheets: Mapping[str, NDArray[np.int64]]
    flags: Mapping[str, NDArray[np.int64]]
    conflicts: Sequence[NDArray[np.int64]]


def report_path(dataset: Path) -> Path:
    """Return where the report of a dataset is written unless a path is given: beside it."""
    path = dataset.absolute()
    return path.with_name(path.name + SUFFIX)


def write_report(
    dataset: str | Path, out: str | Path | None = None, *, build_dir: str | Path | None = None, seed: int = 0
) -> Path:
    """Write the report of a finished dataset and return its path.

    ``out`` is a file outside of the dataset, by default beside it with ``.report.html`` appended. ``build_dir`` is the
    working folder, whose log says how long the build took. ``seed`` draws the pictures. Raises ``DatasetError`` for what
    is no dataset, ``UsageError`` for a page that cannot be there, ``OSError`` if it cannot be written.
    """
    path = local_path(dataset, "The dataset")
    target = report_path(path) if out is None else local_path(out, "--out").absolute()
    if path.resolve() in target.resolve().parents:
        raise UsageError(f"--out {target} lies inside the dataset. Give a file outside of it.")
    if target.is_dir():
        raise UsageError(f"--out {target} is a folder. Give the name of a file, such as {target / 'report.html'}.")
    with open_dataset(path) as opened:
        page = report_html(opened, build_dir=build_dir, seed=seed)
    try:
        write_whole(target, page.encode())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"Cannot write the report {target}: there is no folder {target.parent}. Make it, or give another file with "
            "--out."
        ) from None
    return target


def report_html(dataset: Dataset, *, build_dir: str | Path | None = None, seed: int = 0) -> str:
    """Return the page of an open dataset: statistics of all rows, pictures of some, drawn by ``seed``."""
    tables = read_tables(dataset)
    lost, reasons = dataset.root.lost_labels, sections.reasons_of(tables)
    equal, counts = find_equal_images(tables), labels.class_counts(tables)
    folds = labels.parts_by_fold(tables)
    timing = build_timing(dataset, build_folder(dataset.folder, build_dir))
    drawn = _draw(tables, equal, seed=seed)
    small = thumbnails(dataset, _rows([*drawn.sheets.values(), *drawn.flags.values()]), SMALL)
    large = thumbnails(dataset, [*_rows(drawn.conflicts), *drawn.cards.values()], LARGE)
    found = points(tables, lost=lost, reasons=reasons, equal=equal, classes=counts, folds=folds)
    title = dataset.folder.resolve().name
    return render(
        files("ich_prep.report").joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=f"{title}: dataset report",
        tiles=_tiles(dataset, counts),
        verdict=verdict(found),
        points=found,
        cards=[_card(entry, large[drawn.cards[entry.name]]) for entry in counts if entry.name in drawn.cards],
        columns=list(tables.classes[: labels.MAX_CLASSES]),
        more_classes=max(0, len(tables.classes) - labels.MAX_CLASSES),
        class_rows=_class_rows(counts),
        co_occurrence=labels.co_occurrence(tables) if any(entry.positive for entry in counts[1:]) else [],
        folds=labels.part_rows(folds),
        scan_types=labels.part_rows(labels.parts_by_scan_type(tables)),
        levels_of_labels=labels.level_bars(tables),
        sheets=[
            Sheet(name, count(len(_rows_of(tables, name)), "slice"), _thumbs(tables, rows, small))
            for name, rows in drawn.sheets.items()
        ],
        geometry=sections.geometry_charts(tables),
        geometry_bars=sections.geometry_bars(tables),
        hu=sections.hu_charts(tables, dataset),
        reasons=sections.reason_rows(reasons, lost),
        examples=sections.quarantine_examples(tables, reasons),
        status=sections.status_bars(tables),
        flags=sections.flag_rows(tables),
        flag_sheets=[Sheet(name, "", _thumbs(tables, rows, small)) for name, rows in drawn.flags.items()],
        repairs=sections.repair_rows(tables),
        identity=list(sections.identity_rows(tables, IDENTITY_FLAGS)),
        fold_groups=sections.fold_group_rows(tables),
        equal=equal,
        conflicts=[_thumbs(tables, rows, large, patients=True) for rows in drawn.conflicts],
        facts=sections.facts(dataset),
        spec=sections.named_values(dataset.attributes["spec"]),
        versions=sections.named_values(dataset.root.versions),
        timing=sections.timing_rows(timing, dataset) if timing else [],
        runs=timing.runs if timing else 0,
        seed=seed,
        window=dataset.spec.windows[0].name,
    )


def _draw(tables: ReportTables, equal: EqualImages, *, seed: int) -> Drawn:
    """Draw the rows to show, within the number of pictures that a page may have."""

    def some(rows: NDArray[np.int64], number: int, name: str) -> NDArray[np.int64]:
        return sample(rows[tables.is_ok[rows]], tables.series_row, number, seed=seed, name=name)

    flags = {name: some(rows, PER_FLAG, f"flag {name}") for name, rows in tables.rows_by_flag.items()}
    flags = dict([(name, rows) for name, rows in flags.items() if len(rows)][: MAX_SMALL // 2 // PER_FLAG])
    names = [*sorted(tables.classes, key=lambda name: name != ANY), NEGATIVE, UNLABELLED][: MAX_SMALL // 2]
    each = min(PER_SHEET, MAX_SMALL // 2 // len(names))
    sheets = {name: some(_rows_of(tables, name), each, f"label {name}") for name in names}
    sheets = {name: rows for name, rows in sheets.items() if len(rows)}
    conflicts = [rows[:PER_CONFLICT] for rows in equal.conflicts[:MAX_CONFLICTS]]
    shown = [name for name in tables.classes if name in sheets][: MAX_LARGE - MAX_CONFLICTS * PER_CONFLICT]
    cards = {name: int(some(_rows_of(tables, name), 1, f"card {name}")[0]) for name in shown}
    return Drawn(cards, sheets, flags, conflicts)


def _rows_of(tables: ReportTables, name: str) -> NDArray[np.int64]:
    """Return the rows that are positive for a class, those known to be negative for all, or those without a label."""
    if name in (NEGATIVE, UNLABELLED) and name not in tables.classes:
        return np.flatnonzero((tables.labels == (0 if name == NEGATIVE else UNKNOWN)).all(axis=1))
    return np.flatnonzero(tables.labels[:, tables.classes.index(name)] == 1)


def _rows(groups: Sequence[NDArray[np.int64]]) -> list[int]:
    return [int(row) for rows in groups for row in rows]


def _thumbs(
    tables: ReportTables, rows: NDArray[np.int64], pictures: Mapping[int, bytes], *, patients: bool = False
) -> list[Thumb]:
    """Return the pictures of ``rows`` with their labels, and with their patients where those matter."""
    found = []
    for row in rows.tolist():
        lines = [_label_words(tables, row)]
        if patients:
            lines.append(f"patient {sections.clipped_text(tables.slices['patient_id'][row].as_py())}")
        found.append(Thumb(pictures[row], f"row {row:,}", tuple(lines)))
    return found


def _label_words(tables: ReportTables, row: int) -> str:
    values = tables.labels[row]
    if (values == UNKNOWN).all():
        return UNLABELLED
    positive = [name for name, value in zip(tables.classes, values, strict=True) if value == 1]
    if len(positive) > 1 and ANY in positive:
        positive.remove(ANY)
    return ", ".join(positive) or NEGATIVE


def _card(entry: ClassCounts, png: bytes) -> Thumb:
    volumes = f"{count(entry.series, 'volume')}, {count(entry.patients, 'patient')}"
    return Thumb(png, entry.name, (f"{count(entry.positive, 'slice')}, {entry.share:.2%}", volumes))


def _tiles(dataset: Dataset, counts: Sequence[ClassCounts]) -> list[Tile]:
    total = dataset.counts
    first = next((entry for entry in counts if entry.name == ANY), counts[0])
    share = Cell(f"{first.share:.1%}") if first.known else Cell("no labels", undefined=True)
    found = f"of {count(total.found, 'file')}" if total.found else ""
    return [
        Tile(Cell(f"{total.ok:,}"), "slices with pixels", f"in {count(total.series, 'volume')}"),
        Tile(
            Cell(f"{total.patients:,}"),
            "patients",
            f"in {count(total.fold_groups, 'fold group')}" if total.fold_groups else "",
        ),
        Tile(
            share,
            f"of labelled slices positive for {first.name}",
            count(first.positive, "slice") if first.known else "",
        ),
        Tile(Cell(f"{total.quarantined:,}"), "files and slices quarantined", found),
    ]


def _class_rows(counts: Sequence[ClassCounts]) -> list[Row]:
    return [
        Row(
            [
                entry.name,
                Cell(f"{entry.positive:,}", (f"{entry.share:.2%}",) if entry.known else ()),
                f"{entry.series:,}",
                f"{entry.patients:,}",
                f"{entry.negative:,}",
                f"{entry.unknown:,}",
            ]
        )
        for entry in counts
    ]
