"""Folders into buckets and back, and builds in buckets that die at a given write."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from ich_prep.dataset.stores import Store

ROOT = Path(__file__).parents[2]
_PROGRAM = """
import os, signal, sys
from ich_prep.build_dataset import build
from ich_prep.dataset.stores import Store
from tests.support.cli import SMALL
when, name, count, number, real = sys.argv[1], sys.argv[2], int(sys.argv[3]), getattr(signal, sys.argv[4]), Store.put
def put(self, key, *words, **options):
    global count
    count -= key.endswith(name)
    last = key.endswith(name) and count == 0
    if last and when == "before":
        os.kill(os.getpid(), number)
    done = real(self, key, *words, **options)
    if last and when == "after":
        os.kill(os.getpid(), number)
    return done
Store.put = put
build(sys.argv[5], sys.argv[6], SMALL, endpoint=sys.argv[7], workers=0)
"""


def upload(folder: Path, url: str, endpoint: str) -> str:
    """Put every file below ``folder`` into the bucket, below ``url``; return that."""
    store = Store(url, endpoint=endpoint)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(str(path.relative_to(folder)), path.read_bytes())
    return url


def objects(url: str, endpoint: str) -> Mapping[str, str]:
    """Return the digest of each object below ``url``, by its name relative to that."""
    store = Store(url, endpoint=endpoint)
    keys = [key for key, _ in store.listed()]
    return {key: sha256(data).hexdigest() for key, data in zip(keys, store.get_objects(keys), strict=True)}


def names(url: str, endpoint: str) -> list[str]:
    """Return the names of the objects below ``url``, relative to it."""
    return [key for key, _ in Store(url, endpoint=endpoint).listed()]


def start_build_signalled(
    when: str, name: str, number: str, src: str | Path, out: str, endpoint: str, *, count: int = 1
) -> subprocess.Popen[str]:
    """Start a build that sends itself signal ``number`` before or after it writes an object whose name ends so.

    It is the ``count``-th such write.
    """
    words: Sequence[object] = (sys.executable, "-c", _PROGRAM, when, name, count, number, src, out, endpoint)
    return subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True, cwd=ROOT)
