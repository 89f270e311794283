"""Every error this project raises on purpose.

::

    IchError                      shown to the user as one message, exit code 1
    ├── UsageError                an invalid command, recipe or argument (exit code 2)
    ├── SourceError               a source tree that no layout recognises, or labels that do not match it
    ├── BuildError                a build that cannot continue: another spec, too many damaged files, a failing task
    ├── DatasetError              a directory that is not a finished dataset of a version this code reads
    │   └── CorruptionError       a dataset whose bytes are not the ones that were written
    ├── StoreError                an object store that refuses a request, or does not answer
    ├── InterruptError            Ctrl-C, with how to resume (exit code 130)
    ├── TrainError                a training run that cannot start or continue
    └── SliceError                one file or slice to quarantine, with the reason
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum
from typing import Final


class Reason(StrEnum):
    """Why a file or slice is in the quarantine table: a closed set of words, part of the on-disk contract."""

    # Found while reading headers.
    UNREADABLE = "unreadable"  # the operating system could not read the bytes
    EMPTY_FILE = "empty_file"  # zero bytes
    BAD_PATH = "bad_path"  # a name that is not valid UTF-8, or leads out of its archive
    BAD_ARCHIVE = "bad_archive"  # a broken archive, or a member that is damaged, encrypted or in an unsupported form
    NOT_DICOM = "not_dicom"  # by its name or first bytes a DICOM file, but it cannot be read as far as its modality
    NOT_AN_IMAGE = "not_an_image"  # litter beside the slices: thumbnails, text, pictures, archives, programs
    NOT_CT = "not_ct"  # another modality or SOP class, a DICOMDIR, a presentation state
    LOCALIZER = "localizer"  # a scout
    DERIVED = "derived"  # secondary capture, dose page, screen save, a projection or rendering of slices
    NOT_AXIAL = "not_axial"  # more than 45 degrees from the body axis
    NO_PIXELS = "no_pixels"  # a CT header without PixelData
    MULTI_FRAME = "multi_frame"  # more than one frame; expected one slice
    NOT_MONOCHROME = "not_monochrome"  # colour or palette
    BAD_HEADER = "bad_header"  # a required attribute is missing or has an impossible value
    UNSUPPORTED_SYNTAX = "unsupported_syntax"  # a transfer syntax without a decoder here
    TRUNCATED = "truncated"  # fewer bytes than the header promises
    SIZE_MISMATCH = "size_mismatch"  # more or other pixels than the header promises
    TOO_LARGE = "too_large"  # dimensions or an inflated size beyond what a CT slice can be
    # Found while planning.
    NOT_HU = "not_hu"  # a series whose pixels are not in Hounsfield units
    BURNED_IN = "burned_in"  # text is burned into the pixels, perhaps the patient's name
    SOP_CONFLICT = "sop_conflict"  # one SOP Instance UID on different images, where it is the key of the labels
    FILTERED = "filtered"  # what the user's own filters leave out
    DUPLICATE = "duplicate"  # a second file with the same SOP Instance UID
    SCAN_TYPE = "scan_type"  # a contrast, bone or reformatted series that the layout excludes
    # Found while decoding.
    CHANGED = "changed"  # the file is not the one whose header was read
    DECODE_FAILED = "decode_failed"  # the decoder refused the pixel data
    DECODER_DIED = "decoder_died"  # the decoder crashed, timed out or ran out of memory

    @property
    def is_damage(self) -> bool:
        """Whether a slice was lost: false for files that were never slices of the dataset, and for duplicates."""
        return self not in _NO_DAMAGE

    @property
    def is_rule(self) -> bool:
        """Whether a rule of the build, not damage and not an option, removes such slices: their labels are lost by it."""
        return self in _RULES

    @property
    def is_filter(self) -> bool:
        """Whether the user's options, or the layout's scan types, remove such slices."""
        return self in _FILTERS

    @property
    def is_transient(self) -> bool:
        """True for transient failures (machine, missing decoder): the next run retries them."""
        return self in _TRANSIENT


_NO_DAMAGE = frozenset(
    (Reason.NOT_AN_IMAGE, Reason.NOT_CT, Reason.LOCALIZER, Reason.DERIVED, Reason.NOT_AXIAL, Reason.MULTI_FRAME)
    + (Reason.NOT_MONOCHROME, Reason.NOT_HU, Reason.BURNED_IN, Reason.FILTERED, Reason.DUPLICATE, Reason.SCAN_TYPE)
)
_RULES = frozenset((Reason.DERIVED, Reason.NOT_AXIAL, Reason.NOT_HU, Reason.SOP_CONFLICT))
_FILTERS = frozenset((Reason.SCAN_TYPE, Reason.FILTERED))
_TRANSIENT = frozenset((Reason.UNREADABLE, Reason.UNSUPPORTED_SYNTAX, Reason.DECODER_DIED))


class IchError(Exception):
    """Base of every error raised on purpose: its text says what was expected, what was found, and what to do next."""


class UsageError(IchError):
    """An invalid command line, recipe or argument."""


class SourceError(IchError):
    """A source tree that no layout recognises, or labels that do not match the files."""


class BuildError(IchError):
    """A build that cannot continue."""


class DatasetError(IchError):
    """A directory that is not a finished dataset of a version that this code reads."""


class CorruptionError(DatasetError):
    """A dataset whose bytes are not the ones that were written; the text names the file and, if known, the row."""


class StoreError(IchError):
    """An object store that refuses a request or does not answer; the text names the object and what was answered."""


class InterruptError(IchError):
    """Ctrl-C during a command; the text says how to resume."""


class TrainError(IchError):
    """A training run that cannot start or continue."""


def describe_os_error(error: OSError) -> str:
    """Return what the operating system reported, and for which file, if known."""
    where = "" if error.filename is None else f" ({os.fsdecode(error.filename)})"
    return f"{error.strerror or error}{where}"


class SliceError(IchError):
    """One file or slice to quarantine: ``reason`` is a word of the quarantine table, ``detail`` a sentence."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[SliceError], tuple[Reason, str]]:
        return SliceError, (self.reason, self.detail)


# What to do about files of many frames.
CONVERT_FRAMES: Final = "convert them to one file per slice, such as with emf2sf of dcm4che"

# --- wording -----------------------------------------------------------------------------------------------------------

# Share of characters in common, 0 to 1, below which a name is not worth suggesting.
SIMILARITY = 0.6


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the one of ``known`` that is most like ``name``, ignoring case, or "" if none is similar."""
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(candidate.casefold(), candidate)
    matches = get_close_matches(name.casefold(), folded, n=1, cutoff=SIMILARITY)
    return folded[matches[0]] if matches else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message, " Did you mean 'size'?", or "" if no known name is similar to ``name``."""
    match = nearest(name, known)
    return f" Did you mean {match!r}?" if match else ""


def count(number: int, noun: str, plural: str = "") -> str:
    """Return ``number`` with its noun: "1 label", "1,200 labels"; ``plural`` is for nouns that do not just take an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
