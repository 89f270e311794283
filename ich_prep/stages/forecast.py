"""What the shards of a plan will take in disk and time, from a few slices, and whether the disk can hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ich_prep.dataset.storage import free_bytes
from ich_prep.dataset.tables import rows_of
from ich_prep.errors import BuildError, count
from ich_prep.messages import duration_text, size_text
from ich_prep.stages import ledger
from ich_prep.stages.sample import SAMPLED, Sample, measure, sampled_rows
from ich_prep.stages.shard import COLUMNS
from ich_prep.stages.state import BuildFolder

if TYPE_CHECKING:
    from ich_prep.dataset.bucket_path import Place
    from ich_prep.dataset.spec import Spec
    from ich_prep.execute import Pool

SLICES_PER_SAMPLE = 512  # one sampled slice of so many, so that a sample costs next to nothing
FEWEST = 4  # slices of a sample
BUILD_SMALLER = ", or choose another --out, or a smaller --size, fewer --windows or --codec zstd with --overwrite"
TABLE_BYTES = 600  # of a slice in the published tables and in the ledger; measured: 240 to 480


@dataclass(frozen=True)
class Forecast:
    """What writing ``slices`` slices takes in ``processes`` processes, from a ``sample``; None if none of it decoded.

    ``bytes`` in the dataset, whose disk has ``free_bytes`` left (None: a bucket); ``seconds`` of reading and encoding,
    if the disks are as fast for all processes together as for one.
    """

    slices: int
    processes: int
    sample: Sample
    bytes: int | None
    free_bytes: int | None
    seconds: float | None

    def values(self) -> dict[str, int | float | None]:
        """Return the numbers, for the log."""
        return {
            "slices": self.slices,
            "processes": self.processes,
            "bytes": self.bytes,
            "free_bytes": self.free_bytes,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
        }

    def __str__(self) -> str:
        if self.bytes is None or self.seconds is None:
            return f"No estimate of disk and time: none of {count(self.sample.slices, 'sampled slice')} decodes."
        place = "more in the bucket"
        if self.free_bytes is not None:
            place = f"more on disk, of {size_text(self.free_bytes)} that are free"
        return (
            f"Estimate, from {count(self.sample.slices, 'slice')}: {size_text(self.bytes)} {place}; "
            f"{duration_text(self.seconds)} for "
            f"{count(self.slices, 'slice')} in {count(self.processes, 'process', 'processes')}, longer if the disks are "
            "slower."
        )


def forecast(
    pool: Pool, out: Place, folder: BuildFolder, sources: Sequence[Place], spec: Spec, *, first: int = 0
) -> Forecast | None:
    """Return what the shards without an entry in the ledger will take; None if there is none.

    The plan's are numbered from ``first``. The sample is rendered by a worker, as a shard's task does.
    """
    plan = rows_of(folder.plan).metadata
    done = ledger.done(folder.done)
    missing = [number for number in range(plan.num_row_groups) if first + number not in done]
    slices = sum(plan.row_group(number).num_rows for number in missing)
    if not slices:
        return None
    task = partial(sample_plan, folder, tuple(sources), spec)
    ((_, sample),) = pool.map(task, [min(SAMPLED, max(FEWEST, slices // SLICES_PER_SAMPLE))])
    processes = max(1, pool.wait_until_started())
    return Forecast(
        slices=slices,
        processes=processes,
        sample=sample,
        bytes=None if sample.bytes is None else round((sample.bytes + TABLE_BYTES) * slices),
        free_bytes=free_bytes(out),
        seconds=None if sample.seconds is None else sample.seconds * slices / processes,
    )


def sample_plan(folder: BuildFolder, sources: tuple[Place, ...], spec: Spec, number: int) -> Sample:
    """Return what ``number`` slices of the plan, evenly spaced, take in this process: a task of a pool."""
    with rows_of(folder.plan) as plan, rows_of(folder.keys) as keys:
        rows = sampled_rows(plan.metadata.num_rows, number)
        starts = np.cumsum([0, *(plan.metadata.row_group(k).num_rows for k in range(plan.metadata.num_row_groups))])
        slices, found = [], []
        for row in rows:
            group = int(np.searchsorted(starts, row, side="right")) - 1
            slices.append(plan.read_row_group(group, columns=COLUMNS).slice(row - int(starts[group]), 1))
            found += keys.read_row_group(group)["key"].slice(row - int(starts[group]), 1).to_pylist()
    chosen = pa.concat_tables(slices)
    return measure(chosen, found, sources, spec)


def check_space(
    found: Forecast, out: Place, *, allowed: bool, say: Callable[[str], None], instead: str = BUILD_SMALLER
) -> None:
    """Raise ``BuildError`` if the disk of ``out`` is not expected to hold what is missing, unless that is ``allowed``.

    ``instead`` is what else the user may do.
    """
    if found.bytes is None or found.free_bytes is None or found.bytes <= found.free_bytes:
        return
    text = (
        f"The disk of {out} has {size_text(found.free_bytes)} free; the dataset is expected to take "
        f"{size_text(found.bytes)} more, from {count(found.sample.slices, 'slice')} of the plan"
    )
    if not allowed:
        raise BuildError(
            f"{text}. Free space and run the same command again (the plan is kept){instead}; --allow-full-disk tries "
            "nevertheless."
        )
    say(f"{text}; allowed.")
