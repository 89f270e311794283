"""One self-contained HTML page that shows an evaluated run: no scripts, no other files, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ich_prep.dataset.classes import ANY
from ich_prep.errors import count
from ich_prep.html import Cell, Row, Tile, render
from ich_train.evaluation.metrics import DECISION, POLICIES, POLICY_WORDS
from ich_train.rsna import is_rsna
from ich_train.runs import Epoch, overfitting_text

TEMPLATE = "report.html.jinja"
DECISION_WORDS = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1"}
AVERAGES = {"macro": "mean over labels", "micro": "all cases pooled"}
BY_SERIES = (
    "A series is positive if any of its slices is, negative if all are known to be; its probability is the {how} of its "
    "labelled slices."
)
VIEW_WORDS = {
    "by_slice": ("By slice", ""),
    "by_series_max": ("By series, maximum over slices", BY_SERIES.format(how="highest")),
    "by_series_mean": ("By series, mean over slices", BY_SERIES.format(how="mean")),
    "by_scan": (
        "By scan, as the head says",
        "A series is positive if any of its slices is, negative if all are known to be; its probability is the head's.",
    ),
}


@dataclass(frozen=True)
class Caption:
    """The heading of a picture."""

    title: str
    text: str


CAPTIONS = {
    "loss": Caption(
        "Loss", "Mean loss of each epoch. Training loss is taken while the weights change, on augmented slices."
    ),
    "accuracy": Caption("Accuracy", "Share of correct answers at 0.5 over all slices and labels of each epoch."),
    "roc": Caption("ROC", "Each label in its panel, the others in grey. With its 95% interval by patients."),
    "precision_recall": Caption(
        "Precision and recall", "The dotted line is the share of positives, which a guess also reaches."
    ),
    "reliability": Caption(
        "Reliability",
        "Share of positives over the predicted probability, in 15 bins; on the dotted line they are the same.",
    ),
    "confusion_at_half": Caption("Confusion at 0.5", "Counts of slices; percentages and shades are shares of a row."),
    "confusion_at_best_f1": Caption(
        "Confusion at best F1",
        "Each label at the threshold of the highest F1 on validation. Counts of slices; percentages are of a row.",
    ),
    "feature_maps": Caption(
        "Feature maps",
        "The output of each convolution layer for one slice: of each layer the maps with the largest spread, the "
        "strongest first, each stretched from its own 1st to its 99th percentile.",
    ),
}


@dataclass(frozen=True)
class Table:
    """A table under a title."""

    head: Sequence[Cell | str]
    rows: Sequence[Row]
    title: str = ""


@dataclass(frozen=True)
class View:
    """The results by slice or by series."""

    title: str
    text: str
    ranking: Table
    decisions: Sequence[Table]
    open: bool


def report_html(metrics: Mapping[str, Any], history: Sequence[Epoch], pictures: Mapping[str, bytes]) -> str:
    """Return the page: ``metrics`` of ``evaluate_run`` or ``evaluate_folds``, the epochs, and PNG files by name.

    The names of pictures are those of ``CAPTIONS``, and ``sheet_<label>`` for the sheets of slices.
    """
    model, data = metrics["model"], metrics["dataset"]
    classes = list(metrics["by_slice"]["labels"])
    return render(
        files("ich_train.evaluation").joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=f"{model['network']} on {data['name']}",
        tiles=_tiles(metrics),
        notes=_notes(metrics, history),
        facts=_facts(metrics),
        parts=_parts(data, classes),
        views=[_view(name, metrics[name]) for name in VIEW_WORDS if metrics.get(name) is not None],
        by_value=_by_value(metrics) if metrics.get("by_value") else None,
        history=_history(history, model),
        calibration=_calibration(metrics["calibration"]),
        operating_point=_operating_point(metrics["operating_point"]),
        policies=POLICIES,
        captions=CAPTIONS,
        pictures=pictures,
        windows=", ".join(window["name"] for window in model["windows"]),
        sheets=sorted(classes, key=lambda name: name != ANY),
    )


def log_loss_name(classes: Sequence[str]) -> str:
    """Return what the log loss over ``classes`` is called: it is weighted for RSNA's only."""
    return "weighted log loss" if is_rsna(classes) else "log loss"


