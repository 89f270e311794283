"""Run a function over integers on a Dask cluster: bounded, unordered. Dask is imported only here.

A task's argument is an integer and its result is small; large data goes through files. Without workers, the function runs
in this process, in order.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ich_prep.errors import BuildError
from ich_prep.versions import PACKAGE, all_versions

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")

IN_FLIGHT_PER_WORKER = 3
# Each task allocates and frees arrays of a megabyte: keep glibc from returning their pages to the kernel each time.
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "268435456", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
# By default Dask profiles itself and checks its memory 160 times a second in every process: too much for half-second tasks.
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.worker.memory.monitor-interval": "1s",
}
FOR_THE_DRIVER = (signal.SIGINT, signal.SIGHUP)
SECONDS_BETWEEN_KILLS = 0.2
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Tasks reuse buffers, and pydicom has process-wide settings: one task at a time in a process.
_TASK_LOCK = threading.Lock()


def run(
    task: Callable[[int], T], keys: Sequence[int], *, workers: int, scheduler: str | None = None
) -> Iterator[tuple[int, T]]:
    """Yield ``(key, task(key))`` for each of ``keys``, in order of completion; see ``Pool``."""
    with Pool(workers=workers, scheduler=scheduler) as pool:
        yield from pool.map(task, keys)


def default_workers() -> int:
    """Return the number of cores that this process may use, by its CPU affinity and its container's quota."""
    from dask.system import cpu_count

    return int(cpu_count())


