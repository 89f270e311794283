"""What a training run is made of, from its settings, and what has to be saved of it to go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.windows import Window, parse_windows
from ich_prep.errors import TrainError, UsageError
from ich_train.augment import Augment, Preprocess
from ich_train.data import SliceLoader
from ich_train.loss import label_weights
from ich_train.model import build_model
from ich_train.progress import Meter
from ich_train.runs import Epoch
from ich_train.split import balanced_weights, label_matrix, split_rows
from ich_train.step import Step

if TYPE_CHECKING:
    from pathlib import Path

    from ich_prep.dataset.dataset import Dataset
    from ich_train.config import TrainConfig
    from ich_train.ranks import Ranks

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Training:
    """The parts of a run, and where it stands: after ``len(history)`` epochs and ``step`` steps of the next one."""

    dataset: Dataset
    settings: TrainConfig
    ranks: Ranks
    loader: SliceLoader
    val_loader: SliceLoader
    windows: tuple[Window, ...]
    preprocess: Preprocess
    augment: Augment
    generator: torch.Generator  # of the augmentation, seeded anew for each step
    model: nn.Module  # the bare network, which is saved
    network: Callable[[torch.Tensor], torch.Tensor]  # the same, joined to the other ranks and compiled: trained
    label_weights: torch.Tensor  # (6,) float32
    optimizer: torch.optim.Optimizer
    precision: torch.dtype  # float32, or that of the mixed part
    scaler: torch.amp.GradScaler
    meter: Meter
    recorded: bool  # whether a step is played back as a CUDA graph
    history: list[Epoch] = field(default_factory=list)
    step: int = 0
    take_step: Step = field(default_factory=Step)

    def learn(self, images: torch.Tensor, labels: torch.Tensor, *, rate: float, seed: int) -> torch.Tensor:
        """Learn from one batch, as `ich_train.step.Step` says."""
        return self.take_step(self, images, labels, rate=rate, seed=seed)

    def mixed(self) -> torch.autocast:
        """Return the context in which convolutions compute in ``precision``."""
        device = self.label_weights.device
        return torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32)

    @property
    def best(self) -> Epoch:
        """The epoch of the lowest validation loss so far."""
        return min(self.history, key=lambda line: line.val_loss)

    def meta(self) -> dict[str, Any]:
        """Return what ``meta.json`` says of the network as it is now."""
        return {
            "name": self.settings.model,
            "channels": len(self.windows) * (2 * self.settings.context + 1),
            "size": self.dataset.spec.size,
            "context": self.settings.context,
            "store": self.dataset.spec.store,
            "windows": [asdict(window) for window in self.windows],
            "classes": list(RSNA_CLASSES),
            "epoch": len(self.history),
            "val_loss": self.history[-1].val_loss if self.history else None,
            "dataset_digest": self.dataset.digest,
            "split": {"val_fold": self.settings.val_fold, "test_fold": self.settings.test_fold},
        }

    def state(self) -> dict[str, Any]:
        """Return what `resume` needs, beside the weights, to go on from here."""
        return {
            "dataset_digest": self.dataset.digest,
            "settings": self.settings.model_dump(mode="json"),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "history": [asdict(line) for line in self.history],
            "step": self.step,
            "meter": asdict(self.meter),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go to where ``state`` was taken; raises `TrainError` where it was on another dataset."""
        if state["dataset_digest"] != self.dataset.digest:
            raise TrainError(
                f"Expected the dataset that the run began with, of digest {state['dataset_digest']}; found another, "
                f"{self.dataset.digest}, at {self.dataset.path}. Name the right one with --data."
            )
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["capturable"] = False  # until a step is recorded
        if state["scaler"]:  # not where the run began in another precision, on another device
            self.scaler.load_state_dict(state["scaler"])
        # Only the first rank's place was saved: the others stood at the same batch, of shares of their own.
        self.loader.load_state_dict(state["loader"] | {"rank": self.loader.rank})
        self.history = [Epoch(**line) for line in state["history"]]
        self.step = state["step"]
        self.meter = Meter(**state["meter"])
        # What all ranks had added up is in the hands of the first.
        mine = self.meter.sums if self.loader.rank == 0 else torch.zeros_like(self.meter.sums)
        self.meter.sums = mine.to(self.label_weights.device)


