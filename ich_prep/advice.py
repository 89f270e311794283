"""What each reason, flag and repair means to whoever has the dataset, and what to do about it.

A test holds these tables against every reason of ``ich_prep.errors``, every flag and repair of docs/format.md, and every
command and option of the command line that they name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ich_prep.errors import Reason

Level = Literal["act", "check", "fine"]


@dataclass(frozen=True)
class Advice:
    """``level``: something is wrong or missing ("act"), may be ("check"), or is as it should be ("fine")."""

    level: Level
    what: str
    todo: str


UNKNOWN = Advice(
    "check",
    "A word that this version does not know.",
    "Read the format's page of the version that wrote the dataset; its root names it.",
)

REASONS: Mapping[Reason, Advice] = {
    Reason.UNREADABLE: Advice(
        "act",
        "The operating system could not read the file.",
        "Check the disk and the file's permissions, then run the same build again: it is retried. After the dataset is "
        "finished, build with --overwrite.",
    ),
    Reason.EMPTY_FILE: Advice(
        "act",
        "The file has no bytes: a copy or download was cut off.",
        "Copy it from the source again, and build again.",
    ),
    Reason.BAD_PATH: Advice(
        "act", "The name is not UTF-8, or leads out of its archive.", "Rename the file, or unpack the archive yourself."
    ),
    Reason.BAD_ARCHIVE: Advice(
        "act",
        "The archive is broken or encrypted, or this file in it is. None of what it holds is in the dataset.",
        "Test it with unzip -t, then download it again or unpack it to a folder.",
    ),
    Reason.NOT_DICOM: Advice(
        "act",
        "Named like a DICOM file, but its header cannot be read.",
        "Open one with a DICOM viewer. If it opens nowhere, copy it from the source again; if it is no slice, delete it.",
    ),
    Reason.NOT_AN_IMAGE: Advice("fine", "Other files beside the slices, such as thumbnails and text.", "Nothing."),
    Reason.NOT_CT: Advice("fine", "Another modality, or an object without an image.", "Nothing, if only CT is wanted."),
    Reason.LOCALIZER: Advice("fine", "A scout, which shows no axial slice.", "Nothing."),
    Reason.DERIVED: Advice(
        "check",
        "A screenshot, dose page, projection or rendering: made from slices, and not one.",
        "Look at one. If labels were lost with it, it may be a real slice whose ImageType is wrong: correct the header, "
        "or allow the loss with --allow-lost-labels.",
    ),
    Reason.NOT_AXIAL: Advice(
        "check",
        "Coronal, sagittal or oblique by more than 45 degrees.",
        "Nothing, if reformats are among the files. If axial slices are here, their ImageOrientationPatient is wrong.",
    ),
    Reason.NO_PIXELS: Advice(
        "act", "A CT header without pixels.", "Ask for the files again: the export removed their pixel data."
    ),
    Reason.MULTI_FRAME: Advice(
        "check",
        "Several frames in one file, such as Enhanced CT.",
        "Convert it to one file per slice, for example with emf2sf of dcm4che, and build again.",
    ),
    Reason.NOT_MONOCHROME: Advice("fine", "A colour picture, such as a perfusion map or a screenshot.", "Nothing."),
    Reason.BAD_HEADER: Advice(
        "act",
        "A required attribute is missing or impossible; the detail names it.",
        "Export the file again, or correct that attribute.",
    ),
    Reason.UNSUPPORTED_SYNTAX: Advice(
        "act",
        "No decoder is installed for this compression.",
        "Install the extra jpeg (pip install 'ich[jpeg]'), or decompress with dcmdjpeg or gdcmconv; then build with "
        "--overwrite.",
    ),
    Reason.TRUNCATED: Advice(
        "act", "The file is shorter than its header promises.", "Copy it from the source again, and build again."
    ),
    Reason.SIZE_MISMATCH: Advice(
        "act",
        "The pixel data are longer or of another shape than the header promises.",
        "Export the file again: its Rows, Columns or BitsAllocated are not those of its pixels.",
    ),
    Reason.TOO_LARGE: Advice(
        "act",
        "Larger than a CT slice can be.",
        "Check Rows and Columns: they are wrong, or this is another kind of image.",
    ),
    Reason.NOT_HU: Advice(
        "check",
        "The series is not in Hounsfield units, by its RescaleType or its middle slice.",
        "Look at the series. If its values are HU after all, name its RescaleType with --rescale-types.",
    ),
    Reason.BURNED_IN: Advice(
        "check",
        "Text is burned into the pixels: it may name the patient.",
        "Look before you share it. --allow-burned-in keeps such slices.",
    ),
    Reason.SOP_CONFLICT: Advice(
        "act",
        "Different images share one SOP Instance UID, so their label cannot be assigned.",
        "Find out which image the label was given to, and remove the others; or join labels by another key with "
        "--label-key.",
    ),
    Reason.FILTERED: Advice(
        "fine",
        "Left out by an option of this build.",
        "Nothing, if --include, --exclude and --image-types are as meant.",
    ),
    Reason.DUPLICATE: Advice("fine", "A second copy of a file that is in the dataset.", "Nothing."),
    Reason.SCAN_TYPE: Advice(
        "fine", "A contrast, bone or thin series that the layout leaves out.", "Nothing, if plain scans are wanted."
    ),
    Reason.CHANGED: Advice(
        "act",
        "The file changed between reading its header and its pixels.",
        "Make sure that nothing writes to the source, then build with --overwrite.",
    ),
    Reason.DECODE_FAILED: Advice(
        "act",
        "The compressed pixels are damaged.",
        "Copy the file from the source again; if it stays, ask for it again.",
    ),
    Reason.DECODER_DIED: Advice(
        "act",
        "The decoder crashed, or ran out of time or memory.",
        "Run the same build again with fewer --workers. If it happens again, the file is damaged.",
    ),
}

FLAGS: Mapping[str, Advice] = {
    "duplicate_position": Advice(
        "check",
        "Two slices of a volume lie at one position: a scan was repeated, or two reconstructions are in one series.",
        "Look at the volume. Leave it out of measures that need even spacing.",
    ),
    "gap_before": Advice(
        "check",
        "Slices seem to be missing before this one, or the spacing changes here.",
        "Compare with the source: files may not have been copied.",
    ),
    "other_orientation": Advice(
        "check", "Turned otherwise than most slices of its volume.", "Look at the volume: it mixes two acquisitions."
    ),
    "no_position": Advice(
        "check",
        "No position in the header, so the order within the volume is by number, or unknown.",
        "Do not use the order of these volumes, nor distances in them.",
    ),
    "direction_unknown": Advice(
        "check",
        "Ordered by a number that may count from the head or from the feet.",
        "Look whether the volume runs from foot to head before you use its order.",
    ),
    "no_orientation": Advice(
        "check",
        "Without an orientation; taken as axial and upright.",
        "Look at one slice: the front of the head must be on top, the patient's left on the right.",
    ),
    "reformatted": Advice(
        "fine", "An axial slice computed from others.", "To leave them out, build with --image-types original."
    ),
    "other_rescale_type": Advice(
        "check",
        "RescaleType is not HU, though the values look like it, or --rescale-types names it.",
        "Compare the histogram and a thumbnail with those of other series.",
    ),
    "burned_in": Advice(
        "check", "The header says that text is burned into the pixels.", "Look for names before you share the dataset."
    ),
    "decimal_comma": Advice("fine", "A header number was written with a decimal comma, and read as meant.", "Nothing."),
    "long_instance_number": Advice("fine", "An InstanceNumber beyond 32 bits.", "Nothing."),
    "excess_bytes": Advice("fine", "Bytes behind the last row, which were ignored.", "Nothing."),
    "no_preamble": Advice(
        "fine", "A file without the preamble or the transfer syntax of DICOM, which was guessed.", "Look at one slice."
    ),
    "patient_is_study": Advice(
        "check",
        "Without a PatientID, or with a placeholder: the study stands for the patient.",
        "One person may be in two folds under two studies. If you know the patients, give a column patient_id in the "
        "label table and --patients column.",
    ),
    "patient_conflict": Advice(
        "act",
        "A study has several PatientIDs, or one PatientID has two sexes or birth years.",
        "Two people may share an ID, or one has two. They share a fold, so nothing leaks; correct the IDs if patients "
        "are counted or compared.",
    ),
    "series_uid_shared": Advice(
        "check",
        "Several studies or patients use one Series Instance UID.",
        "Name such volumes by series_row, not by UID. The export, or its de-identification, reused UIDs.",
    ),
    "sop_uid_shared": Advice(
        "check",
        "Different images have one SOP Instance UID.",
        "Name such slices by row, not by UID, and check labels that were joined by it.",
    ),
    "same_image": Advice(
        "check",
        "The same image is in the dataset under another name.",
        "They share a fold unless --link leaves out image. See the equal images on this page for conflicting labels.",
    ),
    "volume_continued": Advice(
        "check",
        "Appended slices of a series that was in the dataset: they are a volume of their own.",
        "If the series is to be one volume, build again from all of its files.",
    ),
    "fold_conflict": Advice(
        "act",
        "Appended slices show that fold groups may be of one patient, or the table gives another fold; all keep theirs.",
        "Look at the slices: one patient may be in two folds. Withdraw some with ich-prep drop, or build again.",
    ),
    "not_head": Advice(
        "check",
        "Perhaps not a head: by body part, field of view, or lung in the picture.",
        "Look at one. Leave other body parts out with --include or --exclude.",
    ),
    "contrast_stated": Advice(
        "check",
        "The header names a contrast agent, and nothing else says so.",
        "Vessels bright as blood may be contrast: look before you train on plain scans.",
    ),
    "monochrome1": Advice("fine", "Stored for an inverted display; HU are the same.", "Nothing."),
    "unused_bits": Advice("fine", "Bits that the header does not use were set, and masked.", "Look at one slice."),
    "constant": Advice(
        "act", "All pixels have one value: there is no image.", "Leave these rows out of training and evaluation."
    ),
    "noise": Advice(
        "act",
        "Parts look like noise: the pixel data are probably damaged.",
        "Look at each. Copy the file from the source again, or leave the row out.",
    ),
    "clipped_high": Advice(
        "fine", "Values above 3071 HU, such as metal, were clipped.", "Nothing, unless you measure metal."
    ),
}

REPAIRS: Mapping[str, Advice] = {
    "sign_12bit": Advice(
        "fine",
        "The file's 12-bit values were shifted and wrapped; they were put right.",
        "Nothing. ich-prep verify --src computes the repair a second time.",
    ),
}


def advice_of_reason(reason: str) -> Advice:
    """Return the advice for a reason, also for a word of a later version."""
    return REASONS[Reason(reason)] if reason in set(Reason) else UNKNOWN
