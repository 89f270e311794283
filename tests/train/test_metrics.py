from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_train.evaluation.metrics import (
    DECISION,
    MEASURES,
    best_f1_thresholds,
    by_series,
    log_loss,
    measure,
    precision_recall_curves,
    roc_aucs,
    roc_curves,
)
from ich_train.evaluation.position import position_scores
from ich_train.rsna import class_weights

NO_THRESHOLDS = (None,) * len(RSNA_CLASSES)


@st.composite
def cases(draw, unknown=True):
    """Labels (n, 6), probabilities (n, 6) with many or no ties, patients (n,)."""
    n = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = (rng.random((n, 6)) < rng.choice([0.0, 0.1, 0.5, 1.0], size=6)).astype(np.int8)
    if unknown:
        labels[rng.random((n, 6)) < draw(st.sampled_from([0.0, 0.2, 1.0]))] = -1
    probabilities = rng.random((n, 6)).astype(np.float32)
    steps = draw(st.sampled_from([0, 1, 4]))
    if steps:
        probabilities = np.round(probabilities * steps) / np.float32(steps)
    return labels, probabilities, rng.integers(0, draw(st.integers(1, 8)), size=n)


def close(found, expected):
    return found is None if math.isnan(expected) else found == pytest.approx(expected, abs=1e-12)


def two_classes(truth):
    return len(np.unique(truth)) == 2


def expected_decisions(truth, called):
    """Return scikit-learn's accuracy, precision, recall and F1; NaN without cases, and but for accuracy of one class."""
    if not two_classes(truth):
        accuracy = accuracy_score(truth, called) if len(truth) else math.nan
        return dict.fromkeys(DECISION, math.nan) | {"accuracy": accuracy}
    return {
        "accuracy": accuracy_score(truth, called),
        "precision": precision_score(truth, called, zero_division=np.nan),
        "recall": recall_score(truth, called, zero_division=np.nan),
        "f1": f1_score(truth, called, zero_division=np.nan),
    }


def expected_ranking(truth, score):
    if not two_classes(truth):
        return {"roc_auc": math.nan, "average_precision": math.nan}
    return {"roc_auc": roc_auc_score(truth, score), "average_precision": average_precision_score(truth, score)}


@given(cases(), st.tuples(*[st.sampled_from([None, 0.0, 0.25, 0.3, 1.0])] * 6))
@settings(deadline=None, max_examples=40)
def test_every_measure_is_that_of_scikit_learn(given_cases, thresholds):
    labels, probabilities, patients = given_cases
    found = measure(labels, probabilities, patients, thresholds, classes=RSNA_CLASSES, resamples=0, seed=0)
    assert found["cases"] == len(labels)
    assert found["patients"] == len(np.unique(patients))
    flat = {name: [] for name in MEASURES}
    pooled = {"at_half": ([], []), "at_best_f1": ([], [])}
    for j, name in enumerate(RSNA_CLASSES):
        known = labels[:, j] >= 0
        truth, score = labels[known, j], probabilities[known, j]
        entry = found["labels"][name]
        assert (entry["positives"], entry["negatives"]) == ((truth == 1).sum(), (truth == 0).sum())
        for measure_name, value in expected_ranking(truth, score).items():
            assert close(entry[measure_name], value)
            flat[measure_name].append(value)
        for policy, threshold in (("at_half", 0.5), ("at_best_f1", thresholds[j])):
            assert entry[policy]["threshold"] == threshold
            if threshold is None:
                assert all(value is None for value in entry[policy].values())
                continue
            called = (score >= threshold).astype(np.int8)
            counts = [entry[policy][word] for word in ("tn", "fp", "fn", "tp")]
            assert counts == confusion_matrix(truth, called, labels=[0, 1]).ravel().tolist() if len(truth) else [0] * 4
            for measure_name, value in expected_decisions(truth, called).items():
                assert close(entry[policy][measure_name], value)
                flat[f"{policy}.{measure_name}"].append(value)
            pooled[policy][0].extend(truth)
            pooled[policy][1].extend(called)
    for measure_name, values in flat.items():
        kept = [value for value in values if not math.isnan(value)]
        assert found["macro"]["labels"][measure_name] == len(kept)
        assert close(look_up(found["macro"], measure_name), np.mean(kept) if kept else math.nan)
    micro = found["micro"]
    for policy, (truth, called) in pooled.items():
        for measure_name, value in expected_decisions(truth, called).items():
            assert close(micro[policy][measure_name], value)
    known = labels >= 0
    for measure_name, value in expected_ranking(labels[known], probabilities[known]).items():
        assert close(micro[measure_name], value)
    assert micro["labels"]["roc_auc"] == known.any(axis=0).sum()
    assert micro["labels"]["at_best_f1.f1"] == sum(threshold is not None for threshold in thresholds)


