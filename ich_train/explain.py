"""Grad-CAM (Selvaraju et al., arXiv:1610.02391): where in a slice the answer of a network for each class comes from.

A class activation map is the sum of the feature maps of one layer, each weighted by the mean gradient of the class's logit
with respect to it, with negative values set to zero. The layer is the last one whose output is still an image. The map
shows what raised the logit, not whether the answer is right.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ich_prep.dataset.explanations import ABOUT, FOLDER, MAPS, ROWS
from ich_prep.dataset.predictions import read_predictions
from ich_prep.dataset.storage import naming, renamed_when_whole, write_whole
from ich_prep.errors import UsageError
from ich_train.loader import SliceLoader
from ich_train.predict import Predictor, load_predictor
from ich_train.ranks import own_stream
from ich_train.rows import draw_rows
from ich_train.runs import require_writable
from ich_train.to_device import to_device

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset

VERSION = 1  # of explanations.json
LARGEST_MAP = 32  # rows and columns; larger maps are averaged down
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)  # what enters them is finer


@dataclass(frozen=True)
class Written:
    """What was written: the folder, the number of slices, and the name of the layer in the network."""

    folder: Path
    slices: int
    layer: str


def explain_run(
    run: Path,
    dataset: Dataset,
    *,
    where: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "cpu",
    threads: int = 2,
) -> Written:
    """Write the maps of a run's best network for slices of ``dataset`` to ``explanations`` in the folder ``run``.

    The slices are those of the run's ``predictions.parquet``, or those with pixels that the filter ``where`` selects; of
    them, ``limit`` drawn by ``seed``. Raises ``UsageError`` if none is left, the dataset does not fit the network or its
    predictions, a filter is invalid, the network reads whole scans, or it has no layer whose output is an image.
    """
    require_writable(run, hint="Copy the run to a folder that can be written to.")
    if len(dataset.parts) > 1:
        raise UsageError(
            f"Maps are for the viewer, which shows one dataset; {dataset.path} is several: name one with --data."
        )
    predictor = load_predictor(run, dataset, device=device)
    if predictor.meta.head is not None:
        raise UsageError(
            f"{run} reads whole scans (head {predictor.meta.head.kind}); the maps are those of networks of single slices. "
            'Name a run with head = "none".'
        )
    rows = draw_rows(_rows(run, dataset, where), limit=limit, seed=seed)
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)  # it is written last: without it, there are no maps
    layer, parts = explain_rows(predictor, dataset, rows, batch_size=batch_size, threads=threads)
    _write_maps(folder / MAPS, len(rows), parts)
    saved = io.BytesIO()
    np.save(saved, rows)
    write_whole(folder / ROWS, saved.getvalue())
    about = {
        "version": VERSION,
        "method": "Grad-CAM",
        "layer": layer,
        "dataset_digest": dataset.digest,
        "classes": list(dataset.classes),
    }
    write_whole(folder / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
    return Written(folder, len(rows), layer)


def _rows(run: Path, dataset: Dataset, where: str | None) -> NDArray[np.int64]:
    if where is None:
        predicted = np.isfinite(read_predictions(run, dataset)).any(axis=1)
        rows = np.flatnonzero(np.logical_and(predicted, dataset.is_ok))
    else:
        rows = dataset.where(where)
        rows = rows[dataset.is_ok[rows]]
    if not len(rows):
        raise UsageError("There is no slice to explain. Choose others with --where.")
    return rows.astype(np.int64)


def explain_rows(
    predictor: Predictor, dataset: Dataset, rows: NDArray[np.int64], *, batch_size: int, threads: int
) -> tuple[str, Iterator[NDArray[np.uint8]]]:
    """Return the name of the layer, and an iterator over the maps of ``rows`` (n,), ascending, batch by batch.

    The maps of a batch are uint8 (b, classes, y, x), each scaled to 0..255 by its own maximum. Raises ``UsageError`` if
    the network has no layer whose output is an image.
    """
    loader = SliceLoader(
        dataset,
        rows,
        batch_size=batch_size,
        order="sequential",
        threads=threads,
        context=predictor.meta.context,
        pin=predictor.device.type == "cuda",
    )
    name, layer = find_layer(predictor.model, predictor.meta.channels, predictor.meta.images.size)
    return name, _maps_of(predictor, layer, loader)


def _maps_of(predictor: Predictor, layer: nn.Module, loader: SliceLoader) -> Iterator[NDArray[np.uint8]]:
    with own_stream(predictor.device):
        for batch in to_device(loader, predictor.device):
            maps = class_activation_maps(predictor.model, layer, predictor.preprocess(batch.images))
            yield maps.cpu().numpy()


def find_layer(model: nn.Module, channels: int, size: int) -> tuple[str, nn.Module]:
    """Return the last layer of ``model``, as it is computed, whose output is still an image, and its name.

    ``model`` takes (b, ``channels``, ``size``, ``size``). Raises ``UsageError`` if there is none.
    """
    found: list[tuple[str, nn.Module]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1:
                found.append((name, module))

        return hook

    layers = [(name, m) for name, m in model.named_modules() if not any(m.children()) and not isinstance(m, _POOLS)]
    handles = [module.register_forward_hook(note(name)) for name, module in layers]
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            model(torch.zeros(1, channels, size, size, device=device))
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise UsageError("Grad-CAM needs a layer whose output is an image (b, k, y, x); this network has none.")
    return found[-1]


def class_activation_maps(model: nn.Module, layer: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the Grad-CAM of ``layer`` for preprocessed ``images`` (b, c, h, w): uint8 (b, classes, y, x).

    ``model`` must be in evaluation mode. A map without a positive value is zero everywhere.
    """
    with torch.enable_grad(), _output_of(layer) as outputs:
        logits = model(images)
        features = outputs[-1]
        maps = []
        for k in range(logits.shape[1]):
            (gradient,) = torch.autograd.grad(logits[:, k].sum(), features, retain_graph=k < logits.shape[1] - 1)
            weights = gradient.mean(dim=(2, 3), keepdim=True)
            maps.append(torch.relu((weights * features).sum(dim=1)).detach())
    stacked = torch.stack(maps, dim=1).float()
    height, width = (min(side, LARGEST_MAP) for side in stacked.shape[2:])
    stacked = functional.adaptive_avg_pool2d(stacked, (height, width))
    highest = stacked.amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (stacked / highest * 255).round().to(torch.uint8)


@contextmanager
def _output_of(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of ``layer``: one that is used several times, such as a ReLU, has several."""
    outputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _write_maps(path: Path, slices: int, parts: Iterator[NDArray[np.uint8]]) -> None:
    """Write maps (b, classes, y, x) as one array of ``slices``, without holding it in memory.

    By ordinary writes: on a full disk, storing to a mapped file ends the process by SIGBUS.
    """
    with renamed_when_whole(path) as partial, naming(path), partial.open("xb") as file:
        for number, part in enumerate(parts):
            if not number:
                header = {"descr": "|u1", "fortran_order": False, "shape": (slices, *part.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(part).tobytes())
        file.flush()
        os.fsync(file.fileno())
