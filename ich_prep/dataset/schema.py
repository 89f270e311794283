"""The on-disk contract ``ich/1``: every name, type and column inside a dataset, and the typed root.

docs/format.md is checked against this module. A dataset for a reader:

    data.zarr/
      zarr.json                  root group; its attribute ``ich`` describes the dataset; written last
      images/zarr.json           array (slice, channel, y, x)
      images/c/<k>/0/0/0         shard k
      labels/zarr.json           a group, so that Zarr tools walk past the tables in it
      labels/slices.parquet      line i is images[i]
      labels/series.parquet      one line per volume
      labels/shards.parquet      one line per shard: its length and fingerprint
      labels/quarantine.parquet  files and slices that were quarantined, and why

Readers are tolerant: they require what they use, and ignore keys, columns and words that they do not know.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, overload

import pyarrow as pa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ich_prep.dataset.bucket_path import BucketPath, Place
from ich_prep.dataset.classes import RSNA_CLASSES, class_name_problem
from ich_prep.dataset.native import MAX_SLICE_BYTES
from ich_prep.dataset.spec import Stored
from ich_prep.errors import CorruptionError, DatasetError, UsageError

FORMAT = "ich/1"
ROOT = "zarr.json"
IMAGES, LABELS = "images", "labels"
TABLES = ("slices", "series", "shards", "quarantine")
HISTOGRAM_BINS = 64

# The statuses of a row that are not quarantine reasons. Readers treat any other word as a row without pixels.
OK = "ok"
UNUSED = "unused"  # a row between two generations that belongs to no slice
AS_STORED = "as-stored"  # the orientation of a dataset whose spec names none
WITHDRAWN = "withdrawn"  # a slice that was dropped from the dataset

_FORMAT = re.compile(r"ich/1(\.[0-9]+)?")  # a later 1.x may add keys and columns
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_LONGEST_SHOWN = 80  # characters of a value in a message


def table_name(table: str, generation: int) -> str:
    """Return the name, relative to the dataset, of ``table`` in a generation: the first has no number."""
    return f"{LABELS}/{table}.parquet" if generation == 1 else f"{LABELS}/{table}.{generation}.parquet"


# --- tables ----------------------------------------------------------------------------------------------------------


def slice_schema(classes: Sequence[str] = RSNA_CLASSES, extra: Iterable[pa.Field] = ()) -> pa.Schema:
    """Return the columns of the slice table of a dataset with these ``classes``.

    ``extra`` are the columns ``x_...`` from a user's label table, at the end.
    """
    return pa.schema(
        [
            ("row", pa.int64()),
            ("sop_instance_uid", pa.string()),
            ("series_instance_uid", pa.string()),
            ("study_instance_uid", pa.string()),
            ("patient_id", pa.string()),
            ("subset", pa.string()),
            ("fold", pa.int8()),
            ("fold_group", pa.string()),
            ("status", pa.string()),
            ("label_level", pa.string()),
            *_class_fields(classes),
            ("label_line", pa.int64()),
            ("series_row", pa.int64()),
            ("slice_index", pa.int32()),
            ("position_mm", pa.float64()),
            ("position_x_mm", pa.float64()),
            ("position_y_mm", pa.float64()),
            ("position_z_mm", pa.float64()),
            ("turn", pa.string()),
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
            ("share_air", pa.float32()),
            ("share_soft", pa.float32()),
            ("share_bone", pa.float32()),
            ("content_hash", pa.string()),
            ("chunk_crc32c", pa.uint32()),
            *extra,
        ]
    )


def series_schema(classes: Sequence[str] = RSNA_CLASSES) -> pa.Schema:
    """Return the columns of the series table, one line per volume, of a dataset with these ``classes``."""
    return pa.schema(
        [
            ("series_row", pa.int64()),
            ("series_instance_uid", pa.string()),
            ("study_instance_uid", pa.string()),
            ("patient_id", pa.string()),
            ("acquisition", pa.string()),
            ("volume_in_series", pa.int32()),
            ("subset", pa.string()),
            ("fold", pa.int8()),
            ("fold_group", pa.string()),
            ("first_row", pa.int64()),
            ("n_slices", pa.int32()),
            ("n_ok", pa.int32()),
            ("label_level", pa.string()),
            *_class_fields(classes),
            ("scan_type", pa.string()),
            ("flags", pa.list_(pa.string())),
            ("orientation", pa.list_(pa.float64())),
            ("tilt_degrees", pa.float64()),
            ("slice_spacing_mm", pa.float64()),
            ("pixel_spacing_y_mm", pa.float64()),
            ("pixel_spacing_x_mm", pa.float64()),
            ("source_rows", pa.int32()),
            ("source_columns", pa.int32()),
            ("study_year", pa.int32()),
            ("patient_age", pa.float32()),
            ("patient_sex", pa.string()),
            ("manufacturer", pa.string()),
            ("convolution_kernel", pa.string()),
            ("kvp", pa.float32()),
            ("slice_thickness_mm", pa.float64()),
            ("series_description", pa.string()),
            ("protocol_name", pa.string()),
            ("body_part", pa.string()),
            ("contrast_agent", pa.string()),
            ("accession_number", pa.string()),
        ]
    )


def _class_fields(classes: Sequence[str]) -> list[tuple[str, pa.DataType]]:
    return [(name, pa.int8()) for name in classes]


SHARD_SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("first_row", pa.int64()),
        ("n_rows", pa.int32()),
        ("n_ok", pa.int32()),
        ("bytes", pa.int64()),
        ("fingerprint", pa.string()),
        ("hu_histogram", pa.list_(pa.int64())),
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
RESERVED_COLUMNS = frozenset((*slice_schema(()).names, *series_schema(()).names))

# --- the root --------------------------------------------------------------------------------------------------------


def _file_name(value: str) -> str:
    """Return the name of a file in a dataset; raises ``ValueError`` for one that is absolute or leads out of it."""
    if not _FILE_NAME.fullmatch(value):
        raise ValueError(f"{clipped(value)} is not the name of a file in a dataset")
    return value


Count = Annotated[int, Field(ge=0, le=1 << 48, strict=True)]
FileName = Annotated[str, AfterValidator(_file_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Counts(BaseModel):
    """The counts of a dataset: ``rows`` is the length of the dataset; found = ok + quarantined + withdrawn.

    Those without a default say how long the tables are.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    rows: Count
    found: Count = 0
    planned: Count = 0
    ok: Count
    quarantined: Count
    withdrawn: Count = 0
    series: Count
    patients: Count = 0
    fold_groups: Count = 0
    shards: Count
    bytes: Count = 0


