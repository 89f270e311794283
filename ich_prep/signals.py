"""The signals that end a program: Ctrl-C (SIGINT), SIGTERM and SIGHUP all interrupt it the same way.

Each raises ``KeyboardInterrupt`` in the main thread, so that one path cleans up and says how to resume. The exit status is
what a shell reports of a process that the signal ended: 128 and the signal's number.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []


def interrupt_on_signals() -> None:
    """Let each of ``ENDING`` interrupt this program; one that its parent ignores, as nohup does SIGHUP, stays ignored."""
    for number in heeded():
        signal.signal(number, _interrupt)


def heeded() -> tuple[signal.Signals, ...]:
    """Return those of ``ENDING`` that this process does not ignore."""
    return tuple(number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN)


def note(number: int) -> None:
    """Record that signal ``number`` asked this program to end."""
    _received.append(number)


def is_interrupted() -> bool:
    """Return whether a signal asked this program to end."""
    return bool(_received)


def exit_status() -> int:
    """Return the exit status of an interrupted program, from the first signal that asked."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    note(number)
    # A terminal that closes, or a machine that shuts down, sends several; a second Ctrl-C still breaks off the clean-up.
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt
