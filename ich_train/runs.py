"""The folder of a run: its name, its recipe, its history.

::

    runs/NAME/
        recipe.toml          the settings, all of them
        history.csv          a line for each epoch
        best/  last/         checkpoints: the lowest validation loss, and the state to resume from
        metrics.json  predictions.parquet  report.html  pictures/  curves/    the evaluation
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ich_prep.dataset.storage import write_whole
from ich_prep.errors import TrainError, UsageError
from ich_prep.recipe import load_section
from ich_train.config import FREE_ON_RESUME, EvalConfig, TrainConfig, recipe_text

RECIPE, HISTORY, BEST, LAST, METRICS = "recipe.toml", "history.csv", "best", "last", "metrics.json"


@dataclass(frozen=True)
class Epoch:
    """A line of ``history.csv``."""

    epoch: int  # from 1
    seconds: float  # training and validation
    train_loss: float  # mean over the epoch, while the weights change, with augmentation
    train_accuracy: float  # share of correct answers at 0.5 over all known labels
    val_loss: float
    val_accuracy: float
    learning_rate: float  # at the epoch's end
    slices_per_s: float  # of training, all ranks together
    wait_share: float  # share of the training time spent waiting for data


def new_folder(root: Path, name: str) -> Path:
    """Return ``root/name``, or if it is taken ``root/name-k``: k is one more than the highest, from 2 on."""
    return _numbered(root, name, max(_numbers(root, name), default=0) + 1)


def latest_folder(root: Path, name: str) -> Path:
    """Return the one of ``root/name``, ``root/name-2`` ... with the highest number; raises `UsageError` if there is none."""
    numbers = _numbers(root, name)
    if not numbers:
        raise UsageError(f"No run to resume at {root / name}. Name its folder with --out.")
    return _numbered(root, name, max(numbers))


def start(out: Path, settings: TrainConfig, evaluation: EvalConfig | None) -> None:
    """Make the folder ``out`` of a new run and write its recipe; raises `UsageError` if it is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} is not an empty folder. Continue its run with --resume, or name another folder with --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    sections = {"train": settings} if evaluation is None else {"train": settings, "eval": evaluation}
    write_whole(out / RECIPE, recipe_text({name: values.model_dump() for name, values in sections.items()}).encode())


def check_same(out: Path, before: TrainConfig, settings: TrainConfig) -> None:
    """Raise `UsageError` if ``settings`` would make another run than ``before``, those of the run in ``out``."""
    differing = [
        f"{key} (was {was}, now {getattr(settings, key)})"
        for key, was in before
        if getattr(settings, key) != was and key not in FREE_ON_RESUME
    ]
    if differing:
        raise UsageError(
            f"Cannot resume {out} with different settings: {', '.join(differing)}. Restore them, or start another run, "
            "from this one's weights with --weights if you like."
        )


def settings_of(out: Path) -> tuple[TrainConfig, EvalConfig]:
    """Return the settings of the run in the folder ``out``; raises `UsageError` if it is not the folder of a run."""
    if not (out / RECIPE).is_file():
        raise UsageError(f"{out} is not the folder of a run: there is no {RECIPE} in it.")
    return load_section(out / RECIPE, "train", TrainConfig), load_section(out / RECIPE, "eval", EvalConfig)


def write_history(out: Path, history: Sequence[Epoch]) -> None:
    """Write ``history`` to ``history.csv`` of the run in the folder ``out``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Epoch))
    # repr, and so csv, writes the shortest decimal that reads back as the same number.
    writer.writerows(dataclasses.astuple(epoch) for epoch in history)
    write_whole(out / HISTORY, text.getvalue().encode())


def read_history(out: Path) -> list[Epoch]:
    """Return the epochs in ``history.csv`` of the run in the folder ``out``; raises `TrainError` for another table."""
    try:
        with (out / HISTORY).open(newline="", encoding="utf-8") as file:
            return [
                Epoch(**{key: int(value) if key == "epoch" else float(value) for key, value in line.items()})  # type: ignore[arg-type]
                for line in csv.DictReader(file)
            ]
    except (OSError, TypeError, ValueError) as error:
        raise TrainError(f"Cannot read the history of a run in {out / HISTORY}: {error}.") from error


def overfitting_since(history: Sequence[Epoch]) -> int | None:
    """Return the epoch after that of the lowest validation loss, if training only overfitted from there on, or None.

    It did if at least two epochs followed and over all of them, by the slope of a straight line, training accuracy rose
    and validation accuracy fell.
    """
    lowest = min(range(len(history)), key=lambda k: history[k].val_loss, default=0)
    tail = history[lowest:]
    if len(tail) < 3:
        return None
    slopes = np.polyfit(range(len(tail)), [(epoch.train_accuracy, epoch.val_accuracy) for epoch in tail], deg=1)[0]
    return tail[1].epoch if slopes[0] > 0 > slopes[1] else None


def _numbered(root: Path, name: str, number: int) -> Path:
    return root / (name if number == 1 else f"{name}-{number}")


def _numbers(root: Path, name: str) -> list[int]:
    """Return the numbers of the folders of that name, 1 for the one without; a year, as in "rsna-2019", is none."""
    found = [re.fullmatch(rf"{re.escape(name)}(?:-([2-9]|[1-9]\d\d?))?", path.name) for path in root.glob("*")]
    return [int(match[1] or 1) for match in found if match]
