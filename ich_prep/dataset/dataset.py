"""A finished dataset: open it, read its tables, and its pixels in any order."""

from __future__ import annotations

import json
import math
import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.affine import AffineError, to_ras
from ich_prep.dataset.bucket_path import BucketPath, Place
from ich_prep.dataset.checks import lines_expected, table_problem
from ich_prep.dataset.classes import UNKNOWN
from ich_prep.dataset.codecs import CODECS
from ich_prep.dataset.places import local_folder, place_to_read, what_is_at
from ich_prep.dataset.schema import OK, ROOT, WITHDRAWN, Root, parse_root, shard_path
from ich_prep.dataset.shard_reader import ShardReader, output_array, stored_form
from ich_prep.dataset.storage import read_whole
from ich_prep.dataset.store_reader import StoreShardReader
from ich_prep.dataset.tables import read_published
from ich_prep.dataset.volumes import affine_of_slices, find_series
from ich_prep.dataset.where import select_slices
from ich_prep.errors import CorruptionError, DatasetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ich_prep.dataset.shard_cache import ShardCache

BUILD_SUFFIX = ".build"  # of the working folder next to a dataset
STATE = "state.json"
READER_COLUMNS = ("status", "chunk_crc32c")  # of the slices, that reading pixels needs
MAX_ROOT_BYTES = 1 << 24  # a root has some kilobytes


def open_dataset(path: str | Place, *, cache: ShardCache | None = None) -> Dataset:
    """Return the finished dataset at ``path``: a folder, or a URL such as s3://bucket/data.zarr, with a ``cache`` or not.

    Raises ``DatasetError`` for a path that does not exist, is not a dataset, is not finished, or is of another format.
    """
    root = place_to_read(path, "The dataset")
    attributes = read_attributes(root)
    return Dataset(root, parse_root(attributes, root), attributes["ich"], cache)


def working_folder(root: Place) -> Place:
    """Return where the working folder of the build of the dataset at ``root`` is, unless one was named."""
    path = root.absolute()
    return path.parent / (path.name + BUILD_SUFFIX)


