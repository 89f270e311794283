"""The split of a dataset's rows: to train a model, choose its best epoch, and test it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from ich_prep.errors import UsageError
from ich_train.rows import column, labelled_rows

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset


@dataclass(frozen=True)
class Split:
    """The rows of the three parts, int64, ascending; no row and no fold group, and so no patient, is in two of them."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


def split_rows(
    dataset: Dataset,
    *,
    val_fold: int | Literal["none"],
    test_fold: int | Literal["none"],
    allow_series_labels: bool,
    where: str | None = None,
    needed: Collection[str] = ("train", "val", "test"),
) -> Split:
    """Return the labelled rows of ``dataset``, or those of the filter ``where``, as a `Split`.

    If the dataset's own test subset has labels, it is the test part, and the training part has all folds but
    ``val_fold``. Otherwise ``test_fold`` is held out. "none" holds nothing out. Where a fold group is in several folds or
    subsets, its slices are in the test part if some belong there, else in the validation part; its other slices are in
    no part. Raises `UsageError` if the two folds are the same, a part that is ``needed`` would be empty, no slice has a
    label, or labels are those of whole series and ``allow_series_labels`` is false.
    """
    rows = labelled_rows(dataset, allow_series_labels=allow_series_labels, where=where)
    in_test_subset = column(dataset, "subset", rows) == "test"
    # A slice of the test subset has no fold.
    fold = np.where(in_test_subset, -1, column(dataset, "fold", rows)).astype(np.int64)
    group = _group_numbers(dataset, rows)
    if in_test_subset.any():
        is_test = in_test_subset
    elif val_fold == test_fold != "none":
        raise UsageError(f"val_fold and test_fold are both {val_fold}: they must differ.")
    else:
        is_test = _in_fold(fold, test_fold)
    in_no_part = np.isin(group, group[is_test]) & ~is_test
    is_val = _in_fold(fold, val_fold) & ~in_no_part
    in_no_part |= np.isin(group, group[is_val]) & ~is_val & ~is_test
    split = Split(train=rows[~is_val & ~is_test & ~in_no_part], val=rows[is_val], test=rows[is_test])
    for part, part_rows in vars(split).items():
        if part in needed and not len(part_rows):
            folds, sizes = np.unique(fold[fold >= 0], return_counts=True)
            counts = ", ".join(f"{k}: {size}" for k, size in zip(folds, sizes, strict=True)) or "none"
            raise UsageError(
                f"No slices for {part} with val_fold {val_fold} and test_fold {test_fold}"
                f"{'' if where is None else f' where {where}'}. Labelled slices in each fold: "
                f"{counts}. Choose other folds, or build with more patients or fewer folds."
            )
    return split


def _in_fold(fold: NDArray[np.int64], number: int | Literal["none"]) -> NDArray[np.bool_]:
    if number == "none":
        return np.zeros(len(fold), bool)
    equal: NDArray[np.bool_] = fold == number
    return equal


def _group_numbers(dataset: Dataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a number for the fold group of each of ``rows``, (n,)."""
    groups = dataset.fold_groups.take(pa.array(rows)).combine_chunks().dictionary_encode()
    numbers: NDArray[np.int64] = groups.indices.to_numpy().astype(np.int64)
    return numbers


def balanced_weights(labels: NDArray[np.int8]) -> NDArray[np.float64]:
    """Return how often to draw each slice, (n,) float64, so that slices with rare labels are seen more often.

    ``labels`` is (n, classes) int8. A slice counts as its rarest positive label, or as negative; the weight is one over
    the square root of how many count as the same, which raises a rare label without showing its few slices only.
    """
    positives = (labels == 1).sum(axis=0)
    rarest = np.where(labels == 1, positives, np.iinfo(np.int64).max).argmin(axis=1)
    kind = np.where((labels == 1).any(axis=1), rarest, labels.shape[1])
    weights: NDArray[np.float64] = 1 / np.sqrt(np.bincount(kind, minlength=labels.shape[1] + 1)[kind])
    return weights
