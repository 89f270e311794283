"""Many reads in one system call: the bytes that are there, what went wrong with each, and nothing after an interrupt."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep import many_reads
from ich_prep.many_reads import MOST_READS, address, read_many

FILES, BYTES = 3, 1000

Intercept = Callable[[Callable[..., int | None]], None]
Wanted = list[tuple[int, int, list[int]]]  # file, first byte, and the length of each part


@pytest.fixture(scope="module")
def data() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (FILES, BYTES), np.uint8)


@pytest.fixture(scope="module")
def descriptors(data: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    folder = tmp_path_factory.mktemp("files")
    opened = []
    for number, content in enumerate(data):
        (folder / str(number)).write_bytes(content)
        opened.append(os.open(folder / str(number), os.O_RDONLY))
    yield opened
    for descriptor in opened:
        os.close(descriptor)


@pytest.fixture(params=["in one call", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to read: the second is that of a machine whose system calls have other numbers, or a sandbox."""
    idle = many_reads._idle
    before = idle.copy()
    idle.clear()
    if request.param == "one by one":
        monkeypatch.setattr(many_reads, "_NUMBERS", None)
    else:
        context = many_reads._context()
        if context is None:
            pytest.skip("SKIPPED: this machine lets nobody use Linux AIO")
        idle.append(context)
    yield str(request.param)
    for context in idle:
        context.close()
    idle[:] = before


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Intercept:
    """Put a function before the system calls: what it returns is their result, or None to make the call."""
    original = many_reads._call

    def intercept(first: Callable[..., int | None]) -> None:
        def call(number: int, *values: int) -> int:
            result = first(number, *values)
            return original(number, *values) if result is None else result

        monkeypatch.setattr(many_reads, "_call", call)

    return intercept


def answer_submits(call: Intercept, *answers: int | None) -> None:
    """Answer one io_submit after the other: with an error, by taking so many only, or, None, as the kernel does."""
    numbers, original, coming = many_reads._NUMBERS, many_reads._call, iter(answers)
    assert numbers is not None

    def answer(number: int, *values: int) -> int | None:
        if number != numbers.submit:
            return None
        code = next(coming)
        return code if code is None or code < 0 else original(number, values[0], code, values[2])

    call(answer)


def read(descriptors: list[int], wanted: Wanted, flags: int = 0) -> tuple[list[int], list[list[bytes]]]:
    """Return what each read found, and what came to lie in each part, 7 where nothing did."""
    files, starts, lengths = zip(*wanted, strict=True)
    memory = [[np.full(length, 7, np.uint8) for length in some] for some in lengths]
    parts = np.array([[(address(part), part.nbytes) for part in some] for some in memory], np.int64)
    found = read_many(np.array([descriptors[file] for file in files]), np.array(starts), parts, flags=flags)
    return found.tolist(), [[part.tobytes() for part in some] for some in memory]


LENGTHS = st.lists(st.integers(1, 300), min_size=2, max_size=2)
WANTED = st.lists(st.tuples(st.integers(0, FILES - 1), st.integers(0, BYTES + 50), LENGTHS), min_size=1, max_size=40)


@given(wanted=WANTED)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_read_finds_what_its_file_has_there(
    wanted: Wanted, way: str, descriptors: list[int], data: NDArray[np.uint8]
) -> None:
    found, memory = read(descriptors, wanted)
    for (file, start, lengths), count, parts in zip(wanted, found, memory, strict=True):
        there = data[file, start : start + sum(lengths)].tobytes()
        assert count == len(there)
        assert b"".join(parts) == there + b"\7" * (sum(lengths) - len(there))


def test_more_reads_than_one_call_takes(way: str, descriptors: list[int], data: NDArray[np.uint8]) -> None:
    wanted = [(at % FILES, at, [3]) for at in range(2 * MOST_READS + 5)]
    found, memory = read(descriptors, wanted)
    assert found == [3] * len(wanted)
    assert memory == [[data[file, at : at + 3].tobytes()] for file, at, _ in wanted]


def test_what_goes_wrong_with_one_read_leaves_the_others_alone(
    way: str, descriptors: list[int], tmp_path: Path
) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        wanted = [(0, 0, [4]), (3, 0, [4]), (1, 5, [4]), (4, 0, [4]), (4, 0, [4]), (2, 996, [8]), (2, 5000, [8])]
        found, memory = read([*descriptors, folder, -1], wanted)
    finally:
        os.close(folder)
    assert found == [4, -errno.EISDIR, 4, -errno.EBADF, -errno.EBADF, 4, 0]
    assert memory[1] == memory[3] == [b"\7" * 4]


def test_flags_reach_the_kernel(way: str, descriptors: list[int]) -> None:
    assert read(descriptors, [(0, 0, [4]), (1, 0, [4])], 1 << 30)[0] == [-errno.EOPNOTSUPP] * 2


