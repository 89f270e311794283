"""A training run in memory: its parts, made from its settings, and its position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ich_prep.dataset.windows import Window, parse_windows
from ich_prep.errors import UsageError, count
from ich_train.loader import SliceLoader
from ich_train.loss import label_weights
from ich_train.meters import Meter
from ich_train.model import build_model
from ich_train.preprocess import Augment, Preprocess
from ich_train.runs import Epoch, best_of
from ich_train.split import Split, balanced_weights, split_rows
from ich_train.step import Step

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
    loader: SliceLoader
    val_loader: SliceLoader
    windows: tuple[Window, ...]  # that the network sees
    preprocess: Preprocess
    model: nn.Module  # the bare network, which is saved
    step: Step
    meter: Meter
    history: list[Epoch] = field(default_factory=list)
    steps_done: int = 0

    @property
    def channels(self) -> int:
        """The number of channels of the network's input."""
        return input_channels(self.windows, self.settings)

    @property
    def best(self) -> Epoch:
        """The epoch of the lowest validation loss so far."""
        return best_of(self.history)


def prepare(dataset: Dataset, settings: TrainConfig, ranks: Ranks, *, weights: Path | None) -> Session:
    """Return a run at its start, on this rank's device, its network initialized from the file ``weights`` if given.

    The weights file of the settings is for a new run only; a resumed run loads its checkpoint.
    Raises `UsageError` for settings that do not fit the dataset: folds without slices, windows for a dataset that
    already stores windows, a loss for other classes, too few slices for one batch, a model or weights that
    `build_model` refuses.
    """
    windows = windows_of(dataset, settings)
    loss_weights = label_weights(settings.loss, dataset.classes).to(ranks.device)
    split = split_rows(
        dataset,
        val_fold=settings.val_fold,
        test_fold=settings.test_fold,
        allow_series_labels=settings.allow_series_labels,
        where=settings.where,
        needed=("train", "val") if settings.where is not None else ("train", "val", "test"),
    )
    loader, val_loader = _loaders(dataset, split, settings, ranks)
    preprocess = Preprocess(pixels=dataset.spec.store, windows=windows, channels_last=True).to(ranks.device)
    torch.manual_seed(settings.seed)
    model = build_model(
        settings.model,
        channels=input_channels(windows, settings),
        size=dataset.spec.size,
        classes=len(dataset.classes),
        weights=weights,
        dropout=settings.dropout,
    )
    model.to(ranks.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stub
    step = _step(model, Augment(preprocess, settings), loss_weights, settings, ranks)
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
    )


def _loaders(dataset: Dataset, split: Split, settings: TrainConfig, ranks: Ranks) -> tuple[SliceLoader, SliceLoader]:
    if len(split.train) < settings.batch_size * ranks.world_size:
        raise UsageError(
            f"Expected at least one batch of {count(settings.batch_size, 'slice')} for "
            f"{'each of ' if ranks.world_size > 1 else ''}{count(ranks.world_size, 'process', 'processes')}; found "
            f"{count(len(split.train), 'slice')} to train on. Lower the batch size."
        )
    if len(split.val) < ranks.world_size:
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
    return loader, SliceLoader(dataset, split.val[ranks.rank :: ranks.world_size], order="sequential", **shared)


def _step(model: nn.Module, augment: Augment, weights: torch.Tensor, settings: TrainConfig, ranks: Ranks) -> Step:
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
    return Step(
        model=model,
        network=network,
        augment=augment,
        optimizer=torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True),
        # Gradients in float16 vanish unless the loss is scaled up; bfloat16 has the range of float32.
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=in_float16),
        weights=weights,
        precision=precision,
        clip_norm=settings.clip_norm,
        ranks=ranks,
        use_cuda_graph=settings.cuda_graph and on_gpu and ranks.world_size == 1 and not in_float16,
    )


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
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
