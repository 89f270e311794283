"""Datasets whose reads take long, or are interrupted."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from ich_prep.dataset.dataset import Dataset


def interrupt_at_read(dataset: Dataset, number: int) -> None:
    """Make this process receive a Ctrl-C during the read of so many batches."""
    read, reads = dataset.read, iter(range(10**6))

    def counted(*given: Any, **named: Any) -> Any:
        if next(reads) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return read(*given, **named)

    dataset.read = counted  # type: ignore[method-assign]


def slow_down(dataset: Dataset, seconds: float) -> None:
    """Let each read take so much longer."""
    read = dataset.read

    def slowly(*given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return read(*given, **named)

    dataset.read = slowly  # type: ignore[method-assign]
