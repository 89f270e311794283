"""Where rows come from, and copies of what was quarantined: from a dataset's tables and the working folder of its build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import ROOT
from ich_prep.dataset.storage import local_path, renamed_when_whole
from ich_prep.dataset.tables import read_parquet
from ich_prep.errors import SliceError, UsageError, describe_os_error
from ich_prep.sources import LARGEST_MEMBER, read_whole
from ich_prep.stages import ledger
from ich_prep.stages.identifier_key import key_of_dataset
from ich_prep.stages.pseudonyms import Level, pseudonym, pseudonyms
from ich_prep.stages.source_files import NamedFile, SourceFiles
from ich_prep.stages.state import BuildFolder, build_folder, readable_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ich_prep.progress import Progress

# What the slice and series tables say about a row, in the order in which it is shown.
_OF_SLICE = (
    "row", "status", "sop_instance_uid", "series_instance_uid", "study_instance_uid", "patient_id", "series_row",
    "slice_index", "subset", "fold",
)  # fmt: skip
_OF_VOLUME = ("accession_number", "series_description")


@dataclass(frozen=True)
class Found:
    """The ``rows`` that were asked for, each as the values to show by their name; ``missing`` says what is not known."""

    rows: tuple[dict[str, Any], ...]
    missing: str | None


def find(
    path: str | Path,
    *,
    row: int | None = None,
    sop: str | None = None,
    build_dir: str | Path | None = None,
    key: str | Path | None = None,
) -> Found:
    """Return what is known about one row of the dataset at ``path``, or about all slices with a SOP Instance UID.

    The source file is known from the working folder of the build, ``build_dir`` or the one next to the dataset; so are
    files with that UID that were quarantined. In a dataset of pseudonyms, ``sop`` may be one or, with the ``key``,
    which is a file or in that folder, an original. Raises ``UsageError`` unless exactly one of ``row`` and ``sop`` is given,
    and for one that is not there.
    """
    if (row is None) == (sop is None):
        raise UsageError("Expected --row N or --sop UID, one of the two.")
    dataset = open_dataset(path)
    folder = build_folder(dataset.folder.absolute(), build_dir)
    missing = _why_unknown(folder, dataset)
    secret = key_of_dataset(dataset.root, folder, None if key is None else Path(key), needed=False)
    rows = [row] if row is not None else _rows_of(dataset, str(sop), secret)
    if row is not None and not 0 <= row < len(dataset):
        raise UsageError(f"{dataset.path} has rows 0 to {len(dataset) - 1:,}; got --row {row}.")
    found = [_line(dataset, number) for number in rows]
    if missing is None and rows:
        paths = read_parquet(folder.plan, ["path"])["path"]
        found = [{"path": paths[line["row"]].as_py(), **line} for line in found]
    if sop is not None and missing is None:
        found += _quarantined(folder, dataset, sop, secret)
    if not found:
        hint = f" {missing}" if missing else ""
        raise UsageError(f"No slice of {dataset.path} has the SOP Instance UID {str(sop)[:100]}.{hint}")
    return Found(tuple(found), missing)


def _why_unknown(folder: BuildFolder, dataset: Dataset) -> str | None:
    """Return why the source files of the dataset are not known, None if they are."""
    if not folder.state.exists():
        return f"The source file is not known: there is no working folder {folder.path}. Name it with --build-dir."
    state = readable_state(folder)
    if state is None or not state.belongs_to(dataset.digest):
        return (
            f"The source file is not known: the working folder {folder.path} belongs to another dataset. Name the right one "
            "with --build-dir."
        )
    if not folder.plan.exists():
        return f"The source file is not known: the working folder {folder.path} lacks its plan."
    return None


def _rows_of(dataset: Dataset, sop: str, secret: bytes | None) -> list[int]:
    slices = dataset.slices
    uids = [sop.strip()] if secret is None else [sop.strip(), pseudonym(secret, Level.INSTANCE, sop.strip())]
    rows: list[int] = slices["row"].filter(pc.is_in(slices["sop_instance_uid"], value_set=pa.array(uids))).to_pylist()
    return rows


def _line(dataset: Dataset, row: int) -> dict[str, Any]:
    slices, series = dataset.slices, dataset.series
    line = {name: slices[name][row].as_py() for name in _OF_SLICE}
    if line["series_row"] is None:
        return line  # a row of no slice
    volume = {name: series[name][line["series_row"]].as_py() for name in _OF_VOLUME if name in series.column_names}
    return {**line, **volume}


def _quarantined(folder: BuildFolder, dataset: Dataset, sop: str, secret: bytes | None) -> list[dict[str, Any]]:
    """Return the files with this UID in their header that have no row, and why."""
    names = ["path", "sop_instance_uid", "series_instance_uid", "study_instance_uid", "patient_id", "accession_number"]
    quarantine = dataset.read_table("quarantine")
    without_row = quarantine.filter(pc.is_null(quarantine["row"]))
    reasons = {line["path"]: line for line in without_row.select(["path", "reason", "detail"]).to_pylist()}
    found = []
    for number in sorted(ledger.done(folder.scan, suffix=".parquet")):
        batch = read_parquet(folder.batch(number), names)
        published = batch.select(["path", "sop_instance_uid"])
        if secret is not None:
            columns = ((Level.PATH, "path"), (Level.INSTANCE, "sop_instance_uid"))
            published = pa.table({name: pseudonyms(secret, level, batch[name]) for level, name in columns})
        is_asked = pc.or_(pc.equal(batch["sop_instance_uid"], sop.strip()), pc.equal(published[1], sop.strip()))
        for line, path in zip(batch.filter(is_asked).to_pylist(), published["path"].filter(is_asked), strict=True):
            why = reasons.get(path.as_py())
            if why is not None:
                found.append({**line, "status": why["reason"], "detail": why["detail"]})
    return found


# --- copies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copied:
    """How many files were ``copied``, how many were there already, and those that could not be, as "path: why"."""

    copied: int
    existing: int
    failed: tuple[str, ...]


def copy_quarantined(
    files: pa.Table,
    src: Sequence[str | Path],
    target: str | Path,
    *,
    secret: bytes | None = None,
    progress: Progress,
) -> Copied:
    """Copy the quarantined ``files`` from the sources to ``target``, in a folder for each reason; overwrite nothing.

    ``secret`` is the key of their paths' pseudonyms, None if the paths are the originals. Where several sources, each of
    which was appended, have a file of the same path, all are copied, below the names of their sources. Raises
    ``UsageError`` if ``target`` lies inside a source or a dataset, or if none of the files is in the sources.
    """
    sources = [local_path(path, "--src").absolute() for path in src]
    folder = local_path(target, "--copy-to").absolute()
    _check_target(folder, sources)
    known = SourceFiles(sources, secret)
    lines = files.select(["path", "reason"]).to_pylist()
    lines = list({(line["path"], line["reason"]): line for line in lines}.values())
    if lines and not any(known.at(line["path"]) for line in lines):
        raise UsageError(
            f"None of the {len(lines):,} quarantined files is in {', '.join(map(str, src))} (for example "
            f"{lines[0]['path']}). Give the same --src as to `ich-prep build`."
        )
    copied, existing, failed = 0, 0, list[str]()
    progress.begin("Copying", len(lines), "files", 0)
    for line in lines:
        found = known.at(line["path"])
        if not found:
            failed.append(f"{line['path']}: not found in the sources")
        for below, file in found.items():
            problem = _copy(file, folder / line["reason"] / below)
            copied, existing = copied + (problem == ""), existing + (problem is None)
            if problem:
                failed.append(f"{file.name}: {problem}")
        progress.advance(1, 0)
    progress.end()
    return Copied(copied, existing, tuple(failed))


def _check_target(folder: Path, sources: Sequence[Path]) -> None:
    above = (folder.resolve(), *folder.resolve().parents)
    for source in sources:
        if source.resolve() in above:
            raise UsageError(f"--copy-to {folder} lies inside the source {source}. Give another folder.")
    if any((parent / ROOT).is_file() for parent in above):
        raise UsageError(f"--copy-to {folder} lies inside a dataset. Give another folder.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--copy-to {folder} is a file. Give a folder.")


def _copy(file: NamedFile, folder: Path) -> str | None:
    """Copy one file below ``folder``; return "" if that was done, None if there is one, else why it cannot be."""
    parts, path = PurePosixPath(file.name).parts, folder / file.name
    if file.is_damaged:  # or an archive has its path twice: which member was quarantined is then not known
        return "cannot be read in the sources"
    if ".." in parts or file.name.startswith("/") or not parts:
        return "its path leads out of the source"
    try:
        if path.exists() or path.is_symlink():
            return None
        data = read_whole(file.source, file.key, limit=LARGEST_MEMBER)
        path.parent.mkdir(parents=True, exist_ok=True)
        with renamed_when_whole(path) as temporary:
            temporary.write_bytes(data)
    except SliceError as error:
        return error.detail
    except OSError as error:
        return describe_os_error(error)
    return ""
