"""How fast do batches come from the shards, against a gather of uncompressed pixels and against other loaders?

    python -m benchmarks.loader [--question 256] [--without NAME] [--slices 4096] [--repeats 5] [--data bench-data]

Random order, batches of 64, two cores. Warm: the files lie in the page cache, and the clock runs from the second batch.
Cold (``--question 256-cold``): they were dropped from it, and the clock runs from the opening until 1,024 different
slices have come. All contenders must give the same pixels.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from benchmarks import loader_contenders, pinned_contenders
from benchmarks.files import cohort
from benchmarks.forms import PINNED_PYTHON, bytes_of, evict, files_of, prepare, warm
from benchmarks.measure import Run, compete, contest, in_process, publish, ratios, versions
from ich_prep.store import open_dataset

# Title, size, kind of store, share of the slices, cold.
QUESTIONS = {
    "256": ("3 x 256 x 256 uint8", 256, "windows", 1.0, False),
    "hu-512": ("1 x 512 x 512 HU", 512, "hu", 0.5, False),
    "256-cold": ("3 x 256 x 256 uint8, cold files", 256, "windows", 1.0, True),
}
OURS, LIMIT = "SliceLoader, lz4", "memmap gather"
COLD_SLICES = 1024
# What takes its pixels from memory, or decodes the source again, says nothing about a cold disk.
NOT_COLD = {"MONAI CacheDataset", "zarr-python", "zarr-python with zarrs"}
PACKAGES = (
    *("numpy", "torch", "numcodecs", "opencv-python-headless", "pydicom", "tensorstore", "zarr", "zarrs", "lmdb"),
    *("h5py", "monai", "datasets", "webdataset"),
)
PINNED_PACKAGES = ("ffcv", "mosaicml-streaming", "litdata")


def contend(
    module: str, folder: Path, name: str, form: str, seconds: float, cold: bool, checksums: set[int], raised: bool
) -> Run:
    """Run one contender; ``checksums`` gathers what the pixels of all add up to."""
    python: Any = {"python": PINNED_PYTHON} if module == pinned_contenders.__name__ else {}
    if cold:
        evict(files_of(folder, form))
    slices = str(COLD_SLICES if cold else 0)
    run = in_process(module, "race", str(folder), name, str(seconds), slices, raised=raised, seconds=120, **python)
    checksums.add(run["checksum"])
    if len(checksums) != 1:
        raise RuntimeError(f"{name} gives other pixels than those before it.")
    return run


def main(
    slices: int = 4096,
    repeats: int = 5,
    seconds: float = 1.5,
    data: Path = Path("bench-data"),
    question: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(QUESTIONS)}.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Leave a contender out.")] = None,
) -> None:
    data = data.absolute()
    for name in question or list(QUESTIONS):
        title, size, store, share, cold = QUESTIONS[name]
        folder = data / f"loader-{name.removesuffix('-cold')}"
        left_out = prepare(folder, cohort(data, slices=int(slices * share)), size=size, store=store)
        count = len(open_dataset(folder / "lz4.zarr"))
        sizes, contenders, checksums = {}, {}, set()
        for module in (loader_contenders, pinned_contenders):
            for label, (form, _) in module.CONTENDERS.items():
                if form in left_out or label in (without or ()) or (cold and label in NOT_COLD):
                    continue
                sizes[label] = bytes_of(files_of(folder, form)) / count
                run = partial(contend, module.__name__, folder, label, form, seconds, cold, checksums)
                contenders[label] = run
        if not cold:
            for form in track(sorted({form for form, _ in all_contenders() if form not in left_out}), "Warming files"):
                warm(files_of(folder, form))
        found = compete(contenders, repeats)
        section = contest(
            f"Loader: {title}, {count:,} slices, batches of 64, two cores",
            found,
            limit=LIMIT,
            ours=OURS,
            more={
                "KB/slice": lambda one: "",
                "first batch, s": lambda one: f"{one.median('first_batch'):.2f}",
                "memory, MB": lambda one: f"{one.median('memory') / 1e6:,.0f}",
            },
        )
        at = section.header.index("KB/slice")
        for line in section.lines:
            line[at] = f"{sizes[line[0]] / 1e3:,.0f}"
        section.notes = [f"Left out: {form}: {why}." for form, why in left_out.items()]
        section.notes += [f"Left out: {label}, which failed." for label in contenders if label not in found]
        publish(
            f"loader-{name}",
            [section],
            releases={**versions(*PACKAGES), **versions(*PINNED_PACKAGES, python=PINNED_PYTHON)},
            ratios=ratios(found, ours=OURS),
            raw={label: vars(one) for label, one in found.items()},
        )


def all_contenders() -> list[tuple[str, str]]:
    """Return the form and the name of every contender."""
    both = {**loader_contenders.CONTENDERS, **pinned_contenders.CONTENDERS}
    return [(form, name) for name, (form, _) in both.items()]


if __name__ == "__main__":
    typer.run(main)
