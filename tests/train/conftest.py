"""A dataset of twelve series, and the command line in a folder of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ich_prep.build_dataset import build
from ich_prep.dataset.spec import Spec
from ich_prep.phantom import synthesize
from ich_train.cli import main


@pytest.fixture(scope="session")
def twelve_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve series in the layout of RSNA."""
    tree = tmp_path_factory.mktemp("twelve") / "rsna"
    synthesize(tree, series=12, size=32, workers=0)
    return tree


@pytest.fixture(scope="session")
def twelve(twelve_tree: Path) -> Path:
    """The dataset of the tree, next to it. Tests must not change it."""
    out = twelve_tree.with_name("data.zarr")
    build(twelve_tree, out, Spec(size=32, slices_per_shard=16, folds=3), workers=0)
    return out


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function: what stands after ``ich-train`` -> its exit code; in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["ich-train", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0)

    return run


NETS = """
import torch
from torch import nn

class Volume(nn.Module):
    def __init__(self, *, channels, size, classes):
        super().__init__()
        self.conv = nn.Conv3d(channels, 8, 3, stride=2)
        self.out = nn.Linear(8, classes)
    def forward(self, volumes):
        return self.out(torch.relu(self.conv(volumes)).mean(dim=(2, 3, 4)))

class Convolutional(nn.Sequential):
    def __init__(self, *, channels, size, classes):
        super().__init__(nn.Conv2d(channels, classes, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten())

class Scaled(nn.Module):
    def __init__(self, *, channels, size, classes):
        super().__init__()
        self.fc = nn.Linear(channels, classes)
    def forward(self, images):
        return self.fc(images.mean(dim=(2, 3))) .repeat(1, 2)[:, :6]
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with networks of one's own, in the current folder."""
    (tmp_path / "scan_nets.py").write_text(NETS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "scan_nets", raising=False)
    return "scan_nets"
