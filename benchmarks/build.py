"""How fast does a build go, against the limit of the machine and against what people write by hand?

    python -m benchmarks.build [--slices 8192] [--repeats 5] [--data bench-data]

Warm files, two processes each, glibc's malloc thresholds raised for all. The limit is two bare processes that only read,
window, compress and write the same files. Starting processes counts for nobody.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.files import cohort
from benchmarks.measure import Rate, in_process, interleave, report, versions, warm

QUESTIONS = {
    "windows-512": ("three windows, 512 x 512", 512, "windows"),
    "windows-256": ("three windows, 256 x 256 from 512 x 512", 256, "windows"),
    "hu-512": ("HU, 512 x 512", 512, "hu"),
}
OURS, DECODE, LIMIT = "ich-prep build", "its decode stage alone", "two bare processes"
PEERS = {
    "pool of pydicom + NumPy + PNG": "png pool",
    "pool of SimpleITK + .npy": "simpleitk",
    "pool of MONAI transforms + .npy": "monai",
    "dask.array + zarr-python": "dask and zarr",
}
PACKAGES = (
    "pydicom",
    "numpy",
    "opencv-python-headless",
    "numcodecs",
    "dask",
    "pyarrow",
    "zarr",
    "SimpleITK",
    "monai",
)


def main(
    slices: int = 8192,
    repeats: int = 5,
    data: Path = Path("bench-data"),
    question: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(QUESTIONS)}.")] = None,
) -> None:
    tree = cohort(data, slices=slices)
    for name in question or list(QUESTIONS):
        title, size, store = QUESTIONS[name]
        warm(sorted(tree.glob("stage_2_*/*.dcm")))
        contend = partial(_contend, tree, data / "out", size, store)
        contenders = {OURS: "ours", LIMIT: "limit", f"{LIMIT}, synced": "limit on disk"}
        if store == "windows":
            contenders |= PEERS
        found = interleave({label: partial(contend, contender) for label, contender in contenders.items()}, repeats)
        report(
            f"Build: {title}, {found[OURS][0]['slices']:,} slices, 2 processes",
            _rates(found),
            against=LIMIT,
            ours=OURS,
            name=f"build-{name}",
            extra={"versions": versions(PACKAGES), "stages": _stages(found[OURS])},
        )


def _contend(tree: Path, out: Path, size: int, store: str, name: str) -> dict[str, Any]:
    return in_process("benchmarks.build_contenders", name, str(tree), str(out), str(size), store)


def _rates(found: dict[str, list[dict[str, Any]]]) -> list[Rate]:
    rates = []
    for name, runs in found.items():
        size = runs[0]["bytes"] / runs[0]["slices"]
        rates.append(Rate(name, tuple(run["slices"] / run["seconds"] for run in runs), size))
        if name == OURS:
            rates.append(Rate(DECODE, tuple(run["slices"] / run["stages"]["shards"] for run in runs)))
    return rates


def _stages(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median seconds of each stage, and of what is left out of the rate: listing and starting."""
    names = {**runs[0]["stages"], **runs[0]["started"]}
    return {name: statistics.median({**run["stages"], **run["started"]}[name] for run in runs) for name in names}


if __name__ == "__main__":
    typer.run(main)
