"""The processes of a training run: one alone, or those that torchrun started, each with its device."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Self

import torch
from torch import distributed

from ich_prep.errors import UsageError
from ich_prep.signals import heeded, note

AGREE_STEPS = 10  # between two agreements of the ranks on whether to stop: agreeing makes a GPU wait


@dataclass(frozen=True)
class Ranks:
    """This process, ``rank``, among the ``world_size`` that train together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``sums`` over the ranks, on each of them; ``sums`` is unchanged."""
        summed = sums.clone()
        if self.world_size > 1:
            distributed.all_reduce(summed)
        return summed

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` (n, ...) of all ranks, one after the other, on the CPU of each; n may differ."""
        if self.world_size == 1:
            return values.cpu()
        found: list[torch.Tensor | None] = [None] * self.world_size
        distributed.all_gather_object(found, values.cpu())
        return torch.cat([part for part in found if part is not None])

    def share_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank the buffers of the first, such as the running means of a batch normalisation."""
        if self.world_size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Return when all ranks have called this."""
        self.total(torch.zeros(1, device=self.device)).item()


class Stop:
    """Records a request to stop, by Ctrl-C, SIGTERM or SIGHUP on any rank; a context manager that replaces their handlers.

    A third signal acts as usual, for a run that does not reach its next step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._signals = 0
        self._before: dict[signal.Signals, signal.Handlers | Callable[..., object] | int | None] = {}

    def __enter__(self) -> Self:
        # Python allows signal handlers in the main thread only; no other thread receives a Ctrl-C.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._count) for number in heeded()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Return whether any rank was asked to stop: the same answer on all ranks, which must all call this."""
        asked = torch.tensor(float(self._signals), device=self._ranks.device)
        return self._ranks.total(asked).item() > 0

    def agreed_at(self, step: int) -> bool:
        """Return whether to stop after ``step``; several ranks agree every ``AGREE_STEPS`` steps."""
        if self._ranks.world_size == 1:
            return self._signals > 0
        return step % AGREE_STEPS == 0 and self.agreed()

    def _count(self, number: int, frame: FrameType | None) -> None:
        note(number)
        self._signals += 1
        if self._signals == 2:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun says there are, or be the only one; leave them at the end.

    The threads and connections of the group end with it, once nothing refers to a network that was distributed over it.
    ``device`` is as in `choose_device`. Raises `UsageError` as that does.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=choose_device(device))
        return
    chosen = choose_device(device, index=int(os.environ["LOCAL_RANK"]))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # DistributedDataParallel imports this module, whose functions take the group of that moment for a default argument.
    # If there is one by then, nobody can end it, and a thread of it that drops a tensor while Python exits aborts.
    importlib.import_module("torch.distributed.nn")
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(rank=distributed.get_rank(), world_size=world_size, device=chosen)
    finally:
        gc.collect()  # a network that belongs to the group, in a cycle of references
        distributed.destroy_process_group()


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which ``device``, a GPU, is the current one and computes in its own stream.

    The default stream cannot be recorded. Work already queued in the current one is waited for.
    """
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def choose_device(device: str, *, index: int = 0) -> torch.device:
    """Return the device that ``device`` names: ``auto``, ``cpu``, ``cuda``, or one like ``cuda:1``.

    ``auto`` is a GPU if there is one; a GPU without a number is number ``index``. Raises `UsageError` for a device that
    torch does not know or cannot use here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(f"cuda:{index}" if device == "cuda" else device)
        torch.empty(1, device=chosen)
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"Cannot use the device {device!r} here: {error}") from error
    return chosen
