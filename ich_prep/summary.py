"""What a dataset holds, counted: by subset, fold and label, what was set aside, what was flagged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from ich_prep import store
from ich_prep.labels import CLASSES

if TYPE_CHECKING:
    from ich_prep.store import Dataset


def summary_of(dataset: Dataset) -> dict[str, Any]:
    """Return what a dataset holds, for a person or as JSON: counts, spec, labels by fold, quarantine, flags."""
    slices = dataset.slices
    fold = pc.coalesce(pc.cast(slices["fold"], pa.string()), "-")
    keys = pa.table({"subset": slices["subset"], "fold": fold, **{name: slices[name] for name in CLASSES}})
    grouped = keys.group_by(["subset", "fold"]).aggregate([([], "count_all"), *[(name, "sum") for name in CLASSES]])
    quarantine = dataset.read_table(store.QUARANTINE)
    counted = quarantine.group_by(["stage", "reason"]).aggregate([([], "count_all")])
    flags = pc.value_counts(pc.list_flatten(slices["flags"])).to_pylist()
    repairs = pc.value_counts(pc.list_flatten(slices["repairs"])).to_pylist()
    levels = pc.value_counts(slices["label_level"]).to_pylist()
    return {
        "path": str(dataset.path),
        "format": store.FORMAT,
        "digest": dataset.ich["digest"],
        "shape": list(dataset.shape),
        "dtype": str(dataset.dtype),
        "spec": dataset.ich["spec"],
        "counts": dataset.ich["counts"],
        "label_level": {line["values"]: line["counts"] for line in levels},
        "folds": [
            {
                "subset": line["subset"],
                "fold": line["fold"],
                "slices": line["count_all"],
                **{name: line[f"{name}_sum"] or 0 for name in CLASSES},
            }
            for line in grouped.sort_by([("subset", "descending"), ("fold", "ascending")]).to_pylist()
        ],
        "quarantine": [
            {"stage": line["stage"], "reason": line["reason"], "files": line["count_all"]}
            for line in counted.sort_by([("stage", "ascending"), ("reason", "ascending")]).to_pylist()
        ],
        "flags": dict(sorted((line["values"], line["counts"]) for line in flags)),
        "repairs": dict(sorted((line["values"], line["counts"]) for line in repairs)),
    }
