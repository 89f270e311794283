"""Which series the user wants: header filters, a least number of slices, one series of each study. Tables in, tables out.

A filter is ``KEYWORD=VALUE,VALUE`` (any of the values, in any case; numbers by value) or ``KEYWORD~REGEX`` (found anywhere,
in any case), with the DICOM keyword of a header element that the scan keeps. Of several --include all must match, of
several --exclude any.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.components import codes_of
from ich_prep.dataset.tables import with_columns
from ich_prep.dicom.accept import is_original
from ich_prep.errors import Reason, UsageError
from ich_prep.recipe import refuse_unknown
from ich_prep.stages import identity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.spec import Spec

# DICOM keyword -> the scan's column.
KEYWORDS: Final = {
    "AccessionNumber": "accession_number",
    "AcquisitionNumber": "acquisition_number",
    "BodyPartExamined": "body_part",
    "ContrastBolusAgent": "contrast_agent",
    "ConvolutionKernel": "convolution_kernel",
    "ImageType": "image_type",
    "KVP": "kvp",
    "Manufacturer": "manufacturer",
    "PatientAge": "patient_age",
    "PatientID": "patient_id",
    "PatientSex": "patient_sex",
    "ProtocolName": "protocol_name",
    "RescaleType": "rescale_type",
    "ScanType": "scan_type",
    "SeriesDescription": "series_description",
    "SeriesInstanceUID": "series_instance_uid",
    "SliceThickness": "slice_thickness",
    "StudyDate": "study_date",
    "StudyInstanceUID": "study_instance_uid",
}
_FILTER: Final = re.compile(r"\s*([A-Za-z_]+)\s*([=~])(.*)", re.DOTALL)
_ZEROS: Final = re.compile(r"^([+-]?[0-9]+)(?:\.0*|(\.[0-9]*[1-9])0*)?$")
_SCAN_TYPES: Final = {"plain": 0, "unknown": 1}  # all others come last
SOFT_KERNEL: Final = re.compile(
    r"soft|std|stand|brain|head|smooth|^[a-z]{0,2}[1-4][0-9](?![0-9])|^f[bc](?:0|1|2)", re.IGNORECASE
)


@dataclass(frozen=True)
class Filter:
    """The scan's ``column``; ``matches`` says whether a value, as text, is meant; ``text`` is the filter as given."""

    column: str
    matches: Callable[[str], bool]
    text: str


def check_filters(spec: Spec) -> None:
    """Raise ``UsageError`` if one of the spec's filters cannot be read: before hours of reading headers, not after."""
    for option, texts in (("--include", spec.include), ("--exclude", spec.exclude)):
        for text in texts:
            parse_filter(text, where=option)


