"""The elements of a DICOM file by pydicom, for what the skim leaves to it."""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, Final

from ich_prep.dicom.elements import (
    DEFLATED_LE,
    ELEMENTS,
    EXPLICIT_BE,
    IMPLICIT_LE,
    PIXEL_DATA,
    Elements,
)
from ich_prep.dicom.skim import (
    BLANKS,
    LONGEST_SKIM,
    NO_PREAMBLE,
    UNDEFINED,
    begins_like_dicom,
    decode_text,
    guess_syntax,
    has_prefix,
    is_text,
)
from ich_prep.errors import Reason, SliceError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from typing_extensions import Buffer

INFLATED_LIMIT: Final = 64 * 1024 * 1024


def read_with_pydicom(data: bytes, read_first: Callable[[int], bytes], *, stop: int = PIXEL_DATA) -> Elements:
    """Return the elements of the file that begins with ``data``, read by pydicom; ``read_first`` reads more of the file.

    It is read as far as the element ``stop``. Raises NOT_DICOM, BAD_HEADER or TOO_LARGE.
    """
    import pydicom
    from pydicom.filereader import read_dataset, read_preamble

    if not begins_like_dicom(data):
        raise SliceError(Reason.NOT_DICOM, "expected 'DICM' at byte 128, found other bytes")
    try:
        # pydicom warns about what it works around; unusable values are rejected later.
        with (
            warnings.catch_warnings(action="ignore"),
            pydicom.config.disable_value_validation(),
            _BoundedReader(_Beginning(data, read_first)) as file,
        ):
            read_preamble(file, force=True)
            meta = pydicom.filereader._read_file_meta_info(file)
            uid = meta.get("TransferSyntaxUID")
            stated = uid.rstrip(" \0") if isinstance(uid, str) else ""
            syntax = stated or guess_syntax(data, file.tell()) or ""
            stream: BinaryIO = file
            if syntax == DEFLATED_LE:
                stream = io.BytesIO(inflate(file.read()))
            big_endian = syntax == EXPLICIT_BE
            dataset = read_dataset(
                stream, syntax == IMPLICIT_LE, not big_endian, stop_when=lambda tag, _vr, _length: tag >= stop
            )
            values = _values_of(dataset)
            at = stream.tell()
            tail = stream.read(12)
    except (SliceError, OSError, MemoryError):
        raise
    except Exception as error:  # damaged bytes can raise any exception within pydicom
        raise SliceError(Reason.NOT_DICOM, f"pydicom: {type(error).__name__}: {error}"[:200]) from None
    if not syntax:
        raise SliceError(Reason.NOT_DICOM, "expected a TransferSyntaxUID in the file meta information, found none")
    flags = () if stated and has_prefix(data) else (NO_PREAMBLE,)
    # Explicit or implicit VR as found in the data set, which may contradict its transfer syntax.
    start = 8 if dataset.original_encoding[0] else 12
    if len(tail) < start:
        return Elements(syntax, values, None, None, flags)
    length = int.from_bytes(tail[start - 4 : start], "big" if big_endian else "little")
    return Elements(syntax, values, at + start, -1 if length == UNDEFINED else length, flags)


def _values_of(dataset: Dataset) -> dict[str, str | int]:
    """Return the wanted elements of ``dataset``, in the same form as the skim does."""
    values: dict[str, str | int] = {}
    for element in ELEMENTS:
        tag, vr, name = element.tag, element.vr, element.name
        if tag not in dataset:
            continue
        raw = dataset.get_item(tag)
        found = "" if raw is None else str(raw.VR or vr.decode())
        value = None if raw is None else raw.value
        if vr != b"US" and is_text(found.encode()) and isinstance(value, bytes):
            text = decode_text(value, vr, values.get("specific_character_set")).strip(BLANKS)
            if text:
                values[name] = text
        elif not element.optional:
            _store_number(values, vr, name, dataset, tag)
    return values


def _store_number(values: dict[str, str | int], vr: bytes, name: str, dataset: Dataset, tag: int) -> None:
    """Put the element of ``dataset`` at ``tag``, of VR US or of a binary VR, into ``values``."""
    from pydicom.multival import MultiValue

    try:
        value = dataset[tag].value
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can raise any exception within pydicom
        raise SliceError(Reason.BAD_HEADER, f"pydicom: {name}: {type(error).__name__}: {error}"[:200]) from None
    if vr == b"US":
        if isinstance(value, int):
            values[name] = value & 0xFFFF
    elif isinstance(value, str | int | float | MultiValue):
        parts = list(value) if isinstance(value, MultiValue) else [value]
        text = "\\".join(map(str, parts)).strip(BLANKS)
        if text:
            values[name] = text


class _BoundedReader(io.BufferedReader):
    """A reader that never allocates more than the largest header, whatever length an element states."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None else min(size, INFLATED_LIMIT))


class _Beginning(io.RawIOBase):
    """A file of which ever longer prefixes are read, each at least twice as long as the last, up to 64 MiB."""

    def __init__(self, data: bytes, read_first: Callable[[int], bytes]) -> None:
        self._data, self._read_first = data, read_first
        self._position, self._is_whole = 0, False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            self._read_up_to(INFLATED_LIMIT)
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        self._read_up_to(self._position + len(view))
        part = self._data[self._position : self._position + len(view)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _read_up_to(self, end: int) -> None:
        if end <= len(self._data) or self._is_whole:
            return
        length = min(max(end, 2 * len(self._data), LONGEST_SKIM), INFLATED_LIMIT)
        self._data = self._read_first(length)
        self._is_whole = len(self._data) < length or length == INFLATED_LIMIT


def inflate(data: bytes) -> bytes:
    """Return the inflated data set of a deflated file (PS3.5 A.5); raises TOO_LARGE beyond 64 MiB."""
    inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    inflated = inflater.decompress(data, INFLATED_LIMIT)
    if inflater.unconsumed_tail:
        raise SliceError(Reason.TOO_LARGE, f"expected at most {INFLATED_LIMIT} bytes after inflating, found more")
    return inflated
