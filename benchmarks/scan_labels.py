"""Do labels of whole scans alone teach a network to find bleeds?

    python -m benchmarks.scan_labels [--series 1000] [--data bench-data]

Gives the ordinary phantom a label table by series, of the labels that any slice of it has, trains the recipe
`pipelines/phantom_scan_labels.toml` on it, and prints the areas under the ROC curves of the test scans, and those
of its slices, whose labels only the phantom knows. About ten minutes on two cores.
"""

from __future__ import annotations

import csv
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import typer
from rich.console import Console

from benchmarks.files import build_by_recipe, phantom
from benchmarks.measure import ROOT, machine
from ich_prep.dataset.classes import ANY, RSNA_CLASSES
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.recipe import load_section
from ich_train.config import EvalConfig, TrainConfig
from ich_train.evaluation.metrics import roc_aucs
from ich_train.train import train

RECIPE = ROOT / "pipelines" / "phantom_scan_labels.toml"
SIZE = 64  # of the files
BAR = 0.85


def main(series: int = 1000, data: Path = Path("bench-data")) -> None:
    data = data.absolute()
    data.mkdir(exist_ok=True)
    print(machine())
    tree = phantom(data, "ordinary", series=series, size=SIZE)
    began = time.monotonic()
    by_slice, by_scan = data / "by-slice.zarr", data / "by-scan.zarr"
    build_by_recipe(RECIPE, tree, by_slice)
    truth = open_dataset(by_slice)
    write_scan_labels(truth, data / "scan-labels.csv")
    build_by_recipe(RECIPE, tree, by_scan, "--labels", data / "scan-labels.csv")
    dataset, out = open_dataset(by_scan), data / "run-scan-labels"
    assert set(dataset.slices["label_level"].to_pylist()) == {"series"}
    shutil.rmtree(out, ignore_errors=True)
    settings = load_section(RECIPE, "train", TrainConfig).model_copy(update={"data": (by_scan,)})
    with (data / "scan-labels.log").open("a") as log:
        result = train(dataset, out, settings, load_section(RECIPE, "eval", EvalConfig), console=Console(file=log))
    assert result.metrics is not None
    report(result.metrics, truth, out)
    print(f"{(time.monotonic() - began) / 60:.1f} min to build twice and train.")


def write_scan_labels(dataset: Dataset, out: Path) -> None:
    """Write the labels of each series: 1 if a slice of it has one."""
    rows = dataset.slices["series_row"].to_numpy()
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["series_instance_uid", *RSNA_CLASSES])
        for row, uid in enumerate(dataset.series["series_instance_uid"].to_pylist()):
            writer.writerow([uid, *dataset.labels[rows == row].max(axis=0).tolist()])


def report(metrics: dict[str, Any], truth: Dataset, out: Path) -> None:
    scans = metrics["by_scan"]
    table = pq.read_table(out / "predictions.parquet")
    probabilities = np.stack([table[f"p_{name}"].to_numpy() for name in RSNA_CLASSES], axis=1)
    of_slices = roc_aucs(truth.labels[table["row"].to_numpy()], probabilities, RSNA_CLASSES)
    for name in RSNA_CLASSES:
        area, (low, high) = scans["labels"][name]["roc_auc"], scans["labels"][name]["intervals"]["roc_auc"]
        print(f"{name}: AUC by scan {area:.3f} ({low:.3f} to {high:.3f}), by slice {of_slices[name]:.3f}")
    found = scans["labels"][ANY]["roc_auc"]
    print(f"{scans['cases']} test scans; bar {BAR} by scan: {'met' if found >= BAR else 'MISSED'}")


if __name__ == "__main__":
    typer.run(main)
