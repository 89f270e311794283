"""What the ledger's entries report of rows, as columns: of a million rows, no more than those of one shard are objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pyarrow as pa

from ich_prep.dataset.schema import slice_schema
from ich_prep.stages.shard import RowReport

# Columns of the slice table that a row's report has.
REPORTED: Final = (
    "hu_min", "hu_max", "hu_mean", "share_air", "share_soft", "share_bone", "content_hash", "chunk_crc32c",
)  # fmt: skip
REPORT_SCHEMA: Final = pa.schema(
    [
        ("status", pa.string()),
        ("detail", pa.string()),
        *(slice_schema().field(name) for name in REPORTED),
        ("body", pa.int64()),
        ("lung", pa.int64()),
        ("flags", pa.list_(pa.string())),
    ]
)


def reports_table(reports: Sequence[RowReport]) -> pa.Table:
    """Return the reports of rows as a table, one line each, with the columns of ``REPORT_SCHEMA``."""
    columns = [pa.array([getattr(report, name) for report in reports], kind) for name, kind in _TYPES]
    return pa.table(columns, schema=REPORT_SCHEMA)


_TYPES: Final = [(field.name, field.type) for field in REPORT_SCHEMA]
