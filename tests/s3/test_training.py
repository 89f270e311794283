"""Training, evaluation and prediction from a URL give what they give from a folder."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ich_prep.build_dataset import build
from ich_prep.dataset.spec import Spec
from ich_prep.phantom import synthesize
from ich_train.loader import FAR_THREADS, SliceLoader
from tests.support.buckets import upload
from tests.support.s3_servers import S3Server

TRAIN = str(Path(sys.executable).with_name("ich-train"))
RECIPE = "[train]\nepochs = 1\nbatch_size = 16\ndevice = 'cpu'\nthreads = 1\n[eval]\nbootstrap = 5\n"


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of twelve small series, with test slices."""
    folder = tmp_path_factory.mktemp("training")
    synthesize(folder / "rsna", series=12, size=32, workers=0)
    build(folder / "rsna", folder / "data.zarr", Spec(size=32, slices_per_shard=16, folds=3), workers=0)
    return folder / "data.zarr"


@pytest.fixture(scope="module")
def remote(s3: S3Server, near: Path) -> str:
    return upload(near, f"{s3.url}/training/data.zarr", s3.endpoint)


def trained(*words: object) -> None:
    done = subprocess.run([TRAIN, *map(str, words)], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_from_a_url_is_the_run_from_a_folder(remote: str, near: Path, s3: S3Server, tmp_path: Path) -> None:
    recipe, cache = tmp_path / "recipe.toml", tmp_path / "cache"
    recipe.write_text(RECIPE)
    place = ("--endpoint", s3.endpoint, "--cache", cache, "--cache-size", "1GB")
    for name, data in (("near", ("--data", near)), ("far", ("--data", remote, *place))):
        out = tmp_path / name
        trained("run", *data, "--recipe", recipe, "--out", out)
        trained("eval", out, "--subset", "all", "--out", tmp_path / f"{name}-eval")
        trained("predict", out, "--src", *data[1:], "--out", tmp_path / f"{name}.csv")
        trained("predict", out, "--out", tmp_path / f"{name}-kaggle.csv")
    written = tomllib.loads((tmp_path / "far" / "recipe.toml").read_text())["train"]
    assert (written["data"], written["endpoint"], written["cache_size"]) == (remote, s3.endpoint, "1GB")
    assert any(cache.glob("*.shard"))
    one, other = (pq.read_table(tmp_path / name / "predictions.parquet") for name in ("near", "far"))
    assert one.equals(other)
    for name in (".csv", "-kaggle.csv"):
        assert (tmp_path / f"near{name}").read_bytes() == (tmp_path / f"far{name}").read_bytes()
    # The run names its data, and reads it where that is now.
    trained("eval", tmp_path / "far", "--data", near, "--out", tmp_path / "moved")


def test_batches_from_a_url_are_those_from_a_folder(
    remote: str, near: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    for order in ("shuffled", "windowed"):
        far, local = (SliceLoader(place, batch_size=8, order=order, pin=False) for place in (remote, near))
        for one, other in zip(far, local, strict=True):
            assert np.array_equal(one.rows, other.rows) and np.array_equal(one.images, other.images)
    assert far._feed.threads == FAR_THREADS and local._feed.threads == 2


def test_a_size_that_is_none_is_refused(near: Path, tmp_path: Path) -> None:
    words = ("run", "--data", near, "--cache", tmp_path / "cache", "--cache-size", "much", "--out", tmp_path / "run")
    done = subprocess.run([TRAIN, *map(str, words)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and "cache_size" in done.stderr and "Traceback" not in done.stderr