def test_many_threads(way: str, descriptors: list[int], data: NDArray[np.uint8]) -> None:
    def some(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        wanted = [(int(rng.integers(FILES)), int(rng.integers(900)), [50, 50]) for _ in range(100)]
        found, memory = read(descriptors, wanted)
        right = [data[file, at : at + 100].tobytes() for file, at, _ in wanted]
        return found == [100] * 100 and [b"".join(parts) for parts in memory] == right

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(some, range(200)))
    if way == "in one call":
        assert 1 <= len(many_reads._idle) <= 8  # they are used again


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # from Python 3.12 on
def test_a_forked_process_reads_for_itself(way: str, descriptors: list[int], data: NDArray[np.uint8]) -> None:
    read(descriptors, [(0, 0, [4])])
    child = os.fork()
    if not child:
        code = 1
        try:
            assert not many_reads._idle  # those are of the other process
            found, memory = read(descriptors, [(1, 3, [4]), (2, 9, [4])])
            code = int(found != [4, 4] or memory != [[data[1, 3:7].tobytes()], [data[2, 9:13].tobytes()]])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(descriptors, [(0, 0, [4])])[0] == [4]


ONE_CALL = pytest.mark.parametrize("way", ["in one call"], indirect=True)


@ONE_CALL
def test_after_an_interrupt_nothing_is_under_way(way: str, descriptors: list[int], call: Intercept) -> None:
    numbers = many_reads._NUMBERS
    assert numbers is not None
    handle = many_reads._idle[0]._handle
    done = []

    def interrupt(number: int, *values: int) -> None:
        if number == numbers.destroy:
            done.append(values[0])
        if number == numbers.getevents and not done:
            raise KeyboardInterrupt

    call(interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(descriptors, [(0, 0, [4])])
    assert done == [handle]
    assert not many_reads._idle
    assert read(descriptors, [(0, 0, [4])])[0] == [4]


@ONE_CALL
def test_a_wait_that_a_signal_interrupts_goes_on(
    way: str, descriptors: list[int], data: NDArray[np.uint8], call: Intercept
) -> None:
    signals = iter([True, True, False])
    call(lambda number, *_: -errno.EINTR if number == many_reads._NUMBERS.getevents and next(signals) else None)  # type: ignore[union-attr]
    assert read(descriptors, [(0, 0, [4])]) == ([4], [[data[0, :4].tobytes()]])
    assert not list(signals)


@ONE_CALL
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM, errno.EAGAIN])
def test_what_this_way_refuses_is_read_the_plain_way(
    code: int, way: str, descriptors: list[int], data: NDArray[np.uint8], call: Intercept
) -> None:
    """Some file systems know no lists of reads, and a plain read tells what is wrong where there is something."""
    answer_submits(call, 1, -code, -code, None)
    found, memory = read([*descriptors, -1], [(0, 0, [4]), (1, 1, [4]), (3, 0, [4]), (2, 2, [4])])
    assert found == [4, 4, -errno.EBADF, 4]
    assert [memory[0], memory[1], memory[3]] == [
        [data[0, :4].tobytes()],
        [data[1, 1:5].tobytes()],
        [data[2, 2:6].tobytes()],
    ]


@ONE_CALL
def test_flags_refused_on_the_way_leave_what_was_taken_before(
    way: str, descriptors: list[int], call: Intercept
) -> None:
    answer_submits(call, 1, -errno.EOPNOTSUPP)
    found, memory = read(descriptors, [(0, 0, [4]), (1, 1, [4]), (2, 2, [4])], os.RWF_NOWAIT)
    assert found[1:] == [-errno.EOPNOTSUPP] * 2
    assert found[0] in (4, -errno.EAGAIN)
    assert memory[1:] == [[b"\7" * 4]] * 2


@ONE_CALL
def test_a_read_that_a_signal_interrupts_is_made_again(
    way: str, descriptors: list[int], data: NDArray[np.uint8], call: Intercept
) -> None:
    original = many_reads._call

    def interrupt(number: int, *values: int) -> int | None:
        if number != many_reads._NUMBERS.getevents:  # type: ignore[union-attr]
            return None
        done = original(number, *values)
        events = np.ctypeslib.as_array((ctypes.c_int64 * (4 * done)).from_address(values[3])).reshape(done, 4)
        events[events[:, 0] == 1, 2] = -errno.EINTR
        return done

    call(interrupt)
    found, memory = read(descriptors, [(0, 0, [4]), (1, 1, [4])])
    assert found == [4, 4]
    assert memory == [[data[0, :4].tobytes()], [data[1, 1:5].tobytes()]]


def test_where_the_machine_has_none_left_reads_are_made_one_by_one(
    descriptors: list[int], data: NDArray[np.uint8], call: Intercept, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []
    monkeypatch.setattr(many_reads, "_idle", [])
    monkeypatch.setattr(many_reads, "_NUMBERS", many_reads._MACHINES["x86_64"])
    call(lambda *asked: refused.append(asked) or -errno.EAGAIN)
    assert read(descriptors, [(2, 1, [4])]) == ([4], [[data[2, 1:5].tobytes()]])
    assert len(refused) == 1
