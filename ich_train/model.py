"""Networks by name: from a batch of images to one logit for each class."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ich_prep.errors import UsageError
from ich_prep.recipe import refuse_unknown
from ich_train.config import MODELS
from ich_train.networks import NETWORKS, Baseline
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
    not make such a network, images too small for it, or weights that do not fit.
    """
    if name.startswith(TIMM):
        model = _from_timm(name.removeprefix(TIMM), channels, classes)
    elif ":" in name:
        model = _from_module(name, channels, size, classes)
    else:
        model = _included(name, channels, size, classes, dropout)
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


def _from_timm(name: str, channels: int, classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"timm:{name} needs timm, which cannot be imported ({error}): pip install timm.") from error
    refuse_unknown([name], timm.list_models(), where="timm's model", listed=False)
    model: nn.Module = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=classes)
    return model


def _from_module(name: str, channels: int, size: int, classes: int) -> nn.Module:
    """Return the network that a user's ``package.module:NAME`` makes, checked on one batch of zeros."""
    make = _imported(name)
    signature = f"{name}(channels={channels}, size={size}, classes={classes})"
    try:
        inspect.signature(make).bind(channels=channels, size=size, classes=classes)
    except (TypeError, ValueError) as error:
        raise UsageError(f"Cannot call {signature}: {error}. It must take these three arguments.") from error
    model = make(channels=channels, size=size, classes=classes)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{signature} returned {type(model).__name__}; it must return a torch.nn.Module.")
    model.eval()
    with torch.inference_mode():
        try:
            logits = model(torch.zeros(2, channels, size, size))
        except (RuntimeError, TypeError, ValueError) as error:
            raise UsageError(f"{signature} fails on a batch of (2, {channels}, {size}, {size}): {error}") from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (2, classes):
        raise UsageError(f"{signature} returned {shape} for a batch of 2; it must return logits of (2, {classes}).")
    return model.train()


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)  # as `python -m` does: a console script has its own folder there
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"Cannot import {module_name}, for the network {name}: {error}. Run in the folder that holds it, or install "
            "it."
        ) from error
    finally:
        sys.path.remove(folder)
    refuse_unknown([attribute], dir(module), where=f"In {module_name}, the name", listed=False)
    make: Callable[..., Any] = getattr(module, attribute)
    return make
