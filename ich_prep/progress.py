"""Who is told how a long piece of work goes."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Who is told how a build goes."""

    def say(self, text: str) -> None:
        """Show one line."""

    def begin(self, stage: str, total: int, unit: str, done: int) -> None:
        """Show that a stage of ``total`` units begins, ``done`` of them in an earlier run."""

    def advance(self, count: int, set_aside: int) -> None:
        """Show that ``count`` more units are done, ``set_aside`` of them quarantined."""

    def end(self) -> None:
        """Show that the stage is over."""


class Silence:
    """Tells nobody."""

    def say(self, text: str) -> None:
        """Show nothing."""

    def begin(self, stage: str, total: int, unit: str, done: int) -> None:
        """Show nothing."""

    def advance(self, count: int, set_aside: int) -> None:
        """Show nothing."""

    def end(self) -> None:
        """Show nothing."""
