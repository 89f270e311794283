"""One self-contained HTML page that compares evaluated runs, and the same verdicts and tables as text."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ich_prep.errors import count
from ich_prep.html import Cell, Point, Row, render
from ich_train.evaluation.metrics import DECISION, POLICIES, POLICY_WORDS, RANKING
from ich_train.evaluation.report import (
    DECISION_WORDS,
    VIEW_WORDS,
    Table,
    capital,
    log_loss_name,
    number_cell,
    part_words,
    range_words,
)
from ich_train.wording import text_table

TEMPLATE = "compare.html.jinja"
LETTERS = string.ascii_uppercase  # the names of the runs
VIEWS = ("by_slice", "by_series_max", "by_series_mean")
RANKING_WORDS = {"roc_auc": "ROC AUC", "average_precision": "Average precision"}
MINUS = "\N{MINUS SIGN}"
PICTURES = {
    "differences": (
        "Differences in ROC AUC, by slice",
        "With the interval that holds 95% of the resamples; grey if that includes 0.",
    ),
    "loss": ("Loss", "Validation, and dotted training. Of a cross-validation: the means of its runs."),
    "accuracy": ("Accuracy", "Share of correct answers at 0.5; validation, and dotted training."),
    "roc": ("ROC, by slice", "A panel for each class."),
    "precision_recall": ("Precision and recall, by slice", "A panel for each class."),
}


def compare_html(found: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the page of ``found``, what ``compare.json`` says, and PNG files by the names of ``PICTURES``."""
    return render(
        files("ich_train.evaluation").joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=f"Comparison of {count(len(found['runs']), 'run')}",
        cases=cases_words(found),
        verdicts=[Point("fine", title, text) for title, text in verdicts(found)],
        notes=list(notes(found)),
        runs=_runs(found),
        views=[_view(name, found) for name in VIEWS if found[name] is not None],
        captions={name: PICTURES[name] for name in PICTURES if name in pictures},
        pictures=pictures,
        resamples=f"{count(found['resamples'], 'bootstrap resample')} of the patients, seed {found['seed']}",
    )


def cases_words(found: Mapping[str, Any]) -> str:
    """Return what was compared, in words."""
    return f"{count(found['slices'], 'slice')} of {count(found['patients'], 'patient')}"


def verdicts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield, for each run but the first, which of the two has the higher mean ROC AUC by slice, and by how much."""
    for run, result in _others(found, "by_slice"):
        of = result["mean"]["roc_auc"]
        bounds, pair = of["difference_interval"], f"{run['run']} and {LETTERS[0]}"
        if of["difference"] is None:
            yield f"{pair}: undefined", "No class has both positive and negative slices."
            continue
        shown = f"Mean ROC AUC by slice: {signed(of['difference'])}"
        if bounds is None:
            yield f"{pair}: no interval", f"{shown}; too few patients to say more."
        elif bounds[0] <= 0 <= bounds[1]:
            yield f"{pair}: no clear difference", f"{shown} ({signed_range(bounds)})."
        else:
            better, worse = (run["run"], LETTERS[0]) if of["difference"] > 0 else (LETTERS[0], run["run"])
            yield f"{better} ranks better than {worse}", f"{shown} ({signed_range(bounds)})."


def notes(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a reader has to know before believing the differences."""
    if len({run["dataset"]["digest"] for run in found["runs"]}) > 1:
        yield (
            "The runs were evaluated on different datasets, or on one dataset before and after it changed. The slices "
            "compared, their labels and their patients are the same in all of them."
        )
    for run in found["runs"]:
        subset = run["evaluated"]["subset"]
        if not run["dataset"]["trained_on"]:
            yield (
                f"{run['run']} was trained on another dataset, or on this one before it changed: patients evaluated here "
                "may be among those that it learned from."
            )
        elif subset in ("train", "val", "all"):
            yield f"{run['run']} was evaluated on {part_words(subset)}: it, or its best epoch, was chosen on some of these."
    if found["by_series_max"] is None:
        yield "The slices are not whole series in every run: there are no results by series."


