"""Make a finished build visible: gather the ledger into the tables, write these, then every ``zarr.json``, the root last.

The metadata is what zarr-python itself writes for such an array. zarr lives here, and in ``verify``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep import ledger, store
from ich_prep.errors import BuildError
from ich_prep.plan import PIXEL_COLUMNS
from ich_prep.releases import PACKAGE, all_releases, library_releases
from ich_prep.shard import RowReport, ShardReport
from ich_prep.sharding import BLOSC_LEVELS, block_bytes
from ich_prep.windows import AIR_HU

if TYPE_CHECKING:
    from ich_prep.store import Spec, State


@dataclass(frozen=True)
class Tables:
    """The published tables, as ``store`` has their columns."""

    slices: pa.Table
    series: pa.Table
    shards: pa.Table
    quarantine: pa.Table


def gather(target: Path, state: State) -> Tables:
    """Return the tables of the build at ``target``, of which every shard has its entry in the ledger.

    Raises ``BuildError`` where a shard is not there as its entry says.
    """
    folder = target / store.BUILD
    plan = store.read_parquet(folder / store.PLAN)
    per_shard = state.spec.slices_per_shard
    starts = np.arange(0, len(plan), per_shard)
    entries = [_entry(target, number) for number in range(len(starts))]
    lines = [line for entry in entries for line in entry.rows]
    status = pa.array([line.status for line in lines], pa.string())
    ok = pc.equal(status, store.OK).to_numpy(zero_copy_only=False)

    failed = plan.filter(pa.array(~ok))
    lost = [
        failed["path"],
        pa.array(["shard"] * len(failed), pa.string()),
        failed["row"],
        status.filter(pa.array(~ok)),
        pa.array([line.detail for line in lines if line.status != store.OK], pa.string()),
    ]
    series = store.read_parquet(folder / store.PLANNED_SERIES)
    place = series.schema.get_field_index("n_ok")
    counted = np.add.reduceat(ok.astype(np.int64), series["first_row"].to_numpy())
    shards = [
        pa.array(np.arange(len(starts))),
        pa.array(starts),
        pa.array(np.diff(np.r_[starts, len(plan)]), pa.int32()),
        pa.array(np.add.reduceat(ok.astype(np.int64), starts), pa.int32()),
        pa.array([entry.bytes for entry in entries], pa.int64()),
        pa.array([entry.fingerprint for entry in entries], pa.string()),
    ]
    return Tables(
        slices=_with_results(plan.drop_columns(list(PIXEL_COLUMNS)), lines, status),
        series=series.set_column(place, series.schema.field(place), pa.array(counted, pa.int32())),
        shards=pa.table(shards, schema=store.SHARD_SCHEMA),
        quarantine=pa.concat_tables(
            [store.read_parquet(folder / store.PLANNED_QUARANTINE), pa.table(lost, schema=store.QUARANTINE_SCHEMA)]
        ),
    )


def _entry(target: Path, number: int) -> ShardReport:
    """Return what the ledger says of shard ``number``, once it is certain that the shard is there."""
    path = store.shard_path(target, number)
    entry = ShardReport.from_json(ledger.read(target / store.BUILD / store.DONE, number))
    found = store.shard_bytes(target, number)
    if found != entry.bytes:
        raise BuildError(
            f"Expected shard {number} of {entry.bytes} bytes at {path}, as it was written; found "
            f"{'nothing' if found is None else f'{found} bytes'}. Run the same command again, without --overwrite: it is "
            "written anew."
        )
    ledger.clear_leftovers(path)
    return entry


def _with_results(slices: pa.Table, lines: list[RowReport], status: pa.Array) -> pa.Table:
    """Return the slice table with what the shards found: status, flags, extremes, hash."""
    flags = [sorted({*planned, *line.flags}) for planned, line in zip(slices["flags"].to_pylist(), lines, strict=True)]
    results = {"status": status, "flags": pa.array(flags, pa.list_(pa.string()))}
    for name in ("hu_min", "hu_max", "hu_mean", "content_hash"):
        results[name] = pa.array([getattr(line, name) for line in lines], store.SLICE_SCHEMA.field(name).type)
    columns = [results.get(field.name, slices[field.name]) for field in store.SLICE_SCHEMA]
    return pa.table(columns, schema=store.SLICE_SCHEMA)


def publish(target: Path, *, spec: Spec, tables: Tables, found: int) -> dict[str, Any]:
    """Write ``tables`` and the metadata of the dataset at ``target``, the root's last; return its counts.

    ``found`` is the number of files of the source. Every shard must be on disk.
    """
    (target / store.LABELS).mkdir(exist_ok=True)
    for name in (*store.PUBLISHED, store.ROOT):
        ledger.clear_leftovers(target / name)
    for name, table in (
        (store.SLICES, tables.slices),
        (store.SERIES, tables.series),
        (store.SHARDS, tables.shards),
        (store.QUARANTINE, tables.quarantine),
    ):
        store.write_table(target / name, table)
    ledger.sync_folder(target / store.IMAGES / "c")
    for folder, document in _metadata(spec, len(tables.slices)).items():
        ledger.write_whole(target / folder / store.ROOT, document)
        ledger.sync_folder(target / folder)
    counts = {
        "found": found,
        "planned": len(tables.slices),
        "ok": pc.sum(tables.shards["n_ok"]).as_py(),
        "quarantined": len(tables.quarantine),
        "series": len(tables.series),
        "patients": len(pc.unique(tables.slices["patient_id"])),
        "shards": len(tables.shards),
        "bytes": pc.sum(tables.shards["bytes"]).as_py(),
    }
    ich: dict[str, Any] = {
        "format": store.FORMAT,
        "spec": spec.model_dump(mode="json"),
        "counts": counts,
        "created_by": f"ich-prep {all_releases()[PACKAGE]}",
        "versions": library_releases(),
        "files": {name: _sha256((target / name).read_bytes()) for name in store.PUBLISHED},
    }
    ich["digest"] = digest_of(ich)
    ledger.write_whole(target / store.ROOT, root_document(target, ich))
    ledger.sync_folder(target)
    return counts


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_of(ich: dict[str, Any]) -> str:
    """Return the SHA-256 of all that the root says, which names the digest of every table, and so every shard."""
    rest = {key: value for key, value in ich.items() if key != "digest"}
    return _sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def root_document(out: Path, ich: dict[str, Any]) -> bytes:
    """Return the bytes of the root's ``zarr.json``: a group with the attribute ``ich``.

    It repeats the metadata of the images and the labels, as zarr-python's consolidated metadata does: xarray looks for
    that first, and warns where it is not there.
    """
    document = {
        "attributes": {"ich": ich},
        "consolidated_metadata": {
            "kind": "inline",
            "metadata": {
                name: json.loads((out / name / store.ROOT).read_bytes()) for name in (store.IMAGES, store.LABELS)
            },
            "must_understand": False,
        },
        "node_type": "group",
        "zarr_format": 3,
    }
    return json.dumps(document, indent=2, sort_keys=True).encode()


def _metadata(spec: Spec, slices: int) -> dict[str, bytes]:
    """Return the ``zarr.json`` of each folder below the root, as zarr-python writes them."""
    import zarr
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    written: dict[str, Any] = {}
    memory = MemoryStore(written)
    root = zarr.create_group(memory, zarr_format=3)
    for name in (store.BUILD, store.LABELS):
        root.create_group(name)
    compressors: list[Any] = [Crc32cCodec()]
    if spec.codec != "none":
        blosc = BloscCodec(
            cname=spec.codec,
            clevel=BLOSC_LEVELS[spec.codec],
            shuffle="shuffle",
            blocksize=block_bytes((spec.channels, spec.size, spec.size), spec.dtype.itemsize),
            typesize=spec.dtype.itemsize,
        )
        compressors.insert(0, blosc)
    chunk = (1, spec.channels, spec.size, spec.size)
    root.create_array(
        store.IMAGES,
        shape=(slices, *chunk[1:]),
        dtype=spec.dtype,
        chunks=chunk,
        shards=(spec.slices_per_shard, *chunk[1:]),
        filters=None,
        serializer=BytesCodec(endian="little" if spec.dtype.itemsize > 1 else None),
        compressors=compressors,
        fill_value=0 if spec.store == "windows" else AIR_HU,
        dimension_names=("slice", "channel", "y", "x"),
        attributes={"channels": [window.name for window in spec.windows]}
        if spec.store == "windows"
        else {"channels": ["hu"], "units": "HU"},
    )
    return {
        folder: json.dumps(json.loads(written[f"{folder}/{store.ROOT}"].to_bytes()), indent=2, sort_keys=True).encode()
        for folder in (store.BUILD, store.IMAGES, store.LABELS)
    }
