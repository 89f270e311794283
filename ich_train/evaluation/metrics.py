"""How well probabilities fit labels: per label, macro and micro, with intervals that resample patients.

Labels are (n, classes) int8 with -1 = unknown, probabilities (n, classes) float; ``classes`` are their names, in order. A
case is a slice or a series: a line of the arrays. A case is predicted positive if its probability >= the threshold.

A measure is undefined (NaN inside, None outside) if its denominator is zero, or, except for accuracy, if its label has
cases of one class only: a constant label says nothing about a model, and a precision of 0 would suggest that it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from ich_train.rsna import class_weights

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
LabelArray = npt.NDArray[np.int8]
Probabilities = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Thresholds = tuple[float | None, ...]

COUNTS = ("tn", "fp", "fn", "tp")  # in the order of 2 * label + predicted
RANKING = ("roc_auc", "average_precision")
DECISION = ("accuracy", "precision", "recall", "f1")
POLICIES = ("at_half", "at_best_f1")
POLICY_WORDS = {"at_half": "threshold 0.5", "at_best_f1": "threshold of best F1 on validation"}
MEASURES = RANKING + tuple(f"{policy}.{name}" for policy in POLICIES for name in DECISION)

PROBABILITY_FLOOR = 1e-15  # the competition's clip; in float64 1 - 1e-15 is still below 1
INTERVAL_PERCENT = (2.5, 97.5)


def best_f1_thresholds(labels: LabelArray, probabilities: Probabilities) -> Thresholds:
    """Return for each label the threshold that gives the highest F1: one of its probabilities, None if undefined."""
    return tuple(_best_f1(*_known(labels[:, j], probabilities[:, j])) for j in range(labels.shape[1]))


@dataclass(frozen=True)
class Curve:
    """Points of a curve with the lowest probability predicted positive at each, infinity if none is."""

    x: Floats  # false positive rate, or recall
    y: Floats  # true positive rate, or precision
    threshold: Floats


def roc_curves(labels: LabelArray, probabilities: Probabilities, classes: Sequence[str]) -> dict[str, Curve]:
    """Return the ROC curve of each label that has both classes, without points on a straight line."""
    return {name: Curve(*roc_curve(*column)) for name, column in _two_class_columns(labels, probabilities, classes)}


def precision_recall_curves(
    labels: LabelArray, probabilities: Probabilities, classes: Sequence[str]
) -> dict[str, Curve]:
    """Return the precision over recall of each label that has both classes, recall falling."""
    curves = {}
    for name, column in _two_class_columns(labels, probabilities, classes):
        precision, recall, threshold = precision_recall_curve(*column, drop_intermediate=True)
        curves[name] = Curve(recall, precision, np.append(threshold, np.inf))
    return curves


def log_loss(labels: LabelArray, probabilities: Probabilities, classes: Sequence[str]) -> float | None:
    """Return the mean log loss over the known labels, weighted by `ich_train.rsna.class_weights`; None if none is known.

    For RSNA's six classes that is the weighted log loss of the competition. In float64, with probabilities clipped to
    [1e-15, 1 - 1e-15].
    """
    losses, weights = _log_loss_terms(labels, probabilities, class_weights(classes))
    return float(losses.sum() / weights.sum()) if weights.any() else None


def roc_aucs(labels: LabelArray, scores: Probabilities, classes: Sequence[str]) -> dict[str, float | None]:
    """Return the area under the ROC curve of each label by name, None if it is undefined or scores are NaN."""
    areas: dict[str, float | None] = {}
    for j, name in enumerate(classes):
        truth, score = _known(labels[:, j], scores[:, j])
        areas[name] = None if np.isnan(score).any() else plain(_roc_auc(truth, score))
    return areas


def by_series(
    series: Integers, sizes: Integers, labels: LabelArray, probabilities: Probabilities, *, how: Literal["max", "mean"]
) -> tuple[LabelArray, Floats, Integers]:
    """Return labels (m, classes), probabilities (m, classes) float64 and the index of one slice (m,) for each of m series.

    ``series`` (n,) says which series a slice is of, ``sizes`` (n,) how many slices that has, including those
    not given; the series come out in ascending order. A series is positive if any of its slices is, negative if all of
    them are known to be, else unknown. Its probability is the maximum or mean over the slices given.
    """
    names, first, code = np.unique(series, return_index=True, return_inverse=True)
    shape = len(names), labels.shape[1]
    positive, negatives = np.zeros(shape, bool), np.zeros(shape, np.int64)
    np.logical_or.at(positive, code, labels > 0)
    np.add.at(negatives, code, labels == 0)
    unknown = negatives < sizes[first][:, None]
    reduced = np.where(positive, 1, np.where(unknown, -1, 0)).astype(np.int8)
    if how == "max":
        highest = np.full(shape, -np.inf)
        np.maximum.at(highest, code, probabilities)
        return reduced, highest, first
    total = np.zeros(shape)
    np.add.at(total, code, probabilities)
    return reduced, total / np.bincount(code, minlength=len(names))[:, None], first


def measure(
    labels: LabelArray,
    probabilities: Probabilities,
    patients: Integers,
    thresholds: Thresholds,
    *,
    classes: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return every measure of n cases as plain values fit for JSON: by label, macro, micro and the log loss.

    ``patients`` (n,) says whose case it is; ``thresholds`` come from other cases. Macro is the mean over the labels
    for which a measure is defined, micro pools the cases of all labels (at the best-F1 thresholds: of those that have
    one); ``labels`` in either says how many those are. Intervals [low, high] hold 95% of ``resamples`` bootstrap
    resamples of the patients, each with all its cases. A resample in which the measure is undefined is skipped; an
    interval is None if more than half of them are, or if there are fewer than two patients.
    """
    found = resample(labels, probabilities, patients, thresholds, classes=classes, resamples=resamples, seed=seed)
    values, drawn, counts = found.values, found.drawn, found.counts
    by_label = {name: _entry(values[j], drawn[:, j]) for j, name in enumerate(classes)}
    for entry, cases, threshold in zip(by_label.values(), counts[:-1], thresholds, strict=True):
        entry["positives"], entry["negatives"] = int(cases[0, 2:].sum()), int(cases[0, :2].sum())
        entry["at_half"] |= {"threshold": 0.5, **_count_words(cases[0])}
        entry["at_best_f1"] |= {"threshold": threshold}
        entry["at_best_f1"] |= dict.fromkeys(COUNTS) if threshold is None else _count_words(cases[1])
    micro = _entry(values[-1], drawn[:, -1])
    known = int((labels >= 0).any(axis=0).sum())
    with_threshold = sum(threshold is not None for threshold in thresholds)
    micro["labels"] = {name: with_threshold if name.startswith("at_best_f1") else known for name in MEASURES}
    for k, policy in enumerate(POLICIES):
        micro[policy] |= _count_words(counts[-1, k])
    return {
        "cases": len(labels),
        "patients": len(np.unique(patients)),
        "log_loss": log_loss(labels, probabilities, classes),
        "log_loss_interval": interval(found.drawn_losses),
        "labels": by_label,
        "macro": _macro(values[:-1], drawn[:, :-1]),
        "micro": micro,
    }


