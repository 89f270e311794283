"""Read a finished dataset back and name what does not hold.

Three things are compared that were written at different moments: the bytes with their checksums and fingerprints, the
tables with the pixels, and the counts with the ledger. With the sources at hand, a sample of slices is decoded once
more by another route: pydicom alone, and the arithmetic of the definitions in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep import ledger, sharding, store
from ich_prep.compiled import crc32c
from ich_prep.dicom.decode import decode_with_pydicom
from ich_prep.errors import CorruptionError, IchError, SliceError, SourceError, UsageError
from ich_prep.labels import CLASSES, SUBTYPES
from ich_prep.layouts.rsna import SIGN_12BIT
from ich_prep.publish import digest_of, root_document
from ich_prep.resize import resize_hu
from ich_prep.sources import LARGEST_MEMBER, Source, local_path, open_source, read_whole
from ich_prep.windows import AIR_HU, HIGHEST_HU, window_codes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.progress import Progress
    from ich_prep.store import Dataset


@dataclass(frozen=True)
class Problem:
    """One thing that does not hold: the file, or the row, that is to blame, and what is wrong with it."""

    culprit: str
    what: str


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what does not hold."""

    shards: int
    slices: int
    compared: int
    problems: tuple[Problem, ...]


def verify(
    path: str | Path,
    *,
    src: str | Path | Sequence[str | Path] | None = None,
    sample: float = 0.01,
    seed: int = 0,
    progress: Progress,
) -> Verification:
    """Return what does not hold in the dataset at ``path``.

    With ``src``, what it was built from, the share ``sample`` of its slices (at least one) is decoded again by
    pydicom alone and compared pixel by pixel. Raises ``DatasetError`` where there is no dataset, ``SourceError`` where
    ``src`` is neither a folder nor an archive, and ``UsageError`` where it has none of the files, or the plan that names
    them is gone.
    """
    if not 0 < sample <= 1:
        raise UsageError(f"Expected --sample within 0..1, the share of slices to compare; got {sample:g}.")
    dataset = store.open_dataset(path)
    plan = dataset.path / store.BUILD / store.PLAN
    given = [] if src is None else [src] if isinstance(src, str | Path) else list(src)
    source = open_source([local_path(one, option="--src") for one in given]) if given else None
    if source is not None and not plan.exists():
        raise UsageError(
            f"Expected the plan of the build at {plan}, which names the source file of each row; it is gone. Verify "
            "without --src, or build again with --overwrite."
        )
    problems = [*_check_digest(dataset), *_check_files(dataset)]
    intact = not problems
    witnesses = {str(dataset.path / name) for name in (store.ROOT, store.SLICES, store.SHARDS)}
    if any(problem.culprit in witnesses for problem in problems):
        # They are not the ones that were written, and cannot speak for the shards.
        return Verification(0, 0, 0, tuple(problems))
    if intact:
        problems += [*_check_root(dataset), *_check_tables(dataset), *_check_zarr(dataset)]
    problems += _check_shards(dataset, progress)
    problems += _check_strays(dataset)
    if intact:
        problems += _check_ledger(dataset)
    compared = 0
    if source is not None:
        try:
            lines = dataset.read_table(f"{store.BUILD}/{store.PLAN}")
        except CorruptionError:
            problems.append(Problem(str(plan), "cannot be read, and says where the source of each row lies"))
        else:
            rows = _sample(dataset, sample, seed)
            sampled = lines.take(pa.array(rows)).to_pylist()
            keys = _keys_of(source, [line["path"] for line in sampled])
            if sampled and not keys:
                raise UsageError(
                    f"Expected the files that {dataset.path} was built from in {', '.join(map(str, given))}; found none of "
                    f"the {len(sampled)} sampled (for one, {sampled[0]['path']}). Give what `ich-prep build` was given."
                )
            problems += _compare(dataset, source, keys, sampled, progress)
            compared = len(rows)
    return Verification(dataset.ich["counts"]["shards"], len(dataset), compared, tuple(problems))