class TableNames(BaseModel):
    """The paths of the tables of the current generation, relative to the dataset."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    slices: FileName
    series: FileName
    shards: FileName
    quarantine: FileName


class LostLabels(BaseModel):
    """The labels that had images in the source and have none in the dataset, for one reason."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    labels: Count
    positive: Count


class Event(BaseModel):
    """One command that made a generation of the dataset: its counts and the digests of its inputs."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    command: str
    generation: int
    counts: dict[str, int] = {}
    digests: dict[str, str | None] = {}


class Root(BaseModel):
    """The attribute ``ich`` of a dataset's root group, as far as this version reads it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: str
    spec: Stored
    classes: tuple[str, ...]
    counts: Counts
    lost_labels: dict[str, LostLabels] = {}
    given_folds: bool = False
    tables: TableNames
    digests: dict[FileName, Sha256]
    generation: Annotated[int, Field(ge=1)] = 1
    labels_digest: str = ""
    history: tuple[Event, ...] = ()
    created_by: str = "unknown"
    versions: dict[str, str | None] = {}
    digest: Sha256

    @property
    def pseudonym_key(self) -> str | None:
        """The id of the key of the dataset's pseudonyms; None in one without pseudonyms."""
        return self.history[-1].digests.get("key") if self.history else None

    @field_validator("spec", mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        # The defaults are a build's; a reader must not assume them. The first builds had no orientation, and turned nothing.
        if isinstance(value, dict):
            value = {"orientation": AS_STORED, **value}
        missing = [name for name in Stored.model_fields if not isinstance(value, dict) or name not in value]
        if missing:
            raise ValueError(f"the spec lacks {', '.join(missing)}")
        return value

    @field_validator("classes")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        reserved = sorted(RESERVED_COLUMNS.intersection(value))
        problem = f"{reserved[0]} is another column" if reserved else class_name_problem(value)
        if problem:
            raise ValueError(clipped(problem))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        spec, counts = self.spec, self.counts
        shards = -(-counts.rows // spec.slices_per_shard)
        if counts.shards != shards:
            raise ValueError(f"counts: {counts.rows} rows are {shards} shards, not {counts.shards}")
        if max(counts.ok, counts.series) > counts.rows:
            raise ValueError(f"counts: {counts.ok} slices in {counts.series} series are more than {counts.rows} rows")
        if math.prod((spec.channels, spec.size, spec.size, spec.dtype.itemsize)) > MAX_SLICE_BYTES:
            raise ValueError(f"spec: a slice of {spec.channels} channels of {spec.size} x {spec.size} is too large")
        lacking = sorted(set(self.tables.model_dump().values()) - self.digests.keys())
        if lacking:
            raise ValueError(f"digests: that of {lacking[0]} is missing")
        return self


def digest_of(ich: dict[str, Any]) -> str:
    """Return the SHA-256 of everything the root records, including the digests of the tables, and so of every shard."""
    rest = {key: value for key, value in ich.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def clipped(value: object) -> str:
    """Return ``value`` as a message shows it: a literal, its end left out if it is long."""
    text = ascii(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def parse_root(attributes: Any, path: Place) -> Root:
    """Return the typed root of the dataset at ``path``, whose root group has these ``attributes``.

    Raises ``DatasetError`` for another Zarr group or format, ``CorruptionError`` if a required part is missing or
    impossible, or if the root is not the one that its digest was computed of.
    """
    ich = attributes.get("ich") if isinstance(attributes, dict) else None
    if not isinstance(ich, dict):
        raise DatasetError(f"{path} is a Zarr group, but not one that ich-prep wrote (it has no attribute 'ich').")
    found = ich.get("format")
    if not (isinstance(found, str) and _FORMAT.fullmatch(found)):
        raise DatasetError(
            f"{path} has format {clipped(found)}, written by {_writer(ich)}; this version reads {FORMAT}. Install the "
            "version that wrote it, or build the dataset again."
        )
    try:
        root = Root.model_validate(ich)
        if digest_of(ich) == root.digest:
            return root
        problem = "digest mismatch: it was changed"
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        problem = f"{clipped(place)[1:-1]}: " * bool(place) + first["msg"].removeprefix("Value error, ")
    except (RecursionError, UnicodeEncodeError) as error:
        problem = str(error)
    except UsageError as error:  # a window that is none
        problem = str(error).removesuffix(".")
    raise CorruptionError(f"{path / ROOT} is damaged: {problem}. Restore it, or build again with --overwrite.")


def _writer(ich: dict[str, Any]) -> str:
    writer = ich.get("created_by", "an unknown version")
    return writer if isinstance(writer, str) and writer.isprintable() and len(writer) < 40 else clipped(writer)


@overload
def shard_path(out: Path, shard: int) -> Path: ...
@overload
def shard_path(out: BucketPath, shard: int) -> BucketPath: ...
@overload
def shard_path(out: Place, shard: int) -> Place: ...
def shard_path(out: Place, shard: int) -> Place:
    """Return the path of shard number ``shard``."""
    return out / IMAGES / "c" / str(shard) / "0" / "0" / "0"
