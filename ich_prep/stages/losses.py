"""Which labels have images in the source and none in the dataset, and why: nothing leaves silently.

Tables in, tables out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.schema import OK
from ich_prep.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ich_prep.layouts.labels import LabelTable

# One line per lost label: its key, the reason of one of its images and that image's path, and whether a class is 1.
LOST_SCHEMA = pa.schema(
    [("key", pa.string()), ("reason", pa.string()), ("positive", pa.bool_()), ("path", pa.string())]
)


@dataclass(frozen=True)
class Loss:
    """Labels lost for one reason: their number, how many are positive, and the path of one of their images."""

    labels: int
    positive: int
    path: str


def lost_labels(labels: LabelTable, without_row: pa.Array, images: pa.Table) -> pa.Table:
    """Return the labels whose key is in ``without_row`` and has images, as ``LOST_SCHEMA``, sorted by key.

    ``images``: the key, reason and path of each file without a row. Of several reasons, a rule of the build wins over
    damage, and damage over what a filter or the kind of file explains.
    """
    images = images.filter(pc.is_in(images["key"], value_set=without_row))
    rank = {str(reason): _rank(reason) for reason in Reason}
    ranks = pa.array([rank[reason] for reason in images["reason"].to_pylist()], pa.int8())
    images = images.append_column("rank", ranks).sort_by(
        [("key", "ascending"), ("rank", "ascending"), ("path", "ascending")]
    )
    keys = images["key"].combine_chunks()
    first = np.unique(keys.dictionary_encode().indices.to_numpy(zero_copy_only=False), return_index=True)[1]
    chosen = images.take(pa.array(np.sort(first), pa.int64()))
    index = pc.index_in(chosen["key"], value_set=labels.keys).to_numpy(zero_copy_only=False).astype(np.int64)
    positive = (labels.values[index] == 1).any(axis=1) if len(index) else np.empty(0, bool)
    return pa.table(
        [chosen["key"], chosen["reason"], pa.array(positive, pa.bool_()), chosen["path"]], schema=LOST_SCHEMA
    )


def lost_in_shards(plan: pa.Table, status: pa.Array, positive: pa.Array) -> pa.Table:
    """Return the labels of which no row is ok, as ``LOST_SCHEMA``; ``plan`` has a ``label_key`` for each labelled row."""
    rows = pa.table(
        {
            "key": plan["label_key"],
            "reason": status,
            "positive": positive,
            "path": plan["path"],
        }
    ).filter(pc.is_valid(plan["label_key"]))
    kept = rows["key"].filter(pc.equal(rows["reason"], OK))
    lost = rows.filter(pc.invert(pc.is_in(rows["key"], value_set=pc.unique(kept.combine_chunks()))))
    lost = lost.sort_by([("key", "ascending"), ("path", "ascending")])
    keys = lost["key"].combine_chunks()
    first = np.unique(keys.dictionary_encode().indices.to_numpy(zero_copy_only=False), return_index=True)[1]
    return lost.take(pa.array(np.sort(first), pa.int64())).cast(LOST_SCHEMA)


def losses_by_reason(lost: pa.Table) -> dict[str, Loss]:
    """Return the losses by reason, the most frequent first; ``lost`` has the columns of ``LOST_SCHEMA``."""
    counted = lost.group_by("reason", use_threads=False).aggregate(
        [([], "count_all"), ("positive", "sum"), ("path", "min")]
    )
    ordered = counted.sort_by([("count_all", "descending"), ("reason", "ascending")])
    return {
        line["reason"]: Loss(line["count_all"], line["positive_sum"], line["path_min"]) for line in ordered.to_pylist()
    }


def describe(losses: dict[str, Loss]) -> Iterable[str]:
    """Yield a sentence part for each reason: "12 labels (3 positive) by derived, for example a/b.dcm"."""
    for reason, loss in losses.items():
        noun = "label" if loss.labels == 1 else "labels"
        yield f"{loss.labels:,} {noun} ({loss.positive:,} positive) by {reason}, for example {loss.path}"


def _rank(reason: Reason) -> int:
    if reason.is_rule:
        return 0
    return 1 if reason.is_damage else 2
