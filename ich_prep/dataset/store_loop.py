"""One thread of a process with an event loop, in which all requests to object stores run; callers wait in any thread."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

IN_FLIGHT = 64  # requests of one process at a time

_Result = TypeVar("_Result")


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.slots = asyncio.Semaphore(IN_FLIGHT)
        threading.Thread(target=self.loop.run_forever, name="stores", daemon=True).start()


_starting = threading.Lock()
_running: list[_Loop] = []


def start_work(work: Coroutine[Any, Any, _Result]) -> Future[_Result]:
    """Return what will have the result of ``work``, which the event loop runs."""
    with _starting:
        if not _running or _running[0].process != os.getpid():
            _running[:] = [_Loop()]
    return asyncio.run_coroutine_threadsafe(work, _running[0].loop)


def run(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return what ``work`` returns, run by the event loop; Ctrl-C ends the waiting and the work."""
    future = start_work(work)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def slots() -> asyncio.Semaphore:
    """Return what limits the requests of this process, for work that ``run`` runs."""
    return _running[0].slots


async def gathered(work: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """Return the results of all ``work``, done at the same time; the first failure ends the rest."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