def look_up(entry, name):
    for part in name.split("."):
        entry = entry[part]
    return entry


@given(cases())
@settings(deadline=None, max_examples=40)
def test_intervals_are_those_of_explicitly_resampled_cases(given_cases):
    labels, probabilities, patients = given_cases
    names = np.unique(patients)
    thresholds = (0.25, 0.5, 0.75, 0.3, None, 0.5)
    resamples, seed = 7, 11
    found = measure(labels, probabilities, patients, thresholds, classes=RSNA_CLASSES, resamples=resamples, seed=seed)
    if len(names) < 2:
        assert found["log_loss_interval"] is None
        assert not any(found["labels"]["any"]["intervals"].values())
        return
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        chosen = names[rng.integers(len(names), size=len(names))]
        lines = np.concatenate([np.flatnonzero(patients == name) for name in chosen])
        drawn.append(
            measure(
                labels[lines],
                probabilities[lines],
                patients[lines],
                thresholds,
                classes=RSNA_CLASSES,
                resamples=0,
                seed=0,
            )
        )
    for entry in (*(("labels", name) for name in RSNA_CLASSES), ("micro",)):
        for name in MEASURES:
            values = [look_up(one, ".".join((*entry, name))) for one in drawn]
            defined = [value for value in values if value is not None]
            interval = look_up(found, ".".join(entry))["intervals"][name]
            if 2 * len(defined) < resamples:
                assert interval is None
            else:
                assert interval == pytest.approx(np.percentile(defined, [2.5, 97.5]), abs=1e-12)
    losses = [one["log_loss"] for one in drawn if one["log_loss"] is not None]
    if 2 * len(losses) >= resamples:
        assert found["log_loss_interval"] == pytest.approx(np.percentile(losses, [2.5, 97.5]))


def test_weighted_ranking_is_that_of_scikit_learn_with_sample_weights():
    from ich_train.evaluation.metrics import _Ranked

    rng = np.random.default_rng(0)
    truth = (rng.random(2000) < 0.1).astype(np.int8)
    score = np.round(rng.random(2000), 2)
    owner = rng.integers(0, 50, size=2000)
    weights = rng.integers(0, 4, size=50).astype(float)
    roc_auc, average_precision = _Ranked.of(truth, score, owner).ranking(weights)
    assert roc_auc == pytest.approx(roc_auc_score(truth, score, sample_weight=weights[owner]))
    assert average_precision == pytest.approx(average_precision_score(truth, score, sample_weight=weights[owner]))


def test_macro_interval_averages_the_same_labels_in_every_resample():
    # Epidural is positive in one patient of three: resamples without that patient have no macro value.
    labels = np.zeros((6, 6), np.int8)
    labels[::2, 5] = 1
    labels[0, 0] = 1
    rng = np.random.default_rng(3)
    probabilities = rng.random((6, 6))
    patients = np.array([0, 0, 1, 1, 2, 2])
    resamples = 40
    found = measure(labels, probabilities, patients, NO_THRESHOLDS, classes=RSNA_CLASSES, resamples=resamples, seed=5)
    assert found["macro"]["labels"]["roc_auc"] == 2
    rng = np.random.default_rng(5)
    means = []
    for _ in range(resamples):
        chosen = rng.integers(3, size=3)
        lines = np.concatenate([np.flatnonzero(patients == patient) for patient in chosen])
        if 0 in chosen:
            means.append(np.mean([roc_auc_score(labels[lines, j], probabilities[lines, j]) for j in (0, 5)]))
    assert len(means) < resamples
    assert found["macro"]["intervals"]["roc_auc"] == pytest.approx(np.percentile(means, [2.5, 97.5]))