def _tiles(metrics: Mapping[str, Any]) -> list[Tile]:
    view, evaluated = metrics["by_slice"], metrics["evaluated"]
    labels, macro = view["labels"], view["macro"]
    counted = f"mean ROC AUC of {count(macro['labels']['roc_auc'], 'label')}"
    noun = "slice" if evaluated["slices"] == 1 else "slices"
    tiles = [
        Tile(number_cell(macro["roc_auc"]), counted, range_words(macro["intervals"]["roc_auc"])),
        Tile(number_cell(view["log_loss"]), log_loss_name([*labels]), range_words(view["log_loss_interval"])),
        Tile(
            Cell(f"{evaluated['slices']:,}"),
            f"{noun} of {count(view['patients'], 'patient')} evaluated",
            part_words(evaluated["subset"]),
        ),
    ]
    if ANY in labels:
        of_any = labels[ANY]
        tiles.insert(
            0,
            Tile(
                number_cell(of_any["roc_auc"]), "ROC AUC of any, by slice", range_words(of_any["intervals"]["roc_auc"])
            ),
        )
        tiles.insert(3, Tile(number_cell(view["position_only"][ANY]), "ROC AUC of any from position only"))
    return tiles


def _notes(metrics: Mapping[str, Any], history: Sequence[Epoch]) -> list[str]:
    evaluated, data, notes = metrics["evaluated"], metrics["dataset"], []
    if "folds" in metrics:
        notes.append(
            "Cross-validated: each slice has the probabilities of the network that was trained without its fold. "
            "Thresholds and the temperature come from the validation folds of all networks together; losses and accuracies "
            "of the epochs are means over the networks."
        )
    elif overfitting := overfitting_text(history):
        notes.append(f"{overfitting} The weights of epoch {metrics['model']['epoch']} were kept.")
    if data["trained_on"] and evaluated["subset"] in ("train", "val", "all"):
        notes.append(
            f"The slices evaluated are those of {part_words(evaluated['subset'])}: the network, its best epoch or its "
            "thresholds were chosen on some of them. Only the part test is unseen."
        )
    if evaluated["series_labels"]:
        notes.append("Labels here are those of whole series, copied to their slices: read the results by series.")
    if data["patient_is_study"]:
        notes.append(
            f"Without PatientID, among the slices evaluated or to train on: {count(data['patient_is_study'], 'slice')}. "
            "Their study is used as the patient. One person can be in several parts of the split, and intervals resample "
            "studies."
        )
    if metrics["by_series_max"] is None:
        chosen = "of a filter" if evaluated["limit"] is None else f"drawn with seed {evaluated['seed']}"
        notes.append(
            f"Only {count(evaluated['slices'], 'slice')} of {part_words(evaluated['subset'])}, {chosen}: these are not "
            "whole series, so there are no results by series."
        )
    if not data["trained_on"]:
        notes.append(_other_dataset(data, evaluated["subset"]))
    return notes


def part_words(part: str) -> str:
    """Return the words for the evaluated part of a dataset, such as "the part val"."""
    return {"all": "all parts", "folds": "the test folds"}.get(part, f"the part {part}")


def _other_dataset(data: Mapping[str, Any], subset: str) -> str:
    note = (
        "This is not the dataset that the network was trained on. The parts below are of this dataset: a patient who is "
        "in both may have been trained on. "
    )
    if not data["parts"]["val"]["slices"]:
        return note + "It has no part val, and so no thresholds of best F1."
    if subset in ("val", "all"):
        return note + (
            "The thresholds of best F1 were found on its part val, which is evaluated too: results at them are better "
            "than they would be on other slices."
        )
    return note + "The thresholds of best F1 were found on its part val."