def prepare(dataset: Dataset, settings: TrainConfig, ranks: Ranks, *, weights: Path | None) -> Training:
    """Return a run at its beginning, on this rank's device, its network filled from the file ``weights`` if there is one.

    That of the settings is for a run that begins; one that goes on has a checkpoint of its own.
    Raises `UsageError` for settings that do not fit the dataset: folds without slices, windows for a dataset that
    holds windows already, too few slices for one batch, a model or weights that `build_model` refuses.
    """
    device = ranks.device
    windows = windows_of(dataset, settings)
    split = split_rows(
        dataset,
        val_fold=settings.val_fold,
        test_fold=settings.test_fold,
        allow_series_labels=settings.allow_series_labels,
    )
    if len(split.train) < settings.batch_size * ranks.world_size:
        raise UsageError(
            f"Expected at least one batch of {settings.batch_size} slices for each of {ranks.world_size} processes; "
            f"found {len(split.train)} slices to train on. Lower the batch size."
        )
    frequencies = balanced_weights(label_matrix(dataset, split.train)) if settings.sampling == "balanced" else None
    loader = SliceLoader(
        dataset,
        split.train,
        batch_size=settings.batch_size,
        order=settings.order,
        seed=settings.seed,
        threads=settings.threads,
        context=settings.context,
        weights=frequencies,
        rank=ranks.rank,
        world_size=ranks.world_size,
        drop_last=True,  # a batch normalisation cannot do with a last batch of one slice
        pin=device.type == "cuda",
    )
    val_loader = SliceLoader(
        dataset,
        split.val[ranks.rank :: ranks.world_size],
        batch_size=settings.batch_size,
        order="sequential",
        threads=settings.threads,
        context=settings.context,
        pin=device.type == "cuda",
    )
    preprocess = Preprocess(store=dataset.spec.store, windows=windows, channels_last=True).to(device)
    torch.manual_seed(settings.seed)
    model = build_model(
        settings.model,
        channels=len(windows) * (2 * settings.context + 1),
        size=dataset.spec.size,
        classes=len(RSNA_CLASSES),
        weights=weights,
        dropout=settings.dropout,
    )
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub leaves that out
    network: Callable[[torch.Tensor], torch.Tensor] = model
    if ranks.world_size > 1:
        network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if settings.compile:
        network = torch.compile(network, dynamic=False)  # every batch has the same shape
    precision = choose_precision(settings.precision, device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    return Training(
        dataset=dataset,
        settings=settings,
        ranks=ranks,
        loader=loader,
        val_loader=val_loader,
        windows=windows,
        preprocess=preprocess,
        augment=Augment(preprocess, settings),
        generator=torch.Generator(device),
        model=model,
        network=network,
        label_weights=label_weights(settings.loss).to(device),
        optimizer=torch.optim.AdamW(
            parameter_groups(model, settings.weight_decay), lr=settings.learning_rate, fused=True
        ),
        precision=precision,
        # Gradients in float16 vanish unless the loss is scaled up; bfloat16 has the range of float32.
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        meter=Meter.new(device),
        recorded=settings.cuda_graph and device.type == "cuda" and ranks.world_size == 1 and precision != torch.float16,
    )


def windows_of(dataset: Dataset, settings: TrainConfig) -> tuple[Window, ...]:
    """Return the windows that the network sees: the dataset's own, unless it stores HU and the settings name others.

    Raises `UsageError` where they name some for a dataset that stores windows.
    """
    if not settings.windows:
        return dataset.spec.windows
    if dataset.spec.store == "windows":
        raise UsageError(
            f"Expected no windows in [train] for {dataset.path}, which stores windows already; found "
            f'{", ".join(settings.windows)}. Leave them out, or build with store = "hu".'
        )
    return parse_windows(settings.windows)


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that convolutions compute in: for ``auto`` float32 on a CPU, half precision on a GPU."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters of ``model`` for an optimizer: kernels decay, biases and normalisations do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
