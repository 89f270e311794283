"""One step of training: augmentation, network, loss, gradients, update. On a GPU it is recorded once and played back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ich_prep.errors import TrainError
from ich_train.loss import loss_sums

if TYPE_CHECKING:
    from ich_train.setup import Training

UNRECORDED_STEPS = 3  # which choose kernels, compile, and make the optimizer's state


class Step:
    """Takes the steps of one training, each on a batch of the same shape.

    A step is some thousand kernels, and to launch them one by one can take the host longer than a GPU to compute them.
    So after ``UNRECORDED_STEPS`` the step is recorded as a CUDA graph and played back by one launch: the same kernels
    on the same memory, with other pixels, labels, learning rate and seed, to the same weights. Not recorded are steps
    on a CPU, those of several ranks, whose gradients travel while further ones are computed, and those in float16,
    whose loss scaling belongs outside of a graph (PyTorch, CUDA semantics, "Whole-network capture").
    """

    def __init__(self) -> None:
        self._taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self, training: Training, images: torch.Tensor, labels: torch.Tensor, *, rate: float, seed: int
    ) -> torch.Tensor:
        """Learn from one batch; return the sums of `ich_train.loss.Sums`, (4,) float32, which the next step may overwrite.

        ``images`` are stored pixels (b, c, h, w), ``labels`` (b, 6) int8, both on the device of the training; ``rate``
        is the learning rate, ``seed`` decides the augmentation and the dropout. Raises `TrainError` where the network
        does what cannot be recorded.
        """
        if training.recorded and self._graph is None and self._taken == UNRECORDED_STEPS:
            self._graph = self._record(training, images, labels)
        self._taken += 1
        torch.manual_seed(seed)  # of the dropout, in networks that have one
        training.generator.manual_seed(seed)
        if self._graph is None:
            for group in training.optimizer.param_groups:
                group["lr"] = float(np.float32(rate))  # no more exact than that of a recorded step
            return _learn(training, images, labels)
        self._rate.fill_(rate)
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._sums

    def _record(self, training: Training, images: torch.Tensor, labels: torch.Tensor) -> torch.cuda.CUDAGraph:
        """Return the graph of a step; nothing is learned meanwhile."""
        optimizer = training.optimizer
        self._images, self._labels = torch.empty_like(images), torch.empty_like(labels)
        self._rate = torch.zeros((), device=images.device)
        for group in optimizer.param_groups:
            group["lr"], group["capturable"] = self._rate, True
        optimizer.zero_grad()  # gradients of the steps before lie in memory that is not the graph's
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(training.generator)
        try:
            # The threads that read data wait for copies meanwhile, which is no business of the recording.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self._sums = _learn(training, self._images, self._labels)
        except RuntimeError as error:
            raise TrainError(
                f"Expected a step of {training.settings.model} that can be recorded as a CUDA graph; found: "
                f"{error.__context__ or error}. Set cuda_graph = false in [train]."
            ) from error
        return graph


def _learn(training: Training, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    optimizer, scaler = training.optimizer, training.scaler
    inputs = training.augment(images, training.generator)
    with training.mixed():
        logits = training.network(inputs)
    sums = loss_sums(logits, labels, training.label_weights)
    weight, ranks = sums.weight, training.ranks
    if ranks.world_size > 1:  # whose gradients are averaged: to that of the mean over the known labels of all of them
        weight = ranks.total(weight) / ranks.world_size
    optimizer.zero_grad()
    scaler.scale(sums.loss / weight).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(training.model.parameters(), training.settings.clip_norm)
    scaler.step(optimizer)
    scaler.update()
    return torch.stack(sums).detach()
