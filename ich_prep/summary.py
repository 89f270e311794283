"""Summary of a dataset: labels by subset and fold; what was quarantined, repaired and flagged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.schema import UNUSED, WITHDRAWN
from ich_prep.errors import CONVERT_FRAMES, Reason, count

if TYPE_CHECKING:
    from ich_prep.dataset import Dataset


def closing_lines(dataset: Dataset) -> Iterator[str]:
    """Yield what a user must know about a finished build: what left, by reason, with an example, and which flags occur."""
    quarantine = dataset.read_table("quarantine")
    identifiers = dataset.attributes["spec"].get("identifiers", "keep")
    if len(quarantine):
        counted = quarantine.group_by("reason", use_threads=False).aggregate([([], "count_all"), ("path", "min")])
        ordered = counted.sort_by([("count_all", "descending"), ("reason", "ascending")]).to_pylist()
        example = {line["reason"]: line["path_min"] for line in ordered}
        numbers = ", ".join(f"{line['count_all']:,} {line['reason']}" for line in ordered)
        yield f"Quarantined: {numbers}."
        if Reason.MULTI_FRAME in example:
            yield f"Files of many frames: {CONVERT_FRAMES}, and build again."
        for reason, loss in dataset.root.lost_labels.items():
            named = "" if identifiers == "pseudonymise" else f" (a file of this reason: {example.get(reason, '-')})"
            yield f"Lost with {reason}: {count(loss.labels, 'label')}, {loss.positive:,} of them positive{named}."
    flags = pc.value_counts(pc.list_flatten(_present(dataset)["flags"])).to_pylist()
    if flags:
        ordered = sorted(flags, key=lambda line: (-line["counts"], line["values"]))
        numbers = ", ".join(f"{line['counts']:,} {line['values']}" for line in ordered)
        yield f"Flags: {numbers}."
    yield identifiers_line(identifiers)


def identifiers_line(identifiers: str) -> str:
    """Return a sentence about the identifiers in a dataset whose spec says ``identifiers``."""
    if identifiers == "pseudonymise":
        return "Identifiers: pseudonyms; the pixels may still identify a patient (docs/privacy.md)."
    return "Identifiers: as in the source: UIDs, patient IDs, accession numbers, header texts, names of files."


def _present(dataset: Dataset) -> pa.Table:
    """Return the lines of the slices that are in the dataset: not those that were withdrawn, nor those of no slice."""
    absent = pc.is_in(dataset.slices["status"], value_set=pa.array([UNUSED, WITHDRAWN]))
    return dataset.slices.filter(pc.invert(absent))


def summary_of(dataset: Dataset) -> dict[str, Any]:
    """Return the summary of a dataset, as JSON values: counts, spec, labels by fold, quarantine, flags."""
    slices = _present(dataset)
    fold = pc.coalesce(pc.cast(slices["fold"], pa.string()), "-")
    keys = pa.table({"subset": slices["subset"], "fold": fold, **{name: slices[name] for name in dataset.classes}})
    grouped = keys.group_by(["subset", "fold"], use_threads=False).aggregate(
        [([], "count_all"), *[(name, "sum") for name in dataset.classes]]
    )
    quarantine = dataset.read_table("quarantine")
    counted = quarantine.group_by(["stage", "reason"], use_threads=False).aggregate([([], "count_all")])
    flags = pc.value_counts(pc.list_flatten(slices["flags"])).to_pylist()
    repairs = pc.value_counts(pc.list_flatten(slices["repairs"])).to_pylist()
    levels = pc.value_counts(slices["label_level"]).to_pylist()
    return {
        "path": str(dataset.path),
        "format": dataset.root.format,
        "digest": dataset.digest,
        "shape": list(dataset.shape),
        "dtype": str(dataset.dtype),
        "spec": dataset.attributes["spec"],
        "classes": list(dataset.classes),
        "generation": dataset.root.generation,
        "counts": dataset.counts.model_dump(),
        "lost_labels": {reason: loss.model_dump() for reason, loss in dataset.root.lost_labels.items()},
        "label_level": {line["values"]: line["counts"] for line in levels},
        "folds": [
            {
                "subset": line["subset"],
                "fold": line["fold"],
                "slices": line["count_all"],
                **{name: line[f"{name}_sum"] or 0 for name in dataset.classes},
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


def history_of(dataset: Dataset) -> list[dict[str, Any]]:
    """Return a line for each generation, as JSON values: its number, command, digest, counts, digests of its inputs."""
    events = dataset.root.history
    digests = [*(event.digests.get("before") for event in events[1:]), dataset.digest]
    return [
        {
            "generation": event.generation,
            "command": event.command,
            "digest": digest,
            "counts": event.counts,
            "digests": {name: value for name, value in event.digests.items() if name != "before"},
        }
        for event, digest in zip(events, digests, strict=False)
    ]
