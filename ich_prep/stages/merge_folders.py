"""The working folder of an append -> that of the dataset: one plan, one ledger, and the headers of all files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ich_prep.dataset.storage import write_whole
from ich_prep.dataset.tables import (
    give_back_memory,
    opened_parquet,
    read_sealed,
    stacked,
    with_columns,
    write_sealed,
    write_sealed_parts,
)
from ich_prep.errors import CorruptionError
from ich_prep.stages import ledger
from ich_prep.stages.scan import FILES_PER_BATCH
from ich_prep.stages.state import readable_state

if TYPE_CHECKING:
    from ich_prep.dataset.dataset import Dataset
    from ich_prep.stages.state import BuildFolder, State

SHARDS_TOGETHER = 256  # whose rows of the plan are in memory


def merge_append(base: BuildFolder, dataset: Dataset, state: State) -> None:
    """Bring what the append of ``state`` recorded into ``base``, the working folder of ``dataset``, if there is one.

    Until the next generation is published, the folder still describes this one: its rows and shards come first. A second
    call changes nothing more. A folder whose plan is damaged stays as it is.
    """
    folder, of_base = base.append, readable_state(base)
    if of_base is None or not of_base.belongs_to(dataset.digest):
        return
    try:
        lines = len(read_sealed(base.plan, ["row"]))
    except (OSError, CorruptionError):
        return
    if lines < len(dataset):
        return
    per_shard = state.spec.slices_per_shard
    first_row = state.first_shard * per_shard
    new = _counted_from(first_row, read_sealed(folder.plan))
    with opened_parquet(base.plan) as plan:
        schema = stacked(plan.schema_arrow.empty_table(), new.slice(0, 0)).schema
        parts = _merged_plan(plan, new, schema, len(dataset), first_row)
        write_sealed_parts(base.plan, schema, parts, row_group_size=per_shard, write_statistics=False)
    give_back_memory()
    _merge_quarantine(base, folder, dataset, first_row)
    for shard in sorted(ledger.done(folder.done)):
        ledger.record(base.done, shard, ledger.read(folder.done, shard))
    # Numbers that neither the batches before nor those of a later append have.
    first_batch = dataset.counts.found // FILES_PER_BATCH + 2 * dataset.root.generation
    for batch in sorted(ledger.done(folder.scan, suffix=".parquet")):
        write_whole(base.batch(first_batch + batch), folder.batch(batch).read_bytes())


def _merged_plan(
    plan: pq.ParquetFile, new: pa.Table, schema: pa.Schema, rows: int, first_row: int
) -> Iterator[pa.Table]:
    """Yield the first ``rows`` of a ``plan``, then from ``first_row`` on the ``new`` one: whole shards at a time."""
    taken, rest = 0, schema.empty_table()
    for start in range(0, plan.num_row_groups, SHARDS_TOGETHER):
        if taken:
            yield rest
        shards = range(start, min(plan.num_row_groups, start + SHARDS_TOGETHER))
        rest = stacked(schema.empty_table(), plan.read_row_groups(list(shards))).slice(0, rows - taken)
        taken += len(rest)
        if taken == rows:
            break
    holes = pa.table({"row": np.arange(rows, first_row)})
    yield stacked(rest, holes, new)


def _merge_quarantine(base: BuildFolder, folder: BuildFolder, dataset: Dataset, first_row: int) -> None:
    """Bring the files that ``folder`` quarantined before it wrote shards behind those of ``base``."""
    stages = dataset.read_table("quarantine", ["stage"])["stage"]
    before = pc.sum(pc.not_equal(stages, "shard")).as_py() or 0
    try:
        old = read_sealed(base.quarantine)
    except (OSError, CorruptionError):
        return
    new = _counted_from(first_row, read_sealed(folder.quarantine))
    if len(old) >= before:
        write_sealed(base.quarantine, pa.concat_tables([old.slice(0, before), new]))


def _counted_from(first_row: int, table: pa.Table) -> pa.Table:
    return with_columns(table, {"row": pc.add(table["row"], first_row)})
