"""Identifiers -> pseudonyms: what a pseudonymised dataset publishes in place of the originals. Tables in, tables out.

A pseudonym is an HMAC-SHA256 (RFC 2104), of which 128 bits are kept: equal values of a level have equal pseudonyms, values
of different levels never do, and without the key nobody can tell which value a pseudonym stands for, or try values. What
identifies and has no pseudonym is null. docs/privacy.md says why, column by column, after PS3.15 annex E.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Collection
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.schema import QUARANTINE_SCHEMA
from ich_prep.dicom.elements import ELEMENTS, keyword_of

if TYPE_CHECKING:
    from ich_prep.stages.state import State


class Level(StrEnum):
    """What a value identifies. The words are part of each pseudonym: another word, another pseudonym."""

    PATIENT = "patient"
    STUDY = "study"
    SERIES = "series"
    INSTANCE = "instance"
    ACCESSION = "accession"
    FOLD_GROUP = "fold_group"
    IMAGE = "image"  # the hash of stored values
    PATH = "path"
    SOURCES = "sources"  # the digest of a listing
    LABELS = "labels"  # the digest of a label table
    OPTION = "option"  # a text that the user gave, such as a filter
    KEY = "key"


OLDEST: Final = 90  # years: an age of 90 or more is published as 90 (45 CFR 164.514(b)(2)(i)(C))
WITHHELD: Final = "withheld"
# Of the levels that are UIDs, the pseudonyms are UIDs too (PS3.5 B.2); the others are hexadecimal.
UID_LEVELS: Final = frozenset((Level.STUDY, Level.SERIES, Level.INSTANCE))

PSEUDONYMS: Final = {
    "sop_instance_uid": Level.INSTANCE,
    "series_instance_uid": Level.SERIES,
    "study_instance_uid": Level.STUDY,
    "patient_id": Level.PATIENT,
    "fold_group": Level.FOLD_GROUP,
    "content_hash": Level.IMAGE,
    "accession_number": Level.ACCESSION,
}
# Columns that are published as they are: numbers of the geometry and the pixels, and words of this project.
AS_THEY_ARE: Final = frozenset(
    ("row", "subset", "fold", "status", "label_level", "series_row", "slice_index", "position_mm", "position_x_mm")
    + ("position_y_mm", "position_z_mm", "turn", "slice_spacing_mm", "pixel_spacing_y_mm", "pixel_spacing_x_mm")
    + ("source_rows", "source_columns", "rescale_slope", "rescale_intercept", "repairs", "flags")
    + ("hu_min", "hu_max", "hu_mean", "share_air", "share_soft", "share_bone", "chunk_crc32c")
    + ("volume_in_series", "first_row", "n_slices", "n_ok", "orientation", "tilt_degrees", "kvp", "slice_thickness_mm")
)
# Columns that are null: dates, texts that a person wrote, and the line of the label table, which has identifiers.
WITHOUT_VALUES: Final = frozenset(
    ("label_line", "study_year", "convolution_kernel", "series_description", "protocol_name", "contrast_agent")
)
# Options whose texts the user wrote, and which may quote what is in the files.
WRITTEN_OPTIONS: Final = ("include", "exclude", "rescale_types")

_SCAN_TYPES: Final = frozenset(("plain", "contrast", "bone", "unknown"))
_SEXES: Final = frozenset("MFO")
# Of the defined terms of PS3.16 annex L, those near the head, and those by which a scan is seen not to be one.
_BODY_PARTS: Final = frozenset(
    ("HEAD", "BRAIN", "SKULL", "HEADNECK", "NECK", "CSPINE", "FACE", "ORBIT", "SINUS", "EAR", "IAC", "TEMPORALBONE")
    + ("JAW", "MAXILLA", "MANDIBLE", "PITUITARY", "CHEST", "THORAX", "LUNG", "HEART", "ABDOMEN", "PELVIS", "SPINE")
    + ("TSPINE", "LSPINE", "WHOLEBODY", "EXTREMITY", "HIP", "KNEE", "SHOULDER")
)
_MAKERS: Final = re.compile(
    r"siemens|ge medical|ge healthcare|general electric|philips|toshiba|canon|hitachi|fujifilm|neusoft|united imaging"
    r"|samsung|neurologica|shimadzu|marconi|picker|elscint|elekta|varian",
    re.IGNORECASE,
)
_CAUSE: Final = re.compile(r"(?:no )?(?:AcquisitionNumber|TemporalPositionIdentifier|AcquisitionTime)\b")


def pseudonym(key: bytes, level: Level, value: str) -> str:
    """Return the pseudonym of ``value`` as a ``level`` identifies it: of 128 bits, a UID below 2.25 or 32 hex digits."""
    digest = hmac.digest(key, f"{level}\0{value}".encode("utf-8", "surrogateescape"), "sha256")[:16]
    return f"2.25.{int.from_bytes(digest, 'big')}" if level in UID_LEVELS else digest.hex()


def pseudonyms(key: bytes, level: Level, values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return the pseudonyms of ``values`` (string, (n,)); null stays null, and so does an empty value."""
    return _mapped(values, lambda value: pseudonym(key, level, value) if value else None)


def with_originals(
    values: pa.Array | pa.ChunkedArray, key: bytes | None, level: Level, originals: pa.Array | pa.ChunkedArray
) -> pa.Array | pa.ChunkedArray:
    """Return published ``values`` (string, (n,)) with each pseudonym of one of the ``originals`` replaced by that one.

    All other values stay as they are, and so do all if there is no ``key``.
    """
    if key is None:
        return values
    known = pc.unique(originals).drop_null()
    place = pc.index_in(values, value_set=pseudonyms(key, level, known))
    return pc.coalesce(known.take(place), values)


