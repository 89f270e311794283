"""Series whose pixels are not Hounsfield units, or may not be: by RescaleType, and by a look at the middle slice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.components import codes_of
from ich_prep.dataset.storage import write_whole
from ich_prep.dataset.tables import parquet_bytes, rows_of
from ich_prep.dicom.accept import is_hounsfield
from ich_prep.dicom.decode import PIXEL_FIELDS, Decoder
from ich_prep.errors import Reason, SliceError
from ich_prep.pixels.stored import mask_unused_bits
from ich_prep.sources import open_source
from ich_prep.stages import identity
from ich_prep.stages.rules import refuse
from ich_prep.stages.shard import pixel_source
from ich_prep.stages.state import BuildFolder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.bucket_path import Place
    from ich_prep.dataset.spec import Spec

Map = Callable[[Callable[[int], bool], Sequence[int]], Iterator[tuple[int, bool]]]

# Units that are defined, and not HU (PS3.3 C.11.1.1.2): mg/ml, effective atomic number, electron density, per cent, density.
OTHER_UNITS: Final = frozenset(("MGML", "ZEFF", "ED", "EDW", "PCT", "OD"))
TRIES: Final = 5  # slices from the middle outwards, if the middle one cannot be decoded

# Shares that a slice in HU has, whatever it shows.
_AIR_BELOW, _FAT_BELOW, _BODY_ABOVE, _BONE_ABOVE = -900, -100, -500, 300
_LEAST_AIR, _LEAST_BODY = 0.01, 0.01  # of all pixels
_LEAST_SOFT, _LEAST_EDGE, _MOST_BONE = 0.1, 0.02, 0.6  # of the body
_MIDDLE_OF_SOFT: Final = (5, 95)  # HU, between which the median of all soft tissue lies
_IDENTITY: Final = ("patient_id", "study_instance_uid", "series_instance_uid", "rescale_type")
_COLUMNS: Final = (*PIXEL_FIELDS, "padding_low", "padding_high", "rescale_slope", "rescale_intercept")


def refuse_other_units(
    scanned: pa.Table, files: pa.Table, *, folder: BuildFolder, sources: Sequence[Place], run: Map, spec: Spec
) -> pa.Table:
    """Return ``scanned`` (``scan.SCHEMA``) with the reason NOT_HU for all slices of series that are not in HU.

    A series with a RescaleType of another unit is refused, with those of its slices that state none. One with a
    RescaleType that says nothing is refused if its middle slice does not look like HU; ``spec.rescale_types`` names those
    that are taken as HU. ``files`` is the listing (``LISTING_SCHEMA``), ``run`` maps a task over numbers, as ``Pool.map``
    does.
    """
    questioned, refused = _by_unit(scanned, spec)
    series = list(questioned.values())
    if series:
        _write_middles(folder, scanned, files, series)
        task = partial(middle_looks_like_hu, folder, tuple(sources))
        for number, is_hu in run(task, range(len(series))):
            if not is_hu:
                refused += series[number]
    if not refused:
        return scanned
    chosen = np.zeros(len(scanned), bool)
    chosen[refused] = True
    chosen |= _silent_beside(scanned, refused)
    details = [
        f"expected HU, found RescaleType {kind!r}; --rescale-types takes it as HU"
        if kind
        else "expected HU, found no RescaleType in a series of another unit"
        for kind in scanned["rescale_type"].to_pylist()
    ]
    return refuse(scanned, chosen, Reason.NOT_HU, pa.array(details, pa.string()))


def _silent_beside(scanned: pa.Table, refused: list[int]) -> NDArray[np.bool_]:
    """Return which lines, (n,), have no RescaleType in a series of which others are ``refused``, and none says HU."""
    patient, study, series = (codes_of(scanned[name]) for name in _IDENTITY[:-1])
    number = identity.join(identity.join(patient, study), series)
    silent = pc.is_null(scanned["rescale_type"]).to_numpy(zero_copy_only=False)
    other = np.zeros(len(scanned), bool)
    other[refused] = True
    states_hu = np.bincount(number, weights=~silent & ~other) > 0
    result: NDArray[np.bool_] = silent & (np.bincount(number, weights=other) > 0)[number] & ~states_hu[number]
    return result


def middle_looks_like_hu(folder: BuildFolder, sources: tuple[Place, ...], number: int) -> bool:
    """Return whether the middle slice of a questioned series looks like HU; True if none of its slices can be decoded.

    ``folder`` is the working folder, which has the slices to try, ``sources`` are folders and archives.
    """
    with rows_of(folder.middles) as written:  # a worker may outlive the build that wrote it
        lines = written.read_row_group(number).to_pylist()
    source, decoder = open_source(sources), Decoder()
    try:
        for line in lines:
            try:
                stored = decoder.read(pixel_source(source, line["key"], line))
            except SliceError:
                continue  # the build reports it
            return looks_like_hu(*_hu_of(stored, line))
    finally:
        decoder.close()
    return True


def looks_like_hu(hu: NDArray[Any], padding: NDArray[np.bool_] | None = None) -> bool:
    """Return whether ``hu`` (rows, columns), of any numeric type, are Hounsfield units of a slice of a body.

    Air lies near -1000, or is ``padding`` (bool, the same shape); soft tissue lies between 0 and 100; and at the skin
    pixels lie between the two, which they do not if padding is the only air and the values have an offset of a thousand.
    """
    values = np.asarray(hu, np.float64)
    outside = values < _AIR_BELOW if padding is None else (values < _AIR_BELOW) | padding
    inside = values[~outside]
    body = inside[inside > _BODY_ABOVE]
    if outside.mean() < _LEAST_AIR or body.size < _LEAST_BODY * values.size:
        return False
    soft = body[(body >= 0) & (body <= 100)]
    edge = np.count_nonzero(inside < _FAT_BELOW)
    if min(soft.size / _LEAST_SOFT, edge / _LEAST_EDGE) < body.size or (body > _BONE_ABOVE).mean() > _MOST_BONE:
        return False
    return bool(_MIDDLE_OF_SOFT[0] <= np.median(soft) <= _MIDDLE_OF_SOFT[1])


def _hu_of(stored: NDArray[np.uint16], line: Mapping[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the HU of a slice, not clipped, and which pixels are padding."""
    masked, _ = mask_unused_bits(stored, bits_stored=line["bits_stored"], signed=line["signed"])
    values = masked.view(np.int16 if line["signed"] else np.uint16).astype(np.float64)
    low, high = line["padding_low"], line["padding_high"]
    padding = np.zeros(values.shape, bool) if low is None else (values >= low) & (values <= high)
    return values * line["rescale_slope"] + line["rescale_intercept"], padding


