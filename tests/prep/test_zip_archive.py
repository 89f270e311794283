"""Zip archives: their members are the packed files, and no archive does harm."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.errors import Reason, SliceError, SourceError
from ich_prep.sources import FolderSource, ZipSource, inflate, read_first
from ich_prep.sources import member as members
from ich_prep.sources.zip_directory import ArchiveError, read_directory
from tests.support.archives import WINDOWS, Raw, content, deflate, raw_zip, zipped

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]


@pytest.fixture(params=["isal", "zlib"], autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with both libraries that inflate."""
    if request.param == "isal":
        monkeypatch.setattr(inflate, "_engine", pytest.importorskip("isal.isal_zlib"))
    else:
        monkeypatch.setattr(inflate, "_engine", zlib)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "archive.zip"


def source_of(archive: Path, *members: Raw, **more: object) -> ZipSource:
    archive.write_bytes(raw_zip([*members], **more))  # type: ignore[arg-type]
    return ZipSource(archive)


def refused(source: ZipSource) -> SliceError:
    """The error of reading the only file of a source."""
    (key,) = source.list().files["key"].to_pylist()
    with pytest.raises(SliceError) as caught:
        source.read_into(key, [bytearray(source.size(key))], verify=True)
    return caught.value


# --- members are the packed files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_members_are_the_files_of_the_tree(method: int, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name, data in {"b/2": b"two", "a": b"", "b/10": os.urandom(70_000), "B/1": b"x" * 200_000}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    source = ZipSource(zipped(tree, tmp_path / "tree.zip", method))
    assert content(source) == content(FolderSource(tree))
    folder, packed = FolderSource(tree).list(), source.list()
    assert folder.name == packed.name == "tree"
    for column in ("path", "size", "reason", "detail"):
        assert folder.files[column].equals(packed.files[column])


@given(
    data=st.binary(max_size=2000).map(lambda data: data * 30),
    offset=st.integers(0, 70_000),
    lengths=st.lists(st.integers(0, 30_000), min_size=1, max_size=3),
    method=st.sampled_from(METHODS),
)
@settings(max_examples=60, deadline=None)
def test_any_part_of_a_member_can_be_read(
    data: bytes, offset: int, lengths: list[int], method: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("part") / "archive.zip"
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("member", data)
        file.writestr("next", b"must not be read")
    source = ZipSource(path)
    key = source.list().files["key"][0].as_py()
    buffers = [bytearray(length) for length in lengths]
    got = source.read_into(key, buffers, offset)
    expected = data[offset : offset + sum(lengths)]
    assert got == len(expected)
    assert b"".join(buffers)[:got] == expected


def test_tables_are_not_among_the_files(archive: Path) -> None:
    source = source_of(archive, Raw(b"slice"), Raw(b"deep/Labels.CSV", b"ID,Label\n" * 9))
    assert [*content(source)] == ["slice"]
    (table,) = source.list().tables
    assert table.path == f"{archive}/deep/Labels.CSV"
    assert (table.read(), table.read(5), table.name) == (b"ID,Label\n" * 9, b"ID,La", "Labels.CSV")


def test_a_table_that_cannot_be_read_is_named(archive: Path) -> None:
    (table,) = source_of(archive, Raw(b"labels.csv", crc32=1), Raw(b"slice")).list().tables
    with pytest.raises(SourceError, match=r"labels\.csv; it cannot be read: CRC-32 mismatch"):
        table.read()


@pytest.mark.parametrize("zip64_end", [False, True])
def test_zip64_and_data_before_an_archive(zip64_end: bool, archive: Path) -> None:
    raw = [Raw(b"small"), Raw(b"large", b"data" * 999, zip64=True), Raw(b"stored", method=0, zip64=True)]
    source = source_of(archive, *raw, before=b"#!/bin/sh\n" * 99, zip64_end=zip64_end)
    assert content(source) == {"large": b"data" * 999, "small": b"content", "stored": b"content"}


def test_offsets_beyond_4_gib_are_followed(archive: Path) -> None:
    """A sparse archive whose last member is after a hole of 5 GiB: only its offset is in a Zip64 field."""
    far = 5 << 30
    one = raw_zip([Raw(b"far", b"found")])
    begin = one.index(b"PK\x01\x02")
    record = bytearray(one[begin : one.index(b"PK\x05\x06")])
    field = struct.pack("<HHQ", 1, 8, far)
    struct.pack_into("<H", record, 30, len(field))
    struct.pack_into("<I", record, 42, 0xFFFFFFFF)
    directory = bytes(record[:46]) + b"far" + field + b"why"
    end = far + begin + len(directory)
    tail = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, len(directory), far + begin)
    tail += struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    tail += struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with archive.open("wb") as file:
        file.seek(far)
        file.write(one[:begin] + directory + tail)
    assert content(ZipSource(archive)) == {"far": b"found"}