@given(cases())
def test_log_loss_is_the_direct_formula(given_cases):
    labels, probabilities, _ = given_cases
    total = weight = 0.0
    for line, chances in zip(labels, probabilities, strict=True):
        for name, label, chance in zip(RSNA_CLASSES, line, chances, strict=True):
            if label >= 0:
                clipped = min(max(float(chance), 1e-15), 1 - 1e-15)
                total -= (2 if name == "any" else 1) * math.log(clipped if label else 1 - clipped)
                weight += 2 if name == "any" else 1
    assert close(log_loss(labels, probabilities, RSNA_CLASSES), total / weight if weight else math.nan)


def test_log_loss_weighs_any_twice_and_clips():
    labels = np.zeros((1, 6), np.int8)
    labels[0, 5] = 1
    assert class_weights(RSNA_CLASSES) == (1, 1, 1, 1, 1, 2)
    assert log_loss(labels, np.full((1, 6), 0.5), RSNA_CLASSES) == pytest.approx(math.log(2))
    certain_and_wrong = np.array([[0, 0, 0, 0, 0, 0]], np.float32)
    assert log_loss(labels, certain_and_wrong, RSNA_CLASSES) == pytest.approx(-2 / 7 * math.log(1e-15))


@given(cases())
@settings(deadline=None, max_examples=40)
def test_best_f1_threshold_beats_every_other(given_cases):
    labels, probabilities, _ = given_cases
    for j, threshold in enumerate(best_f1_thresholds(labels, probabilities)):
        known = labels[:, j] >= 0
        truth, score = labels[known, j], probabilities[known, j]
        if not two_classes(truth):
            assert threshold is None
            continue
        assert threshold in score
        best = max(f1_score(truth, score >= other) for other in np.unique(score))
        assert f1_score(truth, score >= threshold) == pytest.approx(best)


def test_one_class_has_an_accuracy_and_no_other_measure():
    labels = np.zeros((10, 6), np.int8)
    labels[:, 1] = 1
    labels[:, 2] = -1
    found = measure(
        labels, np.full((10, 6), 0.7), np.arange(10), (0.5,) * 6, classes=RSNA_CLASSES, resamples=20, seed=0
    )
    accuracies = dict(zip(RSNA_CLASSES, (0.0, 1.0, None, 0.0, 0.0, 0.0), strict=True))
    for label, entry in found["labels"].items():
        for name in MEASURES:
            expected = accuracies[label] if name.endswith(".accuracy") else None
            assert look_up(entry, name) == expected
            assert entry["intervals"][name] == (None if expected is None else [expected, expected])
    assert found["macro"]["at_half"]["accuracy"] == pytest.approx(1 / 5)
    assert found["macro"]["labels"]["at_half.accuracy"] == 5
    assert found["labels"]["epidural"]["at_half"] == {
        **dict.fromkeys(DECISION),
        "accuracy": 0.0,
        "threshold": 0.5,
        "tn": 0,
        "fp": 10,
        "fn": 0,
        "tp": 0,
    }
    assert found["macro"]["roc_auc"] is None
    assert found["macro"]["labels"]["roc_auc"] == 0
    assert found["micro"]["labels"]["roc_auc"] == 5
    assert found["log_loss"] > 0
    assert roc_aucs(labels, np.full((10, 6), 0.7), RSNA_CLASSES) == dict.fromkeys(RSNA_CLASSES)
    assert best_f1_thresholds(labels, np.full((10, 6), 0.7)) == NO_THRESHOLDS


