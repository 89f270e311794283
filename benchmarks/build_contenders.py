"""One contender of the build benchmark in its own process: prints its slices/s as JSON.

    python -m benchmarks.build_contenders NAME TREE OUT SIZE STORE LAYOUT WORKERS

Every contender uses two processes (ours: WORKERS) and starts its clock once they are up.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from threading import BrokenBarrierError
from typing import TYPE_CHECKING, Any

import cv2
import google_crc32c
import numpy as np
from numcodecs import blosc

from ich_prep import Spec, build
from ich_prep.build_dataset import Allowances
from ich_prep.dataset.codecs import CODECS, block_bytes
from ich_prep.dataset.shard_format import ShardWriter
from ich_prep.dataset.storage import sync_file
from ich_prep.dataset.windows import MAX_HU, MIN_HU, Window, window_codes
from ich_prep.dicom.decode import JPEG_PLUGIN, PIXEL_FIELDS, PLUGINS, Decoder, PixelSource
from ich_prep.dicom.header import read_header
from ich_prep.pixels.hounsfield import Rescale, rescale_table
from ich_prep.pixels.render import Scratch, render
from ich_prep.sources import FolderSource, read_ahead
from ich_prep.stages.shard import FILES_AHEAD

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

PROCESSES = 2
SOME = 256
STRIP = 128  # rows that OpenCV windows at a time
SHARDS_OF_DASK = 4  # which its processes gather, encode and write in parallel
DCM2NIIX_SLICES = 2000  # with fewer, mostly its start-up would be timed


def ours(tree: Path, out: Path, spec: Spec, workers: int) -> dict[str, Any]:
    """The whole build, scan to publish; also the seconds of each stage, and the CPU time of driver and workers."""
    outcome = build(tree, out, spec, workers=workers, allow=Allowances(unlabelled=True, max_quarantined=1.0))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    driver, children = (one.ru_utime + one.ru_stime for one in used)
    return {
        "slices": outcome.counts["planned"],
        "seconds": sum(outcome.seconds[name] for name in ("scan", "plan", "shards", "publish")),
        "bytes": outcome.counts["bytes"],
        "stages": outcome.seconds,
        "cpu": {"driver": driver, "workers": children},
    }


def files_below(tree: Path) -> list[Path]:
    """Return the slices of an RSNA tree, or of one plain folder."""
    return sorted(tree.glob("stage_2_*/*.dcm")) or sorted(tree.glob("*.dcm"))


def limit(tree: Path, out: Path, spec: Spec) -> dict[str, Any]:
    """Two processes that only read, rescale, window, compress and write, with all headers known in advance."""
    return _write_in_two(tree, out, spec, _window_and_encode)


def limit_of_libraries(tree: Path, out: Path, spec: Spec) -> dict[str, Any]:
    """The same with the fastest calls of OpenCV and blosc that we know of."""
    return _write_in_two(tree, out, spec, _window_and_encode_by_libraries)


# Renders the stored values of a slice and writes its chunk.
Write = Callable[[np.ndarray, Rescale], None]
# Returns two functions for a file: one writes a slice, one finishes the file.
Encoder = Callable[[Any, Spec], tuple[Write, Callable[[], object]]]


def _write_in_two(tree: Path, out: Path, spec: Spec, encoder: Encoder) -> dict[str, Any]:
    paths = files_below(tree)
    step = spec.slices_per_shard
    shards = [paths[at : at + step] for at in range(0, len(paths), step)]
    out.mkdir()
    return _race(partial(_write_shards, encoder), [shards[part::PROCESSES] for part in range(PROCESSES)], out, spec)


def _write_shards(
    encoder: Encoder, shards: list[list[Path]], out: Path, spec: Spec, barrier: Barrier, queue: Any
) -> None:
    cv2.setNumThreads(1)
    known = [[_known(path) for path in shard] for shard in shards]
    decoder = Decoder()
    written = 0
    barrier.wait()
    for number, shard in enumerate(known):
        with open(out / f"{os.getpid()}-{number}", "wb", buffering=0) as file:
            write, finish = encoder(file, spec)
            for source, rescale in read_ahead(shard[0][0].source, shard, lambda known: known[0].key, files=FILES_AHEAD):
                write(decoder.read(source), rescale)
            finish()
            written += os.fstat(file.fileno()).st_size
    barrier.wait()
    queue.put(written)


def _window_and_encode(file: Any, spec: Spec) -> tuple[Write, Callable[[], object]]:
    """With the functions that a build calls."""
    writer = ShardWriter(file, spec.slices_per_shard, CODECS[spec.codec])
    pixels = np.empty((spec.channels, spec.size, spec.size), spec.dtype)
    windows = spec.windows if spec.store == "windows" else None
    scratch = Scratch()

    def write(stored: np.ndarray, rescale: Rescale) -> None:
        render(stored, rescale, windows=windows, out=pixels, scratch=scratch)
        writer.append(pixels)

    return write, writer.finish


def _window_and_encode_by_libraries(file: Any, spec: Spec) -> tuple[Write, Callable[[], object]]:
    """With one lookup for all windows and a split, in strips that fit in L2, and blosc."""
    blosc.use_threads = False
    pixels = np.empty((spec.channels, spec.size, spec.size), spec.dtype)
    hu = np.empty((1, spec.size, spec.size), np.int16)
    scratch = Scratch()
    codes = np.empty((STRIP, spec.size), np.int32)
    planes = [np.empty((STRIP, spec.size), np.uint8) for _ in range(4)]
    blocks = block_bytes(pixels.shape, pixels.itemsize)
    ends: list[int] = []

    def write(stored: np.ndarray, rescale: Rescale) -> None:
        if spec.store == "hu":
            render(stored, rescale, windows=None, out=pixels, scratch=scratch)
        else:
            native = stored.shape == pixels.shape[1:]
            if not native:
                render(stored, rescale, windows=None, out=hu, scratch=scratch)
            values, table = stored if native else hu[0], _table(spec.windows, rescale if native else None)
            for top in range(0, spec.size, STRIP):
                lines = slice(top, min(top + STRIP, spec.size))
                strip = codes[: lines.stop - top]
                cv2.LUT(values[lines].view(np.uint16), table, dst=strip)
                some = [*pixels[:, lines], *(plane[: lines.stop - top] for plane in planes[spec.channels :])]
                cv2.split(strip.view(np.uint8).reshape(*strip.shape, 4), some)
        frame = blosc.compress(pixels, spec.codec.encode(), CODECS[spec.codec].blosc_level, blosc.SHUFFLE, blocks)
        ends.append(file.write(frame + google_crc32c.value(frame).to_bytes(4, "little")))

    return write, lambda: file.write(np.array(ends, "<u8").tobytes())


@cache
def _table(windows: tuple[Window, ...], rescale: Rescale | None) -> np.ndarray:
    """Return the codes of every stored value, or of every HU, one byte for each of up to four windows: int32 (65536,)."""
    hu = np.arange(65536, dtype=np.uint16).view(np.int16) if rescale is None else rescale_table(rescale)
    codes = np.zeros((65536, 4), np.uint8)
    for index, window in enumerate(windows):
        codes[:, index] = window_codes(hu, window)
    return codes.view(np.int32).reshape(65536)


def _known(path: Path) -> tuple[PixelSource, Rescale]:
    header = read_header(path)
    signed = header.pixel_representation == 1
    values = {name: getattr(header, name, None) for name in PIXEL_FIELDS} | {"signed": signed}
    key = os.fsencode(path.absolute())[1:]
    source = PixelSource(source=FolderSource(Path("/")), key=key, **values)  # type: ignore[arg-type]
    return source, Rescale(header.rescale_slope, header.rescale_intercept, signed)


def limit_on_disk(tree: Path, out: Path, spec: Spec) -> dict[str, Any]:
    """The limit, including the wait until its bytes are on the disk, as in a build."""
    result = limit(tree, out, spec)
    before = time.perf_counter()
    for path in out.iterdir():
        sync_file(path, folders=0)
    return {**result, "seconds": result["seconds"] + time.perf_counter() - before}


def _some(tree: Path) -> list[Path]:
    """Return the files that the slower contenders read: their rate does not depend on the number."""
    return files_below(tree)[:SOME]


def _slice_by_slice(work: Callable[[Path, Path, Spec], Path], tree: Path, out: Path, spec: Spec) -> dict[str, Any]:
    """Run ``work`` on one file after the other in a pool of processes; it returns the file that it wrote."""
    paths = _some(tree)
    out.mkdir()
    return _race(partial(_each, work), [paths[part::PROCESSES] for part in range(PROCESSES)], out, spec)


def _each(
    work: Callable[[Path, Path, Spec], Path], paths: list[Path], out: Path, spec: Spec, barrier: Barrier, queue: Any
) -> None:
    cv2.setNumThreads(1)
    work(paths[0], out, spec)  # imports, before the clock starts
    barrier.wait()
    written = sum(work(path, out, spec).stat().st_size for path in paths)
    barrier.wait()
    queue.put(written)


def _read_hu(path: Path, spec: Spec) -> np.ndarray:
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    _add_decoders()
    dataset = pydicom.dcmread(path)
    hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    if hu.shape != (spec.size, spec.size):
        hu = cv2.resize(hu, (spec.size, spec.size), interpolation=cv2.INTER_AREA)
    return hu


@cache
def _add_decoders() -> None:
    """Let pydicom decode JPEG with the plugin that a build uses: it has no built-in one."""
    from pydicom.pixels.decoders.base import get_decoder

    for syntax, plugin in PLUGINS.items():
        if plugin == JPEG_PLUGIN:
            get_decoder(syntax).add_plugin(plugin, ("ich_prep.dicom.jpeg_plugin", "decode_frame"))


def _pixels(hu: np.ndarray, spec: Spec) -> np.ndarray:
    if spec.store == "hu":
        return np.clip(np.round(hu), MIN_HU, MAX_HU).astype(np.int16)[np.newaxis]
    lows = [window.center - window.width / 2 for window in spec.windows]
    planes = [
        np.round(np.clip((hu - low) / window.width, 0, 1) * 255).astype(np.uint8)
        for low, window in zip(lows, spec.windows, strict=True)
    ]
    return np.stack(planes)


def _with_png(path: Path, out: Path, spec: Spec) -> Path:
    """The usual script: pydicom, NumPy windows, one PNG per slice (16 bits for HU)."""
    target = out / f"{path.stem}.png"
    image = np.ascontiguousarray(_pixels(_read_hu(path, spec), spec).transpose(1, 2, 0))
    cv2.imwrite(str(target), image if image.dtype == np.uint8 else (image.astype(np.int32) + 32768).astype(np.uint16))
    return target


def _with_simpleitk(path: Path, out: Path, spec: Spec) -> Path:
    """SimpleITK reads, rescales, windows and resizes; one uncompressed array per slice."""
    import SimpleITK as sitk  # noqa: N813

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    image = sitk.ReadImage(str(path), sitk.sitkFloat32)[:, :, 0]
    if image.GetSize() != (spec.size, spec.size):
        spacing = [old * pixels / spec.size for old, pixels in zip(image.GetSpacing(), image.GetSize(), strict=True)]
        image = sitk.Resample(
            image,
            (spec.size, spec.size),
            sitk.Transform(),
            sitk.sitkLinear,
            image.GetOrigin(),
            spacing,
            image.GetDirection(),
        )
    if spec.store == "hu":
        clipped = sitk.Clamp(image, sitk.sitkInt16, MIN_HU, MAX_HU)
        return _saved(out / f"{path.stem}.npy", sitk.GetArrayViewFromImage(clipped)[np.newaxis])
    planes = []
    for window in spec.windows:
        low = window.center - window.width / 2
        scaled = sitk.IntensityWindowing(image, low, low + window.width, 0.0, 255.0)
        planes.append(sitk.GetArrayViewFromImage(sitk.Cast(sitk.Round(scaled), sitk.sitkUInt8)).copy())
    return _saved(out / f"{path.stem}.npy", np.stack(planes))


def _saved(target: Path, pixels: np.ndarray) -> Path:
    np.save(target, pixels)
    return target


def _with_monai(path: Path, out: Path, spec: Spec) -> Path:
    """MONAI's transforms; one uncompressed array per slice."""
    load, windows, resize = _monai_transforms(spec)
    image = load(path)
    if image.shape[1:] != (spec.size, spec.size):
        image = resize(image)
    codes = np.concatenate([window(image) for window in windows])
    return _saved(out / f"{path.stem}.npy", np.round(codes).astype(spec.dtype))


