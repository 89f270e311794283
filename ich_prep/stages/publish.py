"""Make a finished build visible: collect the ledger into tables, write these, then every ``zarr.json``, the root last.

The metadata is what zarr-python itself writes for such an array. zarr is imported here and in ``verify`` only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset import schema
from ich_prep.dataset.codecs import CODECS
from ich_prep.dataset.schema import (
    FORMAT,
    IMAGES,
    LABELS,
    OK,
    QUARANTINE_SCHEMA,
    ROOT,
    SHARD_SCHEMA,
    TABLES,
    digest_of,
)
from ich_prep.dataset.storage import (
    clear_leftovers,
    for_each,
    read_whole,
    size_of,
    sync_folder,
    write_first,
    write_whole,
)
from ich_prep.dataset.tables import read_sealed, with_columns, write_table
from ich_prep.dataset.windows import MIN_HU
from ich_prep.errors import BuildError
from ich_prep.stages import ledger
from ich_prep.stages.flags import flag_lists, flags_in, with_flags
from ich_prep.stages.images import equal_images, link_images
from ich_prep.stages.losses import losses_by_reason, lost_in_shards
from ich_prep.stages.plan_tables import PIXEL_COLUMNS
from ich_prep.stages.pseudonyms import key_id, published_quarantine, published_rows, published_state
from ich_prep.stages.results import REPORT_SCHEMA, REPORTED, reports_table
from ich_prep.stages.shard import ShardReport
from ich_prep.stages.state import write_state
from ich_prep.versions import PACKAGE, all_versions, library_versions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.bucket_path import Place
    from ich_prep.dataset.spec import Spec
    from ich_prep.stages.state import BuildFolder, State


# The share of the body in the range of lung from which on a volume is flagged as not a head.
LUNG_SHARE = 0.05


@dataclass(frozen=True)
class Tables:
    """The published tables, with the columns of ``dataset.schema``; ``lost``: labels without an ok row (``LOST_SCHEMA``)."""

    slices: pa.Table
    series: pa.Table
    shards: pa.Table
    quarantine: pa.Table
    lost: pa.Table

    @property
    def ok(self) -> int:
        """The number of rows that are ok."""
        number: int = pc.sum(self.shards["n_ok"]).as_py()
        return number


def collect_tables(out: Place, folder: BuildFolder, state: State) -> Tables:
    """Return the tables of the build of ``out``, once every shard has an entry in the ledger; rows and shards from 0.

    Raises ``BuildError`` if a shard does not have the length that its entry records.
    """
    plan = read_sealed(folder.plan, without=[name for name in PIXEL_COLUMNS if name != "path"])
    starts = np.arange(0, len(plan), state.spec.slices_per_shard)
    shards, parts = [], []
    numbers = range(state.first_shard, state.first_shard + len(starts))
    for entry in for_each(partial(_entry, out, folder), numbers, at=out):
        shards.append((entry.bytes, entry.fingerprint, entry.hu_histogram))
        parts.append(reports_table(entry.rows))
    reports = pa.concat_tables([REPORT_SCHEMA.empty_table(), *parts]).combine_chunks()
    del parts
    ok = pc.equal(reports["status"], OK).to_numpy()

    lost = lost_in_shards(plan, reports["status"], _is_positive(plan, state.spec))
    failed = plan.select(["path", "row"]).filter(pa.array(~ok))
    problems = reports.select(["status", "detail"]).filter(pa.array(~ok))
    quarantined = [
        failed["path"],
        pa.array(["shard"] * len(failed), pa.string()),
        failed["row"],
        problems["status"],
        problems["detail"],
    ]
    given_fold = plan["given_fold"]
    slices = with_results(plan.drop_columns(["path", "label_key", "given_fold"]), reports)
    del plan, reports
    slices = link_images(slices, given_fold, equal_images(slices), state.spec)
    sizes, fingerprints, histograms = zip(*shards, strict=True)
    table = [
        pa.array(np.arange(len(starts))),
        pa.array(starts),
        pa.array(np.diff(np.r_[starts, len(slices)]), pa.int32()),
        pa.array(np.add.reduceat(ok.astype(np.int64), starts), pa.int32()),
        pa.array(sizes, pa.int64()),
        pa.array(fingerprints, pa.string()),
        pa.array(histograms, pa.list_(pa.int64())),
    ]
    return Tables(
        slices=slices,
        series=with_rows(read_sealed(folder.series), slices, ok),
        shards=pa.table(table, schema=SHARD_SCHEMA),
        quarantine=pa.concat_tables([read_sealed(folder.quarantine), pa.table(quarantined, schema=QUARANTINE_SCHEMA)]),
        lost=pa.concat_tables([read_sealed(folder.lost), lost]),
    )


def _is_positive(plan: pa.Table, spec: Spec) -> pa.Array:
    """Return whether any class of each row is 1."""
    values = np.stack([plan[name].fill_null(0).to_numpy() for name in spec.classes], axis=1)
    return pa.array((values == 1).any(axis=1), pa.bool_())


def with_rows(series: pa.Table, slices: pa.Table, ok: NDArray[np.bool_]) -> pa.Table:
    """Return the series table with what its rows of ``slices`` say: the number that are ``ok``, fold group, fold, flags."""
    starts = series["first_row"]
    first = slices.take(starts)
    columns = {
        "n_ok": np.add.reduceat(ok.astype(np.int64), starts.to_numpy()),
        "fold": first["fold"],
        "fold_group": first["fold_group"],
        "flags": series_flags(series, slices),
    }
    return with_columns(series, columns)


def series_flags(series: pa.Table, slices: pa.Table) -> pa.ListArray:
    """Return for each volume of ``series`` the sorted flags of its ``slices``."""
    lines, words = flags_in(slices["flags"])
    owners = np.searchsorted(series["first_row"].to_numpy(), lines, side="right") - 1
    return flag_lists(owners, words, count=len(series))


def _entry(out: Place, folder: BuildFolder, number: int) -> ShardReport:
    """Return the ledger's entry of shard ``number``, after checking that the shard has the length that it records."""
    path = schema.shard_path(out, number)
    entry = ShardReport.from_json(ledger.read(folder.done, number))
    actual = size_of(path)
    if actual != entry.bytes:
        raise BuildError(
            f"Shard {number} was written with {entry.bytes} bytes; {path} now has "
            f"{'none' if actual is None else actual}. Run the same command again, without --overwrite, to write it again."
        )
    clear_leftovers(path)
    return entry


