"""What other labels cost in a dataset with as many rows as RSNA 2019 has: seconds and memory of ``ich-prep relabel``.

    python -m benchmarks.relabel [--rows 874035]

The tables are those of a phantom, repeated with identifiers of their own; relabel reads no pixel, so there are no shards
behind them but the first. The label file is a whole one of RSNA's form. Memory is the peak of the resident set.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer

from benchmarks.full_count import FULL_COUNT, changed_labels
from ich_prep.build_dataset import build
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import IMAGES, ROOT, SHARD_SCHEMA, TABLES, digest_of
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.storage import write_whole
from ich_prep.dataset.tables import write_table
from ich_prep.phantom import synthesize
from ich_prep.stages.publish import images_document, root_document, sha256

IDENTIFIERS = (
    "sop_instance_uid",
    "series_instance_uid",
    "study_instance_uid",
    "patient_id",
    "fold_group",
    "content_hash",
)


def repeated(table: pa.Table, times: int, **steps: int) -> pa.Table:
    """Return the lines of ``table`` that many ``times``, with identifiers of their own; columns count on by ``steps``."""
    copies = []
    for copy in range(times):
        changed = table
        for name in table.column_names:
            if name in IDENTIFIERS:
                values = pc.binary_join_element_wise(table[name], f"{copy:x}", "_")
            elif name in steps:
                values = pc.add(table[name], copy * steps[name])
            else:
                continue
            place = table.schema.get_field_index(name)
            changed = changed.set_column(place, table.schema.field(name), values)
        copies.append(changed)
    return pa.concat_tables(copies).combine_chunks()


def enlarge(dataset: Dataset, rows: int) -> None:
    """Make the tables and the root of ``dataset`` those of about ``rows`` rows."""
    out, per_shard, times = dataset.path, dataset.spec.slices_per_shard, -(-rows // len(dataset))
    slices = repeated(dataset.slices, times, row=len(dataset), series_row=dataset.counts.series)
    series = repeated(dataset.series, times, series_row=dataset.counts.series, first_row=len(dataset))
    starts = np.arange(0, len(slices), per_shard)
    line = dataset.read_table("shards").slice(0, 1).to_pylist()[0]
    ok = pc.equal(slices["status"], "ok").to_numpy()
    columns = {
        "shard": np.arange(len(starts)),
        "first_row": starts,
        "n_rows": np.diff(np.r_[starts, len(slices)]),
        "n_ok": np.add.reduceat(ok.astype(np.int64), starts),
        **{name: [line[name]] * len(starts) for name in ("bytes", "fingerprint", "hu_histogram")},
    }
    shards = pa.table([pa.array(columns[field.name], field.type) for field in SHARD_SCHEMA], schema=SHARD_SCHEMA)
    tables = {"slices": slices, "series": series, "shards": shards, "quarantine": dataset.read_table("quarantine")}
    ich = dict(dataset.attributes)
    for name in TABLES:
        write_table(dataset.table_path(name), tables[name])
    write_whole(out / IMAGES / ROOT, images_document((out / IMAGES / ROOT).read_bytes(), len(slices)))
    ich["counts"] = {
        **ich["counts"], "rows": len(slices), "ok": int(ok.sum()), "series": len(series), "shards": len(shards)
    }  # fmt: skip
    ich["digests"] = {name: sha256((out / name).read_bytes()) for name in ich["digests"]}
    ich["digest"] = digest_of(ich)
    write_whole(out / ROOT, root_document(out, ich))


def label_lines(dataset: Dataset, out: Path) -> None:
    """Write the labels of the training slices as a label file of RSNA."""
    train = pc.equal(dataset.slices["subset"], "train").to_numpy()
    uids = dataset.slices["sop_instance_uid"].filter(pa.array(train)).to_pylist()
    with out.open("w") as file:
        file.write("ID,Label\n")
        for uid, values in zip(uids, dataset.labels[train].tolist(), strict=True):
            for name, value in zip(RSNA_CLASSES, values, strict=True):
                file.write(f"{uid}_{name},{value}\n")


def main(rows: int = FULL_COUNT, step: Annotated[Path | None, typer.Option(hidden=True)] = None) -> None:
    if step is not None:
        from ich_prep.relabel import relabel

        start = time.perf_counter()
        found = relabel(step / "data.zarr", step / "new.csv")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        typer.echo(json.dumps([time.perf_counter() - start, peak, found.slices]))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        synthesize(work / "rsna", series=40, size=32, layout="rsna", workers=0)
        build(work / "rsna", work / "data.zarr", Spec(size=16), workers=0)
        enlarge(open_dataset(work / "data.zarr"), rows)
        dataset = open_dataset(work / "data.zarr")
        label_lines(dataset, work / "old.csv")
        with (work / "old.csv").open() as old:
            changed_labels(old, work / "new.csv")
        command = [sys.executable, "-m", "benchmarks.relabel", "--step", str(work)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds, peak, changed = json.loads(done.stdout.splitlines()[-1])
        typer.echo(
            f"{len(dataset):,} rows in {dataset.counts.series:,} series: {changed:,} slices with other labels in "
            f"{seconds:.1f} s, peak {peak:,.0f} MiB"
        )


if __name__ == "__main__":
    typer.run(main)