def _check_digest(dataset: Dataset) -> Iterator[Problem]:
    """Yield whether what the root says of the dataset was changed."""
    if digest_of(dataset.ich) != dataset.digest:
        yield Problem(
            str(dataset.path / store.ROOT), "its digest is not that of what it says: a part of it was changed"
        )


def _check_root(dataset: Dataset) -> Iterator[Problem]:
    """Yield whether the root's other bytes were changed: they are a function of what it and its members say."""
    path = dataset.path / store.ROOT
    if root_document(dataset.path, dataset.ich) != path.read_bytes():
        yield Problem(str(path), "its bytes are not the ones that were written")


def _check_files(dataset: Dataset) -> Iterator[Problem]:
    """Yield the tables and metadata whose bytes are not the ones that were published."""
    for name, digest in sorted(dataset.ich["files"].items()):
        path = dataset.path / name
        try:
            data = path.read_bytes()
        except OSError as error:
            yield Problem(str(path), f"cannot be read: {error.strerror}")
            continue
        if hashlib.sha256(data).hexdigest() != digest:
            yield Problem(str(path), f"its SHA-256 is not the one that was published ({len(data)} bytes)")


def _check_tables(dataset: Dataset) -> Iterator[Problem]:
    """Yield where the tables contradict themselves, each other, or the counts."""
    slices, series, counts = dataset.slices, dataset.series, dataset.ich["counts"]
    culprit = str(dataset.path / store.SLICES)
    if not np.array_equal(slices["row"].to_numpy(), np.arange(len(dataset))):
        yield Problem(culprit, "line i is not row i")
        return
    ok = pc.equal(slices["status"], store.OK).to_numpy(zero_copy_only=False)
    if int(ok.sum()) != counts["ok"]:
        yield Problem(culprit, f"expected {counts['ok']} rows that are ok, found {int(ok.sum())}")
    for number, first, length, n_ok in zip(
        *(series[name].to_pylist() for name in ("series_row", "first_row", "n_slices", "n_ok")), strict=True
    ):
        inside = slices["series_row"].slice(first, length).to_numpy()
        if not (inside == number).all() or int(ok[first : first + length].sum()) != n_ok:
            yield Problem(
                str(dataset.path / store.SERIES), f"series {number} is not rows {first}..{first + length - 1}"
            )
    by_slice = pc.equal(slices["label_level"], "slice").to_numpy(zero_copy_only=False)
    values = np.stack([slices[name].fill_null(-1).to_numpy() for name in CLASSES], axis=1)[by_slice]
    known = (values >= 0).all(axis=1)
    wrong = known & (values[:, : len(SUBTYPES)].max(axis=1, initial=0) != values[:, -1])
    if wrong.any():
        row = int(np.flatnonzero(by_slice)[np.argmax(wrong)])
        yield Problem(culprit, f"row {row} has an 'any' that is not the or of the five subtypes")
    folds = slices.filter(pc.is_valid(slices["fold"])).group_by("patient_id").aggregate([("fold", "count_distinct")])
    split = folds.filter(pc.greater(folds["fold_count_distinct"], 1))
    if len(split):
        yield Problem(
            culprit, f"patient {split['patient_id'][0].as_py()} is in {split['fold_count_distinct'][0]} folds"
        )
    quarantine = dataset.read_table(store.QUARANTINE)
    if len(quarantine) != counts["quarantined"] or counts["found"] != counts["ok"] + counts["quarantined"]:
        yield Problem(
            str(dataset.path / store.QUARANTINE),
            f"{counts['found']} files were found; {counts['ok']} slices are ok and {len(quarantine)} set aside",
        )