@dataclass
class Pool:
    """Workers to run tasks on: ``workers`` local processes, or those of the Dask ``scheduler`` at that address.

    With ``workers`` 0 and no scheduler every task runs in this process. Local processes listen on the loopback
    interface only. They start in the background as soon as the pool is opened; the first ``map`` waits for them. All
    workers load ``modules``. A worker runs one task at a time, however many threads it has.
    """

    workers: int
    scheduler: str | None = None
    modules: tuple[str, ...] = ()
    _client: Client | None = None
    _close: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _starting: threading.Thread | None = None
    _failure: BaseException | None = None
    _nannies: list[Any] = field(default_factory=list)

    def __enter__(self) -> Pool:
        if self.workers > 0 or self.scheduler:
            self._starting = threading.Thread(target=self._start, name="start-cluster")
            self._starting.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._starting is not None:
            while kind is not None and not issubclass(kind, Exception) and self._starting.is_alive():
                self._kill_workers()  # interrupted: not after many of them have loaded their libraries
                self._starting.join(SECONDS_BETWEEN_KILLS)
            self._starting.join()
        self._close.close()

    def wait_until_started(self) -> int:
        """Wait until every worker has started; return how many there are (1 if tasks run in this process).

        0 if the ``scheduler`` has none yet. Raises ``BuildError`` if workers do not start, or no scheduler answers.
        """
        if self._starting is None:
            return 1
        self._starting.join()
        if self._failure is not None:
            raise self._failure
        assert self._client is not None
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    def check_workers(self, *folders: Path, say: Callable[[str], None]) -> None:
        """Wait for a worker of the ``scheduler``, and check that its workers can work on ``folders``.

        ``say`` reports if there is none yet. Raises ``BuildError`` if the scheduler or a worker cannot load what it is
        sent, has another version of this package or of a library, or does not see one of the folders. Local workers
        need no check.
        """
        count = self.wait_until_started()
        if self._client is None or not self.scheduler:
            return
        if not count:
            say(f"The scheduler {self.scheduler} has no workers yet: waiting for the first.")
        try:
            self._client.submit(_load, self.modules, pure=False).result()  # an adaptive cluster starts a worker
            versions = self._client.run(_load, self.modules)
        except Exception as error:  # unpickling can raise any exception
            raise BuildError(
                f"The scheduler at {self.scheduler} and its workers cannot load this package ({type(error).__name__}: "
                f"{error}). Install the version that is installed here, {all_versions()[PACKAGE]}."
            ) from error
        for worker, installed in versions.items():
            for name, here in all_versions().items():
                if installed.get(name) != here:
                    raise BuildError(
                        f"{worker} of {self.scheduler} has {name} {installed.get(name)}, this machine has {here}: "
                        "different versions can produce different bytes. Install the same version on both."
                    )
        for worker, missing in self._client.run(_missing, folders).items():
            if missing:
                raise BuildError(
                    f"{worker} of {self.scheduler} does not see {missing[0]}: every worker must see the sources, the "
                    "dataset and its working folder under the same paths. Mount it there, or omit --scheduler to use "
                    "this machine."
                )

    def map(self, task: Callable[[int], T], keys: Sequence[int]) -> Iterator[tuple[int, T]]:
        """Yield ``(key, task(key))`` as tasks finish; at most a few tasks per worker are in flight at a time.

        Exceptions of ``task`` are raised here. Raises ``BuildError`` if a task repeatedly kills its worker, or the
        scheduler is lost.
        """
        workers = max(1, self.wait_until_started())
        if self._client is None:
            for key in keys:
                yield key, _one_at_a_time(task, key)
            return
        from distributed import CancelledError, KilledWorker, as_completed

        client = self._client
        pending = iter(keys)
        # A scheduler treats equal keys as one task, even from two clients: another build's must differ.
        prefix = f"{_name(task)}-{uuid.uuid4().hex}"

        def submit(key: int) -> Any:
            return client.submit(_one_at_a_time, task, key, pure=False, key=f"{prefix}-{key}")

        names: dict[str, int] = {}
        first = [submit(key) for key in islice(pending, IN_FLIGHT_PER_WORKER * workers)]
        names.update({future.key: int(future.key.rsplit("-", 1)[1]) for future in first})
        futures = as_completed(first, loop=client.loop)
        try:
            for future in futures:
                key = names.pop(future.key)
                try:
                    result = future.result()
                except KilledWorker:
                    # Dask blames every task assigned to the worker, including those that were only queued.
                    suspects = ", ".join(map(str, sorted([key, *names.values()])))
                    raise BuildError(
                        f"A worker was killed four times while running one of these tasks of {_name(task)}: {suspects}. If "
                        "the kernel log shows that memory ran out, use fewer --workers. To see the failure itself, "
                        "run the same command with --workers 0; finished work is kept."
                    ) from None
                except CancelledError as error:
                    raise BuildError(
                        f"The Dask scheduler was lost while {_name(task)} {key} ran ({error}). Finished work is kept: "
                        "start the scheduler, then run the same command again."
                    ) from None
                future.release()
                for next_key in islice(pending, 1):
                    submitted = submit(next_key)
                    names[submitted.key] = next_key
                    futures.add(submitted)
                yield key, result
        finally:
            for future in list(futures.futures):
                future.cancel()

    def _kill_workers(self) -> None:
        for nanny in self._nannies:
            process = nanny.pid  # asked of Dask: to look among the children of this process would reap them
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def _start(self) -> None:
        try:
            # The signals of a terminal go to all its processes. Workers, which inherit this thread's mask even before
            # they can set a handler, leave them to the driver. So does the tracker of multiprocessing, whose start unblocks
            # SIGINT in this thread.
            signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_DRIVER)
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_DRIVER)
            self._connect()
        except BaseException as error:
            self._failure = error

    def _connect(self) -> None:
        import dask
        from distributed import Client, LocalCluster

        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        if self.scheduler:
            try:
                self._client = Client(self.scheduler, timeout="10s", set_as_default=False)
            except (OSError, ValueError) as error:
                raise BuildError(
                    f"No Dask scheduler answers at {self.scheduler} ({error}). Start one, or omit --scheduler to use "
                    "this machine's cores."
                ) from None
            self._close.callback(self._client.close)
            return
        environment = {**MALLOC_ENVIRONMENT, **ONE_THREAD}
        ended: list[int] = []
        try:
            with dask.config.set({"distributed.nanny.pre-spawn-environ": environment, **QUIET}):
                cluster = self._close.enter_context(
                    LocalCluster(
                        n_workers=self.workers,
                        threads_per_worker=1,
                        processes=True,
                        worker_class=_nanny(self._nannies, ended),
                        host="127.0.0.1",
                        dashboard_address="127.0.0.1:0",  # any free port, so that two builds can run on one machine
                        silence_logs=logging.CRITICAL,
                        preload=[__name__],
                    )
                )
        except RuntimeError as error:
            killed = next((-code for code in ended if code < 0), None)
            if killed is not None:
                raise BuildError(
                    f"A worker process was killed by {signal.Signals(killed).name} while it started. If the kernel log "
                    "shows that memory ran out, use fewer --workers; then run the same command again."
                ) from error
            raise BuildError(
                f"The {self.workers} worker processes did not start ({error}). In your own script, call this under "
                "`if __name__ == '__main__':`, because each worker imports the script; or use workers=0."
            ) from error
        self._client = Client(cluster, set_as_default=False)
        self._close.callback(self._client.close)
        self._client.run(_load, self.modules)


def dask_setup(_: object) -> None:
    """Ignore what the driver handles: called in each local worker as it starts, since the terminal signals all."""
    for number in FOR_THE_DRIVER:
        signal.signal(number, signal.SIG_IGN)


def _nanny(started: list[Any], ended: list[int]) -> Any:
    """Return Dask's class for what starts a worker, which also appends itself to ``started`` and exit codes to ``ended``."""
    from distributed import Nanny

    class RecordingNanny(Nanny):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

        def _on_worker_exit_sync(self, exitcode: int) -> None:
            ended.append(exitcode)
            super()._on_worker_exit_sync(exitcode)

    return RecordingNanny


def _one_at_a_time(task: Callable[[int], T], key: int) -> T:
    """Return ``task(key)``, run while no other task runs in this process."""
    with _TASK_LOCK:
        return task(key)


def _missing(paths: tuple[Path, ...]) -> list[Path]:
    """Return those of ``paths``, folders and archives, that this process does not see."""
    return [path for path in paths if not path.exists()]


def _load(modules: tuple[str, ...]) -> dict[str, str | None]:
    """Import ``modules``, check that the compiled library loads, and return the versions of this package and others."""
    from ich_prep.dataset.native import require

    require()
    for name in modules:
        importlib.import_module(name)
    return all_versions()


def _name(task: Callable[[int], object]) -> str:
    function = getattr(task, "func", task)
    return str(getattr(function, "__name__", "task"))
