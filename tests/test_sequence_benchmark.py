"""The arithmetic of the benchmark of sequences: paired draws of patients, and labels that are shuffled whole."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sequences
from benchmarks.sequences import paired, rows_of_draws, shuffle_labels


def scored(quality: float, *, seed: int) -> sequences.Tested:
    """Forty patients of ten slices, with scores that are the better the higher the quality."""
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 6)) < 0.4).astype(np.int8)
    noise = np.random.default_rng(seed).normal(size=labels.shape)
    return sequences.Tested(labels, (quality * labels + noise).astype(np.float32), np.repeat(np.arange(40), 10))


def test_a_draw_has_whole_patients() -> None:
    patients = np.array([3, 1, 3, 0, 1, 1])
    for rows in rows_of_draws(patients, 50, seed=0):
        counts = {patient: (patients[rows] == patient).sum() for patient in (0, 1, 3)}
        times = [counts[0] / 1, counts[1] / 3, counts[3] / 2]
        assert sum(times) == 3 and all(time == int(time) for time in times)


def test_a_difference_is_found_where_there_is_one_and_not_where_there_is_none() -> None:
    better, bounds = paired([scored(0.5, seed=1)], [scored(1.5, seed=2)], resamples=100)
    assert (better > 0.1).all() and (bounds[0] > 0).all()
    same, bounds = paired([scored(0.5, seed=1)], [scored(0.5, seed=2)], resamples=100)
    assert (bounds[0] < 0).all() and (bounds[1] > 0).all()
    assert np.abs(same).max() < 0.1
    exactly, bounds = paired([scored(0.5, seed=1)], [scored(0.5, seed=1)], resamples=20)
    assert exactly == pytest.approx(0) and bounds == pytest.approx(0)


def test_shuffled_labels_are_the_same_lines_on_other_slices(tmp_path: Path) -> None:
    lines = [["sop_instance_uid", "any"], *([f"1.{k}", str(k % 2), str(k)] for k in range(100))]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    shuffle_labels(tmp_path / "labels.csv", tmp_path / "shuffled.csv")
    with (tmp_path / "shuffled.csv").open(newline="") as file:
        found = list(csv.reader(file))
    assert found[0] == lines[0]
    assert [line[0] for line in found] == [line[0] for line in lines]
    assert sorted(line[1:] for line in found[1:]) == sorted(line[1:] for line in lines[1:])
    assert sum(a != b for a, b in zip(found, lines, strict=True)) > 90
