"""Averages of a network's weights: exponential over steps, or equal over the last epochs (torch.optim.swa_utils)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Average:
    """Keeps an average of ``model`` beside it: ``network``, which is what is validated and saved as best.

    ``ema_decay`` (0 < d < 1) averages after each step, as d x average + (1 - d) x weights (Polyak and Juditsky, SIAM J.
    Control Optim. 30, 838); the first average is the weights themselves. ``last_epochs`` averages the weights at the end
    of each of the last so many epochs equally (Izmailov et al., arXiv:1803.05407). Buffers, such as the running means of
    a batch normalization, are averaged alike.
    """

    def __init__(self, model: nn.Module, *, ema_decay: float, last_epochs: int) -> None:
        self.model, self.by_step, self.last_epochs = model, ema_decay > 0, last_epochs
        how: Any = get_ema_multi_avg_fn(ema_decay) if ema_decay else None  # type: ignore[no-untyped-call]
        self._averaged = AveragedModel(model, multi_avg_fn=how, use_buffers=True)

    @property
    def network(self) -> nn.Module:
        """The averaged network; before the first average, a copy of the one at the start."""
        return self._averaged.module

    @property
    def begun(self) -> bool:
        """Whether anything has been averaged yet."""
        return int(self._averaged.n_averaged) > 0

    def after_step(self) -> None:
        """Take the weights after a step into an exponential average."""
        if self.by_step:
            self._averaged.update_parameters(self.model)

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """Take the weights after ``epoch``, counted from 1, of ``epochs`` into an average of the last ones."""
        if not self.by_step and epoch > epochs - self.last_epochs:
            self._averaged.update_parameters(self.model)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the average, to be resumed from."""
        state: dict[str, torch.Tensor] = self._averaged.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Resume from ``state``."""
        self._averaged.load_state_dict(state)


def averaged(model: nn.Module, *, ema_decay: float, last_epochs: int) -> Average | None:
    """Return the average of ``model`` that is asked for, None if there is none."""
    return Average(model, ema_decay=ema_decay, last_epochs=last_epochs) if ema_decay or last_epochs else None
