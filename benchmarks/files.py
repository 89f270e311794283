"""The files that the benchmarks read: a phantom cohort or real CT, copied under other identifiers until there are enough."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from ich_prep.dicom.header import read_header
from ich_prep.errors import IchError
from ich_prep.execute import default_workers
from ich_prep.phantom import synthesize

BASE_SERIES = 36
TRAIN, SAMPLE = "stage_2_train.csv", "stage_2_sample_submission.csv"


def cohort(folder: Path, *, slices: int, size: int = 512) -> Path:
    """Return an RSNA tree below ``folder`` with at least ``slices`` files of (size, size), created once and kept.

    The phantom draws about a thousand different slices. The others are copies of these under other identifiers: other
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
                _copy(source, tree / source.parent.name / f"{_renamed(source.stem, copy)}.dcm", copy)
        for name in (SAMPLE, TRAIN):
            _copy_labels(base / name, tree / name, copies)
    return tree


REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "head_ct"


def real_cohort(folder: Path, *, slices: int) -> Path | None:
    """Return a folder of at least ``slices`` copies of the real slices of 512 x 512 in ``REAL``, or None if it has none."""
    if not REAL.is_dir():
        return None
    sources = [path for path in sorted(REAL.rglob("*")) if path.is_file() and _is_slice(path)]
    copies = -(-slices // len(sources))

    def write(tree: Path) -> None:
        for copy in range(copies):
            for number, source in enumerate(sources):
                _copy(source, tree / f"{copy:04d}-{number:04d}.dcm", copy)

    return once(folder, f"real-x{copies}", write)


SYNTAXES = {
    "implicit little endian": "1.2.840.10008.1.2",
    "explicit little endian": "1.2.840.10008.1.2.1",
    "explicit big endian": "1.2.840.10008.1.2.2",
    "deflated": "1.2.840.10008.1.2.1.99",
    "RLE": "1.2.840.10008.1.2.5",
    "JPEG 2000 lossless": "1.2.840.10008.1.2.4.90",
    "JPEG lossless": "1.2.840.10008.1.2.4.70",
    "JPEG-LS lossless": "1.2.840.10008.1.2.4.80",
    "JPEG, 8 bits": "1.2.840.10008.1.2.4.50",
}
COMPRESSED = ("JPEG 2000 lossless", "JPEG-LS lossless", "JPEG lossless", "RLE", "JPEG, 8 bits")


def in_syntax(folder: Path, name: str, *, slices: int) -> Path:
    """Return a folder of phantom slices of 512 x 512 in the transfer syntax that ``SYNTAXES`` calls ``name``."""
    sources = sorted(cohort(folder, slices=1).glob("stage_2_*/*.dcm"))[:slices]

    def write(tree: Path) -> None:
        tree.mkdir(parents=True)
        with ProcessPoolExecutor(default_workers()) as pool:
            list(pool.map(partial(_encode, SYNTAXES[name], tree), sources, chunksize=16))

    return once(folder, f"syntax-{SYNTAXES[name]}-{slices}", write)


@pydicom.config.disable_value_validation()
def _encode(syntax: str, tree: Path, source: Path) -> None:
    dataset = pydicom.dcmread(source)
    stored = dataset.pixel_array
    if syntax in (SYNTAXES["RLE"], SYNTAXES["JPEG 2000 lossless"]):
        dataset.compress(UID(syntax), encoding_plugin="pylibjpeg", generate_instance_uid=False)
    elif syntax in (SYNTAXES["JPEG lossless"], SYNTAXES["JPEG-LS lossless"], SYNTAXES["JPEG, 8 bits"]):
        import imagecodecs

        unsigned = stored.view(np.uint16)
        if syntax == SYNTAXES["JPEG, 8 bits"]:
            frame = imagecodecs.jpeg8_encode(_to_8_bits(dataset), level=90)
        elif syntax == SYNTAXES["JPEG lossless"]:
            frame = imagecodecs.jpeg8_encode(unsigned, lossless=True, predictor=1, bitspersample=16)
        else:
            frame = imagecodecs.jpegls_encode(unsigned)
        dataset.PixelData = encapsulate([frame])
        dataset["PixelData"].is_undefined_length = True
        dataset["PixelData"].VR = "OB"
    elif syntax == SYNTAXES["explicit big endian"]:
        dataset.PixelData = stored.byteswap().tobytes()
        dataset["PixelData"].VR = "OW"
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    encoding = {"implicit_vr": UID(syntax).is_implicit_VR, "little_endian": UID(syntax).is_little_endian}
    pydicom.dcmwrite(tree / source.name, dataset, force_encoding=True, **encoding)


def _to_8_bits(dataset: pydicom.Dataset) -> np.ndarray:
    """Return the pixels in steps of 16 HU from -1024 HU, and let the header say so."""
    hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 16, -1024
    return np.clip((hu + 1024) / 16, 0, 255).astype(np.uint8)


def _is_slice(path: Path) -> bool:
    try:
        header = read_header(path)
    except IchError:
        return False
    return header.rows == header.columns == 512 and header.position is not None and "LOCALIZER" not in header.image_type


def _renamed(name: str, copy: int) -> str:
    """Return another identifier of the same length and form for the ``copy``-th copy."""
    if copy == 0:
        return name
    digest = hashlib.sha256(f"{copy} {name}".encode()).hexdigest()
    if name.startswith("ID_"):
        return "ID_" + digest[: len(name) - 3]
    stem, last = name.rsplit(".", 1)  # the last part of a UID, without a leading zero
    return f"{stem}.{''.join(str(1 + int(digit, 16) % 9) for digit in digest[: len(last)])}"


def _copy(source: Path, target: Path, copy: int) -> None:
    header, data = read_header(source), source.read_bytes()
    prefix = data[: header.pixel_offset]
    for name in (header.sop_instance_uid, header.series_instance_uid, header.study_instance_uid, header.patient_id):
        if name and (name.startswith("ID_") or "." in name):
            prefix = prefix.replace(name.encode(), _renamed(name, copy).encode())
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(prefix + data[len(prefix) :])


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


def once(folder: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Let ``write`` create ``folder/name`` unless it exists and is complete; return its path."""
    path, complete = folder / name, folder / f".{name}.whole"
    if not complete.exists():
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        write(path)
        complete.touch()
    return path


def phantom(folder: Path, name: str, *, series: int, size: int = 512, hard: bool = False) -> Path:
    """Return a cohort in the layout ``folder`` at ``folder/name``, with labels by slice; created once and kept."""
    return once(
        folder,
        f"{name}-{series}",
        lambda tree: synthesize(tree, series=series, size=size, layout="folder", hard=hard, workers=default_workers()),
    )


def build_by_recipe(recipe: Path, tree: Path, out: Path, *options: object) -> None:
    """Build the dataset ``out`` from ``tree`` as the command line does."""
    words = ["build", "--src", tree, "--out", out, "--recipe", recipe, "--overwrite", *options]
    subprocess.run([sys.executable, "-m", "ich_prep", *map(str, words)], check=True, capture_output=True)


def evict(files: Sequence[Path]) -> None:
    """Drop files from the page cache, after syncing what was written."""
    os.sync()
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm(files: Sequence[Path]) -> None:
    """Read files once, so that they are in the page cache."""
    buffer = bytearray(1 << 22)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
