"""Shared by the integration tests: the real command line, and a dataset as a mapping of its files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ich_prep.dataset.spec import Spec

SMALL = Spec(size=64, slices_per_shard=16)
PREP = str(Path(sys.executable).with_name("ich-prep"))


def prep(*words: object) -> subprocess.CompletedProcess[str]:
    """Run ``ich-prep`` to its end and return its output."""
    return subprocess.run([PREP, *map(str, words)], capture_output=True, text=True, timeout=240, check=False)


def start(*words: object, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start ``ich-prep`` as the leader of its own process group, as a terminal does."""
    return subprocess.Popen(
        [PREP, *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )


def published(dataset: Path) -> Mapping[str, str]:
    """Return the digest of each file of a dataset, by relative path."""
    return {
        str(path.relative_to(dataset)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(dataset.rglob("*"))
        if path.is_file()
    }


def wait_for(happened: Callable[[], object], process: subprocess.Popen[Any]) -> None:
    """Return as soon as something happened while a ``process`` runs."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def train_file(tree: Path) -> Path:
    """Return the first training slice of a tree in the layout of RSNA."""
    return sorted((tree / "stage_2_train").glob("*.dcm"))[0]


def working(dataset: Path) -> Path:
    """Return the working folder next to a dataset."""
    return dataset.with_name(f"{dataset.name}.build")


def copy_with_working_folder(dataset: Path, target: Path) -> Path:
    """Copy a dataset and its working folder; return the copy."""
    shutil.copytree(working(dataset), working(target))
    return Path(shutil.copytree(dataset, target))
