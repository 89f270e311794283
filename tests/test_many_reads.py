"""Many reads in one system call: the bytes that are there, what went wrong with each, and nothing after an interrupt."""

from __future__ import annotations

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
from ich_prep.many_reads import MOST, address, read_many

FILES, BYTES = 3, 1000

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
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to read: the second is that of a machine whose system calls have other numbers, or a sandbox."""
    if request.param == "one by one":
        monkeypatch.setattr(many_reads, "_NUMBERS", None)
        monkeypatch.setattr(many_reads, "_idle", [])
    else:
        context = many_reads._context()
        if context is None:
            pytest.skip("SKIPPED: this machine lets nobody use Linux AIO")
        context.close()
    return str(request.param)


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
    wanted = [(at % FILES, at, [3]) for at in range(2 * MOST + 5)]
    found, memory = read(descriptors, wanted)
    assert found == [3] * len(wanted)
    assert memory == [[data[file, at : at + 3].tobytes()] for file, at, _ in wanted]


def test_what_goes_wrong_with_one_read_leaves_the_others_alone(
    way: str, descriptors: list[int], tmp_path: Path
) -> None:
    folder, closed = os.open(tmp_path, os.O_RDONLY), os.dup(descriptors[0])
    os.close(closed)
    try:
        wanted: Wanted = [
            (0, 0, [4]),
            (3, 0, [4]),
            (1, 5, [4]),
            (4, 0, [4]),
            (4, 0, [4]),
            (2, 996, [8]),
            (2, 5000, [8]),
        ]
        found, memory = read([*descriptors, folder, closed], wanted)
    finally:
        os.close(folder)
    assert found[0] == found[2] == 4
    assert found[1] in (-errno.EISDIR, -errno.EINVAL)
    assert found[3:] == [-errno.EBADF, -errno.EBADF, 4, 0]
    assert memory[1] == memory[3] == [b"\7" * 4]


def test_flags_reach_the_kernel(way: str, descriptors: list[int]) -> None:
    assert read(descriptors, [(0, 0, [4])], os.RWF_NOWAIT)[0] in ([4], [-errno.EAGAIN], [-errno.EOPNOTSUPP])
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
    assert len(many_reads._idle) <= 8 + 1  # they are used again


def test_a_forked_process_reads_for_itself(way: str, descriptors: list[int], data: NDArray[np.uint8]) -> None:
    read(descriptors, [(0, 0, [4])])
    child = os.fork()
    if not child:
        code = 1
        try:
            found, memory = read(descriptors, [(1, 3, [4]), (2, 9, [4])])
            code = int(found != [4, 4] or memory != [[data[1, 3:7].tobytes()], [data[2, 9:13].tobytes()]])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(descriptors, [(0, 0, [4])])[0] == [4]


@pytest.mark.parametrize("way", ["in one call"], indirect=True)
def test_after_an_interrupt_nothing_is_under_way(
    way: str, descriptors: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    call: Callable[..., int] = many_reads._Context._call
    interrupted: list[int] = []

    def interrupt(self: many_reads._Context, number: int, *values: int) -> int:
        if number == self._numbers.getevents and not interrupted:
            interrupted.append(self._handle)
            raise KeyboardInterrupt
        if number == self._numbers.destroy:
            interrupted.append(values[0])
        return call(self, number, *values)

    monkeypatch.setattr(many_reads._Context, "_call", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(descriptors, [(0, 0, [4])])
    assert interrupted[0] == interrupted[1]
    assert interrupted[0] not in [context._handle for context in many_reads._idle]
    assert read(descriptors, [(0, 0, [4])])[0] == [4]


@pytest.mark.parametrize("way", ["in one call"], indirect=True)
def test_a_call_that_a_signal_interrupts_goes_on(
    way: str, descriptors: list[int], data: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    call: Callable[..., int] = many_reads._Context._call
    signals = iter([True, True, False])

    def interrupt(self: many_reads._Context, number: int, *values: int) -> int:
        if number == self._numbers.getevents and next(signals):
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        return call(self, number, *values)

    monkeypatch.setattr(many_reads._Context, "_call", interrupt)
    assert read(descriptors, [(0, 0, [4])]) == ([4], [[data[0, :4].tobytes()]])


def test_where_the_machine_has_none_left_reads_are_made_one_by_one(
    descriptors: list[int], data: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: many_reads._Context, number: int, *values: int) -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(many_reads, "_idle", [])
    monkeypatch.setattr(many_reads._Context, "_call", refuse)
    assert read(descriptors, [(2, 1, [4])]) == ([4], [[data[2, 1:5].tobytes()]])
