"""One step of training: augmentation, network, loss, gradients, update. On a GPU it is recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ich_prep.errors import TrainError
from ich_train.loss import Elementwise, Sums, cross_entropy, loss_sums

if TYPE_CHECKING:
    from ich_train.ranks import Ranks
UNRECORDED_STEPS = 3  # which choose kernels, compile, and create the optimizer's state


class Judged(NamedTuple):
    """What a network says of a batch: the sums of the loss, and logits (n, classes) beside labels (n, classes) int8."""

    sums: Sums
    logits: torch.Tensor
    labels: torch.Tensor


class Step:
    """Takes the steps of one training run, each on a batch of the same shape.

    ``model`` is the bare network, ``network`` the same joined to the other ranks and compiled: that is what computes.
    ``augment`` turns stored pixels into its inputs, by a generator; ``preprocess`` does so without chance. ``weights``
    (classes,) float32 are those of the loss. Convolutions compute in ``precision``, and ``scaler`` keeps gradients in
    float16 from vanishing. ``entropy_of`` is the loss of each logit; the gradients of ``accumulate`` batches are averaged
    for one update.

    A step is thousands of kernels, and launching them one by one can take the host longer than the GPU needs to compute
    them. With ``use_cuda_graph`` the step is recorded after ``UNRECORDED_STEPS`` as a CUDA graph and replayed by one
    launch: the same kernels on the same memory, with other pixels, labels, learning rate and seed, to the same weights.
    Not for steps on a CPU, those of several ranks, whose gradients are exchanged while further ones are computed, and
    those in float16, whose loss scaling belongs outside of a graph (PyTorch, CUDA semantics, "Whole-network capture").
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        network: Callable[..., Any],
        augment: Callable[..., torch.Tensor],
        preprocess: Callable[[torch.Tensor], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        weights: torch.Tensor,
        precision: torch.dtype,
        clip_norm: float,
        ranks: Ranks,
        use_cuda_graph: bool,
        entropy_of: Elementwise = cross_entropy,
        accumulate: int = 1,
    ) -> None:
        self.model, self.network, self.augment, self.preprocess = model, network, augment, preprocess
        self.optimizer, self.scaler, self.weights = optimizer, scaler, weights
        self.precision, self.clip_norm = precision, clip_norm
        self.ranks, self.use_cuda_graph = ranks, use_cuda_graph
        self.entropy_of, self.accumulate = entropy_of, accumulate
        self._gathered = 0  # batches since the last update
        self.generator = torch.Generator(ranks.device)  # of the augmentation, reseeded for each step
        self._taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: torch.Tensor, rate: float, seed: int, last: bool = False) -> torch.Tensor:
        """Learn from one batch; return the sums of `ich_train.loss.Sums`, (4,) float32, which the next step may overwrite.

        ``inputs`` are those of `measure`, on the device of the run; ``rate`` is the learning rate, ``seed`` decides the
        augmentation and the dropout. The ``last`` batch of an epoch updates the weights whatever is accumulated. Raises
        `TrainError` if the network does something that cannot be recorded.
        """
        if self.use_cuda_graph and self._graph is None and self._taken == UNRECORDED_STEPS:
            self._graph = self._record(inputs)
        self._taken += 1
        torch.manual_seed(seed)  # of the dropout, in networks that have one
        self.generator.manual_seed(seed)
        if self._graph is None:
            for group in self.optimizer.param_groups:
                group["lr"] = float(np.float32(rate))  # rounded as in a recorded step
            return self._learn(inputs, last=last)
        self._rate.fill_(rate)
        for recorded, given in zip(self._inputs, inputs, strict=True):
            recorded.copy_(given)
        self._graph.replay()
        return self._sums

    def autocast(self) -> torch.autocast:
        """Return the context in which convolutions compute in ``precision``."""
        return torch.autocast(self.weights.device.type, self.precision, enabled=self.precision != torch.float32)

    def measure(self, *inputs: torch.Tensor) -> Sums:
        """Return the loss of a batch: ``inputs`` are stored pixels (b, c, h, w) and labels (b, classes) int8."""
        images, labels = inputs
        augmented = self.augment(images, self.generator)
        with self.autocast():
            logits = self.network(augmented)
        return loss_sums(logits, labels, self.weights, self.entropy_of)

    def validate(self, model: nn.Module, *inputs: torch.Tensor) -> Judged:
        """Return what ``model``, in evaluation mode, says of a batch: without augmentation and gradients."""
        images, labels = inputs
        with torch.inference_mode(), self.autocast():
            logits = model(self.preprocess(images))
            return Judged(loss_sums(logits, labels, self.weights, self.entropy_of), logits, labels)

    def _learn(self, inputs: tuple[torch.Tensor, ...], *, last: bool = False) -> torch.Tensor:
        sums = self.measure(*inputs)
        if not self._gathered:
            self.optimizer.zero_grad()
        mean = sums.loss / self._mean_weight(sums.weight)
        self.scaler.scale(mean / self.accumulate if self.accumulate > 1 else mean).backward()  # type: ignore[no-untyped-call]
        self._gathered = (self._gathered + 1) % self.accumulate
        if self._gathered and not last:
            return torch.stack(sums).detach()
        self._gathered = 0
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack(sums).detach()

    def _mean_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the loss's divisor: gradients are averaged over the ranks, which have different numbers of known labels."""
        return weight if self.ranks.world_size == 1 else self.ranks.total(weight) / self.ranks.world_size

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> torch.cuda.CUDAGraph:
        """Return the graph of a step; recording changes no weight."""
        self._inputs = tuple(torch.empty_like(tensor) for tensor in inputs)
        self._rate = torch.zeros((), device=self.weights.device)
        for group in self.optimizer.param_groups:
            group["lr"], group["capturable"] = self._rate, True
        self.optimizer.zero_grad()  # the gradients of earlier steps are outside the graph's memory pool
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        try:
            # The threads that read data wait for copies meanwhile, which must not affect the recording.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self._sums = self._learn(self._inputs)
        except RuntimeError as error:
            raise TrainError(
                f"A step of this network cannot be recorded as a CUDA graph: {error.__context__ or error}. Set "
                "cuda_graph = false in [train]."
            ) from error
        return graph
