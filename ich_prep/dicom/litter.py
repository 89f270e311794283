"""Which files that are not DICOM are litter, by their name and first bytes, and which may be damaged slices."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Final

from ich_prep.dicom.skim import has_prefix
from ich_prep.errors import Reason, SliceError
from ich_prep.files import is_litter

FIRST_BYTES: Final = 1 << 20

# First bytes that belong to no slice, whatever the file is called.
_SIGNATURES: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"\x00\x05\x16\x07", "an AppleDouble file of a Mac"),
    (0, b"\x00\x05\x16\x00", "an AppleSingle file of a Mac"),
    (0, b"\x00\x00\x00\x01Bud1", "a .DS_Store of a Mac"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a compound file, such as Thumbs.db or an old office document"),
    (0, b"\x4c\x00\x00\x00\x01\x14\x02\x00\x00\x00\x00\x00\xc0\x00\x00\x00", "a Windows shortcut"),
    (0, b"\x7fELF", "a program"),
    (0, b"\xfe\xed\xfa\xce", "a program"),
    (0, b"\xfe\xed\xfa\xcf", "a program"),
    (0, b"\xce\xfa\xed\xfe", "a program"),
    (0, b"\xcf\xfa\xed\xfe", "a program"),
    (0, b"\xca\xfe\xba\xbe", "a program"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "a JPEG 2000 picture"),
    (0, b"GIF87a", "a GIF picture"),
    (0, b"GIF89a", "a GIF picture"),
    (0, b"II*\x00", "a TIFF picture"),
    (0, b"MM\x00*", "a TIFF picture"),
    (0, b"II+\x00", "a TIFF picture"),
    (0, b"MM\x00+", "a TIFF picture"),
    (8, b"WEBP", "a WebP picture"),
    (8, b"AVI ", "a video"),
    (8, b"WAVE", "a sound"),
    (4, b"ftyp", "a video"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (0, b"%PDF-", "a PDF"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"{\\rtf", "an RTF document"),
    (0, b"PK\x03\x04", "a zip archive or an office document"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (0, b"PK\x07\x08", "a part of a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"7z\xbc\xaf'\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ\x00", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (0, b"MSCF\x00\x00\x00\x00", "a cabinet archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"SQLite format 3\x00", "a database"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (344, b"n+1\x00", "a NIfTI volume"),
    (344, b"ni1\x00", "a NIfTI header"),
)
_DICOM_ENDINGS: Final = (".dcm", ".dicom", ".ima")
# Names of files that hold no slice, so that they may be empty.
_OTHER_ENDINGS: Final = re.compile(
    r"\.(?:txt|md|log|csv|tsv|json|xml|html?|css|js|ya?ml|toml|ini|inf|cfg|db|lnk|url|exe|dll|msi|bat|cmd|sh|py|jar|class|"
    r"jpe?g|png|gif|bmp|tiff?|webp|ico|svg|pdf|docx?|xlsx?|pptx?|rtf|odt|ods|zip|gz|tgz|bz2|xz|7z|rar|tar|nii|npy|npz|"
    r"mp4|avi|mov|tmp|bak|swp|lock|md5|sha1|sha256)$"
)
_TEXT_CONTROLS: Final = frozenset(b"\t\n\v\f\r\x1b")


def judge_unreadable(path: str, data: bytes, error: SliceError) -> SliceError:
    """Return why a file is quarantined that cannot be read as far as its modality: damage, or NOT_AN_IMAGE.

    ``path`` is relative to the source, ``data`` are its first bytes, ``error`` says why it cannot be read. First bytes that
    belong to no slice decide, then names of litter. Text under the name of a slice is damage: a download that failed.
    """
    name = path.rsplit("/", 1)[-1].lower()
    named_litter = is_litter(PurePosixPath(path))
    if not data:
        return _litter("an empty file") if named_litter or _OTHER_ENDINGS.search(name) else error
    if has_prefix(data):
        return error
    kind = _kind_by_first_bytes(data)
    if kind is not None:
        return _litter(kind)
    if named_litter:
        return _litter("a file that its name shows to be litter")
    if name.endswith(_DICOM_ENDINGS) or not any(data):
        return error
    return _litter("text" if _is_text(data[:4096]) else "a file without a sign of DICOM")


def _litter(kind: str) -> SliceError:
    return SliceError(Reason.NOT_AN_IMAGE, f"expected a DICOM file, found {kind}")


def _kind_by_first_bytes(data: bytes) -> str | None:
    for offset, signature, kind in _SIGNATURES:
        if data.startswith(signature, offset):
            return kind
    if data.startswith(b"BM") and data[6:10] == bytes(4) and len(data) > 14:
        return "a BMP picture"
    if data.startswith(b"MZ") and len(data) >= 64:
        header = int.from_bytes(data[60:64], "little")
        if data[header : header + 2] in (b"PE", b"NE", b"LE") or b"This program" in data[:512]:
            return "a program"
    return None


def _is_text(data: bytes) -> bool:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True  # UTF-16 with its mark
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if error.start < len(data) - 3:
            return False
    return all(byte >= 32 or byte in _TEXT_CONTROLS for byte in data)
