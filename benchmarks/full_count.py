"""A dataset of as many files as RSNA 2019 has, from making it to training on it: seconds and memory of every stage.

    python -m benchmarks.full_count [--files 874035] [--size 64] [--source folder|zip] [--workers N] [--work FOLDER]

Files are copies of a phantom in RSNA's layout, with identifiers and pixels of their own, and RSNA's label file: what
costs by the file costs what it costs there, what costs by the pixel does not. Each stage runs in a process of its own;
memory is the resident set, sampled, of the process that was started (driver) and of the largest of its children (worker).
Measure two sizes on one machine to see what a file costs.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.phantom import synthesize

FULL_COUNT = 874_035
TEMPLATE_SERIES = 40
PIXEL_BYTES, DIGITS = 2, 8  # the number of a copy is written into so many pixels, four bits in each
ADDED_SHARE, CHANGED_SHARE = 0.02, 0.01  # of the files: those that are appended, and whose labels change
SAMPLE_SECONDS = 0.1
SPREAD = 0x9E3779B97F4A7C15  # odd, so that multiples of it are distinct modulo any power of 16
_ID = re.compile(rb"ID_[0-9a-f]{8,10}")


# --- the files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """A slice of the phantom: its folder, bytes, identifiers and labels; these are None in the test set.

    ``identifiers`` have their numbers among the ``total`` of all templates.
    """

    folder: str
    content: bytes
    identifiers: dict[bytes, int]
    total: int
    sop: bytes
    labels: tuple[str, ...] | None


def templates(folder: Path, size: int) -> list[Template]:
    """Return the slices of a small phantom in the layout of RSNA, series by series."""
    synthesize(folder, series=TEMPLATE_SERIES, size=size, layout="rsna", workers=0)
    with (folder / "stage_2_train.csv").open(newline="") as file:
        values = {line["ID"]: line["Label"] for line in csv.DictReader(file)}
    files = [(path, path.read_bytes()) for path in sorted(folder.glob("stage_2_*/*.dcm"))]
    own = [dict.fromkeys(_ID.findall(content, 0, len(content) - size * size * PIXEL_BYTES)) for _, content in files]
    number = {identifier: index for index, identifier in enumerate(sorted(set().union(*own)))}
    found = []
    for (path, content), names in zip(files, own, strict=True):
        labels = tuple(values.get(f"{path.stem}_{name}", "") for name in RSNA_CLASSES)
        identifiers = {name: number[name] for name in names}
        sop = path.stem.encode()
        found.append(Template(path.parent.name, content, identifiers, len(number), sop, labels if labels[0] else None))
    return sorted(found, key=lambda one: (list(one.identifiers)[-1], one.sop))


def renamed(template: Template, copy: int) -> dict[bytes, bytes]:
    """Return the identifiers of the ``copy`` of a template, by those of the template: of equal length, and distinct."""
    names = {}
    for identifier, number in template.identifiers.items():
        digits = len(identifier) - len(b"ID_")
        names[identifier] = b"ID_%0*x" % (digits, (copy * template.total + number) * SPREAD % 16**digits)
    return names


def _with_names(header: bytes, names: dict[bytes, bytes]) -> bytes:
    return _ID.sub(lambda match: names[match[0]], header)


def copies(of: list[Template], start: int, files: int, size: int) -> Iterator[tuple[str, bytes, Template, bytes]]:
    """Yield the path, bytes, template and SOP Instance UID of ``files`` files, from number ``start`` on."""
    for number in range(start, start + files):
        copy, template = number // len(of), of[number % len(of)]
        names = renamed(template, copy)
        first = len(template.content) - size * size * PIXEL_BYTES
        content = bytearray(_with_names(template.content[:first], names) + template.content[first:])
        for digit in range(DIGITS):  # so that no two files have one image
            content[first + digit * PIXEL_BYTES] ^= copy >> 4 * digit & 15
        sop = names[template.sop]
        yield f"{template.folder}/{sop.decode()}.dcm", bytes(content), template, sop


def make(source: Path, of: list[Template], start: int, files: int, size: int) -> int:
    """Write ``files`` files and their label tables to the folder or archive ``source``; return their bytes."""
    written = 0
    with tempfile.TemporaryDirectory(dir=source.parent) as labels, _sink(source) as add:
        train, sample = Path(labels) / "stage_2_train.csv", Path(labels) / "stage_2_sample_submission.csv"
        with train.open("w") as known, sample.open("w") as unknown:
            for file in (known, unknown):
                file.write("ID,Label\n")
            for path, content, template, sop in copies(of, start, files, size):
                add(path, content)
                written += len(content)
                out, values = (unknown, ("0.5",) * 6) if template.labels is None else (known, template.labels)
                for name, value in zip(RSNA_CLASSES, values, strict=True):
                    out.write(f"{sop.decode()}_{name},{value}\n")
        for table in (train, sample):
            add(table.name, table.read_bytes())
    return written


@contextmanager
def _sink(source: Path) -> Iterator[Callable[[str, bytes], None]]:
    if source.suffix == ".zip":
        with zipfile.ZipFile(source, "w") as archive:
            yield archive.writestr
        return
    for name in ("stage_2_train", "stage_2_test"):
        (source / name).mkdir(parents=True)

    def write(path: str, content: bytes) -> None:
        (source / path).write_bytes(content)

    yield write


def changed_labels(train: Iterator[str], out: Path) -> None:
    """Write a whole label file in which some slices have another subtype."""
    every = round(1 / CHANGED_SHARE)
    with out.open("w") as file:
        file.write(next(train))
        for number, line in enumerate(train):
            name, value = line.rstrip().rsplit(",", 1)
            slice_number, column = divmod(number, len(RSNA_CLASSES))
            if slice_number % every == 0:
                value = "1" if column in (0, len(RSNA_CLASSES) - 1) else value
            file.write(f"{name},{value}\n")


# --- the stages ------------------------------------------------------------------------------------------------------


def build(data: Path, source: Path, workers: int, size: int) -> dict[str, float]:
    from ich_prep.build_dataset import build as run
    from ich_prep.dataset.spec import Spec

    return run(source, data, Spec(size=size, layout="rsna"), workers=workers).seconds


def verify(data: Path) -> dict[str, float]:
    from ich_prep.progress import NoProgress
    from ich_prep.verify import verify as run

    problems = run(data, progress=NoProgress()).problems
    if problems:
        raise SystemExit(f"{len(problems)} problems, the first {problems[0]}")
    return {}


def open_tables(data: Path) -> dict[str, float]:
    from ich_prep.dataset import open_dataset

    dataset = open_dataset(data)
    return {"labels": float(len(dataset.labels)), "series": float(len(dataset.series))}


def first_batch(data: Path) -> dict[str, float]:
    from ich_prep.dataset import open_dataset
    from ich_train.loader import SliceLoader

    start = time.perf_counter()
    next(iter(SliceLoader(open_dataset(data), batch_size=64)))
    return {"without imports": time.perf_counter() - start}


def append(data: Path, more: Path, workers: int) -> dict[str, float]:
    from ich_prep.append import append as run

    return {"appended": float(run(more, data, workers=workers).slices)}


def relabel(data: Path, labels: Path) -> dict[str, float]:
    from ich_prep.relabel import relabel as run

    return {"relabelled": float(run(data, labels, allow_missing_images=True).slices)}


STAGES: dict[str, Callable[..., dict[str, float]]] = {
    "build": build, "verify": verify, "open": open_tables, "first batch": first_batch, "append": append,
    "relabel": relabel,
}  # fmt: skip


@dataclass
class Peaks:
    """Samples of the resident set in MiB: seconds since the start, of the driver, of its largest child."""

    samples: list[tuple[float, float, float]]

    def between(self, start: float, end: float) -> tuple[float, float]:
        """Return the peaks of driver and worker in a span of time."""
        inside = [sample[1:] for sample in self.samples if start <= sample[0] <= end]
        driver, worker = np.max(inside, axis=0) if inside else (0.0, 0.0)
        return float(driver), float(worker)


def watched(stage: str, *words: object) -> tuple[float, dict[str, float], Peaks]:
    """Run a stage in a process of its own; return its seconds, what it says, and its memory."""
    command = [sys.executable, "-m", "benchmarks.full_count", "--stage", stage, *(f"--word={word}" for word in words)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = Peaks([])
    watcher = threading.Thread(target=_watch, args=(process.pid, start, peaks))
    watcher.start()
    said, _ = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{stage} failed: {said}")
    return seconds, json.loads(said.splitlines()[-1]), peaks


def _watch(pid: int, start: float, peaks: Peaks) -> None:
    try:
        driver = psutil.Process(pid)
        while True:
            children = [_resident(child) for child in driver.children(recursive=True)]
            now = time.perf_counter() - start
            peaks.samples.append((now, _resident(driver), max(children, default=0.0)))
            time.sleep(SAMPLE_SECONDS)
    except psutil.NoSuchProcess:
        return


def _resident(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / (1 << 20)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0.0


# --- the benchmark -----------------------------------------------------------------------------------------------------


def measure(files: int, size: int, source: str, workers: int, work: Path) -> list[dict[str, Any]]:
    """Make the files in the folder ``work``, run all stages, and return a line for each."""
    lines: list[dict[str, Any]] = []
    suffix = ".zip" if source == "zip" else ""
    first, more, data = work / f"rsna{suffix}", work / "more" / f"rsna{suffix}", work / "data.zarr"
    more.parent.mkdir()
    of = templates(work / "phantom", size)
    added = max(1, round(files * ADDED_SHARE))

    def add(stage: str, seconds: float, driver: float = 0.0, worker: float = 0.0) -> None:
        lines.append({"stage": stage, "seconds": seconds, "driver_mib": driver, "worker_mib": worker})
        typer.echo(f"{stage:<24} {seconds:9.2f} s  driver {driver:7,.0f} MiB  worker {worker:7,.0f} MiB")

    start = time.perf_counter()
    make(first, of, 0, files, size)
    make(more, of, files, added, size)
    add("make", time.perf_counter() - start)
    with _label_file(first) as train:
        changed_labels(train, work / "changed.csv")

    for stage, words in (
        ("build", (data, first, workers, size)),
        ("verify", (data,)),
        ("open", (data,)),
        ("first batch", (data,)),
        ("append", (data, more, workers)),
        ("verify", (data,)),
        ("relabel", (data, work / "changed.csv")),
        ("open", (data,)),
    ):
        seconds, said, peaks = watched(stage, *words)
        add(stage, seconds, *peaks.between(0, seconds))
        if stage == "build":
            end = seconds  # the stages are its last part: before them, it imports
            spans = list(said.items())
            at = end - sum(value for _, value in spans)
            for name, value in spans:
                add(f"  {name}", value, *peaks.between(at, at + value))
                at += value
        elif said:
            typer.echo(f"  {', '.join(f'{value:,.10g} {name}' for name, value in said.items())}")
    return lines


@contextmanager
def _label_file(source: Path) -> Iterator[Iterator[str]]:
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive, archive.open("stage_2_train.csv") as member:
            yield (line.decode() for line in member)
        return
    with (source / "stage_2_train.csv").open() as file:
        yield file


def main(
    files: int = FULL_COUNT,
    size: int = 64,
    source: Annotated[str, typer.Option(help="folder or zip.")] = "folder",
    workers: int = 2,
    work: Annotated[Path | None, typer.Option(help="An empty folder with room; removed afterwards.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the lines to this JSON file, too.")] = None,
    stage: Annotated[str | None, typer.Option(hidden=True)] = None,
    word: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
) -> None:
    if stage is not None:
        words = [int(text) if text.isdigit() else Path(text) for text in word or ()]
        typer.echo(json.dumps(STAGES[stage](*words)))
        return
    place = Path(tempfile.mkdtemp(dir=work, prefix="full_count-"))
    try:
        lines = measure(files, size, source, workers, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if out is not None:
        out.write_text(json.dumps({"files": files, "size": size, "source": source, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
