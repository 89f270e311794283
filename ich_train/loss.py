"""Binary cross-entropy over the classes, unknown labels excluded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from ich_prep.errors import UsageError
from ich_train.rsna import class_weights, require_rsna

LOSSES = ("bce", "rsna")


class Sums(NamedTuple):
    """Sums over a batch: ``loss / weight`` is the mean loss, ``correct / known`` the accuracy."""

    loss: torch.Tensor  # () float32, weighted cross-entropies
    weight: torch.Tensor  # () float32, weights of the known labels
    correct: torch.Tensor  # () float32, known labels on whose side of 0.5 the probability lies
    known: torch.Tensor  # () float32, known labels


def label_weights(loss: str, classes: Sequence[str]) -> torch.Tensor:
    """Return the weight of each class in the loss named ``loss``, (classes,) float32.

    ``bce`` weighs all alike; ``rsna`` counts ``any`` twice, as the weighted log loss of the RSNA 2019 challenge does.
    Raises `UsageError` for another name, or for ``rsna`` with other classes than the challenge's.
    """
    if loss not in LOSSES:
        raise UsageError(f"Unknown loss {loss!r}; expected {' or '.join(LOSSES)}.")
    if loss == "bce":
        return torch.ones(len(classes))
    require_rsna(classes, 'loss = "rsna", in which any counts twice,')
    return torch.tensor(class_weights(classes))


def loss_sums(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> Sums:
    """Return the sums of the weighted cross-entropy and the number of correct answers over the known labels.

    ``logits`` are (b, classes) of any floating type, ``labels`` (b, classes) int8 with -1 for unknown, ``weights``
    (classes,) float32. The arithmetic is float32 whatever the logits are. ``loss`` carries the gradient.
    """
    logits = logits.float()
    known = labels >= 0
    weight = known * weights
    # An unknown label has weight 0; its target only has to be a number.
    entropy = functional.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).float(), reduction="none")
    correct = ((logits >= 0) == (labels == 1)) & known
    return Sums((entropy * weight).sum(), weight.sum(), correct.sum().float(), known.sum().float())
