"""How fast do batches come from the shards, against a gather of uncompressed pixels and against other loaders?

    python -m benchmarks.loader [--slices 4096] [--repeats 5] [--data bench-data]

Random order, batches of 64, two cores, warm files, glibc's malloc thresholds raised for all.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer

from benchmarks.files import cohort
from benchmarks.loader_contenders import CONTENDERS, HDF5, LMDB, MEMMAP, PNG, WEB
from benchmarks.measure import Rate, in_process, interleave, report, versions
from ich_prep import Spec, build
from ich_prep.store import Dataset, open_dataset

QUESTIONS = {"256": ("3 x 256 x 256 uint8", 256, "windows"), "hu-512": ("1 x 512 x 512 HU", 512, "hu")}
OURS, LIMIT = "SliceLoader, lz4", "memmap gather"
PACKAGES = (
    "numpy",
    "torch",
    "tensorstore",
    "zarr",
    "lmdb",
    "numcodecs",
    "opencv-python-headless",
    "h5py",
    "webdataset",
)


def prepare(folder: Path, tree: Path, size: int, store: str) -> None:
    """Write the same pixels in every form that a contender reads."""
    if (folder / "ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for codec in ("lz4", "none"):
        build(tree, folder / f"{codec}.zarr", Spec(layout="rsna", size=size, store=store, codec=codec))  # type: ignore[arg-type]
    dataset = open_dataset(folder / "lz4.zarr")
    rows = np.lib.format.open_memmap(folder / MEMMAP, "w+", dataset.dtype, dataset.shape)
    (folder / PNG).mkdir()
    for at in range(0, len(dataset), 256):
        wanted = np.arange(at, min(at + 256, len(dataset)))
        rows[wanted] = dataset.read(wanted)
        for row in wanted.tolist():
            cv2.imwrite(str(folder / PNG / f"{row}.png"), _as_png(rows[row]))
    rows.flush()
    _write_lmdb(folder / LMDB, rows)
    _write_hdf5(folder / HDF5, rows)
    _write_tars(folder / WEB, rows)
    (folder / "ready").touch()


def _as_png(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.int16:
        return (pixels[0].astype(np.int32) + 32768).astype(np.uint16)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _write_lmdb(path: Path, rows: np.ndarray) -> None:
    import lmdb

    with lmdb.open(str(path), map_size=rows.nbytes * 2) as environment, environment.begin(write=True) as transaction:
        for index, row in enumerate(rows):
            transaction.put(index.to_bytes(8, "big"), row.tobytes())


def _write_hdf5(path: Path, rows: np.ndarray) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=rows, chunks=(1, *rows.shape[1:]), compression="lzf", shuffle=True)


def _write_tars(folder: Path, rows: np.ndarray) -> None:
    import webdataset

    folder.mkdir()
    for at in range(0, len(rows), 256):
        with webdataset.TarWriter(str(folder / f"{at // 256:05d}.tar")) as tar:
            for index in range(at, min(len(rows), at + 256)):
                tar.write({"__key__": f"{index:07d}", "raw": rows[index].tobytes()})


def _bytes_of(folder: Path, dataset: Dataset) -> dict[str, float]:
    """Return the bytes on disk of each form, per slice."""
    places = {
        "lz4": "lz4.zarr/images",
        "none": "none.zarr/images",
        "memmap": MEMMAP,
        "LMDB": LMDB,
        "PNG": PNG,
        "HDF5": HDF5,
        "Web": WEB,
    }
    found = {}
    for name, place in places.items():
        path = folder / place
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        found[name] = sum(file.stat().st_blocks * 512 for file in files) / len(dataset)
    return found


def main(
    slices: int = 4096,
    repeats: int = 5,
    seconds: float = 3.0,
    data: Path = Path("bench-data"),
    question: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(QUESTIONS)}.")] = None,
) -> None:
    tree = cohort(data, slices=slices)
    for name in question or list(QUESTIONS):
        title, size, store = QUESTIONS[name]
        folder = data / f"loader-{name}"
        prepare(folder, tree, size, store)
        dataset = open_dataset(folder / "lz4.zarr")
        sizes = _bytes_of(folder, dataset)
        contenders = {peer: partial(_contend, folder, seconds, peer) for peer in CONTENDERS}
        for contend in contenders.values():
            contend()  # once uncounted: the files of each lie in the page cache
        found = interleave(contenders, repeats)
        checksums = {run["checksum"] for runs in found.values() for run in runs}
        if len(checksums) != 1:
            raise SystemExit(f"The contenders do not give the same pixels: {checksums}.")
        rates = []
        for peer, runs in found.items():
            form = next((form for form in sizes if form in peer), "lz4")
            first = sorted(run["first_batch"] for run in runs)[len(runs) // 2]
            rates.append(Rate(peer, tuple(run["rate"] for run in runs), sizes[form], f"first batch {first:.2f} s"))
        report(
            f"Loader: {title}, {len(dataset):,} slices, batches of 64, two cores",
            rates,
            against=LIMIT,
            ours=OURS,
            name=f"loader-{name}",
            extra={"versions": versions(PACKAGES)},
        )


def _contend(folder: Path, seconds: float, name: str) -> dict[str, Any]:
    return in_process("benchmarks.loader_contenders", name, str(folder), str(seconds))


if __name__ == "__main__":
    typer.run(main)