def with_results(slices: pa.Table, reports: pa.Table) -> pa.Table:
    """Return the slice table with what the shards reported (``REPORT_SCHEMA``): status, flags, HU, hash, checksum."""
    slices = with_columns(slices, {name: reports[name] for name in ("status", *REPORTED)})
    lines, words = flags_in(reports["flags"])
    added = {
        word: np.isin(np.arange(len(slices)), lines[pc.equal(words, word).to_numpy(False)])
        for word in words.unique().to_pylist()
    }
    added["same_image"] = equal_images(slices) >= 0
    added["not_head"] = _shows_lung(slices["series_row"].to_numpy(), reports)
    return with_columns(slices, {"flags": with_flags(slices["flags"], added)})


def _shows_lung(series_row: NDArray[np.int64], reports: pa.Table) -> NDArray[np.bool_]:
    """Return for each row whether much of what its volume shows inside the body is in the range of lung."""
    lung, body = (np.bincount(series_row, reports[name].to_numpy()) for name in ("lung", "body"))
    shows: NDArray[np.bool_] = (lung > LUNG_SHARE * body)[series_row]
    return shows


def pseudonymised(tables: Tables, key: bytes, spec: Spec) -> Tables:
    """Return the tables with pseudonyms by ``key`` in place of identifiers; columns ``x_...`` stay as they are."""
    extra = [name for name in tables.slices.column_names if name.startswith("x_")]
    return replace(
        tables,
        slices=published_rows(tables.slices, key, classes=spec.classes, extra=extra),
        series=published_rows(tables.series, key, classes=spec.classes),
        quarantine=published_quarantine(tables.quarantine, key),
    )


