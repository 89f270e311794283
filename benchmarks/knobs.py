"""What do the knobs of the sequence recipes cost, and what do they change?

    python -m benchmarks.knobs [--series 120] [--epochs 4] [--steps 30] [--rounds 3] [--data bench-data]

Cost is the CPU time of a training step, per slice, over that of `pipelines/phantom_slice.toml` without the knob: the median
of rounds in which all take turns. Effect is the area under the ROC curve of any in the test fold with the knob minus
that without it, each trained once for a few epochs on a small hard phantom: differences of 0.02 are chance. The effect of
the heads is measured by `benchmarks.sequences`, with intervals. A few minutes on two cores.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.files import build_by_recipe, phantom
from benchmarks.measure import machine
from benchmarks.sequences import SIZE, SLICE
from ich_prep.dataset.classes import ANY
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.recipe import load_section
from ich_train.config import TrainConfig
from ich_train.evaluation.metrics import roc_aucs
from ich_train.predict import Mirrored, load_predictor
from ich_train.ranks import join_ranks
from ich_train.scan_predict import predict_slices
from ich_train.session import Session, prepare
from ich_train.split import split_rows
from ich_train.train import train


@dataclass(frozen=True)
class Knob:
    """Settings with the knob and without it, beside those of the recipe; ``effect``: train both."""

    on: dict[str, Any]
    off: dict[str, Any]
    effect: bool = True


SCANS = {"head": "gru", "head_size": 64}
KNOBS = {
    "context = 1": Knob({"context": 1}, {"context": 0}),
    "context = 2": Knob({"context": 2}, {"context": 0}),
    "ema_decay = 0.99": Knob({"ema_decay": 0.99}, {"ema_decay": 0.0}),
    "rotation_degrees, zoom": Knob({}, {"rotation_degrees": 0.0, "zoom": 0.0}),
    'loss = "rsna"': Knob({"loss": "rsna"}, {"loss": "bce"}),
    "weight_decay = 0.05": Knob({"weight_decay": 0.05}, {"weight_decay": 0.0}),
    'head = "gru"': Knob(SCANS, {}, effect=False),
    'head = "lstm", 2 layers of 256': Knob({"head": "lstm", "head_size": 256, "head_layers": 2}, {}, effect=False),
    'head = "attention"': Knob({**SCANS, "head": "attention"}, {}, effect=False),
    "slab = 12": Knob({**SCANS, "slab": 12, "scans_per_batch": 3}, SCANS, effect=False),
}


def main(series: int = 120, epochs: int = 4, steps: int = 30, rounds: int = 3, data: Path = Path("bench-data")) -> None:
    data = data.absolute()
    data.mkdir(exist_ok=True)
    tree = phantom(data, "hard", series=series, size=SIZE, hard=True)
    build_by_recipe(SLICE, tree, data / "knobs.zarr")
    dataset = open_dataset(data / "knobs.zarr")
    recipe = load_section(SLICE, "train", TrainConfig).model_copy(update={"data": (dataset.path,), "epochs": epochs})
    table = Table("knob", "time of a step", "AUC any without", "with", "effect", title=machine())
    costs = _costs(dataset, recipe, steps, rounds)
    mirrored = None
    for name, knob in KNOBS.items():
        areas = [_area(dataset, recipe, data, changed) for changed in (knob.off, knob.on)] if knob.effect else []
        shown = [f"{areas[0][0]:.3f}", f"{areas[1][0]:.3f}", f"{areas[1][0] - areas[0][0]:+.3f}"] if areas else [""] * 3
        table.add_row(name, f"{costs[name]:.2f} x", *shown)
        if name == "context = 2":
            mirrored = areas[1]
    assert mirrored is not None
    table.add_row(
        "mirror = true",
        "1.00 x; 2 x to predict",
        f"{mirrored[0]:.3f}",
        f"{mirrored[1]:.3f}",
        f"{mirrored[1] - mirrored[0]:+.3f}",
    )
    Console(width=110, highlight=False).print(table)


def _costs(dataset: Dataset, recipe: TrainConfig, steps: int, rounds: int) -> dict[str, float]:
    """Return for each knob the CPU time by slice with it over that without it."""
    ratios: dict[str, list[float]] = {name: [] for name in KNOBS}
    with join_ranks("cpu") as ranks:
        pairs = {
            name: [
                prepare(dataset, recipe.model_copy(update=changed), ranks, weights=None)
                for changed in (knob.on, knob.off)
            ]
            for name, knob in KNOBS.items()
        }
        for _, (name, pair) in itertools.product(range(rounds + 1), pairs.items()):
            with_knob, without = (_seconds_by_slice(one, steps) for one in pair)
            ratios[name].append(with_knob / without)
    return {name: statistics.median(found[1:]) for name, found in ratios.items()}  # the first round warms up


def _seconds_by_slice(session: Session, steps: int) -> float:
    session.model.train()
    session.loader.set_epoch(0)
    began, slices = time.process_time(), 0
    for number, batch in enumerate(itertools.islice(session.batches(session.loader), steps)):
        session.step(*batch.inputs, rate=1e-4, seed=number)
        if session.average is not None:
            session.average.after_step()
        slices += batch.slices
    return (time.process_time() - began) / slices


def _area(dataset: Dataset, recipe: TrainConfig, data: Path, changed: dict[str, Any]) -> tuple[float, float]:
    """Return the area under the ROC curve of any in the test fold, without and with mirror images."""
    run = data / "run-knobs"
    shutil.rmtree(run, ignore_errors=True)
    with (data / "knobs.log").open("a") as log:
        train(dataset, run, recipe.model_copy(update=changed), None, console=Console(file=log))
    predictor = load_predictor(run, dataset, device="cpu")
    rows = split_rows(
        dataset, val_fold=recipe.val_fold, test_fold=recipe.test_fold, allow_series_labels=False, needed=("test",)
    ).test
    found = []
    for network in (predictor.model, Mirrored(predictor.model)):
        scores = predict_slices(replace(predictor, model=network), dataset, rows, threads=1)
        found.append(roc_aucs(dataset.labels[rows], scores, dataset.classes)[ANY] or 0.0)
    return found[0], found[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
