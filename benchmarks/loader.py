"""How fast are batches read from the shards, compared with a gather of uncompressed pixels and with other loaders?

    python -m benchmarks.loader [--question 256] [--without NAME] [--slices 4096] [--repeats 5] [--data bench-data]

Random order, batches of 64, two cores. Warm: the files are in the page cache, and the clock runs for ``--seconds`` (see
``racing.steady_rate``) after a warm-up of equal length: touching buffers and maps for the first time can cost more than
filling them. Cold (``--question 256-cold``): the files were dropped from the page cache, and the clock runs from the first
batch until 2,048 different slices have been read. All contenders must return the same pixels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import loader_contenders, pinned_contenders
from benchmarks.files import cohort, evict, warm
from benchmarks.forms import LZ4, PINNED_PYTHON, bytes_of, files_of, prepare
from benchmarks.measure import Run, compete, contest, in_process, publish, ratios, versions
from ich_prep.dataset.dataset import open_dataset


@dataclass(frozen=True)
class Question:
    """What is loaded: the form of the pixels, which share of the slices, from the disk or the page cache."""

    title: str
    size: int
    store: str
    share: float = 1.0
    cold: bool = False


QUESTIONS = {
    "256": Question("3 x 256 x 256 uint8", 256, "windows"),
    "hu-512": Question("1 x 512 x 512 HU", 512, "hu", share=0.5),  # all forms must fit into memory
    "256-cold": Question("3 x 256 x 256 uint8, cold files", 256, "windows", cold=True),
}
OURS, LIMIT = "SliceLoader, lz4", "memmap gather"
COLD_SLICES = 2048
# Its pixels are in memory: a cold disk does not affect it.
NOT_COLD = {"MONAI CacheDataset"}
PACKAGES = (
    *("numpy", "torch", "numcodecs", "opencv-python-headless", "pydicom", "tensorstore", "zarr", "zarrs", "lmdb"),
    *("h5py", "monai", "datasets", "webdataset"),
)
PINNED_PACKAGES = ("ffcv", "mosaicml-streaming", "litdata")
# The form that each contender reads, and the module that runs it.
CONTENDERS = {
    name: (form, module.__name__)
    for module in (loader_contenders, pinned_contenders)
    for name, (form, _) in module.CONTENDERS.items()
}


def main(
    slices: int = 4096,
    repeats: int = 5,
    seconds: float = 1.5,
    data: Path = Path("bench-data"),
    question: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(QUESTIONS)}.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Skip a contender.")] = None,
) -> None:
    for name in question or list(QUESTIONS):
        ask(name, QUESTIONS[name], data.absolute(), slices, repeats, seconds, set(without or ()))


def ask(
    name: str, question: Question, data: Path, slices: int, repeats: int, seconds: float, without: set[str]
) -> None:
    tree = cohort(data, slices=int(slices * question.share))
    folder, missing = prepare(data, tree, size=question.size, store=question.store)
    if question.cold:
        without |= NOT_COLD
    selected = {
        label: contender
        for label, contender in CONTENDERS.items()
        if contender[0] not in missing and label not in without
    }
    files = {form: files_of(folder, form) for form, _ in selected.values()}
    checksums: list[int] = []

    def run(label: str, raised: bool) -> Run:
        form, module = selected[label]
        (evict if question.cold else warm)(files[form])
        python = PINNED_PYTHON if module == pinned_contenders.__name__ else sys.executable
        words = ("race", str(folder), label, str(seconds), str(COLD_SLICES if question.cold else 0))
        result = in_process(module, *words, raised=raised, python=python, seconds=120)
        checksums.append(result["checksum"])
        if checksums[-1] != checksums[0]:
            raise RuntimeError("its pixels differ from those of the other contenders")
        return {**result, "form": form}

    results = compete({label: partial(run, label) for label in selected}, repeats)
    count = len(open_dataset(folder / LZ4))
    sizes = {form: bytes_of(paths) / count for form, paths in files.items()}
    section = contest(
        f"Loader: {question.title}, {count:,} slices, batches of 64, two cores",
        results,
        limit=LIMIT,
        ours=OURS,
        more={
            "KB/slice": lambda one: f"{sizes[one.runs[0]['form']] / 1e3:,.0f}",
            "first batch, s": lambda one: f"{one.median('first_batch'):.2f}",
            "memory, MB": lambda one: f"{one.median('memory') / 1e6:,.0f}",
        },
    )
    section.notes = [f"Skipped: {form}: {why}." for form, why in missing.items()]
    section.notes += [f"Skipped: {label}, which failed." for label in selected if label not in results]
    releases = versions(*PACKAGES)
    if PINNED_PYTHON.exists():
        releases |= versions(*PINNED_PACKAGES, python=PINNED_PYTHON)
    raw = {label: vars(one) for label, one in results.items()}
    publish(f"loader-{name}", [section], releases=releases, ratios=ratios(results, ours=OURS), raw=raw)


if __name__ == "__main__":
    typer.run(main)
