"""A training run in memory: its parts, made from its settings, and its position."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ich_prep.dataset.windows import Window, parse_windows
from ich_prep.errors import UsageError, count
from ich_train.averaging import Average, averaged
from ich_train.features import open_features
from ich_train.loader import Batch, SliceLoader
from ich_train.loss import elementwise_loss, label_weights
from ich_train.meters import Meter
from ich_train.model import build_model
from ich_train.preprocess import Augment, Preprocess
from ich_train.runs import Epoch, best_of, chosen_by
from ich_train.scan_network import SequenceNetwork, build_scan_network
from ich_train.scan_session import head_shape, scan_loaders, scan_step
from ich_train.scans import without_position
from ich_train.split import Split, balanced_weights, split_rows
from ich_train.step import Step
from ich_train.volume_loader import VolumeBatch, VolumeLoader
from ich_train.weights import has_head

if TYPE_CHECKING:
    from pathlib import Path

    from ich_prep.dataset.dataset import Dataset
    from ich_train.config import TrainConfig
    from ich_train.ranks import Ranks

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Session:
    """The parts of a run, and its position: after ``len(history)`` epochs and ``steps_done`` steps of the next one."""

    dataset: Dataset
    settings: TrainConfig
    ranks: Ranks
    loader: SliceLoader | VolumeLoader
    val_loader: SliceLoader | VolumeLoader | None  # None: nothing is validated
    windows: tuple[Window, ...]  # that the network sees
    preprocess: Preprocess
    model: nn.Module  # the bare network, which is saved
    step: Step
    meter: Meter
    average: Average | None  # of the weights
    unread: int = 0  # labelled slices to train on or to validate that have no position, and so no place in a scan
    history: list[Epoch] = field(default_factory=list)
    steps_done: int = 0

    @staticmethod
    def batches(loader: SliceLoader | VolumeLoader) -> Iterable[Batch | VolumeBatch]:
        """Return ``loader`` as what it is to a training loop: batches of slices or of scans."""
        return loader

    @property
    def channels(self) -> int:
        """The number of channels of the network's input."""
        return input_channels(self.windows, self.settings)

    @property
    def best(self) -> Epoch:
        """The best epoch in validation so far; the last one if there is no validation."""
        return best_of(self.history, chosen_by(self.settings))

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and kept: the average of the weights, once there is one."""
        return self.average.network if self.average is not None and self.average.begun else self.model


def _needed_parts(settings: TrainConfig) -> tuple[str, ...]:
    """Return the parts that must have slices: a run that holds nothing out, or learns from a selection, lacks some."""
    if settings.val_fold == "none" or settings.test_fold == "none":
        return ("train",)
    return ("train", "val") if settings.where is not None else ("train", "val", "test")


def prepare(dataset: Dataset, settings: TrainConfig, ranks: Ranks, *, weights: Path | None) -> Session:
    """Return a run at its start, on this rank's device, its network initialized from the file ``weights`` if given.

    The weights file of the settings is for a new run only; a resumed run loads its checkpoint.
    Raises `UsageError` for settings that do not fit the dataset: folds without slices, windows for a dataset that
    already stores windows, a loss for other classes, too few slices for one batch, a model or weights that
    `build_model` refuses.
    """
    windows = windows_of(dataset, settings)
    loss_weights = label_weights(settings.loss, dataset.classes).to(ranks.device)
    shape = head_shape(settings)
    split = split_rows(
        dataset,
        val_fold=settings.val_fold,
        test_fold=settings.test_fold,
        # With a head the labels of a series are those of the scan, and no slice's.
        allow_series_labels=settings.allow_series_labels or shape is not None,
        where=settings.where,
        needed=_needed_parts(settings),
    )
    features = None if settings.features is None else open_features(settings.features, dataset, settings, windows)
    if features is not None and weights is not None and not has_head(weights):
        raise UsageError(
            f"{weights} has weights of an encoder only, and features bring an encoder that is trained. Leave one of the two "
            "out, or name the weights of a run with a head."
        )
    loader, val_loader = (
        _loaders(dataset, split, settings, ranks)
        if shape is None
        else scan_loaders(dataset, split, settings, ranks, source=features)
    )
    unread = 0 if shape is None else len(without_position(dataset, np.concatenate([split.train, split.val])))
    preprocess = Preprocess(pixels=dataset.spec.store, windows=windows, channels_last=True).to(ranks.device)
    torch.manual_seed(settings.seed)
    given: dict[str, Any] = {
        "channels": input_channels(windows, settings),
        "size": dataset.spec.size,
        "classes": len(dataset.classes),
        "weights": weights,
        "dropout": settings.dropout,
    }
    model = (
        build_model(settings.model, **given) if shape is None else build_scan_network(settings.model, shape, **given)
    )
    if features is not None and isinstance(model, SequenceNetwork):
        features.load_encoder(model.encoder)
    model.to(ranks.device)
    if shape is None or shape.kind != "volume":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stub
    step = _step(model, Augment(preprocess, settings), preprocess, loss_weights, settings, ranks, loader)
    return Session(
        dataset=dataset,
        settings=settings,
        ranks=ranks,
        loader=loader,
        val_loader=val_loader,
        windows=windows,
        preprocess=preprocess,
        model=model,
        step=step,
        meter=Meter.new(ranks.device),
        average=averaged(model, ema_decay=settings.ema_decay, last_epochs=settings.average_epochs),
        unread=unread,
    )


def _loaders(
    dataset: Dataset, split: Split, settings: TrainConfig, ranks: Ranks
) -> tuple[SliceLoader, SliceLoader | None]:
    if len(split.train) < settings.batch_size * ranks.world_size:
        raise UsageError(
            f"Expected at least one batch of {count(settings.batch_size, 'slice')} for "
            f"{'each of ' if ranks.world_size > 1 else ''}{count(ranks.world_size, 'process', 'processes')}; found "
            f"{count(len(split.train), 'slice')} to train on. Lower the batch size."
        )
    if settings.val_fold != "none" and len(split.val) < ranks.world_size:
        raise UsageError(
            f"Expected at least one validation slice for each of {count(ranks.world_size, 'process', 'processes')}; found "
            f"{len(split.val)}. Start fewer processes."
        )
    shared: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "threads": settings.threads,
        "context": settings.context,
        "pin": ranks.device.type == "cuda",
    }
    loader = SliceLoader(
        dataset,
        split.train,
        order=settings.order,
        seed=settings.seed,
        weights=balanced_weights(dataset.labels[split.train]) if settings.sampling == "balanced" else None,
        rank=ranks.rank,
        world_size=ranks.world_size,
        drop_last=True,  # batch normalization fails on a last batch of one slice
        **shared,
    )
    if not len(split.val):
        return loader, None
    return loader, SliceLoader(dataset, split.val[ranks.rank :: ranks.world_size], order="sequential", **shared)


def _step(
    model: nn.Module,
    augment: Augment,
    preprocess: Preprocess,
    weights: torch.Tensor,
    settings: TrainConfig,
    ranks: Ranks,
    loader: SliceLoader | VolumeLoader,
) -> Step:
    on_gpu = ranks.device.type == "cuda"
    network: Callable[[torch.Tensor], torch.Tensor] = model
    if ranks.world_size > 1:
        network = DistributedDataParallel(model, device_ids=[ranks.device] if on_gpu else None)
    if settings.compile:
        network = torch.compile(network, dynamic=False)  # every batch has the same shape
    if on_gpu:
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    precision = choose_precision(settings.precision, ranks.device)
    in_float16 = precision == torch.float16
    groups = parameter_groups(model, settings.weight_decay)
    parts: dict[str, Any] = {
        "model": model,
        "network": network,
        "augment": augment,
        "preprocess": preprocess,
        "optimizer": torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True),
        # Gradients in float16 vanish unless the loss is scaled up; bfloat16 has the range of float32.
        "scaler": torch.amp.GradScaler(ranks.device.type, enabled=in_float16),
        "weights": weights,
        "precision": precision,
        "clip_norm": settings.clip_norm,
        "ranks": ranks,
        "entropy_of": elementwise_loss(
            settings.loss,
            classes=len(weights),
            focal_gamma=settings.focal_gamma,
            pos_weight=settings.pos_weight,
            device=ranks.device,
        ),
        "accumulate": settings.accumulate,
    }
    if isinstance(loader, VolumeLoader):
        return scan_step(settings, loader, parts)
    one_by_one = ranks.world_size > 1 or in_float16 or settings.accumulate > 1
    graph = settings.cuda_graph and on_gpu and not one_by_one
    return Step(**parts, use_cuda_graph=graph)


def windows_of(dataset: Dataset, settings: TrainConfig) -> tuple[Window, ...]:
    """Return the windows that the network sees: the dataset's own, unless it stores HU and the settings name others.

    Raises `UsageError` if they name some for a dataset that stores windows.
    """
    if not settings.windows:
        return dataset.spec.windows
    if dataset.spec.store == "windows":
        raise UsageError(
            f"Expected no windows in [train] for {dataset.path}, which stores windows already; found "
            f'{", ".join(settings.windows)}. Leave them out, or build with store = "hu".'
        )
    return parse_windows(settings.windows)


def input_channels(windows: tuple[Window, ...], settings: TrainConfig) -> int:
    """Return the number of channels of the network's input: each window of the slice and of its neighbours."""
    return len(windows) * (2 * settings.context + 1)


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that convolutions compute in: for ``auto`` float32 on a CPU, half precision on a GPU."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters of ``model`` for an optimizer: kernels decay, biases and normalizations do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
