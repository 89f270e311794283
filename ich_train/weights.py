"""Initial weights from a file: ImageNet's under their published names, or those of an earlier run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ich_prep.errors import UsageError, count, describe_os_error
from ich_prep.files import require_regular

# torchvision's first DenseNet files have a dot where its networks have none: norm.1 for norm1.
_OLD_DENSENET = re.compile(r"(denselayer\d+)\.(norm|conv)\.([12])\.")


HEAD_KEY = ".head.attend.0.weight"  # a tensor of every network with a head of scans
STATE_DICTS = ("state_dict", "model_state_dict", "model")  # where other loops keep it in a checkpoint


def load_weights(model: nn.Module, name: str, file: Path) -> None:
    """Initialize ``model``, the network called ``name``, with the weights of ``file``, under its own key names.

    ``file`` is a safetensors file, or a state dict saved by torch, which is read with ``weights_only=True``; it may be
    that of a checkpoint of another training loop, its names with a prefix. A first
    convolution for another number of channels is adapted: each of its new channels gets the mean over the file's,
    scaled so that the sum over channels, and with it the scale of what follows, is kept. A last fully connected layer
    for another number of classes keeps what ``model`` has, as it does if the file has a head of scans instead. Raises
    `UsageError` for a file that cannot be read, and for any other key that is missing, unknown or of another shape.
    """
    expected = model.state_dict()
    found = {_OLD_DENSENET.sub(r"\1.\2\3.", key): value for key, value in _read_tensors(file).items()}
    tensors = _without_prefix(found, expected)
    _keep_last_layer(tensors, expected, model, lacking=_has_head(found))
    first = next((f"{key}.weight" for key, layer in model.named_modules() if isinstance(layer, nn.Conv2d)), "")
    if first in tensors and tensors[first].shape[1:2] != expected[first].shape[1:2]:
        tensors[first] = _adapted(tensors[first], channels=expected[first].shape[1])
    for key, value in tensors.items():
        # The Cadene files hold fully connected layers as 1 x 1 convolutions.
        if key in expected and value.shape == (*expected[key].shape, 1, 1):
            tensors[key] = value.flatten(1)
    # Files from before torch 0.4.1 do not count batches, and nothing here reads the counts.
    needed = {
        key: value for key, value in expected.items() if key in tensors or not key.endswith("num_batches_tracked")
    }
    differences = weight_differences(tensors, needed)
    if differences:
        raise UsageError(
            f"{file} does not hold weights of {name}: {differences}. The file has {_shown(found)}; the network has "
            f"{_shown(expected)}. Name a file of the same network, with torchvision's key names."
        )
    model.load_state_dict(tensors, strict=False)


def has_head(file: Path) -> bool:
    """Return whether ``file`` holds an encoder of slices and a head of scans."""
    return _has_head(_read_tensors(file))


def load_head(head: nn.Module, file: Path) -> None:
    """Initialize ``head`` with that in ``file`` if it has the same names and shapes, else leave it as it is."""
    found = {
        f".{key}".rpartition(".head.")[2]: value for key, value in _read_tensors(file).items() if ".head." in f".{key}"
    }
    if not weight_differences(found, head.state_dict()):
        head.load_state_dict(found)


def load_exactly(model: nn.Module, file: Path) -> None:
    """Fill ``model`` with the weights of ``file``, which must be its own; raises `UsageError` otherwise."""
    tensors = _read_tensors(file)
    differences = weight_differences(tensors, model.state_dict())
    if differences:
        raise UsageError(f"The weights in {file} do not fit the network: {differences}.")
    model.load_state_dict(tensors)


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return ``tensors`` as a safetensors file."""
    from safetensors.torch import save

    # safetensors wants each tensor dense in its own memory; channels_last ones are not. Its own function for files
    # gives them mode 0600, whatever the umask.
    return save({key: value.cpu().contiguous() for key, value in tensors.items()})


def weight_differences(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """Return where ``tensors`` differ from the ``expected`` in names or shapes, the first kind only; "" if nowhere."""
    missing = [key for key in expected if key not in tensors]
    unknown = [key for key in tensors if key not in expected]
    misshapen = [key for key in tensors if key in expected and tensors[key].shape != expected[key].shape]
    for one, many, keys in (
        ("is missing", "are missing", missing),
        ("is unknown", "are unknown", unknown),
        ("has another shape", "have another shape", misshapen),
    ):
        if keys:
            what = one if len(keys) == 1 else many
            return f"{count(len(keys), 'tensor')} of {len(expected)} {what}, such as {', '.join(keys[:3])}"
    return ""


def _without_prefix(tensors: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``tensors`` under the names of the network alone, as they were before another loop put them into a module.

    DataParallel adds ``module.``, torch.compile ``_orig_mod.``, Lightning the name of an attribute, such as ``model.``;
    what a file holds beside that module, such as a loss's, is left out.
    """
    first = next(iter(expected))
    if first in tensors:
        return tensors
    prefixes = [key.removesuffix(first) for key in tensors if key.endswith(f".{first}")]
    renamed = [
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for prefix in prefixes
    ]
    # A layer of a block may be called like the first one.
    return max(renamed, key=lambda names: len(names.keys() & expected.keys()), default=tensors)


def _shown(tensors: Mapping[str, torch.Tensor]) -> str:
    return ", ".join([*tensors][:3]) + (", ..." if len(tensors) > 3 else "")


def _has_head(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(f".{key}".endswith(HEAD_KEY) for key in tensors)


def _keep_last_layer(
    tensors: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor], model: nn.Module, *, lacking: bool
) -> None:
    """Replace the last fully connected layer of ``tensors`` by the ``expected`` one, if ``lacking`` or for other classes."""
    layers = [key for key, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    last = [key for key in expected if layers and key.startswith(f"{layers[-1]}.")]
    if lacking or any(key in tensors and tensors[key].shape != expected[key].shape for key in last):
        tensors.update((key, expected[key]) for key in last)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        require_regular(file)
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"Cannot read weights from {file}: {describe_os_error(error)}.") from error
    except Exception as error:  # an unpickler may raise anything on bytes that it does not expect
        raise UsageError(
            f"Cannot read weights from {file}: it is damaged, or neither a safetensors file nor a state dict saved by torch."
        ) from error
    for name in STATE_DICTS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UsageError(f"Expected a state dict of tensors in {file}; found other objects ({type(content).__name__}).")
    return {str(key): value for key, value in content.items()}


def _adapted(weight: torch.Tensor, *, channels: int) -> torch.Tensor:
    # (out, in, y, x) -> (out, channels, y, x)
    return weight.mean(dim=1, keepdim=True).repeat(1, channels, 1, 1) * (weight.shape[1] / channels)
