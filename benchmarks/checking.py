"""What the checks of identity cost a loader and a build.

    python -m benchmarks.checking [--slices 3072] [--size 256] [--repeats 15] [--data bench-data]

The loader reads epochs of a warm dataset in turn with the checks and without: of each chunk against the checksum in its
row, of the tables against their digests and ranges. Its CPU time is compared, of opening, tables and one epoch together,
because the wall clock of a machine that others use says little; the median and the spread of the ratios of neighbours are
printed. The build is made in this process; its share is the CPU time within the functions that check whose slices there are,
and whether a file is the one that was scanned.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.files import cohort, once
from ich_prep.build_dataset import build
from ich_prep.dataset import dataset as reading
from ich_prep.dataset import tables
from ich_prep.dataset.spec import Spec
from ich_prep.dicom import decode
from ich_prep.files import read_regular
from ich_prep.stages import plan, plan_tables, publish
from ich_train.loader import SliceLoader

BATCH = 64
CALIBRATIONS = 10_000


@contextmanager
def without_checks() -> Iterator[None]:
    """Read tables and chunks as if no check of identity had been written; the root's own digest is still compared."""

    def read_any(path: Path, *, columns: Sequence[str] | None, lines: int, sha256: str) -> pa.Table:
        with pq.ParquetFile(tables.in_arrow_memory(read_regular(path)), page_checksum_verification=True) as file:
            return file.read(columns)

    with (
        mock.patch.object(reading, "_checksums", lambda slices: None),
        mock.patch.object(reading, "table_problem", lambda *_: None),
        mock.patch.object(reading, "read_published", read_any),
    ):
        yield


def epoch(data: Path, seed: int) -> float:
    """Open the dataset and read one epoch in one thread; return the CPU seconds."""
    start = time.process_time()
    with reading.open_dataset(data) as dataset:
        for _ in SliceLoader(dataset, batch_size=BATCH, seed=seed, threads=1):
            pass
    return time.process_time() - start


class Watch:
    """The CPU seconds within functions, by name, without what measuring takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call`` with its time counted as that of ``name``."""

        def watched(*args: Any, **options: Any) -> Any:
            start = time.thread_time()
            result = call(*args, **options)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - start
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        return watched

    @contextmanager
    def watching(self, *places: tuple[Any, str]) -> Iterator[None]:
        """Watch these functions (module, name)."""
        with ExitStack() as stack:
            for module, name in places:
                stack.enter_context(mock.patch.object(module, name, self.around(name, getattr(module, name))))
            yield
        nothing = Watch()
        for _ in range(CALIBRATIONS):
            nothing.around("", lambda: None)()
        for name, calls in self.calls.items():
            self.seconds[name] -= calls * nothing.seconds[""] / CALIBRATIONS


def main(slices: int = 3072, size: int = 256, repeats: int = 15, data: Path = Path("bench-data")) -> None:
    tree = cohort(data.absolute(), slices=slices)
    spec = Spec(size=size)
    dataset = once(data.absolute(), f"checked-{size}-{slices}.zarr", lambda out: build(tree, out, spec))
    epoch(dataset, 0)
    ratios, plain = [], []
    for repeat in range(repeats):
        with without_checks():
            before = epoch(dataset, repeat)
        checked = epoch(dataset, repeat)
        with without_checks():
            after = epoch(dataset, repeat)
        plain.append((before + after) / 2)
        ratios.append(checked / plain[-1])
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"loader, {slices:,} slices of {size} x {size}: CPU time with checks / without {statistics.median(ratios):.4f}, "
        f"quartiles {low:.4f} to {high:.4f}, of {repeats}; without {statistics.median(plain):.3f} s an epoch"
    )
    watch = Watch()
    identities = [(plan, "with_identities"), (plan_tables, "folds_of_groups"), (publish, "equal_images")]
    identities += [(publish, "link_images"), (decode, "crc32c")]
    with tempfile.TemporaryDirectory(dir=data) as folder, watch.watching(*identities):
        began = time.process_time()
        build(tree, Path(folder) / "data.zarr", spec, workers=0)
        whole = time.process_time() - began
    unchanged = watch.seconds.pop("crc32c")
    print(
        f"build of the same in one process: CPU time {whole:.2f} s, of it checks of identity "
        f"{sum(watch.seconds.values()) / whole:.2%}, and that each file is the one that was scanned {unchanged / whole:.2%}"
    )
    for name, seconds in sorted(watch.seconds.items()):
        print(f"  {name:<20} {seconds:.4f} s")


if __name__ == "__main__":
    typer.run(main)
