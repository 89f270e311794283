"""Does the loader keep a GPU busy? A simulated one takes a batch every so often, as published rates say.

    python -m benchmarks.feeding [--data bench-data] [--rate 2500]

Also: how long after opening a dataset of 3,000 shards does the first batch come?
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import typer

from benchmarks.files import cohort
from benchmarks.loader import prepare
from benchmarks.loader_contenders import BATCH
from benchmarks.measure import RESULTS, machine
from ich_prep import Spec, build
from ich_prep.store import open_dataset
from ich_train.data import SliceLoader

MANY_SHARDS = 3000


def simulate(loader: SliceLoader, *, rate: float, seconds: float) -> float:
    """Return the share of the time, after the first batch, that a GPU eating ``rate`` slices/s waits for data."""
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


def main(slices: int = 4096, data: Path = Path("bench-data"), rate: float = 2500.0, seconds: float = 10.0) -> None:
    tree = cohort(data, slices=slices)
    folder = data / "loader-256"
    prepare(folder, tree, 256, "windows")
    dataset = open_dataset(folder / "lz4.zarr")
    shares = {}
    for gpus in (1, 2, 4, 8):
        # One epoch that lasts for all of it, as one of the RSNA set would.
        rows = np.resize(np.arange(len(dataset)), int(gpus * rate * seconds) + 8 * BATCH)
        loader = SliceLoader(dataset, rows, BATCH, drop_last=True)
        shares[gpus] = simulate(loader, rate=gpus * rate, seconds=seconds)
        typer.echo(f"{gpus} simulated GPU at {rate:,.0f} slices/s each: waits {shares[gpus]:.1%} of the time.")
    many = data / "many-shards.zarr"
    if not (many / "zarr.json").exists():
        shutil.rmtree(many, ignore_errors=True)
        build(tree, many, Spec(layout="rsna", size=64, slices_per_shard=1))
    opened = sorted(first_batch(many) for _ in range(5))[2]
    shards = open_dataset(many).ich["counts"]["shards"]
    assert shards >= MANY_SHARDS
    typer.echo(f"First batch {opened:.2f} s after opening a dataset of {shards:,} shards.")
    RESULTS.mkdir(exist_ok=True)
    document = {
        "title": "Feeding a simulated GPU",
        "machine": machine(),
        "rate": rate,
        "wait_share": shares,
        "first_batch_seconds": opened,
        "shards": shards,
    }
    (RESULTS / "feeding.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
