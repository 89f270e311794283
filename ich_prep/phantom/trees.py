"""The trees that the phantom can write: file names, headers and label files of RSNA 2019, CQ500 and a plain folder."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.storage import naming
from ich_prep.phantom.bleeds import Bleed
from ich_prep.phantom.files import (
    CT_IMAGE,
    EXPLICIT_LE,
    IMPLICIT_LE,
    PADDING,
    Attributes,
    file_bytes,
    image_attributes,
    token,
    uid,
)
from ich_prep.phantom.series import Place, Scan, Slice, draw_patient, draw_scan, draw_slices, every, place

# How many patients per twenty series are scanned twice: RSNA's follow-ups; CQ500's thin, contrast and bone series.
SECOND_SERIES = {"rsna": 3, "cq500": 7, "folder": 3}

READER_FINDINGS = (
    "ICH",
    "IPH",
    "IVH",
    "SDH",
    "EDH",
    "SAH",
    "BleedLocation-Left",
    "BleedLocation-Right",
    "ChronicBleed",
    "Fracture",
    "CalvarialFracture",
    "OtherFracture",
    "MassEffect",
    "MidlineShift",
)
_READER_KINDS = {
    "IPH": "intraparenchymal",
    "IVH": "intraventricular",
    "SDH": "subdural",
    "EDH": "epidural",
    "SAH": "subarachnoid",
}
_READER_ERROR = 0.04  # probability that a reader contradicts the truth on one finding

# CQ500's folder names with slice thickness in mm, kernel, and what the series is.
_CQ500_PLAIN = (
    ("CT Plain", 5.0, "STANDARD"),
    ("CT 5mm", 5.0, "SOFT"),
    ("CT Plain 3mm", 3.0, "STANDARD"),
    ("CT 55mm Plain", 5.5, "H30s"),
    ("CT PRE CONTRAST 5MM STD", 5.0, "STANDARD"),
)
_CQ500_OTHER = (
    ("CT PLAIN THIN", 2.5, "STANDARD"),
    ("CT POST CONTRAST-2", 5.0, "STANDARD"),
    ("CT BONE", 5.0, "BONE"),
    ("CT Thin Plain", 2.5, "SOFT"),
    ("CT C THIN", 2.5, "STANDARD"),
)
_CQ500_CONTRAST = ("CT POST CONTRAST-2", "CT C THIN")

# Streams of random numbers for the label files; the cohort's own streams have smaller numbers.
_ORDER_STREAM, _READER_STREAM = 100, 101


@dataclass(frozen=True)
class Listed:
    """The label of one slice: 0 or 1 for each of RSNA_CLASSES. In RSNA's layout ``test`` slices have none in the files."""

    sop_instance_uid: str
    labels: tuple[int, ...]
    test: bool


@dataclass(frozen=True)
class SliceFile:
    """One file to write, at ``path`` relative to the tree's root."""

    path: str
    listed: Listed
    attributes: Attributes
    syntax: str
    media_uid: str

    def content(self) -> bytes:
        """Return the bytes of the file."""
        return file_bytes(self.attributes, syntax=self.syntax, media_uid=self.media_uid)


def series_files(
    layout: str, seed: int, where: Place, *, size: int, heights_mm: tuple[float, ...] | None = None
) -> Iterator[SliceFile]:
    """Yield the files of one series; ``heights_mm`` cuts the head there instead of at the scan's levels."""
    if layout == "cq500":
        name, thickness, kernel = _cq500_type(where)
        scan = draw_scan(seed, where, size=size, thickness_mm=thickness)
        scan = replace(scan, tilt_deg=0.0, sharp=kernel == "BONE", contrast=name in _CQ500_CONTRAST)
    else:
        scan = draw_scan(seed, where, size=size)
    if heights_mm is not None:
        scan = replace(scan, heights_mm=heights_mm)
    # CQ500's second series is of the same day; elsewhere it is a later examination.
    shown = _first(seed, where) if layout == "cq500" and where.follows else where
    head, bleeds = draw_patient(seed, shown)
    for number, drawn in enumerate(draw_slices(seed, where, scan, head, bleeds)):
        yield _FILES[layout](seed, where, scan, number, drawn)


def write_labels(layout: str, out: Path, seed: int, places: Sequence[Place], listed: Sequence[Listed]) -> int:
    """Write the label files of a tree into ``out`` and return how many there are."""
    if layout == "rsna":
        _write_rsna_labels(out, seed, listed)
        return 2
    if layout == "folder":
        lines = [(line.sop_instance_uid, *line.labels) for line in listed]
        _write_lines(out / "labels.csv", [("sop_instance_uid", *RSNA_CLASSES), *lines])
    else:
        _write_reads(out, seed, places)
    return 1