def key_id(key: bytes) -> str:
    """Return what a dataset records of the key of its pseudonyms: whether another key is the same, and nothing else."""
    return pseudonym(key, Level.KEY, "")


def published_rows(table: pa.Table, key: bytes, *, classes: Collection[str], extra: Collection[str] = ()) -> pa.Table:
    """Return a slice or series table with pseudonyms, derived words and nulls in place of what identifies.

    ``classes`` and ``extra`` are columns that stay as they are: labels, and those that the user chose. So do the
    numbers in ``AS_THEY_ARE``. A column that this module does not know is null.
    """
    names = [name for name in table.column_names if name not in classes and name not in extra]
    columns = dict(zip(table.column_names, table.columns, strict=True))
    for name in names:
        columns[name] = _published(name, table[name], key)
    return pa.table(list(columns.values()), schema=pa.schema([_bare(field) for field in table.schema]))


def published_quarantine(table: pa.Table, key: bytes) -> pa.Table:
    """Return the quarantine table with pseudonyms of paths, in their order, which says nothing about the originals.

    Of ``detail`` only the attributes that it names are left.
    """
    columns = hidden(table, key)
    return pa.table(
        [columns.get(name, table[name]) for name in QUARANTINE_SCHEMA.names], schema=QUARANTINE_SCHEMA
    ).sort_by("path")


def hidden(files: pa.Table, key: bytes) -> dict[str, pa.Array]:
    """Return the columns path and detail of quarantined ``files`` as they are published."""
    known = _attributes()
    details = _mapped(files["detail"], lambda text: safe_detail(text, known))
    return {"path": pseudonyms(key, Level.PATH, files["path"]), "detail": details}


def published_state(state: State, key: bytes | None) -> State:
    """Return what the root of a dataset says of the ``state`` of its build: the same, if there is no ``key``.

    With one, digests of sources and labels have pseudonyms, because whoever guesses the files could confirm it by them,
    and so have the texts of filters.
    """
    if key is None:
        return state
    texts = {
        name: tuple(pseudonym(key, Level.OPTION, text) for text in getattr(state.spec, name))
        for name in WRITTEN_OPTIONS
    }
    digests = {
        "sources": pseudonym(key, Level.SOURCES, state.sources),
        "labels": pseudonym(key, Level.LABELS, state.labels),
    }
    return state.model_copy(update={"spec": state.spec.model_copy(update=texts), **digests})


def safe_detail(text: str, known: Collection[str]) -> str:
    """Return of a quarantine ``detail`` the words that are ``known`` keywords of attributes, in their order."""
    named = dict.fromkeys(word for word in re.findall(r"[A-Za-z]+", text) if word in known)
    return f"{WITHHELD}; it names {', '.join(named)}" if named else WITHHELD


# --- columns ---------------------------------------------------------------------------------------------------------


def _published(name: str, values: pa.ChunkedArray, key: bytes) -> pa.Array | pa.ChunkedArray:
    if name in PSEUDONYMS:
        return pseudonyms(key, PSEUDONYMS[name], values)
    if name in DERIVED:
        return DERIVED[name](values)
    return values if name in AS_THEY_ARE else pa.nulls(len(values), values.type)


def _mapped(values: pa.Array | pa.ChunkedArray, change: Callable[[str], str | None]) -> pa.Array:
    """Return ``values`` (string) with each distinct one changed; null stays null."""
    joined: Any = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    encoded = joined.dictionary_encode()
    changed = pa.array([change(value) for value in encoded.dictionary.to_pylist()], pa.string())
    return changed.take(encoded.indices)


def _only(known: Collection[str]) -> Callable[[pa.ChunkedArray], pa.Array]:
    """Return a function that leaves the ``known`` words of a column, and null for all others."""
    return lambda values: _mapped(values, lambda word: word if word in known else None)


def _maker(values: pa.ChunkedArray) -> pa.Array:
    def name_in(text: str) -> str | None:
        found = _MAKERS.search(text)
        return found[0].upper() if found else None

    return _mapped(values, name_in)


def _cause(values: pa.ChunkedArray) -> pa.Array:
    """Return what divides a series into volumes without the value: an AcquisitionTime is the time of day of a scan."""

    def attribute_in(text: str) -> str | None:
        found = _CAUSE.match(text)
        return found[0] if found else None

    return _mapped(values, attribute_in)


def _whole_years(values: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.min_element_wise(pc.floor(values), pa.scalar(OLDEST, values.type), skip_nulls=False)


# Columns of which a word of a closed list, or a coarser number, is left.
DERIVED: Final[dict[str, Callable[[pa.ChunkedArray], pa.Array | pa.ChunkedArray]]] = {
    "scan_type": _only(_SCAN_TYPES),
    "patient_sex": _only(_SEXES),
    "body_part": _only(_BODY_PARTS),
    "manufacturer": _maker,
    "acquisition": _cause,
    "patient_age": _whole_years,
}


def _bare(field: pa.Field) -> pa.Field:
    """Return the field without metadata: that of a user's Parquet table would be published with its columns."""
    return pa.field(field.name, field.type)


@cache
def _attributes() -> frozenset[str]:
    return frozenset((*(keyword_of(one.name) for one in ELEMENTS), "PixelData", "TransferSyntaxUID"))
