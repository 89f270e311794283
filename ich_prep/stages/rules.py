"""What the options of a build leave out of the files that the scan accepted. Tables in, tables out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.tables import with_columns
from ich_prep.dicom.accept import BURNED_IN, is_original
from ich_prep.errors import Reason

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.spec import Spec


def apply_rules(scanned: pa.Table, spec: Spec) -> pa.Table:
    """Return ``scanned`` (``scan.SCHEMA``) with a reason for each slice that an option of ``spec`` leaves out.

    BURNED_IN without ``allow_burned_in``; FILTERED for images that are not original with ``image_types`` "original".
    """
    if not spec.allow_burned_in:
        detail = "BurnedInAnnotation is YES: keep such slices with --allow-burned-in"
        scanned = refuse(scanned, _has_flag(scanned["flags"], BURNED_IN), Reason.BURNED_IN, detail)
    if spec.image_types == "original":
        scanned = refuse(scanned, ~_are_original(scanned), Reason.FILTERED, "--image-types original leaves it out")
    return scanned


def refuse(scanned: pa.Table, chosen: NDArray[np.bool_], reason: Reason, detail: str | pa.Array) -> pa.Table:
    """Return ``scanned`` with ``reason`` and ``detail`` for those of the ``chosen`` lines, (n,), that have no reason yet."""
    mask = pc.and_(pc.is_null(scanned["reason"]), pa.array(chosen, pa.bool_()))
    given = {"detail": detail, "reason": str(reason)}
    return with_columns(scanned, {name: pc.if_else(mask, value, scanned[name]) for name, value in given.items()})


def _has_flag(flags: pa.ChunkedArray, word: str) -> NDArray[np.bool_]:
    """Return which of the lists have the ``word``."""
    lists = flags.combine_chunks()
    found = np.zeros(len(lists), bool)
    has_word = pc.fill_null(pc.equal(lists.flatten(), word), False)
    found[pc.list_parent_indices(lists).filter(has_word).to_numpy()] = True
    return found


def _are_original(scanned: pa.Table) -> NDArray[np.bool_]:
    """Return which lines have an image type of an original slice, or none."""
    kinds = scanned.select(["image_type", "lossy"])
    distinct = kinds.group_by(["image_type", "lossy"], use_threads=False).aggregate([]).to_pylist()
    original = {
        (kind["image_type"], kind["lossy"]): is_original(kind["image_type"], kind["lossy"]) for kind in distinct
    }
    pairs = zip(kinds["image_type"].to_pylist(), kinds["lossy"].to_pylist(), strict=True)
    return np.fromiter((original[pair] for pair in pairs), bool, len(kinds))
