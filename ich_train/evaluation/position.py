"""The baseline of every evaluation: a model that sees nothing of a slice but its place in the series."""

from __future__ import annotations

import numpy as np

from ich_train.evaluation.metrics import Floats, Integers, LabelArray

BINS = 20


def position_scores(known: Floats, known_labels: LabelArray, positions: Floats) -> Floats:
    """Return the probabilities (n, classes) of a model that sees nothing but where in its series a slice lies.

    ``known`` (m,) and ``positions`` (n,) are relative positions in [0, 1]. The probability of a label is its share
    among the training slices ``known_labels`` (m, classes) in the same twentieth of the series, among all of them if that
    twentieth has none, and NaN if the label is never known.
    """
    scores = np.zeros((len(positions), known_labels.shape[1]))
    for j in range(known_labels.shape[1]):
        is_known = known_labels[:, j] >= 0
        truth, where = known_labels[is_known, j], known[is_known]
        cases = np.bincount(_bins(where), minlength=BINS)
        positives = np.bincount(_bins(where), weights=truth, minlength=BINS)
        overall = truth.mean() if len(truth) else np.nan
        share = np.divide(positives, cases, out=np.full(BINS, overall), where=cases > 0)
        scores[:, j] = share[_bins(positions)]
    return scores


def _bins(positions: Floats) -> Integers:
    return np.minimum((positions * BINS).astype(np.int64), BINS - 1)
