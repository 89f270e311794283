"""Does the loader keep GPUs busy? Simulated GPUs take batches at a published training rate.

    python -m benchmarks.feeding [--data bench-data] [--rate 2500]

Also: how long does the first batch take after opening a dataset of 3,000 shards?
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import typer

from benchmarks.files import cohort
from benchmarks.forms import LZ4, prepare
from benchmarks.measure import Section, publish, versions
from benchmarks.racing import BATCH
from ich_prep import Spec, build
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_train.loader import SliceLoader

MANY_SHARDS = 3000
GPUS = (1, 2, 4, 8)


def endless(dataset: Dataset, count: int) -> SliceLoader:
    """Return a loader over one epoch of ``count`` slices: a long one, as of the RSNA set."""
    rows = np.resize(np.arange(len(dataset)), count + 8 * BATCH)
    return SliceLoader(dataset, rows, BATCH, drop_last=True)


def simulate(loader: SliceLoader, *, rate: float, seconds: float) -> float:
    """Return the share of the time, after the first batch, that a GPU at ``rate`` slices/s waits for data."""
    step = loader.batch_size / rate
    batches = iter(loader)
    next(batches)
    waited, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        time.sleep(step)
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
    return waited / (time.perf_counter() - start)


def first_batch(path: Path) -> float:
    """Return the seconds from opening the dataset at ``path`` to its first shuffled batch."""
    start = time.perf_counter()
    dataset = open_dataset(path)
    batches = iter(SliceLoader(dataset, batch_size=BATCH))
    next(batches)
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    return seconds


def main(
    slices: int = 4096, data: Path = Path("bench-data"), rate: float = 2500.0, seconds: float = 5.0, repeats: int = 3
) -> None:
    data = data.absolute()
    if slices < MANY_SHARDS:
        raise SystemExit(f"Expected at least {MANY_SHARDS:,} --slices, one per shard; got {slices:,}.")
    tree = cohort(data, slices=slices)
    folder, _ = prepare(data, tree, size=256, store="windows", only={LZ4})
    dataset = open_dataset(folder / LZ4)
    shares: dict[int, list[float]] = {gpus: [] for gpus in GPUS}
    for _ in range(repeats):
        for gpus, results in shares.items():
            loader = endless(dataset, int(gpus * rate * seconds))
            results.append(simulate(loader, rate=gpus * rate, seconds=seconds))
    lines = [
        [
            str(gpus),
            f"{gpus * rate:,.0f}",
            f"{statistics.median(results):.1%}",
            f"{min(results):.1%} to {max(results):.1%}",
        ]
        for gpus, results in shares.items()
    ]
    many = data / f"many-shards-{tree.name}.zarr"
    if not (many / "zarr.json").exists():
        shutil.rmtree(many, ignore_errors=True)
        build(tree, many, Spec(layout="rsna", size=64, slices_per_shard=1))
    opened = statistics.median(first_batch(many) for _ in range(5))
    shards = open_dataset(many).counts.shards
    header = ["simulated GPUs", "slices/s needed", "waiting for data", "spread"]
    simulated = Section("Feeding simulated GPUs, two cores, 3 x 256 x 256", header, lines)
    simulated.notes = [f"First batch {opened:.2f} s after opening a dataset of {shards:,} shards."]
    raw = {"wait_share": shares, "first_batch": opened}
    publish("feeding", [simulated], releases=versions("torch", "numpy", "numcodecs"), raw=raw)


if __name__ == "__main__":
    typer.run(main)
