"""Run a function over integers on a Dask cluster: bounded, unordered. Dask is imported only here.

A task's argument is an integer and its result is small; large data goes through files. Without workers, the function runs
in this process, in order.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ich_prep.errors import BuildError, UsageError, describe_os_error
from ich_prep.files import read_regular
from ich_prep.versions import PACKAGE, all_versions

if TYPE_CHECKING:
    from distributed import Client

    from ich_prep.dataset.bucket_path import Place

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
SECONDS_FOR_A_FILE = 30.0
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


@dataclass(frozen=True)
class Tls:
    """The files, in PEM, with which a ``tls://`` scheduler is reached: the authority's certificate, one's own, its key."""

    ca: Path
    cert: Path
    key: Path


@dataclass
class Pool:
    """Workers to run tasks on: ``workers`` local processes, or those of the Dask ``scheduler``.

    That is its address, ``tcp://`` or, with ``tls``, ``tls://``; or the file to which it wrote its address.

    With ``workers`` 0 and no scheduler every task runs in this process. Local processes listen on the loopback
    interface only. They start in the background as soon as the pool is opened; the first ``map`` waits for them. All
    workers load ``modules``. A worker runs one task at a time, however many threads it has.
    """

    workers: int
    scheduler: str | None = None
    modules: tuple[str, ...] = ()
    tls: Tls | None = None
    _folders: tuple[Place, ...] = ()
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

    def check_workers(self, *folders: Place, say: Callable[[str], None]) -> None:
        """Wait for a worker of the ``scheduler``, and check that its workers can work on ``folders``.

        ``say`` reports if there is none yet. Raises ``BuildError`` if the scheduler or a worker cannot load what it is
        sent, has another version of this package or of a library, or does not see one of the folders. Local workers
        need no check.
        """
        count = self.wait_until_started()
        if self._client is None:
            return
        # Without bokeh a local dashboard shows nothing; what a scheduler elsewhere has installed is not known here.
        if self._client.dashboard_link and (self.scheduler or find_spec("bokeh")):
            say(f"Dashboard: {self._client.dashboard_link}")
        if not self.scheduler:
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
                raise BuildError(_unseen(f"{worker} of {self.scheduler}", missing[0]))
        self._folders = folders

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

        # A worker may join later, from a host that nobody has checked.
        run = (
            partial(_on_checked_host, tuple(all_versions().items()), self._folders) if self._folders else _one_at_a_time
        )

        def submit(key: int) -> Any:
            return client.submit(run, task, key, pure=False, key=f"{prefix}-{key}")

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
            address = _address(self.scheduler)
            security = _security(address, self.tls)
            try:
                self._client = Client(address, timeout="10s", set_as_default=False, security=security)
            except (OSError, ValueError) as error:
                encrypted = "" if address.startswith("tls:") else ", with tls:// if it is encrypted"
                raise BuildError(
                    f"No Dask scheduler answers at {address} ({error}). Start one{encrypted}, or omit --scheduler to use "
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


def _on_checked_host(
    versions: tuple[tuple[str, str | None], ...], folders: tuple[Place, ...], task: Callable[[int], T], key: int
) -> T:
    """Return ``task(key)``, once it is clear that this process has the ``versions`` and sees the ``folders``."""
    _check_host(versions, folders)
    return _one_at_a_time(task, key)


@cache
def _check_host(versions: tuple[tuple[str, str | None], ...], folders: tuple[Place, ...]) -> None:
    here = all_versions()
    for name, driver in versions:
        if here.get(name) != driver:
            raise BuildError(
                f"A worker on {socket.gethostname()} has {name} {here.get(name)}, the build {driver}: different versions "
                "can produce different bytes. Install the same version on both. Finished work is kept."
            )
    for path in _missing(folders):
        raise BuildError(_unseen(f"A worker on {socket.gethostname()}", path))


def _unseen(worker: str, path: Place) -> str:
    return (
        f"{worker} does not see {path}: every worker must see the sources, the dataset and its working folder under the "
        "same paths. Mount it there, or omit --scheduler to use this machine."
    )


def _address(given: str) -> str:
    """Return the address of a scheduler: ``given``, or the one in the file of that name; raises ``BuildError``."""
    if "://" in given or not (given.endswith(".json") or Path(given).exists()):
        return given
    deadline = time.monotonic() + SECONDS_FOR_A_FILE  # a scheduler that is starting has yet to write it
    while not Path(given).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        return str(json.loads(read_regular(Path(given), limit=1 << 20))["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = describe_os_error(error) if isinstance(error, OSError) else "it is no such file"
        raise BuildError(
            f"Expected the scheduler file of a Dask scheduler (`dask scheduler --scheduler-file FILE`) at {given}; {what}."
        ) from None


def _security(address: str, tls: Tls | None) -> Any:
    """Return Dask's object for the files of ``tls``, None without them; raises ``UsageError`` and ``BuildError``."""
    if tls is None:
        return None
    if not address.startswith("tls://"):
        raise UsageError(f"--tls-ca, --tls-cert and --tls-key are for a scheduler at tls://; this one is at {address}.")
    from distributed import Security

    for path in (tls.ca, tls.cert, tls.key):
        try:
            read_regular(path, limit=1 << 20)
        except OSError as error:
            raise BuildError(f"Cannot read a file for TLS: {describe_os_error(error)}.") from None
    return Security(
        tls_ca_file=str(tls.ca), tls_client_cert=str(tls.cert), tls_client_key=str(tls.key), require_encryption=True
    )


def _missing(paths: tuple[Place, ...]) -> list[Place]:
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
