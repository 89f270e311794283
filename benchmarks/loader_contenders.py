"""One loader of the benchmark in its own process: see ``racing.race`` for what it prints.

    python -m benchmarks.loader_contenders race FOLDER NAME SECONDS SLICES

``FOLDER`` is written by ``forms.prepare``. Every contender visits rows in a random order in batches of 64 on two cores.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.forms import ARROW, DICOM, HDF5, LMDB, LZ4, NONE, PNG, ROWS, TAR
from benchmarks.racing import BATCH, CORES, Opened, forever, race, random_batches
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.windows import MAX_HU, MIN_HU
from ich_train.loader import SliceLoader

BUFFERS = 8  # as a SliceLoader with two threads; with only three, some would stay in the CPU's cache
LONG_EPOCH = 1_000_000  # slices: several permutations of the rows in sequence


def ours(path: Path) -> Opened:
    """SliceLoader, two threads."""
    dataset = open_dataset(path)
    loader = SliceLoader(dataset, np.arange(len(dataset)), BATCH, threads=CORES, drop_last=True)
    return (batch.images for batch in forever(loader)), dataset.read


def memmap_gather(path: Path) -> Opened:
    """The limit: two threads that copy uncompressed rows of a memory map into as many buffers as SliceLoader has."""
    rows = np.load(path, mmap_mode="r")

    def gather() -> Iterator[np.ndarray]:
        indices = random_batches(len(rows))
        buffers = [np.empty((BATCH, *rows.shape[1:]), rows.dtype) for _ in range(BUFFERS)]
        with ThreadPoolExecutor(CORES) as pool:

            def start(number: int) -> Any:
                return pool.submit(rows.take, next(indices), 0, buffers[number % len(buffers)], "clip")

            pending = [start(number) for number in range(CORES)]
            for number in itertools.count(CORES):
                yield pending.pop(0).result()
                pending.append(start(number))

    return gather(), lambda indices: rows[indices]


def tensorstore(path: Path) -> Opened:
    """Tensorstore over the same shards, two batches ahead."""
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": CORES}})
    kvstore = {"driver": "file", "path": str(path / "images")}
    array = ts.open({"driver": "zarr3", "kvstore": kvstore}, context=context, read=True).result()

    def read() -> Iterator[np.ndarray]:
        indices = random_batches(array.shape[0])
        pending = [array[next(indices)].read() for _ in range(CORES)]
        while True:
            yield pending.pop(0).result()
            pending.append(array[next(indices)].read())

    return read(), lambda indices: array[indices].read().result()


def zarr_python(path: Path) -> Opened:
    """zarr-python over the same shards: two threads with one batch each, slice by slice, which is faster than ``oindex``."""
    import zarr

    array = zarr.open_array(path / "images", mode="r")

    def read(indices: np.ndarray) -> np.ndarray:
        return np.stack([array[row] for row in indices.tolist()])

    def batches() -> Iterator[np.ndarray]:
        indices = random_batches(array.shape[0])
        with ThreadPoolExecutor(CORES) as pool:
            pending = [pool.submit(read, next(indices)) for _ in range(CORES)]
            while True:
                yield pending.pop(0).result()
                pending.append(pool.submit(read, next(indices)))

    return batches(), read


def with_zarrs(path: Path) -> Opened:
    """The same with the codecs of zarrs."""
    import zarr
    import zarrs  # noqa: F401

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": CORES})
    return zarr_python(path)


class ArrayRows(Dataset[torch.Tensor]):
    """Rows of an array in a file, which each worker process opens separately."""

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
    """Rows of an HDF5 array, one chunk per row, with h5py's fastest compression (lzf with shuffle)."""

    @cached_property
    def rows(self) -> Any:
        import h5py

        return h5py.File(self.path)["images"]

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[index])


def form_of(folder: Path) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Return how many slices there are, their shape and dtype: for forms that contain only bytes."""
    rows = np.load(folder / ROWS, mmap_mode="r")
    return len(rows), rows.shape[1:], rows.dtype


class LmdbRows(Dataset[torch.Tensor]):
    """Uncompressed rows as values of an LMDB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count, self.shape, self.dtype = form_of(path.parent)

    @cached_property
    def transaction(self) -> Any:
        import lmdb

        return lmdb.open(str(self.path), readonly=True, lock=False).begin(buffers=True)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        value = np.frombuffer(self.transaction.get(index.to_bytes(8, "big")), self.dtype)
        return torch.from_numpy(value.reshape(self.shape).copy())


