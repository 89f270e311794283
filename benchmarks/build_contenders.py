"""One contender of the build benchmark in a process of its own: prints its slices/s as JSON.

    python -m benchmarks.build_contenders NAME TREE OUT SIZE STORE

Every contender uses two processes and starts its clock once they are up.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from ich_prep import Spec, build
from ich_prep.decode import Decoder, PixelSource
from ich_prep.header import read_header
from ich_prep.hounsfield import apply_rescale, apply_rescale_and_windows, apply_windows
from ich_prep.resize import resize_hu
from ich_prep.sharding import ShardWriter

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

PROCESSES = 2


def ours(tree: Path, out: Path, spec: Spec) -> dict[str, Any]:
    """The whole build, scan to publish; the decode stage alone beside it."""
    outcome = build(tree, out, spec, workers=PROCESSES)
    slices = outcome.counts["planned"]
    stages = {name: outcome.seconds[name] for name in ("scan", "plan", "shards", "publish")}
    return {
        "slices": slices,
        "seconds": sum(stages.values()),
        "bytes": outcome.counts["bytes"],
        "stages": stages,
        "started": {name: outcome.seconds[name] for name in ("list", "start workers")},
    }


def limit(tree: Path, out: Path, spec: Spec) -> dict[str, Any]:
    """Two processes that only read, rescale, window, compress and write, with everything known beforehand."""
    paths = sorted(tree.glob("stage_2_*/*.dcm"))
    step = spec.slices_per_shard
    shards = [paths[at : at + step] for at in range(0, len(paths), step)]
    out.mkdir()
    return _race(_write_shards, [shards[part::PROCESSES] for part in range(PROCESSES)], out, spec)


def _write_shards(shards: list[list[Path]], out: Path, spec: Spec, barrier: Barrier, queue: Any) -> None:
    cv2.setNumThreads(1)
    known = [[_known(path) for path in shard] for shard in shards]
    decoder = Decoder()
    pixels = np.empty((spec.channels, spec.size, spec.size), spec.dtype)
    hu = np.empty((spec.size, spec.size), np.int16)
    written = 0
    barrier.wait()
    for number, shard in enumerate(known):
        with open(out / f"{os.getpid()}-{number}", "wb", buffering=0) as file:
            writer = ShardWriter(file, spec.slices_per_shard, spec.codec)
            for source, rescale in shard:
                words = decoder.read(source)
                if words.shape == hu.shape and spec.store == "windows":
                    apply_rescale_and_windows(words, **rescale, windows=spec.windows, out=pixels)
                else:
                    target = pixels[0] if spec.store == "hu" else hu
                    if words.shape == hu.shape:
                        apply_rescale(words, **rescale, out=target)
                    else:
                        full = np.empty(words.shape, np.int16)
                        apply_rescale(words, **rescale, out=full)
                        resize_hu(full, out=target)
                    if spec.store == "windows":
                        apply_windows(hu, windows=spec.windows, out=pixels)
                writer.append(pixels)
            written += writer.finish()[0]
    barrier.wait()
    queue.put(written)


def _known(path: Path) -> tuple[PixelSource, dict[str, Any]]:
    header = read_header(path)
    values = {name: getattr(header, name, None) for name in PixelSource.__slots__}
    signed = header.pixel_representation == 1
    source = PixelSource(**{**values, "path": str(path), "signed": signed})
    slope, intercept = header.rescale_slope, header.rescale_intercept
    return source, {"signed": signed, "slope": slope, "intercept": intercept, "padding": None}


def png_pool(tree: Path, out: Path, spec: Spec) -> dict[str, Any]:
    """What most people write: a pool of processes, pydicom, NumPy windows, one PNG a slice."""
    paths = sorted(tree.glob("stage_2_*/*.dcm"))[: int(os.environ.get("ICH_BENCH_SOME", "1024"))]
    out.mkdir()
    return _race(_write_png, [paths[part::PROCESSES] for part in range(PROCESSES)], out, spec)


def _write_png(paths: list[Path], out: Path, spec: Spec, barrier: Barrier, queue: Any) -> None:
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    cv2.setNumThreads(1)
    written = 0
    barrier.wait()
    for path in paths:
        dataset = pydicom.dcmread(path)
        hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        if hu.shape != (spec.size, spec.size):
            hu = cv2.resize(hu, (spec.size, spec.size), interpolation=cv2.INTER_AREA)
        channels = []
        for window in spec.windows:
            low = window.center - window.width / 2
            channels.append(np.round(np.clip((hu - low) / window.width, 0, 1) * 255).astype(np.uint8))
        target = out / f"{path.stem}.png"
        cv2.imwrite(str(target), np.stack(channels, axis=-1))
        written += target.stat().st_size
    barrier.wait()
    queue.put(written)


def _race(work: Any, parts: list[list[Any]], out: Path, spec: Spec) -> dict[str, Any]:
    """Run ``work`` on each part in a process of its own; the clock runs from the moment when all are ready."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(len(parts) + 1), context.Queue()
    processes = [context.Process(target=work, args=(part, out, spec, barrier, queue)) for part in parts]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - start
    written = sum(queue.get() for _ in processes)
    for process in processes:
        process.join()
    slices = sum(len(item) if isinstance(item, list) else 1 for part in parts for item in part)
    return {"slices": slices, "seconds": seconds, "bytes": written}


CONTENDERS = {"ours": ours, "limit": limit, "png pool": png_pool}


def main() -> None:
    name, tree, out, size, store = sys.argv[1:]
    target = Path(out)
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    result = CONTENDERS[name](Path(tree), target, Spec(layout="rsna", size=int(size), store=store))  # type: ignore[arg-type]
    shutil.rmtree(target, ignore_errors=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
