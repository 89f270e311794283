"""Does training keep a GPU as busy as with batches already on it? How do other settings and other loaders compare?

    python -m benchmarks.training [--question resnet50-256] [--seconds 3] [--repeats 5] [--data bench-data]

Needs a GPU. All contenders run the step of ``ich-train run`` (augmentation, network, loss, gradients, update) in one process
on two cores, which also read the data.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.files import cohort
from benchmarks.forms import LZ4, PNG, ROWS, prepare
from benchmarks.loader_contenders import LONG_EPOCH, MemmapRows, PngRows
from benchmarks.measure import Result, Run, Section, compete, publish, ratio, ratios, versions
from benchmarks.racing import BATCH, CORES
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import open_dataset
from ich_train.config import TrainConfig
from ich_train.loader import Batch, SliceLoader
from ich_train.ranks import Ranks, join_ranks, own_stream
from ich_train.session import Session
from ich_train.session import prepare as prepare_training
from ich_train.to_device import to_device

WARM_STEPS = 20
RESIDENT = 8  # batches


@dataclass(frozen=True)
class Question:
    """What is trained, and on what; ``peers``: also with other loaders; ``compiled``: also with ``torch.compile``."""

    title: str
    size: int
    store: str
    settings: dict[str, Any]
    peers: bool = True
    compiled: bool = True


QUESTIONS = {
    "baseline-256": Question("baseline, 3 x 256 x 256 uint8", 256, "windows", {"model": "baseline"}, compiled=False),
    "resnet50-256": Question("ResNet-50, 3 x 256 x 256 uint8", 256, "windows", {"model": "resnet50"}),
    "resnet50-hu-512": Question(
        "ResNet-50, HU of 512 x 512, three neighbours in three windows",
        512,
        "hu",
        {"model": "resnet50", "context": 1, "windows": ("brain", "subdural", "bone"), "window_jitter": 0.1},
        peers=False,
    ),
}
LIMIT, OURS = "batches that lie on the GPU", "ich-train"
COMPILED, COMPILED_LIMIT = "ich-train, compile = true", "batches that lie on the GPU, compile = true"


class Resident:
    """The same few batches on the GPU, repeated endlessly."""

    wait_seconds = 0.0

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return itertools.cycle(self.batches)


class Fed:
    """The pinned batches of a DataLoader with two worker processes; all labels are 0."""

    def __init__(self, rows: Any) -> None:
        self.loader = DataLoader(
            rows,
            BATCH,
            sampler=RandomSampler(rows, num_samples=LONG_EPOCH),
            num_workers=CORES,
            drop_last=True,
            pin_memory=True,
        )
        self.labels = torch.zeros((BATCH, len(RSNA_CLASSES)), dtype=torch.int8)
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        rows = torch.zeros(BATCH, dtype=torch.int64)
        before = time.perf_counter()
        for images in self.loader:
            self.wait_seconds += time.perf_counter() - before
            yield Batch(images, self.labels, rows)
            before = time.perf_counter()


def pace(session: Session, source: Any, seconds: float) -> Run:
    """Return slices/s of training on the batches of ``source``, and the share of the time spent waiting for them."""
    device = session.ranks.device
    session.model.train()
    taken, start, waited = 0, 0.0, 0.0
    for number, batch in enumerate(to_device(source, device)):
        if number == WARM_STEPS:
            _settle(device)
            taken, start, waited = 0, time.perf_counter(), source.wait_seconds
        if number > WARM_STEPS and time.perf_counter() - start > seconds:
            _settle(device)
            elapsed = time.perf_counter() - start  # before the workers of a DataLoader end
            break
        session.step(batch.images, batch.labels, rate=1e-4, seed=number)
        taken += len(batch.rows)
    return {"rate": taken / elapsed, "waiting": (source.wait_seconds - waited) / elapsed}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def contenders(question: Question, folder: Path, seconds: float, ranks: Ranks) -> dict[str, Callable[[bool], Run]]:
    """Return the contenders, compiled, with CUDA graphs recorded."""
    dataset = open_dataset(folder / LZ4)

    def training(**changed: Any) -> Session:
        settings = TrainConfig.model_validate({"batch_size": BATCH, "threads": CORES} | question.settings | changed)
        return prepare_training(dataset, settings, ranks, weights=None)

    usual, without_graph = training(), training(cuda_graph=False)
    rows = np.resize(usual.loader.rows, LONG_EPOCH)
    loader = SliceLoader(dataset, rows, BATCH, threads=CORES, context=usual.settings.context, drop_last=True)
    resident = Resident(
        [
            Batch(batch.images.to(ranks.device), batch.labels.to(ranks.device), batch.rows.clone())
            for batch in itertools.islice(loader, RESIDENT)
        ]
    )
    pairs: dict[str, tuple[Session, Any]] = {
        LIMIT: (usual, resident),
        OURS: (usual, loader),
        "ich-train, cuda_graph = false": (without_graph, loader),
    }
    if question.compiled:
        compiled = training(compile=True)
        pairs |= {COMPILED_LIMIT: (compiled, resident), COMPILED: (compiled, loader)}
    if question.peers:
        pairs["DataLoader over a memmap"] = (usual, Fed(MemmapRows(folder / ROWS)))
        pairs["DataLoader over PNG"] = (usual, Fed(PngRows(folder / PNG)))
    for one in {id(one): one for one, _ in pairs.values()}.values():
        pace(one, resident, 0.0)
    return {name: partial(_in_turn, one, source, seconds) for name, (one, source) in pairs.items()}


def _in_turn(session: Session, source: Any, seconds: float, raised: bool) -> Run:
    if isinstance(source, SliceLoader):
        source.set_epoch(0)
    return pace(session, source, seconds)


def stay_on(cores: set[int]) -> None:
    """Pin all threads of this process, and those they start, to ``cores``."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def table(question: Question, results: dict[str, Result]) -> Section:
    lines = []
    for name, one in results.items():
        limit = results[COMPILED_LIMIT if name in (COMPILED, COMPILED_LIMIT) else LIMIT]
        waiting = statistics.median(run["waiting"] for run in one.runs)
        shares = f"{ratio(one, limit):.2f}", f"{ratio(one, results[OURS]):.2f} x"
        lines.append([name, f"{one.median():,.0f}", one.spread, *shares, f"{waiting:.1%}"])
    header = ["", "slices/s", "spread", "of batches on the GPU", f"of {OURS}", "waiting for data"]
    return Section(f"Training on {torch.cuda.get_device_name()}, two cores: {question.title}", header, lines)


def main(
    question: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(QUESTIONS)}. Default: all.")] = None,
    slices: int = 4096,
    repeats: int = 5,
    seconds: float = 3.0,
    data: Path = Path("bench-data"),
) -> None:
    if not torch.cuda.is_available():
        print("No GPU was found: nothing was trained, and the last results are kept.")
        return
    data = data.absolute()
    tree = cohort(data, slices=slices)
    everywhere = os.sched_getaffinity(0)
    for name in track(question or list(QUESTIONS), "training", transient=True):
        chosen = QUESTIONS[name]
        only = {LZ4, ROWS, PNG} if chosen.peers else {LZ4}
        folder, _ = prepare(data, tree, size=chosen.size, store=chosen.store, only=only)
        with join_ranks("cuda") as ranks, own_stream(ranks.device):
            ready = contenders(chosen, folder, seconds, ranks)
            stay_on(set(sorted(everywhere)[:CORES]))
            results = compete(ready, repeats, both_settings=False)
            stay_on(everywhere)
        publish(
            f"training-{name}",
            [table(chosen, results)],
            releases=versions("torch", "numpy", "numcodecs"),
            ratios=ratios(results, ours=OURS),
            raw={label: one.runs for label, one in results.items()},
        )
        del ready, results
        torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