@given(cases())
@settings(deadline=None, max_examples=15)
def test_curves_pass_through_what_their_thresholds_call(given_cases):
    labels, probabilities, _ = given_cases
    roc, precision_recall = (
        roc_curves(labels, probabilities, RSNA_CLASSES),
        precision_recall_curves(labels, probabilities, RSNA_CLASSES),
    )
    for j, name in enumerate(RSNA_CLASSES):
        known = labels[:, j] >= 0
        truth, score = labels[known, j], probabilities[known, j]
        assert (name in roc) == (name in precision_recall) == two_classes(truth)
        if name not in roc:
            continue
        curve = roc[name]
        assert np.trapezoid(curve.y, curve.x) == pytest.approx(roc_auc_score(truth, score))
        for x, y, threshold in zip(curve.x, curve.y, curve.threshold, strict=True):
            called = score >= threshold
            assert (x, y) == pytest.approx((called[truth == 0].mean(), called[truth == 1].mean()))
        curve = precision_recall[name]
        for x, y, threshold in zip(curve.x, curve.y, curve.threshold, strict=True):
            called = score >= threshold
            assert x == pytest.approx(recall_score(truth, called))
            assert y == pytest.approx(precision_score(truth, called, zero_division=1))


@given(cases(), st.sampled_from(["max", "mean"]))
def test_series_take_the_or_of_labels_and_the_maximum_or_mean_of_probabilities(given_cases, how):
    labels, probabilities, series = given_cases
    not_given = series % 2  # of every second series a slice more, which has no label
    sizes = np.bincount(series)[series] + not_given
    truth, values, first = by_series(series, sizes, labels, probabilities, how=how)
    names = np.unique(series)
    assert truth.shape == values.shape == (len(names), 6)
    assert truth.dtype == np.int8
    assert series[first].tolist() == names.tolist()
    for i, name in enumerate(names):
        inside = series == name
        reduce = np.max if how == "max" else np.mean
        assert values[i] == pytest.approx(reduce(probabilities[inside].astype(float), axis=0))
        for j in range(6):
            found = set(labels[inside, j].tolist())
            assert truth[i, j] == (1 if 1 in found else -1 if -1 in found or name % 2 else 0)


def test_position_scores_are_shares_in_the_same_twentieth():
    known = np.array([0.0, 0.04, 0.5, 0.51, 1.0])
    labels = np.zeros((5, 6), np.int8)
    labels[[1, 2, 3], 5] = 1
    labels[:, 0] = -1
    scores = position_scores(known, labels, np.array([0.01, 0.52, 0.99, 0.3]))
    assert scores[:, 5] == pytest.approx([0.5, 1.0, 0.0, 3 / 5])
    assert np.isnan(scores[:, 0]).all()
    assert roc_aucs(np.array([[0] * 6, [1] * 6, [0] * 6, [0] * 6], np.int8), scores, RSNA_CLASSES)["epidural"] is None


def test_the_same_seed_gives_the_same_intervals():
    rng = np.random.default_rng(0)
    labels = (rng.random((200, 6)) < 0.3).astype(np.int8)
    probabilities, patients = rng.random((200, 6)), rng.integers(0, 30, 200)
    one, two, other = (
        measure(labels, probabilities, patients, (0.5,) * 6, classes=RSNA_CLASSES, resamples=50, seed=seed)
        for seed in (1, 1, 2)
    )
    assert one == two
    assert one["macro"]["intervals"] != other["macro"]["intervals"]
    low, high = one["macro"]["intervals"]["roc_auc"]
    assert low < one["macro"]["roc_auc"] < high


@given(cases())
@settings(deadline=None, max_examples=10)
def test_measures_of_other_classes_are_those_of_each_label_alone(given_cases):
    labels, probabilities, patients = given_cases
    chosen, classes = [4, 5, 1], ("fracture", "any", "mass")
    found = measure(
        labels[:, chosen], probabilities[:, chosen], patients, (0.5,) * 3, classes=classes, resamples=3, seed=0
    )
    everything = measure(labels, probabilities, patients, (0.5,) * 6, classes=RSNA_CLASSES, resamples=3, seed=0)
    assert list(found["labels"]) == list(classes)
    for name, j in zip(classes, chosen, strict=True):
        assert found["labels"][name] == everything["labels"][RSNA_CLASSES[j]]
    # Only among RSNA's six classes does any count twice.
    known = labels[:, chosen] >= 0
    chances = np.clip(probabilities[:, chosen].astype(float), 1e-15, 1 - 1e-15)
    losses = -np.log(np.where(labels[:, chosen] > 0, chances, 1 - chances)[known])
    expected = losses.mean() if len(losses) else math.nan
    assert found["log_loss"] is None if math.isnan(expected) else found["log_loss"] == pytest.approx(expected, rel=1e-5)
