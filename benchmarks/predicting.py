"""How long do 40 slices of DICOM take to be answered, apart from the network?

    python -m benchmarks.predicting [--repeats 7] [--data bench-data]

Predicts 40 files of 512 x 512 from a folder and from a zip archive, in this process, with a network that does nothing but
average: listing, reading headers, ordering, decoding, rendering, batches and tables are what remains. The first round,
which loads libraries, is printed by itself; the files are warm.
"""

from __future__ import annotations

import shutil
import statistics
import time
import zipfile
from pathlib import Path

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks.files import cohort, once, warm
from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_train.config import PredictConfig, TrainConfig
from ich_train.infer import predict
from ich_train.infer_source import metas_of, open_source
from ich_train.train import train

SLICES = 40


class Average(nn.Module):
    """The logit of each class is a multiple of the image's mean."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.last = nn.Linear(channels, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(images.mean(dim=(2, 3)))
        return found


def main(repeats: int = 7, data: Path = Path("bench-data")) -> None:
    data = data.absolute()
    tree = cohort(data, slices=4 * SLICES)
    files = once(data, f"files-{SLICES}", lambda folder: _copy(tree, folder))
    archive = data / f"files-{SLICES}.zip"
    with zipfile.ZipFile(archive, "w") as written:
        for file in sorted(files.iterdir()):
            written.write(file, file.name)
    run = once(data, "run-average", lambda folder: _train(tree, data, folder))
    for source in (files, archive):
        warm([*files.iterdir(), archive])
        first, *seconds = (_seconds(run, source) for _ in range(1 + repeats))
        print(
            f"{source.name}: {SLICES} slices in {statistics.median(seconds):.3f} s, {min(seconds):.3f} to "
            f"{max(seconds):.3f}; the first time {first:.3f} s"
        )


def _copy(tree: Path, folder: Path) -> None:
    folder.mkdir()
    for file in sorted(path for path in tree.rglob("*.dcm"))[:SLICES]:
        shutil.copy(file, folder)


def _train(tree: Path, data: Path, folder: Path) -> None:
    built = data / "average.zarr"
    shutil.rmtree(built, ignore_errors=True)
    build(tree, built, Spec(folds=2), workers=0, allow=Allowances(unlabelled=True), overwrite=True)
    settings = TrainConfig(
        data=built, model=f"{__spec__.name}:Average", device="cpu", epochs=1, val_fold="none", test_fold="none"
    )
    train(open_dataset(built), folder, settings, None, console=Console(stderr=True))


def _seconds(run: Path, source: Path) -> float:
    begun = time.perf_counter()
    settings = PredictConfig(src=(source,))
    found = predict([run], open_source(metas_of([run])[0], settings), settings, threads=2)
    assert len(found.slices) == SLICES
    return time.perf_counter() - begun


if __name__ == "__main__":
    typer.run(main)