def publish(
    out: Place, folder: BuildFolder, *, state: State, tables: Tables, found: int, key: bytes | None = None
) -> dict[str, int]:
    """Write ``tables`` and the metadata of the dataset ``out``, the root's last; return its counts.

    ``found`` is the number of files in the source. Every shard must be on disk. The working ``folder`` records the
    dataset's digest just before the root is written, which binds the two. With a ``key``, what identifies is replaced
    by pseudonyms; the folder keeps the originals.
    """
    shown = published_state(state, key)
    tables = tables if key is None else pseudonymised(tables, key, state.spec)
    if (out / ROOT).exists():
        raise _published_meanwhile(out)
    (out / LABELS).mkdir(exist_ok=True)
    names = {table: schema.table_name(table, generation=1) for table in TABLES}
    for name in (*names.values(), ROOT, f"{IMAGES}/{ROOT}", f"{LABELS}/{ROOT}"):
        clear_leftovers(out / name)
    for table, name in names.items():
        write_table(out / name, getattr(tables, table))
    sync_folder(out / IMAGES / "c")
    for group, document in _metadata(state.spec, len(tables.slices)).items():
        write_whole(out / group / ROOT, document)
        sync_folder(out / group)
    counts = {
        "rows": len(tables.slices),
        "found": found,
        "planned": len(tables.slices),
        "ok": tables.ok,
        "quarantined": len(tables.quarantine),
        "withdrawn": 0,
        "series": len(tables.series),
        "patients": len(pc.unique(tables.slices["patient_id"])),
        "fold_groups": len(pc.unique(tables.slices["fold_group"])),
        "shards": len(tables.shards),
        "bytes": pc.sum(tables.shards["bytes"]).as_py(),
    }
    ich: dict[str, Any] = {
        "format": FORMAT,
        "spec": shown.spec.model_dump(mode="json", exclude={"classes"}),
        "classes": list(state.spec.classes),
        "counts": counts,
        "lost_labels": {
            reason: {"labels": loss.labels, "positive": loss.positive}
            for reason, loss in losses_by_reason(tables.lost).items()
        },
        # Otherwise verify expects each fold to be the hash of its group.
        "given_folds": bool(
            pc.any(pc.greater_equal(read_sealed(folder.plan, ["given_fold"])["given_fold"], 0)).as_py()
        ),
        "tables": names,
        "digests": {
            name: sha256(read_whole(out / name))
            for name in sorted((*names.values(), f"{IMAGES}/{ROOT}", f"{LABELS}/{ROOT}"))
        },
        "generation": 1,
        "labels_digest": shown.labels,
        "history": [
            {
                "command": "build",
                "generation": 1,
                "counts": counts,
                "digests": {
                    "sources": shown.sources,
                    "labels": shown.labels,
                    **({} if key is None else {"key": key_id(key)}),
                },
            }
        ],
        "created_by": f"ich-prep {all_versions()[PACKAGE]}",
        "versions": library_versions(),
    }
    ich["digest"] = digest_of(ich)
    write_state(folder, state.model_copy(update={"published": ich["digest"]}))
    for path in (folder.path, out.parent):  # the name of the dataset, too
        sync_folder(path)
    try:
        write_first(out / ROOT, root_document(out, ich))
    except FileExistsError:
        raise _published_meanwhile(out) from None
    sync_folder(out)
    return counts


def _published_meanwhile(out: Place) -> BuildError:
    return BuildError(
        f"Another process published {out} while this one was building it, and nothing of that was replaced. Use that "
        "dataset, build into another place, or replace it with --overwrite."
    )


def sha256(data: bytes) -> str:
    """Return the SHA-256 of ``data``, as the root records it."""
    return hashlib.sha256(data).hexdigest()


def root_document(out: Place, ich: dict[str, Any]) -> bytes:
    """Return the bytes of the root's ``zarr.json``: a group with the attribute ``ich``.

    It repeats the metadata of the images and the labels, as zarr-python's consolidated metadata does: xarray looks for
    that first, and warns if it is missing. The array is as long as ``ich`` says, also while it grows.
    """
    members = {name: json.loads(read_whole(out / name / ROOT)) for name in (IMAGES, LABELS)}
    members[IMAGES]["shape"][0] = ich["counts"]["rows"]
    document = {
        "attributes": {"ich": ich},
        "consolidated_metadata": {
            "kind": "inline",
            "metadata": members,
            "must_understand": False,
        },
        "node_type": "group",
        "zarr_format": 3,
    }
    return _json(document)


def images_document(data: bytes, rows: int) -> bytes:
    """Return the ``zarr.json`` of the images, of which ``data`` is one of another length, for that many ``rows``."""
    document = json.loads(data)
    document["shape"][0] = rows
    return _json(document)


def _json(document: Any) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True).encode()


def _metadata(spec: Spec, slices: int) -> dict[str, bytes]:
    """Return the ``zarr.json`` of each folder below the root, as zarr-python writes them."""
    import zarr
    from zarr.codecs import BytesCodec
    from zarr.storage import MemoryStore

    written: dict[str, Any] = {}
    memory = MemoryStore(written)
    root = zarr.create_group(memory, zarr_format=3)
    root.create_group(LABELS)
    chunk = (1, spec.channels, spec.size, spec.size)
    compressors: list[Any] = [*CODECS[spec.codec].zarr_metadata(chunk[1:], spec.dtype), {"name": "crc32c"}]
    root.create_array(
        IMAGES,
        shape=(slices, *chunk[1:]),
        dtype=spec.dtype,
        chunks=chunk,
        shards=(spec.slices_per_shard, *chunk[1:]),
        filters=None,
        serializer=BytesCodec(endian="little" if spec.dtype.itemsize > 1 else None),
        compressors=compressors,
        fill_value=0 if spec.store == "windows" else MIN_HU,
        dimension_names=("slice", "channel", "y", "x"),
        attributes={"channels": [window.name for window in spec.windows]}
        if spec.store == "windows"
        else {"channels": ["hu"], "units": "HU"},
    )
    return {folder: _json(json.loads(written[f"{folder}/{ROOT}"].to_bytes())) for folder in (IMAGES, LABELS)}