def parse_filter(text: str, *, where: str) -> Filter:
    """Return the filter written as ``text``; raises ``UsageError``. ``where`` names the option in messages."""
    parts = _FILTER.fullmatch(text)
    if parts is None or not parts[3].strip():
        raise UsageError(
            f"{where} {text[:200]!r}: expected KEYWORD=VALUE,VALUE or KEYWORD~REGEX, such as BodyPartExamined=HEAD,BRAIN."
        )
    by_name = {name.casefold(): column for name, column in KEYWORDS.items()} | {one: one for one in KEYWORDS.values()}
    name, operator, right = parts[1], parts[2], parts[3].strip()
    if name.casefold() not in by_name:
        refuse_unknown([name[:100]], KEYWORDS, where=f"{where}: keyword")
    column = by_name[name.casefold()]
    if operator == "=":
        values = frozenset(_plain(value) for value in right.split(",") if value.strip())
        return Filter(column, lambda value: not values.isdisjoint({_plain(value), *_components(value)}), text)
    try:
        pattern = re.compile(right, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{where} {text[:200]!r}: its right side is not a regular expression ({error}).") from None
    return Filter(column, lambda value: pattern.search(value) is not None, text)


def _components(value: str) -> list[str]:
    r"""Return the parts of a multi-valued element, which "\" separates, in plain form."""
    return [_plain(part) for part in value.split("\\")]


def _plain(value: str) -> str:
    """Return a value as filters compare it: in one case and spacing, a number without zeros that say nothing."""
    return " ".join(_ZEROS.sub(r"\1\2", value.strip()).split()).casefold()


def select(placed: pa.Table, spec: Spec) -> pa.Table:
    """Return ``placed``, the scan with the layout's columns, where excluded slices have the reason FILTERED and a detail.

    Filters act on each file, the least number of slices on each series, and then one series of each study is chosen. A
    series counts by its images: copies of a file do not make it longer.
    """
    if not (spec.include or spec.exclude or spec.min_slices > 1 or spec.one_series_per_study != "off"):
        return placed
    wanted = pc.is_null(placed["reason"]).to_numpy(zero_copy_only=False).copy()
    detail = np.full(len(placed), None, object)
    for text in spec.include:
        _exclude(wanted, detail, ~_matching(placed, parse_filter(text, where="--include")), f"not --include {text}")
    for text in spec.exclude:
        _exclude(wanted, detail, _matching(placed, parse_filter(text, where="--exclude")), f"--exclude {text}")
    if spec.min_slices > 1:
        series = _Series.of(placed, wanted)
        few = series.images[series.code] < spec.min_slices
        _exclude(wanted, detail, series.spread(few), f"a series of fewer than {spec.min_slices} slices")
    if spec.one_series_per_study != "off":
        series = _Series.of(placed, wanted)
        chosen = _chosen_series(placed.take(pa.array(series.lines)), series)
        _exclude(wanted, detail, series.spread(~np.isin(series.code, chosen)), "another series of its study was chosen")
    removed = pa.array(np.array([text is not None for text in detail], bool))
    reason = pc.if_else(removed, str(Reason.FILTERED), placed["reason"])
    details = pc.coalesce(pa.array(detail.tolist(), pa.string()), placed["detail"])
    return with_columns(placed, {"reason": reason, "detail": details})


def _exclude(wanted: NDArray[np.bool_], detail: NDArray[Any], which: NDArray[np.bool_], why: str) -> None:
    detail[wanted & which] = why
    wanted &= ~which


def _matching(placed: pa.Table, chosen: Filter) -> NDArray[np.bool_]:
    """Return for each line whether the filter's element matches; an element that the header lacks does not."""
    encoded = placed[chosen.column].combine_chunks().dictionary_encode()
    matches = np.array([*(chosen.matches(_as_text(value)) for value in encoded.dictionary.to_pylist()), False])
    result: NDArray[np.bool_] = matches[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    return result


def _as_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


@dataclass(frozen=True)
class _Series:
    """The series of the slices that are still wanted.

    ``lines`` (n,) are those slices among all ``total`` lines; ``code`` (n,) their series, ``study`` (n,) its study;
    ``images`` the number of different images by code.
    """

    total: int
    lines: NDArray[np.int64]
    code: NDArray[np.int64]
    study: NDArray[np.int64]
    images: NDArray[np.int64]

    @classmethod
    def of(cls, placed: pa.Table, wanted: NDArray[np.bool_]) -> _Series:
        """Return the series of the ``wanted`` lines (n,): as volumes are told apart, by patient and study too."""
        lines = np.flatnonzero(wanted)
        slices = placed.take(pa.array(lines))
        series = codes_of(pc.fill_null(slices["series_instance_uid"], ""))
        study = codes_of(identity.usable(slices["study_instance_uid"]))
        patient = codes_of(identity.usable(slices["assigned_patient"]))
        code, _ = identity.divide_series(series, study, patient)
        code = np.unique(code, return_inverse=True)[1].reshape(-1)
        uid = codes_of(slices["sop_instance_uid"])
        # A slice without a SOP Instance UID is an image of its own.
        uid = np.where(uid < 0, len(lines) + np.arange(len(lines)), uid)
        image = identity.join(uid, codes_of(slices["image"]))
        first = np.unique(identity.join(code, image), return_index=True)[1]
        images = np.bincount(code[first], minlength=1)
        return cls(len(placed), lines, code, identity.study_units(series, study, patient), images)

    def spread(self, which: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return ``which`` of the slices, (n,), as which of all lines."""
        result = np.zeros(self.total, bool)
        result[self.lines] = which
        return result


def _chosen_series(slices: pa.Table, series: _Series) -> list[int]:
    """Return the codes of one of the ``series`` for each study.

    Plain before unknown before other scan types, then the thickest slices, a soft kernel, an original image type, most
    images, the UID.
    """
    columns = ["series_instance_uid", "scan_type", "slice_thickness", "convolution_kernel", "image_type", "lossy"]
    table = slices.select(columns).append_column("series", pa.array(series.code))
    table = table.append_column("study", pa.array(series.study))
    grouped = table.group_by("series", use_threads=False).aggregate([(name, "min") for name in (*columns, "study")])
    best: dict[int, tuple[Any, int]] = {}
    for line in grouped.to_pylist():
        rank = (
            _SCAN_TYPES.get(line["scan_type_min"], len(_SCAN_TYPES)),
            -(line["slice_thickness_min"] or 0.0),
            not SOFT_KERNEL.search(line["convolution_kernel_min"] or ""),
            not is_original(line["image_type_min"], line["lossy_min"]),
            -int(series.images[line["series"]]),
            line["series_instance_uid_min"] or "",
        )
        best[line["study_min"]] = min(best.get(line["study_min"], (rank, line["series"])), (rank, line["series"]))
    return [code for _, code in best.values()]
