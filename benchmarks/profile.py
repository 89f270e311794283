"""Flame graphs of a build, worker processes included, and of the loader, by py-spy.

    python -m benchmarks.profile [--data bench-data]

They are written to ``benchmarks/profiles``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import typer

from benchmarks.files import cohort
from benchmarks.forms import LZ4, prepare
from benchmarks.measure import ROOT
from ich_prep.execute import MALLOC_ENVIRONMENT, ONE_THREAD

PROFILES = Path(__file__).parent / "profiles"


def record(name: str, module: str, *arguments: object) -> None:
    """Run ``python -m module arguments`` under py-spy, including child processes and native code."""
    target = PROFILES / f"{name}.svg"
    spy = Path(sys.executable).with_name("py-spy")
    command = [spy, "record", "--output", target, "--rate", 50, "--subprocesses", "--native", "--"]
    subprocess.run(
        [str(part) for part in (*command, sys.executable, "-m", module, *arguments)],
        env={**os.environ, **ONE_THREAD, **MALLOC_ENVIRONMENT},
        cwd=ROOT,
        check=True,
    )
    typer.echo(f"Flame graph: {target}")


def main(slices: int = 4096, data: Path = Path("bench-data")) -> None:
    PROFILES.mkdir(exist_ok=True)
    data = data.absolute()
    tree = cohort(data, slices=slices)
    out = data / "profiled.zarr"
    shutil.rmtree(out, ignore_errors=True)
    record("build", "ich_prep.cli", "build", "--src", tree, "--out", out, "--workers", 2)
    shutil.rmtree(out, ignore_errors=True)
    folder, _ = prepare(data, tree, size=256, store="windows", only={LZ4})
    record("loader", "benchmarks.loader_contenders", "race", folder, "SliceLoader, lz4", 5, 0)


if __name__ == "__main__":
    typer.run(main)
