"""What loaders share: epochs of batches whose content depends on the seed and the epoch alone, and a place in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from typing import Any, ClassVar, Generic, TypeVar

from ich_prep.errors import UsageError
from ich_train.feed import Arrays, Feed, Tensors

BatchT = TypeVar("BatchT")
PlanT = TypeVar("PlanT")


class EpochLoader(ABC, Generic[PlanT, BatchT]):
    """Iterates over the batches of an epoch; each full pass moves on to the next epoch.

    A subclass plans the batches of an epoch, fills the feed's buffers as one of the plans says, and makes a batch of the
    filled buffers.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ()  # attributes that decide the order

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._epoch = self._batch = 0

    @property
    @abstractmethod
    def items(self) -> int:
        """How many items an epoch visits, of all ranks together."""

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for data."""
        return self._feed.wait_seconds

    @property
    def epoch(self) -> int:
        """The epoch that is visited next, or now, from 0."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Start ``epoch`` at its first batch."""
        self._epoch, self._batch = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's position: after the batches that were taken, in the order that these settings give."""
        return {"epoch": self._epoch, "batch": self._batch, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state``; raises ``UsageError`` if it belongs to other settings, and so to another order."""
        settings = self._settings()
        different = [
            f"{name} was {state.get(name)} and is {value}"
            for name, value in settings.items()
            if state.get(name) != value
        ]
        if different:
            raise UsageError(
                f"Expected the state of a loader with the same settings; {'; '.join(different)}. Resume with the settings "
                "that the run started with."
            )
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])

    def __iter__(self) -> Iterator[BatchT]:
        batches, first = self._batches(), self._batch

        def read(arrays: Arrays, number: int) -> None:
            self._fill(arrays, batches[number])

        with closing(self._feed.run(read, range(first, len(batches)))) as filled:  # type: ignore[type-var]
            for number, tensors in enumerate(filled, start=first):
                self._batch = number + 1
                if self._batch == len(batches):
                    self._epoch, self._batch = self._epoch + 1, 0
                yield self._batch_of(tensors, batches[number])

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SETTINGS}

    @abstractmethod
    def _batches(self) -> list[PlanT]:
        """Return the plan of each batch of this epoch."""

    @abstractmethod
    def _fill(self, arrays: Arrays, plan: PlanT) -> None:
        """Read the batch of ``plan`` into the feed's buffers, on one of its threads."""

    @abstractmethod
    def _batch_of(self, tensors: Tensors, plan: PlanT) -> BatchT:
        """Return the filled buffers as a batch."""
