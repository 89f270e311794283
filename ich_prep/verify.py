"""Check the integrity of a finished dataset and report every problem.

It compares the bytes with their checksums and fingerprints, the tables with the pixels, and the counts with the ledger.
With the sources, a sample of slices is decoded again independently: by pydicom alone, and float64 arithmetic straight from
the definitions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset import open_dataset, shard_format
from ich_prep.dataset.bucket_path import Place
from ich_prep.dataset.classes import SUBTYPES, is_rsna
from ich_prep.dataset.codecs import CODECS
from ich_prep.dataset.places import names_below
from ich_prep.dataset.schema import IMAGES, LABELS, OK, ROOT, UNUSED, WITHDRAWN, shard_path
from ich_prep.dataset.storage import local_path, read_whole
from ich_prep.dataset.tables import read_sealed
from ich_prep.errors import CorruptionError, UsageError
from ich_prep.files import is_litter
from ich_prep.stages import ledger
from ich_prep.stages.compare import Problem, compare, files_of, open_sources, sample_rows
from ich_prep.stages.folds import fold_of
from ich_prep.stages.generation import generation_of, is_new_shard
from ich_prep.stages.publish import images_document, root_document, sha256
from ich_prep.stages.shard import ShardReport
from ich_prep.stages.state import BuildFolder, build_folder, has_append, readable_state

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset import Dataset
    from ich_prep.progress import Progress


@dataclass(frozen=True)
class Verification:
    """What was checked, the problems found, and notes: what is remarkable and no problem."""

    shards: int
    slices: int
    compared: int
    problems: tuple[Problem, ...]
    notes: tuple[Problem, ...] = ()


def verify(
    path: str | Path,
    *,
    src: str | Path | Sequence[str | Path] | None = None,
    build_dir: str | Path | None = None,
    sample: float = 0.01,
    seed: int = 0,
    where: str | None = None,
    progress: Progress,
) -> Verification:
    """Return the problems of the dataset at ``path``.

    With ``src``, the sources it was built from and those of all appends, the share ``sample`` of its slices (at least one)
    is decoded again by pydicom alone and compared pixel by pixel. That needs the working folder of the build:
    ``build_dir``, or the one next to the dataset. A filter ``where`` limits the shards that are checked, and the slices that
    are compared, to those that have, or are, rows that it selects. Raises ``DatasetError`` if there is no dataset,
    ``SourceError`` if ``src`` is neither a folder nor an archive, and ``UsageError`` if it has none of the files, if the
    filter is not valid or selects no row,
    or if the working folder is missing or belongs to another dataset.
    """
    if not 0 < sample <= 1:
        raise UsageError(f"Expected --sample within 0..1, the share of slices to compare; got {sample:g}.")
    dataset = open_dataset(path)
    folder = build_folder(dataset.path.absolute(), build_dir)
    belongs = _belongs(folder, dataset)
    paths = [] if src is None else [src] if isinstance(src, str | Path) else list(src)
    grown = any(event.command == "append" for event in dataset.root.history)
    sources = open_sources([local_path(path, "--src") for path in paths], grown=grown) if paths else ()
    if sources and not (belongs and folder.plan.exists()):
        problem = "belongs to another dataset" if not belongs and folder.state.exists() else "is missing or damaged"
        raise UsageError(
            f"Comparing with the sources needs the working folder of the build, whose plan names the source file of each "
            f"row; {folder.path} {problem}. Name it with --build-dir, or verify without --src."
        )
    problems = [*_check_files(dataset, folder)]
    intact = not problems
    required = {str(dataset.path / ROOT), *(str(dataset.table_path(table)) for table in ("slices", "shards"))}
    if any(problem.culprit in required for problem in problems):
        # These files are damaged, so the shards cannot be checked against them.
        return Verification(0, 0, 0, tuple(problems))
    try:
        if intact:
            problems += [*_check_root(dataset), *_check_tables(dataset), *_check_zarr(dataset)]
        selected = _selected(dataset, where)
        checked = np.unique(np.flatnonzero(selected) // dataset.spec.slices_per_shard)
        problems += _check_shards(dataset, checked.tolist(), progress)
    except CorruptionError as error:  # a table that was sealed again says what no table can
        return Verification(0, 0, 0, (*problems, Problem(str(dataset.path), str(error))))
    strays, notes = _check_strays(dataset, folder)
    problems += strays
    if intact and belongs:
        problems += _check_ledger(dataset, folder)
    compared = 0
    if sources:
        try:
            plan = read_sealed(folder.plan)
        except (OSError, CorruptionError):
            problems.append(Problem(str(folder.plan), "cannot be read: the source file of each row is not known"))
        else:
            rows = sample_rows(np.flatnonzero(dataset.is_ok & selected), sample, seed)
            sampled = plan.take(pa.array(rows)).to_pylist()
            files = files_of(sources, [line["path"] for line in sampled])
            if sampled and not files:
                raise UsageError(
                    f"None of the {len(sampled)} sampled source files of {dataset.path} is in {', '.join(map(str, paths))} "
                    f"(for example {sampled[0]['path']}). Give the same --src as to `ich-prep build`."
                )
            problems += compare(dataset, files, sampled, progress)
            compared = len(rows)
    used = pc.not_equal(dataset.slices["status"], UNUSED).to_numpy()
    slices = int((used & selected).sum())
    return Verification(len(checked), slices, compared, tuple(problems), notes)


def _belongs(folder: BuildFolder, dataset: Dataset) -> bool:
    """Return whether ``folder`` is the working folder of the build that made ``dataset``."""
    state = readable_state(folder)
    return state is not None and state.belongs_to(dataset.digest)


def _check_root(dataset: Dataset) -> Iterator[Problem]:
    """Yield a problem if the root's other bytes were changed: they follow from its attributes and its members."""
    path = dataset.path / ROOT
    if root_document(dataset.path, dataset.attributes) != read_whole(path):
        yield Problem(str(path), "not the bytes that were written")


