"""The signals that end a program: Ctrl-C (SIGINT), SIGTERM and SIGHUP all interrupt it the same way.

Each raises ``KeyboardInterrupt`` in the main thread, so that one path cleans up and says how to resume. The exit status is
what a shell reports of a process that the signal ended: 128 and the signal's number.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []


@contextmanager
def interrupting() -> Iterator[None]:
    """Let each of ``ENDING`` interrupt this program; one that its parent ignores, as nohup does SIGHUP, stays ignored."""
    _received.clear()
    before = {number: signal.signal(number, _interrupt) for number in heeded()}
    try:
        yield
    finally:
        # After a signal the process is about to end, and another one must not end it with another status.
        for number, handler in before.items() if not _received else ():
            signal.signal(number, handler)


def heeded() -> tuple[signal.Signals, ...]:
    """Return those of ``ENDING`` that this process does not ignore."""
    return tuple(number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN)


def note(number: int) -> None:
    """Record that signal ``number`` asked this program to end."""
    _received.append(number)


def is_interrupted() -> bool:
    """Return whether a signal asked this program to end."""
    return bool(_received)


def settle() -> None:
    """Take the signals so far as the ordinary end of what they ended, such as Ctrl-C for a server."""
    _received.clear()


def exit_status() -> int:
    """Return the exit status of an interrupted program, from the first signal that asked."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A terminal that closes, or a machine that shuts down, sends several; a second Ctrl-C still breaks off the clean-up.
    # The handler stays: Python reports a signal that is ignored after it arrived.
    if _received and number != signal.SIGINT:
        return
    note(number)
    raise KeyboardInterrupt
