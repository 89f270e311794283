"""Is the heat of Grad-CAM where the bleeds are?

    python -m benchmarks.explaining [--series 60] [--size 96] [--epochs 8] [--data bench-data]

Trains the baseline on the ordinary phantom, explains the answer for ``any`` in the test slices with a bleed, and compares
the mean heat inside the painted bleeds, which the phantom draws once with and once without them, with that outside: in the
rest of the head, and in the rest of the image. Slices whose answer is below 0.5 are left out. About two minutes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from torch.nn import functional

from benchmarks.files import phantom
from benchmarks.measure import machine
from ich_prep.build_dataset import build
from ich_prep.dataset.classes import ANY
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.phantom.files import uid
from ich_prep.phantom.series import draw_patient, draw_scan, draw_slices, place
from ich_prep.phantom.trees import SECOND_SERIES
from ich_train.config import TrainConfig
from ich_train.explain import explain_rows
from ich_train.predict import load_predictor
from ich_train.scan_predict import predict_slices
from ich_train.split import split_rows
from ich_train.train import train

BAR = 3.0
HEAD_HU = -200  # above it is the head


@dataclass(frozen=True)
class Painted:
    """Where a slice has a bleed, and where the head is, both bool (size, size)."""

    bleed: NDArray[np.bool_]
    head: NDArray[np.bool_]


def painted_slices(series: int, *, size: int, seed: int = 0) -> dict[str, Painted]:
    """Return for each slice with a bleed, by SOP Instance UID of the layout folder, what the phantom painted."""
    found = {}
    for index in range(series):
        where = place(seed, index, second_series=SECOND_SERIES["folder"])
        scan = draw_scan(seed, where, size=size)
        head, bleeds = draw_patient(seed, where)
        pairs = zip(draw_slices(seed, where, scan, head, bleeds), draw_slices(seed, where, scan, head, ()), strict=True)
        for number, (one, without) in enumerate(pairs):
            if any(one.labels):
                found[uid(seed, "sop", index, number)] = Painted(one.hu != without.hu, without.hu > HEAD_HU)
    return found


def ratios(
    run: Path, dataset: Dataset, painted: dict[str, Painted], *, batch_size: int = 32
) -> tuple[int, float, float]:
    """Return how many slices were explained, and the mean heat inside their bleeds over that in the head and the image."""
    predictor = load_predictor(run, dataset, device="cpu")
    meta, column = predictor.meta, dataset.classes.index(ANY)
    parts_of: dict[str, Any] = {"val_fold": meta.val_fold, "test_fold": meta.test_fold, "allow_series_labels": False}
    test = split_rows(dataset, **parts_of, needed=("test",)).test
    rows = test[dataset.labels[test, column] == 1]
    rows = np.sort(rows[predict_slices(predictor, dataset, rows)[:, column] >= 0.5])
    _, parts = explain_rows(predictor, dataset, rows, batch_size=batch_size, threads=1)
    maps = np.concatenate([*parts])[:, column].astype(np.float32)
    size = dataset.spec.size
    heat = functional.interpolate(torch.from_numpy(maps).unsqueeze(1), (size, size), mode="bilinear").squeeze(1).numpy()
    names = dataset.slices["sop_instance_uid"].take(rows).to_pylist()
    sums = np.zeros((3, 2))  # inside, rest of the head, rest of the image: heat, pixels
    for one, name in zip(heat, names, strict=True):
        bleed, head = painted[name].bleed, painted[name].head
        for k, mask in enumerate((bleed, head & ~bleed, ~bleed)):
            sums[k] += one[mask].sum(), mask.sum()
    inside, in_head, in_image = sums[:, 0] / sums[:, 1]
    return len(rows), float(inside / in_head), float(inside / in_image)


def main(series: int = 60, size: int = 96, epochs: int = 8, data: Path = Path("bench-data")) -> None:
    data = data.absolute()
    data.mkdir(exist_ok=True)
    print(machine())
    tree = phantom(data, f"explained-{size}", series=series, size=size)
    built, run = data / "explained.zarr", data / "run-explained"
    shutil.rmtree(run, ignore_errors=True)
    build(tree, built, Spec(size=size, layout="folder", slices_per_shard=64, folds=3), workers=0, overwrite=True)
    dataset = open_dataset(built)
    settings = TrainConfig(data=built, device="cpu", epochs=epochs, val_fold="none", test_fold=1, threads=1)
    with (data / "explaining.log").open("a") as log:
        train(dataset, run, settings, None, console=Console(file=log))
    count, of_head, of_image = ratios(run, dataset, painted_slices(series, size=size))
    print(
        f"{count} slices with a bleed that was found: mean heat inside is {of_head:.1f} times that in the rest of the head,"
    )
    print(f"{of_image:.1f} times that in the rest of the image; bar {BAR:g}: {'met' if of_image >= BAR else 'MISSED'}")


if __name__ == "__main__":
    typer.run(main)