@dataclass(frozen=True)
class Resampled:
    """The measures of cases and of bootstrap resamples of their patients, NaN where undefined.

    Equal patients, in equal order, and an equal seed give the same resamples: those of two networks are pairs.
    """

    values: Floats  # (label or micro, measure), in the order of ``MEASURES``
    drawn: Floats  # (resample, label or micro, measure)
    drawn_losses: Floats  # (resample,), the log loss
    counts: Floats  # (label or micro, policy, count)


def resample(
    labels: LabelArray,
    probabilities: Probabilities,
    patients: Integers,
    thresholds: Thresholds,
    *,
    classes: Sequence[str],
    resamples: int,
    seed: int,
) -> Resampled:
    """Return the measures of n cases and of ``resamples`` resamples of their patients; none of fewer than two patients.

    The arguments are those of ``measure``.
    """
    names, owner = np.unique(patients, return_inverse=True)
    columns = [(*_known(labels[:, j], probabilities[:, j]), owner[labels[:, j] >= 0]) for j in range(len(classes))]
    truths, scores, owners = (np.concatenate(part) for part in zip(*columns, strict=True))
    columns.append((truths, scores, owners))  # micro
    sums = _PatientSums.of(labels, probabilities, owner, thresholds, class_weights(classes))
    counts = sums.counts(np.ones(len(names)))
    values = np.column_stack([[_ranking(truth, score) for truth, score, _ in columns], _decisions(counts)])

    drawn = np.empty((resamples if len(names) > 1 else 0, *values.shape))
    losses = np.empty(len(drawn))
    ranked = [_Ranked.of(*column) for column in columns]
    rng = np.random.default_rng(seed)
    for b in range(len(drawn)):
        weights = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names)).astype(np.float64)
        drawn[b] = np.column_stack([[column.ranking(weights) for column in ranked], _decisions(sums.counts(weights))])
        losses[b] = sums.log_loss(weights)
    return Resampled(values, drawn, losses, counts)


