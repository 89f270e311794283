"""Progress reporting: the interface, one that does nothing, and the terminal's."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from ich_prep.errors import count
from ich_prep.messages import message

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Where a build reports its progress."""

    def say(self, text: str) -> None:
        """Show one line."""

    def begin(self, stage: str, total: int, unit: str, done: int) -> None:
        """Show that a stage of ``total`` units begins, ``done`` of them in an earlier run."""

    def advance(self, count: int, quarantined: int) -> None:
        """Show that ``count`` more units are done, ``quarantined`` of them quarantined."""

    def end(self) -> None:
        """Show that the stage is over."""


class NoProgress:
    """Reports nothing."""

    def say(self, text: str) -> None:
        """Show nothing."""

    def begin(self, stage: str, total: int, unit: str, done: int) -> None:
        """Show nothing."""

    def advance(self, count: int, quarantined: int) -> None:
        """Show nothing."""

    def end(self) -> None:
        """Show nothing."""


class TerminalProgress:
    """Shows stages on standard error, with the rate, the time left and how many were quarantined so far.

    A progress bar on a terminal; otherwise a plain line every ten seconds.
    """

    def __init__(self) -> None:
        from rich.progress import TaskID

        from ich_prep.terminal import Terminal

        self._console = Terminal()
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._stage, self._unit = "", ""
        self._total = self._done = self._quarantined = self._first = 0
        self._start = self._spoke = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_bar()

    def say(self, text: str) -> None:
        """Show one line."""
        self._console.print(message(text), markup=False, soft_wrap=True)

    def begin(self, stage: str, total: int, unit: str, done: int) -> None:
        """Show that a stage of ``total`` units begins, ``done`` of them in an earlier run."""
        self._stage, self._unit, self._total, self._done, self._first = stage, unit, total, done, done
        self._quarantined, self._start = 0, time.monotonic()
        self._spoke = self._start
        if done:
            self.say(f"{stage}: resuming after {done} of {total} {unit}.")
        if self._console.is_terminal:
            self._start_bar()

    def advance(self, count: int, quarantined: int) -> None:
        """Show that ``count`` more units are done, ``quarantined`` of them quarantined."""
        self._done += count
        self._quarantined += quarantined
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate())
        elif time.monotonic() - self._spoke >= SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            self.say(f"{self._stage}: {self._done} of {self._total} {self._unit}{self._rate()}.")

    def end(self) -> None:
        """Show that the stage is over."""
        self._stop_bar()
        self.say(f"{self._stage}: {count(self._done, self._unit.removesuffix('s'))}{self._rate()}.")

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(self._stage, total=self._total, completed=self._done, rate="")
        self._bar.start()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _rate(self) -> str:
        """Return the rate and the number quarantined, to append to a count; no rate if this run did nothing."""
        done = self._done - self._first
        rate = done / max(1e-9, time.monotonic() - self._start)
        speed = f", {rate:,.0f} {self._unit}/s" if done else ""
        return speed + (f", {self._quarantined} quarantined" if self._quarantined else "")
