from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ich_prep.errors import UsageError
from ich_train.config import MODELS
from ich_train.model import Baseline, build_model, conv_layers, load_weights

CHANNELS = dict(zip(MODELS, (3, 1, 3, 9, 1, 3, 9), strict=True))
Tensors = dict[str, torch.Tensor]


def published(name: str, model: nn.Module) -> Tensors:
    """The state dict of ``model`` under the names, and in the shapes, of the weight files that are published for it."""
    tensors = {}
    for key, value in model.state_dict().items():
        if name.startswith("densenet"):
            if key.endswith("num_batches_tracked"):
                continue  # the published files are older than that
            key = re.sub(r"layers\.(norm|conv)([12])\.", r"\1.\2.", key).replace("class_layers.out.", "classifier.")  # noqa: PLW2901
        if name.startswith("seresnext"):
            key = re.sub(r"(layer\d\.\d+\.conv\d)\.conv\.", r"\1.", key)  # noqa: PLW2901
            key = re.sub(r"conv(\d)\.adn\.N\.", r"bn\1.", key)  # noqa: PLW2901
            key = key.replace("project.conv.", "downsample.0.").replace("project.adn.N.", "downsample.1.")  # noqa: PLW2901
            if ".se_layer." in key:
                key = key.replace("se_layer.fc.0.", "se_module.fc1.").replace("se_layer.fc.2.", "se_module.fc2.")  # noqa: PLW2901
                value = value[:, :, None, None] if value.ndim == 2 else value  # noqa: PLW2901
        tensors[key] = value.clone()
    return tensors


def disturb(model: nn.Module) -> nn.Module:
    """Give running statistics and biases values that a new network does not have."""
    for value in model.state_dict().values():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand_like(value) + 0.5)
    return model.eval()


@pytest.mark.parametrize("size", [32, 128, 200, 512])
def test_baseline_is_four_convolutions_with_pooling_and_two_fully_connected_layers(size: int) -> None:
    model = build_model("baseline", channels=9, size=size)
    kinds = [type(module) for module in model.modules() if not list(module.children())]
    assert kinds.count(nn.Conv2d) == 4
    assert kinds.count(nn.Linear) == 2
    assert set(kinds) == {nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Dropout}
    assert model(torch.zeros(2, 9, size, size)).shape == (2, 6)
    assert sum(p.numel() for p in model.parameters()) < 2.3e6


def test_the_last_pooling_of_baseline_halves_at_128_pixels() -> None:
    model = build_model("baseline", channels=1, size=128)
    assert isinstance(model, Baseline)
    x = torch.rand(1, 128, 16, 16)
    assert torch.equal(model.last_pool(x), model.pool(x))


@pytest.mark.parametrize("name", MODELS)
def test_networks_take_any_number_of_channels(name: str) -> None:
    channels = CHANNELS[name]
    model = build_model(name, channels=channels, size=32).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 6)
    first, *rest = conv_layers(model)
    assert isinstance(first[1], nn.Conv2d)
    assert first[1].in_channels == channels
    assert first[1].stride == ((1, 1) if name == "baseline" else (2, 2))
    assert len(rest) == 3 if name == "baseline" else len(rest) > 10


def test_resnet50_has_the_layers_of_the_published_one() -> None:
    parameters = sum(p.numel() for p in build_model("resnet50", channels=3, size=64, classes=1000).parameters())
    assert parameters == 25_557_032


def test_densenet121_has_the_layers_of_the_published_one() -> None:
    parameters = sum(p.numel() for p in build_model("densenet121", channels=3, size=64, classes=1000).parameters())
    assert parameters == 7_978_856


