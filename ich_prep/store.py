"""The on-disk contract ``ich/1``: every name, type and column inside a dataset; how it is published and opened.

docs/format.md is checked against this module. What a dataset is to a reader:

    data.zarr/
      zarr.json                  root group; its attribute ``ich`` says what this is; written last
      images/zarr.json           array (slice, channel, y, x)
      images/c/<k>/0/0/0         shard k
      labels/zarr.json           a group, so that Zarr tools walk past what is beside it
      labels/slices.parquet      line i is images[i]
      labels/series.parquet      one line a series
      labels/shards.parquet      one line a shard: its length and fingerprint
      labels/quarantine.parquet  files and slices set aside, and why
      build/                     the plan, the ledger and the log of the build, a group too; no reader needs it
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ich_prep.errors import CorruptionError, DatasetError
from ich_prep.labels import CLASSES, UNKNOWN
from ich_prep.ledger import write_whole
from ich_prep.reader import ShardReader, require_out
from ich_prep.windows import PRESETS, Window, parse_windows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FORMAT = "ich/1"
ROOT = "zarr.json"
IMAGES, LABELS, BUILD = "images", "labels", "build"
SLICES, SERIES = "labels/slices.parquet", "labels/series.parquet"
SHARDS, QUARANTINE = "labels/shards.parquet", "labels/quarantine.parquet"
# Inside build/.
STATE, FILES, SCAN, PLAN, DONE = "state.json", "files.parquet", "scan", "plan.parquet", "shards"
LOG, LOCK, LABEL_PROBLEMS = "log.jsonl", "lock", "label_problems.parquet"
PLANNED_SERIES, PLANNED_QUARANTINE = "series.parquet", "quarantine.parquet"

OK = "ok"
LABEL_FIELDS = [(name, pa.int8()) for name in CLASSES]

SLICE_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sop_instance_uid", pa.string()),
        ("series_instance_uid", pa.string()),
        ("study_instance_uid", pa.string()),
        ("patient_id", pa.string()),
        ("subset", pa.string()),
        ("fold", pa.int8()),
        ("status", pa.string()),
        ("label_level", pa.string()),
        *LABEL_FIELDS,
        ("label_line", pa.int64()),
        ("series_row", pa.int64()),
        ("slice_index", pa.int32()),
        ("position_mm", pa.float64()),
        ("slice_spacing_mm", pa.float64()),
        ("pixel_spacing_y_mm", pa.float64()),
        ("pixel_spacing_x_mm", pa.float64()),
        ("source_rows", pa.int32()),
        ("source_columns", pa.int32()),
        ("rescale_slope", pa.float64()),
        ("rescale_intercept", pa.float64()),
        ("repairs", pa.list_(pa.string())),
        ("flags", pa.list_(pa.string())),
        ("hu_min", pa.float64()),
        ("hu_max", pa.float64()),
        ("hu_mean", pa.float64()),
        ("content_hash", pa.string()),
    ]
)
SERIES_SCHEMA = pa.schema(
    [
        ("series_row", pa.int64()),
        ("series_instance_uid", pa.string()),
        ("study_instance_uid", pa.string()),
        ("patient_id", pa.string()),
        ("subset", pa.string()),
        ("fold", pa.int8()),
        ("first_row", pa.int64()),
        ("n_slices", pa.int32()),
        ("n_ok", pa.int32()),
        ("label_level", pa.string()),
        *LABEL_FIELDS,
        ("orientation", pa.list_(pa.float64())),
        ("tilt_degrees", pa.float64()),
        ("slice_spacing_mm", pa.float64()),
        ("pixel_spacing_y_mm", pa.float64()),
        ("pixel_spacing_x_mm", pa.float64()),
        ("source_rows", pa.int32()),
        ("source_columns", pa.int32()),
    ]
)
SHARD_SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("first_row", pa.int64()),
        ("n_rows", pa.int32()),
        ("n_ok", pa.int32()),
        ("bytes", pa.int64()),
        ("fingerprint", pa.string()),
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("stage", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


class Spec(BaseModel):
    """All that changes the bytes of a dataset besides its sources, and nothing else.

    ``windows`` are what a "windows" store holds, one channel each, and what a reader of an "hu" store makes by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal["auto", "rsna", "cq500", "folder"] = "auto"
    size: int = Field(default=512, ge=16, le=4096)
    store: Literal["windows", "hu"] = "windows"
    windows: tuple[Window, ...] = (PRESETS["brain"], PRESETS["subdural"], PRESETS["bone"])
    slices_per_shard: int = Field(default=256, ge=1, le=65536)
    codec: Literal["lz4", "zstd", "none"] = "lz4"
    folds: int = Field(default=5, ge=2, le=127)

    @field_validator("windows", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return parse_windows(value)
        return value

    @property
    def channels(self) -> int:
        """The number of channels of a stored slice."""
        return len(self.windows) if self.store == "windows" else 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a stored pixel: uint8 window codes, or int16 HU."""
        return np.dtype(np.uint8 if self.store == "windows" else np.int16)


class State(BaseModel):
    """What a build in progress has decided, in ``build/state.json``.

    ``sources`` and ``labels`` are digests of the file listing and of the labels; ``plan`` that of the plan, once made.
    ``releases`` are those of what makes the bytes, none in a build that was begun before they were kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = FORMAT
    spec: Spec
    sources: str
    labels: str
    releases: dict[str, str | None] = {}
    plan: str | None = None


def read_state(build: Path) -> State:
    """Return the state of the build whose folder ``build`` is; raises ``DatasetError`` where it cannot be read."""
    try:
        return State.model_validate_json((build / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise DatasetError(
            f"Expected the state of a build of format {FORMAT} at {build / STATE}; it cannot be read ({error}). "
            "Build again with --overwrite."
        ) from None


def write_state(build: Path, state: State) -> None:
    """Write the state of the build whose folder ``build`` is, whole or not at all."""
    write_whole(build / STATE, state.model_dump_json(indent=2).encode())


def shard_path(out: Path, shard: int) -> Path:
    """Return where shard number ``shard`` lies."""
    return out / IMAGES / "c" / str(shard) / "0" / "0" / "0"


def shard_bytes(out: Path, shard: int) -> int | None:
    """Return the length of shard number ``shard`` in bytes, None where it is not there."""
    try:
        return shard_path(out, shard).stat().st_size
    except FileNotFoundError:
        return None


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a Parquet file's table, its pages checked; unlike ``pq.read_table`` it does not import pandas."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a published table: equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=1 << 16, write_page_checksum=True)
    write_whole(path, sink.getvalue().to_pybytes())


PUBLISHED = (f"{IMAGES}/{ROOT}", f"{LABELS}/{ROOT}", QUARANTINE, SERIES, SHARDS, SLICES)


def open_dataset(path: str | Path) -> Dataset:
    """Return the finished dataset at ``path``.

    Raises ``DatasetError`` for a path that is not there, not a dataset, not finished, or of another format.
    """
    root = Path(path)
    try:
        document = json.loads((root / ROOT).read_bytes())
    except PermissionError as error:
        raise DatasetError(
            f"Expected to be allowed to read {root / ROOT}; it cannot be read ({error.strerror}). Mend that, or run this "
            "as a user who may."
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        if (root / BUILD / STATE).exists():
            raise DatasetError(
                f"Expected a finished dataset at {root}; its build was not finished. Run the same `ich-prep build` "
                "again: it goes on where it stopped."
            ) from None
        found = "a file" if root.is_file() else "a folder without a zarr.json" if root.is_dir() else "nothing"
        raise DatasetError(
            f"Expected a dataset at {root}; found {found}. Make one with `ich-prep build --src DICOM --out {root}`."
        ) from None
    except ValueError:
        raise CorruptionError(
            f"{root / ROOT} is not JSON: expected what `ich-prep build` wrote. Restore it, or remove the folder and build "
            "again."
        ) from None
    attributes = document.get("attributes") if isinstance(document, dict) else None
    ich = attributes.get("ich") if isinstance(attributes, dict) else None
    if not isinstance(ich, dict):
        raise DatasetError(f"Expected a dataset of ich-prep at {root}; found another Zarr group, without 'ich'.")
    if ich.get("format") != FORMAT:
        raise DatasetError(
            f"Expected format {FORMAT} at {root}; found {ich.get('format')!r}. Read it with the version that wrote it "
            f"({ich.get('created_by', 'unknown')}), or build into another folder."
        )
    try:
        spec = Spec.model_validate(ich["spec"])
        counts, _, _ = dict(ich["counts"]), dict(ich["files"]), str(ich["digest"])
        slices = int(counts["planned"])
    except (KeyError, TypeError, ValueError, ValidationError):
        raise CorruptionError(
            f"{root / ROOT} lacks parts of what `ich-prep build` wrote. Restore it, or remove the folder and build again."
        ) from None
    return Dataset(root, spec, ich, slices)


class Dataset:
    """A finished dataset: its tables, and its pixels in any order. Safe to share between threads.

    ``path``, ``spec``, ``ich`` (what the root says of the dataset), ``digest`` (of all its bytes), ``shape`` (slice,
    channel, y, x) and ``dtype`` (uint8 window codes or int16 HU).
    """

    def __init__(self, path: Path, spec: Spec, ich: dict[str, Any], slices: int) -> None:
        self.path, self.spec, self.ich = path, spec, ich
        self.digest = str(ich["digest"])
        self.shape = (slices, spec.channels, spec.size, spec.size)
        self.dtype = spec.dtype
        self._reader = ShardReader(
            lambda shard: shard_path(path, shard),
            slices=slices,
            slice_bytes=int(np.prod(self.shape[1:])) * spec.dtype.itemsize,
            slices_per_shard=spec.slices_per_shard,
            codec=spec.codec,
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Dataset({str(self.path)!r}, {self.spec.store}, shape={self.shape})"

    @cached_property
    def slices(self) -> pa.Table:
        """The label table: line i is row i; columns of ``SLICE_SCHEMA``."""
        return self.read_table(SLICES)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of ``labels``."""
        return tuple(self.ich.get("classes", CLASSES))

    @cached_property
    def labels(self) -> NDArray[np.int8]:
        """The labels of every row, (slices, classes) int8, -1 where unknown."""
        columns = [self.slices[name].fill_null(UNKNOWN).to_numpy() for name in self.classes]
        return np.stack(columns, axis=1).astype(np.int8, copy=False)

    @cached_property
    def series(self) -> pa.Table:
        """One line a series, in the order of its rows; columns of ``SERIES_SCHEMA``."""
        return self.read_table(SERIES)

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a published table, or only some of its columns; raises ``CorruptionError`` where it cannot be read."""
        try:
            return read_parquet(self.path / name, columns)
        except (OSError, pa.ArrowException) as error:
            raise CorruptionError(
                f"{self.path / name} cannot be read: {error}. Run `ich-prep verify {self.path}`, then restore it, or build "
                "again with --overwrite."
            ) from None

    def read(
        self, rows: Sequence[int] | NDArray[np.integer[Any]], out: NDArray[Any] | None = None, *, threads: int = 1
    ) -> NDArray[Any]:
        """Return the pixels of ``rows``, in their order, as (len(rows), channel, y, x).

        Rows may come in any order and more than once. ``out``, if given, is C-contiguous, of that shape and of
        ``dtype``, and is what is returned. Raises ``IndexError`` for a row outside of the dataset, ``DatasetError`` for
        a row whose status is not ok, ``TypeError`` for what is no row number, ``CorruptionError`` for bytes that are
        not the ones written; never gives zeros for what is not there.
        """
        wanted = np.asarray(rows)
        if wanted.size and (wanted.dtype.kind not in "iu" or wanted.ndim != 1):
            raise TypeError(f"Expected row numbers, as a list or (n,); got {wanted.dtype} of shape {wanted.shape}.")
        wanted = wanted.astype(np.int64, copy=False)
        shape = (len(wanted), *self.shape[1:])
        if out is None:
            out = np.empty(shape, self.dtype)
        require_out(out, shape, self.dtype)
        lines = out.reshape(len(wanted), int(np.prod(shape[1:]))).view(np.uint8)
        holes = self._reader.read(wanted, lines, threads=threads)
        if holes:
            self._explain(holes[0])
        return out

    def volume(self, series_instance_uid: str) -> NDArray[Any]:
        """Return the pixels of one series, (slices, channel, y, x), in the order of their positions.

        Slices whose status is not ok are left out. Raises ``KeyError`` for a series that is not in the dataset.
        """
        place = pc.index(self.series["series_instance_uid"], series_instance_uid).as_py()
        if place < 0:
            raise KeyError(f"No series {series_instance_uid!r} in {self.path}.")
        first, count = (int(self.series[name][place].as_py()) for name in ("first_row", "n_slices"))
        ok = pc.equal(self.slices["status"].slice(first, count), OK).to_numpy(zero_copy_only=False)
        return self.read(first + np.flatnonzero(ok))

    def _explain(self, row: int) -> None:
        status = self.slices["status"][row].as_py()
        shard = row // self.spec.slices_per_shard
        if status == OK:
            raise CorruptionError(
                f"Row {row} has status ok, and shard {shard} ({shard_path(self.path, shard)}) holds no slice for it. "
                f"Run `ich-prep verify {self.path}`, then restore it, or build again with --overwrite."
            )
        raise DatasetError(
            f"Row {row} was set aside with the status {status!r} and has no pixels. Ask only for rows whose status is "
            "ok: the column 'status' of dataset.slices."
        )
