from __future__ import annotations

import importlib
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
            key = re.sub(r"(denselayer\d+\.)(norm|conv)([12])\.", r"\1\2.\3.", key)  # noqa: PLW2901
        if ".se_module." in key and value.ndim == 2:
            value = value[:, :, None, None]  # noqa: PLW2901
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
    model = build_model("baseline", channels=9, size=size, classes=6)
    kinds = [type(module) for module in model.modules() if not list(module.children())]
    assert kinds.count(nn.Conv2d) == 4
    assert kinds.count(nn.Linear) == 2
    assert set(kinds) == {nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Dropout}
    assert model(torch.zeros(2, 9, size, size)).shape == (2, 6)
    assert sum(p.numel() for p in model.parameters()) < 2.3e6


def test_the_last_pooling_of_baseline_halves_at_128_pixels() -> None:
    model = build_model("baseline", channels=1, size=128, classes=6)
    assert isinstance(model, Baseline)
    x = torch.rand(1, 128, 16, 16)
    assert torch.equal(model.last_pool(x), model.pool(x))


@pytest.mark.parametrize("name", MODELS)
def test_networks_take_any_number_of_channels(name: str) -> None:
    channels = CHANNELS[name]
    model = build_model(name, channels=channels, size=32, classes=6).eval()
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
    shapes = {key: value.shape for key, value in source.state_dict().items()}
    assert (name == "resnet18") == ({key: value.shape for key, value in tensors.items()} == shapes)
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
    fresh = build_model(name, channels=9, size=64, classes=6)
    torch.manual_seed(4)
    adapted = build_model(name, channels=9, size=64, classes=6, weights=file)
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
    source = build_model("baseline", channels=3, size=64, classes=6)
    file = tmp_path / "model.safetensors"
    save_file(source.state_dict(), file)
    loaded = build_model("baseline", channels=3, size=64, classes=6, weights=file)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = build_model("resnet18", channels=3, size=64, classes=6)
    tensors = dict(model.state_dict())
    file = tmp_path / "weights.safetensors"
    for change, message in (
        (
            {key: value for key, value in tensors.items() if key != "layer1.0.conv1.weight"},
            r"1 tensor of 122 is missing, such as layer1\.0\.conv1\.weight\.",
        ),
        (tensors | {"layer9.weight": torch.zeros(1)}, "1 tensor of 122 is unknown, such as layer9"),
        (tensors | {"layer1.0.bn1.weight": torch.zeros(65)}, "another shape"),
    ):
        save_file(change, file)
        with pytest.raises(UsageError, match=message):
            load_weights(model, "resnet18", file)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_files_that_are_not_weights_are_refused(tmp_path: Path, name: str) -> None:
    model = build_model("baseline", channels=3, size=32, classes=6)
    file = tmp_path / name
    with pytest.raises(UsageError, match=r"Cannot read weights from .*: No such file or directory"):
        load_weights(model, "baseline", file)
    for content in (b"nothing of the kind", b"", b"[train]\nepochs = 3\n", b"(lp0\n.", bytes(range(256))):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"Cannot read weights from .*: it is damaged, or neither") as raised:
            load_weights(model, "baseline", file)
        assert "\n" not in str(raised.value)


def test_a_pickled_object_is_refused_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"model": Touch(tmp_path / "ran")}, file)
    with pytest.raises(UsageError, match="Cannot read weights"):
        build_model("baseline", channels=3, size=32, classes=6, weights=file)
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
        build_model("baseline", channels=3, size=32, classes=6, weights=file)


def test_unknown_names_and_small_images_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'resnet5' is unknown\..* Did you mean 'resnet50'\?"):
        build_model("resnet5", channels=3, size=64, classes=6)
    with pytest.raises(UsageError, match="at least 32 x 32"):
        build_model("resnet18", channels=3, size=16, classes=6)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_is_asked_for_where_it_is_missing() -> None:
    with pytest.raises(UsageError, match="pip install timm"):
        build_model("timm:resnet18", channels=3, size=64, classes=6)


