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
from ich_prep.dataset.corrections import HEADER, read_corrections
from ich_prep.dataset.schema import UNUSED, WITHDRAWN
from ich_prep.dataset.storage import local_path
from ich_prep.errors import SourceError, count
from ich_prep.layouts import LAYOUTS
from ich_prep.layouts.assignment import header_of
from ich_prep.layouts.label_keys import choose_key
from ich_prep.layouts.labels import Key, LabelOptions, LabelRules, LabelTable, join_labels
from ich_prep.layouts.rsna import HEADER as RSNA_HEADER
from ich_prep.sources import LISTING_SCHEMA, Listing, check_table_path, table_at
from ich_prep.stages.generation import Change, changing, joined_digest, publish_generation
from ich_prep.stages.identifier_key import key_of_dataset
from ich_prep.stages.identity import ISSUER
from ich_prep.stages.pseudonyms import PSEUDONYMS, Level, pseudonym, with_originals
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
    key: str | Path | None = None,
) -> Relabelling:
    """Give the dataset at ``path`` the ``labels`` of a file, as its next generation; return what changed.

    The file is a label table as a build takes it, or the corrections of a reader (see ``dataset.corrections``). Labels that
    it does not state stay as they are; with ``replace_all`` they become unknown, as in a build with that table. Subsets and
    folds stay as they are. In a dataset of pseudonyms, a label table has these or, with the ``key``, which is a file or in
    the working folder, the originals. With ``dry_run`` nothing is written. Raises ``SourceError`` for a file that cannot be
    used, that has contradictory labels, or keys of no slice, unless that is allowed; ``UsageError`` for corrections that
    are damaged; ``DatasetError`` and ``BuildError`` as ``stages.generation.changing``.
    """
    file = local_path(labels, "--labels")
    check_table_path(file)
    table = table_at(file)
    with changing(path, build_dir) as (dataset, folder):
        secret = key_of_dataset(dataset.root, folder, None if key is None else Path(key), needed=False)
        slices, classes = dataset.slices, dataset.classes
        counted = pc.invert(pc.is_in(slices["status"], value_set=pa.array([UNUSED, WITHDRAWN]))).to_numpy()
        rules = LabelRules(classes, allow_contradictions, options=label_options or LabelOptions())
        is_marks = header_of(table) == HEADER
        if is_marks:
            update, notes = _corrected(dataset, file)
        else:
            update, notes = _from_table(dataset, table, rules, secret, allow_missing_images=allow_missing_images)
        withdrawn = int((update.stated.any(axis=1) & ~counted).sum())
        if withdrawn:
            notes = (
                *notes,
                f"{count(withdrawn, 'withdrawn slice')} {'keeps' if withdrawn == 1 else 'keep'} the old labels",
            )
        if replace_all and not is_marks:
            update = replace(update, stated=np.ones_like(update.stated))
        if not replace_all or dataset.root.pseudonym_key is not None:  # a line of the table would tell who it is
            update = replace(update, line=None)
        update = replace(update, stated=update.stated & counted[:, np.newaxis])
        after = updated(dataset.labels, level_codes(slices["label_level"]), update, classes)
        changes = changes_of(dataset.labels, after.values, classes)
        touched = int((after.values != dataset.labels).any(axis=1).sum())
        if dry_run or not touched:
            return Relabelling(changes, touched, None, notes)
        new_slices = with_labels(slices, after, update.line, classes)
        digest = hashlib.sha256(table.read()).hexdigest()
        if secret is not None:
            digest = pseudonym(secret, Level.LABELS, digest)
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


