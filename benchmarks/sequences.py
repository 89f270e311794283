"""Does reading the whole scan beat the best reading of single slices, where the neighbours matter?

    python -m benchmarks.sequences [--series 750] [--seeds 3] [--resamples 1000] [--data bench-data]

Trains `pipelines/phantom_slice.toml` and `pipelines/phantom_sequence.toml` on the hard phantom with each of the seeds, and
compares the areas under the ROC curves of the slices of one fold, which neither has seen. The interval of the difference
is that of a paired bootstrap: patients are drawn, each with all slices, and both recipes are measured on the same draw; the
difference is the mean over the seeds. The head of a sequence run reads the features of the slice run with its seed: one
encoder for both. Both recipes are also trained and tested on labels that were shuffled among all slices. About twenty
minutes on two cores.
"""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.files import build_by_recipe, phantom
from benchmarks.measure import ROOT, machine
from ich_prep.dataset.classes import ANY, RSNA_CLASSES
from ich_prep.dataset.dataset import open_dataset
from ich_prep.recipe import load_section
from ich_train.config import EvalConfig, TrainConfig
from ich_train.embed import embed
from ich_train.evaluation.metrics import roc_aucs
from ich_train.train import train

SLICE, SEQUENCE = (ROOT / "pipelines" / f"phantom_{name}.toml" for name in ("slice", "sequence"))
SIZE = 64  # of the files; the recipes say what the dataset has
MEASURES = (ANY, "mean")
BARS = {ANY: 0.03, "mean": 0.02}


@dataclass(frozen=True)
class Tested:
    """The test slices of one run: labels (n, 6), probabilities (n, 6) and the patient of each (n,)."""

    labels: NDArray[np.int8]
    probabilities: NDArray[np.float32]
    patients: NDArray[np.int64]

    def areas(self, rows: NDArray[np.int64] | slice = slice(None)) -> dict[str, float]:
        """Return the area under the ROC curve of ``any``, and the mean of the six."""
        found = roc_aucs(self.labels[rows], self.probabilities[rows], RSNA_CLASSES)
        values = [np.nan if one is None else one for one in found.values()]
        return {ANY: values[RSNA_CLASSES.index(ANY)], "mean": float(np.mean(values))}


def rows_of_draws(patients: NDArray[np.int64], resamples: int, seed: int) -> list[NDArray[np.int64]]:
    """Return the rows of ``resamples`` draws of as many patients as there are, with replacement."""
    order = np.argsort(patients, kind="stable")
    by_patient = np.split(order, np.flatnonzero(np.diff(patients[order])) + 1)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(by_patient), size=(resamples, len(by_patient)))
    return [np.concatenate([by_patient[k] for k in one]) for one in drawn.tolist()]


def mean_areas(runs: Sequence[Tested], rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float64]:
    """Return the areas of MEASURES, means over ``runs``."""
    return np.mean([[run.areas(rows)[name] for name in MEASURES] for run in runs], axis=0)


def interval(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the bounds (2, measures) that hold 95% of ``values``, without resamples that lack a class."""
    found: NDArray[np.float64] = np.nanpercentile(np.array(values), (2.5, 97.5), axis=0)
    return found


def paired(
    first: Sequence[Tested], second: Sequence[Tested], *, resamples: int, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return by how much the areas of the runs ``second`` exceed those of ``first`` (measures,), and its 95% interval."""
    draws = rows_of_draws(first[0].patients, resamples, seed)
    differences = [mean_areas(second, rows) - mean_areas(first, rows) for rows in draws]
    return mean_areas(second) - mean_areas(first), interval(differences)


def main(series: int = 750, seeds: int = 3, resamples: int = 1000, data: Path = Path("bench-data")) -> None:
    data = data.absolute()
    data.mkdir(exist_ok=True)
    print(machine())
    tree = phantom(data, "hard", series=series, size=SIZE, hard=True)
    began = time.monotonic()
    true, shuffled = data / "hard.zarr", data / "hard-shuffled.zarr"
    shuffle_labels(tree / "labels.csv", data / "shuffled.csv")
    build_by_recipe(SLICE, tree, true)
    build_by_recipe(SLICE, tree, shuffled, "--labels", data / "shuffled.csv")
    found: dict[str, list[Tested]] = {SLICE.stem: [], SEQUENCE.stem: []}
    for seed in range(seeds):
        for recipe, tested in zip((SLICE, SEQUENCE), run_both(true, data, seed), strict=True):
            found[recipe.stem].append(tested)
    _, of_chance = run_both(shuffled, data, 0)
    minutes = (time.monotonic() - began) / 60
    report(found, of_chance, resamples)
    print(f"{minutes:.1f} min to build twice and train {2 * seeds + 2} runs.")


def shuffle_labels(labels: Path, out: Path) -> None:
    """Write the lines of ``labels`` to ``out`` with the labels of another slice each."""
    with labels.open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    order = np.random.default_rng(0).permutation(len(lines)).tolist()
    mixed = [[line[0], *lines[k][1:]] for line, k in zip(lines, order, strict=True)]
    with out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *mixed])