def _check_files(dataset: Dataset, folder: BuildFolder) -> Iterator[Problem]:
    """Yield the tables and metadata whose bytes are not the ones that were published.

    The images' metadata may be those of a longer array while an append that did not finish is to be resumed.
    """
    digests, appending = dataset.root.digests, has_append(folder, dataset.digest)
    for name in (f"{IMAGES}/{ROOT}", f"{LABELS}/{ROOT}"):  # of the tables the root always has one
        if name not in digests:
            yield Problem(str(dataset.path / ROOT), f"has no digest of {name}")
    for name, digest in sorted(digests.items()):
        path = dataset.path / name
        try:
            data = read_whole(path)
        except OSError as error:
            yield Problem(str(path), f"cannot be read: {error.strerror}")
            continue
        if digest != sha256(data) and not (appending and digest == _digest_when_shorter(dataset, name, data)):
            yield Problem(str(path), f"SHA-256 mismatch: not the file that was published ({len(data)} bytes)")


def _digest_when_shorter(dataset: Dataset, name: str, data: bytes) -> str | None:
    """Return the digest of the images' metadata before an append, in progress or interrupted, made the array longer."""
    if name != f"{IMAGES}/{ROOT}":
        return None
    try:
        longer = json.loads(data)["shape"][0] > len(dataset)
        return sha256(images_document(data, len(dataset))) if longer else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _check_tables(dataset: Dataset) -> Iterator[Problem]:
    """Yield the contradictions within the tables, between them, and with the counts."""
    slices, series, counts = dataset.slices, dataset.series, dataset.counts
    culprit = str(dataset.table_path("slices"))
    if not np.array_equal(slices["row"].to_numpy(), np.arange(len(dataset))):
        yield Problem(culprit, "line i is not row i")
        return
    ok = dataset.is_ok
    if int(ok.sum()) != counts.ok:
        yield Problem(culprit, f"expected {counts.ok} rows with status ok, found {int(ok.sum())}")
    for number, first, length, n_ok in zip(
        *(series[name].to_pylist() for name in ("series_row", "first_row", "n_slices", "n_ok")), strict=True
    ):
        inside = slices["series_row"].slice(first, length).to_numpy()
        if not (inside == number).all() or int(ok[first : first + length].sum()) != n_ok:
            yield Problem(
                str(dataset.table_path("series")), f"series {number} is not rows {first}..{first + length - 1}"
            )
    yield from _check_any(dataset)
    yield from _check_folds(dataset)
    quarantine = dataset.read_table("quarantine")
    withdrawn = pc.sum(pc.equal(slices["status"], WITHDRAWN)).as_py() or 0
    if (
        len(quarantine) != counts.quarantined
        or withdrawn != counts.withdrawn
        or counts.found != counts.ok + counts.quarantined + counts.withdrawn
    ):
        yield Problem(
            str(dataset.table_path("quarantine")),
            f"{counts.found} files were found; {counts.ok} slices are ok, {withdrawn} withdrawn and {len(quarantine)} "
            "quarantined",
        )


