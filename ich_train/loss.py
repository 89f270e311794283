"""Binary cross-entropy over the six labels, unknown labels left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.errors import UsageError

LOSSES = ("bce", "rsna")


class Sums(NamedTuple):
    """What a batch adds to an epoch: ``loss / weight`` is the mean loss, ``correct / known`` the accuracy."""

    loss: torch.Tensor  # () float32, of weighted cross-entropies
    weight: torch.Tensor  # () float32, of the weights of the known labels
    correct: torch.Tensor  # () float32, known labels on whose side of 0.5 the probability lies
    known: torch.Tensor  # () float32, known labels


def label_weights(loss: str) -> torch.Tensor:
    """Return the weight of each label in the loss named ``loss``, (6,) float32.

    ``bce`` weighs all alike; ``rsna`` weighs ``any`` twice, as the weighted log loss of the RSNA 2019 challenge does.
    Raises `UsageError` on another name.
    """
    if loss not in LOSSES:
        raise UsageError(f"expected a loss of {', '.join(LOSSES)}, found {loss!r}")
    return torch.tensor([2.0 if loss == "rsna" and name == "any" else 1.0 for name in RSNA_CLASSES])


def loss_sums(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> Sums:
    """Return the sums of the weighted cross-entropy and of the right answers over the known labels.

    ``logits`` are (b, 6) of any floating type, ``labels`` (b, 6) int8 with -1 for unknown, ``weights`` (6,) float32.
    The arithmetic is float32 whatever the logits are. ``loss`` carries the gradient.
    """
    logits = logits.float()
    known = labels >= 0
    weight = known * weights
    # An unknown label has weight 0; its target only has to be a number.
    entropy = functional.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).float(), reduction="none")
    correct = ((logits >= 0) == (labels == 1)) & known
    return Sums((entropy * weight).sum(), weight.sum(), correct.sum().float(), known.sum().float())
