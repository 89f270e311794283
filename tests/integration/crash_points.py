"""Kill a build at each moment at which it makes something durable, resume it, and compare: a program, not a test module.

``python -m tests.integration.crash_points SRC REFERENCE WORK STEP`` prints the number of moments; every STEP-th is tried.
Each build runs in a
process that ends by SIGKILL before the n-th ``fsync``, so that its data is only partly written.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ich_prep.build_dataset import build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from tests.support.cli import published

SPEC = Spec(size=32, slices_per_shard=16)


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a fork of this process and return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killing_at(moment: int, work: Callable[[], object]) -> Callable[[], object]:
    """Return ``work`` that is killed at its ``moment``-th fsync."""
    left, real = moment, os.fsync

    def fsync(descriptor: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    def killed() -> None:
        os.fsync = fsync
        work()

    return killed


def main(src: Path, reference: Path, work: Path, step: int) -> None:
    """Try the moments until a build ends without having been killed."""
    for name in ("pydicom", "zarr.codecs", "zarr.storage"):
        importlib.import_module(name)  # once here, not in each child
    expected = published(reference)
    moment = 1
    while True:
        out = work / f"{moment}.zarr"
        status = in_child(killing_at(moment, partial(build, src, out, SPEC, workers=0)))
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"moment {moment}: status {status}"
        whole = in_child(partial(open_dataset, out)) == 0
        assert not whole or published(out) == expected, f"moment {moment}: visible before it was whole"
        assert in_child(partial(build, src, out, SPEC, workers=0)) == 0, f"moment {moment}: not resumed"
        found = published(out)
        different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        assert not different, f"moment {moment}: {different}"
        moment += step
    print(moment)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
