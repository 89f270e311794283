"""How a build or a verification is shown: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Terminal:
    """Shows stages on standard error, with the rate, the time left and what was set aside so far."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._stage, self._unit = "", ""
        self._total = self._done = self._set_aside = self._first = 0
        self._start = self._spoke = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """Show one line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def begin(self, stage: str, total: int, unit: str, done: int) -> None:
        """Show that a stage of ``total`` units begins, ``done`` of them in an earlier run."""
        self._stage, self._unit, self._total, self._done, self._first = stage, unit, total, done, done
        self._set_aside, self._start = 0, time.monotonic()
        self._spoke = self._start
        if done:
            self.say(f"{stage}: going on after {done} of {total} {unit}.")
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(stage, total=total, completed=done, rate="")
            self._bar.start()

    def advance(self, count: int, set_aside: int) -> None:
        """Show that ``count`` more units are done, ``set_aside`` of them quarantined."""
        self._done += count
        self._set_aside += set_aside
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate())
        elif time.monotonic() - self._spoke >= SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            self.say(f"{self._stage}: {self._done} of {self._total} {self._unit}, {self._rate()}.")

    def end(self) -> None:
        """Show that the stage is over."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self.say(f"{self._stage}: {self._done} {self._unit}, {self._rate()}.")

    def _rate(self) -> str:
        rate = (self._done - self._first) / max(1e-9, time.monotonic() - self._start)
        aside = f", {self._set_aside} set aside" if self._set_aside else ""
        return f"{rate:,.0f} {self._unit}/s{aside}"
