"""A function over integers: the same serial and on workers, bounded, through crashes, on the loopback only."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from distributed import LocalCluster

from ich_prep.errors import BuildError, Reason, SliceError
from ich_prep.execute import IN_FLIGHT_PER_WORKER, Pool, default_workers, run


def square(number: int) -> int:
    return number * number


def shift(by: int, number: int) -> int:
    return number + by


def where(_: int) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("MALLOC_MMAP_THRESHOLD_")


def refuse(number: int) -> int:
    if number == 3:
        raise SliceError(Reason.TRUNCATED, f"task {number}")
    return number


def note(folder: str, number: int) -> int:
    (Path(folder) / f"{number}").touch()
    return number


def alone(folder: str, number: int) -> int:
    """Return how many tasks run in this process, including this one, after a while."""
    mark = Path(folder) / f"{os.getpid()}-{threading.get_ident()}"
    mark.touch()
    time.sleep(0.02)
    found = len(list(mark.parent.glob(f"{os.getpid()}-*")))
    mark.unlink()
    return found


def die_once(folder: str, number: int) -> int:
    mark = Path(folder) / f"{number}"
    if number == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_always(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(workers=2) as workers:
        workers.wait_until_started()
        yield workers


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a cluster started elsewhere."""
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp://", dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster.scheduler_address


def test_no_workers_run_in_this_process_in_order() -> None:
    assert list(run(square, range(4), workers=0)) == [(0, 0), (1, 1), (2, 4), (3, 9)]
    assert next(run(where, [0], workers=0))[1][0] == os.getpid()
    with Pool(workers=0) as pool:
        assert pool.wait_until_started() == 1


def test_without_workers_a_task_starts_when_its_result_is_requested(tmp_path: Path) -> None:
    results = run(partial(note, str(tmp_path)), range(5), workers=0)
    next(results)
    assert len(list(tmp_path.iterdir())) == 1


def test_workers_give_the_same_as_none(pool: Pool) -> None:
    assert pool.wait_until_started() == 2
    for task in (square, partial(shift, 7)):
        assert dict(pool.map(task, range(30))) == dict(run(task, range(30), workers=0))


def test_one_task_after_the_other_may_have_the_same_function_and_keys(pool: Pool) -> None:
    assert dict(pool.map(partial(shift, 1), range(5))) == {number: number + 1 for number in range(5)}
    assert dict(pool.map(partial(shift, 2), range(5))) == {number: number + 2 for number in range(5)}


def test_no_tasks_are_done_at_once(pool: Pool) -> None:
    assert list(pool.map(square, [])) == []


def test_tasks_run_in_other_processes_with_a_patient_allocator(pool: Pool) -> None:
    found = dict(pool.map(where, range(8))).values()
    assert os.getpid() not in {process for process, _ in found}
    assert {threshold for _, threshold in found} == {"268435456"}


def test_only_a_few_tasks_are_in_flight(pool: Pool, tmp_path: Path) -> None:
    """While no results are taken, no more tasks start than may be in flight."""
    results = pool.map(partial(note, str(tmp_path)), range(200))
    next(results)
    threading.Event().wait(0.5)
    assert len(list(tmp_path.iterdir())) <= 2 * IN_FLIGHT_PER_WORKER + 1
    assert len(list(results)) == 199


def test_what_a_task_raises_is_raised_here(pool: Pool) -> None:
    with pytest.raises(SliceError, match="task 3") as raised:
        dict(pool.map(refuse, range(50)))
    assert raised.value.reason is Reason.TRUNCATED
    assert dict(pool.map(square, range(3))) == {0: 0, 1: 1, 2: 4}  # the workers still exist


def test_a_worker_that_is_killed_costs_nothing(pool: Pool, tmp_path: Path) -> None:
    assert dict(pool.map(partial(die_once, str(tmp_path)), range(10))) == {number: number for number in range(10)}


def test_a_task_that_always_kills_its_worker_is_named() -> None:
    with Pool(workers=1) as pool, pytest.raises(BuildError, match=r"tasks of die_always: (\d, )*2[,.]"):
        dict(pool.map(die_always, range(4)))


