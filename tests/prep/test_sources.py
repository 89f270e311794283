"""What is listed, in which order, and what is refused."""

from __future__ import annotations

import gzip
import mmap
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ich_prep.errors import Reason, SliceError, SourceError, UsageError
from ich_prep.sources import FolderSource, SeveralSources, ZipSource, open_source, read_ahead, read_first
from tests.support.archives import Raw, content, raw_zip, zipped
from tests.support.page_cache import evict, pages_in_memory


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
    assert [table.path for table in listing.tables] == [f"{tmp_path}/Labels.CSV"]
    assert listing.tables[0].read() == b"ID,Label\n"


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
def test_a_source_without_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a_file").write_bytes(b"1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=name):
        open_source([tmp_path / name]).list()


# --- archives and gzip files in a folder -----------------------------------------------------------------------------


def write(root: Path, files: dict[str, bytes]) -> FolderSource:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return FolderSource(root)


def test_an_archive_in_a_folder_is_a_folder(tmp_path: Path) -> None:
    source = write(
        tmp_path, {"a/CQ500CT1.zip": raw_zip([Raw(b"s/1"), Raw(b"reads.csv", b"name,Category\n")]), "2": b"2"}
    )
    assert content(source) == {"2": b"2", "a/CQ500CT1/s/1": b"content"}
    (table,) = source.list().tables
    assert table.path.endswith("CQ500CT1.zip/reads.csv")
    assert table.read() == b"name,Category\n"
    assert source.list().folders() == {"", "a/CQ500CT1/s/"}


def test_an_archive_next_to_its_unpacked_folder_keeps_its_ending(tmp_path: Path) -> None:
    packed = raw_zip([Raw(b"1", b"packed")])
    source = write(tmp_path, {"a.zip": packed, "a/1": b"unpacked", "b.zip": packed, "b.ZIP": packed, ".zip": packed})
    assert content(source) == {
        "a/1": b"unpacked",
        "a.zip/1": b"packed",
        "b/1": b"packed",
        "b.zip/1": b"packed",
        ".zip/1": b"packed",
    }


def test_an_archive_in_an_archive_is_a_file(tmp_path: Path) -> None:
    inner = raw_zip([Raw(b"1")])
    assert content(write(tmp_path, {"a.zip": raw_zip([Raw(b"inner.zip", inner)])})) == {"a/inner.zip": inner}


def test_a_broken_archive_in_a_folder_is_a_file_with_a_reason(tmp_path: Path) -> None:
    good = raw_zip([Raw(b"1")])
    source = write(tmp_path, {"good.zip": good, "half.zip": good[:-30], "text.zip": b"<html>404</html>"})
    assert content(source) == {"good/1": b"content", "half.zip": Reason.BAD_ARCHIVE, "text.zip": Reason.BAD_ARCHIVE}
    details = [line["detail"] for line in source.list().files.to_pylist() if line["detail"]]
    assert all("no end record" in detail for detail in details) and len(details) == 2


def test_an_archive_that_may_not_be_read_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "gone.zip").symlink_to(tmp_path / "nowhere")
    assert content(FolderSource(tmp_path)) == {"gone.zip": Reason.UNREADABLE}


def test_a_gzip_file_is_the_file_in_it(tmp_path: Path) -> None:
    data = os.urandom(50_000) + bytes(50_000)
    source = write(
        tmp_path, {"1.dcm.gz": gzip.compress(data, mtime=0), "2.DCM.GZ": gzip.compress(b"2"), "notes.gz": b"as it is"}
    )
    assert content(source) == {"1.dcm": data, "2.DCM": b"2", "notes.gz": b"as it is"}
    (key,) = [line["key"] for line in source.list().files.to_pylist() if line["path"] == b"1.dcm"]
    assert read_first(source, key, 100) == data[:100]
    source.prefetch(key, 0)


def test_a_gzip_file_next_to_its_unpacked_file_keeps_its_ending(tmp_path: Path) -> None:
    source = write(tmp_path, {"1.dcm.gz": gzip.compress(b"packed"), "1.dcm": b"unpacked"})
    assert content(source) == {"1.dcm": b"unpacked", "1.dcm.gz": b"packed"}


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (gzip.compress(b"content", mtime=0)[:-4] + b"\x06\0\0\0", "stream"),
        (gzip.compress(b"content", mtime=0)[:-4] + b"\x08\0\0\0", "e"),  # zlib detects that itself: its message differs
        (gzip.compress(b"content", mtime=0)[:-8] + bytes(4) + b"\x07\0\0\0", "damaged deflate stream"),
        (b"not gzip at all \x07\0\0\0", "damaged deflate stream"),
        (gzip.compress(b"content", mtime=0) + gzip.compress(b"content", mtime=0), "one deflate stream"),
    ],
)
def test_a_damaged_gzip_file_is_refused_when_it_is_read(data: bytes, detail: str, tmp_path: Path) -> None:
    source = write(tmp_path, {"1.dcm.gz": data})
    (key,) = source.list().files["key"].to_pylist()
    with pytest.raises(SliceError) as caught:
        source.read_into(key, [bytearray(min(100, source.size(key)))], verify=True)
    assert caught.value.reason in (Reason.BAD_ARCHIVE, Reason.TOO_LARGE)
    assert detail in caught.value.detail or caught.value.reason == Reason.TOO_LARGE


