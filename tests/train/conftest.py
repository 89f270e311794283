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