def test_the_local_extra_field_may_differ_in_length(archive: Path) -> None:
    raw = [Raw(b"a", method=method, extra=b"UT\x01\x00x", local_extra=b"\x0a\x00\x04\x00abcd" * 9) for method in (0, 8)]
    raw[1].name = b"b"
    assert content(source_of(archive, *raw)) == {"a": b"content", "b": b"content"}


def test_only_the_beginning_of_a_member_is_inflated(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(archive, Raw(b"member", os.urandom(1 << 20)))
    (key,) = source.list().files["key"].to_pylist()
    read = []
    pread = os.pread
    monkeypatch.setattr(members.os, "pread", lambda *given: read.append(given[1]) or pread(*given))
    assert len(read_first(source, key, 8192)) == 8192
    assert sum(read) < 40_000


# --- names -----------------------------------------------------------------------------------------------------------

UNICODE = b"\x75\x70" + struct.pack("<HBI", 5 + 5, 1, zlib.crc32(b"caf?")) + "café".encode()


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (Raw(b"deep\\er\\slice.dcm", made_on=WINDOWS), "deep/er/slice.dcm"),
        (Raw(b"deep/er\\slice.dcm", made_on=WINDOWS), "deep/er\\slice.dcm"),
        (Raw(b"deep\\slice.dcm"), "deep\\slice.dcm"),
        (Raw(b"caf\x82/1"), "café/1"),  # code page 437
        (Raw("café/1".encode(), flags=1 << 11), "café/1"),
        (Raw("café/1".encode()), "café/1"),  # UTF-8 without the flag: macOS
        (Raw(b"caf?", extra=UNICODE), "caf?"),  # ASCII: the Unicode name is not used
        (Raw(b"./a//b/./1"), "a/b/1"),
        (Raw(b"a\nb"), "a\nb"),
        (Raw(b"a..b/...c"), "a..b/...c"),
    ],
    ids=lambda value: str(value.name) if isinstance(value, Raw) else "",
)
def test_names_become_paths(raw: Raw, path: str, archive: Path) -> None:
    assert content(source_of(archive, raw)) == {path: b"content"}


def test_a_unicode_path_is_used_if_its_checksum_matches_the_name(archive: Path) -> None:
    name = b"\x81\xff"
    field = struct.pack("<HHBI", 0x7075, 5 + 3, 1, zlib.crc32(name)) + "ü1".encode()
    stale = struct.pack("<HHBI", 0x7075, 5 + 3, 1, 0) + "ü2".encode()
    assert [*content(source_of(archive, Raw(name, extra=field)))] == ["ü1"]
    assert [*content(source_of(archive, Raw(name, extra=stale)))] == [name.decode("cp437")]


def test_a_name_that_says_it_is_utf8_and_is_not_keeps_its_bytes(archive: Path) -> None:
    listing = source_of(archive, Raw(b"caf\xe9", flags=1 << 11)).list()
    assert listing.files["path"].to_pylist() == [b"caf\xe9"]  # the scan calls it bad_path
    assert listing.folders() == {""}


def test_folders_are_not_files(archive: Path) -> None:
    raw = [Raw(b"a/", b"", 0), Raw(b"b\\", b"", 0, made_on=WINDOWS), Raw(b"./", b"", 0), Raw(b"a/1")]
    assert [*content(source_of(archive, *raw))] == ["a/1"]


@pytest.mark.parametrize(
    "name", [b"/etc/passwd", b"../up", b"a/../../up", b"C:/x", b"C:x", b"..", b"nul\0l", b"a/.."], ids=repr
)
def test_a_name_that_leads_out_of_the_archive_is_refused(name: bytes, archive: Path) -> None:
    assert [*content(source_of(archive, Raw(name), Raw(b"1"))).values()].count(Reason.BAD_PATH) == 1


def test_a_name_with_backslashes_that_leads_out_is_refused(archive: Path) -> None:
    source = source_of(archive, Raw(b"..\\..\\up", made_on=WINDOWS))
    assert content(source) == {"../../up": Reason.BAD_PATH}