def _check_folds(dataset: Dataset) -> Iterator[Problem]:
    """Yield the first fold group, or patient of an older dataset, in several folds or in another than its patient's hash.

    The name of a group may hold the issuer of its smallest patient id; the hash is that of the id. Folds that the label
    table gave are what they are.
    """
    if dataset.attributes["spec"].get("split_groups"):
        return
    culprit, folds = str(dataset.table_path("slices")), dataset.attributes["spec"].get("folds")
    hidden = dataset.has_pseudonyms  # folds are hashes of the originals
    drawn = isinstance(folds, int) and not dataset.root.given_folds and not hidden
    lines = dataset.slices.select(["fold", "series_row"]).append_column("group", dataset.fold_groups)
    patient_of = _founders(dataset) if drawn else {}
    lines = lines.filter(pc.and_(pc.is_valid(lines["fold"]), pc.equal(dataset.slices["status"], OK)))
    for line in lines.group_by("group", use_threads=False).aggregate([("fold", "min"), ("fold", "max")]).to_pylist():
        group, first, last = line["group"], line["fold_min"], line["fold_max"]
        if first != last:
            yield Problem(culprit, f"fold group {group!r} is in folds {first} and {last}")
            return
        if drawn and first != (expected := fold_of(patient_of[group], folds=folds)):
            yield Problem(culprit, f"fold group {group!r} is in fold {first}, not {expected}")
            return
    of_series = dataset.series["fold"].take(lines["series_row"])
    if len(lines) and not pc.all(pc.equal(of_series, lines["fold"]).fill_null(False)).as_py():
        yield Problem(str(dataset.table_path("series")), "a series has another fold than its slices")


def _founders(dataset: Dataset) -> dict[str, str]:
    """Return for each fold group the smallest patient of the generation in which it got its fold: the fold is its hash."""
    ends = np.unique([event.counts.get("rows", len(dataset)) for event in dataset.root.history] or [len(dataset)])
    born = np.searchsorted(ends, np.arange(len(dataset)), side="right")
    lines = dataset.slices.select(["fold", "patient_id"]).append_column("group", dataset.fold_groups)
    lines = lines.append_column("born", pa.array(born))
    first = lines.filter(pc.is_valid(lines["fold"])).group_by("group", use_threads=False).aggregate([("born", "min")])
    began = first["born_min"].take(pc.index_in(lines["group"], value_set=first["group"]))
    founders = (
        lines.filter(pc.equal(lines["born"], began))
        .group_by("group", use_threads=False)
        .aggregate([("patient_id", "min")])
    )
    return dict(zip(founders["group"].to_pylist(), founders["patient_id_min"].to_pylist(), strict=True))