def test_no_other_library_is_imported_for_a_network() -> None:
    program = (
        "import sys; from ich_train.model import MODELS, build_model\n"
        "for name in MODELS: build_model(name, channels=3, size=32, classes=6)\n"
        "assert not {'monai', 'timm', 'torchvision', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


MONAI_NAMES = {  # patterns of MONAI's key names -> ours, which are the published ones
    "resnet": (),
    "densenet": ((r"layers\.(norm|conv)", r"\1"), (r"^class_layers\.out\.", "classifier.")),
    "seresnext": (
        (r"^(layer\d\.\d+\.conv\d)\.conv\.", r"\1."),
        (r"conv(\d)\.adn\.N\.", r"bn\1."),
        (r"project\.conv\.", "downsample.0."),
        (r"project\.adn\.N\.", "downsample.1."),
        (r"se_layer\.fc\.0\.", "se_module.fc1."),
        (r"se_layer\.fc\.2\.", "se_module.fc2."),
    ),
}


def monai_model(name: str, *, channels: int, classes: int) -> nn.Module:
    """MONAI's network of that name, in the form for which ImageNet weights are published."""
    nets = "monai.networks.nets"
    if name.startswith("resnet"):
        build = getattr(importlib.import_module(f"{nets}.resnet"), name)
        return build(  # type: ignore[no-any-return]
            spatial_dims=2, n_input_channels=channels, num_classes=classes, conv1_t_stride=2, bias_downsample=False
        )
    if name.startswith("densenet"):
        build = getattr(importlib.import_module(f"{nets}.densenet"), name.replace("densenet", "DenseNet"))
        return build(spatial_dims=2, in_channels=channels, out_channels=classes)  # type: ignore[no-any-return]
    build = importlib.import_module(f"{nets}.senet").SEResNext50
    return build(spatial_dims=2, in_channels=channels, num_classes=classes)  # type: ignore[no-any-return]


@pytest.mark.skipif(importlib.util.find_spec("monai") is None, reason="MONAI is not installed: networks NOT compared")
@pytest.mark.parametrize("name", MODELS[1:])
def test_networks_are_those_of_monai_to_the_bit(name: str) -> None:
    theirs = disturb(monai_model(name, channels=5, classes=7))
    ours = build_model(name, channels=5, size=64, classes=7).eval()
    tensors: Tensors = {}
    for key, value in theirs.state_dict().items():
        for pattern, replacement in next(MONAI_NAMES[family] for family in MONAI_NAMES if name.startswith(family)):
            key = re.sub(pattern, replacement, key)  # noqa: PLW2901
        tensors[key] = value
    ours.load_state_dict(tensors)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    images = torch.rand(2, 5, 96, 96)
    with torch.inference_mode():
        assert torch.equal(ours(images), theirs(images))


OWN = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, *, channels, size, classes):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.fc = nn.Linear(4, classes)

    def forward(self, images):
        return self.fc(self.conv(images).mean(dim=(2, 3)))

def one_logit(channels, size, classes):
    return Small(channels=channels, size=size, classes=1)

def other_channels(channels, size, classes):
    return Small(channels=channels + 1, size=size, classes=classes)

def not_a_module(**given):
    return 3

def other_arguments(inputs):
    return 3

class NoParameters(nn.Module):
    def __init__(self, *, channels, size, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        return images.mean(dim=(1, 2, 3))[:, None].expand(-1, self.classes)

class Frozen(Small):
    def __init__(self, **given):
        super().__init__(**given)
        self.requires_grad_(False)

class Detached(Small):
    def forward(self, images):
        return super().forward(images).detach()

class Raises(nn.Module):
    def __init__(self, *, channels, size, classes):
        raise KeyError("width")

number = 5
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder that makes networks."""
    sources = {"own_networks": OWN, "no_syntax": "def f(:", "no_import": "import no_such_library", "no_name": "1 / 0"}
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    return "own_networks"


def test_a_network_of_ones_own_is_made_by_name(own: str, tmp_path: Path) -> None:
    before = list(sys.path)
    model = build_model(f"{own}:Small", channels=9, size=32, classes=3)
    assert sys.path == before
    assert model.training
    assert model(torch.zeros(2, 9, 32, 32)).shape == (2, 3)
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    again = build_model(f"{own}:Small", channels=9, size=32, classes=3, weights=file)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_networks:Smal", r"In own_networks, the name 'Smal' is unknown\. Did you mean 'Small'\?"),
        ("no_such_networks:Small", "Cannot import no_such_networks.*Run in the folder that holds it"),
        ("own_networks:one_logit", r"returned \(2, 1\) for a batch of 2; it must return logits of \(2, 3\)"),
        ("own_networks:other_channels", r"fails on a batch of \(2, 9, 32, 32\)"),
        ("own_networks:not_a_module", "returned int; it must return a torch.nn.Module"),
        ("own_networks:NoParameters", r"has nothing to train: it needs a parameter with requires_grad"),
        ("own_networks:Frozen", r"has nothing to train"),
        ("own_networks:Detached", r"its logits do not depend on a parameter"),
        ("own_networks:Raises", r"size=32, classes=3\) raised KeyError: 'width'\.$"),
        ("own_networks:number", r"own_networks:number is of the type int; it must be a class or function"),
        ("own_networks:", r"Expected package\.module:NAME .* found 'own_networks:'"),
        (":Small", r"Expected package\.module:NAME .* found ':Small'"),
        (".own_networks:Small", r"Expected package\.module:NAME"),
        ("no_syntax:Small", r"Cannot import no_syntax, .* it raised SyntaxError: .*no_syntax\.py, line 1"),
        ("no_import:Small", r"Cannot import no_import, .* it imports no_such_library, which is not installed\.$"),
        ("no_name:Small", r"it raised ZeroDivisionError: division by zero\.$"),
        ("no_such_package.networks:Small", r"there is no module no_such_package"),
        ("own_networks:other_arguments", r"Cannot call .*channels.*It must take these three arguments"),
    ],
)
@pytest.mark.usefixtures("own")
def test_what_makes_no_such_network_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(name, channels=9, size=32, classes=3)
