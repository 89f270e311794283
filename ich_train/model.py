"""Networks from a batch of images to six logits, by name, and weights from a file."""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ich_prep.errors import UsageError
from ich_train.config import MODELS

TIMM = "timm:"

# Names in published weight files -> names in MONAI's networks. Its ResNets use torchvision's names as they are.
# torchvision has no SE-ResNeXt-50: its names are those of the Cadene files, which MONAI's network was ported from.
_RENAMED = {
    "densenet": (
        (re.compile(r"(denselayer\d+)\.(norm|conv)\.?([12])\."), r"\1.layers.\2\3."),
        (re.compile(r"^classifier\."), "class_layers.out."),
    ),
    "seresnext": (
        (re.compile(r"^(layer\d\.\d+\.conv\d)\.weight$"), r"\1.conv.weight"),
        (re.compile(r"^(layer\d\.\d+)\.bn(\d)\."), r"\1.conv\2.adn.N."),
        (re.compile(r"\.se_module\.fc1\."), ".se_layer.fc.0."),
        (re.compile(r"\.se_module\.fc2\."), ".se_layer.fc.2."),
        (re.compile(r"\.downsample\.0\."), ".project.conv."),
        (re.compile(r"\.downsample\.1\."), ".project.adn.N."),
    ),
}


