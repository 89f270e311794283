"""One contender of the loader benchmark in a process of its own: prints its slices/s as JSON.

    python -m benchmarks.loader_contenders NAME FOLDER SECONDS

``FOLDER`` is what ``loader.prepare`` made. Every contender visits rows in a random order in batches of 64 on two cores,
and starts its clock when it gives its second batch. The checksum of rows 0..63 shows that all give the same pixels.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ich_prep.store import open_dataset
from ich_train.data import SliceLoader

BATCH = 64
CORES = 2
MEMMAP, LMDB, PNG, HDF5, WEB = "rows.npy", "rows.lmdb", "png", "rows.h5", "web"


def batches_of(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield random batches of rows for ever: each epoch a permutation."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for at in range(0, count - BATCH + 1, BATCH):
            yield order[at : at + BATCH]


def ours(folder: Path, store: str) -> tuple[Iterator[Any], Callable[[np.ndarray], np.ndarray]]:
    """SliceLoader, two threads."""
    dataset = open_dataset(folder / store)
    loader = SliceLoader(dataset, np.arange(len(dataset)), BATCH, threads=CORES, drop_last=True)
    return (batch.images for _ in itertools.count() for batch in loader), dataset.read


def memmap_gather(folder: Path) -> tuple[Iterator[Any], Callable[[np.ndarray], np.ndarray]]:
    """The limit: two threads that copy uncompressed rows of a memory map into reused buffers."""
    rows = np.load(folder / MEMMAP, mmap_mode="r")

    def gather() -> Iterator[np.ndarray]:
        wanted = batches_of(len(rows))
        buffers = [np.empty((BATCH, *rows.shape[1:]), rows.dtype) for _ in range(CORES + 1)]
        with ThreadPoolExecutor(CORES) as pool:

            def start(number: int) -> Any:
                return pool.submit(rows.take, next(wanted), 0, buffers[number % len(buffers)], "clip")

            pending = [start(number) for number in range(CORES)]
            for number in itertools.count(CORES):
                yield pending.pop(0).result()
                pending.append(start(number))

    return gather(), lambda wanted: rows[wanted]


def tensorstore(folder: Path) -> tuple[Iterator[Any], Callable[[np.ndarray], np.ndarray]]:
    """Tensorstore over the same shards, two batches ahead."""
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": CORES}})
    place = {"driver": "file", "path": str(folder / "lz4.zarr" / "images")}
    array = ts.open({"driver": "zarr3", "kvstore": place}, context=context, read=True).result()

    def read() -> Iterator[np.ndarray]:
        wanted = batches_of(array.shape[0])
        pending = [array[next(wanted)].read() for _ in range(CORES)]
        while True:
            yield pending.pop(0).result()
            pending.append(array[next(wanted)].read())

    return read(), lambda wanted: array[wanted].read().result()


def zarr_python(folder: Path) -> tuple[Iterator[Any], Callable[[np.ndarray], np.ndarray]]:
    """zarr-python's orthogonal indexing over the same shards."""
    import zarr

    array = zarr.open_array(folder / "lz4.zarr" / "images", mode="r")
    return (array.oindex[np.sort(wanted)] for wanted in batches_of(array.shape[0])), lambda wanted: array.oindex[wanted]


class ArrayRows(Dataset[torch.Tensor]):
    """Rows of an array in a file, which each worker process opens for itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = len(self.rows)
        del self.rows

    @cached_property
    def rows(self) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.count


class MemmapRows(ArrayRows):
    """Rows of a memory map."""

    @cached_property
    def rows(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.rows[index]))


class Hdf5Rows(ArrayRows):
    """Rows of an HDF5 array, a chunk a row, compressed as h5py does it fastest (lzf with shuffle)."""

    @cached_property
    def rows(self) -> Any:
        import h5py

        return h5py.File(self.path)["images"]

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[index])


def form_of(folder: Path) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Return how many slices there are, their shape and dtype: for forms that hold bytes alone."""
    rows = np.load(folder / MEMMAP, mmap_mode="r")
    return len(rows), rows.shape[1:], rows.dtype


