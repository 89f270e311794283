"""How fast are whole scans read, compared with a gather of uncompressed pixels and with other loaders of volumes?

    python -m benchmarks.volumes [--question 256] [--series 80] [--seconds 2] [--rounds 5] [--data bench-data]

Shuffled scans in batches of two, two threads or two worker processes; files are in the page cache. The rates are slices of
real depth by second, the medians of rounds in which all take turns. All contenders must return the same pixels. Peers that
are not installed are named as skipped; `make bench-setup` installs them. SliceLoader reads the same slices one by one, in
batches of as many: what it shares with VolumeLoader, reading and decoding, limits both.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.files import phantom
from benchmarks.measure import machine
from ich_prep.build_dataset import build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_train.loader import SliceLoader
from ich_train.scans import scans_of
from ich_train.volume_loader import VolumeLoader

THREADS, BATCH = 2, 2
BUFFERS = 8
EPOCHS = 1000
OURS, LIMIT = "VolumeLoader", "memmap gather"
NOT_JUDGED = ("SliceLoader", "MONAI CacheDataset")  # the second keeps all volumes in memory


@dataclass(frozen=True)
class Question:
    """The form of the pixels, and the share of the limit's rate that VolumeLoader must reach."""

    size: int
    store: Any
    bar: float


QUESTIONS = {"256": Question(256, "windows", 0.8), "hu-512": Question(512, "hu", 0.7)}
PEERS_BAR = 3.0

Batches = Iterator[tuple[Any, int]]  # what was read, and how many slices it has


@dataclass(frozen=True)
class Forms:
    """The same volumes as a dataset, as rows of one array, and as a NIfTI file (x, y, depth, channel) each."""

    dataset: Path
    rows: Path
    volumes: tuple[Path, ...]
    lengths: tuple[int, ...]  # of the volumes
    cache: Path


def prepare(data: Path, question: Question, series: int) -> Forms:
    tree = phantom(data, "volumes", series=series)
    folder = data / f"volumes-{question.store}-{question.size}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "nifti").mkdir(parents=True)
    build(tree, folder / "data.zarr", Spec(size=question.size, store=question.store, layout="folder"), workers=0)
    dataset = open_dataset(folder / "data.zarr")
    scans = scans_of(dataset, np.arange(len(dataset.series)))
    np.save(folder / "rows.npy", dataset.read(scans.rows))
    paths = []
    for k, (first, length) in enumerate(zip(scans.first.tolist(), scans.lengths.tolist(), strict=True)):
        paths.append(folder / "nifti" / f"{k:04}.nii")
        _write_nifti(dataset.read(scans.rows[first : first + length]), paths[-1])
    return Forms(
        folder / "data.zarr", folder / "rows.npy", tuple(paths), tuple(scans.lengths.tolist()), folder / "cache"
    )


def _write_nifti(volume: NDArray[Any], path: Path) -> None:
    try:
        import nibabel
    except ImportError:
        return
    nibabel.save(nibabel.Nifti1Image(volume.transpose(3, 2, 0, 1), np.eye(4)), path)  # type: ignore[no-untyped-call]


def ours(forms: Forms) -> Batches:
    dataset = open_dataset(forms.dataset)
    loader = VolumeLoader(dataset, np.arange(len(dataset.series)), BATCH, threads=THREADS, seed=0)
    for _ in range(EPOCHS):
        for batch in loader:
            yield batch.volumes, batch.slices


def slices(forms: Forms) -> Batches:
    dataset = open_dataset(forms.dataset)
    size = round(BATCH * statistics.mean(forms.lengths))
    loader = SliceLoader(dataset, np.arange(len(dataset)), size, threads=THREADS, seed=0)
    for _ in range(EPOCHS):
        for batch in loader:
            yield batch.images, len(batch.images)


def gather(forms: Forms) -> Batches:
    """The limit: two threads copy the rows of two scans each from a memory map into buffers that are used again."""
    rows = np.load(forms.rows, mmap_mode="r")
    ends = np.cumsum(forms.lengths)
    spans = [np.arange(end - length, end) for end, length in zip(ends, forms.lengths, strict=True)]
    longest = BATCH * max(forms.lengths)
    buffers = [np.empty((longest, *rows.shape[1:]), rows.dtype) for _ in range(BUFFERS)]
    rng = np.random.default_rng(0)
    order = itertools.chain.from_iterable(rng.permutation(len(spans)).tolist() for _ in itertools.count())

    def copy(wanted: list[int], buffer: NDArray[Any]) -> tuple[Any, int]:
        taken = np.concatenate([spans[k] for k in wanted])
        return rows.take(taken, 0, buffer[: len(taken)], "clip"), len(taken)

    with ThreadPoolExecutor(THREADS) as pool:
        pending = [pool.submit(copy, [next(order) for _ in range(BATCH)], buffers[number]) for number in range(THREADS)]
        for number in itertools.count(THREADS):
            yield pending.pop(0).result()
            wanted = [next(order) for _ in range(BATCH)]
            pending.append(pool.submit(copy, wanted, buffers[number % BUFFERS]))


