"""Litter beside slices, and files that may be damaged slices."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from ich_prep.errors import Reason
from ich_prep.sources import FolderSource
from ich_prep.stages.scan import scan_file

SliceBytes = Callable[..., bytes]

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8)


def picture(ending: str) -> bytes:
    return bytes(cv2.imencode(ending, PIXELS)[1])


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("a.txt", "a")
    else:
        with tarfile.open(fileobj=out, mode="w:" + kind) as tar:
            tar.addfile(tarfile.TarInfo("a"))
    return out.getvalue()


APPLE_DOUBLE = bytes.fromhex("00051607000200004d6163204f53205820202020202020200002") + bytes(4070)
PROGRAM = b"MZ" + bytes(58) + (64).to_bytes(4, "little") + b"PE\0\0" + bytes(100)

# What the first bytes show, whatever the name.
SIGNED = {
    "AppleDouble": APPLE_DOUBLE,
    "DS_Store": b"\0\0\0\1Bud1" + bytes(6140),
    "Thumbs.db": bytes.fromhex("d0cf11e0a1b11ae1") + bytes(1016),
    "exe": PROGRAM,
    "elf": b"\x7fELF" + bytes(60),
    "jpg": picture(".jpg"),
    "png": picture(".png"),
    "bmp": picture(".bmp"),
    "tiff": picture(".tiff"),
    "webp": picture(".webp"),
    "gif": b"GIF89a" + bytes(40),
    "pdf": b"%PDF-1.7\n",
    "zip": archive("zip"),
    "tar": archive(""),
    "tgz": archive("gz"),
    "bz2": archive("bz2"),
    "xz": archive("xz"),
    "gz": gzip.compress(b"a"),
    "7z": b"7z\xbc\xaf'\x1c" + bytes(20),
    "rar": b"Rar!\x1a\x07\x01\0" + bytes(20),
}


def reason_of(folder: Path, name: str, data: bytes) -> Reason:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    key = os.fsencode(name)
    line = scan_file(FolderSource(folder), key, key)
    assert line["detail"].startswith("expected ")
    return Reason(line["reason"])


@pytest.mark.parametrize("kind", SIGNED)
@pytest.mark.parametrize("name", ["a/litter", "a/._IM1.dcm", "a/IM1.dcm", "a/IM1.IMA"])
def test_first_bytes_of_litter_win_over_the_name(kind: str, name: str, tmp_path: Path) -> None:
    assert reason_of(tmp_path, name, SIGNED[kind]) == Reason.NOT_AN_IMAGE
    assert not Reason.NOT_AN_IMAGE.is_damage


@pytest.mark.parametrize(
    "name",
    ["desktop.ini", "s/Desktop.INI", "s/@eaDir/IM1.dcm", "s/IM1.dcm@SynoEAStream", "__MACOSX/s/IM1.dcm", "s/._IM2.dcm",
     "s/.DS_Store", "s/Thumbs.db", "README", "notes.txt", "viewer/run.bin"],
)  # fmt: skip
def test_names_of_litter_are_recognised_whatever_is_in_it(name: str, tmp_path: Path) -> None:
    assert reason_of(tmp_path, name, b"\x91\x02\xfe" * 300) == Reason.NOT_AN_IMAGE


@pytest.mark.parametrize("text", ["no DICOM", "<html>404</html>", '<?xml version="1.0"?>', "Größe, é"])
def test_text_is_litter_unless_it_has_the_name_of_a_slice(text: str, tmp_path: Path) -> None:
    assert reason_of(tmp_path, "a/readme", text.encode()) == Reason.NOT_AN_IMAGE
    assert reason_of(tmp_path, "a/readme2", text.encode("utf-16")) == Reason.NOT_AN_IMAGE
    assert reason_of(tmp_path, "a/IM1.dcm", text.encode()) == Reason.NOT_DICOM  # a download that failed


@pytest.mark.parametrize("name", ["IM1.dcm", "IM1.DCM", "IM1.dicom", "IM1.ima", "IM1.IMA"])
def test_noise_under_the_name_of_a_slice_is_damage(name: str, tmp_path: Path) -> None:
    assert reason_of(tmp_path, name, b"\x91\x02\xfe" * 3000) == Reason.NOT_DICOM


def test_a_prefix_or_zeros_only_are_damage(tmp_path: Path) -> None:
    assert reason_of(tmp_path, "IM1", bytes(128) + b"DICM" + b"\xff" * 500) == Reason.NOT_DICOM
    assert reason_of(tmp_path, "IM2", bytes(70_000)) == Reason.NOT_DICOM
    assert reason_of(tmp_path, "IM3", bytes(70_000) + b"\1") == Reason.NOT_AN_IMAGE
    assert Reason.NOT_DICOM.is_damage


def test_an_empty_file_is_damage_unless_its_name_is_of_no_slice(tmp_path: Path) -> None:
    assert reason_of(tmp_path, "IM1", b"") == Reason.EMPTY_FILE
    assert reason_of(tmp_path, "IM1.dcm", b"") == Reason.EMPTY_FILE
    assert reason_of(tmp_path, ".nomedia", b"") == Reason.NOT_AN_IMAGE
    assert reason_of(tmp_path, "build.log", b"") == Reason.NOT_AN_IMAGE


def test_a_slice_under_a_name_of_litter_is_a_slice(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    for name in ("Thumbs.db", "._IM1.dcm", "@eaDir/1.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(slice_bytes())
        assert scan_file(FolderSource(tmp_path), os.fsencode(name), os.fsencode(name)).get("reason") is None
