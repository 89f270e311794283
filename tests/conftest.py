"""Fixtures that several test modules share: real CT files, a synthetic tree, and a dataset built from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ich_prep.build_dataset import build
from ich_prep.phantom import synthesize
from ich_prep.store import Spec

SIZE = 64
SLICES_PER_SHARD = 16


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT files: ``ICH_TEST_DATA``, or ``shared/data`` beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ICH_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real CT files at {folder}: set ICH_TEST_DATA to the folder that holds head_ct and encodings")
    return folder


@pytest.fixture(scope="session")
def phantom_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean tree of six synthetic series in the layout of RSNA; read only."""
    tree = tmp_path_factory.mktemp("phantom") / "rsna"
    synthesize(tree, series=6, size=SIZE, layout="rsna", workers=0)
    return tree


@pytest.fixture(scope="session")
def dataset_path(phantom_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of three windows built from ``phantom_tree``, 16 slices a shard; read only: copy it to damage it."""
    out = tmp_path_factory.mktemp("dataset") / "data.zarr"
    build(phantom_tree, out, Spec(size=SIZE, slices_per_shard=SLICES_PER_SHARD), workers=0)
    return out
