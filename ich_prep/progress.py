"""Progress reporting: the interface, one that does nothing, the terminal's, lines of JSON, and one that also keeps a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from ich_prep.errors import count
from ich_prep.events import event_line
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

    def advance(self, count: int, quarantined: int, task: int | None = None) -> None:
        """Show that ``count`` more units are done, ``quarantined`` of them quarantined, those of ``task``."""

    def end(self) -> None:
        """Show that the stage is over."""

    def event(self, name: str, **values: Any) -> None:
        """Record an event, one of ``events.EVENTS``, which ``say`` may have told in words."""


class NoProgress:
    """Reports nothing."""

    def say(self, text: str) -> None:
        """Show nothing."""

    def begin(self, stage: str, total: int, unit: str, done: int) -> None:
        """Show nothing."""

    def advance(self, count: int, quarantined: int, task: int | None = None) -> None:
        """Show nothing."""

    def end(self) -> None:
        """Show nothing."""

    def event(self, name: str, **values: Any) -> None:
        """Record nothing."""


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

    def advance(self, count: int, quarantined: int, task: int | None = None) -> None:
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

    def event(self, name: str, **values: Any) -> None:
        """Show nothing: what a person must know is said."""

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


class JsonProgress:
    """Passes lines of JSON (see ``events``) to ``write``, standard error by default.

    Of a stage: its progress, at most every ten seconds; or every task, if ``tasks``.
    """

    def __init__(self, write: Callable[[str], None] | None = None, *, tasks: bool = False) -> None:
        self._write, self._tasks = write or _to_stderr, tasks
        self._stage, self._unit = "", ""
        self._total = self._done = self._first = self._quarantined = 0
        self._start = self._spoke = 0.0

    def say(self, text: str) -> None:
        """Write one message."""
        self.event("message", text=message(text))

    def begin(self, stage: str, total: int, unit: str, done: int) -> None:
        """Write that a stage of ``total`` units begins, ``done`` of them in an earlier run."""
        self._stage, self._unit, self._total = stage, unit, total
        self._done, self._first, self._quarantined = done, done, 0
        self._start = self._spoke = time.monotonic()
        self.event("stage", stage=stage, unit=unit, total=total, done=done)

    def advance(self, count: int, quarantined: int, task: int | None = None) -> None:
        """Write the task, or how far the stage is if ten seconds have passed."""
        self._done += count
        self._quarantined += quarantined
        if self._tasks:
            self.event("task", stage=self._stage, task=task, count=count, quarantined=quarantined)
        elif time.monotonic() - self._spoke >= SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            rate = self._rate()
            left = round((self._total - self._done) / rate, 1) if rate else None
            self.event("progress", **self._counts(), total=self._total, seconds_left=left)

    def end(self) -> None:
        """Write that the stage is over."""
        self.event("stage_end", **self._counts(), seconds=round(time.monotonic() - self._start, 3))

    def event(self, name: str, **values: Any) -> None:
        """Write an event."""
        self._write(event_line(name, values))

    def _counts(self) -> dict[str, Any]:
        return {
            "stage": self._stage,
            "unit": self._unit,
            "done": self._done,
            "quarantined": self._quarantined,
            "per_second": round(self._rate(), 1),
        }

    def _rate(self) -> float:
        return (self._done - self._first) / max(1e-9, time.monotonic() - self._start)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class LoggedProgress:
    """Shows what ``shown`` shows, and passes every message, task and event to ``write``, the log.

    As a context, it also logs the error or the interruption that leaves it.
    """

    def __init__(self, shown: Progress, write: Callable[[str], None]) -> None:
        self._log = JsonProgress(write, tasks=True)
        self._both: tuple[Progress, ...] = (shown, self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # the error may be that the disk is full
            if isinstance(error, KeyboardInterrupt):
                self._log.event("interrupted")
            elif error is not None:
                self._log.event("error", kind=type(error).__name__, text=message(str(error)))

    def say(self, text: str) -> None:
        """Show and log one line."""
        for one in self._both:
            one.say(text)

    def begin(self, stage: str, total: int, unit: str, done: int) -> None:
        """Show and log that a stage begins."""
        for one in self._both:
            one.begin(stage, total, unit, done)

    def advance(self, count: int, quarantined: int, task: int | None = None) -> None:
        """Show the progress, and log the task."""
        for one in self._both:
            one.advance(count, quarantined, task)

    def end(self) -> None:
        """Show and log that the stage is over."""
        for one in self._both:
            one.end()

    def event(self, name: str, **values: Any) -> None:
        """Record and log an event."""
        for one in self._both:
            one.event(name, **values)
