"""Images that are in a dataset several times, under different patients, with labels that contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from ich_prep.dataset.classes import UNKNOWN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.report.tables import ReportTables


@dataclass(frozen=True)
class EqualImages:
    """How many images are in several rows, and under several patients; the rows of those with conflicting labels."""

    images: int
    under_patients: int
    conflicts: list[NDArray[np.int64]]


def find_equal_images(tables: ReportTables) -> EqualImages:
    """Return the images that occur more than once: rows with pixels, and of those not ``constant``, of one content hash."""
    usable = tables.is_ok & pc.is_valid(tables.slices["content_hash"]).to_numpy(zero_copy_only=False)
    usable[tables.rows_by_flag.get("constant", [])] = False
    candidates = np.flatnonzero(usable)
    hashes = tables.slices["content_hash"].take(candidates).combine_chunks().dictionary_encode().indices.to_numpy()
    shared = np.flatnonzero(np.bincount(hashes)[hashes] > 1) if len(hashes) else hashes
    if not len(shared):
        return EqualImages(0, 0, [])
    order = shared[np.argsort(hashes[shared], kind="stable")]
    rows, hashes = candidates[order], hashes[order]
    starts = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]])
    patients = tables.slices["patient_id"].take(rows).combine_chunks().fill_null("")
    codes = patients.dictionary_encode().indices.to_numpy()
    several = np.minimum.reduceat(codes, starts) != np.maximum.reduceat(codes, starts)
    labels = tables.labels[rows]
    highest = np.maximum.reduceat(labels, starts)
    lowest = np.minimum.reduceat(np.where(labels == UNKNOWN, 1, labels), starts)
    conflicting = several & ((highest == 1) & (lowest == 0)).any(axis=1)
    groups = np.split(rows, starts[1:])
    return EqualImages(len(starts), int(several.sum()), [groups[k] for k in np.flatnonzero(conflicting)])
