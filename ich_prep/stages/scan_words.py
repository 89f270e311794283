"""What the words of headers and folder names say about each slice's series: scan type, contrast, not a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.components import codes_of
from ich_prep.layouts.scan_types import is_not_head, scan_type_of
from ich_prep.stages.identity import join

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FOLDER = r"(?:^|/)(?P<folder>[^/]+)/[^/]*$"


def with_scan_words(scanned: pa.Table) -> pa.Table:
    """Return ``scanned`` with the columns ``scan_type`` (string), ``contrast_stated`` and ``header_not_head`` (bool)."""
    folder = pc.struct_field(pc.extract_regex(scanned["path"], _FOLDER), "folder")
    words = [scanned["series_description"], folder, scanned["convolution_kernel"], scanned["contrast_agent"]]
    first, which = _distinct([codes_of(column) for column in words])
    kinds = [scan_type_of(*(column[index].as_py() for column in words)) for index in first.tolist()]
    side = _field_of_view(scanned)
    first_view, which_view = _distinct([codes_of(scanned["body_part"]), np.nan_to_num(side, nan=-1).astype(np.int64)])
    views = [
        is_not_head(scanned["body_part"][index].as_py(), None if np.isnan(side[index]) else float(side[index]))
        for index in first_view.tolist()
    ]
    return (
        scanned.append_column("scan_type", pa.array([kind for kind, _ in kinds], pa.string()).take(pa.array(which)))
        .append_column("contrast_stated", pa.array(np.array([stated for _, stated in kinds], bool)[which]))
        .append_column("header_not_head", pa.array(np.array(views, bool)[which_view]))
    )


def _field_of_view(scanned: pa.Table) -> NDArray[np.float64]:
    """Return the longer side of each slice in whole mm, rounded up, (n,); NaN where unknown."""
    lists = scanned["pixel_spacing"].combine_chunks()
    spacing = np.full((len(lists), 2), np.nan)
    valid = lists.is_valid().to_numpy(zero_copy_only=False)
    spacing[valid] = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, 2)
    sides = [
        scanned[name].cast(pa.float64()).fill_null(np.nan).to_numpy() * spacing[:, axis]
        for axis, name in enumerate(("rows", "columns"))
    ]
    longest: NDArray[np.float64] = np.ceil(np.clip(np.maximum(*sides), 0, 1e6))
    return longest


def _distinct(codes: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the index of the first line of each combination of ``codes``, (m,), and each line's combination, (n,)."""
    joined = np.zeros(len(codes[0]), np.int64)
    for one in codes:
        joined = join(joined, one)
    _, first, which = np.unique(joined, return_index=True, return_inverse=True)
    return first, which.reshape(-1)