def run_both(dataset: Path, data: Path, seed: int) -> tuple[Tested, Tested]:
    """Train the slice recipe, and the sequence recipe on its features; return the test slices of both."""
    of_slices = run(SLICE, dataset, data, seed)
    began, features = time.monotonic(), data / f"features-{dataset.stem}-{seed}.zarr"
    embed(run_folder(SLICE, dataset, data, seed), open_dataset(dataset), features)
    print(f"{dataset.stem} features seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    return of_slices, run(SEQUENCE, dataset, data, seed, features=features)


def run_folder(recipe: Path, dataset: Path, data: Path, seed: int) -> Path:
    return data / f"run-{dataset.stem}-{recipe.stem}-{seed}"


def run(recipe: Path, dataset: Path, data: Path, seed: int, *, features: Path | None = None) -> Tested:
    """Train ``recipe`` with ``seed``, evaluate it, and return its test slices."""
    settings = load_section(recipe, "train", TrainConfig).model_copy(
        update={"data": (dataset,), "seed": seed, "features": features}
    )
    began, out = time.monotonic(), run_folder(recipe, dataset, data, seed)
    shutil.rmtree(out, ignore_errors=True)
    with (data / "sequences.log").open("a") as log:
        train(open_dataset(dataset), out, settings, load_section(recipe, "eval", EvalConfig), console=Console(file=log))
    tested = read(out / "predictions.parquet")
    areas = tested.areas()
    print(
        f"{dataset.stem} {recipe.stem} seed {seed}: AUC any {areas[ANY]:.3f}, mean {areas['mean']:.3f}; "
        f"{time.monotonic() - began:.0f} s",
        flush=True,
    )
    return tested


def read(predictions: Path) -> Tested:
    table = pq.read_table(predictions)
    _, patients = np.unique(table["patient_id"].to_numpy(zero_copy_only=False), return_inverse=True)
    labels, probabilities = (
        np.stack([table[f"{prefix}{name}"].to_numpy() for name in RSNA_CLASSES], axis=1) for prefix in ("", "p_")
    )
    return Tested(labels.astype(np.int8), probabilities, patients.astype(np.int64))


def report(found: Mapping[str, Sequence[Tested]], of_chance: Tested, resamples: int) -> None:
    slices, sequences = found.values()
    print(f"{len(np.unique(slices[0].patients))} test patients, {len(slices[0].labels):,} slices, {len(slices)} seeds.")
    for name, runs in found.items():
        spread = [[one.areas()[measure] for one in runs] for measure in MEASURES]
        words = [
            f"AUC {measure} {np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            for measure, values in zip(MEASURES, spread, strict=True)
        ]
        print(f"{name}: {', '.join(words)}")
    difference, bounds = paired(slices, sequences, resamples=resamples)
    for k, measure in enumerate(MEASURES):
        met = difference[k] >= BARS[measure] and bounds[0, k] > 0
        print(
            f"sequence - slice, AUC {measure}: {difference[k]:+.3f} ({bounds[0, k]:+.3f} to {bounds[1, k]:+.3f}); "
            f"bar {BARS[measure]:.2f}: {'met' if met else 'MISSED'}"
        )
    draws = rows_of_draws(of_chance.patients, resamples, 0)
    low, high = interval([mean_areas([of_chance], rows) for rows in draws])[:, 0]
    print(
        f"shuffled labels: AUC any {of_chance.areas()[ANY]:.3f} ({low:.3f} to {high:.3f}); "
        f"holds 0.5: {'met' if low <= 0.5 <= high else 'MISSED'}"
    )


if __name__ == "__main__":
    typer.run(main)
