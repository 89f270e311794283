"""Give the slices of a finished dataset other labels: two new tables and a new root, and no pixel is read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.classes import UNKNOWN
from ich_prep.dataset.schema import UNUSED, WITHDRAWN
from ich_prep.dataset.storage import local_path
from ich_prep.errors import SourceError, count
from ich_prep.layouts import LAYOUTS
from ich_prep.layouts.assignment import header_of
from ich_prep.layouts.corrections import are_corrections, read_corrections
from ich_prep.layouts.label_keys import choose_key
from ich_prep.layouts.labels import LabelOptions, LabelRules, LabelTable, join_labels
from ich_prep.layouts.rsna import HEADER
from ich_prep.sources import LISTING_SCHEMA, Listing, check_table_path, local_table
from ich_prep.stages.generation import Change, changing, joined_digest, publish_generation
from ich_prep.stages.relabelling import (
    LabelChange,
    Update,
    changes_of,
    level_codes,
    updated,
    with_labels,
    with_series_labels,
)

if TYPE_CHECKING:
    from ich_prep.dataset import Dataset
    from ich_prep.sources import TableFile

# The columns of the tables that may be the key of a label table; the subject of CQ500 is its patient.
_KEYS = ("sop_instance_uid", "series_instance_uid", "study_instance_uid", "patient_id")


@dataclass(frozen=True)
class Relabelling:
    """What ``relabel`` changed, or would change: by label and direction, in how many ``slices``.

    ``generation`` is the new one, None if nothing was written; ``notes`` are sentences for the user.
    """

    changes: tuple[LabelChange, ...]
    slices: int
    generation: int | None
    notes: tuple[str, ...]


def relabel(
    path: str | Path,
    labels: str | Path,
    *,
    label_options: LabelOptions | None = None,
    replace_all: bool = False,
    allow_contradictions: bool = False,
    allow_missing_images: bool = False,
    dry_run: bool = False,
    build_dir: str | Path | None = None,
) -> Relabelling:
    """Give the dataset at ``path`` the ``labels`` of a file, as its next generation; return what changed.

    The file is a label table as a build takes it, or corrections (see ``layouts.corrections``). Labels that it does not
    state stay as they are; with ``replace_all`` they become unknown, as in a build with that table. Subsets and folds stay
    as they are. With ``dry_run`` nothing is written. Raises ``SourceError`` for a file that cannot be used, that has
    contradictory labels, or keys of no slice, unless that is allowed; ``DatasetError`` and ``BuildError`` as
    ``stages.generation.changing``.
    """
    file = local_path(labels, "--labels")
    check_table_path(file)
    table = local_table(file)
    with changing(path, build_dir) as (dataset, folder):
        slices, classes = dataset.slices, dataset.classes
        status = slices["status"]
        counted = pc.invert(pc.is_in(status, value_set=pa.array([UNUSED, WITHDRAWN]))).to_numpy()
        rules = LabelRules(classes, allow_contradictions, options=label_options or LabelOptions())
        if are_corrections(table):
            update, notes = _corrected(dataset, table, allow_contradictions=allow_contradictions)
        else:
            update, notes = _from_table(dataset, table, rules, allow_missing_images=allow_missing_images)
            if replace_all:
                update = replace(update, stated=np.ones_like(update.stated))
            else:
                update = replace(update, line=None)
        update = replace(update, stated=update.stated & counted[:, np.newaxis])
        after = updated(dataset.labels, level_codes(slices["label_level"]), update, classes)
        changes = changes_of(dataset.labels, after.values, classes)
        touched = int((after.values != dataset.labels).any(axis=1).sum())
        if dry_run or not touched:
            return Relabelling(changes, touched, None, notes)
        new_slices = with_labels(slices, after, update.line, classes)
        digest = hashlib.sha256(table.read()).hexdigest()
        change = Change(
            command="relabel",
            tables={
                "slices": new_slices,
                "series": with_series_labels(dataset.series, new_slices, classes, counted),
            },
            done={"relabelled": touched},
            digests={"labels": digest},
            keys={"labels_digest": joined_digest(dataset.root.labels_digest, digest)},
        )
        return Relabelling(changes, touched, publish_generation(dataset, folder, change), notes)


def _corrected(dataset: Dataset, table: TableFile, *, allow_contradictions: bool) -> tuple[Update, tuple[str, ...]]:
    found = read_corrections(
        table,
        dataset.slices.select(["row", "sop_instance_uid"]),
        classes=dataset.classes,
        digests=digests_of(dataset),
        allow_contradictions=allow_contradictions,
    )
    unused = pc.equal(dataset.slices["status"].take(pa.array(found.row)), UNUSED).to_numpy(zero_copy_only=False)
    if unused.any():
        raise SourceError(
            f"{table.path} corrects row {int(found.row[unused][0])}, which is of no slice: its status is {UNUSED}."
        )
    stated = np.zeros(dataset.labels.shape, bool)
    values = np.full(dataset.labels.shape, UNKNOWN, np.int8)
    stated[found.row, found.column] = True
    values[found.row, found.column] = found.value
    return Update(values, stated, "slice"), (f"{count(len(found.row), 'label')} in {table.path}",)


def digests_of(dataset: Dataset) -> tuple[str, ...]:
    """Return the digests of all generations of a dataset, from the first: each event has that of the one before."""
    before = [event.digests.get("before") for event in dataset.root.history[1:]]
    return (*(digest for digest in before if digest), dataset.digest)


def _from_table(
    dataset: Dataset, file: TableFile, rules: LabelRules, *, allow_missing_images: bool
) -> tuple[Update, tuple[str, ...]]:
    """Return the labels that a label table states for each slice, and notes."""
    table = _read(dataset, file, rules)
    notes = [*table.notes]
    keys = _keys_of(dataset)
    if table.lines is not None:
        table = choose_key(replace(table, classes=rules.classes), keys)
        notes += table.notes
    joined = join_labels(table, keys["patient_id" if table.key == "subject" else table.key])
    if len(joined.without_image) == len(table.keys):
        raise SourceError(
            f"No label of {file.path} is of a slice of {dataset.path}: none of its {table.key} is there. Expected those of "
            "the dataset's tables."
        )
    if len(joined.without_image):
        what = f"{count(len(joined.without_image), 'label')} of {file.path} {{}} of no slice of the dataset"
        example = table.examples(joined.without_image[:1])
        if not allow_missing_images:
            raise SourceError(
                f"{what.format('is' if len(joined.without_image) == 1 else 'are')}"
                f"{f', for example {example}' if example else ''}. Remove the lines, or continue with "
                "--allow-missing-images."
            )
        notes.append(what.format("are"))
    if joined.subset is not None or joined.fold is not None:
        notes.append("the columns subset and fold are not read: slices keep theirs")
    update = Update(joined.values, joined.values != UNKNOWN, table.level, joined.label_line)
    return update, tuple(dict.fromkeys(notes))


def _read(dataset: Dataset, file: TableFile, rules: LabelRules) -> LabelTable:
    """Return the labels in ``file``, which may have the form of RSNA's, of the dataset's layout, or of a user's table."""
    name = dataset.attributes["spec"].get("layout")
    if header_of(file)[: len(HEADER)] == HEADER:
        name = "rsna"
    elif name == "rsna":
        name = "folder"
    layout = LAYOUTS.get(name, LAYOUTS["folder"])
    nothing = Listing(name="", files=LISTING_SCHEMA.empty_table(), tables=())
    return layout.read_labels(nothing, file, rules)


def _keys_of(dataset: Dataset) -> pa.Table:
    """Return for each slice the values that may be the key of a label table, and what a message calls the slice."""
    slices, series = dataset.slices, dataset.series
    columns: dict[str, Any] = {name: slices[name] for name in _KEYS if name in slices.column_names}
    if "accession_number" in series.column_names:
        columns["accession_number"] = series["accession_number"].take(slices["series_row"])
    columns["path"] = pc.binary_join_element_wise("row", slices["row"].cast(pa.string()), " ")
    return pa.table(columns)
