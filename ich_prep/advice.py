"""What a quarantine reason means, and what to do about it, in plain words for people who look at a dataset."""

from __future__ import annotations

from dataclasses import dataclass

from ich_prep.errors import Reason


@dataclass(frozen=True)
class Advice:
    """``meaning``: what is the case; ``action``: what to do about it."""

    meaning: str
    action: str


_NOTHING = "Nothing: it is not a slice of a head scan."
_RESTORE = "Compare the file with its original, copy it again, and build again."

ADVICE: dict[Reason, Advice] = {
    Reason.UNREADABLE: Advice(
        "The operating system could not read the file.", "Check its permissions and the disk, then build again."
    ),
    Reason.EMPTY_FILE: Advice("The file has no bytes.", _RESTORE),
    Reason.BAD_PATH: Advice("The file's name is not UTF-8, or leads out of its archive.", "Rename the file."),
    Reason.BAD_ARCHIVE: Advice(
        "The archive, or this file in it, is damaged or encrypted.", "Download the archive again."
    ),
    Reason.NOT_DICOM: Advice("The file is not DICOM.", "Nothing, unless it should be: then copy it again."),
    Reason.NOT_CT: Advice("Another modality, or not an image.", _NOTHING),
    Reason.LOCALIZER: Advice("A scout image.", _NOTHING),
    Reason.DERIVED: Advice("A secondary capture, dose page or reformat.", _NOTHING),
    Reason.NO_PIXELS: Advice("A CT header without pixels.", _RESTORE),
    Reason.MULTI_FRAME: Advice("Several frames in one file.", "Convert it to one file per slice to include it."),
    Reason.NOT_MONOCHROME: Advice("A colour image.", _NOTHING),
    Reason.BAD_HEADER: Advice(
        "A required attribute is missing or impossible.", "Look at the header, and at its source."
    ),
    Reason.UNSUPPORTED_SYNTAX: Advice(
        "No decoder for this transfer syntax is installed.",
        "Install the extra: pip install 'ich[jpeg]'. Then build again.",
    ),
    Reason.TRUNCATED: Advice("The file ends before its pixels do.", _RESTORE),
    Reason.SIZE_MISMATCH: Advice("There are more or other pixels than the header promises.", _RESTORE),
    Reason.TOO_LARGE: Advice("Larger than a CT slice can be.", "Look at the file: it is not a single slice."),
    Reason.DUPLICATE: Advice(
        "Another file has the same SOP Instance UID.",
        "Nothing if the files are equal; otherwise find out which one is right.",
    ),
    Reason.SCAN_TYPE: Advice("A contrast, bone or reformatted series, which the layout leaves out.", "Nothing."),
    Reason.CHANGED: Advice(
        "The file changed between the reading of its header and of its pixels.",
        "Leave the files alone, and build again.",
    ),
    Reason.DECODE_FAILED: Advice("The decoder refused the pixels.", _RESTORE),
    Reason.DECODER_DIED: Advice(
        "The decoder crashed, or ran out of time or memory.", "Build again; if it remains, copy it again."
    ),
}
_UNKNOWN = Advice(
    "A reason that a later version wrote.", "Look it up in the documentation of the version that wrote it."
)


def advice_for(reason: str) -> Advice:
    """Return what a word of the quarantine table means; also for one that this version does not know."""
    try:
        return ADVICE[Reason(reason)]
    except ValueError:
        return _UNKNOWN