def read_attributes(root: Place) -> Any:
    """Return the attributes of the root group; raises ``DatasetError`` where there is none."""
    try:
        document = json.loads(read_whole(root / ROOT, limit=MAX_ROOT_BYTES))
    except PermissionError as error:
        raise DatasetError(
            f"Cannot read {root / ROOT}: {(error.strerror or '').lower()}. Fix its permissions, or run as a user who "
            "can read it."
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        _explain_by_working_folder(root)
        raise DatasetError(
            f"Expected a dataset at {root}; found {what_is_at(root)}. Make one: `ich-prep build --src DICOM --out {root}`."
        ) from None
    except OSError as error:
        raise CorruptionError(
            f"{root / ROOT} cannot be read: {error.strerror}. Restore it, or remove the folder and build again."
        ) from None
    except (ValueError, RecursionError):
        raise CorruptionError(
            f"{root / ROOT} is damaged: it is not JSON. Restore it, or remove the folder and build again."
        ) from None
    return document.get("attributes") if isinstance(document, dict) else None


def _explain_by_working_folder(root: Place) -> None:
    """Raise ``DatasetError`` where a working folder beside ``root`` says why there is no dataset."""
    try:
        state = json.loads(read_whole(working_folder(root) / STATE))
    except (OSError, ValueError):
        return
    if isinstance(state, dict) and state.get("published"):
        raise DatasetError(
            f"{root} was finished and is no longer there: it was moved or deleted. Name its present path, or run the same "
            "`ich-prep build` command again."
        ) from None
    raise DatasetError(
        f"The build of {root} is not finished. Run the same `ich-prep build` command again to resume it."
    ) from None


class Dataset:
    """A finished dataset: its tables, and its pixels in any order. Safe to share between threads.

    ``path``, its folder or place in an object store; ``root`` (typed) and ``attributes`` (the same as parsed JSON, with
    all its keys); ``spec`` of the stored pixels; ``classes``; ``digest`` of all its bytes; ``shape`` (slice, channel, y,
    x); ``dtype`` (uint8 window codes or int16 HU).
    """

    def __init__(self, path: Place, root: Root, attributes: dict[str, Any], cache: ShardCache | None = None) -> None:
        self.path, self.root, self.attributes = path, root, attributes
        self.spec, self.classes, self.counts, self.digest = root.spec, root.classes, root.counts, root.digest
        self.shape = (root.counts.rows, self.spec.channels, self.spec.size, self.spec.size)
        self.dtype = self.spec.dtype
        self._cache = cache
        self._opening = threading.Lock()
        self._reader: ShardReader | None = None
        self._closed = False

    def close(self) -> None:
        """Close the shards and end the threads that read them; further reads of pixels raise ``ValueError``."""
        with self._opening:
            self._closed = True
            if self._reader is not None:
                self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the generation that is open, not the pixels or tables: another process reads these for itself."""
        return type(self), (self.path, self.root, self.attributes, self._cache)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Dataset({str(self.path)!r}, {self.spec.store}, shape={self.shape})"

    @property
    def parts(self) -> tuple[Dataset, ...]:
        """The datasets that this one consists of: itself, unless it is a union."""
        return (self,)

    @property
    def is_far(self) -> bool:
        """Whether pixels come from an object store, each time they are read."""
        return isinstance(self.path, BucketPath) and self._cache is None

    @property
    def has_pseudonyms(self) -> bool:
        """Whether UIDs, patients and paths are pseudonyms (``--identifiers pseudonymise``)."""
        return bool(self.attributes["spec"].get("identifiers") == "pseudonymise")

    @cached_property
    def slices(self) -> pa.Table:
        """The slice table: line i is row i; the columns of ``schema.slice_schema``, and any that a later version added."""
        table = self.read_table("slices")
        self._check_stored_form(table)  # before anyone allocates memory for slices of this shape
        return table

    @cached_property
    def series(self) -> pa.Table:
        """One line per volume, in the order of its rows; the columns of ``schema.series_schema``."""
        return self.read_table("series")

    @cached_property
    def labels(self) -> NDArray[np.int8]:
        """The labels of every row, int8 (slices, classes) in the order of ``classes``, -1 where unknown; read only."""
        columns = [self.slices[name].fill_null(UNKNOWN).to_numpy() for name in self.classes]
        labels: NDArray[np.int8] = np.stack(columns, axis=1).astype(np.int8)
        labels.flags.writeable = False
        return labels

    @cached_property
    def fold_groups(self) -> pa.ChunkedArray:
        """Who shares a fold with whom, string (slices,): slices with one value are never in two parts of a split.

        The column ``fold_group``; where it is null, as in older datasets, the patient.
        """
        patients = self.slices["patient_id"]
        if "fold_group" not in self.slices.column_names:
            return patients
        return pc.coalesce(self.slices["fold_group"], patients)

    @cached_property
    def is_ok(self) -> NDArray[np.bool_]:
        """Whether each row has pixels, bool (slices,); read only."""
        return _is_ok(self.slices)

    @property
    def folder(self) -> Path:
        """``path``, for what needs a file system; raises ``UsageError`` for a dataset in an object store."""
        return local_folder(self.path)

    def table_path(self, table: str) -> Place:
        """Return the path of the ``table`` of this generation: slices, series, shards or quarantine."""
        return self.path / str(getattr(self.root.tables, table))

    def read_table(self, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a published table (slices, series, shards or quarantine), or only some of its columns.

        Raises ``CorruptionError`` if it cannot be read, is not the table that was published, or says what no table can.
        """
        path = self.table_path(table)
        try:
            found = read_published(
                path,
                columns=columns,
                lines=lines_expected(table, self.root),
                sha256=self.root.digests[str(getattr(self.root.tables, table))],
            )
            problem = table_problem(table, found, self.root, columns)
            if problem is None:
                return found
            what = f"is damaged: {problem}"
        except (OSError, ValueError, pa.ArrowException) as error:
            what = f"cannot be read: {error}"
        raise CorruptionError(
            f"{path} {what}. Run `ich-prep verify {self.path}`, then restore it, or build again with --overwrite."
        )

    def read(
        self, rows: Sequence[int] | NDArray[np.integer[Any]], out: NDArray[Any] | None = None, *, threads: int = 1
    ) -> NDArray[Any]:
        """Return the pixels of ``rows``, in their order, as (len(rows), channel, y, x).

        Rows may come in any order and more than once. ``out``, if given, is C-contiguous, of that shape and of
        ``dtype``, and is what is returned. Raises ``IndexError`` for a row outside of the dataset, ``DatasetError`` for
        a row whose status is not ok, ``TypeError`` for anything but row numbers, ``CorruptionError`` for bytes that are
        not the ones written; never returns zeros for missing data.
        """
        wanted = row_numbers(rows)
        shape = (len(wanted), *self.shape[1:])
        reader = self._reader or self._open_reader()
        out = output_array(out, shape, self.dtype)
        lines = out.reshape(len(wanted), int(np.prod(shape[1:]))).view(np.uint8)
        try:
            missing = reader.read(wanted, lines, threads=threads)
        except CorruptionError:
            self._refuse_purged(wanted)
            raise
        if missing:
            self._refuse_purged(np.array(missing))
            self._refuse_row(missing[0])
        return out

    def where(self, text: str) -> NDArray[np.int64]:
        """Return the rows that a filter selects, int64 ascending, as "slice_spacing_mm < 6 and scan_type == 'plain'".

        Columns are those of ``slices``, and of ``series`` for what they lack; see ``ich_prep.dataset.where`` for the
        grammar. Rows without pixels are selected too. Raises ``UsageError`` for a filter that is not valid.
        """
        return select_slices(self.slices, self.series, text)

    def volume(self, series_instance_uid: str | None = None, *, series_row: int | None = None) -> NDArray[Any]:
        """Return the pixels of one volume, (slices, channel, y, x), in the order of their positions.

        A volume is a line of ``series``, named by its ``series_row``, or by its UID if only one volume has it. Slices
        whose status is not ok are left out. Raises ``KeyError`` for a volume that is not in the dataset, ``UsageError``
        for a UID that several volumes share, ``TypeError`` unless exactly one of the two is given.
        """
        return self.read(self._ok_rows_of(find_series(self.series, series_instance_uid, series_row=series_row)))

    def affine(self, series_row: int, *, ras: bool = False) -> NDArray[np.float64] | None:
        """Return the affine of the stored grid of one volume, (4, 4) float64: voxel (x, y, z) to patient mm.

        x counts columns, y rows, z the slices that ``volume`` returns; voxel coordinates are those of pixel centres,
        after turn, padding and resize. Patient coordinates are LPS as in DICOM (PS3.3 C.7.6.2.1.1), or RAS as in NIfTI.
        None if the volume has no affine; ``affine_problem`` says why. Raises ``KeyError`` for a volume that is not in
        the dataset.
        """
        try:
            affine = self._affine(series_row)
        except AffineError:
            return None
        return to_ras(affine) if ras else affine

    def affine_problem(self, series_row: int) -> AffineError | None:
        """Return why a volume has no affine, None if it has one: missing positions, slices that vary in spacing, ..."""
        try:
            self._affine(series_row)
        except AffineError as error:
            return error
        return None

    def _affine(self, series_row: int) -> NDArray[np.float64]:
        line = find_series(self.series, series_row=series_row)
        volume = self.series.slice(line, 1).to_pylist()[0]
        return affine_of_slices(
            self.slices.take(pa.array(self._ok_rows_of(line))),
            volume["orientation"],
            stored_size=self.spec.size,
            thickness_mm=volume.get("slice_thickness_mm"),
        )

    def _ok_rows_of(self, line: int) -> NDArray[np.int64]:
        """Return the rows with pixels of the volume on one line of ``series``."""
        first, count = (int(self.series[name][line].as_py()) for name in ("first_row", "n_slices"))
        rows = np.arange(first, first + count, dtype=np.int64)
        return rows[self.is_ok[rows]]

    def _open_reader(self) -> ShardReader:
        """Return the reader of the pixels, which knows of each row whether it has some, and their checksum."""
        with self._opening:
            if self._closed:
                raise ValueError("This dataset was closed: open it again.")
            if self._reader is None:
                table = self.__dict__.get("slices")
                if table is None:
                    table = self.read_table("slices", READER_COLUMNS)
                    self._check_stored_form(table)
                self._reader = self._reader_of(
                    slices=len(self),
                    slice_bytes=self._slice_bytes,
                    slices_per_shard=self.spec.slices_per_shard,
                    codec=CODECS[self.spec.codec],
                    expected_crc=_checksums(table),
                    has_pixels=_is_ok(table),
                )
            return self._reader

    def _reader_of(self, **named: Any) -> ShardReader:
        if isinstance(self.path, BucketPath):
            shards = self.read_table("shards", ["bytes", "fingerprint"])
            return StoreShardReader(self.path, shards, self._cache, **named)
        path = self.path
        return ShardReader(lambda shard: shard_path(path, shard), **named)

    @property
    def _slice_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _check_stored_form(self, slices: pa.Table) -> None:
        """Raise ``CorruptionError`` if the first chunk of the dataset decodes to other slices than the root says."""
        row = int(pc.index(slices["status"], OK).as_py())
        if row < 0:
            return
        shard, chunk = divmod(row, self.spec.slices_per_shard)
        path, codec = shard_path(self.path, shard), CODECS[self.spec.codec]
        found = stored_form(path, chunk, chunks=self.spec.slices_per_shard, codec=codec)
        if found is None:
            return
        size, item = found
        if size != self._slice_bytes or item not in (None, self.dtype.itemsize):
            raise CorruptionError(
                f"{self.path / ROOT} is damaged, or {path} is of another dataset: a slice of {self.spec.store} at "
                f"{self.spec.size} x {self.spec.size} has {self._slice_bytes} bytes, in items of {self.dtype.itemsize}; "
                f"row {row} has {size}, in items of {item}. Restore the dataset, or build again with --overwrite."
            )

    def _refuse_purged(self, rows: NDArray[np.int64]) -> None:
        """Raise ``DatasetError`` if a row of ``rows`` was ok when this dataset was opened and has been purged since."""
        now = open_dataset(self.path)
        if now.digest == self.digest or len(now) < len(self):
            return
        gone = rows[self.is_ok[rows] & pc.equal(now.slices["status"].take(pa.array(rows)), WITHDRAWN).to_numpy()]
        if len(gone):
            raise DatasetError(
                f"Row {int(gone[0])} was withdrawn and purged since {self.path} was opened: generation "
                f"{now.root.generation} does not have its pixels. Open the dataset again."
            )

    def _refuse_row(self, row: int) -> None:
        status = self.slices["status"][row].as_py()
        shard = row // self.spec.slices_per_shard
        if status == OK:
            raise CorruptionError(
                f"Row {row} has status ok but no chunk in shard {shard} ({shard_path(self.path, shard)}). Run "
                f"`ich-prep verify {self.path}`, then restore it, or build again with --overwrite."
            )
        raise DatasetError(
            f"Row {row} has the status {status!r} and no pixels. Read only rows whose status is ok: "
            "np.flatnonzero(dataset.is_ok)."
        )


def row_numbers(rows: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return ``rows`` as int64 (n,); raises ``TypeError`` for anything but row numbers."""
    wanted = np.asarray(rows)
    if wanted.size and (wanted.dtype.kind not in "iu" or wanted.ndim != 1):
        raise TypeError(f"Expected row numbers, as a list or (n,); got {wanted.dtype} of shape {wanted.shape}.")
    return wanted.astype(np.int64, copy=False)


def _is_ok(slices: pa.Table) -> NDArray[np.bool_]:
    ok: NDArray[np.bool_] = pc.equal(slices["status"], OK).fill_null(False).to_numpy(zero_copy_only=False)
    ok.flags.writeable = False
    return ok


def _checksums(slices: pa.Table) -> NDArray[np.uint32] | None:
    """Return the checksum of each row's chunk; None for a dataset from before there were any."""
    if "chunk_crc32c" not in slices.column_names or slices["chunk_crc32c"].null_count == len(slices):
        return None
    checksums: NDArray[np.uint32] = slices["chunk_crc32c"].fill_null(0).to_numpy()
    return checksums
