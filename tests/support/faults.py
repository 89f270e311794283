"""Programs under failing system calls: a library that is loaded before the C library, and a server that forks commands.

The library counts the calls that change (or read) files below a folder, and lets the n-th fail, or all from the n-th on.
The server has imported both programs, so a command costs a fork and not the start of a process: thousands can be tried.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import mmap
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import pytest

from tests.support.preload import compiled

LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

struct control { long at, count; int error, reads, lasting, unused; char below[480]; };
static struct control *control;

__attribute__((constructor)) static void map_control(void) {
    const char *path = getenv("FAULTS");
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int descriptor = path ? real(path, O_RDWR | O_CLOEXEC) : -1;
    if (descriptor < 0) return;
    void *found = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (found != MAP_FAILED) control = found;
    close(descriptor);
}

static int strikes(int reads) {
    if (reads != control->reads) return 0;
    long number = __sync_add_and_fetch(&control->count, 1);
    if (!control->at || (control->lasting ? number < control->at : number != control->at)) return 0;
    errno = control->error;
    return 1;
}

static int fails(int folder, const char *path, int reads) {
    char whole[4096];
    if (!control || !control->below[0]) return 0;
    if (path[0] != '/' && folder == AT_FDCWD) {
        if (!getcwd(whole, sizeof whole - 1)) return 0;
        size_t length = strlen(whole);
        snprintf(whole + length, sizeof whole - length, "/%s", path);
        path = whole;
    }
    return strncmp(path, control->below, strlen(control->below)) ? 0 : strikes(reads);
}

static int fails_fd(int descriptor, int reads) {
    char name[40], path[4096];
    if (!control || !control->below[0]) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return strncmp(path, control->below, strlen(control->below)) ? 0 : strikes(reads);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name); \
        va_list more; va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; va_end(more); \
        if (fails(AT_FDCWD, path, (flags & (O_ACCMODE | O_CREAT)) == O_RDONLY)) return -1; \
        return real(path, flags, mode); }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        int (*real)(int, const char *, int, ...) = dlsym(RTLD_NEXT, #name); \
        va_list more; va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; va_end(more); \
        if (fails(folder, path, (flags & (O_ACCMODE | O_CREAT)) == O_RDONLY)) return -1; \
        return real(folder, path, flags, mode); }
OPENAT(openat)
OPENAT(openat64)

#define OF_DESCRIPTOR(type, name, reads, parameters, arguments) \
    type name parameters { \
        type (*real) parameters = dlsym(RTLD_NEXT, #name); \
        return fails_fd(descriptor, reads) ? -1 : real arguments; }
OF_DESCRIPTOR(ssize_t, write, 0, (int descriptor, const void *data, size_t size), (descriptor, data, size))
OF_DESCRIPTOR(ssize_t, pwrite, 0, (int descriptor, const void *data, size_t size, off_t at), (descriptor, data, size, at))
OF_DESCRIPTOR(ssize_t, pwrite64, 0, (int descriptor, const void *data, size_t size, off_t at), (descriptor, data, size, at))
OF_DESCRIPTOR(ssize_t, writev, 0, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count))
OF_DESCRIPTOR(ssize_t, sendfile, 0, (int descriptor, int from, off_t *at, size_t size), (descriptor, from, at, size))
OF_DESCRIPTOR(ssize_t, sendfile64, 0, (int descriptor, int from, off_t *at, size_t size), (descriptor, from, at, size))
OF_DESCRIPTOR(int, fsync, 0, (int descriptor), (descriptor))
OF_DESCRIPTOR(int, fdatasync, 0, (int descriptor), (descriptor))
OF_DESCRIPTOR(int, ftruncate, 0, (int descriptor, off_t size), (descriptor, size))
OF_DESCRIPTOR(int, ftruncate64, 0, (int descriptor, off_t size), (descriptor, size))
OF_DESCRIPTOR(ssize_t, read, 1, (int descriptor, void *data, size_t size), (descriptor, data, size))
OF_DESCRIPTOR(ssize_t, pread, 1, (int descriptor, void *data, size_t size, off_t at), (descriptor, data, size, at))
OF_DESCRIPTOR(ssize_t, pread64, 1, (int descriptor, void *data, size_t size, off_t at), (descriptor, data, size, at))
OF_DESCRIPTOR(ssize_t, preadv, 1, (int descriptor, const struct iovec *part, int n, off_t at), (descriptor, part, n, at))
OF_DESCRIPTOR(ssize_t, preadv64, 1, (int descriptor, const struct iovec *part, int n, off_t at), (descriptor, part, n, at))

int mkdir(const char *path, mode_t mode) {
    int (*real)(const char *, mode_t) = dlsym(RTLD_NEXT, "mkdir");
    return fails(AT_FDCWD, path, 0) ? -1 : real(path, mode);
}
int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    return fails(AT_FDCWD, to, 0) ? -1 : real(from, to);
}
int unlink(const char *path) {
    int (*real)(const char *) = dlsym(RTLD_NEXT, "unlink");
    return control && !control->lasting && fails(AT_FDCWD, path, 0) ? -1 : real(path);  /* a full disk takes removals */
}
"""

_CONTROL = 512  # bytes of the library's struct
_SECONDS = 300