def test_of_members_with_one_name_the_last_wins(archive: Path) -> None:
    raw = [Raw(b"1", b"first"), Raw(b"2"), Raw(b"1", b"second"), Raw(b"./1", b"third")]
    files = source_of(archive, *raw).list().files
    assert files["path"].to_pylist() == [b"1", b"1", b"1", b"2"]
    assert files["reason"].to_pylist() == [Reason.DUPLICATE, Reason.DUPLICATE, None, None]
    assert content(ZipSource(archive))["1"] == b"third"


# --- members that cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "detail"),
    [
        (Raw(b"1", flags=1), "not encrypted"),
        (Raw(b"1", flags=1 << 6), "not encrypted"),
        (Raw(b"1", flags=1 << 13), "not encrypted"),
        (Raw(b"1", b"/etc/passwd", 0, mode=0o120777), "symbolic link"),
        (Raw(b"1", method=9), "compression method 9"),
        (Raw(b"1", method=93), "compression method 93"),
        (Raw(b"1", method=0xFFFF), "compression method 65535"),
        (Raw(b"1", method=0, size=99), "two different sizes"),
        (Raw(b"1", compressed_size=1 << 20), "shares bytes with"),
        (Raw(b"1", offset=1 << 31), "shares bytes with"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_member_that_cannot_be_read_has_a_reason(raw: Raw, detail: str, archive: Path) -> None:
    files = source_of(archive, Raw(b"0"), raw).list().files.to_pylist()
    assert [line["reason"] for line in files] == [None, Reason.BAD_ARCHIVE]
    assert detail in files[1]["detail"]


def test_members_that_share_bytes_are_refused(archive: Path) -> None:
    """The better zip bomb: many members, one kernel."""
    raw = [
        Raw(b"0", b"x" * 1000, 0),
        Raw(b"1", b"x" * 1000, 0, offset=0),
        Raw(b"2", b"x" * 500, 0, offset=300),
        Raw(b"3"),
    ]
    found = content(source_of(archive, *raw))
    assert found == {**dict.fromkeys("012", Reason.BAD_ARCHIVE), "3": b"content"}


@pytest.mark.parametrize(
    ("raw", "detail"),
    [
        (Raw(b"1", size=6), "expected 6 bytes after inflating, found more"),
        (Raw(b"1", size=8), "expected 8 bytes after inflating, found 7"),
        (Raw(b"1", crc32=0), "CRC-32 mismatch: the archive says 00000000, computed fec530a9"),
        (Raw(b"1", method=0, crc32=0), "CRC-32 mismatch: the archive says 00000000, computed fec530a9"),
        (Raw(b"1", local_method=0), "expected compression method 8, the member's own header says 0"),
        (Raw(b"1", compressed_size=4), "expected 7 bytes after inflating"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_inconsistent_member_is_refused_when_it_is_read(raw: Raw, detail: str, archive: Path) -> None:
    assert zlib.crc32(b"content") == 0xFEC530A9
    error = refused(source_of(archive, raw))
    assert error.reason == Reason.BAD_ARCHIVE
    assert detail in error.detail


def test_a_bomb_is_inflated_only_to_its_stated_size(archive: Path) -> None:
    bomb = deflate(bytes(1 << 28))
    assert len(bomb) < 300_000
    source = source_of(archive, Raw(b"1", bomb, 0))
    data = bytearray(archive.read_bytes())
    for signature, method, sizes in ((b"PK\x03\x04", 8, None), (b"PK\x01\x02", 10, 20)):
        at = data.index(signature)
        struct.pack_into("<H", data, at + method, 8)
        if sizes:
            struct.pack_into("<II", data, at + sizes, len(bomb), 500_000)
    archive.write_bytes(data)
    error = refused(source)
    assert (error.reason, error.detail) == (Reason.BAD_ARCHIVE, "expected 500,000 bytes after inflating, found more")


def test_a_bomb_with_its_true_size_is_too_large(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "LARGEST_MEMBER", 1 << 20)
    for method in METHODS:
        source = source_of(archive, Raw(b"1", bytes(3 << 20), method))
        (key,) = source.list().files["key"].to_pylist()
        buffer = bytearray(1000)
        assert source.read_into(key, [buffer]) == 1000
        with pytest.raises(SliceError) as caught:
            source.read_into(key, [buffer], verify=True)
        assert caught.value.reason == Reason.TOO_LARGE


@pytest.mark.parametrize("method", [0, 8])
@pytest.mark.parametrize("place", range(0, 60, 3))
def test_a_damaged_member_is_an_error(place: int, method: int, archive: Path) -> None:
    data = bytes(range(200)) * 3
    source = source_of(archive, Raw(b"member", data, method))
    (key,) = source.list().files["key"].to_pylist()
    damaged = bytearray(archive.read_bytes())
    damaged[36 + place] ^= 0x55
    archive.write_bytes(damaged)
    buffer = bytearray(len(data))
    with pytest.raises(SliceError) as caught:
        source.read_into(key, [buffer], verify=True)
    assert caught.value.reason == Reason.BAD_ARCHIVE


def test_a_replaced_archive_is_an_error(archive: Path) -> None:
    source = source_of(archive, Raw(b"member", bytes(9000)))
    (key,) = source.list().files["key"].to_pylist()
    archive.write_bytes(b"short")
    with pytest.raises(SliceError, match="expected a member at byte 0"):
        source.read_into(key, [bytearray(9000)], verify=True)
    archive.unlink()
    with pytest.raises(FileNotFoundError):
        source.read_into(key, [bytearray(9000)], verify=True)
    source.prefetch(key, 0)


# --- archives that cannot be read ------------------------------------------------------------------------------------


def broken(archive: Path) -> str:
    with pytest.raises(SourceError) as caught:
        ZipSource(archive).list()
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 10, 0.5, 0.9, -5])
def test_a_truncated_archive_is_refused(kept: float, archive: Path) -> None:
    data = raw_zip([Raw(f"{number}".encode(), os.urandom(100)) for number in range(20)])
    archive.write_bytes(data[: int(kept * len(data)) if 0 < kept < 1 else int(kept)])
    text = broken(archive)
    assert str(archive) in text and "Fetch it again" in text
    assert "no end record" in text or "not where its end record says" in text


def test_a_file_that_is_not_an_archive_is_refused(archive: Path) -> None:
    archive.write_bytes(b"\x1f\x8b not a zip archive" * 9)
    assert "no end record" in broken(archive)


def test_an_inconsistent_directory_is_refused(archive: Path) -> None:
    good = raw_zip([Raw(b"1"), Raw(b"2")])
    begin = good.index(b"PK\x01\x02")
    archive.write_bytes(raw_zip([Raw(b"1"), Raw(b"2")], count=3))
    assert "lists 2 members, and its end record says 3" in broken(archive)
    archive.write_bytes(good[:begin] + b"XX" + good[begin + 2 :])
    assert "directory is damaged" in broken(archive)
    archive.write_bytes(good[: begin + 28] + b"\xff\x7f" + good[begin + 30 :])
    assert "ends within a record" in broken(archive)
    archive.write_bytes(good.replace(b"PK\x05\x06\0\0", b"PK\x05\x06\1\0"))
    assert "one part of a split archive" in broken(archive)


def test_missing_zip64_numbers_are_refused(archive: Path) -> None:
    data = bytearray(raw_zip([Raw(b"1")]))
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 42, 0xFFFFFFFF)
    archive.write_bytes(data)
    assert "no Zip64 field" in broken(archive)
    data = bytearray(raw_zip([Raw(b"1", zip64=True)]))
    at = data.index(b"PK\x01\x02") + 46 + 1 + 4
    struct.pack_into("<QQQ", data, at, 1 << 63, 1, 1)
    archive.write_bytes(data)
    assert "impossible size" in broken(archive)


def test_a_missing_zip64_end_record_is_refused(archive: Path) -> None:
    data = raw_zip([Raw(b"1")], zip64_end=True)
    archive.write_bytes(data.replace(b"PK\x06\x06", b"XXXX"))
    assert "Zip64 end record" in broken(archive)


def test_an_empty_archive_is_refused(archive: Path) -> None:
    archive.write_bytes(raw_zip([Raw(b"folder/", b"", 0)]))
    assert "Expected DICOM files" in broken(archive)


@given(place=st.floats(0, 1), value=st.integers(0, 255), cut=st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_a_damaged_archive_gives_files_or_an_error(
    place: float, value: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = [Raw(b"1", b"x" * 300), Raw(b"caf\x82", b"y" * 50, 0, zip64=True), Raw(b"a\\b", made_on=WINDOWS)]
    data = bytearray(raw_zip(raw, zip64_end=True))
    data[int(place * (len(data) - 1))] = value
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    path.write_bytes(data[: len(data) - (cut if cut < 60 else 0)])
    source = ZipSource(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        read_directory(descriptor)
    except ArchiveError as error:
        assert str(error)
    finally:
        os.close(descriptor)
    try:
        files = source.list().files.to_pylist()
    except SourceError:
        return
    for line in files:
        if line["reason"] is None and line["size"] < 1 << 20:
            try:
                source.read_into(line["key"], [bytearray(line["size"])], verify=True)
            except SliceError as error:
                assert error.reason in (Reason.BAD_ARCHIVE, Reason.TOO_LARGE)
