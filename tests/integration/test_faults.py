"""Every command under failing system calls, on a full and a read-only file system, and with few descriptors.

A command that fails says why in one message and leaves no torn file; what it names as the next step then ends with the
files of a command that never failed.
"""

from __future__ import annotations

import errno
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import Command, Inputs, commands, files_of, readers
from tests.support.faults import Fault, Programs, programs

FORKED: list[str] = ["synth", "build", "overwrite", "scan", "report", "quarantine", "export nifti", "export png"]
FORKED += ["export npy", "view", "clean", "run", "resume", "cv", "eval", "eval again", "compare", "predict", "embed"]
FORKED += ["explain"]
QUICK = ("synth", "build", "overwrite", "scan", "export npy", "view", "run", "predict", "embed", "explain")
DESCRIPTORS = 24
KINDS = {
    "full": (errno.ENOSPC, False, True),
    "no space": (errno.ENOSPC, False, False),
    "write error": (errno.EIO, False, False),
    "read error": (errno.EIO, True, False),
}


def fault_of(kind: str, inputs: Inputs, out: Path, at: int) -> Fault:
    error, reads, lasting = KINDS[kind]
    return Fault(inputs.src.parent if reads else out, at, error, reads, lasting)


def check_recovery(server: Programs, command: Command, out: Path, expected: dict[str, str], *context: object) -> None:
    """Nothing half-written has a name of its own, and the next step gives what a command gives that never failed."""
    torn = [path.name for path in out.rglob(".*") if len(path.name) > 32]
    assert not torn, (torn, *context)
    resumed = server.run(*command.resumed)
    assert resumed.status == 0, (resumed.output, *context)
    found = files_of(out)
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert not different, (different, *context)


def attack(server: Programs, inputs: Inputs, out: Path, name: str, kind: str, *, tries: int, seed: int) -> int:
    """Let calls fail, drawn by ``seed``; return how many did."""
    command = commands(inputs, out)[name]
    command.prepare(out)
    whole = server.run(*command.words, fault=fault_of(kind, inputs, out, 0))
    assert whole.status == 0, whole.output
    expected = files_of(out)
    calls = random.Random(f"{seed} {name} {kind}").sample(range(1, whole.calls + 1), min(tries, whole.calls))
    for at in calls:
        command.prepare(out)
        ended = server.run(*command.words, fault=fault_of(kind, inputs, out, at))
        context = (name, kind, at, ended)
        ended.require_no_traceback(*context)
        assert ended.status in ((1,) if kind == "full" else (0, 1)), context
        if ended.status == 0:
            assert files_of(out) == expected or kind == "read error", context  # of a source: that file is quarantined
        else:
            check_recovery(server, command, out, expected, *context)
    return len(calls)


@pytest.mark.parametrize("name", QUICK)
def test_a_full_disk_is_one_message_and_no_torn_file(
    name: str, server: Programs, inputs: Inputs, tmp_path: Path
) -> None:
    assert attack(server, inputs, tmp_path / "out", name, "full", tries=1, seed=0) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORKED)
def test_any_failing_call_is_one_message_and_no_torn_file(
    name: str, kind: str, server: Programs, inputs: Inputs, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    tries = {"build": 70, "overwrite": 60, "run": 6, "resume": 5, "cv": 3}.get(name, 8)
    attack(server, inputs, tmp_path / "out", name, kind, tries=tries, seed=seed)


@pytest.mark.parametrize("name", [name for name in FORKED if name not in ("clean", "resume", "cv", "eval again")])
def test_a_read_only_target_is_one_message(name: str, server: Programs, inputs: Inputs, tmp_path: Path) -> None:
    command = commands(inputs, tmp_path / "out")[name]
    command.prepare(tmp_path / "out")
    before = files_of(tmp_path / "out")
    ended = server.run(*command.words, fault=Fault(tmp_path / "out", 1, errno.EROFS, lasting=True))
    ended.require_no_traceback(name)
    assert ended.status == 1, ended
    assert "Read-only file system" in ended.output or "read-only" in ended.output.lower(), ended
    assert files_of(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORKED, "info", "verify", "find"])
def test_few_descriptors_are_one_message_or_enough(name: str, server: Programs, inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reader = readers(inputs).get(name)
    command = Command(reader) if reader is not None and name not in FORKED else commands(inputs, out)[name]
    command.prepare(out)
    server.run(*command.words, limits={resource.RLIMIT_NOFILE: DESCRIPTORS}).require_no_traceback(name)
    # As a process of its own, which has yet to load its libraries.
    command.prepare(out)
    started = subprocess.run(
        ["prlimit", f"--nofile={DESCRIPTORS}:", Path(sys.executable).with_name(str(command.words[0]))]
        + [*map(str, command.words[1:])],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert started.returncode in (0, 1), started
    assert "Traceback" not in started.stderr, started.stderr


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 20_000, 300_000, 1_000_000])
def test_a_full_file_system_is_one_message(free: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A real one, in memory: no library stands between."""
    mounted = tmp_path_factory.mktemp("tmpfs")
    with programs(tmpfs=mounted) as server:
        inputs = Inputs.make(tmp_path_factory.mktemp("inputs"), server)
        seen = server.seen(mounted)
        for name, command in commands(inputs, mounted / "out").items():
            if command.copies or name == "cv":
                continue
            for path in seen.iterdir():
                subprocess.run(["rm", "-r", path], check=True)
            (seen / "out").mkdir()
            with (seen / "filler").open("wb", buffering=0) as filler:
                filler.truncate(0)
                while True:
                    try:
                        filler.write(bytes(1 << 16))
                    except OSError:
                        break
                filler.truncate(max(0, filler.tell() - free))
            ended = server.run(*command.words)
            ended.require_no_traceback(name, free)
            assert ended.status in (0, 1), (name, ended)
            (seen / "filler").unlink()
            resumed = server.run(*command.resumed) if ended.status else ended
            assert resumed.status == 0, (name, ended, resumed)
