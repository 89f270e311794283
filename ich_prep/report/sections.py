"""The tables and charts of a report that say what was built, how volumes lie, and what was quarantined or flagged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.advice import FLAGS, REPAIRS, UNKNOWN, Advice, advice_of_reason
from ich_prep.dataset.schema import HISTOGRAM_BINS, OK
from ich_prep.dataset.windows import MAX_HU, MIN_HU, PRESETS
from ich_prep.errors import count
from ich_prep.html import LEVELS as LEVEL_WORDS
from ich_prep.html import Bar, Cell, Row
from ich_prep.report.attention import LEVELS
from ich_prep.report.charts import Band, Histogram, histogram_chart, histogram_of
from ich_prep.report.tables import ReportTables, value_counts

if TYPE_CHECKING:
    from markupsafe import Markup

    from ich_prep.dataset import Dataset
    from ich_prep.dataset.schema import LostLabels
    from ich_prep.report.timing import Timing

EXAMPLES = 3  # of each reason
MAX_TEXT = 160  # characters of a text from a file
MAX_BARS = 8
# The chart of each column of a series: its title, the unit, and whether its values are whole numbers.
SERIES_CHARTS = {
    "n_slices": ("Slices per volume", "slices", True),
    "slice_spacing_mm": ("Distance between slices, median of each volume", "mm", False),
    "pixel_spacing_x_mm": ("Pixel size", "mm", False),
    "slice_thickness_mm": ("Slice thickness", "mm", False),
    "tilt_degrees": ("Gantry tilt", "degrees", False),
    "patient_age": ("Age", "years", True),
}
SERIES_BARS = {
    "scan_type": "Scan type",
    "manufacturer": "Manufacturer",
    "patient_sex": "Sex",
    "study_year": "Year of the study",
}


@dataclass(frozen=True)
class Chart:
    """A chart under its title."""

    title: str
    svg: Markup
    text: str = ""


@dataclass(frozen=True)
class Bars:
    """A chart of named values under its title."""

    title: str
    bars: Sequence[Bar]


def clipped_text(value: object) -> str:
    """Return a text of a file as a page shows it: "-" for none, its end left out if it is long."""
    text = "-" if value is None or value == "" else str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def facts(dataset: Dataset) -> list[Row]:
    """Return what was built: form of the pixels, counts, digest, writer."""
    root, counts = dataset.root, dataset.counts
    windows = ", ".join(f"{w.name} {w.center:g}/{w.width:g}" for w in dataset.spec.windows)
    stored = f"window codes, 8 bits: {windows}" if dataset.spec.store == "windows" else "HU, 16 bits"
    rows = {
        "pixels": f"{' × '.join(f'{n:,}' for n in dataset.shape)} (slice, channel, y, x), {stored}",
        "slices": f"{counts.ok:,} with pixels, of {counts.rows:,} rows",
        "volumes": f"{counts.series:,} of {count(counts.patients, 'patient')}"
        + (f", in {count(counts.fold_groups, 'fold group')}" if counts.fold_groups else ""),
        "files": f"{counts.found:,} found, {counts.quarantined:,} quarantined",
        "on disk": f"{count(counts.shards, 'shard')}, {counts.bytes / 1e6:,.1f} MB, codec {dataset.spec.codec}",
        "folds": "given by the label table" if root.given_folds else "by a hash of the patients that belong together",
        "digest": dataset.digest,
        "format": f"{root.format}, generation {root.generation}",
        "written by": clipped_text(root.created_by),
        "commands": ", ".join(clipped_text(event.command) for event in root.history) or "-",
    }
    return [Row(fact) for fact in rows.items()]


def named_values(values: Mapping[str, Any]) -> list[Row]:
    """Return the keys of a part of the root with their values, as JSON where they are not plain."""
    return [
        Row([clipped_text(name), clipped_text(value if isinstance(value, str) else json.dumps(value))])
        for name, value in values.items()
    ]


def timing_rows(timing: Timing, dataset: Dataset) -> list[Row]:
    """Return the seconds of each stage, and its rate if one run did all of it."""
    units = {"list": ("files", dataset.counts.found), "scan": ("files", dataset.counts.found)}
    slices = ("slices", dataset.counts.planned)
    rows = []
    for stage, seconds in timing.seconds.items():
        unit, number = units.get(stage, slices)
        known = timing.runs == 1 and number and seconds > 0 and stage != "start workers"
        rows.append(Row([stage, f"{seconds:,.2f}", f"{number / seconds:,.0f} {unit}/s" if known else ""]))
    total = sum(seconds for stage, seconds in timing.seconds.items() if stage not in ("list", "start workers"))
    rate = f"{slices[1] / total:,.0f} slices/s" if timing.runs == 1 and total else ""
    return [*rows, Row([Cell("total", ("after the workers had started",)), f"{total:,.2f}", rate], mean=True)]


def geometry_charts(tables: ReportTables) -> list[Chart]:
    """Return the charts of the columns of ``SERIES_CHARTS`` that have values."""
    charts = []
    for name, (title, unit, whole) in SERIES_CHARTS.items():
        values = tables.numbers("series", name)
        histogram = histogram_of(np.abs(values) if name == "tilt_degrees" else values, whole=whole)
        if histogram.total:
            svg = histogram_chart(histogram, name=title, unit=unit, noun="volumes")
            charts.append(Chart(title, svg, _outside(histogram, len(values), "volume")))
    return charts


def _outside(histogram: Histogram, total: int, noun: str) -> str:
    """Return what the chart of a histogram does not show."""
    parts = {"below": histogram.below, "above": histogram.above, "not known": total - histogram.total}
    said = ", ".join(f"{number:,} {words}" for words, number in parts.items() if number)
    return f"Of {count(total, noun)} not shown: {said}." if said else ""


def geometry_bars(tables: ReportTables) -> list[Bars]:
    """Return how often each turn, source size and text of ``SERIES_BARS`` occurs."""
    series = tables.series
    sizes = pc.binary_join_element_wise(
        *(series[name].cast(pa.string()) for name in ("source_rows", "source_columns")), " × "
    )
    charts = [
        Bars("Turned to lie upright", _bars(tables.present("turn").fill_null("stored as in the file"))),
        Bars("Rows × columns of the files", _bars(sizes)),
        *(Bars(title, _bars(series[name])) for name, title in SERIES_BARS.items()),
    ]
    return [chart for chart in charts if chart.bars]


def _bars(column: pa.ChunkedArray) -> list[Bar]:
    """Return the most frequent values, and the others in one bar; none if all are null."""
    counted = value_counts(column)
    total = max(sum(counted.values()), 1)
    if set(counted) <= {None}:
        return []
    shown = list(counted.items())[: MAX_BARS - 1 if len(counted) > MAX_BARS else MAX_BARS]
    others = total - sum(number for _, number in shown)
    named = [("not known" if value is None else clipped_text(value), number) for value, number in shown]
    named += [(f"{len(counted) - len(shown):,} others", others)] if others else []
    return [Bar(name, number / total, f"{number:,}") for name, number in named]


def hu_charts(tables: ReportTables, dataset: Dataset) -> list[Chart]:
    """Return the histogram of HU with the windows in it, and that of the mean of each slice."""
    charts = []
    lists = tables.shards["hu_histogram"].drop_null()
    known = lists.filter(pc.equal(pc.list_value_length(lists), HISTOGRAM_BINS))
    if len(known):
        counts = pc.list_flatten(known).combine_chunks().to_numpy().reshape(-1, HISTOGRAM_BINS).sum(axis=0)
        edges = np.linspace(MIN_HU, MAX_HU + 1, HISTOGRAM_BINS + 1)
        stored = dataset.spec.store == "windows"
        windows = dataset.spec.windows if stored else [PRESETS[name] for name in ("brain", "subdural", "bone")]
        bands = [Band(w.name, w.center - w.width / 2, w.center + w.width / 2) for w in windows]
        text = (
            f"Before windowing, in bins of 64 HU; the scale of counts is logarithmic. "
            f"{'The windows stored are' if stored else 'Stored are HU; usual windows are'} drawn in."
        )
        histogram = Histogram(counts.astype(np.int64), edges)
        svg = histogram_chart(
            histogram, name="Histogram of HU", unit="HU", noun="sampled pixels", log=True, bands=bands
        )
        charts.append(Chart("All slices", svg, text))
    means = tables.numbers("slices", "hu_mean")[tables.is_ok]
    histogram = histogram_of(means)
    if histogram.total:
        svg = histogram_chart(histogram, name="Mean HU of slices", unit="HU", noun="slices", log=True)
        text = "Padding included, before clipping; slices far from the others are worth a look. "
        charts.append(Chart("Mean of each slice", svg, text + _outside(histogram, len(means), "slice")))
    return charts


def reasons_of(tables: ReportTables) -> dict[str, int]:
    """Return how many files each reason quarantined, the most frequent first."""
    return {str(reason): number for reason, number in value_counts(tables.quarantine["reason"]).items()}


def reason_rows(reasons: Mapping[str, int], lost: Mapping[str, LostLabels]) -> list[Row]:
    """Return a line for each reason: files, labels lost with it, what it means and what to do."""
    rows = []
    names = [*reasons, *(name for name in lost if name not in reasons)]
    for reason in sorted(names, key=lambda name: LEVELS.index(advice_of_reason(name).level)):
        advice, loss = advice_of_reason(reason), lost.get(reason)
        labels = (f"{loss.labels:,}", f"{loss.positive:,}") if loss else ("", "")
        rows.append(Row([_named(reason, advice), f"{reasons.get(reason, 0):,}", *labels, *_advised(advice)]))
    return rows


def quarantine_examples(tables: ReportTables, reasons: Mapping[str, int]) -> list[Row]:
    """Return the first files of each reason, with what was found in them."""
    rows = []
    for reason in reasons:
        chosen = tables.quarantine.filter(pc.equal(tables.quarantine["reason"], reason)).slice(0, EXAMPLES)
        for line in chosen.to_pylist():
            path, detail = clipped_text(line["path"]), clipped_text(line["detail"])
            rows.append(Row([reason, *_words(path, detail), line["stage"]]))
    return rows


def flag_rows(tables: ReportTables) -> list[Row]:
    """Return a line for each flag: slices, volumes, what it means and what to do."""
    rows = []
    for name in sorted(tables.rows_by_flag, key=lambda name: LEVELS.index(FLAGS.get(name, UNKNOWN).level)):
        found, advice = tables.rows_by_flag[name], FLAGS.get(name, UNKNOWN)
        volumes = len(np.unique(tables.series_row[found]))
        share = f"{len(found) / max(int(tables.is_present.sum()), 1):.2%}"
        rows.append(Row([_named(name, advice), Cell(f"{len(found):,}", (share,)), f"{volumes:,}", *_advised(advice)]))
    return rows


def repair_rows(tables: ReportTables) -> list[Row]:
    """Return a line for each repair: slices, what it means and what to do."""
    rows = []
    for name, found in tables.rows_by_repair.items():
        advice = REPAIRS.get(name, UNKNOWN)
        rows.append(Row([_named(name, advice), f"{len(found):,}", *_advised(advice)]))
    return rows


def status_bars(tables: ReportTables) -> list[Bar]:
    """Return the rows without pixels by status; none if all rows have some."""
    counted = value_counts(tables.slices["status"])
    total = max(len(tables.slices), 1)
    return [Bar(str(name), number / total, f"{number:,}") for name, number in counted.items() if name != OK]


def identity_rows(tables: ReportTables, flags: Sequence[str]) -> Iterator[Row]:
    """Yield examples of volumes with each of the ``flags`` about identity, from the start of the dataset."""
    for name in flags:
        rows = tables.rows_by_flag.get(name)
        if rows is None:
            continue
        for line in np.unique(tables.series_row[rows])[:EXAMPLES].tolist():
            series = tables.series.slice(line, 1).to_pylist()[0]
            texts = (clipped_text(series[key]) for key in ("patient_id", "series_instance_uid", "series_description"))
            yield Row([name, f"{line:,}", *_words(*texts)])


def fold_group_rows(tables: ReportTables) -> list[Row]:
    """Return the fold groups that join most patients; none if each patient is a group."""
    pairs = tables.slices.select(["fold_group", "patient_id"]).filter(pc.is_valid(tables.slices["fold_group"]))
    if not len(pairs):
        return []
    counted = pairs.group_by(["fold_group", "patient_id"], use_threads=False).aggregate([([], "count_all")])
    groups = counted.group_by("fold_group", use_threads=False).aggregate([([], "count_all"), ("count_all", "sum")])
    joined = groups.filter(pc.greater(groups["count_all"], 1))
    order = [("count_all", "descending"), ("count_all_sum", "descending"), ("fold_group", "ascending")]
    return [
        Row([clipped_text(line["fold_group"]), f"{line['count_all']:,}", f"{line['count_all_sum']:,}"])
        for line in joined.sort_by(order).slice(0, MAX_BARS).to_pylist()
    ]


def _named(word: str, advice: Advice) -> Cell:
    return Cell(word, (LEVEL_WORDS[advice.level],))


def _advised(advice: Advice) -> list[Cell]:
    return _words(advice.what, advice.todo)


def _words(*texts: str) -> list[Cell]:
    return [Cell(text, words=True) for text in texts]
