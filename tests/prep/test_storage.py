"""Files of a dataset: written completely or not at all; sizes; URLs are refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ich_prep.dataset import storage
from ich_prep.errors import UsageError


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        storage.write_whole(tmp_path / "taken", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_files_get_the_permissions_that_the_user_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        storage.write_whole(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "url", ["s3://bucket/x.zarr", "gs://b/x", "https://host/x", "file:///data", Path("s3://bucket/x")]
)
def test_a_url_is_refused_and_no_folder_is_made_of_it(url: str | Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--out is a URL"):
        storage.local_path(url, "--out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["data.zarr", "./a:b/c", "/data/x", "s3", "a:b", "/a/s3:/b", "./x:/y"])
def test_a_path_is_unchanged(path: str) -> None:
    assert storage.local_path(path, "--out") == Path(path)


def test_a_missing_file_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert storage.size_of(tmp_path / "file") == 5
    assert storage.size_of(tmp_path / "none") is None


def test_leftovers_of_one_file_are_removed(tmp_path: Path) -> None:
    for name in ("shard", ".shard.0123", ".other.0123"):
        (tmp_path / name).touch()
    storage.clear_leftovers(tmp_path / "shard")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.0123", "shard"]