def _check_zarr(dataset: Dataset) -> Iterator[Problem]:
    """Yield where zarr-python, who knows nothing of this project, sees another array."""
    import zarr

    array = zarr.open_array(dataset.path / store.IMAGES, mode="r")
    seen = (array.shape, array.dtype, array.shards, array.chunks)
    chunk = (1, *dataset.shape[1:])
    expected = (dataset.shape, dataset.dtype, (dataset.spec.slices_per_shard, *chunk[1:]), chunk)
    if seen != expected:
        yield Problem(str(dataset.path / store.IMAGES / store.ROOT), f"expected {expected}, Zarr reads {seen}")


def _check_shards(dataset: Dataset, progress: Progress) -> Iterator[Problem]:
    """Yield the shards that are missing, damaged, exchanged, or hold other slices than the table says."""
    shards = dataset.read_table(store.SHARDS)
    ok = pc.equal(dataset.slices["status"], store.OK).to_numpy(zero_copy_only=False)
    buffer = np.empty(int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize, np.uint8)
    progress.begin("Checking shards", len(dataset), "slices", 0)
    for line in shards.to_pylist():
        path = store.shard_path(dataset.path, line["shard"])
        rows = np.arange(line["first_row"], line["first_row"] + line["n_rows"])
        try:
            _check_shard(path, line, ok[rows], dataset, buffer)
        except FileNotFoundError:
            yield Problem(str(path), f"shard {line['shard']} is missing")
        except (CorruptionError, OSError) as error:
            yield Problem(str(path), f"shard {line['shard']}: {error}")
        progress.advance(len(rows), 0)
    progress.end()


def _check_strays(dataset: Dataset) -> Iterator[Problem]:
    """Yield the files that are no part of the dataset; what lies in the folder of the build is not looked at."""
    expected = {dataset.path / name for name in (store.ROOT, *store.PUBLISHED)}
    expected.update(store.shard_path(dataset.path, shard) for shard in range(dataset.ich["counts"]["shards"]))
    for path in sorted(dataset.path.rglob("*")):
        inside = path.relative_to(dataset.path).parts[0] != store.BUILD
        if inside and path not in expected and not path.is_dir():
            yield Problem(str(path), "is no part of this dataset")


def _check_shard(
    path: Path, line: dict[str, Any], ok: NDArray[np.bool_], dataset: Dataset, buffer: NDArray[np.uint8]
) -> None:
    """Raise ``CorruptionError`` where the shard is not, byte for byte, the one that was written."""
    data = np.fromfile(path, np.uint8)
    if len(data) != line["bytes"]:
        raise CorruptionError(f"expected {line['bytes']} bytes, found {len(data)}")
    chunks = dataset.spec.slices_per_shard
    body = len(data) - sharding.index_bytes(chunks)
    tail = data[body:].tobytes()
    index = sharding.parse_index(tail, chunks=chunks, body=body)
    checksums = []
    for inside, (offset, length) in enumerate(index.tolist()):
        row = line["first_row"] + inside
        there = offset != sharding.MISSING
        if there != (inside < len(ok) and bool(ok[inside])):
            raise CorruptionError(f"row {row} is {'there' if there else 'a hole'}, against its status")
        if not there:
            continue
        chunk = data[offset : offset + length]
        try:
            sharding.decode_chunk(chunk, codec=dataset.spec.codec, out=buffer)
        except CorruptionError as error:
            raise CorruptionError(f"row {row}: {error}") from None
        checksums.append(crc32c(chunk[: -sharding.CRC_BYTES]))
    if sharding.fingerprint(np.array(checksums, np.uint32), tail) != line["fingerprint"]:
        raise CorruptionError("it is a whole shard, and not the one that was written here: were shards exchanged?")


