"""A trained network's probabilities for rows of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ich_prep.dataset.volumes import volumes_not_upright
from ich_prep.errors import UsageError, count
from ich_train.checkpoint import Images, Meta, load_model
from ich_train.loader import SliceLoader
from ich_train.preprocess import Preprocess
from ich_train.ranks import own_stream
from ich_train.runs import BEST
from ich_train.scan_network import SequenceNetwork
from ich_train.to_device import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset


@dataclass(frozen=True)
class Predictor:
    """A trained network, the preprocessing that it was trained with, and its ``meta.json``."""

    model: nn.Module
    preprocess: Preprocess
    meta: Meta
    device: torch.device

    @property
    def slice_network(self) -> nn.Module | None:
        """The part of the network that sees single slices: all of it without a head, none of a network of volumes."""
        if isinstance(self.model, SequenceNetwork):
            return self.model.encoder
        return self.model if self.meta.head is None else None


def load_predictor(run: Path, dataset: Dataset, *, device: torch.device | str) -> Predictor:
    """Return the best network of the folder ``run``, ready for the slices of ``dataset``.

    Raises `TrainError` if the run has none, and `UsageError` if the dataset's images or classes are not those that the
    network was trained on, or if volumes of the dataset lie otherwise than they would have for the network.
    """
    loaded = load_model(run / BEST, device)
    meta, stored = loaded.meta, Images.of(dataset)
    for what, trained_on, present in (
        ("classes", ", ".join(meta.classes), ", ".join(dataset.classes)),
        ("images", meta.images.describe(), stored.describe()),
    ):
        if trained_on != present:
            raise UsageError(
                f"{run} was trained on other {what} than those of {dataset.path}: {trained_on}, not {present}. Name "
                "another dataset with --data, or build one with the recipe of the run's dataset."
            )
    _check_orientation(run, meta.images, dataset)
    preprocess = Preprocess(pixels=stored.pixels, windows=meta.windows, scaling=meta.scaling).to(device)
    return Predictor(loaded.model, preprocess, meta, torch.device(device))


class Mirrored(nn.Module):
    """Averages the logits of ``network`` over images and their mirror images, left to right: test-time augmentation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor, *lengths: Sequence[int]) -> Any:
        """Return what ``network`` returns: logits, or a tuple of them."""
        one, other = self.network(images, *lengths), self.network(images.flip(-1), *lengths)
        if isinstance(one, torch.Tensor):
            return (one + other) / 2
        return type(one)(*((a + b) / 2 for a, b in zip(one, other, strict=True)))


def _check_orientation(run: Path, trained_on: Images, dataset: Dataset) -> None:
    """Raise `UsageError` if the other orientation of the dataset makes a difference: most files lie upright anyway."""
    if trained_on.orientation == dataset.spec.orientation:
        return
    differing = volumes_not_upright(dataset.slices, dataset.series)
    if len(differing):
        raise UsageError(
            f'{run} was trained on images with the orientation "{trained_on.orientation}"; {dataset.path} has '
            f'"{dataset.spec.orientation}", and {count(len(differing), "volume")} of {len(dataset.series):,} '
            f"{'lies' if len(differing) == 1 else 'lie'} otherwise than the network expects (the first is series_row "
            f"{differing[0]}). Build the dataset with `ich-prep build --orientation {trained_on.orientation}`, or train "
            "a network on images of its orientation."
        )


def predict_rows(
    model: nn.Module,
    preprocess: nn.Module,
    dataset: Dataset,
    rows: NDArray[np.int64],
    *,
    context: int,
    batch_size: int = 64,
    threads: int = 2,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Return the probabilities of the dataset's classes, (n, classes) float32, for ``rows`` (n,), in their order.

    Computed in float32; ``rows`` may be empty. ``model`` must be in evaluation mode, and on ``device`` as must be
    ``preprocess``.
    """
    if not len(rows):
        return np.empty((0, len(dataset.classes)), np.float32)
    # Neighbours in the dataset are neighbours on disk: they are read in that order, whatever the order of ``rows``.
    order = np.argsort(rows, kind="stable")
    device = torch.device(device)
    loader = SliceLoader(
        dataset,
        rows[order],
        batch_size=batch_size,
        order="sequential",
        threads=threads,
        context=context,
        pin=device.type == "cuda",
    )
    probabilities = np.empty((len(rows), len(dataset.classes)), np.float32)
    with torch.inference_mode(), own_stream(device):
        parts = [torch.sigmoid(model(preprocess(batch.images)).float()) for batch in to_device(loader, device)]
        probabilities[order] = torch.cat(parts).cpu().numpy()
    return probabilities