class Baseline(nn.Module):
    """Four convolutions, each with pooling, then two fully connected layers.

    Takes (b, ``channels``, ``size``, ``size``) float32 and returns (b, ``classes``) logits. From 128 pixels on, the
    last pooling always leaves a grid of 8 x 8, so that the first fully connected layer has two million weights at
    128 pixels and at 512, where it would have 34 million otherwise. It is a maximum like the other three: a bleed of
    a few pixels must not be averaged away. ``dropout`` is the share of what goes into either fully connected layer that
    is left out in training.
    """

    def __init__(self, *, channels: int, size: int, classes: int, dropout: float) -> None:
        super().__init__()
        grid = min(8, size // 16)
        self.conv1 = nn.Conv2d(channels, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.conv4 = nn.Conv2d(64, 128, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.last_pool = nn.AdaptiveMaxPool2d(grid)
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(128 * grid * grid, 256)
        self.fc2 = nn.Linear(256, classes)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(torch.as_tensor(conv.bias))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (b, classes) logits for (b, channels, size, size) images."""
        # ReLU after the maximum is the same as before it, for a quarter of the work.
        x = torch.relu(self.pool(self.conv1(images)))
        x = torch.relu(self.pool(self.conv2(x)))
        x = torch.relu(self.pool(self.conv3(x)))
        x = torch.relu(self.last_pool(self.conv4(x)))
        x = torch.relu(self.fc1(self.dropout(x.flatten(1))))
        logits: torch.Tensor = self.fc2(self.dropout(x))
        return logits


def build_model(
    name: str, *, channels: int, size: int, classes: int = 6, weights: Path | None = None, dropout: float = 0.0
) -> torch.nn.Module:
    """Return the network called ``name``: (b, ``channels``, ``size``, ``size``) float32 -> (b, ``classes``) logits.

    ``baseline`` is `Baseline`, the only one that has a ``dropout``. The ResNets, DenseNets and ``seresnext50`` come
    from MONAI, ``timm:NAME`` from timm; both libraries are imported only when asked for. ``weights`` are loaded by
    `load_weights`. Without them the parameters are drawn from torch's global generator. Raises `UsageError` on an
    unknown name, a library that is not installed, images too small for the network, or weights that do not fit.
    """
    smallest = 16 if name == "baseline" else 32
    if size < smallest:
        raise UsageError(f"{name} needs images of at least {smallest} x {smallest} pixels, found {size} x {size}")
    if name == "baseline":
        model: nn.Module = Baseline(channels=channels, size=size, classes=classes, dropout=dropout)
    elif name.startswith(TIMM):
        model = _timm_model(name.removeprefix(TIMM), channels, classes)
    elif name in MODELS:
        model = _monai_model(name, channels, classes)
    else:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0)[0]
        raise UsageError(
            f"no model is called {name!r}: the nearest is {near!r}; all are {', '.join(MODELS)}, timm:NAME"
        )
    if weights is not None:
        load_weights(model, name, weights)
    return model


def conv_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return the name and module of each two-dimensional convolution of ``model``, in the order of definition."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def load_weights(model: torch.nn.Module, name: str, file: Path) -> None:
    """Fill the network called ``name`` with the weights of ``file``, in torchvision's key names or its own.

    ``file`` is a safetensors file, or a state dict saved by torch, which is read with ``weights_only=True``. A first
    convolution for another number of channels is adapted: each of its new channels gets the mean over the file's,
    scaled so that the sum over channels, and with it the scale of what follows, stays. A last fully connected layer for
    another number of classes keeps what ``model`` has. Raises `UsageError` on a file that cannot be read, and on any
    other key that is missing, unknown or of another shape.
    """
    found = _renamed(_read_tensors(file), name)
    expected = model.state_dict()
    first = next(f"{layer}.weight" for layer, _ in conv_layers(model))
    last = [layer for layer, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    head = {key for key in expected if key.startswith(f"{last}.")}
    if any(key in found and found[key].shape != expected[key].shape for key in head):
        found = {key: value for key, value in found.items() if key not in head} | {key: expected[key] for key in head}
    if first in found and found[first].shape[1:2] != expected[first].shape[1:2]:
        found[first] = _adapted(found[first], channels=expected[first].shape[1])
    for key, value in found.items():
        # The Cadene files hold fully connected layers as 1 x 1 convolutions.
        if key in expected and value.shape == (*expected[key].shape, 1, 1):
            found[key] = value.flatten(1)
    # Files from before torch 0.4.1 do not count batches, and nothing here reads the counts.
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unknown = [key for key in found if key not in expected]
    misshapen = [key for key in found if key in expected and found[key].shape != expected[key].shape]
    for what, keys in (("are missing", missing), ("are unknown", unknown), ("have another shape", misshapen)):
        if keys:
            raise UsageError(
                f"{file} does not hold weights for {name}: {len(keys)} of its {len(expected)} tensors {what}, "
                f"such as {', '.join(keys[:3])}: give a file of the same network, in torchvision's key names"
            )
    model.load_state_dict(found, strict=False)


def _monai_model(name: str, channels: int, classes: int) -> nn.Module:
    if name.startswith("resnet"):
        from monai.networks.nets.resnet import resnet18, resnet34, resnet50

        # Stride 2 in the first convolution and no bias where a block shrinks: the published ResNet, a quarter of the
        # arithmetic of MONAI's default, and the one that torchvision's weights fit.
        build = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}[name]
        resnet: nn.Module = build(
            spatial_dims=2, n_input_channels=channels, num_classes=classes, conv1_t_stride=2, bias_downsample=False
        )
        return resnet
    if name == "seresnext50":
        from monai.networks.nets.senet import SEResNext50

        seresnext: nn.Module = SEResNext50(spatial_dims=2, in_channels=channels, num_classes=classes)
        return seresnext
    from monai.networks.nets.densenet import DenseNet121, DenseNet169

    dense = {"densenet121": DenseNet121, "densenet169": DenseNet169}[name]
    densenet: nn.Module = dense(spatial_dims=2, in_channels=channels, out_channels=classes)
    return densenet


def _timm_model(name: str, channels: int, classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"timm:{name} needs timm, which does not import here ({error}): pip install timm") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0)[0]
        raise UsageError(f"timm has no model {name!r}: the nearest is {near!r}")
    model: nn.Module = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=classes)
    return model


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"expected weights in {file}, as safetensors or as a state dict saved by torch, found: {error}"
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UsageError(f"expected a state dict of tensors in {file}, found {type(found).__name__} of other things")
    return {str(key).removeprefix("module."): value for key, value in found.items()}


def _renamed(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    rules = next((rules for family, rules in _RENAMED.items() if name.startswith(family)), ())
    renamed = {}
    for key, value in tensors.items():
        for pattern, replacement in rules:
            key = pattern.sub(replacement, key)  # noqa: PLW2901  # each rule goes on where the last one ended
        renamed[key] = value
    return renamed


def _adapted(weight: torch.Tensor, *, channels: int) -> torch.Tensor:
    # (out, in, y, x) -> (out, channels, y, x)
    return weight.mean(dim=1, keepdim=True).repeat(1, channels, 1, 1) * (weight.shape[1] / channels)
