"""Every error this project raises on purpose.

::

    IchError                      shown to the user as one message, exit code 1
    ├── UsageError                a command, recipe or argument that cannot be meant (exit code 2)
    ├── SourceError               a source tree that no layout recognises, or labels that do not fit it
    ├── BuildError                a build that cannot go on: other spec, too much quarantined, a task that keeps dying
    ├── DatasetError              a directory that is not a finished dataset of a version this code reads
    │   └── CorruptionError       a dataset whose bytes are not the ones that were written
    ├── TrainError                a training run that cannot start or go on
    └── SliceError                one file or slice that must be set aside; carries its quarantine reason
"""

from __future__ import annotations

import os
from enum import StrEnum


class Reason(StrEnum):
    """Why a file or slice is in the quarantine table: a closed set of words, part of the on-disk contract."""

    # Found while reading headers.
    UNREADABLE = "unreadable"  # the operating system would not give the bytes
    EMPTY_FILE = "empty_file"  # zero bytes
    BAD_PATH = "bad_path"  # a name that is not valid UTF-8 and so cannot stand in a table, or leads out of its archive
    BAD_ARCHIVE = "bad_archive"  # a broken archive, or a member that is damaged, encrypted or in an unsupported form
    NOT_DICOM = "not_dicom"  # no DICOM file meta information, or no data set that parses
    NOT_CT = "not_ct"  # another modality or SOP class, a DICOMDIR, a presentation state
    LOCALIZER = "localizer"  # a scout
    DERIVED = "derived"  # secondary capture, dose page, screen save, a reconstruction of other slices
    NO_PIXELS = "no_pixels"  # a CT header without PixelData
    MULTI_FRAME = "multi_frame"  # more than one frame where one slice is meant
    NOT_MONOCHROME = "not_monochrome"  # colour or palette
    BAD_HEADER = "bad_header"  # a required attribute is missing or has an impossible value
    UNSUPPORTED_SYNTAX = "unsupported_syntax"  # a transfer syntax without a decoder here
    TRUNCATED = "truncated"  # fewer bytes than the header promises
    SIZE_MISMATCH = "size_mismatch"  # more or other pixels than the header promises
    TOO_LARGE = "too_large"  # dimensions or an inflated size beyond what a CT slice can be
    # Found while planning.
    DUPLICATE = "duplicate"  # a second file with the same SOP Instance UID
    SCAN_TYPE = "scan_type"  # a contrast, bone or reformatted series that the layout leaves out
    # Found while decoding.
    CHANGED = "changed"  # the file is not the one whose header was read
    DECODE_FAILED = "decode_failed"  # the decoder refused the pixel data
    DECODER_DIED = "decoder_died"  # the decoder crashed, or ran out of its time or memory

    @property
    def is_damage(self) -> bool:
        """Whether a slice was lost to it; not so for a file that never was a slice of the dataset, or is there twice."""
        return self not in _NO_DAMAGE

    @property
    def may_pass(self) -> bool:
        """Whether it speaks of the machine rather than of the file: another run may find it mended."""
        return self in _MAY_PASS


_NO_DAMAGE = frozenset(
    (Reason.NOT_CT, Reason.LOCALIZER, Reason.DERIVED, Reason.MULTI_FRAME, Reason.NOT_MONOCHROME)
    + (Reason.DUPLICATE, Reason.SCAN_TYPE)
)
_MAY_PASS = frozenset((Reason.UNREADABLE, Reason.UNSUPPORTED_SYNTAX, Reason.DECODER_DIED))


class IchError(Exception):
    """Base of every error raised on purpose: its text says what was expected, what was found, what to do next."""


class UsageError(IchError):
    """A command line, recipe or argument that cannot be meant."""


class SourceError(IchError):
    """A source tree that no layout recognises, or labels that do not fit the files."""


class BuildError(IchError):
    """A build that cannot go on."""


class DatasetError(IchError):
    """A directory that is not a finished dataset of a version that this code reads."""


class CorruptionError(DatasetError):
    """A dataset whose bytes are not the ones that were written; the text names the file and, where known, the row."""


class TrainError(IchError):
    """A training run that cannot start or go on."""


def words_of(error: OSError) -> str:
    """Return what the operating system refused, and of which file where that is known."""
    where = "" if error.filename is None else f" ({os.fsdecode(error.filename)})"
    return f"{error.strerror or error}{where}"


class SliceError(IchError):
    """One file or slice to set aside: ``reason`` is a word of the quarantine table, ``detail`` a sentence."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[SliceError], tuple[Reason, str]]:
        return SliceError, (self.reason, self.detail)
