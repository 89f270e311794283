"""What is listed, in which order, and what is refused."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import pytest
from page_cache import evict, pages_in_memory

from ich_prep.errors import SourceError
from ich_prep.sources import FolderSource, read_ahead


def paths(root: Path) -> list[bytes]:
    found: list[bytes] = FolderSource(root).list().files["path"].to_pylist()
    return found


def test_files_are_listed_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    for name in ("b/2", "a", "b/10", "B/1", "b-"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    listing = FolderSource(tmp_path).list()
    assert listing.files["path"].to_pylist() == [b"B/1", b"a", b"b-", b"b/10", b"b/2"]
    assert listing.files["size"].to_pylist() == [2] * 5


def test_tables_are_not_among_the_files(tmp_path: Path) -> None:
    (tmp_path / "slice").write_bytes(b"1")
    (tmp_path / "Labels.CSV").write_text("ID,Label\n")
    listing = FolderSource(tmp_path).list()
    assert listing.files["path"].to_pylist() == [b"slice"]
    assert listing.tables == (Path("Labels.CSV"),)


def test_names_may_hold_any_byte(tmp_path: Path) -> None:
    names = [b"a\nb.dcm", b"\xff\xfe", "ü".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"1")
    assert paths(tmp_path) == sorted(names)


def test_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1").write_bytes(b"1")
    (tmp_path / "src" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "src")
    (tmp_path / "src" / "broken").symlink_to(tmp_path / "nowhere")
    assert paths(tmp_path / "src") == [b"broken", b"link/1"]


@pytest.mark.parametrize("name", ["nothing", "a_file", "empty"])
def test_what_holds_no_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a_file").write_bytes(b"1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=name):
        FolderSource(tmp_path / name).list()


# --- files are asked for before their turn ---------------------------------------------------------------------------

FILE_PAGES = 64


def soon(path: Path, pages: int) -> bool:
    deadline = time.monotonic() + 5
    while pages_in_memory(path) < pages and time.monotonic() < deadline:
        time.sleep(0.01)
    return pages_in_memory(path) >= pages


@pytest.fixture
def cold_files(tmp_path: Path) -> list[Path]:
    """Six files of which nothing lies in the page cache."""
    files = [tmp_path / str(number) for number in range(6)]
    for path in files:
        path.write_bytes(os.urandom(FILE_PAGES * mmap.PAGESIZE))
    evict(*files)
    return files


def test_the_files_that_follow_are_fetched_and_no_more(cold_files: list[Path]) -> None:
    read = read_ahead(cold_files, str, files=2)
    assert next(read) == cold_files[0]
    assert all(soon(path, FILE_PAGES) for path in cold_files[:3])
    assert [pages_in_memory(path) for path in cold_files[3:]] == [0, 0, 0]
    assert next(read) == cold_files[1]
    assert soon(cold_files[3], FILE_PAGES)
    assert list(read) == cold_files[2:]


def test_only_the_bytes_asked_for_are_fetched(cold_files: list[Path]) -> None:
    assert list(read_ahead(cold_files, str, files=2, length=2 * mmap.PAGESIZE)) == cold_files
    assert all(soon(path, 2) for path in cold_files)
    assert max(map(pages_in_memory, cold_files)) < FILE_PAGES


def test_a_file_that_cannot_be_opened_is_left_to_its_reader(tmp_path: Path) -> None:
    assert list(read_ahead(["gone", "folder"], lambda name: str(tmp_path / name), files=4)) == ["gone", "folder"]
    assert list(read_ahead([], str, files=4)) == []