@pytest.mark.parametrize("tail", [b"", gzip.compress(b"", mtime=0), bytes(64)])
def test_a_gzip_file_that_does_not_end_like_one_is_quarantined(tail: bytes, tmp_path: Path) -> None:
    data = gzip.compress(np.random.default_rng(0).bytes(4000), mtime=0)
    source = write(tmp_path, {"1.dcm.gz": data + tail if tail else data[:-1000]})
    assert content(source) == {"1.dcm.gz": "bad_archive"}


def test_a_broken_link_to_a_gzip_file_is_listed(tmp_path: Path) -> None:
    (tmp_path / "1.dcm.gz").symlink_to(tmp_path / "nowhere")
    assert FolderSource(tmp_path).list().files["path"].to_pylist() == [b"1.dcm.gz"]


# --- several sources -------------------------------------------------------------------------------------------------


def test_several_sources_are_folders_of_one(tmp_path: Path) -> None:
    write(tmp_path / "x" / "data", {"1": b"x", "labels.csv": b"ID"})
    write(tmp_path / "y" / "data", {"1": b"y"})
    (tmp_path / "data.zip").write_bytes(raw_zip([Raw(b"1", b"z")]))
    source = open_source([tmp_path / "x" / "data", tmp_path / "y" / "data", tmp_path / "data.zip"])
    assert content(source) == {"data/1": b"x", "data-2/1": b"y", "data-3/1": b"z"}
    listing = source.list()
    assert (listing.name, source.name) == ("", "")
    assert [table.read() for table in listing.tables] == [b"ID"]
    for key in listing.files["key"].to_pylist():
        source.prefetch(key, 0)


def test_a_source_whose_name_looks_numbered_does_not_collide(tmp_path: Path) -> None:
    parts = [write(tmp_path / name / end, {"1": b"1"}) for name, end in (("a", "d-2"), ("b", "d"), ("c", "d"))]
    assert SeveralSources(tuple(parts)).names() == ("d-2", "d", "d-3")


def test_the_same_source_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="twice"):
        open_source([tmp_path, tmp_path / "link"])
    with pytest.raises(UsageError, match="at least one"):
        open_source([])


# --- files are prefetched --------------------------------------------------------------------------------------------

FILE_PAGES = 64


def key_of(path: Path) -> bytes:
    return path.name.encode()


def soon(path: Path, pages: int) -> bool:
    deadline = time.monotonic() + 5
    while pages_in_memory(path) < pages and time.monotonic() < deadline:
        time.sleep(0.01)
    return pages_in_memory(path) >= pages


@pytest.fixture
def cold_files(tmp_path: Path) -> list[Path]:
    """Six files that are not in the page cache."""
    (tmp_path / "cold").mkdir()
    files = [tmp_path / "cold" / str(number) for number in range(6)]
    for path in files:
        path.write_bytes(os.urandom(FILE_PAGES * mmap.PAGESIZE))
    evict(*files)
    return files


def test_the_files_that_follow_are_fetched_and_no_more(cold_files: list[Path]) -> None:
    read = read_ahead(FolderSource(cold_files[0].parent), cold_files, key_of, files=2)
    assert next(read) == cold_files[0]
    assert all(soon(path, FILE_PAGES) for path in cold_files[:3])
    assert [pages_in_memory(path) for path in cold_files[3:]] == [0, 0, 0]
    assert next(read) == cold_files[1]
    assert soon(cold_files[3], FILE_PAGES)
    assert list(read) == cold_files[2:]


def test_only_the_bytes_asked_for_are_fetched(cold_files: list[Path]) -> None:
    source = FolderSource(cold_files[0].parent)
    assert list(read_ahead(source, cold_files, key_of, files=2, length=2 * mmap.PAGESIZE)) == cold_files
    assert all(soon(path, 2) for path in cold_files)
    assert max(map(pages_in_memory, cold_files)) < FILE_PAGES


def test_a_file_that_cannot_be_opened_is_left_to_its_reader(tmp_path: Path) -> None:
    names, source = [b"gone", b"folder"], FolderSource(tmp_path)
    assert list(read_ahead(source, names, lambda name: name, files=4)) == names
    assert list(read_ahead(source, [], lambda name: name, files=4)) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_of_an_archive_is_fetched_alone(method: int, cold_files: list[Path], tmp_path: Path) -> None:
    path = zipped(cold_files[0].parent, tmp_path / "cold.zip", method)
    source = ZipSource(path)
    keys = source.list().files["key"].to_pylist()
    evict(path)
    source.prefetch(keys[0], 0)
    assert soon(path, FILE_PAGES)
    assert pages_in_memory(path) < 3 * FILE_PAGES
    evict(path)
    source.prefetch(keys[3], 2 * mmap.PAGESIZE)
    assert soon(path, 2)
    assert pages_in_memory(path) < FILE_PAGES
