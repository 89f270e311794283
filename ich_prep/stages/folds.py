"""Patient -> fold: a hash of the patient ID only, so that no patient changes folds when others are added."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from numpy.typing import NDArray


def fold_of(patient_id: str, *, folds: int) -> int:
    """Return the fold, 0..folds-1, of a patient: the first 8 bytes of SHA-256 of the id, times folds, over 2^64."""
    prefix = hashlib.sha256(patient_id.encode()).digest()[:8]
    return int.from_bytes(prefix, "big") * folds >> 64


def assign_folds(patient_ids: pa.Array | pa.ChunkedArray, *, folds: int) -> NDArray[np.int8]:
    """Return the fold of each patient id, int8 (n,)."""
    unique = pc.unique(patient_ids)
    fold = np.array([fold_of(value, folds=folds) for value in unique.to_pylist()], np.int8)
    index: NDArray[np.int64] = pc.index_in(patient_ids, value_set=unique).to_numpy(zero_copy_only=False)
    return fold[index]
