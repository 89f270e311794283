"""A run's measurements and progress: a bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ich_train.ranks import Ranks
from ich_train.runs import Epoch, best_of, overfitting_text
from ich_train.wording import text_table

REFRESH_S = 0.25  # asking a GPU for its loss more often would slow it down
BEST_WORDS = {"loss": "lowest validation loss", "auc": "highest mean ROC AUC in validation", "last": "last epoch"}
LINE_S = 30.0  # between two lines without a terminal


@dataclass
class Meter:
    """The sums of an epoch so far."""

    sums: torch.Tensor  # (4,) float64 on the device: those of `ich_train.loss.Sums`, of this rank
    slices: int = 0  # of all ranks
    seconds: float = 0.0
    wait_s: float = 0.0  # of those, spent waiting for data

    @classmethod
    def new(cls, device: torch.device) -> Meter:
        """Return a meter at zero on ``device``."""
        return cls(torch.zeros(4, dtype=torch.float64, device=device))

    def means(self, ranks: Ranks | None = None) -> tuple[float, float]:
        """Return the mean loss and the accuracy so far, of this rank or of all, NaN without labels; waits for the device."""
        sums = self.sums if ranks is None else ranks.total(self.sums)
        loss, weight, correct, known = sums.tolist()
        return loss / weight if weight else math.nan, correct / known if known else math.nan


class Reporter:
    """Shows the progress of a run; ``silent`` on every rank but the first."""

    def __init__(self, console: Console, *, epochs: int, silent: bool, chosen_by: str = "loss") -> None:
        self._chosen_by, self._best_words = chosen_by, "highest area" if chosen_by == "auc" else "lowest"
        self._console = console
        self._epochs = epochs
        self._silent = silent
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=silent or not console.is_terminal,
        )
        self._task = self._bar.add_task("", epoch="", rates="")
        self._shown_at = 0.0

    def __enter__(self) -> Self:
        self._shown_at = time.perf_counter() if self._bar.disable else 0.0
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._silent:
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def step(self, epoch: int, step: int, steps: int, meter: Meter) -> None:
        """Show that ``step`` of ``steps`` of an epoch are done; most calls show nothing."""
        now, lines = time.perf_counter(), self._bar.disable
        soon = now - self._shown_at < (LINE_S if lines else REFRESH_S)
        at_end = step == steps and not lines  # a line of the whole epoch follows
        if self._silent or (soon and not at_end):
            return
        self._shown_at = now
        loss, _ = meter.means()
        rates = (
            f"{meter.slices / meter.seconds:,.0f} slices/s  loss {loss:.4f}  {meter.wait_s / meter.seconds:.0%} waiting"
        )
        if lines:
            self.say(f"epoch {epoch}/{self._epochs}: {step:,} of {steps:,} steps  {rates}")
            return
        self._bar.update(
            self._task, completed=step, total=steps, epoch=f"{epoch}/{self._epochs}", rates=rates, refresh=True
        )

    def epoch(self, line: Epoch, *, best: bool) -> None:
        """Print the results of an epoch."""
        validation = (
            f"validation loss {line.val_loss:.4f}{f' ({self._best_words} so far)' if best else ''}, "
            f"accuracy {line.val_accuracy:.4f}"
            f"{'' if math.isnan(line.val_auc) else f', mean ROC AUC {line.val_auc:.4f}'}"
        )
        self.say(
            f"epoch {line.epoch}/{self._epochs}: "
            f"training loss {line.train_loss:.4f}, accuracy {line.train_accuracy:.4f}; "
            f"{'no validation' if math.isnan(line.val_loss) else validation}; {line.slices_per_s:,.0f} slices/s, "
            f"{line.wait_share:.1%} waiting for data, {line.seconds:.1f} s"
        )

    def summary(self, history: Sequence[Epoch]) -> None:
        """Print the whole history as a table, the epoch of the lowest validation loss marked."""
        if self._silent:
            return
        best = best_of(history, self._chosen_by)
        rows = [
            (
                f"{line.epoch}{' *' if line is best else ''}",
                *line.cells(),
            )
            for line in history
        ]
        head = ("epoch", "loss", "accuracy", "val. loss", "val. accuracy", "slices/s", "waiting")
        self.say(text_table(head, rows))
        self.say(f"* {BEST_WORDS[self._chosen_by]}: kept as best/")
        if overfitting := overfitting_text(history):
            self.say(overfitting)
