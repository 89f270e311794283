"""One temperature for the logits of a network: fitted on validation by an evaluation, and applied to predictions.

Labels are (n, classes) int8 with -1 = unknown, probabilities (n, classes) float. A temperature T divides the logits of all
classes (Guo et al., arXiv:1706.04599): it is fitted on validation and changes no ranking.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ich_prep.files import read_regular
from ich_train.runs import METRICS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_train.checkpoint import Meta

FLOOR = 1e-7  # a float32 probability may be 0 or 1
LOWEST, HIGHEST = 1e-3, 1e3  # temperatures


@dataclass(frozen=True)
class Temperature:
    """What the logits of the network of ``run`` are divided by; ``value`` is None if they are not, ``why`` says why."""

    run: str
    value: float | None
    why: str = ""

    def describe(self) -> str:
        """Say in a few words whether the probabilities are calibrated."""
        return f"not calibrated: {self.why}" if self.value is None else f"calibrated, temperature {self.value:.3f}"


def temperature_of(run: Path, meta: Meta, *, wanted: bool = True) -> Temperature:
    """Return the temperature in the ``metrics.json`` of the folder ``run``, whose best network has ``meta``.

    It counts if it was fitted for that network, on the validation part of the dataset that it was trained on; without
    ``wanted`` there is none.
    """
    if not wanted:
        return Temperature(run.name, None, "--no-calibrate")
    try:
        metrics = json.loads(read_regular(run / METRICS))
        if metrics["model"]["epoch"] != meta.epoch:
            why = "its evaluation is of another epoch"
        elif not metrics["dataset"]["trained_on"]:
            why = "its evaluation is of another dataset"
        else:
            value = metrics["calibration"]["temperature"]
            if value is not None and math.isfinite(value) and value > 0:
                return Temperature(run.name, float(value))
            why = (
                "no temperature can be fitted without validation slices with labels of their own, positive and negative"
            )
    except FileNotFoundError:
        why = "it has not been evaluated (ich-train eval)"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        why = f"its {METRICS} cannot be read or has no temperature (ich-train eval writes it again)"
    return Temperature(run.name, None, why)


def fit_temperature(labels: NDArray[np.int8], probabilities: NDArray[np.floating]) -> float | None:
    """Return the temperature of the lowest log loss over all known labels, None if those are all alike.

    The log loss is convex in 1 / T; its derivative is bisected between temperatures of 0.001 and 1000.
    """
    known = labels >= 0
    truth, logits = labels[known].astype(np.float64), _logits(probabilities)[known]
    if not len(truth) or truth.min() == truth.max():
        return None
    low, high = np.log(1 / HIGHEST), np.log(1 / LOWEST)
    for _ in range(60):
        middle = (low + high) / 2
        slope = np.mean(logits * (_sigmoid(np.exp(middle) * logits) - truth))
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def scaled(probabilities: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """Return ``probabilities`` with their logits divided by ``temperature``."""
    return _sigmoid(_logits(probabilities) / temperature)


def _logits(probabilities: NDArray[np.floating]) -> NDArray[np.float64]:
    clipped = np.clip(probabilities.astype(np.float64), FLOOR, 1 - FLOOR)
    logits: NDArray[np.float64] = np.log(clipped) - np.log1p(-clipped)
    return logits


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = 0.5 * (1 + np.tanh(logits / 2))
    return values
