"""What the plan costs, and of it the checks of identity, for headers as tables: no file is read.

    python -m benchmarks.planning [--files 100000] [--repeats 3]

Prints the seconds, median and spread, and the memory that the plan adds, of headers without acquisitions (RSNA's) and with
two interleaved ones in every series.
"""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np
import pyarrow as pa
import typer

from ich_prep.dataset.spec import Spec
from ich_prep.layouts.assignment import Assignment, no_repairs, nulls
from ich_prep.layouts.labels import no_labels
from ich_prep.stages import identity, patients, scan
from ich_prep.stages.plan import make_plan

SLICES_PER_SERIES = 35


def headers(files: int, *, acquisitions: bool) -> pa.Table:
    """Return headers of ``files`` slices, lines of the scan, in series of 35 and patients of 1.2 series."""
    numbers = np.arange(files)
    series, place = numbers // SLICES_PER_SERIES, numbers % SLICES_PER_SERIES
    values: dict[str, object] = {
        "path": [f"stage_2_train/ID_{number:09x}.dcm" for number in numbers],
        "sop_instance_uid": [f"ID_{number:09x}" for number in np.random.default_rng(0).permutation(files)],
        "series_instance_uid": [f"ID_{number:08x}" for number in series],
        "study_instance_uid": [f"ID_{number:010x}" for number in series],
        "patient_id": [f"ID_{number:07x}" for number in (series / 1.2).astype(int)],
        "position": np.column_stack([np.zeros((files, 2)), 5.0 * place]).tolist(),
        "orientation": [[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]] * files,
        "pixel_spacing": [[0.5, 0.5]] * files,
        **dict.fromkeys(("rows", "columns"), np.full(files, 512)),
        **dict.fromkeys(("bits_allocated", "bits_stored"), np.full(files, 16)),
        **dict.fromkeys(("file_size", "header_bytes", "crc32c", "pixel_offset"), np.ones(files, int)),
        "rescale_slope": np.ones(files),
        "rescale_intercept": np.full(files, -1024.0),
        "signed": np.ones(files, bool),
        "monochrome1": np.zeros(files, bool),
        "transfer_syntax": ["1.2.840.10008.1.2.1"] * files,
    }
    if acquisitions:
        values |= {
            "acquisition_number": place % 2,
            "position": [[0.0, 0.0, 5.0 * (one // 2)] for one in place.tolist()],
        }
    columns = [
        pa.array(values[field.name], field.type) if field.name in values else pa.nulls(files, field.type)
        for field in scan.SCHEMA
    ]
    return pa.table(columns, schema=scan.SCHEMA)


def main(files: int = 100_000, repeats: int = 3) -> None:
    for acquisitions in (False, True):
        scanned = headers(files, acquisitions=acquisitions)
        assignment = Assignment(
            subset=pa.array(["train"] * files),
            patient_id=scanned["patient_id"].combine_chunks(),
            subject=nulls(files),
            repairs=no_repairs(files),
            excluded_because=nulls(files),
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        whole, checks = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            plan = make_plan(scanned, assignment=assignment, labels=no_labels(), spec=Spec(layout="rsna"))
            whole.append(time.perf_counter() - start)
            checks.append(_check_identities(scanned))
        added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        kind = "two acquisitions a series" if acquisitions else "no acquisitions"
        typer.echo(
            f"{files:,} headers, {kind}: {len(plan.series):,} volumes; plan {_shown(whole)}, of it patients, series and "
            f"fold groups {_shown(checks)}; {added:,.0f} MiB added at most"
        )


def _check_identities(scanned: pa.Table) -> float:
    slices = scanned.append_column("assigned_patient", scanned["patient_id"]).append_column(
        "subset", pa.array(["train"] * len(scanned))
    )
    start = time.perf_counter()
    no_copies = patients.Copied(slices.select(patients.IDENTIFIERS).slice(0, 0), np.empty(0, np.int64))
    slices, _ = patients.with_identities(slices, patients.Given(), Spec(layout="rsna"), no_copies)
    identity.folds_of_groups(slices["fold_group"], slices["patient"], folds=5)
    return time.perf_counter() - start


def _shown(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    typer.run(main)
