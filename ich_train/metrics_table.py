"""The metrics of an evaluation as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ich_prep.errors import count
from ich_train.wording import text_table

if TYPE_CHECKING:
    from rich.console import Console


def print_metrics(console: Console, metrics: dict[str, Any], run: Path) -> None:
    """Print the table of each label, those of each value if slices were measured by one, and where the report is."""
    from ich_train.evaluation.evaluate import REPORT
    from ich_train.evaluation.report import areas_by_value, log_loss_name, part_words

    evaluated, view = metrics["evaluated"], metrics["by_slice"]
    title = f"{count(evaluated['slices'], 'slice')} of {part_words(evaluated['subset'])}"
    of_head = metrics["by_scan"]
    words = f"{count(of_head['cases'], 'scan')}, as the head says" if of_head else ""
    if evaluated["series_labels"] and of_head:
        title, view = words, of_head
    elif evaluated["series_labels"] and metrics["by_series_max"]:
        title, view = f"Series of {title}, by their highest slice", metrics["by_series_max"]
    elif of_head:
        _print_labels(console, words, of_head)
    _print_labels(console, title, view)
    if metrics["by_value"]:
        names = [*view["labels"]]
        lines = [
            (value, f"{views['by_slice']['cases']:,}", *(_number(entry) for entry in areas_by_value(views, names)))
            for value, views in metrics["by_value"].items()
        ]
        console.print("ROC AUC by value:", soft_wrap=True)
        console.print(text_table((evaluated["by"], "slices", *names), lines), soft_wrap=True, markup=False)
    loss = log_loss_name([*view["labels"]]).capitalize()
    console.print(f"{loss} {_number(view['log_loss'])}. Report: {run / REPORT}", soft_wrap=True)


def _print_labels(console: Console, title: str, view: Mapping[str, Any]) -> None:
    rows = [
        (
            name,
            f"{entry['positives']:,}",
            _number(entry["roc_auc"]),
            _interval(entry["intervals"]["roc_auc"]),
            _number(entry["average_precision"]),
        )
        for name, entry in view["labels"].items()
    ]
    console.print(f"{title}:", soft_wrap=True)
    head = ("label", "positive", "ROC AUC", "95%", "average precision")
    console.print(text_table(head, rows), soft_wrap=True, markup=False)


def _interval(interval: Sequence[float] | None) -> str:
    return "undefined" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
