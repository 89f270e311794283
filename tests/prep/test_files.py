"""Only regular files are opened: real FIFOs, sockets, devices and links, and nothing that waits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ich_prep.build_dataset import build
from ich_prep.dataset import open_dataset
from ich_prep.errors import CorruptionError, DatasetError
from ich_prep.files import NotRegularError, is_litter, open_regular, read_regular
from ich_prep.sources import FolderSource
from tests.support.cli import PREP, SMALL

Make = Callable[[Path], None]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_fifo(path: Path) -> None:
    elsewhere = path.parent.with_name(f"{path.parent.name}.fifo")  # not in the same tree
    os.mkfifo(elsewhere)
    path.symlink_to(elsewhere)


def unix_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path is at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


SPECIAL: dict[Make, str] = {
    fifo: "found a FIFO (named pipe)",
    link_to_fifo: "found a FIFO (named pipe)",
    unix_socket: "found a socket",
    device: "found a character device",
    link_to_itself: "Too many levels of symbolic links",
}
each = pytest.mark.parametrize("make", SPECIAL, ids=lambda make: make.__name__)


@each
def test_what_is_no_regular_file_is_refused_and_named(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(OSError) as raised:
        open_regular(tmp_path / "x")
    assert SPECIAL[make] in str(raised.value.strerror)
    assert os.fsdecode(raised.value.filename) == str(tmp_path / "x")


def test_links_to_regular_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "one").symlink_to("file")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    assert read_regular(tmp_path / "two") == b"content"


def test_nothing_stays_open_after_a_refusal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(NotRegularError):
            open_regular(tmp_path / "x")
    assert len(os.listdir("/proc/self/fd")) == before


@each
@pytest.mark.parametrize("name", ["slice.dcm", "more.csv", "archive.zip", "slice.dcm.gz"])
def test_special_files_in_a_source_are_quarantined(make: Make, name: str, phantom_tree: Path, tmp_path: Path) -> None:
    """One beside the slices costs itself only, whatever its name says."""
    src = tmp_path / "src"
    src.mkdir()
    for below in ("stage_2_train", "stage_2_test"):
        (src / below).symlink_to(phantom_tree / below)
    for table in phantom_tree.glob("*.csv"):
        (src / table.name).symlink_to(table)
    (src / "loop").symlink_to(".")
    make(src / name)
    if name == "more.csv" and make is link_to_itself:
        return  # a table that cannot be read, which is refused below
    build(src, tmp_path / "d.zarr", SMALL, workers=0)
    lines = open_dataset(tmp_path / "d.zarr").read_table("quarantine").to_pylist()
    special = [line for line in lines if line["path"].startswith(name.removesuffix(".gz").removesuffix(".zip"))]
    assert [line["reason"] for line in special] == ["unreadable"]
    assert SPECIAL[make] in special[0]["detail"]


def test_a_file_that_becomes_a_fifo_after_the_listing_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "1.dcm").write_bytes(b"x" * 10)
    source = FolderSource(tmp_path)
    key = source.list().files["key"][0].as_py()
    (tmp_path / "1.dcm").unlink()
    os.mkfifo(tmp_path / "1.dcm")
    source.prefetch(key, 0)
    for read in (lambda: source.read_into(key, [bytearray(4)]), lambda: source.size(key)):
        with pytest.raises(NotRegularError, match="FIFO"):
            read()


@each
@pytest.mark.parametrize("option", ["--recipe", "--labels", "--src"])
def test_a_special_file_as_an_argument_is_refused_at_once(
    make: Make, option: str, phantom_tree: Path, tmp_path: Path
) -> None:
    given = tmp_path / ("x.zip" if option == "--src" else "x.csv")
    make(given)
    words = ["build", "--out", tmp_path / "d.zarr", "--workers", "0", option, given]
    words += [] if option == "--src" else ["--src", phantom_tree]
    done = subprocess.run([PREP, *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (1, 2), done.stderr
    assert str(given) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "d.zarr").exists()


@each
@pytest.mark.parametrize("name", ["zarr.json", "images/c/0/0/0/0", "labels/slices.1.parquet"])
def test_a_special_file_in_a_dataset_is_refused_at_once(
    make: Make, name: str, dataset_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "d.zarr"
    for path in dataset_path.rglob("*"):
        if path.is_file():
            (out / path.relative_to(dataset_path)).parent.mkdir(parents=True, exist_ok=True)
            (out / path.relative_to(dataset_path)).symlink_to(path)
    if not (out / name).exists():
        name = str(next((out / "labels").glob("slices*.parquet")).relative_to(out))
    assert open_dataset(out).read([0]).shape[0] == 1  # a tree of links is a dataset
    (out / name).unlink()
    make(out / name)
    with pytest.raises((DatasetError, CorruptionError, OSError)) as raised:
        dataset = open_dataset(out)
        assert dataset.slices
        dataset.read([0])
    assert str(out / name) in str(raised.value)
    script = f"from ich_prep.cli import main; import sys; sys.argv = ['ich-prep', 'verify', {str(out)!r}]; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [".DS_Store", "a/._x.dcm", "Thumbs.db", "desktop.ini", "a/@eaDir/x@SynoEAStream"])
def test_litter(name: str) -> None:
    assert is_litter(Path(name))


@pytest.mark.parametrize("name", ["zarr.json", "images/c/0/0/0/0", "DS_Store", "x._y", "thumbs.dbx"])
def test_no_litter(name: str) -> None:
    assert not is_litter(Path(name))