def text_tables(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the runs, and for each but the first the table of its ROC AUC beside that of the first, as text."""
    yield text_table(
        ("run", "folder", "network", "evaluated"), [(of["run"], of["folder"], *_words_of(of)) for of in found["runs"]]
    )
    first = found["by_slice"]["runs"][0]
    for run, result in _others(found, "by_slice"):
        lines = []
        for (name, entry), (_, of_first) in zip(_entries(result), _entries(first), strict=True):
            of = entry["roc_auc"]
            bounds = of["difference_interval"]
            values = [number_cell(one).text for one in (of_first["roc_auc"]["value"], of["value"])]
            difference = "undefined" if of["difference"] is None else signed(of["difference"])
            lines.append((name, *values, difference, "undefined" if bounds is None else signed_range(bounds)))
        yield text_table(
            ("ROC AUC by slice", LETTERS[0], run["run"], f"{run['run']} {MINUS} {LETTERS[0]}", "95%"), lines
        )


def signed(value: float) -> str:
    """Return a difference with its sign."""
    text = f"{abs(value):.3f}"
    if float(text) == 0:
        return text
    return f"{MINUS if value < 0 else '+'}{text}"


def signed_range(bounds: Sequence[float]) -> str:
    """Return the interval of a difference."""
    return f"{signed(bounds[0])} to {signed(bounds[1])}"


def _others(found: Mapping[str, Any], view: str) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    return zip(found["runs"][1:], found[view]["runs"][1:], strict=True)


def _entries(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [*result["labels"].items(), ("mean", result["mean"])]


def _words_of(run: Mapping[str, Any]) -> tuple[str, str]:
    """Return what the network of a run is, and what was evaluated."""
    model, data = run["model"], run["dataset"]
    head = "" if model["head"] is None else f", head {model['head'].get('kind', '')}"
    folds = f", {count(len(run['folds']), 'network')}" if run["folds"] else ""
    return f"{model['network']}{head}{folds}", f"{part_words(run['evaluated']['subset'])} of {data['name']}"


def _runs(found: Mapping[str, Any]) -> Table:
    rows = []
    for run in found["runs"]:
        network, evaluated = _words_of(run)
        epochs = [of["epoch"] for of in run["folds"]] or [run["model"]["epoch"]]
        cells = Cell(run["folder"], words=True), network, ", ".join(map(str, epochs))
        rows.append(Row([run["run"], *cells, evaluated, run["dataset"]["digest"][:12]]))
    return Table(["run", Cell("folder", words=True), "network", "epoch", "evaluated", "digest"], rows)


def _view(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    view, (title, words) = found[name], VIEW_WORDS[name]
    cases = count(view["cases"], *("slice",) if name == "by_slice" else ("series", "series"))
    return {
        "title": title,
        "text": f"{words} {cases}.".strip(),
        "open": name == "by_slice",
        "ranking": [_values(view, measure, RANKING_WORDS[measure]) for measure in RANKING] + [_loss(view, found)],
        "decisions": [
            _decisions(run, result, view["runs"][0], policy)
            for policy in POLICIES
            for run, result in _others(found, name)
        ],
    }


def _head(runs: int) -> list[str]:
    """Return the heads of a table with a column for the first run, and two for each of the others."""
    return [LETTERS[0], *(head for one in LETTERS[1:runs] for head in (one, f"{one} {MINUS} {LETTERS[0]}"))]


def _pair(of: Mapping[str, Any], *, first: bool) -> list[Cell]:
    value = number_cell(of["value"], range_words(of["interval"]))
    return [value] if first else [value, _difference(of)]


def _difference(of: Mapping[str, Any], *small: str) -> Cell:
    if of["difference"] is None:
        return Cell("undefined", small, undefined=True)
    bounds = of["difference_interval"]
    return Cell(signed(of["difference"]), (*small, *(() if bounds is None else (signed_range(bounds),))))


def _values(view: Mapping[str, Any], measure: str, title: str) -> Table:
    rows = []
    for lines in zip(*(_entries(result) for result in view["runs"]), strict=True):
        name = lines[0][0]
        cells = [cell for k, (_, entry) in enumerate(lines) for cell in _pair(entry[measure], first=k == 0)]
        rows.append(Row([name, *cells]))
    rows[-1] = Row([Cell("mean", ("of the classes defined in all runs",)), *rows[-1].cells[1:]], mean=True)
    return Table(["class", *_head(len(view["runs"]))], rows, title=title)


def _loss(view: Mapping[str, Any], found: Mapping[str, Any]) -> Table:
    cells = [cell for k, result in enumerate(view["runs"]) for cell in _pair(result["mean"]["log_loss"], first=k == 0)]
    title = f"{capital(log_loss_name(found['classes']))}: lower is better"
    return Table(["", *_head(len(view["runs"]))], [Row(["all classes", *cells])], title=title)


def _decisions(run: Mapping[str, Any], result: Mapping[str, Any], first: Mapping[str, Any], policy: str) -> Table:
    rows: list[Row] = []
    for (name, entry), (_, of_first) in zip(_entries(result), _entries(first), strict=True):
        cells = []
        for measure in DECISION:
            of, before = entry[f"{policy}.{measure}"], of_first[f"{policy}.{measure}"]["value"]
            both = [number_cell(value).text for value in (of["value"], before)]
            cells.append(_difference(of, f"{both[0]} {MINUS} {both[1]}"))
        rows.append(Row([name, *cells], mean=name == "mean" and len(rows) == len(result["labels"])))
    title = f"{run['run']} {MINUS} {LETTERS[0]}, {POLICY_WORDS[policy]}"
    return Table(["class", *(DECISION_WORDS[measure] for measure in DECISION)], rows, title=title)