def _facts(metrics: Mapping[str, Any]) -> list[Row]:
    model, data, evaluated = metrics["model"], metrics["dataset"], metrics["evaluated"]
    size = model["images"]["size"]
    windows = ", ".join(f"{w['name']} {w['center']:g}/{w['width']:g}" for w in model["windows"])
    neighbours = f"; neighbouring slices on each side: {model['context']}" if model["context"] else ""
    is_drawn = evaluated["limit"] is not None and metrics["by_series_max"] is None
    drawn = f", {evaluated['limit']:,} drawn with seed {evaluated['seed']}" if is_drawn else ""
    filtered = evaluated.get("where") or model.get("where")
    where = f", where {filtered}" if filtered else ""
    learned = f", from the slices where {model['where']}" if model.get("where") else ""
    facts = {
        "network": f"{model['network']}{_head_words(model)}, {_epoch_words(metrics)}{learned}",
        "input": f"{size} × {size} pixels in the windows {windows} (center/width in HU){neighbours}",
        "dataset": f"{data['name']}: {count(data['slices'], 'slice')}, {data['series']:,} series, "
        f"{count(data['patients'], 'patient')}",
        "digest": data["digest"],
        "evaluated": f"{part_words(evaluated['subset'])}: {count(evaluated['slices'], 'slice')}{drawn}{where}",
        "intervals": f"{count(evaluated['bootstrap'], 'bootstrap resample')} of the patients, seed {evaluated['seed']}",
    }
    return [Row(fact) for fact in facts.items()]


def _epoch_words(metrics: Mapping[str, Any]) -> str:
    if "folds" not in metrics:
        return f"epoch {metrics['model']['epoch']}"
    epochs = (f"{of['epoch']} for fold {of['fold']}" for of in metrics["folds"])
    return f"{count(len(metrics['folds']), 'network')}: epoch {', '.join(epochs)}"


def _head_words(model: Mapping[str, Any]) -> str:
    head = model.get("head")
    if head is None:
        return ""
    return " of whole volumes" if head["kind"] == "volume" else f" with the head {head['kind']} over each scan"


def _parts(data: Mapping[str, Any], classes: Sequence[str]) -> Table:
    rows = [
        Row(
            [
                name,
                *(f"{part[unit]:,}" for unit in ("slices", "series", "patients")),
                *(
                    Cell(f"{count:,}", (f"{count / max(part['slices'], 1):.1%}",))
                    for count in (part["positives"][label] for label in classes)
                ),
            ]
        )
        for name, part in data["parts"].items()
    ]
    return Table(["part", "slices", "series", "patients", *classes], rows)


def _view(name: str, view: Mapping[str, Any]) -> View:
    title, words = VIEW_WORDS[name]
    cases = count(view["cases"], *("slice",) if name == "by_slice" else ("series", "series"))
    interval = range_words(view["log_loss_interval"])
    loss = number_cell(view["log_loss"]).text + (f" ({interval})" if interval else "")
    text = f"{words} {cases} of {count(view['patients'], 'patient')}.".strip()
    return View(
        title=title,
        text=f"{text} {capital(log_loss_name([*view['labels']]))} {loss}.",
        ranking=_ranking(view),
        decisions=[_decisions(view, policy) for policy in POLICIES],
        open=name == "by_slice",
    )


def _ranking(view: Mapping[str, Any]) -> Table:
    rows = [
        Row(
            [
                name,
                f"{entry['positives']:,}",
                f"{entry['negatives']:,}",
                _measured(entry, "roc_auc"),
                number_cell(view["position_only"][name]),
                _measured(entry, "average_precision"),
            ]
        )
        for name, entry in view["labels"].items()
    ]
    total = len(rows)
    for name, words in AVERAGES.items():
        values = [_averaged(view[name], measure, total) for measure in ("roc_auc", "average_precision")]
        rows.append(Row([Cell(name, (words,)), "", "", values[0], "", values[1]], mean=True))
    return Table(["label", "positive", "negative", "ROC AUC", "position only", "average precision"], rows)


def areas_by_value(views: Mapping[str, Any], names: Sequence[str]) -> list[float | None]:
    """Return the area under the ROC curve of each label among the slices of one value of the column of ``--by``."""
    return [views["by_slice"]["labels"][name]["roc_auc"] for name in names]


