"""What does it cost to leave the slices in their archive, and how long does the listing of a large one take?

    python -m benchmarks.archives [--slices 2048] [--repeats 5] [--members 874035] [--data bench-data]

A folder, a stored and a deflated archive of it are built in turn, by two processes each. The limit of the deflated one is
the folder's build or two bare processes that only inflate, whichever is slower.
"""

from __future__ import annotations

import importlib.util
import statistics
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import IO

import typer

from benchmarks.build import contend
from benchmarks.files import cohort, once, warm
from benchmarks.measure import Result, Run, Section, compete, in_process, publish, ratio, undisturbed, versions

FOLDER, STORED, DEFLATED = "folder", "stored archive", "deflated archive"
INFLATE = "two bare processes that only inflate"
FASTEST = f"{INFLATE}, by ISA-L"
SPAN = 210_000  # bytes from one member to the next, as in RSNA's archive
BEYOND = 0xFFFFFFFF


def main(slices: int = 2048, repeats: int = 5, members: int = 874_035, data: Path = Path("bench-data")) -> None:
    data = data.absolute()
    sections, results = build_in_turn(data, slices, repeats)
    lists = list_in_turn(data, members, repeats)
    publish(
        "build-archives",
        [sections, lists],
        releases=versions("isal", "numpy", "pyarrow"),
        ratios={name: ratio(results[name], results[FOLDER]) for name in (STORED, DEFLATED)},
        raw={label: vars(one) for label, one in results.items()},
    )


def build_in_turn(data: Path, slices: int, repeats: int) -> tuple[Section, dict[str, Result]]:
    """Return the table of the builds from a folder and from archives, and the runs."""
    tree = cohort(data, slices=slices)
    archives = {
        STORED: packed(data, tree, zipfile.ZIP_STORED),
        DEFLATED: packed(data, tree, zipfile.ZIP_DEFLATED),
    }
    warm([*sorted(tree.rglob("*.dcm")), *archives.values()])

    def build(src: Path, raised: bool) -> Run:
        return contend("ours", src, data / "out", 512, "windows", "rsna", raised=raised)

    def inflate(library: str, raised: bool) -> Run:
        run = partial(in_process, "benchmarks.archive_contenders", f"inflate by {library}", str(archives[DEFLATED]))
        return undisturbed(partial(run, raised=raised))

    contenders = {FOLDER: partial(build, tree), **{name: partial(build, path) for name, path in archives.items()}}
    contenders[INFLATE] = partial(inflate, "zlib")
    if importlib.util.find_spec("isal") is not None:
        contenders[FASTEST] = partial(inflate, "ISA-L")
    results = compete(contenders, repeats, both_settings=False)
    lines = []
    for name, one in results.items():
        share = f"{ratio(one, results[FOLDER]):.2f}" if name in (FOLDER, STORED, DEFLATED) else ""
        limits = [
            f"{of_the_slower(one, results[FOLDER], results[by]):.2f}" for by in (INFLATE, FASTEST) if by in results
        ]
        lines.append([name, f"{one.median():,.0f}", one.spread, share, " / ".join(limits) if name == DEFLATED else ""])
    header = ["", "slices/s", "spread", "of the folder", "of the slower of folder and inflating (zlib / ISA-L)"]
    title = f"Build: from archives, three windows, 512 x 512, {results[FOLDER].runs[0]['slices']:,} slices, 2 processes"
    inflates_by = "ISA-L" if FASTEST in results else "zlib: ISA-L is not installed here"
    return Section(title, header, lines, [f"The builds inflate by {inflates_by}."]), results


def of_the_slower(one: Result, *others: Result) -> float:
    """Return the median over the rounds of the ratio of ``one`` to the slowest of the ``others``."""
    rounds = zip(*(other.runs for other in others), strict=True)
    slowest = [min(run["rate"] for run in runs) for runs in rounds]
    return statistics.median(run["rate"] / rate for run, rate in zip(one.runs, slowest, strict=True))


def list_in_turn(data: Path, members: int, repeats: int) -> Section:
    """Return the table of listing an archive with as many members as RSNA's."""
    archive = once(data, f"members-{members}.zip", partial(write_directory, members))
    names = {"ours": "list", "zipfile": "list by zipfile"}
    results = compete(
        {
            label: lambda raised, name=name: in_process(  # type: ignore[misc]
                "benchmarks.archive_contenders", name, str(archive), raised=raised
            )
            for label, name in names.items()
        },
        repeats,
        both_settings=False,
    )
    lines = [
        [name, f"{one.median('seconds'):.1f}", f"{one.median('memory') / 2**20:,.0f}"] for name, one in results.items()
    ]
    note = "Importing PyArrow and this project takes about 70 MiB of the memory."
    return Section(f"Listing an archive of {members:,} members", ["", "seconds", "peak MiB"], lines, [note])


def packed(data: Path, tree: Path, method: int) -> Path:
    """Return an archive of ``tree``, made once."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as file:
            for one in sorted(path for path in tree.rglob("*") if path.is_file()):
                file.write(one, one.relative_to(tree))

    return once(data, f"{tree.name}-{'stored' if method == zipfile.ZIP_STORED else 'deflated'}.zip", write)


def write_directory(members: int, path: Path) -> None:
    """Write an archive that consists of a directory after a hole in the file: Zip64, as RSNA's."""
    start = members * SPAN
    with path.open("wb") as file:
        file.seek(start)
        length = sum(_write_record(file, number) for number in range(members))
        end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, members, members, length, start)
        file.write(end + struct.pack("<4sIQI", b"PK\x06\x07", 0, start + length, 1))
        file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, BEYOND, BEYOND, 0))


def _write_record(file: IO[bytes], number: int) -> int:
    offset = number * SPAN
    name = b"rsna-intracranial-hemorrhage-detection/stage_2_train/ID_%09x.dcm" % number
    extra = struct.pack("<HHQ", 1, 8, offset) if offset >= BEYOND else b""
    numbers = (45, 3, 20, 0, 8, 0, 0, number, SPAN - 9000, 525_000, len(name), len(extra), 0, 0, 0, 0o100644 << 16)
    record = struct.pack("<4sBBHHHHHIIIHHHHHII", b"PK\x01\x02", *numbers, min(offset, BEYOND)) + name + extra
    return file.write(record)


if __name__ == "__main__":
    typer.run(main)
