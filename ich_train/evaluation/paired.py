"""Networks measured on the same cases: their measures side by side, and differences in the same bootstrap resamples.

A resample takes the same patients for every network, each with all its cases, so that what is hard in them is hard for all:
the interval of a difference is narrower than what two intervals leave open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ich_train.evaluation.metrics import (
    MEASURES,
    Floats,
    Integers,
    LabelArray,
    Probabilities,
    Resampled,
    Thresholds,
    interval,
    log_loss,
    means_over,
    plain,
    resample,
)

LOSS = "log_loss"
COMPARED = (*MEASURES, LOSS)


@dataclass(frozen=True)
class Network:
    """What one network says of the cases, and its thresholds of best F1, found on its own validation."""

    probabilities: Probabilities  # (n, classes)
    thresholds: Thresholds


@dataclass(frozen=True)
class _Table:
    values: Floats  # (class or mean, compared)
    drawn: Floats  # (resample, class or mean, compared)


def compare_networks(
    labels: LabelArray,
    networks: Sequence[Network],
    patients: Integers,
    *,
    classes: Sequence[str],
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return for each network its measures and, but for the first, their differences from those of the first.

    ``labels`` (n, classes) int8, -1 unknown; ``patients`` (n,) says whose case it is. Each is a dict of ``labels`` (by
    class) and ``mean``, and these of {measure: {"value", "interval"}}, the measures of ``COMPARED``, and beside ``value``
    the ``difference`` and ``difference_interval``, None for the first. The mean is over the classes for which a measure is
    defined in all networks; the log loss is that of all classes. Intervals hold 95% of the resamples; see ``measure``.
    """
    given: dict[str, Any] = {"classes": classes, "resamples": resamples, "seed": seed}
    found = [resample(labels, of.probabilities, patients, of.thresholds, **given) for of in networks]
    defined = np.logical_and.reduce([np.isfinite(one.values[:-1]) for one in found])
    losses = [log_loss(labels, of.probabilities, classes) for of in networks]
    tables = [_with_mean(one, loss, defined) for one, loss in zip(found, losses, strict=True)]
    return [_described(table, None if k == 0 else tables[0], classes) for k, table in enumerate(tables)]


def _with_mean(found: Resampled, loss: float | None, defined: npt.NDArray[np.bool_]) -> _Table:
    """Return the measures of the classes, and of their mean over those where a measure is ``defined`` (class, measure)."""
    values, drawn = found.values[:-1], found.drawn[:, :-1]
    means, drawn_means = means_over(values, drawn, defined)
    # The log loss is one of all classes: theirs have none.
    losses = np.append(np.full(len(values), np.nan), np.nan if loss is None else loss)
    drawn_losses = np.column_stack([np.full(drawn.shape[:2], np.nan), found.drawn_losses])
    return _Table(
        np.column_stack([np.vstack([values, means]), losses]),
        np.dstack([np.concatenate([drawn, drawn_means[:, None]], axis=1), drawn_losses]),
    )


def _described(table: _Table, first: _Table | None, classes: Sequence[str]) -> dict[str, Any]:
    def entry(place: int) -> dict[str, Any]:
        return {name: _measured(table, first, place, k) for k, name in enumerate(COMPARED)}

    return {"labels": {name: entry(place) for place, name in enumerate(classes)}, "mean": entry(len(classes))}


def _measured(table: _Table, first: _Table | None, place: int, k: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "value": plain(table.values[place, k]),
        "interval": interval(table.drawn[:, place, k]),
        "difference": None,
        "difference_interval": None,
    }
    if first is not None:
        values["difference"] = plain(table.values[place, k] - first.values[place, k])
        values["difference_interval"] = interval(table.drawn[:, place, k] - first.drawn[:, place, k])
    return values
