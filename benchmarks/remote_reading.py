"""How fast are batches read from an object store, beside what bare concurrent GETs of the same ranges reach?

    python -m benchmarks.remote_reading [--slices 3072] [--rounds 5] [--data bench-data]

The store is a SeaweedFS on this machine, which shares its cores with the reader; with latency, a proxy delays each request.
A *bare* round fetches the chunks of each batch with one GET each, as many at a time as the reader may have in flight, and
does nothing with them; *ours* is ``ich_train.loader.SliceLoader``, which verifies and decodes. Rounds alternate, and the
ratio is the median of those of neighbouring rounds. With the cache, an epoch after the first is compared with one from a
local folder.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import obstore
import typer

from benchmarks.files import cohort
from ich_prep.build_dataset import build
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import shard_path
from ich_prep.dataset.shard_cache import ShardCache
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.store_loop import IN_FLIGHT
from ich_prep.dataset.stores import Store
from ich_train.loader import SliceLoader
from tests.support.buckets import upload
from tests.support.faulty_proxy import faulty_proxy
from tests.support.s3_servers import ENVIRONMENT, S3Server, seaweedfs

BATCH = 64
SECONDS = 2.0  # of a round
SIZE, SLICES_PER_SHARD = 256, 128
LATENCIES = (0.0, 0.05)
ORDERS = {"random": "shuffled", "shard window": "windowed"}


def local_dataset(folder: Path, slices: int) -> Path:
    """Return a dataset of at least ``slices`` slices below ``folder``, built once."""
    out = folder / f"remote-{slices}.zarr"
    if not (out / "zarr.json").exists():
        build(cohort(folder, slices=slices), out, Spec(size=SIZE, slices_per_shard=SLICES_PER_SHARD))
    return out


def batches_of(dataset: Dataset, order: str, epoch: int) -> list[np.ndarray]:
    """Return the rows of each batch of an epoch."""
    loader = loader_of(dataset, order)
    loader.set_epoch(epoch)
    return [loader.rows[positions] for positions in loader._batches()]


def loader_of(dataset: Dataset, order: str) -> SliceLoader:
    """Return a loader as a training run has it."""
    return SliceLoader(dataset, np.flatnonzero(dataset.is_ok), BATCH, ORDERS[order], pin=False)


def bare_rate(store: Store, dataset: Dataset, batches: list[np.ndarray]) -> float:
    """Return how many chunks a second concurrent GETs fetch."""
    reader = dataset._open_reader()
    rows = np.concatenate(batches)
    shards = (rows // SLICES_PER_SHARD).tolist()
    keys = [str(shard_path(Path(), shard)) for shard in shards]
    ranges = list(zip(keys, reader._begins[rows].tolist(), reader._ends[rows].tolist(), strict=True))

    async def fetch_all() -> None:
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def fetch(key: str, start: int, end: int) -> None:
            async with slots:
                await obstore.get_range_async(store.client, key, start=start, end=end)

        await asyncio.gather(*(fetch(*one) for one in ranges))

    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        asyncio.run(fetch_all())
        count += len(rows)
    return count / (time.perf_counter() - begun)


def epoch_rate(loader: SliceLoader) -> float:
    """Return how many slices a second whole epochs of ``loader`` give, in ``SECONDS`` or a little more."""
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        for batch in loader:
            count += len(batch.rows)
    return count / (time.perf_counter() - begun)


def first_rate(loader: SliceLoader) -> float:
    """Return how many slices a second the first epoch gives."""
    begun = time.perf_counter()
    return sum(len(batch.rows) for batch in loader) / (time.perf_counter() - begun)


def compared(
    one: Callable[[int], float], other: Callable[[int], float], rounds: int
) -> tuple[float, float, list[float]]:
    """Return the median rates of both, and the ratios of neighbouring rounds; the first round is not counted."""
    pairs = []
    for number in range(rounds + 1):
        first, second = (one, other) if number % 2 else (other, one)
        rates = {first: first(number), second: second(number)}
        pairs.append((rates[one], rates[other]))
    pairs = pairs[1:]
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return medians[0], medians[1], [ours / theirs for ours, theirs in pairs]


def line(title: str, found: tuple[float, float, list[float]], other: str) -> str:
    """Return a line of the result."""
    ours, theirs, ratios = found
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return (
        f"{title}: {ours:,.0f} slices/s, {other} {theirs:,.0f}; ratio {statistics.median(ratios):.2f} ({spread} in "
        f"{len(ratios)} rounds)"
    )


@contextmanager
def endpoint_with(server: S3Server, latency: float) -> Iterator[str]:
    """Yield the address of the server with that much latency, in seconds, before each request."""
    if not latency:
        yield server.endpoint
        return
    with faulty_proxy(server.endpoint) as proxy:
        proxy.set(latency=latency)
        yield proxy.endpoint


def main(
    slices: Annotated[int, typer.Option(help="At least this many slices.")] = 3072,
    rounds: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    data: Annotated[Path, typer.Option(help="Where the dataset is made.")] = Path("bench-data"),
) -> None:
    near_path = local_dataset(data, slices)
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as made, seaweedfs(Path(made) / "store") as server:
        url = f"{server.url}/data.zarr"
        upload(near_path, url, server.endpoint)
        for latency in LATENCIES:
            with endpoint_with(server, latency) as endpoint:
                os.environ["AWS_ENDPOINT_URL"] = endpoint
                store = Store(url, endpoint=endpoint)
                for order in ORDERS:
                    with open_dataset(url) as far:
                        far.read(np.flatnonzero(far.is_ok)[::SLICES_PER_SHARD])  # the indexes of all shards
                        loader = loader_of(far, order)
                        found = compared(
                            lambda _, loader=loader: epoch_rate(loader),  # type: ignore[misc]
                            lambda number, far=far, order=order, store=store: bare_rate(  # type: ignore[misc]
                                store, far, batches_of(far, order, number)
                            ),
                            rounds,
                        )
                    print(line(f"{order} batches, {1000 * latency:.0f} ms", found, "bare GETs"), flush=True)
        os.environ["AWS_ENDPOINT_URL"] = server.endpoint
        for order in ORDERS:
            cache = ShardCache(Path(made) / order, 1 << 40)
            with open_dataset(url, cache=cache) as far, open_dataset(near_path) as near:
                first = first_rate(loader_of(far, order))
                loaders = [loader_of(dataset, order) for dataset in (far, near)]
                found = compared(
                    lambda _, loader=loaders[0]: epoch_rate(loader),  # type: ignore[misc]
                    lambda _, loader=loaders[1]: epoch_rate(loader),  # type: ignore[misc]
                    rounds,
                )
            print(line(f"{order} batches, cached (first epoch {first:,.0f})", found, "a local folder"), flush=True)


if __name__ == "__main__":
    typer.run(main)
