"""Trees, and what runs commands on them, for the integration tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ich_prep.phantom import synthesize
from tests.support.cli import copy_with_working_folder
from tests.support.commands import Inputs
from tests.support.faults import Programs, programs


@pytest.fixture
def tree(phantom_tree: Path, tmp_path: Path) -> Path:
    """A copy of the phantom that a test may change."""
    return Path(shutil.copytree(phantom_tree, tmp_path / "tree"))


@pytest.fixture(scope="session")
def damaged_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two series with every known defect."""
    out = tmp_path_factory.mktemp("damaged") / "rsna"
    synthesize(out, series=2, size=64, defects=True)
    return out


@pytest.fixture
def unfinished(dataset_path: Path, tmp_path: Path) -> Path:
    """A build that was stopped just before its last step."""
    out = copy_with_working_folder(dataset_path, tmp_path / "data.zarr")
    (out / "zarr.json").unlink()
    return out


@pytest.fixture(scope="module")
def server() -> Iterator[Programs]:
    """What runs commands, under failing system calls if a test wants that."""
    with programs() as started:
        yield started


@pytest.fixture(scope="module")
def inputs(server: Programs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """What the commands read."""
    return Inputs.make(tmp_path_factory.mktemp("inputs"), server)
