"""What was quarantined: of a finished dataset, or of a build that stopped; and a summary by reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.bucket_path import Place
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import OK, QUARANTINE_SCHEMA, ROOT
from ich_prep.dataset.tables import read_parquet
from ich_prep.errors import DatasetError, Reason, UsageError
from ich_prep.stages import ledger
from ich_prep.stages.identifier_key import key_of_dataset
from ich_prep.stages.shard import ShardReport
from ich_prep.stages.state import BuildFolder, State, build_folder, read_state

if TYPE_CHECKING:
    from collections.abc import Mapping

Stage = Literal["finished", "planned", "scanned"]
Kind = Literal["damage", "rule", "filter", "not a slice", "copy"]

# What each kind of reason means to the user.
KINDS: Mapping[Kind, str] = {
    "damage": "a slice is lost",
    "rule": "a rule of the build",
    "filter": "your options or the layout",
    "copy": "a copy of a slice that is kept",
    "not a slice": "not a slice of HU",
}


@dataclass(frozen=True)
class Quarantine:
    """The ``files`` (``QUARANTINE_SCHEMA``, sorted by path) that were quarantined, and how far the build got.

    "finished"; "planned", while shards were written; "scanned", before there was a plan: what only the plan can tell,
    such as duplicates, is then missing.
    """

    files: pa.Table
    stage: Stage


@dataclass(frozen=True)
class Group:
    """The files quarantined for one reason: its ``kind``, their number, and the path and detail of the first."""

    reason: str
    kind: Kind
    files: int
    path: str
    detail: str


def kind_of(reason: str) -> Kind:
    """Return the kind of a quarantine reason; one that a later version added is "not a slice"."""
    if reason not in {*Reason}:
        return "not a slice"
    word = Reason(reason)
    if word is Reason.DUPLICATE:
        return "copy"
    return "filter" if word.is_filter else "rule" if word.is_rule else "damage" if word.is_damage else "not a slice"


def by_reason(files: pa.Table) -> list[Group]:
    """Return the groups of a quarantine table: by kind, then the most files first."""
    first: dict[str, tuple[str, str]] = {}
    numbers: dict[str, int] = {}
    columns = (files[name].to_pylist() for name in ("reason", "path", "detail"))
    for reason, path, detail in zip(*columns, strict=True):
        numbers[reason] = numbers.get(reason, 0) + 1
        first[reason] = min(first.get(reason, (path, detail or "")), (path, detail or ""))
    groups = [Group(reason, kind_of(reason), number, *first[reason]) for reason, number in numbers.items()]
    kinds = list(KINDS)
    return sorted(groups, key=lambda group: (kinds.index(group.kind), -group.files, group.reason))


def read_quarantine(path: Path, build_dir: str | Path | None = None) -> Quarantine:
    """Return what was quarantined by the build of the dataset at ``path``, or by the one whose working folder it is.

    Raises ``DatasetError`` where there is neither, and ``UsageError`` if ``build_dir`` is given with a working folder.
    """
    if (path / ROOT).exists():
        return Quarantine(open_dataset(path).read_table("quarantine").sort_by("path"), "finished")
    folder = BuildFolder(path.absolute())
    if not _has_work(folder):
        folder = build_folder(path.absolute(), build_dir)
    elif build_dir is not None:
        raise UsageError(f"{path} is itself a working folder. Leave --build-dir out, or name the dataset instead.")
    if not _has_work(folder):
        open_dataset(path)  # raises the error that says what is there instead
    return _of_build(folder)


def key_of_quarantine(path: Path, build_dir: str | Path | None, given: Path | None) -> bytes | None:
    """Return the key of the pseudonyms of the paths that ``read_quarantine`` returns; None if they are the originals.

    Those are what a working folder has. Raises as ``identifier_key.key_of_dataset``.
    """
    if not (path / ROOT).exists():
        return None
    with open_dataset(path) as dataset:
        return key_of_dataset(dataset.root, build_folder(path.absolute(), build_dir), given, needed=True)


def _has_work(folder: BuildFolder) -> bool:
    return folder.state.exists() and (folder.scan.is_dir() or folder.quarantine.exists())


def _of_build(folder: BuildFolder) -> Quarantine:
    state = read_state(folder)
    try:
        if folder.quarantine.exists():
            planned = read_parquet(folder.quarantine)
            failed = [] if state.plan is None else list(_failed_rows(folder, state))
            files = pa.concat_tables([planned, pa.Table.from_pylist(failed, QUARANTINE_SCHEMA)])
            return Quarantine(files.sort_by("path"), "planned" if state.published is None else "finished")
        parts = [_of_batch(folder.batch(number)) for number in ledger.done(folder.scan, suffix=".parquet")]
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(
            f"The working folder {folder.path} cannot be read ({error}). Run the same `ich-prep build` command again."
        ) from None
    return Quarantine(pa.concat_tables([QUARANTINE_SCHEMA.empty_table(), *parts]).sort_by("path"), "scanned")


def _failed_rows(folder: BuildFolder, state: State) -> Iterator[dict[str, object]]:
    """Yield the lines of the slices that failed in shards of this plan."""
    paths = read_parquet(folder.plan, ["path"])["path"]
    for number in sorted(ledger.done(folder.done)):
        report = ShardReport.from_json(ledger.read(folder.done, number))
        if report.plan != state.plan:
            continue
        first = number * state.spec.slices_per_shard
        for row, line in enumerate(report.rows, first):
            if line.status != OK:
                yield {
                    "path": paths[row].as_py(),
                    "stage": "shard",
                    "row": row,
                    "reason": line.status,
                    "detail": line.detail,
                }


def _of_batch(path: Place) -> pa.Table:
    lines = read_parquet(path, ["path", "reason", "detail"])
    lines = lines.filter(pc.is_valid(lines["reason"]))
    columns = {
        "path": lines["path"],
        "stage": pa.array(["scan"] * len(lines), pa.string()),
        "row": pa.nulls(len(lines), pa.int64()),
        "reason": lines["reason"],
        "detail": lines["detail"],
    }
    return pa.table(columns, schema=QUARANTINE_SCHEMA)