def _check_any(dataset: Dataset) -> Iterator[Problem]:
    """Yield the first slice label whose ``any`` is not the OR of the subtypes, a rule of RSNA's classes only."""
    if not is_rsna(dataset.classes):
        return
    by_slice = pc.equal(dataset.slices["label_level"], "slice").fill_null(False).to_numpy(zero_copy_only=False)
    values = dataset.labels[by_slice]
    known = (values >= 0).all(axis=1)
    wrong = known & (values[:, : len(SUBTYPES)].max(axis=1, initial=0) != values[:, -1])
    if wrong.any():
        row = int(np.flatnonzero(by_slice)[np.argmax(wrong)])
        yield Problem(str(dataset.table_path("slices")), f"row {row}: 'any' is not the OR of the five subtypes")


def _check_zarr(dataset: Dataset) -> Iterator[Problem]:
    """Yield a problem if zarr-python, independent of this project, reads the array differently."""
    import zarr

    if isinstance(dataset.path, Path):
        array = zarr.open_array(dataset.path / IMAGES, mode="r")
    else:
        store = zarr.storage.ObjectStore(dataset.path.store.client, read_only=True)
        array = zarr.open_array(store, path=(dataset.path / IMAGES).key, mode="r")
    seen = (array.shape[1:], array.dtype, array.shards, array.chunks)
    chunk = (1, *dataset.shape[1:])
    expected = (dataset.shape[1:], dataset.dtype, (dataset.spec.slices_per_shard, *chunk[1:]), chunk)
    if seen != expected or array.shape[0] < len(dataset):
        yield Problem(str(dataset.path / IMAGES / ROOT), f"expected {expected}, Zarr reads {seen} of {array.shape}")


def _selected(dataset: Dataset, where: str | None) -> NDArray[np.bool_]:
    """Return which rows are those of the filter ``where``, (slices,); raises ``UsageError`` if that is none."""
    if where is None:
        return np.ones(len(dataset), bool)
    selected = np.zeros(len(dataset), bool)
    selected[dataset.where(where)] = True
    if not selected.any():
        raise UsageError(f"--where {where!r} selects no row of {dataset.path}.")
    return selected


def _check_shards(dataset: Dataset, numbers: Sequence[int], progress: Progress) -> Iterator[Problem]:
    """Yield the shards of these ``numbers`` that are missing, damaged, swapped, or have other slices than the table says."""
    shards = dataset.read_table("shards").take(pa.array(numbers, pa.int64()))
    withdrawn = pc.equal(dataset.slices["status"], WITHDRAWN).to_numpy()
    buffer = np.empty(int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize, np.uint8)
    progress.begin("Checking shards", pc.sum(shards["n_rows"]).as_py(), "rows", 0)
    for line in shards.to_pylist():
        path = shard_path(dataset.path, line["shard"])
        rows = np.arange(line["first_row"], line["first_row"] + line["n_rows"])
        try:
            _check_shard(path, line, dataset.is_ok[rows], withdrawn[rows], dataset, buffer)
        except FileNotFoundError:
            yield Problem(str(path), f"shard {line['shard']} is missing")
        except (CorruptionError, OSError) as error:
            yield Problem(str(path), f"shard {line['shard']}: {error}")
        progress.advance(len(rows), 0)
    progress.end()