def test_nothing_listens_beyond_the_loopback(pool: Pool) -> None:
    dict(pool.map(square, range(4)))
    here = psutil.Process()
    listening = [
        connection.laddr.ip
        for process in (here, *here.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) == {"127.0.0.1"}


def test_workers_end_with_the_pool() -> None:
    with Pool(workers=1) as pool:
        (process,) = {found for found, _ in dict(pool.map(where, range(2))).values()}
        assert psutil.pid_exists(process)
    gone, alive = psutil.wait_procs([psutil.Process(process)] if psutil.pid_exists(process) else [], timeout=10)
    assert not alive, gone


def test_an_existing_scheduler_is_used_and_left_running(scheduler: str) -> None:
    for _ in range(2):
        with Pool(workers=0, scheduler=scheduler) as guest:
            assert guest.wait_until_started() == 2
            assert dict(guest.map(square, range(5))) == {number: number * number for number in range(5)}


def test_two_builds_on_one_scheduler_keep_their_results_apart(scheduler: str) -> None:
    with Pool(workers=0, scheduler=scheduler) as first, Pool(workers=0, scheduler=scheduler) as second:
        one, other = first.map(partial(shift, 100), range(20)), second.map(partial(shift, 200), range(20))
        pairs = list(zip(one, other, strict=True))
    assert dict(done for done, _ in pairs) == {number: number + 100 for number in range(20)}
    assert dict(done for _, done in pairs) == {number: number + 200 for number in range(20)}


def test_threads_of_one_worker_take_turns(tmp_path: Path) -> None:
    """What a task keeps in its process, above all a decoder's buffers, must not be used by two at a time."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=4, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Pool(workers=0, scheduler=cluster.scheduler_address) as guest,
    ):
        assert set(dict(guest.map(partial(alone, str(tmp_path)), range(8))).values()) == {1}


def test_a_folder_that_a_worker_does_not_see_is_named(scheduler: str, tmp_path: Path) -> None:
    with Pool(workers=0, scheduler=scheduler) as guest:
        guest.check_workers(tmp_path, say=str)
        with pytest.raises(BuildError, match=r"does not see .*elsewhere"):
            guest.check_workers(tmp_path, tmp_path / "elsewhere", say=str)


def test_a_worker_that_joins_later_is_checked_by_its_first_task(scheduler: str, tmp_path: Path) -> None:
    folder = tmp_path / "seen"
    folder.mkdir()
    reported: list[str] = []
    with Pool(workers=0, scheduler=scheduler) as guest:
        guest.check_workers(folder, say=reported.append)
        folder.rmdir()  # as if the tasks ran on a host without it
        with pytest.raises(BuildError, match=r"worker on .* does not see .*seen"):
            dict(guest.map(square, range(3)))
        folder.mkdir()
        assert dict(guest.map(square, range(3))) == {0: 0, 1: 1, 2: 4}
    assert [text.split(":")[0] for text in reported] == ["Dashboard"]


def test_a_worker_that_cannot_load_what_it_is_sent_is_refused(scheduler: str) -> None:
    with (
        Pool(workers=0, scheduler=scheduler, modules=("ich_prep.nothing",)) as guest,
        pytest.raises(BuildError, match=rf"{scheduler} and its workers cannot load this package.*ich_prep\.nothing"),
    ):
        guest.check_workers(say=str)


def test_a_worker_of_another_version_is_refused(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(workers=0, scheduler=scheduler) as guest:
        guest.wait_until_started()
        # The workers of this cluster are threads of this process: each reports its version once; here it is read last.
        versions = iter([{"ich": "0.1", "numpy": "0.0"}] * 3)
        monkeypatch.setattr("ich_prep.execute.all_versions", lambda: next(versions, {"ich": "0.1", "numpy": "9.9"}))
        with pytest.raises(BuildError, match=r"has numpy 0\.0, this machine has 9\.9"):
            guest.check_workers(say=str)


def test_a_scheduler_without_workers_is_waited_for() -> None:
    reported: list[str] = []
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Pool(workers=0, scheduler=cluster.scheduler_address) as guest,
    ):
        assert guest.wait_until_started() == 0

        def start_one(text: str) -> None:
            if "no workers" in text:
                reported.append(text)
                cluster.scale(1)

        guest.check_workers(say=start_one)
        assert guest.wait_until_started() == 1
        assert dict(guest.map(square, range(4))) == {0: 0, 1: 1, 2: 4, 3: 9}
    assert reported == [f"The scheduler {cluster.scheduler_address} has no workers yet: waiting for the first."]


def test_a_scheduler_that_is_lost_is_named(tmp_path: Path) -> None:
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, protocol="tcp://", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Pool(workers=0, scheduler=cluster.scheduler_address) as guest,
    ):
        results = guest.map(partial(alone, str(tmp_path)), range(200))
        next(results)
        cluster.close()
        with pytest.raises(BuildError, match=r"scheduler was lost while alone \d+ ran"):
            list(results)


@pytest.mark.parametrize("address", [pytest.param("tcp://127.0.0.1:9", marks=pytest.mark.slow), "nowhere://there"])
def test_a_scheduler_that_does_not_answer_is_named(address: str) -> None:
    with Pool(workers=0, scheduler=address) as pool, pytest.raises(BuildError, match=address):
        pool.wait_until_started()


def test_the_default_is_the_cores_that_this_process_may_use() -> None:
    assert 1 <= default_workers() <= len(os.sched_getaffinity(0))  # fewer if a container has a quota
