"""The same pixels in every format that a loader reads: shards, rows of an array, LMDB, PNG, HDF5, tar files, and others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.files import once
from benchmarks.measure import in_process
from benchmarks.pinned_contenders import FORMS as PINNED_FORMS
from benchmarks.pinned_contenders import PIXELS
from ich_prep import Spec, build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.execute import default_workers

LZ4, NONE, ROWS, DICOM = "lz4.zarr", "none.zarr", PIXELS, "dicom.json"
LMDB, PNG, HDF5, TAR, ARROW = "rows.lmdb", "png", "rows.h5", "tar", "arrow"
# The venv of contenders that need other library versions, next to the one that runs this: see `make bench-setup`.
PINNED_PYTHON = Path(f"{sys.prefix}-pinned") / "bin" / "python"
STEP = 256


def prepare(
    data: Path, tree: Path, *, size: int, store: str, only: Collection[str] = ()
) -> tuple[Path, dict[str, str]]:
    """Write missing forms to a folder below ``data``; return it, and the forms that could not be written with the reason.

    ``only`` limits the forms to write, LZ4 among them; without it, all are written.
    """
    folder = data / f"loader-{store}-{size}-{tree.name}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LZ4, NONE):
        if name in only or not only:
            spec = Spec(layout="rsna", size=size, store=store, codec=name.removesuffix(".zarr"))  # type: ignore[arg-type]
            once(folder, name, partial(_write_dataset, tree, spec))
    if only == {LZ4}:
        return folder, {}
    once(folder, ROWS, _write_rows)
    rows = np.load(folder / ROWS, mmap_mode="r")
    writers: dict[str, Callable[[Path], None]] = {
        DICOM: partial(_write_paths, tree),
        LMDB: partial(_write_lmdb, rows),
        PNG: partial(_write_png, rows),
        HDF5: partial(_write_hdf5, rows),
        TAR: partial(_write_tar, rows),
        ARROW: partial(_write_arrow, rows),
    }
    for name, write in writers.items():
        if name in only or not only:
            once(folder, name, write)
    return folder, {} if only else _write_pinned(folder)


def files_of(folder: Path, form: str) -> list[Path]:
    """Return the files of a form that contain pixels."""
    if form == DICOM:
        return [Path(path) for path in json.loads((folder / form).read_text())]
    root = folder / form / "images" if form in (LZ4, NONE) else folder / form
    return [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())


def bytes_of(files: Sequence[Path]) -> int:
    """Return the bytes that files take on disk; holes in sparse files do not count."""
    return sum(min(path.stat().st_size, path.stat().st_blocks * 512) for path in files)


def _write_dataset(tree: Path, spec: Spec, path: Path) -> None:
    build(tree, path, spec)


def _write_rows(path: Path) -> None:
    dataset = open_dataset(path.with_name(LZ4))
    rows = np.lib.format.open_memmap(path, "w+", dataset.dtype, dataset.shape)
    for at in range(0, len(dataset), STEP):
        rows[at : at + STEP] = dataset.read(np.arange(at, min(at + STEP, len(dataset))))
    rows.flush()


def _write_paths(tree: Path, path: Path) -> None:
    names = open_dataset(path.with_name(LZ4)).slices["sop_instance_uid"].to_pylist()
    paths = {file.stem: str(file.absolute()) for file in tree.glob("stage_2_*/*.dcm")}
    path.write_text(json.dumps([paths[name] for name in names]))


def _write_lmdb(rows: NDArray[Any], path: Path) -> None:
    import lmdb

    with lmdb.open(str(path), map_size=rows.nbytes * 2) as environment, environment.begin(write=True) as transaction:
        for index, row in enumerate(rows):
            transaction.put(index.to_bytes(8, "big"), row.tobytes())


def _write_png(rows: NDArray[Any], path: Path) -> None:
    path.mkdir()

    def write(index: int) -> None:
        row = rows[index]
        if rows.dtype == np.int16:
            image = (row[0].astype(np.int32) + 32768).astype(np.uint16)
        else:
            image = np.ascontiguousarray(row.transpose(1, 2, 0))
        cv2.imwrite(str(path / f"{index}.png"), image)

    with ThreadPoolExecutor(default_workers()) as pool:
        list(pool.map(write, range(len(rows))))


def _write_hdf5(rows: NDArray[Any], path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=rows, chunks=(1, *rows.shape[1:]), compression="lzf", shuffle=True)


def _write_tar(rows: NDArray[Any], path: Path) -> None:
    import webdataset

    path.mkdir()
    for at in range(0, len(rows), STEP):
        with webdataset.TarWriter(str(path / f"{at // STEP:05d}.tar")) as tar:
            for index in range(at, min(len(rows), at + STEP)):
                tar.write({"__key__": f"{index:07d}", "raw": rows[index].tobytes()})


def _write_arrow(rows: NDArray[Any], path: Path) -> None:
    """Write what Hugging Face's ``Dataset.save_to_disk`` would: a column of fixed shape."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Array3D(shape=rows.shape[1:], dtype=str(rows.dtype))})
    for at in range(0, len(rows), STEP):
        part = datasets.Dataset.from_dict({"image": list(rows[at : at + STEP])}, features=features)
        part.save_to_disk(path / f"{at // STEP:05d}")


def _write_pinned(folder: Path) -> dict[str, str]:
    if not PINNED_PYTHON.exists():
        return dict.fromkeys(PINNED_FORMS, f"no {PINNED_PYTHON.parents[1].name}: run `make bench-setup`")
    missing = {}
    for name in PINNED_FORMS:
        try:
            once(folder, name, _write_in_pinned_venv)
        except RuntimeError as error:
            missing[name] = str(error).strip().splitlines()[-1]
    return missing


def _write_in_pinned_venv(path: Path) -> None:
    in_process("benchmarks.pinned_contenders", "write", str(path), python=PINNED_PYTHON)