@dataclass(frozen=True)
class _Ranked:
    """The cases of one label from the highest score down, so that a resample is ranked without another sort.

    Both measures are sums over positives, which are few: only those are grouped by their g distinct scores.
    """

    owner: Integers  # (n,) patient of each case
    positive_owner: Integers  # (p,) patient of each positive
    positive_starts: Integers  # (g,) among the positives, where each run of equal scores begins
    starts: Integers  # (g,) among all cases, where the run of that score begins
    ends: Integers  # (g,) and where it has ended

    @classmethod
    def of(cls, truth: LabelArray, score: Floats, owner: Integers) -> _Ranked:
        order = np.argsort(-score, kind="stable")
        positives = order[truth[order] > 0]
        distinct, positive_starts = np.unique(-score[positives], return_index=True)
        starts = np.searchsorted(-score[order], distinct, side="left")
        ends = np.searchsorted(-score[order], distinct, side="right")
        return cls(owner[order], owner[positives], positive_starts, starts, ends)

    def ranking(self, weights: Floats) -> tuple[float, float]:
        """Return ROC AUC and average precision when patient p counts ``weights[p]`` times, NaN where undefined."""
        if not len(self.starts):
            return np.nan, np.nan
        running = np.cumsum(weights[self.owner])
        above = running[self.ends - 1]  # cases of this score or a higher one
        higher = np.where(self.starts > 0, running[self.starts - 1], 0.0)
        true = np.add.reduceat(weights[self.positive_owner], self.positive_starts)
        true_above = np.cumsum(true)
        positives, negatives = true_above[-1], running[-1] - true_above[-1]
        if positives == 0 or negatives == 0:
            return np.nan, np.nan
        ties = above - higher - true  # negatives of the same score count half
        roc_auc = np.dot(true, negatives - (above - true_above) + ties / 2) / (positives * negatives)
        precision = np.divide(true_above, above, out=np.zeros_like(above), where=above > 0)
        return float(roc_auc), float(np.dot(true, precision) / positives)


@dataclass(frozen=True)
class _PatientSums:
    """Sums over the cases of each patient: a resample of patients is then a weighted sum of rows."""

    counted: Floats  # (patient, label x policy x count)
    losses: Floats  # (patient, 2): log loss and its weights

    @classmethod
    def of(
        cls,
        labels: LabelArray,
        probabilities: Probabilities,
        owner: Integers,
        thresholds: Thresholds,
        weights: Sequence[float],
    ) -> _PatientSums:
        patients = int(owner.max(initial=-1)) + 1
        shape = patients, len(weights), len(POLICIES), len(COUNTS)
        counted = np.zeros(shape)
        for j, best in enumerate(thresholds):
            truth, score = _known(labels[:, j], probabilities[:, j])
            whose = owner[labels[:, j] >= 0]
            for k, threshold in enumerate((0.5, best)):
                if threshold is not None:
                    cell = whose * len(COUNTS) + 2 * truth + (score >= threshold)
                    counts = np.bincount(cell, minlength=patients * len(COUNTS))
                    counted[:, j, k] = counts.reshape(patients, len(COUNTS))
        terms = (
            np.bincount(owner, weights=term, minlength=patients)
            for term in _log_loss_terms(labels, probabilities, weights)
        )
        return cls(counted.reshape(patients, -1), np.column_stack([*terms]))

    def counts(self, weights: Floats) -> Floats:
        """Return (label or micro, policy, count) when patient p counts ``weights[p]`` times."""
        labels = (weights @ self.counted).reshape(-1, len(POLICIES), len(COUNTS))
        return np.concatenate([labels, labels.sum(axis=0, keepdims=True)])

    def log_loss(self, weights: Floats) -> float:
        total, count = weights @ self.losses
        return float(total / count) if count else np.nan


