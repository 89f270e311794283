"""Programs that stop themselves once they have given a file its name, so that a test meets them at one moment.

A test that polls for a file and then acts may come too late on a busy machine; a stopped program waits for it.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.support.preload import compiled

LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fnmatch.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

static void named(const char *path) {
    static long seen;
    const char *pattern = getenv("PAUSE_AT"), *times = getenv("PAUSE_AFTER");
    if (!pattern || !times || fnmatch(pattern, path, 0)) return;
    if (__sync_add_and_fetch(&seen, 1) == atol(times)) kill(getpid(), SIGSTOP);
}

#define OF_NAMES(name) \
    int name(const char *from, const char *to) { \
        int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, #name); \
        int failed = real(from, to); \
        if (!failed) named(to); \
        return failed; }
OF_NAMES(rename)
OF_NAMES(link)
"""


@functools.cache
def _library() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pausing-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return compiled(LIBRARY, folder / "pausing.so", "programs met at one moment are")


def pausing(pattern: str, times: int = 1, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment in which each process stops after the n-th file that gets a name like ``pattern``."""
    libraries = f"{environment.get('LD_PRELOAD', '')} {_library()}".strip()
    return {**environment, "LD_PRELOAD": libraries, "PAUSE_AT": pattern, "PAUSE_AFTER": str(times)}


def wait_until_paused(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Return once the ``process``, or one that it started, has stopped itself; fails if it ended instead."""
    while not _any_stopped(process.pid):
        assert process.poll() is None, "the process ended before it came to its pause"
        time.sleep(0.005)


def _any_stopped(process: int) -> bool:
    try:
        first = psutil.Process(process)
        members = [first, *first.children(recursive=True)]
        return any(member.status() == psutil.STATUS_STOPPED for member in members)
    except psutil.NoSuchProcess:  # one of them has just ended
        return False
