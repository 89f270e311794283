"""Locks and leases: real processes race for them, die with them, and lose them."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ich_prep.dataset import file_lease, lease_owner, lock
from ich_prep.dataset.lock import HeldError, locked
from ich_prep.errors import BuildError

NO_FLOCK = OSError(38, "Function not implemented")
RACER = """
import fcntl, sys
from pathlib import Path
from ich_prep.dataset.lock import HeldError, locked
def refused(*_): raise OSError(38, "Function not implemented")
fcntl.flock = refused
folder, turns = Path(sys.argv[1]), 0
while turns < 20:
    try:
        with locked(folder, folder / "lease", say=lambda _: None):
            (folder / "inside").touch(exist_ok=False)  # raises where two are inside
            (folder / "inside").unlink()
            turns += 1
    except HeldError:
        pass
print(turns)
"""


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise NO_FLOCK

    monkeypatch.setattr(fcntl, "flock", refused)


def hold(folder: Path, said: list[str] | None = None) -> AbstractContextManager[None]:
    return locked(folder, folder / "lease", say=(said if said is not None else []).append)


def test_a_lock_is_exclusive_and_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with hold(tmp_path, said), pytest.raises(HeldError), hold(tmp_path):
        pass
    with hold(tmp_path):
        pass
    assert not said
    assert not [*tmp_path.iterdir()]


def test_a_lease_is_exclusive_says_so_and_leaves_nothing(tmp_path: Path, no_flock: None) -> None:
    said: list[str] = []
    with hold(tmp_path, said):
        assert json.loads((tmp_path / "lease").read_bytes())["process"] == os.getpid()
        with pytest.raises(HeldError, match=f"process {os.getpid()} on "), hold(tmp_path):
            pass
    assert ["has no locks" in text for text in said] == [True]
    assert not [*tmp_path.iterdir()]


def test_never_are_two_processes_inside(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    answers = [racer.communicate(timeout=100) for racer in racers]
    assert not any(racer.returncode for racer in racers), answers
    assert [int(turns) for turns, _ in answers] == [20] * 4


def lease_of(process: subprocess.Popen[bytes], path: Path, **changes: object) -> None:
    owner = {"host": "elsewhere", "space": lease_owner.space_here(), "process": process.pid,
             "started": lease_owner.started(process.pid), "id": "1" * 32}  # fmt: skip
    path.write_text(json.dumps({**owner, **changes}))


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "300"])
    yield process
    process.kill()
    process.wait()


def test_only_a_lease_whose_owner_is_certainly_gone_is_broken(
    tmp_path: Path, no_flock: None, sleeper: subprocess.Popen[bytes]
) -> None:
    path = tmp_path / "lease"
    long_ago = time.time() - lease_owner.STALE_SECONDS - 60
    lease_of(sleeper, path)  # it runs here
    with pytest.raises(HeldError), hold(tmp_path):
        pass
    lease_of(sleeper, path, space="another machine")  # it may run there
    with pytest.raises(HeldError), hold(tmp_path):
        pass
    os.utime(path, (long_ago, long_ago))  # it no longer refreshes
    with hold(tmp_path):
        pass
    lease_of(sleeper, path, started="1")  # another process with its number
    with hold(tmp_path):
        pass
    lease_of(sleeper, path)
    sleeper.kill()
    sleeper.wait()
    with hold(tmp_path):
        pass
    path.write_bytes(b"")  # such as on a file system without links, of a process that was killed before it wrote
    with pytest.raises(HeldError), hold(tmp_path):
        pass
    os.utime(path, (long_ago, long_ago))
    with hold(tmp_path):
        pass
    lease_of(sleeper, path, started="1")
    lease_of(sleeper, file_lease.breaking(path), started="1")  # killed while it broke a lease
    with hold(tmp_path):
        pass
    assert not [*tmp_path.iterdir()]


def test_a_lease_is_refreshed(tmp_path: Path, no_flock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.01)
    with hold(tmp_path):
        os.utime(tmp_path / "lease", (1, 1))
        deadline = time.monotonic() + 30
        while (tmp_path / "lease").stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not [*tmp_path.iterdir()]


def test_who_lost_its_lease_stops(
    tmp_path: Path, no_flock: None, monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.05)
    with pytest.raises(BuildError, match=f"process {sleeper.pid} on elsewhere took over its lease"), hold(tmp_path):
        lease_of(sleeper, tmp_path / "taken")
        (tmp_path / "taken").replace(tmp_path / "lease")
        for _ in range(3000):  # an interrupt by another thread does not end a sleep
            time.sleep(0.01)
    assert (tmp_path / "lease").exists()  # of the other one


def test_where_there_are_locks_a_lease_of_another_host_still_counts(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    lease_of(sleeper, tmp_path / "lease", space="another machine")
    with pytest.raises(HeldError), hold(tmp_path):
        pass
    (tmp_path / "lease").unlink()
    with hold(tmp_path):
        pass