@cache
def _monai_transforms(spec: Spec) -> tuple[Any, list[Any], Any]:
    import torch
    from monai.transforms import LoadImage, Resize, ScaleIntensityRange

    torch.set_num_threads(1)
    ranges = [(one.center - one.width / 2, one.center + one.width / 2, 0, 255) for one in spec.windows]
    if spec.store == "hu":
        ranges = [(MIN_HU, MAX_HU, MIN_HU, MAX_HU)]
    windows = [
        ScaleIntensityRange(a_min=low, a_max=high, b_min=least, b_max=most, clip=True)
        for low, high, least, most in ranges
    ]
    load = LoadImage(reader="PydicomReader", image_only=True, ensure_channel_first=True)
    return load, windows, Resize((spec.size, spec.size), mode="area")


def dask_and_zarr(tree: Path, out: Path, spec: Spec) -> dict[str, Any]:
    """A dask.array with one block per slice, rechunked to shards and stored by zarr-python; pydicom reads."""
    import dask.array as da
    import zarr
    from dask import delayed
    from distributed import Client, LocalCluster

    paths = files_below(tree)[: SHARDS_OF_DASK * spec.slices_per_shard]
    shape = (spec.channels, spec.size, spec.size)
    with (
        LocalCluster(n_workers=PROCESSES, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        client.run(_warm_up_dask, paths[0], spec)
        start = time.perf_counter()
        blocks = [da.from_delayed(delayed(_block)(path, spec), (1, *shape), spec.dtype) for path in paths]
        array = da.concatenate(blocks).rechunk((spec.slices_per_shard, *shape))
        target = zarr.create_array(
            out,
            shape=array.shape,
            dtype=spec.dtype,
            chunks=(1, *shape),
            shards=(spec.slices_per_shard, *shape),
            compressors=zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
        )
        da.store(array, target, lock=False)
        seconds = time.perf_counter() - start
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"slices": len(paths), "seconds": seconds, "bytes": written}


def _warm_up_dask(path: Path, spec: Spec) -> None:
    """Import on a worker what its tasks import, before the clock starts."""
    import zarr.codecs  # noqa: F401

    _block(path, spec)


def _block(path: Path, spec: Spec) -> np.ndarray:
    return _pixels(_read_hu(path, spec), spec)[np.newaxis]


def dcm2niix(tree: Path, out: Path, spec: Spec) -> dict[str, Any]:
    """dcm2niix as a decoder: NIfTI, uncompressed, no windows; each process has half of the slices, in whole series."""
    inputs = out.with_name("dcm2niix-in")
    shutil.rmtree(inputs, ignore_errors=True)
    series = defaultdict(list)
    for path in files_below(tree):
        series[read_header(path).series_instance_uid].append(path)
    counts = [0] * PROCESSES
    for part in range(PROCESSES):
        (inputs / str(part)).mkdir(parents=True)
        (out / str(part)).mkdir(parents=True)
    for paths in series.values():
        if sum(counts) < DCM2NIIX_SLICES:
            part = counts.index(min(counts))
            counts[part] += len(paths)
            for path in paths:
                (inputs / str(part) / path.name).symlink_to(path.absolute())
    start = time.perf_counter()
    processes = [
        subprocess.Popen(
            ["dcm2niix", "-z", "n", "-b", "n", "-f", "%j", "-o", str(out / str(part)), str(inputs / str(part))],
            stdout=subprocess.DEVNULL,
        )
        for part in range(PROCESSES)
    ]
    codes = [process.wait() for process in processes]
    seconds = time.perf_counter() - start
    shutil.rmtree(inputs)
    if any(codes):
        raise RuntimeError(f"dcm2niix ended with {codes}")
    written = sum(path.stat().st_size for path in out.rglob("*.nii"))
    return {"slices": sum(counts), "seconds": seconds, "bytes": written}


def _run_part(work: Any, part: list[Any], out: Path, spec: Spec, barrier: Barrier, queue: Any) -> None:
    """Run ``work``; if it fails, release those that wait for it."""
    try:
        work(part, out, spec, barrier, queue)
    except BaseException:
        barrier.abort()
        raise


def _race(work: Any, parts: list[list[Any]], out: Path, spec: Spec) -> dict[str, Any]:
    """Run ``work`` on each part in its own process; the clock starts when all are ready."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(len(parts) + 1), context.Queue()
    processes = [context.Process(target=_run_part, args=(work, part, out, spec, barrier, queue)) for part in parts]
    for process in processes:
        process.start()
    try:
        barrier.wait()
        start = time.perf_counter()
        barrier.wait()
    except BrokenBarrierError:
        raise RuntimeError("a process of this contender failed: see its output above") from None
    seconds = time.perf_counter() - start
    written = sum(queue.get() for _ in processes)
    for process in processes:
        process.join()
    slices = sum(len(item) if isinstance(item, list) else 1 for part in parts for item in part)
    return {"slices": slices, "seconds": seconds, "bytes": written}


CONTENDERS = {
    "limit": limit,
    "limit of libraries": limit_of_libraries,
    "limit on disk": limit_on_disk,
    "png pool": partial(_slice_by_slice, _with_png),
    "simpleitk": partial(_slice_by_slice, _with_simpleitk),
    "monai": partial(_slice_by_slice, _with_monai),
    "dask and zarr": dask_and_zarr,
    "dcm2niix": dcm2niix,
}


def main() -> None:
    name, tree, out, size, store, layout, workers = sys.argv[1:]
    target = Path(out)
    shutil.rmtree(target, ignore_errors=True)
    os.sync()  # a build waits for its own writes, not for other writes
    spec = Spec(layout=layout, size=int(size), store=store)  # type: ignore[arg-type]
    if name == "ours":
        result = ours(Path(tree), target, spec, int(workers))
    else:
        result = CONTENDERS[name](Path(tree), target, spec)
    shutil.rmtree(target, ignore_errors=True)
    print(json.dumps({**result, "rate": result["slices"] / result["seconds"]}))


if __name__ == "__main__":
    main()