def _rsna_file(seed: int, where: Place, scan: Scan, number: int, drawn: Slice) -> SliceFile:
    sop = f"ID_{token(9, seed, 'sop', where.index, number)}"
    bits = _bits(where)
    identity = {
        "SOPInstanceUID": sop,
        "Modality": "CT",
        "PatientID": f"ID_{token(8, seed, 'patient', where.patient)}",
        "StudyInstanceUID": f"ID_{token(10, seed, 'study', where.index)}",
        "SeriesInstanceUID": f"ID_{token(10, seed, 'series', where.index)}",
        "StudyID": "",
    }
    image = image_attributes(
        drawn,
        pixel_mm=scan.pixel_mm,
        bits=bits,
        intercept="-1000" if bits == 12 and every(where, 9, 6) else "-1024",
        slope=("1", "1.0", "1.000000")[(where.index + where.phase) % 3],
        window=(["00036", "00036"], ["00080", "00080"]) if (where.index // 2 + where.phase) % 2 else (["40"], ["80"]),
    )
    return SliceFile(
        path=f"{'stage_2_test' if where.test else 'stage_2_train'}/{sop}.dcm",
        listed=Listed(sop, drawn.labels, where.test),
        attributes=identity | image,
        syntax=IMPLICIT_LE if (2 * where.index + where.phase) % 5 < 2 else EXPLICIT_LE,
        media_uid=uid(seed, "media", where.index, number),
    )


def _folder_file(seed: int, where: Place, scan: Scan, number: int, drawn: Slice) -> SliceFile:
    bits = _bits(where)
    attributes = _full_header(seed, where, scan, number, drawn, bits=bits)
    attributes["PatientID"] = f"PHANTOM{where.patient + 1:03d}"
    if bits == 16:
        attributes["PixelPaddingValue"] = PADDING
    sop = attributes["SOPInstanceUID"]
    # Numbered from the vertex down, as by many scanners: neither names nor numbers increase with the position.
    number = len(scan.heights_mm) - number
    attributes["InstanceNumber"] = str(number)
    return SliceFile(
        path=f"patient_{where.patient + 1:03d}/series_{1 + where.follows}/{number:04d}.dcm",
        listed=Listed(sop, drawn.labels, test=False),
        attributes=attributes,
        syntax=EXPLICIT_LE,
        media_uid=sop,
    )


def _cq500_file(seed: int, where: Place, scan: Scan, number: int, drawn: Slice) -> SliceFile:
    name, _, kernel = _cq500_type(where)
    bits = 14 if every(where, 3, 8) else 16
    attributes = _full_header(seed, where, scan, number, drawn, bits=bits)
    attributes["PatientID"] = f"CQ500{'-CT-' if where.patient % 2 else 'CT'}{where.patient}"
    attributes["SeriesDescription"] = name.removeprefix("CT ")
    attributes["ConvolutionKernel"] = kernel
    attributes["InstanceNumber"] = str(number + 1)
    if scan.contrast:
        attributes["ContrastBolusAgent"] = "IV CONTRAST"
    folder = f"CQ500CT{where.patient}"
    sop = attributes["SOPInstanceUID"]
    return SliceFile(
        path=f"{folder} {folder}/Unknown Study/{name}/CT{number:06d}.dcm",
        listed=Listed(sop, drawn.labels, test=False),
        attributes=attributes,
        syntax=EXPLICIT_LE,
        media_uid=sop,
    )


_FILES = {"rsna": _rsna_file, "folder": _folder_file, "cq500": _cq500_file}


def _full_header(seed: int, where: Place, scan: Scan, number: int, drawn: Slice, *, bits: int) -> Attributes:
    """Return the attributes of a scanner's CT image header, without names and dates."""
    return {
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SOPClassUID": CT_IMAGE,
        "SOPInstanceUID": uid(seed, "sop", where.index, number),
        "Modality": "CT",
        "Manufacturer": "Phantom",
        "SeriesDescription": "Head",
        "BodyPartExamined": "HEAD",
        "SliceThickness": f"{scan.thickness_mm:g}",
        "KVP": "120",
        "ConvolutionKernel": "STANDARD",
        "GantryDetectorTilt": f"{scan.tilt_deg:g}",
        "StudyInstanceUID": uid(seed, "study", where.first_index),
        "SeriesInstanceUID": uid(seed, "series", where.index),
        "StudyID": str(where.patient + 1),
        "SeriesNumber": str(2 + where.follows),
        "FrameOfReferenceUID": uid(seed, "frame", where.index),
    } | image_attributes(
        drawn, pixel_mm=scan.pixel_mm, bits=bits, intercept="-1024", slope="1", window=(["40"], ["80"])
    )


def _bits(where: Place) -> int:
    return 12 if every(where, 2, 0) else 16


def _first(seed: int, where: Place) -> Place:
    return place(seed, where.first_index, second_series=SECOND_SERIES["cq500"], hard=where.hard)


def _cq500_type(where: Place) -> tuple[str, float, str]:
    types = _CQ500_OTHER if where.follows else _CQ500_PLAIN
    return types[(where.patient + where.phase) % len(types)]


def _write_lines(path: Path, lines: Sequence[Sequence[object]]) -> None:
    with naming(path), path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def _write_rsna_labels(out: Path, seed: int, listed: Sequence[Listed]) -> None:
    rng = np.random.default_rng((seed, _ORDER_STREAM))
    train = [line for line in listed if not line.test]
    shuffled = [train[k] for k in rng.permutation(len(train))]
    # The real file lists four slices twice, far apart, with equal labels.
    shuffled += [train[k] for k in rng.permutation(len(train))[: min(4, 1 + len(train) // 20)]]
    lines = [
        (f"{line.sop_instance_uid}_{name}", value)
        for line in shuffled
        for name, value in zip(RSNA_CLASSES, line.labels, strict=True)
    ]
    _write_lines(out / "stage_2_train.csv", [("ID", "Label"), *lines])
    test = [line for line in listed if line.test]
    placeholders = [
        (f"{test[k].sop_instance_uid}_{name}", "0.5")
        for k in rng.permutation(len(test)).tolist()
        for name in RSNA_CLASSES
    ]
    _write_lines(out / "stage_2_sample_submission.csv", [("ID", "Label"), *placeholders])


def _write_reads(out: Path, seed: int, places: Sequence[Place]) -> None:
    """Write reads.csv: three readers per subject, who sometimes contradict the truth."""
    rng = np.random.default_rng((seed, _READER_STREAM))
    lines: list[list[object]] = []
    for where in places:
        if where.follows:
            continue
        _, bleeds = draw_patient(seed, where)
        truth = _findings(bleeds)
        reads: list[object] = []
        for _ in range(3):
            errors = rng.random(len(READER_FINDINGS)) < _READER_ERROR
            read = {name: truth[name] != bool(error) for name, error in zip(READER_FINDINGS, errors, strict=True)}
            read["ICH"] = read["ICH"] or any(read[name] for name in _READER_KINDS)
            reads.extend(int(read[name]) for name in READER_FINDINGS)
        lines.append([f"CQ500-CT-{where.patient}", "B1" if where.patient % 2 else "B2", *reads])
    columns = [f"R{reader}:{name}" for reader in (1, 2, 3) for name in READER_FINDINGS]
    shuffled = [lines[k] for k in rng.permutation(len(lines))]
    _write_lines(out / "reads.csv", [["name", "Category", *columns], *shuffled])


def _findings(bleeds: Sequence[Bleed]) -> dict[str, bool]:
    """Return the findings of a reader without errors."""
    kinds = {bleed.kind for bleed in bleeds}
    sided = [bleed for bleed in bleeds if abs(bleed.centre_mm[0]) > 0.2]
    large = any(bleed.kind in ("epidural", "subdural") for bleed in bleeds)
    chronic = any(bleed.kind == "subdural" and bleed.hu < 60 for bleed in bleeds)
    fracture = any(bleed.kind == "epidural" and bleed.half_mm[1] > 20 for bleed in bleeds)
    return {
        "ICH": bool(kinds),
        **{name: kind in kinds for name, kind in _READER_KINDS.items()},
        "BleedLocation-Left": any(bleed.centre_mm[0] > 0 for bleed in sided),
        "BleedLocation-Right": any(bleed.centre_mm[0] < 0 for bleed in sided),
        "ChronicBleed": chronic,
        "Fracture": fracture,
        "CalvarialFracture": fracture,
        "OtherFracture": False,
        "MassEffect": large or "intraparenchymal" in kinds,
        "MidlineShift": large,
    }