def _corrected(dataset: Dataset, file: Path) -> tuple[Update, tuple[str, ...]]:
    """Return the labels that a reader's marks state for each slice, and notes; the last mark of a row and class counts."""
    marks = read_corrections(file)
    if not marks:
        raise SourceError(f"Expected marks below the header of {file}; found none.")
    column_of = {name: column for column, name in enumerate(dataset.classes)}
    generations = set(digests_of(dataset))
    uids, status = dataset.slices["sop_instance_uid"], dataset.slices["status"]
    stated, values = np.zeros(dataset.labels.shape, bool), np.full(dataset.labels.shape, UNKNOWN, np.int8)
    readings: dict[tuple[int, int], dict[str, int | None]] = {}
    for number, mark in enumerate(marks, 1):
        if mark.dataset_digest not in generations:
            problem = (
                f"is about another dataset ({mark.dataset_digest[:12]}), none of the generations of {dataset.path}"
            )
        elif not 0 <= mark.row < len(dataset) or status[mark.row].as_py() == UNUSED:
            problem = f"cannot be applied: there is no slice in row {mark.row} of {dataset.path}"
        elif uids[mark.row].as_py() != mark.sop_instance_uid:
            problem = f"has the row {mark.row} and the SOP Instance UID of two different slices"
        elif mark.class_name not in column_of:
            problem = f"has a class that is none of {', '.join(dataset.classes)}"
        else:
            place = mark.row, column_of[mark.class_name]
            stated[place], values[place] = True, UNKNOWN if mark.value is None else mark.value
            readings.setdefault(place, {})[mark.reader] = mark.value
            continue
        raise SourceError(f"Mark {number} in {file} {problem}. Correct or remove it.")
    notes = [f"{count(len(readings), 'label')} in {file}"]
    disputed = sum(len(set(by_reader.values())) > 1 for by_reader in readings.values())
    if disputed:
        notes.append(f"readers disagree about {count(disputed, 'label')}: the last mark of each counts")
    return Update(values, stated, "slice"), tuple(notes)


def digests_of(dataset: Dataset) -> tuple[str, ...]:
    """Return the digests of all generations of a dataset, from the first: each event has that of the one before."""
    before = [event.digests.get("before") for event in dataset.root.history[1:]]
    return (*(digest for digest in before if digest), dataset.digest)


def _from_table(
    dataset: Dataset, file: TableFile, rules: LabelRules, secret: bytes | None, *, allow_missing_images: bool
) -> tuple[Update, tuple[str, ...]]:
    """Return the labels that a label table states for each slice, and notes."""
    table = _read(dataset, file, rules)
    notes = [*table.notes]
    keys = _keys_of(dataset, table, secret)
    if table.lines is not None:
        table = choose_key(replace(table, classes=rules.classes), keys)
        notes += table.notes
    joined = join_labels(table, keys[_column_of(table.key)])
    if len(joined.without_image) == len(table.keys):
        hint = ""
        if dataset.root.pseudonym_key is not None and secret is None:
            hint = " They may be the originals of pseudonyms: give the key with --key."
        raise SourceError(
            f"No label of {file.path} is of a slice of {dataset.path}: none of its {table.key} is there. Expected those of "
            f"the dataset's tables.{hint}"
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
    if header_of(file)[: len(RSNA_HEADER)] == RSNA_HEADER:
        name = "rsna"
    elif name == "rsna":
        name = "folder"
    layout = LAYOUTS.get(name, LAYOUTS["folder"])
    nothing = Listing(name="", files=LISTING_SCHEMA.empty_table(), tables=())
    return layout.read_labels(nothing, file, rules)


def _column_of(key: Key) -> str:
    """Return the column of a dataset that has the ``key`` of a label table: the subject of CQ500 is its patient."""
    return "patient_id" if key == "subject" else key


def _keys_of(dataset: Dataset, table: LabelTable, secret: bytes | None) -> pa.Table:
    """Return for each slice the values that may be the key of a label table, and what a message calls the slice.

    Pseudonyms of what the ``table`` has are replaced by the originals, with the ``secret`` that they were made with.
    """
    slices, series = dataset.slices, dataset.series
    columns: dict[str, Any] = {name: slices[name] for name in _KEYS if name in slices.column_names}
    if "accession_number" in series.column_names:
        columns["accession_number"] = series["accession_number"].take(slices["series_row"])
    own = table.lines.keys if table.lines is not None else {table.key: table.keys}
    for key, values in own.items():
        name = _column_of(key)
        if name in columns:
            columns[name] = with_originals(columns[name], secret, PSEUDONYMS[name], values)
    columns["issuer_of_patient_id"] = _issuers(series).take(slices["series_row"])
    columns["path"] = pc.binary_join_element_wise("row", slices["row"].cast(pa.string()), " ")
    return pa.table(columns)


def _issuers(series: pa.Table) -> pa.Array:
    """Return the issuer of each volume's patient id, as far as its fold group names it; null for all others."""
    if "fold_group" not in series.column_names:
        return pa.nulls(len(series), pa.string())
    found = []
    for patient, group in zip(series["patient_id"].to_pylist(), series["fold_group"].to_pylist(), strict=True):
        prefix = f"{patient}{ISSUER}"
        found.append(group.removeprefix(prefix) if group is not None and group.startswith(prefix) else None)
    return pa.array(found, pa.string())
