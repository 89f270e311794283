"""A change of a dataset that is killed leaves the old one, or the new one, and can be repeated."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ich_prep import open_dataset
from ich_prep.build_dataset import build
from ich_prep.dataset.spec import Spec
from ich_prep.phantom import synthesize

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset ``data.zarr``, ``hidden.zarr`` with pseudonyms, the tree ``more`` to append and the table ``labels.csv``."""
    folder = tmp_path_factory.mktemp("crashes")
    synthesize(folder / "tree", series=1, size=32, layout="rsna", workers=0)
    synthesize(folder / "more", series=1, size=32, seed=5, layout="rsna", workers=0)
    for path in sorted((folder / "more").rglob("*.dcm"))[::2]:  # few, so that there are few moments
        path.unlink()
    build(folder / "tree", folder / "data.zarr", Spec(size=32, slices_per_shard=16), workers=0)
    hidden = Spec(size=32, slices_per_shard=16, identifiers="pseudonymise")
    build(folder / "tree", folder / "hidden.zarr", hidden, workers=0)
    slices = open_dataset(folder / "data.zarr").slices.to_pandas().query("any == 0")
    (folder / "labels.csv").write_text(
        "sop_instance_uid,subdural\n" + "".join(f"{uid},1\n" for uid in slices["sop_instance_uid"][:3])
    )
    return folder


def every_fsync(command: str, moments: int) -> object:
    return pytest.param(command, moments, "data.zarr", 1, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])


@pytest.mark.parametrize(
    ("command", "moments", "dataset", "step"),
    [
        ("relabel", 6, "data.zarr", 2),
        ("drop", 8, "data.zarr", 3),
        ("purge", 12, "data.zarr", 3),
        ("append", 25, "data.zarr", 5),
        ("append", 25, "hidden.zarr", 9),
        every_fsync("relabel", 6),
        every_fsync("drop", 8),
        every_fsync("purge", 12),
        every_fsync("append", 25),
    ],
)
def test_a_change_can_be_killed_at_any_moment(
    command: str, moments: int, dataset: str, step: int, base: Path, tmp_path: Path
) -> None:
    words = ["-m", "tests.integration.crash_changes", command, base / dataset, base / "more", base / "labels.csv"]
    tried = subprocess.run(
        [sys.executable, *map(str, words), str(tmp_path), str(step)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280 if step > 1 else 1200,
        check=False,
    )
    assert tried.returncode == 0, tried.stderr
    assert int(tried.stdout) > moments
    shutil.rmtree(tmp_path / "reference.zarr")
