"""One self-contained HTML page that shows an evaluated run: no scripts, no other files, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_train.metrics import DECISION, POLICIES
from ich_train.runs import Epoch, overfitting_since

NOTICE = "Research software, not a medical device: nothing here may guide the care of a patient."
DECISION_WORDS = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1"}
POLICY_WORDS = {"at_half": "At 0.5", "at_best_f1": "At the threshold of best F1 on validation"}
AVERAGES = {"macro": "mean over labels", "micro": "all cases pooled"}
VIEW_WORDS = {
    "by_slice": ("By slice", ""),
    "by_series_max": (
        "By series, maximum over slices",
        "A series is positive when any of its slices is, negative when all are known to be; its probability is the "
        "highest of its labelled slices.",
    ),
    "by_series_mean": (
        "By series, mean over slices",
        "A series is positive when any of its slices is, negative when all are known to be; its probability is the "
        "mean of its labelled slices.",
    ),
}
PICTURE_WORDS = {
    "loss": ("Loss", "Mean loss of each epoch. Training loss is taken while the weights change, on augmented slices."),
    "accuracy": ("Accuracy", "Share of right answers at 0.5 over all slices and labels of each epoch."),
    "roc": ("ROC", "Each label in its panel, the others faint behind it. With its 95% interval by patients."),
    "precision_recall": ("Precision and recall", "The dotted line is the share of positives: a guess reaches as much."),
    "confusion_at_half": ("Confusion at 0.5", "Counts of slices; percentages and shades are shares of a line."),
    "confusion_at_best_f1": (
        "Confusion at best F1",
        "Each label at the threshold of the highest F1 on validation. Counts of slices; percentages are of a line.",
    ),
    "feature_maps": (
        "Feature maps",
        "What each convolution layer makes of one slice: of each layer the maps with the largest spread, the strongest "
        "first, each stretched from its own 1st to its 99th percentile.",
    ),
}
STYLE = """
:root { --ink: #1f2933; --muted: #66727f; --faint: #d5dae0; --blue: #1f5a96; --wash: #f4f6f8; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--faint); }
h3 { font-size: 1rem; margin: 1.75rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 42rem; }
.muted, figcaption, caption { color: var(--muted); font-size: .875rem; }
.note { border-left: 3px solid #c2571a; background: #fdf6f1; padding: .5rem .75rem; max-width: 42rem; }
nav { margin: 1rem 0; font-size: .875rem; } nav a { margin-right: 1rem; color: var(--blue); text-decoration: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.tile { background: var(--wash); border-radius: .5rem; padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; font-weight: 600; }
.tile span { display: block; color: var(--muted); font-size: .8125rem; }
.wide { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; text-align: right; white-space: nowrap; vertical-align: top; }
th { font-weight: 600; } thead th { color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--faint); }
tbody tr + tr { border-top: 1px solid #eceff2; } tr.mean th, tr.mean td { background: var(--wash); }
th:first-child, td:first-child, .facts td { text-align: left; } .facts td { white-space: normal; overflow-wrap: anywhere; }
th small, td small { display: block; color: var(--muted); font-size: .75rem; font-weight: 400; }
.undefined { color: var(--muted); font-style: italic; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 1.5rem; }
.pair img { min-width: 0; }
figure { margin: 1rem 0 1.5rem; } img { display: block; width: 100%; height: auto; min-width: 34rem; }
img.tall { max-width: 48rem; } details { margin: .5rem 0; } summary { cursor: pointer; color: var(--blue); }
footer { margin-top: 3rem; border-top: 1px solid var(--faint); padding-top: .75rem; }
@media print { .wide { overflow: visible; } img { min-width: 0; } h2 { break-after: avoid; } }
"""


def report_html(metrics: Mapping[str, Any], history: Sequence[Epoch], pictures: Mapping[str, bytes]) -> str:
    """Return the page: ``metrics`` of `ich_train.evaluate.evaluate_run`, the epochs, and the PNG files by name.

    The names of pictures are those of ``PICTURE_WORDS``, and ``sheet_<label>`` for the sheets of slices.
    """
    model, data = metrics["model"], metrics["dataset"]
    title = f"{model['name']} on {data['name']}"
    views = [(name, metrics[name]) for name in VIEW_WORDS if metrics[name] is not None]
    body = [
        f"<header><h1>{escape(title)}</h1><p class='muted'>{NOTICE}</p></header>",
        _navigation(),
        _tiles(metrics),
        *(f"<p class='note'>{escape(note)}</p>" for note in _notes(metrics, history)),
        _section("run", "The run", _facts(metrics), _parts(data)),
        _section(
            "results",
            "Results",
            "<p>In small print: 95% of bootstrap resamples of the patients, each with all their slices; no small print "
            "where so few patients have a label that most resamples miss it. "
            "<span class='undefined'>undefined</span>: all cases are of one class, or nothing was called positive. "
            "<i>Position only</i> is the ROC AUC of a guess that knows no more than where in its series a slice lies: "
            "what a network adds begins there.</p>",
            *(_view(name, view) for name, view in views),
        ),
        _section(
            "training",
            "Training",
            f"<div class='pair'>{_picture('loss', pictures)}{_picture('accuracy', pictures)}</div>",
            _history(history, model),
        ),
        _section("curves", "Curves", _picture("roc", pictures), _picture("precision_recall", pictures)),
        _section(
            "confusion",
            "Confusion",
            *(_picture(f"confusion_{policy}", pictures) for policy in POLICIES),
        ),
        _section(
            "slices",
            "Hits and errors",
            _sheets_text(model),
            *(_sheet(name, pictures) for name in reversed(RSNA_CLASSES)),
        ),
        _section("network", "What the network makes of a slice", _picture("feature_maps", pictures, kind="tall")),
        f"<footer class='muted'>{NOTICE}</footer>",
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _navigation() -> str:
    places = ("run", "results", "training", "curves", "confusion", "slices", "network")
    return "<nav>" + "".join(f"<a href='#{place}'>{place}</a>" for place in places) + "</nav>"


def _tiles(metrics: Mapping[str, Any]) -> str:
    view, evaluated = metrics["by_slice"], metrics["evaluated"]
    label, macro = view["labels"]["any"], view["macro"]
    tiles = [
        (_number(label["roc_auc"]), "ROC AUC of any, by slice", _range(label["intervals"]["roc_auc"])),
        (
            _number(macro["roc_auc"]),
            f"mean ROC AUC of {macro['labels']['roc_auc']} labels",
            _range(macro["intervals"]["roc_auc"]),
        ),
        (_number(view["log_loss"]), "weighted log loss", _range(view["log_loss_interval"])),
        (_number(view["position_only"]["any"]), "ROC AUC of any from position only", ""),
        (f"{evaluated['slices']:,}", f"slices of {view['patients']:,} patients evaluated", evaluated["subset"]),
    ]
    shown = (
        f"<div class='tile'><b>{value}</b><span>{words}</span><span>{more}</span></div>" for value, words, more in tiles
    )
    return f"<div class='tiles'>{''.join(shown)}</div>"


def _notes(metrics: Mapping[str, Any], history: Sequence[Epoch]) -> list[str]:
    evaluated, data, notes = metrics["evaluated"], metrics["dataset"], []
    since = overfitting_since(history)
    if since is not None:
        notes.append(
            f"Overfitting from epoch {since} on: accuracy rises in training and falls in validation. The weights of "
            f"epoch {metrics['model']['epoch']} were kept."
        )
    if data["trained_on"] and evaluated["subset"] in ("train", "val", "all"):
        notes.append(
            f"The slices evaluated are those of the subset {evaluated['subset']}: the network, its best epoch or its "
            "thresholds were chosen on some of them. Only the subset test is unseen."
        )
    if evaluated["series_labels"]:
        notes.append("Labels here are those of whole series, copied to their slices: read the results by series.")
    if data["patient_is_study"]:
        notes.append(
            f"{data['patient_is_study']:,} slices, judged or to train on, have no PatientID; their study stands for the "
            "patient. One person can be in several parts of the split, and intervals resample studies."
        )
    if metrics["by_series_max"] is None:
        notes.append(
            f"{evaluated['slices']:,} slices were drawn with seed {evaluated['seed']}; as they are not whole series, "
            "there are no results by series."
        )
    if not data["trained_on"]:
        note = (
            "This is not the dataset that the network was trained on. The parts below are of this dataset: a patient "
            "who is in both may have been trained on. "
        )
        if not data["parts"]["val"]["slices"]:
            note += "It has no part val, and so no thresholds of best F1."
        elif evaluated["subset"] in ("val", "all"):
            note += (
                "The thresholds of best F1 were found on its part val, which is judged too: results at them are better "
                "than they would be on other slices."
            )
        else:
            note += "The thresholds of best F1 were found on its part val."
        notes.append(note)
    return notes


def _facts(metrics: Mapping[str, Any]) -> str:
    model, data, evaluated = metrics["model"], metrics["dataset"], metrics["evaluated"]
    windows = ", ".join(f"{w['name']} {w['center']:g}/{w['width']:g}" for w in model["windows"])
    neighbours = f"; neighbouring slices on each side: {model['context']}" if model["context"] else ""
    drawn = f", {evaluated['limit']:,} drawn with seed {evaluated['seed']}" if metrics["by_series_max"] is None else ""
    facts = [
        ("network", f"{model['name']}, the epoch of the lowest validation loss: {model['epoch']}"),
        ("sees", f"{model['size']} × {model['size']} pixels in the windows {windows} (center/width in HU){neighbours}"),
        (
            "dataset",
            f"{data['name']}: {data['slices']:,} slices, {data['series']:,} series, {data['patients']:,} patients",
        ),
        ("digest", data["digest"]),
        ("evaluated", f"{evaluated['subset']}: {evaluated['slices']:,} slices{drawn}"),
        ("intervals", f"{evaluated['bootstrap']:,} bootstrap resamples of the patients, seed {evaluated['seed']}"),
    ]
    lines = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in facts)
    return f"<div class='wide'><table class='facts'><tbody>{lines}</tbody></table></div>"


def _parts(data: Mapping[str, Any]) -> str:
    head = ["part", "slices", "series", "patients", *(f"{name}" for name in RSNA_CLASSES)]
    lines = [
        [
            name,
            *(f"{part[unit]:,}" for unit in ("slices", "series", "patients")),
            *(f"{count:,}<small>{count / max(part['slices'], 1):.1%}</small>" for count in part["positives"].values()),
        ]
        for name, part in data["parts"].items()
    ]
    return "<h3>Parts of the dataset, and their positive slices</h3>" + _table(head, lines)


def _view(name: str, view: Mapping[str, Any]) -> str:
    title, words = VIEW_WORDS[name]
    unit = "slices" if name == "by_slice" else "series"
    interval = _range(view["log_loss_interval"])
    loss = _number(view["log_loss"]) + (f" ({interval})" if interval else "")
    return (
        f"<h3>{title}</h3><p>{words} {view['cases']:,} {unit} of {view['patients']:,} patients. "
        f"Weighted log loss {loss}.</p>"
        + _ranking(view)
        + "".join(_decisions(view, policy, shown=name == "by_slice") for policy in POLICIES)
    )


def _ranking(view: Mapping[str, Any]) -> str:
    lines = [
        [
            name,
            f"{entry['positives']:,}",
            f"{entry['negatives']:,}",
            _measured(entry, "roc_auc"),
            _number(view["position_only"][name]),
            _measured(entry, "average_precision"),
        ]
        for name, entry in view["labels"].items()
    ]
    for name, words in AVERAGES.items():
        entry = view[name]
        values = [_averaged(entry, "roc_auc"), "", _averaged(entry, "average_precision")]
        lines.append([f"{name}<small>{words}</small>", "", "", *values])
    head = ["label", "positive", "negative", "ROC AUC", "position only", "average precision"]
    return _table(head, lines, means=len(AVERAGES))


def _decisions(view: Mapping[str, Any], policy: str, *, shown: bool) -> str:
    counts = ("tp", "fp", "fn", "tn")
    lines = []
    for name, entry in view["labels"].items():
        at = entry[policy]
        numbers = ["" if at[count] is None else f"{at[count]:,}" for count in counts]
        lines.append([name, _number(at["threshold"]), *numbers, *(_measured(entry, f"{policy}.{m}") for m in DECISION)])
    for name, words in AVERAGES.items():
        entry = view[name]
        numbers = [f"{entry[policy][count]:,}" if count in entry[policy] else "" for count in counts]
        values = [_averaged(entry, f"{policy}.{measure}") for measure in DECISION]
        lines.append([f"{name}<small>{words}</small>", "", *numbers, *values])
    head = ["label", "threshold", "TP", "FP", "FN", "TN", *(DECISION_WORDS[name] for name in DECISION)]
    table = _table(head, lines, means=len(AVERAGES))
    return f"<details{' open' if shown else ''}><summary>{POLICY_WORDS[policy]}</summary>{table}</details>"


def _history(history: Sequence[Epoch], model: Mapping[str, Any]) -> str:
    head = ["epoch", "training loss", "accuracy", "validation loss", "accuracy", "slices/s", "waiting for data"]
    lines = [
        [
            f"{line.epoch} (kept)" if line.epoch == model["epoch"] else str(line.epoch),
            *(f"{value:.4f}" for value in (line.train_loss, line.train_accuracy, line.val_loss, line.val_accuracy)),
            f"{line.slices_per_s:,.0f}",
            f"{line.wait_share:.1%}",
        ]
        for line in history
    ]
    return f"<details><summary>Every epoch</summary>{_table(head, lines)}</details>"


def _sheets_text(model: Mapping[str, Any]) -> str:
    windows = ", ".join(escape(window["name"]) for window in model["windows"])
    return (
        "<p>For each label the slices that the network was surest of, at most one of a series, at the threshold of "
        f"best F1 (0.5 where that is undefined). Windows from left to right: {windows}. The row is a slice's place in "
        "the dataset and in predictions.parquet.</p>"
    )


def _sheet(label: str, pictures: Mapping[str, bytes]) -> str:
    state = " open" if label == "any" else ""
    return f"<details{state}><summary>{label}</summary>{_image(f'sheet_{label}', pictures)}</details>"


def _picture(name: str, pictures: Mapping[str, bytes], kind: str = "") -> str:
    title, words = PICTURE_WORDS[name]
    return f"<figure><h3>{title}</h3><figcaption>{words}</figcaption>{_image(name, pictures, kind)}</figure>"


def _image(name: str, pictures: Mapping[str, bytes], kind: str = "") -> str:
    data = base64.b64encode(pictures[name]).decode("ascii")
    return f"<div class='wide'><img class='{kind}' alt='{name}' src='data:image/png;base64,{data}'></div>"


def _section(place: str, title: str, *parts: str) -> str:
    return f"<section id='{place}'><h2>{title}</h2>\n" + "\n".join(parts) + "</section>"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], *, means: int = 0) -> str:
    """Return a table of HTML cells, the first of each line its name, the last ``means`` lines set off."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = []
    for k, line in enumerate(lines):
        kind = " class='mean'" if k >= len(lines) - means else ""
        body.append(f"<tr{kind}><th>{line[0]}</th>{''.join(f'<td>{cell}</td>' for cell in line[1:])}</tr>")
    return f"<div class='wide'><table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _measured(entry: Mapping[str, Any], measure: str) -> str:
    """Return a measure with its interval in small print below; ``measure`` is one of `ich_train.metrics.MEASURES`."""
    value: Any = entry
    for key in measure.split("."):
        value = value[key]
    return f"{_number(value)}<small>{_range(entry['intervals'][measure])}</small>"


def _averaged(entry: Mapping[str, Any], measure: str) -> str:
    """Return a measure of the macro or micro line with its interval and the number of labels that it is taken over."""
    return f"{_measured(entry, measure)}<small>{entry['labels'][measure]} of {len(RSNA_CLASSES)} labels</small>"


def _number(value: float | None) -> str:
    return "<span class='undefined'>undefined</span>" if value is None else f"{value:.3f}"


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
