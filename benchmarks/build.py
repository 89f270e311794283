"""How fast is a build, compared with the limit of the machine and with hand-written scripts?

    python -m benchmarks.build [--question windows-512] [--slices 8192] [--repeats 5] [--data bench-data]

Two processes each; start-up is not timed. The limit is two bare processes that only read, window, compress and
write the same files. Question ``syntaxes`` measures for each transfer syntax how fast slices are decoded and written.
"""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.files import REAL, SYNTAXES, cohort, evict, in_syntax, real_cohort, warm
from benchmarks.measure import (
    Result,
    Run,
    Section,
    compete,
    contest,
    in_process,
    publish,
    ratio,
    ratios,
    undisturbed,
    versions,
)


@dataclass(frozen=True)
class Question:
    """A dataset to build: its form, its source (real files or the phantom), read from the disk or from the page cache."""

    title: str
    size: int
    store: str
    real: bool = False
    cold: bool = False


QUESTIONS = {
    "windows-512": Question("three windows, 512 x 512", 512, "windows"),
    "windows-256": Question("three windows, 256 x 256 from 512 x 512", 256, "windows"),
    "hu-512": Question("HU, 512 x 512", 512, "hu"),
    "real-windows-512": Question("real CT, three windows, 512 x 512", 512, "windows", real=True),
    "cold-windows-512": Question("cold files, three windows, 512 x 512", 512, "windows", cold=True),
}
SYNTAX_QUESTION, SYNTAX_SLICES = "syntaxes", 1024
FEWER_SLICES = 2000  # of real and of cold files
OURS, DECODE, LIMIT = "ich-prep build", "its decode stage alone", "two bare processes"
PEERS = {
    "pool of pydicom + NumPy + PNG": "png pool",
    "pool of SimpleITK + .npy": "simpleitk",
    "pool of MONAI transforms + .npy": "monai",
    "dask.array + zarr-python": "dask and zarr",
    "dcm2niix": "dcm2niix",
}
PACKAGES = (
    *("pydicom", "numpy", "opencv-python-headless", "numcodecs", "dask", "pyarrow", "zarr"),
    *("SimpleITK", "simpleitk", "monai", "pylibjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "imagecodecs"),
)


def main(
    slices: int = 8192,
    repeats: int = 5,
    data: Path = Path("bench-data"),
    question: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join([*QUESTIONS, SYNTAX_QUESTION])}.")
    ] = None,
) -> None:
    data = data.absolute()
    for name in question or [*QUESTIONS, SYNTAX_QUESTION]:
        if name == SYNTAX_QUESTION:
            ask_syntaxes(data, repeats)
        else:
            ask(name, QUESTIONS[name], data, slices, repeats)


def ask(name: str, question: Question, data: Path, slices: int, repeats: int) -> None:
    if question.real:
        tree = real_cohort(data, slices=FEWER_SLICES)
    else:
        tree = cohort(data, slices=FEWER_SLICES if question.cold else slices)
    if tree is None:
        typer.echo(f"Skipped: {question.title}: no files at {REAL}.")
        return
    files = sorted(tree.rglob("*.dcm"))
    if not question.cold:
        warm(files)
    layout = "folder" if question.real else "rsna"

    def run(contender: str, raised: bool) -> Run:
        if question.cold:
            evict(files)
        return contend(contender, tree, data / "out", question.size, question.store, layout, raised=raised)

    names = {OURS: "ours", LIMIT: "limit", f"{LIMIT}, synced": "limit on disk"}
    names |= {f"{LIMIT}, OpenCV and blosc": "limit of libraries"} | PEERS
    skipped = []
    if shutil.which("dcm2niix") is None:
        skipped = ["Skipped: dcm2niix, which is not installed."]
        del names["dcm2niix"]
    results = compete({label: partial(run, contender) for label, contender in names.items()}, repeats)
    mine = results[OURS].runs
    decoding = [{**one, "rate": one["slices"] / one["stages"]["shards"], "bytes": 0} for one in mine]
    results = {OURS: results[OURS], DECODE: Result(decoding), **results}
    kilobytes = {"KB/slice": lambda one: f"{one.runs[0]['bytes'] / one.runs[0]['slices'] / 1e3:,.0f}".lstrip("0")}
    title = f"Build: {question.title}, {mine[0]['slices']:,} slices, 2 processes"
    section = contest(title, results, limit=LIMIT, ours=OURS, more=kilobytes)
    stages = {stage: statistics.median(one["stages"][stage] for one in mine) for stage in mine[0]["stages"]}
    seconds_text = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items())
    skipped += [f"Skipped: {label}, which failed." for label in names if label not in results]
    section.notes = [
        f"Seconds of each stage of ours: {seconds_text} (listing and start-up do not count in the rate).",
        *skipped,
    ]
    raw = {label: vars(one) for label, one in results.items()}
    publish(f"build-{name}", [section], releases=versions(*PACKAGES), ratios=ratios(results, ours=OURS), raw=raw)


def ask_syntaxes(data: Path, repeats: int) -> None:
    """Measure ours and the PNG pool on the same slices in each transfer syntax; both decode with the same plugins."""
    lines, skipped, shares, raw = [], [], {}, {}
    header = [
        "",
        "KB/file",
        "scan and decode, slices/s",
        "spread",
        "PNG pool, slices/s",
        "spread",
        "scan and decode is",
    ]
    for name in SYNTAXES:
        tree = in_syntax(data, name, slices=SYNTAX_SLICES)
        files = sorted(tree.iterdir())
        warm(files)

        def run(contender: str, tree: Path, raised: bool) -> Run:
            result = contend(contender, tree, data / "out", 512, "windows", "folder", raised=raised)
            if contender == "ours":
                result["rate"] = result["slices"] / sum(result["stages"][stage] for stage in ("scan", "shards"))
            return result

        names = {OURS: "ours", "PNG": "png pool"}
        results = compete({label: partial(run, contender, tree) for label, contender in names.items()}, repeats)
        if len(results) < len(names):
            skipped.append(f"Skipped: {name}, where a contender failed.")
            continue
        ours, png = results[OURS], results["PNG"]
        shares[name] = ratio(ours, png)
        raw[name] = {label: vars(one) for label, one in results.items()}
        size = sum(path.stat().st_size for path in files) / len(files) / 1e3
        lines.append([name, f"{size:,.0f}", f"{ours.median():,.0f}", ours.spread, f"{png.median():,.0f}", png.spread])
        lines[-1].append(f"{shares[name]:.2f} x")
    title = f"Build: by transfer syntax, three windows, 512 x 512, {SYNTAX_SLICES} slices, 2 processes"
    section = Section(title, header, lines, skipped)
    publish("build-syntaxes", [section], releases=versions(*PACKAGES), ratios=shares, raw=raw)


def contend(
    name: str, tree: Path, out: Path, size: int, store: str, layout: str, *, workers: int = 2, raised: bool = True
) -> dict[str, Any]:
    """Run one contender in its own process, and again if much CPU time was stolen meanwhile."""
    words = (name, str(tree), str(out), str(size), store, layout, str(workers))
    return undisturbed(partial(in_process, "benchmarks.build_contenders", *words, raised=raised))


if __name__ == "__main__":
    typer.run(main)
