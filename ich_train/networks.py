"""The included networks, with the parameter names under which their ImageNet weights are published.

ResNet (He et al., arXiv:1512.03385, with the stride in the 3 x 3 convolution of a bottleneck) and DenseNet (Huang et
al., arXiv:1608.06993) are named as torchvision names them, SE-ResNeXt-50 32x4d (Hu et al., arXiv:1709.01507) as the
Cadene collection does: torchvision has none. All take (b, channels, y, x) float32 and return (b, classes) logits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

Network = Callable[[int, int], nn.Module]  # channels, classes


class Baseline(nn.Module):
    """Four convolutions, each with pooling, then two fully connected layers.

    Takes (b, ``channels``, ``size``, ``size``) float32 and returns (b, ``classes``) logits. From 128 pixels on, the
    last pooling always leaves a grid of 8 x 8, so that the first fully connected layer has two million weights at
    128 pixels and at 512, where it would have 34 million otherwise. It is a maximum like the other three: a bleed of
    a few pixels must not be averaged away. ``dropout`` is the share of the inputs of either fully connected layer that
    is dropped in training.
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


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (b, width, y / stride, x / stride)."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut; in an SE-ResNeXt grouped, and each channel scaled."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, groups: int = 1, squeeze: int | None = None) -> None:
        super().__init__()
        inner = width if groups == 1 else groups * (width // 16)  # 32 x 4d: 4 channels a group where width is 64
        outputs = width * self.expansion
        self.conv1 = _conv(inputs, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, inner, 3, stride, groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = _conv(inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        if squeeze is not None:
            self.se_module = SqueezeExcitation(outputs, squeeze)
        self.squeezes = squeeze is not None
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (b, 4 width, y / stride, x / stride)."""
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu((self.se_module(out) if self.squeezes else out) + shortcut)  # type: ignore[no-any-return]


class SqueezeExcitation(nn.Module):
    """Scales each channel by a number of 0..1 that depends on the means of all channels."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x``, (b, channels, y, x), scaled."""
        scale = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean(dim=(2, 3))))))
        return x * scale[:, :, None, None]


class ResNet(nn.Module):
    """A ResNet of ``block``s, ``depths`` of them in each of four stages."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: Sequence[int], *, channels: int, classes: int
    ) -> None:
        super().__init__()
        self.conv1 = _conv(channels, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(block, block.expansion, depths)
        self.fc = nn.Linear(512 * block.expansion, classes)
        _initialise(self, mode="fan_out")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (b, classes) logits for (b, channels, y, x) images."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class SEResNeXt50(nn.Module):
    """SE-ResNeXt-50 32x4d."""

    def __init__(self, *, channels: int, classes: int) -> None:
        super().__init__()
        self.layer0 = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv1=_conv(channels, 64, 7, 2),
                bn1=nn.BatchNorm2d(64),
                relu1=nn.ReLU(inplace=True),
                pool=nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            )
        )
        block = partial(Bottleneck, groups=32, squeeze=16)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(block, Bottleneck.expansion, (3, 4, 6, 3))
        self.last_linear = nn.Linear(512 * Bottleneck.expansion, classes)
        _initialise(self, mode="fan_in")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (b, classes) logits for (b, channels, y, x) images."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.layer0(images)))))
        return self.last_linear(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class DenseLayer(nn.Module):
    """Adds ``growth`` channels to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = _conv(inputs, 4 * growth, 1)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = _conv(4 * growth, growth, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (b, inputs + growth, y, x)."""
        new = self.conv2(self.relu(self.norm2(self.conv1(self.relu(self.norm1(x))))))
        return torch.cat([x, new], dim=1)


class DenseNet(nn.Module):
    """A DenseNet of four blocks of ``depths`` layers, each of which adds 32 channels."""

    def __init__(self, depths: Sequence[int], *, channels: int, classes: int, growth: int = 32) -> None:
        super().__init__()
        width = 2 * growth
        layers = OrderedDict[str, nn.Module](
            conv0=_conv(channels, width, 7, 2),
            norm0=nn.BatchNorm2d(width),
            relu0=nn.ReLU(inplace=True),
            pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        for k, depth in enumerate(depths, start=1):
            names = [f"denselayer{number}" for number in range(1, depth + 1)]
            block = {name: DenseLayer(width + number * growth, growth) for number, name in enumerate(names)}
            layers[f"denseblock{k}"] = nn.Sequential(OrderedDict[str, nn.Module](block))
            width += depth * growth
            if k < len(depths):
                layers[f"transition{k}"] = nn.Sequential(
                    OrderedDict[str, nn.Module](
                        norm=nn.BatchNorm2d(width),
                        relu=nn.ReLU(inplace=True),
                        conv=_conv(width, width // 2, 1),
                        pool=nn.AvgPool2d(kernel_size=2, stride=2),
                    )
                )
                width //= 2
        layers["norm5"] = nn.BatchNorm2d(width)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Linear(width, classes)
        _initialise(self, mode="fan_in")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (b, classes) logits for (b, channels, y, x) images."""
        x = torch.relu(self.features(images))
        return self.classifier(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


NETWORKS: dict[str, Network] = {
    "resnet18": lambda channels, classes: ResNet(BasicBlock, (2, 2, 2, 2), channels=channels, classes=classes),
    "resnet34": lambda channels, classes: ResNet(BasicBlock, (3, 4, 6, 3), channels=channels, classes=classes),
    "resnet50": lambda channels, classes: ResNet(Bottleneck, (3, 4, 6, 3), channels=channels, classes=classes),
    "densenet121": lambda channels, classes: DenseNet((6, 12, 24, 16), channels=channels, classes=classes),
    "densenet169": lambda channels, classes: DenseNet((6, 12, 32, 32), channels=channels, classes=classes),
    "seresnext50": lambda channels, classes: SEResNeXt50(channels=channels, classes=classes),
}


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def _stages(block: Callable[[int, int, int], nn.Module], expansion: int, depths: Sequence[int]) -> list[nn.Sequential]:
    """Return the stages, which all but the first halve the image; ``block`` takes inputs, width and stride."""
    stages, inputs = [], 64
    for k, depth in enumerate(depths):
        width, blocks = 64 << k, []
        for number in range(depth):
            blocks.append(block(inputs, width, 2 if k and not number else 1))
            inputs = width * expansion
        stages.append(nn.Sequential(*blocks))
    return stages


def _initialise(model: nn.Module, *, mode: str) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(torch.as_tensor(module.bias))
