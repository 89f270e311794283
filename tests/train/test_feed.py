"""The ring of buffers: in order whatever the threads do, each buffer its consumer's until the next, errors in turn."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_train.feed import Arrays, Buffer, Feed, Tensors

BUFFERS = (Buffer((3, 2), np.int16), Buffer((3,), np.int64, on_host=True))


def numbered(arrays: Arrays, number: int) -> None:
    values, index = arrays
    values[:] = number
    index[:] = number * np.arange(3)


def value_of(tensors: Tensors) -> int:
    values, index = tensors
    number = int(index[1])
    assert values.tolist() == [[number, number]] * 3
    assert index.tolist() == [0, number, 2 * number]
    return number


@given(
    threads=st.integers(1, 5),
    prefetch=st.integers(1, 9),
    numbers=st.lists(st.integers(0, 99), max_size=30),
)
@settings(max_examples=30, deadline=None)
def test_batches_come_in_order(threads: int, prefetch: int, numbers: list[int]) -> None:
    feed = Feed(BUFFERS, threads=threads, prefetch=prefetch, pin=False)

    def read(arrays: Arrays, number: int) -> None:
        time.sleep(number % 3 / 10_000)
        numbered(arrays, number)

    for _ in range(2):  # a feed runs as often as one likes
        assert [value_of(tensors) for tensors in feed.run(read, numbers)] == numbers


def test_a_buffer_is_the_consumers_until_the_next_is_taken() -> None:
    feed = Feed(BUFFERS, threads=2, prefetch=2, pin=False)
    places = set()
    for number, tensors in enumerate(feed.run(numbered, range(40))):
        time.sleep(0.001)  # the threads have nothing else to do than to fill what is free
        assert value_of(tensors) == number
        places.add(tensors[0].data_ptr())
    assert len(places) <= 2 * 3


def test_no_more_is_read_ahead_than_there_are_buffers() -> None:
    feed = Feed(BUFFERS, threads=2, prefetch=4, pin=False)
    begun: list[int] = []

    def read(arrays: Arrays, number: int) -> None:
        begun.append(number)
        numbered(arrays, number)

    batches = feed.run(read, range(100))
    next(batches)
    deadline = time.monotonic() + 20
    while len(begun) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(begun) == list(range(8)), "two rings of four buffers, all of them filled, and none twice"
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad", [0, 5, 19])
def test_an_error_is_raised_in_turn_and_ends_the_threads(bad: int) -> None:
    feed = Feed(BUFFERS, threads=3, prefetch=3, pin=False)
    before = threading.active_count()

    def read(arrays: Arrays, number: int) -> None:
        if number == bad:
            raise ValueError(f"number {number}")
        numbered(arrays, number)

    seen = []
    with pytest.raises(ValueError, match=f"number {bad}"):
        for tensors in feed.run(read, range(20)):
            seen.append(value_of(tensors))  # noqa: PERF401  # what was seen before the error counts
    assert seen == list(range(bad))
    assert threading.active_count() == before


def test_waiting_is_counted() -> None:
    feed = Feed(BUFFERS, threads=1, prefetch=1, pin=False)

    def read(arrays: Arrays, number: int) -> None:
        time.sleep(0.02)
        numbered(arrays, number)

    assert len([*feed.run(read, range(5))]) == 5
    assert feed.wait_seconds >= 5 * 0.02 * 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pinned memory is NOT tested here")
def test_buffers_for_a_gpu_are_pinned_unless_they_stay_on_the_host() -> None:
    feed = Feed(BUFFERS, threads=1, prefetch=1, pin=True)
    for values, index in feed.run(numbered, range(3)):
        assert values.is_pinned()
        assert not index.is_pinned()
