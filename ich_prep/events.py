"""What happens in a build as lines of JSON: the log of its working folder, and ``--log-json`` on standard error.

Each line is an object with ``time`` (UTC, ISO 8601) and ``event``, one of ``EVENTS``; the other keys depend on the event
and are listed in docs/cli.md. Later versions may add events and keys.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Final, Protocol

EVENTS: Final = {
    "start": ("layout", "files", "notes", "part"),
    "message": ("text",),
    "stage": ("stage", "unit", "total", "done"),
    "task": ("stage", "task", "count", "quarantined"),
    "progress": ("stage", "unit", "done", "quarantined", "per_second", "total", "seconds_left"),
    "stage_end": ("stage", "unit", "done", "quarantined", "per_second", "seconds"),
    "planned": ("slices", "quarantined"),
    "estimate": ("slices", "processes", "bytes", "free_bytes", "seconds"),
    "end": ("part", "shards"),
    "published": ("counts", "seconds"),
    "error": ("kind", "text", "exit_code"),
    "interrupted": ("exit_code",),
}


class Log(Protocol):
    """Where a log is: a path, or a place in a bucket."""

    def read_bytes(self) -> bytes:
        """Return all of it; raises ``OSError``."""


def event_line(event: str, values: dict[str, Any]) -> str:
    """Return the line of an event with its ``values``, without a line end."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return json.dumps({"time": stamp, "event": event, **values})


def read_events(path: Log) -> Iterator[dict[str, Any]]:
    """Yield the events in the log at ``path``, none if it cannot be read; lines that are not whole are left out."""
    try:
        lines = path.read_bytes().decode(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a build that was killed
            continue
        if isinstance(event, dict):
            yield event