@dataclass(frozen=True)
class Fault:
    """The ``at``-th call below a folder fails, with a ``lasting`` error all later ones too; 0: calls are counted only."""

    below: Path
    at: int = 0
    error: int = errno.ENOSPC
    reads: bool = False
    lasting: bool = False


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (negative: a signal), what it printed, and its calls below the folder."""

    status: int
    output: str
    calls: int

    def require_message(self, *context: object) -> None:
        """Assert that the command failed as it should: one message, no traceback."""
        assert self.status in (1, 2), (self.status, self.output, *context)
        self.require_no_traceback(*context)

    def require_no_traceback(self, *context: object) -> None:
        """Assert that nothing printed looks like a programming error."""
        for word in ("Traceback", "Exception ignored", "FAILED with"):
            assert word not in self.output, (self.output, *context)
        assert self.status in (0, 1, 2), (self.status, self.output, *context)
        assert self.status == 0 or len(self.output.strip()) > 10, (self.output, *context)


class _Control(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_long),
        ("count", ctypes.c_long),
        ("error", ctypes.c_int),
        ("reads", ctypes.c_int),
        ("lasting", ctypes.c_int),
        ("unused", ctypes.c_int),
        ("below", ctypes.c_char * 480),
    )


class Programs:
    """The two programs in a process that has imported them: each command runs in a fork of it."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder

    def seen(self, path: Path) -> Path:
        """Return where this process finds what the server sees at ``path``."""
        return Path(f"/proc/{self._process.pid}/root{path}")

    def run(
        self,
        *words: object,
        fault: Fault | None = None,
        limits: Mapping[int, int] | None = None,
        cwd: Path | None = None,
        killed_after: float | None = None,
    ) -> Ended:
        """Run ``ich-prep ...`` or ``ich-train ...``; ``limits`` are soft resource limits by number."""
        control = _Control(below=b"")
        if fault is not None:
            below = os.fsencode(fault.below.resolve())
            control = _Control(fault.at, 0, fault.error, fault.reads, fault.lasting, 0, below)
        job = {
            "words": [*map(str, words)],
            "control": bytes(control).hex(),
            "limits": dict(limits or {}),
            "cwd": str(cwd or self._folder),
            "output": str(self._folder / "output"),
            "killed_after": killed_after,
        }
        commands, answers = self._process.stdin, self._process.stdout
        assert commands is not None and answers is not None
        print(json.dumps(job), file=commands, flush=True)
        line = answers.readline()
        assert line, "the server of programs has ended"
        status, calls = json.loads(line)
        return Ended(status, (self._folder / "output").read_text(errors="replace"), calls)


@contextmanager
def programs(tmpfs: Path | None = None) -> Iterator[Programs]:
    """Start the server with the library; skip the test, loudly, without a C compiler.

    With ``tmpfs``, that folder is a file system in memory, of 64 MB, for the server and its commands only; skip the test,
    loudly, where none can be mounted.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        library = compiled(LIBRARY, folder / "faults.so", "failing system calls are")
        (folder / "control").write_bytes(bytes(_CONTROL))
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "FAULTS": str(folder / "control"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        words = [sys.executable, "-m", "tests.support.faults"]
        if tmpfs is not None:
            mounting = f"mount -t tmpfs -o size=64m tmpfs {shlex.quote(str(tmpfs))}"
            own = ["unshare", *(() if os.geteuid() == 0 else ("--user", "--map-root-user")), "--mount", "sh", "-c"]
            if shutil.which("unshare") is None or subprocess.run([*own, mounting], check=False).returncode:
                pytest.skip("no file system can be mounted: full file systems are NOT tested")
            words = [*own, f"{mounting} && exec {shlex.join(words)}"]
        process = subprocess.Popen(
            words, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder
        )
        try:
            yield Programs(process, folder)
        finally:
            process.communicate()  # its standard input ends, and so does it
            assert process.returncode == 0


def _serve(jobs: IO[str], answers: IO[str]) -> None:
    for name in (
        "ich_prep.cli",
        "ich_train.cli",
        "ich_train.evaluation.evaluate",
        "ich_train.explain",
        "ich_train.train",
    ):
        importlib.import_module(name)
    with open(os.environ["FAULTS"], "r+b") as file:
        control = mmap.mmap(file.fileno(), _CONTROL)
    for line in jobs:
        job = json.loads(line)
        control[:] = bytes.fromhex(job["control"]).ljust(_CONTROL, b"\0")
        child = os.fork()
        if child == 0:
            _become(job)
        with contextlib.suppress(OSError):  # whoever is first
            os.setpgid(child, child)
        status = _wait(child, job["killed_after"])
        calls = _Control.from_buffer_copy(control[: ctypes.sizeof(_Control)]).count
        control[:] = bytes(_CONTROL)
        print(json.dumps([status, calls]), file=answers, flush=True)


def _wait(child: int, killed_after: float | None) -> int:
    """Return the exit status of ``child``, killed with its descendants after that many seconds."""
    deadline = time.monotonic() + (_SECONDS if killed_after is None else killed_after)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.002)


def _become(job: Mapping[str, object]) -> NoReturn:
    """Run the command of a ``job`` in this process, as its program would, and end."""
    status = 70
    try:
        os.setpgid(0, 0)
        output = os.open(str(job["output"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.chdir(str(job["cwd"]))
        sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        words = job["words"]
        assert isinstance(words, list) and isinstance(job["limits"], dict)
        for number, soft in job["limits"].items():
            resource.setrlimit(int(number), (soft, resource.getrlimit(int(number))[1]))
        sys.argv = words
        _call(words[0])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 71
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _call(program: str) -> NoReturn:
    from ich_prep.cli import main as prep
    from ich_train.cli import main as train

    {"ich-prep": prep, "ich-train": train}[program]()
    raise AssertionError


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)