def web_dataset(path: Path) -> Opened:
    """WebDataset over tar files of plain bytes, in a DataLoader with two workers; it shuffles a buffer of 1,000 slices."""
    import webdataset

    shards = sorted(map(str, path.glob("*.tar")))
    _, shape, kind = form_of(path.parent)

    def decode(sample: dict[str, Any]) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(bytearray(sample["raw"]), kind).reshape(shape))

    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), nodesplitter=None, empty_check=False)
    samples = dataset.shuffle(1000).map(decode)
    batches = DataLoader(samples, BATCH, num_workers=CORES, drop_last=True, persistent_workers=True)

    def first(indices: np.ndarray) -> np.ndarray:
        plain = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None).map(decode)
        return torch.stack(list(itertools.islice(plain, len(indices)))).numpy()

    return forever(batches), first


class PngRows(Dataset[torch.Tensor]):
    """One PNG per slice: three channels of 8 bits, or one of 16."""

    def __init__(self, path: Path) -> None:
        self.folder = path
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


def data_loader(rows: Dataset[torch.Tensor], collate_fn: Callable[[Any], Any] | None = None) -> Opened:
    """A DataLoader with two worker processes, shuffling, whose epoch does not end while it is timed."""
    settings = {"num_workers": CORES, "drop_last": True, "collate_fn": collate_fn}
    loader = DataLoader(rows, BATCH, sampler=RandomSampler(rows, num_samples=LONG_EPOCH), **settings)
    return iter(loader), lambda indices: torch.stack([rows[int(row)] for row in indices]).numpy()


class DicomRows(Dataset[torch.Tensor]):
    """The DICOM files themselves, decoded, windowed and resized by pydicom, NumPy and OpenCV each time."""

    def __init__(self, path: Path) -> None:
        self.files = json.loads(path.read_text())
        spec = open_dataset(path.with_name(LZ4)).spec
        self.size = spec.size
        self.windows = [(window.center, window.width) for window in spec.windows] if spec.store == "windows" else []

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        import cv2
        import pydicom

        cv2.setNumThreads(1)
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        dataset = pydicom.dcmread(self.files[index])
        slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
        hu = np.clip(np.rint(dataset.pixel_array * slope + intercept), MIN_HU, MAX_HU).astype(np.int16)
        if hu.shape != (self.size, self.size):
            hu = cv2.resize(hu, (self.size, self.size), interpolation=cv2.INTER_AREA)
        if not self.windows:
            return torch.from_numpy(hu[np.newaxis])
        planes = [np.rint(np.clip((hu - (c - w / 2)) / w, 0, 1) * 255) for c, w in self.windows]
        return torch.from_numpy(np.stack(planes).astype(np.uint8))


class ArrowRows(Dataset[torch.Tensor]):
    """Hugging Face's dataset over Arrow files that are memory-mapped, formatted as NumPy arrays."""

    def __init__(self, path: Path) -> None:
        import datasets

        parts = [datasets.load_from_disk(str(part)) for part in sorted(path.iterdir())]
        self.rows = datasets.concatenate_datasets(parts).with_format("numpy", dtype=form_of(path.parent)[2])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[index]["image"])

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return torch.from_numpy(self.rows[indices]["image"])


def arrow(path: Path) -> Opened:
    """Hugging Face's dataset in a DataLoader with two workers, which asks for a batch at once."""
    return data_loader(ArrowRows(path), collate_fn=lambda batch: batch)


def cache_dataset(path: Path) -> Opened:
    """MONAI's CacheDataset, all rows held in memory, in a DataLoader with two workers."""
    from monai.data import CacheDataset
    from monai.transforms import Lambda

    rows = MemmapRows(path)
    cached = CacheDataset(range(len(rows)), transform=Lambda(rows.__getitem__), num_workers=CORES, progress=False)
    return data_loader(cached)


CONTENDERS: dict[str, tuple[str, Callable[[Path], Opened]]] = {
    "SliceLoader, lz4": (LZ4, ours),
    "SliceLoader, none": (NONE, ours),
    "memmap gather": (ROWS, memmap_gather),
    "tensorstore": (LZ4, tensorstore),
    "zarr-python": (LZ4, zarr_python),
    "zarr-python with zarrs": (LZ4, with_zarrs),
    "DataLoader over a memmap": (ROWS, lambda path: data_loader(MemmapRows(path))),
    "DataLoader over LMDB": (LMDB, lambda path: data_loader(LmdbRows(path))),
    "DataLoader over HDF5": (HDF5, lambda path: data_loader(Hdf5Rows(path))),
    "DataLoader over PNG": (PNG, lambda path: data_loader(PngRows(path))),
    "DataLoader over DICOM": (DICOM, lambda path: data_loader(DicomRows(path))),
    "MONAI CacheDataset": (ROWS, cache_dataset),
    "Hugging Face datasets": (ARROW, arrow),
    "WebDataset": (TAR, web_dataset),
}


def main() -> None:
    _, folder, name, seconds, slices = sys.argv[1:]
    torch.set_num_threads(1)
    form, open_ = CONTENDERS[name]
    race(partial(open_, Path(folder) / form), seconds=float(seconds), slices=int(slices))


if __name__ == "__main__":
    main()
