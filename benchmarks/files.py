"""The files that the benchmarks read: a phantom cohort, and as many copies of it under other names as are asked for."""

from __future__ import annotations

import csv
import hashlib
import shutil
from pathlib import Path

from ich_prep.execute import default_workers
from ich_prep.header import SKIM_BYTES, read_header
from ich_prep.phantom import synthesize

BASE_SERIES = 36
TRAIN, SAMPLE = "stage_2_train.csv", "stage_2_sample_submission.csv"


def cohort(folder: Path, *, slices: int, size: int = 512) -> Path:
    """Return an RSNA tree below ``folder`` with at least ``slices`` files of (size, size), made once and kept.

    The phantom paints about a thousand different slices. What is more is a copy of these under other identifiers: other
    files, other bytes in the page cache, pixels of the same kind.
    """
    base = folder / f"phantom-{size}"
    if not (base / TRAIN).exists():
        shutil.rmtree(base, ignore_errors=True)
        synthesize(base, series=BASE_SERIES, size=size, workers=default_workers())
    sources = sorted(base.glob("stage_2_*/*.dcm"))
    copies = -(-slices // len(sources))
    if copies == 1:
        return base
    tree = folder / f"phantom-{size}-x{copies}"
    if not (tree / TRAIN).exists():
        shutil.rmtree(tree, ignore_errors=True)
        for copy in range(copies):
            for source in sources:
                _copy(source, tree, copy)
        for name in (SAMPLE, TRAIN):
            _copy_labels(base / name, tree / name, copies)
    return tree


def _renamed(name: str, copy: int) -> str:
    """Return another identifier of the same length and form for the ``copy``-th copy."""
    if copy == 0:
        return name
    return "ID_" + hashlib.sha256(f"{copy} {name}".encode()).hexdigest()[: len(name) - 3]


def _copy(source: Path, tree: Path, copy: int) -> None:
    header, data = read_header(source), source.read_bytes()
    head = data[:SKIM_BYTES]
    for name in (header.sop_instance_uid, header.series_instance_uid, header.study_instance_uid, header.patient_id):
        assert name is not None
        head = head.replace(name.encode(), _renamed(name, copy).encode())
    assert header.sop_instance_uid is not None
    target = tree / source.parent.name / f"{_renamed(header.sop_instance_uid, copy)}.dcm"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(head + data[SKIM_BYTES:])


def _copy_labels(source: Path, target: Path, copies: int) -> None:
    with source.open(newline="") as file:
        header, *lines = list(csv.reader(file))
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for copy in range(copies):
            for name, label in lines:
                uid, kind = name.rsplit("_", 1)
                writer.writerow((f"{_renamed(uid, copy)}_{kind}", label))
