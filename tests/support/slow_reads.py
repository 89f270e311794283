"""Slow and interrupted reads of a dataset."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from ich_prep.dataset.dataset import Dataset


def interrupt_at_read(dataset: Dataset, number: int) -> None:
    """Make this process receive SIGINT (Ctrl-C) during the read of batch ``number``, counted from 0."""
    read, reads = dataset.read, iter(range(10**6))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(reads) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return read(*args, **kwargs)

    dataset.read = interrupted  # type: ignore[method-assign]


def slow_down(dataset: Dataset, seconds: float) -> None:
    """Make each read take ``seconds`` longer."""
    read = dataset.read

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return read(*args, **kwargs)

    dataset.read = slow  # type: ignore[method-assign]
