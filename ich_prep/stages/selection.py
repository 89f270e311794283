"""Which series the user wants: header filters, a least number of slices, one series of each study. Tables in, tables out.

A filter is ``KEYWORD=VALUE,VALUE`` (any of the values, in any case) or ``KEYWORD~REGEX`` (found anywhere, in any case), with
the DICOM keyword of a header element that the scan keeps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.errors import Reason, UsageError
from ich_prep.recipe import refuse_unknown

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
SOFT_KERNEL: Final = re.compile(
    r"soft|std|stand|brain|head|smooth|^[a-z]{0,2}[1-4][0-9](?![0-9])|^f[bc](?:0|1|2)", re.IGNORECASE
)


@dataclass(frozen=True)
class Filter:
    """The scan's ``column``; ``matches`` says whether a value, as text, is meant; ``text`` is the filter as given."""

    column: str
    matches: Callable[[str], bool]
    text: str


def parse_filter(text: str, *, where: str) -> Filter:
    """Return the filter written as ``text``; raises ``UsageError``. ``where`` names the option in messages."""
    parts = _FILTER.fullmatch(text)
    if parts is None:
        raise UsageError(
            f"{where} {text!r}: expected KEYWORD=VALUE,VALUE or KEYWORD~REGEX, such as BodyPartExamined=HEAD,BRAIN."
        )
    by_name = {name.casefold(): column for name, column in KEYWORDS.items()} | {one: one for one in KEYWORDS.values()}
    name, operator, right = parts[1], parts[2], parts[3].strip()
    if name.casefold() not in by_name:
        refuse_unknown([name], KEYWORDS, where=f"{where}: keyword")
    column = by_name[name.casefold()]
    if operator == "=":
        values = frozenset(value.strip().casefold() for value in right.split(","))
        return Filter(column, lambda value: bool(values & {value.casefold(), *_components(value)}), text)
    try:
        pattern = re.compile(right, re.IGNORECASE)
    except re.error as error:
        raise UsageError(f"{where} {text!r}: {right!r} is not a regular expression ({error}).") from None
    return Filter(column, lambda value: pattern.search(value) is not None, text)


def _components(value: str) -> list[str]:
    r"""Return the parts of a multi-valued element, which "\" separates, in lower case."""
    return [part.strip().casefold() for part in value.split("\\")]


def select(placed: pa.Table, spec: Spec) -> pa.Table:
    """Return ``placed``, the scan with the layout's columns, where excluded slices have the reason FILTERED and a detail.

    Filters act on each file, the least number of slices on each series, and then one series of each study is chosen.
    """
    wanted = pc.is_null(placed["reason"]).to_numpy(zero_copy_only=False).copy()
    detail = np.full(len(placed), None, object)
    for text in spec.include:
        _exclude(wanted, detail, ~_matching(placed, parse_filter(text, where="--include")), f"not --include {text}")
    for text in spec.exclude:
        _exclude(wanted, detail, _matching(placed, parse_filter(text, where="--exclude")), f"--exclude {text}")
    series = _series_codes(placed)
    if spec.min_slices > 1:
        counts = np.bincount(series[wanted], minlength=series.max(initial=0) + 1)
        few = counts[series] < spec.min_slices
        _exclude(wanted, detail, few, f"a series of fewer than {spec.min_slices} slices")
    if spec.one_series_per_study != "off":
        chosen = _chosen_series(placed, series, wanted)
        _exclude(wanted, detail, ~np.isin(series, chosen), "another series of its study was chosen")
    removed = pa.array(np.array([text is not None for text in detail], bool))
    reason = pc.if_else(removed, str(Reason.FILTERED), placed["reason"])
    details = pc.coalesce(pa.array(detail.tolist(), pa.string()), placed["detail"])
    for name, values in (("reason", reason), ("detail", details)):
        placed = placed.set_column(placed.column_names.index(name), placed.schema.field(name), values)
    return placed


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
    return f"{value:g}" if isinstance(value, float) else str(value)


def _series_codes(placed: pa.Table) -> NDArray[np.int64]:
    """Return a code for each series of a study, (n,)."""
    joined = pc.binary_join_element_wise(
        *(pc.fill_null(placed[name], "") for name in ("study_instance_uid", "series_instance_uid")), "\n"
    )
    codes = joined.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return np.asarray(codes, np.int64)


def _chosen_series(placed: pa.Table, series: NDArray[np.int64], wanted: NDArray[np.bool_]) -> list[int]:
    """Return the codes of one series for each study.

    Plain before other scan types, then the thickest slices, a soft kernel, an original image type, most slices, the UID.
    """
    columns = [
        "study_instance_uid",
        "series_instance_uid",
        "scan_type",
        "slice_thickness",
        "convolution_kernel",
        "image_type",
    ]
    table = placed.select(columns).append_column("series", pa.array(series)).filter(pa.array(wanted))
    grouped = table.group_by("series").aggregate([([], "count_all"), *((name, "min") for name in columns)])
    best: dict[str, tuple[Any, int]] = {}
    for line in grouped.to_pylist():
        rank = (
            line["scan_type_min"] != "plain",
            -(line["slice_thickness_min"] or 0.0),
            not SOFT_KERNEL.search(line["convolution_kernel_min"] or ""),
            not (line["image_type_min"] or "").upper().startswith("ORIGINAL"),
            -line["count_all"],
            line["series_instance_uid_min"] or "",
        )
        study = line["study_instance_uid_min"] or line["series_instance_uid_min"] or ""
        best[study] = min(best.get(study, (rank, line["series"])), (rank, line["series"]))
    return [code for _, code in best.values()]
