"""One contender of the decoding benchmark in its own process: prints the result as JSON.

python -m benchmarks.decoding_contenders NAME FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.build_contenders import PROCESSES, _known, _race
from benchmarks.files import SYNTAXES
from ich_prep import Spec
from ich_prep.dicom.decode import Decoder
from ich_prep.sources import FolderSource
from ich_prep.stages.scan import scan_file
from ich_prep.stages.shard import pixel_source

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

ROUNDS = 2


def in_two(work: Any, folder: Path) -> dict[str, Any]:
    """Run ``work`` on the files of ``folder``, in two processes."""
    paths = sorted(folder.iterdir())
    parts = [paths[part::PROCESSES] * ROUNDS for part in range(PROCESSES)]
    return _race(work, parts, folder.parent, Spec())


def _scan_and_decode(paths: list[Path], _: Path, __: Spec, barrier: Barrier, queue: Any) -> None:
    source, keys = FolderSource(paths[0].parent), [os.fsencode(path.name) for path in paths]
    decoder = Decoder()
    decoder.read(pixel_source(source, keys[0], scan_file(source, keys[0], keys[0])))
    barrier.wait()
    for key in keys:
        decoder.read(pixel_source(source, key, scan_file(source, key, key)))
    barrier.wait()
    decoder.close()
    queue.put(0)


def _decode(paths: list[Path], _: Path, __: Spec, barrier: Barrier, queue: Any) -> None:
    sources = [_known(path)[0] for path in paths]
    decoder = Decoder()
    decoder.read(sources[0])
    barrier.wait()
    for source in sources:
        decoder.read(source)
    barrier.wait()
    decoder.close()
    queue.put(0)


def _call_the_decoder(paths: list[Path], _: Path, __: Spec, barrier: Barrier, queue: Any) -> None:
    """The limit: the frames are in memory, and the pixels are dropped."""
    import pydicom
    from pydicom.encaps import get_frame

    datasets = [pydicom.dcmread(path) for path in paths[: len(paths) // ROUNDS]]
    frames = [get_frame(dataset.PixelData, 0, number_of_frames=1) for dataset in datasets] * ROUNDS
    decode = bare_decoder(datasets[0])
    decode(frames[0])
    barrier.wait()
    for frame in frames:
        decode(frame)
    barrier.wait()
    queue.put(0)


def bare_decoder(dataset: Any) -> Callable[[bytes], Any]:
    """Return the call of the library that decodes the dataset's transfer syntax: frame -> pixels."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax == SYNTAXES["RLE"]:
        from rle.rle import decode_frame

        return lambda frame: decode_frame(frame, dataset.Rows * dataset.Columns, dataset.BitsAllocated, "<")
    if syntax == SYNTAXES["JPEG 2000 lossless"]:
        from openjpeg import decode_pixel_data

        return partial(decode_pixel_data, version=2)
    import imagecodecs

    decode = imagecodecs.jpegls_decode if syntax == SYNTAXES["JPEG-LS lossless"] else imagecodecs.jpeg8_decode
    out = np.empty((dataset.Rows, dataset.Columns), f"u{dataset.BitsAllocated // 8}")
    return partial(decode, out=out)


CONTENDERS = {
    "scan and decode": partial(in_two, _scan_and_decode),
    "decode": partial(in_two, _decode),
    "bare decoder": partial(in_two, _call_the_decoder),
}


def main() -> None:
    name, folder = sys.argv[1:]
    result = CONTENDERS[name](Path(folder))
    print(json.dumps({**result, "rate": result["slices"] / result["seconds"]}))


if __name__ == "__main__":
    main()
