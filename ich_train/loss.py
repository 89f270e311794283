"""Binary cross-entropy over the classes, unknown labels excluded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional

from ich_prep.errors import UsageError
from ich_train.own_code import described, imported
from ich_train.rsna import class_weights, require_rsna

LOSSES = ("bce", "rsna")
Elementwise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits, targets -> losses, all (b, classes)


class Sums(NamedTuple):
    """Sums over a batch: ``loss / weight`` is the mean loss, ``correct / known`` the accuracy."""

    loss: torch.Tensor  # () float32, weighted cross-entropies
    weight: torch.Tensor  # () float32, weights of the known labels
    correct: torch.Tensor  # () float32, known labels on whose side of 0.5 the probability lies
    known: torch.Tensor  # () float32, known labels


def label_weights(loss: str, classes: Sequence[str]) -> torch.Tensor:
    """Return the weight of each class in the loss named ``loss``, (classes,) float32.

    ``bce`` and a loss of one's own weigh all alike; ``rsna`` counts ``any`` twice, as the weighted log loss of the RSNA
    2019 challenge does.
    Raises `UsageError` for another name, or for ``rsna`` with other classes than the challenge's.
    """
    if loss not in LOSSES and ":" not in loss:
        raise UsageError(f"Unknown loss {loss!r}; expected {', '.join(LOSSES)} or package.module:NAME.")
    if loss != "rsna":
        return torch.ones(len(classes))
    require_rsna(classes, 'loss = "rsna", in which any counts twice,')
    return torch.tensor(class_weights(classes))


def elementwise_loss(
    loss: str,
    *,
    classes: int,
    focal_gamma: float = 0.0,
    pos_weight: Sequence[float] = (),
    device: torch.device | str = "cpu",
) -> Elementwise:
    """Return the loss of each logit that the settings name: cross-entropy, or a function ``package.module:NAME``.

    That is called with logits and targets of 0 and 1, both (b, classes) float32, and must return losses (b, classes),
    whose mean over the known labels is taken; it is tried first. ``pos_weight`` has one number for all classes, or one
    for each. Raises `UsageError` for other numbers, and for a function that fails.
    """
    if ":" in loss:
        if focal_gamma or pos_weight:
            raise UsageError(f"focal_gamma and pos_weight are for bce and rsna; {loss} makes its own loss.")
        return _own_loss(loss, classes)
    if not focal_gamma and not pos_weight:
        return cross_entropy
    if len(pos_weight) not in (0, 1, classes):
        raise UsageError(f"Expected one pos_weight, or one for each of {classes} classes; found {len(pos_weight)}.")
    weight = (
        torch.tensor([*pos_weight] * (classes if len(pos_weight) == 1 else 1), device=device) if pos_weight else None
    )
    return partial(cross_entropy, focal_gamma=focal_gamma, pos_weight=weight)


def _own_loss(name: str, classes: int) -> Elementwise:
    function: Elementwise = imported(name, "a loss")
    logits, targets = torch.zeros(2, classes, requires_grad=True), torch.eye(2, classes)
    try:
        losses = function(logits, targets)
    except Exception as error:  # anything: it is someone else's code
        raise UsageError(
            f"The loss {name} fails on logits and targets of {(2, classes)}: {described(error)}"
        ) from error
    shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
    if shape != (2, classes):
        raise UsageError(f"The loss {name} returned {shape}; it must return a loss for each logit, {(2, classes)}.")
    if not losses.requires_grad:
        raise UsageError(f"The loss {name} has no gradient: it must be computed from the logits by torch.")
    return function


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, focal_gamma: float = 0.0, pos_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the binary cross-entropy of each logit, (b, classes) float32, for ``targets`` of 0 and 1.

    ``focal_gamma`` multiplies each by (1 - p)**gamma, p the probability given to the right answer (focal loss, Lin et
    al., arXiv:1708.02002, without its alpha). ``pos_weight`` (classes,) multiplies those of positives.
    """
    entropy = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight, reduction="none")
    if not focal_gamma:
        return entropy
    wrong = torch.sigmoid(torch.where(targets > 0, -logits, logits))  # 1 - p, without cancellation
    return entropy * wrong**focal_gamma


def loss_sums(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, entropy_of: Elementwise = cross_entropy
) -> Sums:
    """Return the sums of the weighted cross-entropy and the number of correct answers over the known labels.

    ``logits`` are (b, classes) of any floating type, ``labels`` (b, classes) int8 with -1 for unknown, ``weights``
    (classes,) float32. The arithmetic is float32 whatever the logits are. ``loss`` carries the gradient. ``entropy_of``
    is the loss of each logit.
    """
    logits = logits.float()
    known = labels >= 0
    weight = known * weights
    # An unknown label has weight 0; its target only has to be a number.
    entropy = entropy_of(logits, labels.clamp(min=0).float())
    correct = ((logits >= 0) == (labels == 1)) & known
    return Sums((entropy * weight).sum(), weight.sum(), correct.sum().float(), known.sum().float())