class NiftiVolumes(Dataset[torch.Tensor]):
    """Volumes of NIfTI files, (x, y, depth, channel)."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, k: int) -> torch.Tensor:
        import nibabel

        return torch.from_numpy(np.asarray(nibabel.load(self.paths[k]).dataobj))  # type: ignore[attr-defined]


def _loaded(rows: Any) -> Batches:
    sampler = RandomSampler(rows, num_samples=EPOCHS * len(rows))
    loader = DataLoader(rows, BATCH, sampler=sampler, num_workers=THREADS, collate_fn=list)
    for batch in loader:
        yield batch, sum(one.shape[2] for one in batch)


def nifti(forms: Forms) -> Batches:
    return _loaded(NiftiVolumes(forms.volumes))


def monai_persistent(forms: Forms) -> Batches:
    from monai.data import PersistentDataset

    return _loaded(
        PersistentDataset([*range(len(forms.volumes))], NiftiVolumes(forms.volumes).__getitem__, forms.cache)
    )


def monai_cache(forms: Forms) -> Batches:
    from monai.data import CacheDataset

    volumes = NiftiVolumes(forms.volumes)
    return _loaded(CacheDataset([*range(len(volumes))], volumes.__getitem__, num_workers=1, progress=False))


def _read_nifti(path: Path) -> tuple[torch.Tensor, NDArray[np.float64]]:
    return NiftiVolumes((Path(path),))[0].permute(3, 0, 1, 2), np.eye(4)


def torchio_queue(forms: Forms) -> Batches:
    import torchio

    images = [torchio.Subject(image=torchio.ScalarImage(path, reader=_read_nifti)) for path in forms.volumes]
    subjects = images * EPOCHS
    depth = min(forms.lengths)
    side = int(np.load(forms.rows, mmap_mode="r").shape[-1])
    queue = torchio.Queue(
        torchio.SubjectsDataset(subjects),
        max_length=2 * BATCH,
        samples_per_volume=1,
        sampler=torchio.data.UniformSampler((side, side, depth)),  # patches as deep as the shortest scan
        num_workers=THREADS,
    )
    for batch in DataLoader(queue, BATCH, collate_fn=list, num_workers=0):
        yield batch, BATCH * depth


CONTENDERS: dict[str, Callable[[Forms], Batches]] = {
    OURS: ours,
    LIMIT: gather,
    "SliceLoader": slices,
    "DataLoader over NIfTI": nifti,
    "MONAI PersistentDataset": monai_persistent,
    "TorchIO Queue": torchio_queue,
    "MONAI CacheDataset": monai_cache,
}


def rate(batches: Batches, seconds: float) -> float:
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += next(batches)[1]
    return count / (time.perf_counter() - began)


def main(
    series: int = 80,
    seconds: float = 2.0,
    rounds: int = 5,
    data: Path = Path("bench-data"),
    question: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(QUESTIONS)}.")] = None,
) -> None:
    data = data.absolute()
    data.mkdir(exist_ok=True)
    print(machine())
    for name in question or [*QUESTIONS]:
        forms = prepare(data, QUESTIONS[name], series)
        check_pixels(forms)
        ask(name, QUESTIONS[name], forms, seconds, rounds)


def check_pixels(forms: Forms) -> None:
    """Raise if the rows or the NIfTI files hold other pixels than the dataset."""
    dataset = open_dataset(forms.dataset)
    rows = np.load(forms.rows, mmap_mode="r")
    scans = scans_of(dataset, np.arange(len(dataset.series)))
    length = forms.lengths[0]
    expected = zlib.crc32(dataset.read(scans.rows[:length]).tobytes())
    found = [zlib.crc32(np.ascontiguousarray(rows[:length]).tobytes())]
    if forms.volumes[0].exists():
        volume = NiftiVolumes(forms.volumes)[0].numpy().transpose(2, 3, 1, 0)
        found.append(zlib.crc32(np.ascontiguousarray(volume).tobytes()))
    assert set(found) == {expected}


def ask(name: str, question: Question, forms: Forms, seconds: float, rounds: int) -> None:
    rates: dict[str, list[float]] = {}
    for number, (label, start) in itertools.product(range(rounds), CONTENDERS.items()):
        if number and label not in rates:
            continue
        try:
            with closing(start(forms)) as batches:  # type: ignore[type-var]
                rate(batches, seconds / 2)  # starts workers, touches buffers
                rates.setdefault(label, []).append(rate(batches, seconds))
        except (ImportError, RuntimeError) as error:
            rates.pop(label, None)
            print(f"SKIPPED: {label}: {error}", file=sys.stderr)
    table = Table("", "slices/s", "spread", "VolumeLoader is", "bar", title=f"{name}: {sum(forms.lengths):,} slices")
    for label, found in rates.items():
        times = statistics.median(a / b for a, b in zip(rates[OURS], found, strict=True))
        bar = question.bar if label == LIMIT else PEERS_BAR
        judged = "" if label == OURS or label in NOT_JUDGED else f"{bar:g}: {'met' if times >= bar else 'MISSED'}"
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        table.add_row(label, f"{statistics.median(found):,.0f}", spread, f"{times:.2f} x", judged)
    Console(width=110, highlight=False).print(table)


if __name__ == "__main__":
    typer.run(main)
