"""Kill a change of a dataset at every moment something is synced: the old or the new one is readable, and it is repeated.

A program of its own, as ``crash_points``: each change runs in a fork that ends by SIGKILL before the n-th ``fsync``.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ich_prep.append import append
from ich_prep.build_dataset import Allowances
from ich_prep.dataset.dataset import open_dataset
from ich_prep.drop import drop
from ich_prep.relabel import relabel
from tests.integration.crash_points import in_child, killing_at
from tests.support.cli import copy_with_working_folder, published

Change = Callable[[Path], object]


def changes(src: Path, labels: Path) -> dict[str, Change]:
    return {
        "relabel": lambda out: relabel(out, labels),
        "drop": lambda out: drop(out, "row in (1, 2, 20)"),
        "purge": lambda out: drop(out, "row in (1, 2, 20)", purge_pixels=True),
        "append": lambda out: append(src, out, workers=0, allow=Allowances(missing_images=True)),
    }


def main(command: str, base: Path, src: Path, labels: Path, work: Path, step: int) -> None:
    """Try the moments until the change ends without having been killed."""
    for name in ("pydicom", "zarr.codecs", "zarr.storage"):
        importlib.import_module(name)  # once here, not in each child
    change = changes(src, labels)[command]
    reference = copy_with_working_folder(base, work / "reference.zarr")
    assert in_child(lambda: change(reference)) == 0
    expected, before, after = published(reference), open_dataset(base), open_dataset(reference)
    moment = 1
    while True:
        out = copy_with_working_folder(base, work / f"{moment}.zarr")
        status = in_child(killing_at(moment, lambda out=out: change(out)))
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"moment {moment}: status {status}"
        found = open_dataset(out)
        assert found.digest in (before.digest, after.digest), f"moment {moment}: another dataset"
        rows = np.flatnonzero(found.is_ok)
        which = before if found.digest == before.digest else after
        assert (found.read(rows) == which.read(rows)).all(), f"moment {moment}: other pixels"
        assert found.slices.equals(which.slices), f"moment {moment}: other tables"
        assert in_child(lambda out=out: change(out)) == 0, f"moment {moment}: not repeated"
        now = published(out)
        different = sorted(name for name in now.keys() | expected.keys() if now.get(name) != expected.get(name))
        assert not different, f"moment {moment}: {different}"
        shutil.rmtree(out)
        moment += step
    print(moment)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:6]), int(sys.argv[6]))