@pytest.mark.parametrize(
    ("name", "suffix"), [("resnet18", "pth"), ("densenet121", "safetensors"), ("seresnext50", "pth")]
)
def test_published_weights_give_the_published_network(tmp_path: Path, name: str, suffix: str) -> None:
    source = disturb(build_model(name, channels=3, size=64, classes=1000))
    tensors = published(name, source)
    if name != "resnet18":
        assert tensors.keys() != source.state_dict().keys()
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in tensors.items()}}, file)
    else:
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    loaded = build_model(name, channels=3, size=64, classes=1000, weights=file).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images), source(images))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "seresnext50"])
def test_weights_for_colours_fit_other_channels_and_another_number_of_labels(tmp_path: Path, name: str) -> None:
    source = disturb(build_model(name, channels=3, size=64, classes=1000))
    file = tmp_path / "weights.safetensors"
    save_file(published(name, source), file)
    torch.manual_seed(4)
    fresh = build_model(name, channels=9, size=64)
    torch.manual_seed(4)
    adapted = build_model(name, channels=9, size=64, weights=file)
    first = f"{conv_layers(adapted)[0][0]}.weight"
    head = [layer for layer, module in adapted.named_modules() if isinstance(module, nn.Linear)][-1]
    before, after, theirs = fresh.state_dict(), adapted.state_dict(), source.state_dict()
    for key in before:
        if key.startswith(f"{head}."):
            assert torch.equal(after[key], before[key])
        elif key != first and not key.endswith("num_batches_tracked"):
            assert torch.equal(after[key], theirs[key])
    # Grey images look the same to both: the first layer answers alike to nine equal channels and to three.
    grey = torch.rand(2, 1, 64, 64)
    ours = nn.functional.conv2d(grey.expand(-1, 9, -1, -1), after[first])
    assert torch.allclose(ours, nn.functional.conv2d(grey.expand(-1, 3, -1, -1), theirs[first]), atol=1e-4)


def test_a_run_can_start_from_an_earlier_one(tmp_path: Path) -> None:
    source = build_model("baseline", channels=3, size=64)
    file = tmp_path / "model.safetensors"
    save_file(source.state_dict(), file)
    loaded = build_model("baseline", channels=3, size=64, weights=file)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = build_model("resnet18", channels=3, size=64)
    tensors = dict(model.state_dict())
    file = tmp_path / "weights.safetensors"
    for change, message in (
        ({key: value for key, value in tensors.items() if key != "layer1.0.conv1.weight"}, "are missing"),
        (tensors | {"layer9.weight": torch.zeros(1)}, "are unknown"),
        (tensors | {"layer1.0.bn1.weight": torch.zeros(65)}, "another shape"),
    ):
        save_file(change, file)
        with pytest.raises(UsageError, match=message):
            load_weights(model, "resnet18", file)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_files_that_are_not_weights_are_refused(tmp_path: Path, name: str) -> None:
    model = build_model("baseline", channels=3, size=32)
    file = tmp_path / name
    with pytest.raises(UsageError, match="safetensors or as a state dict"):
        load_weights(model, "baseline", file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="safetensors or as a state dict"):
        load_weights(model, "baseline", file)


def test_a_pickled_object_is_refused_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"model": Touch(tmp_path / "ran")}, file)
    with pytest.raises(UsageError, match="safetensors or as a state dict"):
        build_model("baseline", channels=3, size=32, weights=file)
    assert not (tmp_path / "ran").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_state_dict_of_other_things_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(1), "epoch": 3}, file)
    with pytest.raises(UsageError, match="state dict of tensors"):
        build_model("baseline", channels=3, size=32, weights=file)


def test_unknown_names_and_small_images_are_refused() -> None:
    with pytest.raises(UsageError, match="nearest is 'resnet50'"):
        build_model("resnet5", channels=3, size=64)
    with pytest.raises(UsageError, match="at least 32 x 32"):
        build_model("resnet18", channels=3, size=16)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_is_asked_for_where_it_is_missing() -> None:
    with pytest.raises(UsageError, match="pip install timm"):
        build_model("timm:resnet18", channels=3, size=64)


def test_monai_is_imported_only_when_asked_for() -> None:
    program = (
        "import sys; from ich_train.model import build_model; build_model('baseline', channels=3, size=32);"
        "assert not {'monai', 'timm', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