def _by_value(metrics: Mapping[str, Any]) -> Table:
    names = [*metrics["by_slice"]["labels"]]
    rows = []
    for value, views in metrics["by_value"].items():
        view = views["by_slice"]
        counts = f"{view['cases']:,}", f"{view['patients']:,}"
        rows.append(Row([value, *counts, *(_measured(view["labels"][name], "roc_auc") for name in names)]))
    column = metrics["evaluated"]["by"]
    return Table([column, "slices", "patients", *names], rows, title=f"ROC AUC for each value of {column}, by slice")


def _decisions(view: Mapping[str, Any], policy: str) -> Table:
    counts = ("tp", "fp", "fn", "tn")
    rows = []
    for name, entry in view["labels"].items():
        at = entry[policy]
        numbers = ["" if at[count] is None else f"{at[count]:,}" for count in counts]
        values = [_measured(entry, f"{policy}.{measure}") for measure in DECISION]
        rows.append(Row([name, number_cell(at["threshold"]), *numbers, *values]))
    total = len(rows)
    for name, words in AVERAGES.items():
        entry = view[name]
        numbers = [f"{entry[policy][count]:,}" if count in entry[policy] else "" for count in counts]
        values = [_averaged(entry, f"{policy}.{measure}", total) for measure in DECISION]
        rows.append(Row([Cell(name, (words,)), "", *numbers, *values], mean=True))
    head = ["label", "threshold", *map(str.upper, counts), *(DECISION_WORDS[name] for name in DECISION)]
    return Table(head, rows, title=capital(POLICY_WORDS[policy]))


def _calibration(found: Mapping[str, Any]) -> Table:
    temperature = found["temperature"]
    lines = {"as predicted": found["as_predicted"]}
    if temperature is not None:
        lines[f"scaled, T = {temperature:.3f}"] = found["scaled"]
    rows = [
        Row([name, *(number_cell(line[key]) for key in ("ece", "brier", "log_loss"))]) for name, line in lines.items()
    ]
    return Table(["probabilities", "ECE", "Brier score", "log loss"], rows)


def _operating_point(found: Mapping[str, Any] | None) -> Table | None:
    if found is None:
        return None
    rows = [
        Row([name, *(number_cell(point[key]) for key in ("threshold", "sensitivity", "specificity"))])
        for name, point in found["labels"].items()
    ]
    title = f"At the thresholds of a sensitivity of {found['sensitivity']:g} on validation"
    return Table(["label", "threshold", "sensitivity", "specificity"], rows, title=title)


def _history(history: Sequence[Epoch], model: Mapping[str, Any]) -> Table:
    rows = [
        Row(
            [
                f"{line.epoch} (kept)" if line.epoch == model.get("epoch") else str(line.epoch),
                *line.cells(),
            ]
        )
        for line in history
    ]
    head = ["epoch", "training loss", "accuracy", "validation loss", "accuracy", "slices/s", "waiting for data"]
    return Table(head, rows)


def _measured(entry: Mapping[str, Any], measure: str) -> Cell:
    """Return a measure with its interval in small print; ``measure`` is one of `ich_train.evaluation.metrics.MEASURES`."""
    value: Any = entry
    for key in measure.split("."):
        value = value[key]
    return number_cell(value, range_words(entry["intervals"][measure]))


def _averaged(entry: Mapping[str, Any], measure: str, total: int) -> Cell:
    """Return a measure of the macro or micro row with its interval and the number of labels that it is taken over."""
    cell = _measured(entry, measure)
    return Cell(cell.text, (*cell.small, f"{entry['labels'][measure]} of {count(total, 'label')}"), cell.undefined)


def capital(text: str) -> str:
    """Return ``text`` with a capital first letter."""
    return text[:1].upper() + text[1:]


def number_cell(value: float | None, *small: str) -> Cell:
    """Return a measure as a cell, with the texts ``small`` that are not empty below it."""
    small = tuple(filter(None, small))
    return Cell("undefined", small, undefined=True) if value is None else Cell(f"{value:.3f}", small)


def range_words(interval: Sequence[float] | None) -> str:
    """Return the bounds of an interval, "" if there is none."""
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