def _check_ledger(dataset: Dataset) -> Iterator[Problem]:
    """Yield where the ledger, if the build folder is still there, says something else than the tables."""
    folder = dataset.path / store.BUILD / store.DONE
    if not folder.is_dir():
        return
    status = dataset.slices["status"].to_pylist()
    for line in dataset.read_table(store.SHARDS).to_pylist():
        path = folder / f"{line['shard']:05d}.json"
        try:
            entry = ledger.read(folder, line["shard"])
            found = [row["status"] for row in entry["rows"]]
            same = entry["fingerprint"] == line["fingerprint"] and entry["bytes"] == line["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            yield Problem(str(path), "the ledger's entry of this shard cannot be read")
            continue
        if not same or found != status[line["first_row"] : line["first_row"] + line["n_rows"]]:
            yield Problem(str(path), "the ledger and the tables disagree about this shard")


# --- against the sources ---------------------------------------------------------------------------------------------


def _sample(dataset: Dataset, share: float, seed: int) -> NDArray[np.int64]:
    """Return the rows to compare, ascending: a share of those that are ok, at least one."""
    ok = np.flatnonzero(pc.equal(dataset.slices["status"], store.OK).to_numpy(zero_copy_only=False))
    count = min(len(ok), max(1, round(share * len(ok))))
    return np.sort(np.random.default_rng(seed).choice(ok, count, replace=False))


def _keys_of(source: Source, paths: list[str]) -> dict[str, bytes]:
    """Return the keys of those of ``paths`` that are in ``source``."""
    try:
        files = source.list().files
    except SourceError:
        return {}
    wanted = pa.array([path.encode() for path in paths], pa.binary())
    files = files.filter(pc.and_(pc.is_null(files["reason"]), pc.is_in(files["path"], value_set=wanted)))
    return {path.decode(): key for path, key in zip(files["path"].to_pylist(), files["key"].to_pylist(), strict=True)}


def _compare(
    dataset: Dataset, source: Source, keys: dict[str, bytes], lines: list[dict[str, Any]], progress: Progress
) -> Iterator[Problem]:
    """Yield the rows, of those whose ``lines`` of the plan these are, whose pixels are not those of the source file."""
    stored = np.empty((1, *dataset.shape[1:]), dataset.dtype)
    progress.begin("Comparing with the sources", len(lines), "slices", 0)
    for line in lines:
        try:
            dataset.read([line["row"]], stored)
            if line["path"] not in keys:
                raise SourceError("it is not in the sources any more")
            data = read_whole(source, keys[line["path"]], limit=LARGEST_MEMBER)
            expected = reference_pixels(data, line, dataset)
        except SliceError as error:
            yield Problem(f"row {line['row']}", f"{line['path']} can no longer be decoded: {error}")
        except (IchError, OSError) as error:
            yield Problem(f"row {line['row']}", f"{line['path']}: {error}")
        else:
            different = int((stored[0] != expected).sum())
            if different:
                yield Problem(f"row {line['row']}", f"{different} pixels differ from {line['path']} read by pydicom")
        progress.advance(1, 0)
    progress.end()


def reference_pixels(data: bytes, line: dict[str, Any], dataset: Dataset) -> NDArray[Any]:
    """Return the pixels (channel, y, x) of one DICOM file by the definitions: pydicom, then float64.

    ``line`` is the file's line of the plan: its repairs are part of the definition. Raises ``SliceError``.
    """
    stored = decode_with_pydicom(data).astype(np.int64)
    bits, signed = line["bits_stored"], line["signed"]
    if SIGN_12BIT in line["repairs"]:
        stored = (stored + 1000) % 4096
    stored &= (1 << bits) - 1
    if signed:
        stored -= (stored >> (bits - 1)) << bits
    intercept = -1000.0 if SIGN_12BIT in line["repairs"] else line["rescale_intercept"]
    exact = np.clip(np.rint(stored.astype(np.float64) * line["rescale_slope"] + intercept), AIR_HU, HIGHEST_HU)
    if line["padding_low"] is not None:
        exact[(stored >= line["padding_low"]) & (stored <= line["padding_high"])] = AIR_HU
    size = dataset.spec.size
    hu = np.empty((size, size), np.int16)
    resize_hu(exact.astype(np.int16), out=hu)
    if dataset.spec.store == "hu":
        return hu[np.newaxis]
    return np.stack([window_codes(hu, window) for window in dataset.spec.windows])