def _check_strays(dataset: Dataset, folder: BuildFolder) -> tuple[list[Problem], tuple[Problem, ...]]:
    """Return the files that are not part of the dataset, and those among them that are mere litter.

    The tables of earlier generations are part of it, and so are shards and tables that an unfinished append has written.
    """
    generation, appending = dataset.root.generation, has_append(folder, dataset.digest)
    expected = {PurePath(name) for name in (ROOT, *dataset.root.digests)}
    expected.update(shard_path(Path(), shard) for shard in range(dataset.counts.shards))
    problems, notes = list[Problem](), list[Problem]()
    names = names_below(dataset.path)
    if names is None:
        return [], (Problem(str(dataset.path), "cannot be listed: whether it has other files was not checked"),)
    for name in map(PurePath, names):
        if name in expected:
            continue
        path = dataset.path / name
        of = generation_of(name) if name.parent == PurePath(LABELS) and name.suffix == ".parquet" else None
        if of is not None and (of <= generation or (appending and of == generation + 1)):
            continue
        if appending and is_new_shard(dataset, name):
            continue
        if is_litter(name):
            notes.append(Problem(str(path), "is litter of an operating system, and ignored"))
        elif of == generation + 1:
            what = "is of a command that did not finish. Repeat it, or remove this with `ich-prep clean --generations`"
            problems.append(Problem(str(path), what))
        else:
            problems.append(Problem(str(path), "is not part of this dataset"))
    return problems, tuple(notes)


def _check_shard(
    path: Place,
    line: dict[str, Any],
    ok: NDArray[np.bool_],
    withdrawn: NDArray[np.bool_],
    dataset: Dataset,
    buffer: NDArray[np.uint8],
) -> None:
    """Raise ``CorruptionError`` if the shard is not, byte for byte, the one that was written."""
    data = np.frombuffer(read_whole(path), np.uint8)
    if len(data) != line["bytes"]:
        raise CorruptionError(f"expected {line['bytes']} bytes, found {len(data)}")
    chunks = dataset.spec.slices_per_shard
    body = len(data) - shard_format.index_bytes(chunks)
    tail = data[body:].tobytes()
    index = shard_format.parse_index(tail, chunks=chunks, body=body)
    checksums = []
    for inside, (offset, length) in enumerate(index.tolist()):
        row = line["first_row"] + inside
        present = offset != shard_format.MISSING
        expected = inside < len(ok) and bool(ok[inside])
        # A withdrawn slice keeps its bytes until they are purged.
        if present != expected and not (present and inside < len(ok) and bool(withdrawn[inside])):
            raise CorruptionError(
                f"row {row} " + ("has a chunk but not status ok" if present else "has status ok but no chunk")
            )
        if not present:
            continue
        chunk = data[offset : offset + length]
        try:
            checksums.append(shard_format.decode_chunk(chunk, codec=CODECS[dataset.spec.codec], out=buffer))
        except CorruptionError as error:
            raise CorruptionError(f"row {row}: {error}") from None
    if shard_format.fingerprint(np.array(checksums, np.uint32), tail) != line["fingerprint"]:
        raise CorruptionError("valid, but not the shard written here (fingerprint differs): were shards swapped?")


def _check_ledger(dataset: Dataset, folder: BuildFolder) -> Iterator[Problem]:
    """Yield the shards whose ledger entry in the working folder differs from the tables.

    A withdrawn row was ok; rows that no slice has, and shards that were purged, are not as any entry says.
    """
    status = dataset.slices["status"].to_pylist()
    with_chunk = np.ones(len(dataset), bool)
    if "chunk_crc32c" in dataset.slices.column_names:
        with_chunk = dataset.slices["chunk_crc32c"].is_valid().to_numpy()
    for line in dataset.read_table("shards").to_pylist():
        path = ledger.entry_path(folder.done, line["shard"])
        try:
            report = ShardReport.from_json(ledger.read(folder.done, line["shard"]))
            recorded = [row.status for row in report.rows]
        except (OSError, ValueError, CorruptionError):
            yield Problem(str(path), "the ledger entry of this shard cannot be read")
            continue
        rows = range(line["first_row"], line["first_row"] + line["n_rows"])
        found = [OK if status[row] == WITHDRAWN else status[row] for row in rows if status[row] != UNUSED]
        purged = any(status[row] == WITHDRAWN and not with_chunk[row] for row in rows)
        same = purged or report.fingerprint == line["fingerprint"]
        if not same or report.bytes != line["bytes"] or recorded != found:
            yield Problem(str(path), "the ledger and the tables disagree about this shard")
