"""Whether probabilities mean what they say: temperature scaling, reliability, and operating points.

Labels are (n, classes) int8 with -1 = unknown, probabilities (n, classes) float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ich_train.evaluation.metrics import Floats, LabelArray, Probabilities, log_loss
from ich_train.temperature import fit_temperature, scaled

BINS = 15  # of equal width, as in the paper


@dataclass(frozen=True)
class Reliability:
    """The cases in bins of their probability, without the empty ones."""

    predicted: Floats  # mean probability
    observed: Floats  # share of positives
    cases: Floats


def reliability(labels: LabelArray, probabilities: Probabilities) -> Reliability:
    """Return how often the known labels are positive by the probability given to them, all classes together."""
    known = labels >= 0
    truth, given = labels[known].astype(np.float64), probabilities[known].astype(np.float64)
    place = np.minimum((given * BINS).astype(np.int64), BINS - 1)
    cases = np.bincount(place, minlength=BINS).astype(np.float64)
    filled = cases > 0
    predicted = np.bincount(place, weights=given, minlength=BINS)[filled] / cases[filled]
    observed = np.bincount(place, weights=truth, minlength=BINS)[filled] / cases[filled]
    return Reliability(predicted, observed, cases[filled])


def calibration_error(labels: LabelArray, probabilities: Probabilities) -> float | None:
    """Return the expected calibration error: the mean distance of predicted and observed, weighted by the bins' cases."""
    bins = reliability(labels, probabilities)
    total = bins.cases.sum()
    return float((bins.cases * np.abs(bins.predicted - bins.observed)).sum() / total) if total else None


def brier_score(labels: LabelArray, probabilities: Probabilities) -> float | None:
    """Return the mean squared distance of probability and label over the known labels (Brier, 1950)."""
    known = labels >= 0
    return float(np.mean((probabilities[known].astype(np.float64) - labels[known]) ** 2)) if known.any() else None


def calibration(
    labels: LabelArray,
    probabilities: Probabilities,
    val_labels: LabelArray,
    val_probabilities: Probabilities,
    classes: Sequence[str],
) -> dict[str, Any]:
    """Return the temperature fitted on validation, and ECE, Brier score and log loss without and with it."""
    temperature = fit_temperature(val_labels, val_probabilities)

    def measured(values: Probabilities) -> dict[str, float | None]:
        return {
            "ece": calibration_error(labels, values),
            "brier": brier_score(labels, values),
            "log_loss": log_loss(labels, values, classes),
        }

    return {
        "temperature": temperature,
        "as_predicted": measured(probabilities),
        "scaled": None if temperature is None else measured(scaled(probabilities, temperature)),
    }


def operating_point(
    labels: LabelArray,
    probabilities: Probabilities,
    val_labels: LabelArray,
    val_probabilities: Probabilities,
    *,
    classes: Sequence[str],
    sensitivity: float,
) -> dict[str, Any]:
    """Return for each class the highest threshold that has ``sensitivity`` on validation, and what it does to the cases.

    A case is positive if its probability is at least the threshold. None where validation has no positive, or where the
    cases have none (sensitivity) or no negative (specificity).
    """
    points = {}
    for j, name in enumerate(classes):
        positives = np.sort(val_probabilities[val_labels[:, j] > 0, j])[::-1]
        threshold = float(positives[_needed(sensitivity, len(positives)) - 1]) if len(positives) else None
        point: dict[str, Any] = {"threshold": threshold, "sensitivity": None, "specificity": None}
        if threshold is not None:
            predicted = probabilities[:, j] >= threshold
            truth = labels[:, j]
            for word, chosen, right in (
                ("sensitivity", truth == 1, predicted),
                ("specificity", truth == 0, ~predicted),
            ):
                point[word] = float(right[chosen].mean()) if chosen.any() else None
        points[name] = point
    return {"sensitivity": sensitivity, "labels": points}


def _needed(sensitivity: float, positives: int) -> int:
    """Return how many of the positives must be found; 0.55 of 100 are 55, though the product of floats is above that."""
    return max(1, int(np.ceil(sensitivity * positives - 1e-9 * positives)))