class LmdbRows(Dataset[torch.Tensor]):
    """Uncompressed rows as values of an LMDB."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LMDB
        self.count, self.shape, self.dtype = form_of(folder)

    @cached_property
    def transaction(self) -> Any:
        import lmdb

        return lmdb.open(str(self.path), readonly=True, lock=False, readahead=False).begin(buffers=True)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        value = np.frombuffer(self.transaction.get(index.to_bytes(8, "big")), self.dtype)
        return torch.from_numpy(value.reshape(self.shape).copy())


def web_dataset(folder: Path) -> tuple[Iterator[Any], Callable[[np.ndarray], np.ndarray]]:
    """WebDataset over tar files of plain bytes, in a DataLoader with two workers; it shuffles a buffer of 1,000, no more."""
    import webdataset

    shards = sorted(map(str, (folder / WEB).glob("*.tar")))
    _, shape, kind = form_of(folder)

    def decode(sample: dict[str, Any]) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(bytearray(sample["raw"]), kind).reshape(shape))

    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), nodesplitter=None, empty_check=False)
    batches = DataLoader(dataset.shuffle(1000).map(decode), BATCH, num_workers=CORES, drop_last=True)

    def first(wanted: np.ndarray) -> np.ndarray:
        plain = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None).map(decode)
        return torch.stack(list(itertools.islice(plain, len(wanted)))).numpy()

    return (batch for _ in itertools.count() for batch in batches), first


class PngRows(Dataset[torch.Tensor]):
    """One PNG a slice: three channels of 8 bits, or one of 16."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / PNG
        self.count = len(list(self.folder.iterdir()))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        import cv2

        cv2.setNumThreads(1)
        image = cv2.imread(str(self.folder / f"{index}.png"), cv2.IMREAD_UNCHANGED)
        if image.dtype == np.uint16:
            return torch.from_numpy((image.astype(np.int32) - 32768).astype(np.int16)[np.newaxis])
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def data_loader(rows: Dataset[torch.Tensor]) -> tuple[Iterator[Any], Callable[[np.ndarray], np.ndarray]]:
    """A DataLoader with two worker processes, shuffling."""
    loader = DataLoader(rows, BATCH, shuffle=True, num_workers=CORES, drop_last=True, persistent_workers=True)
    return (batch for _ in itertools.count() for batch in loader), lambda wanted: torch.stack(
        [rows[int(row)] for row in wanted]
    ).numpy()


CONTENDERS: dict[str, Callable[[Path], tuple[Iterator[Any], Callable[[np.ndarray], np.ndarray]]]] = {
    "SliceLoader, lz4": lambda folder: ours(folder, "lz4.zarr"),
    "SliceLoader, none": lambda folder: ours(folder, "none.zarr"),
    "memmap gather": memmap_gather,
    "tensorstore": tensorstore,
    "zarr-python": zarr_python,
    "DataLoader over a memmap": lambda folder: data_loader(MemmapRows(folder / MEMMAP)),
    "DataLoader over LMDB": lambda folder: data_loader(LmdbRows(folder)),
    "DataLoader over PNG": lambda folder: data_loader(PngRows(folder)),
    "DataLoader over HDF5": lambda folder: data_loader(Hdf5Rows(folder / HDF5)),
    "WebDataset": web_dataset,
}


def main() -> None:
    name, folder, seconds = sys.argv[1:]
    torch.set_num_threads(1)
    begin = time.perf_counter()
    batches, read = CONTENDERS[name](Path(folder))
    checksum = zlib.crc32(np.ascontiguousarray(read(np.arange(BATCH))).tobytes())
    next(batches)
    first = time.perf_counter() - begin
    next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < float(seconds):
        count += len(next(batches))
    result = {
        "rate": count / (time.perf_counter() - start),
        "first_batch": first,
        "checksum": checksum,
    }
    print(json.dumps(result), flush=True)
    os._exit(0)  # worker processes and threads of any contender end with it


if __name__ == "__main__":
    main()
