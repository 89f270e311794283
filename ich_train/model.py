"""Networks by name: from a batch of images to one logit for each class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ich_prep.errors import UsageError
from ich_prep.recipe import refuse_unknown
from ich_train.config import MODELS
from ich_train.networks import NETWORKS, Baseline
from ich_train.own_code import described, imported
from ich_train.weights import load_weights

TIMM = "timm:"
OTHERS = ("timm:NAME", "package.module:NAME")


def build_model(
    name: str, *, channels: int, size: int, classes: int, weights: Path | None = None, dropout: float = 0.0
) -> nn.Module:
    """Return the network called ``name``: (b, ``channels``, ``size``, ``size``) float32 -> (b, ``classes``) logits.

    One of ``MODELS``; ``timm:NAME``, from timm, which is imported only then; or ``package.module:NAME``: NAME is then a
    class or function of yours, called as ``NAME(channels=channels, size=size, classes=classes)``. ``dropout`` is that
    of ``baseline``. ``weights`` are loaded by `load_weights`; without them the parameters are drawn from torch's global
    generator. Raises `UsageError` for an unknown name, a library or module that cannot be imported, an object that does
    not make such a network, one without a trainable parameter, images too small for it, or weights that do not fit.
    """
    if name.startswith(TIMM):
        model = _from_timm(name.removeprefix(TIMM), channels, size, classes)
    elif ":" in name:
        model = _from_module(name, channels, (size, size), classes)
    else:
        model = _included(name, channels, size, classes, dropout)
    if weights is not None:
        load_weights(model, name, weights)
    return model


def build_checked(
    name: str, channels: int, sides: tuple[int, ...], classes: int, weights: Path | None = None
) -> nn.Module:
    """Return the network of one's own ``package.module:NAME``, which takes images of (b, ``channels``, ``*sides``).

    It is called and tried, and ``weights`` are loaded, as in `build_model`. Raises `UsageError` as that does.
    """
    if ":" not in name or name.startswith(TIMM):
        raise UsageError(f"Expected package.module:NAME for a network of volumes; found {name}.")
    model = _from_module(name, channels, sides, classes)
    if weights is not None:
        load_weights(model, name, weights)
    return model


def conv_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the name and module of each two-dimensional convolution of ``model``, in the order of definition."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def _included(name: str, channels: int, size: int, classes: int, dropout: float) -> nn.Module:
    refuse_unknown([name], [*MODELS, *OTHERS], where="Model")
    smallest = 16 if name == "baseline" else 32
    if size < smallest:
        raise UsageError(f"{name} needs images of at least {smallest} x {smallest} pixels; found {size} x {size}.")
    if name == "baseline":
        return Baseline(channels=channels, size=size, classes=classes, dropout=dropout)
    return NETWORKS[name](channels, classes)


def _from_timm(name: str, channels: int, size: int, classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"timm:{name} needs timm, which cannot be imported ({error}): pip install timm.") from error
    refuse_unknown([name], timm.list_models(), where="timm's model", listed=False)
    title = f"timm:{name}"
    return _checked(
        title,
        lambda: timm.create_model(name, pretrained=False, in_chans=channels, num_classes=classes),
        channels,
        (size, size),
        classes,
    )


def _from_module(name: str, channels: int, sides: tuple[int, ...], classes: int) -> nn.Module:
    """Return the network that a user's ``package.module:NAME`` makes."""
    make, size = imported(name, "a network"), sides[-1]
    signature = f"{name}(channels={channels}, size={size}, classes={classes})"
    try:
        inspect.signature(make).bind(channels=channels, size=size, classes=classes)
    except (TypeError, ValueError) as error:
        raise UsageError(f"Cannot call {signature}: {error}. It must take these three arguments.") from error
    return _checked(signature, lambda: make(channels=channels, size=size, classes=classes), channels, sides, classes)


def _checked(title: str, make: Callable[[], Any], channels: int, sides: tuple[int, ...], classes: int) -> nn.Module:
    """Return the network that ``make`` returns, checked on one batch of zeros; errors call it ``title``.

    Its code may raise any exception.
    """
    try:
        model = make()
    except Exception as error:
        raise UsageError(f"{title} raised {described(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{title} returned {type(model).__name__}; it must return a torch.nn.Module.")
    model.eval()
    try:
        logits = model(torch.zeros(2, channels, *sides))
    except Exception as error:
        raise UsageError(f"{title} fails on a batch of {(2, channels, *sides)}: {described(error)}") from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (2, classes):
        raise UsageError(f"{title} returned {shape} for a batch of 2; it must return logits of (2, {classes}).")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"{title} has nothing to train: it needs a parameter with requires_grad.")
    if not logits.requires_grad:
        raise UsageError(f"{title} cannot be trained: its logits do not depend on a parameter with requires_grad.")
    return model.train()
