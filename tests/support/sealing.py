"""Change a finished dataset and seal it again, as someone who knows the format would: all digests fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.schema import ROOT, digest_of
from ich_prep.dataset.tables import write_table


def rewrite_root(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply ``change`` to the root's attribute ``ich`` and compute its digest again, if it still has one."""
    document = json.loads((path / ROOT).read_bytes())
    ich = document["attributes"]["ich"]
    change(ich)
    if "digest" in ich:
        ich["digest"] = digest_of(ich)
    (path / ROOT).write_text(json.dumps(document, indent=2, sort_keys=True))


def reseal(path: Path) -> None:
    """Make all digests of a dataset, and its counts of slices with pixels, those of its current files."""

    def change(ich: dict[str, Any]) -> None:
        for name in ich["digests"]:
            ich["digests"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()

    rewrite_root(path, change)


def replace_table(path: Path, name: str, table: pa.Table) -> None:
    """Write another table ``name`` into the dataset at ``path``; the digests and the count of ok slices follow."""
    write_table(path / f"labels/{name}.parquet", table)
    if name == "slices" and "status" in table.column_names:
        ok = pc.sum(pc.equal(table["status"], "ok")).as_py() or 0
        rewrite_root(path, lambda ich: ich["counts"].update(ok=ok))
    reseal(path)


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """Return ``table`` with other values in one column."""
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