def _decisions(counts: Floats) -> Floats:
    """Return (label, policy x measure) accuracy, precision, recall and F1 of counts (label, policy, count)."""
    tn, fp, fn, tp = np.moveaxis(counts, -1, 0)
    both_classes = (tn + fp > 0) & (fn + tp > 0)

    def ratio(part: Floats, whole: Floats, where: npt.NDArray[np.bool_] = both_classes) -> Floats:
        values: Floats = np.divide(part, whole, out=np.full(part.shape, np.nan), where=where & (whole > 0))
        return values

    cases = tn + fp + fn + tp
    accuracy = ratio(tn + tp, cases, where=cases > 0)
    f1 = ratio(2 * tp, 2 * tp + fp + fn)
    measures = np.stack([accuracy, ratio(tp, tp + fp), ratio(tp, tp + fn), f1], axis=-1)
    return measures.reshape(len(counts), -1)


def _ranking(truth: LabelArray, score: Floats) -> tuple[float, float]:
    area = _roc_auc(truth, score)
    return area, np.nan if np.isnan(area) else float(average_precision_score(truth, score))


def _roc_auc(truth: LabelArray, score: Floats) -> float:
    return np.nan if not truth.any() or truth.all() else float(roc_auc_score(truth, score))


def _two_class_columns(
    labels: LabelArray, scores: Probabilities, classes: Sequence[str]
) -> list[tuple[str, tuple[LabelArray, Floats]]]:
    columns = [(name, _known(labels[:, j], scores[:, j])) for j, name in enumerate(classes)]
    return [(name, column) for name, column in columns if column[0].any() and not column[0].all()]


def _best_f1(truth: LabelArray, score: Floats) -> float | None:
    if not truth.any() or truth.all():
        return None
    precision, recall, thresholds = precision_recall_curve(truth, score)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return float(thresholds[np.argmax(f1[:-1])])  # at the last point nothing is predicted positive


def _log_loss_terms(
    labels: LabelArray, probabilities: Probabilities, of_classes: Sequence[float]
) -> tuple[Floats, Floats]:
    """Return for each case (n,) its weighted log loss, summed over its known labels, and the sum of their weights."""
    clipped = np.clip(probabilities.astype(np.float64), PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    weights = np.where(labels >= 0, np.array(of_classes), 0.0)
    losses = -np.log(np.where(labels > 0, clipped, 1 - clipped))
    return (weights * losses).sum(axis=1), weights.sum(axis=1)


def means_over(values: Floats, drawn: Floats, defined: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return the means (measure,) of ``values`` (label, measure) where they are ``defined``, and those of ``drawn``.

    The same labels in every resample: a mean over those that happen to be defined would estimate something else.
    """
    means = [values[kept, i].mean() if kept.any() else np.nan for i, kept in enumerate(defined.T)]
    resampled = [drawn[:, kept, i].mean(axis=1) if kept.any() else drawn[:, 0, i] for i, kept in enumerate(defined.T)]
    return np.array(means), np.column_stack(resampled)


def _macro(values: Floats, drawn: Floats) -> dict[str, Any]:
    """Return the mean over labels: values (label, measure), drawn (resample, label, measure)."""
    defined = ~np.isnan(values)
    counted = dict(zip(MEASURES, defined.sum(axis=0).tolist(), strict=True))
    return _entry(*means_over(values, drawn, defined)) | {"labels": counted}


def _entry(values: Floats, drawn: Floats) -> dict[str, Any]:
    """Return measures (10,) and their resamples (b, 10) as nested plain values, in the order of ``MEASURES``."""
    named = dict(zip(MEASURES, map(plain, values), strict=True))
    entry: dict[str, Any] = {name: named[name] for name in RANKING}
    for policy in POLICIES:
        entry[policy] = {name: named[f"{policy}.{name}"] for name in DECISION}
    entry["intervals"] = {name: interval(drawn[:, i]) for i, name in enumerate(MEASURES)}
    return entry


def interval(resampled: Floats) -> list[float] | None:
    """Return the bounds of 95% of ``resampled`` (b,), those that are defined; None if more than half are not."""
    defined = resampled[~np.isnan(resampled)]
    if not len(defined) or 2 * len(defined) < len(resampled):
        return None
    low, high = np.percentile(defined, INTERVAL_PERCENT)
    return [float(low), float(high)]


def _count_words(counts: Floats) -> dict[str, int]:
    return {name: int(count) for name, count in zip(COUNTS, counts, strict=True)}


def _known(labels: LabelArray, scores: Floats | Probabilities) -> tuple[LabelArray, Floats]:
    known = labels >= 0
    return labels[known], scores[known].astype(np.float64)


def plain(value: float) -> float | None:
    """Return ``value``, None for NaN."""
    return None if np.isnan(value) else float(value)