def _by_unit(scanned: pa.Table, spec: Spec) -> tuple[dict[tuple[Any, ...], list[int]], list[int]]:
    """Return the lines of each series whose unit is not known, and all lines of other units than HU."""
    questioned: dict[tuple[Any, ...], list[int]] = {}
    refused: list[int] = []
    types = scanned["rescale_type"].combine_chunks().dictionary_encode()
    allowed = {_plain(word) for word in spec.rescale_types}
    other = [not is_hounsfield(kind) and _plain(kind) not in allowed for kind in types.dictionary.to_pylist()]
    if not any(other):
        return questioned, refused
    chosen = np.array([*other, False])[types.indices.fill_null(len(other)).to_numpy()]
    chosen &= pc.is_null(scanned["reason"]).to_numpy()
    lines = np.flatnonzero(chosen)
    for index, line in zip(lines.tolist(), scanned.select(_IDENTITY).take(pa.array(lines)).to_pylist(), strict=True):
        if _plain(line["rescale_type"]) in OTHER_UNITS:
            refused.append(index)
        else:
            questioned.setdefault(tuple(line.values()), []).append(index)
    return questioned, refused


def _plain(rescale_type: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", rescale_type.upper().replace("%", "PCT"))


def _write_middles(folder: BuildFolder, scanned: pa.Table, files: pa.Table, series: list[list[int]]) -> None:
    """Write the slices to try, one row group per series: the middle one, then its neighbours.

    All row groups have the same length, so that each is one of Parquet's: short series repeat a slice.
    """
    tried: list[int] = []
    for lines in series:
        ordered = [lines[index] for index in _order(scanned.take(pa.array(lines)).to_pylist())]
        middle = len(ordered) // 2
        outwards = sorted(range(len(ordered)), key=lambda index: abs(index - middle))
        tried += [ordered[index] for index in (outwards * TRIES)[:TRIES]]
    chosen = scanned.take(pa.array(tried))
    keys = files.filter(pc.is_null(files["reason"]))
    found = keys["key"].take(pc.index_in(chosen["path"].cast(pa.binary()), value_set=keys["path"]))
    table = chosen.select(_COLUMNS).append_column("key", found)
    write_whole(folder.middles, parquet_bytes(table, row_group_size=TRIES))


def _order(lines: list[dict[str, Any]]) -> list[int]:
    """Return the indices that sort the slices of a series along the body."""

    def height(index: int) -> tuple[float, str]:
        line = lines[index]
        position = line["position"]
        known = position[2] if position else line["slice_location"] or line["instance_number"] or 0
        return float(known), line["sop_instance_uid"]

    return sorted(range(len(lines)), key=height)
