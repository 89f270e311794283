"""What does each codec cost and save? Size, and speed on one core, for phantom slices and real CT.

    python -m benchmarks.codecs [--data bench-data] [--real FOLDER]

``--real`` is any folder of CT files (default: head_ct in the shared data next to the repository; skipped with a message
if there is none).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numcodecs import blosc

from benchmarks.files import REAL, cohort
from benchmarks.measure import Section, publish, versions
from ich_prep import Spec, build
from ich_prep.build_dataset import Allowances
from ich_prep.dataset.codecs import ZSTD, block_bytes
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.native import FrameEncoder, decode_frame

SLICES = 64
FORMS = {"3 windows, 512": ("windows", 512), "3 windows, 256": ("windows", 256), "HU, 512": ("hu", 512)}
# Of blosc: name, level, and the shuffle before compression: bytes or bits of equal significance are grouped.
OF_BLOSC = [
    ("lz4", 5, blosc.SHUFFLE),
    ("lz4", 5, blosc.BITSHUFFLE),
    ("lz4", 1, blosc.SHUFFLE),
    ("lz4", 9, blosc.SHUFFLE),
    ("zstd", ZSTD.blosc_level, blosc.SHUFFLE),
    ("zstd", ZSTD.blosc_level, blosc.BITSHUFFLE),
    ("zstd", 5, blosc.SHUFFLE),
]
SHUFFLES = {blosc.SHUFFLE: "byte shuffle", blosc.BITSHUFFLE: "bit shuffle"}


@dataclass(frozen=True)
class Contender:
    """A codec: encodes the pixels of a slice as a frame, and decodes a frame into an array."""

    name: str
    encode: Callable[[np.ndarray], Any]
    decode: Callable[[Any, np.ndarray], Any]


def contenders(one: np.ndarray) -> list[Contender]:
    """Return the codecs for slices like ``one``; the first is what ``--codec lz4`` writes."""
    blosc.use_threads = False
    blocks = block_bytes(one.shape, one.itemsize)
    encoder = FrameEncoder(one.shape, one.dtype, blocks)
    ours = Contender("lz4 by rows, byte shuffle", encoder.encode, decode_frame)
    return [ours] + [
        Contender(
            f"{name} {level}, {SHUFFLES[shuffle]}",
            partial(_by_blosc, name.encode(), level, shuffle, blocks),
            blosc.decompress,
        )
        for name, level, shuffle in OF_BLOSC
    ]


def _by_blosc(name: bytes, level: int, shuffle: int, blocks: int, pixels: np.ndarray) -> Any:
    return blosc.compress(pixels, name, level, shuffle, blocks)


def slices_of(tree: Path, out: Path, store: str, size: int, layout: str) -> np.ndarray:
    """Return up to ``SLICES`` slices, spread over the tree, as stored in a dataset of that form."""
    if not (out / "zarr.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        spec = Spec(layout=layout, size=size, store=store, codec="none")  # type: ignore[arg-type]
        build(tree, out, spec, allow=Allowances(unlabelled=True, max_quarantined=1.0))
    dataset = open_dataset(out)
    ok = np.flatnonzero(dataset.is_ok)
    return dataset.read(ok[:: max(1, len(ok) // SLICES)][:SLICES])


def measure(slices: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """Return for each codec its compressed size as a share, and the median microseconds per slice to encode and decode.

    Codecs take turns; ``ratio`` is the median over the rounds of its decoding time relative to the first codec's.
    """
    out, codecs = np.empty(slices[0].nbytes, np.uint8), contenders(slices[0])
    encoded = [[np.array(np.frombuffer(codec.encode(one), np.uint8)) for one in slices] for codec in codecs]
    encode, decode = np.empty((repeats, len(codecs))), np.empty((repeats, len(codecs)))
    for number in range(repeats):
        for index, codec in enumerate(codecs):
            start = time.perf_counter()
            for one in slices:
                codec.encode(one)
            middle = time.perf_counter()
            for frame in encoded[index]:
                codec.decode(frame, out)
            encode[number, index] = (middle - start) / len(slices) * 1e6
            decode[number, index] = (time.perf_counter() - middle) / len(slices) * 1e6
    return [
        {
            "codec": codec.name,
            "size": sum(map(len, encoded[index])) / slices.nbytes,
            "encode": float(np.median(encode[:, index])),
            "decode": float(np.median(decode[:, index])),
            "ratio": float(np.median(decode[:, index] / decode[:, 0])),
        }
        for index, codec in enumerate(codecs)
    ]


def main(data: Path = Path("bench-data"), real: Path = REAL, repeats: int = 9) -> None:
    sources = {"phantom": (cohort(data, slices=1), "rsna")}
    if real.is_dir():
        sources["real CT"] = (real, "folder")
    else:
        typer.echo(f"No real CT at {real}: only the phantom is measured.")
    sections, shares, raw = [], {}, {}
    for source, (tree, layout) in sources.items():
        for form, (store, size) in FORMS.items():
            out = data / f"codecs-{source.replace(' ', '-')}-{store}-{size}.zarr"
            slices = slices_of(tree, out, store, size, layout)
            title = f"Codecs, one core: {source}, {form}, {len(slices)} slices of {slices[0].nbytes // 1000:,} KB"
            raw[title] = measure(slices, repeats)
            lines = [
                [line["codec"], f"{line['size']:.3f}", f"{line['encode']:,.0f}", f"{line['decode']:,.0f}"]
                for line in raw[title]
            ]
            sections.append(Section(title, ["", "of the bytes", "encode, us", "decode, us"], lines))
            shares |= {f"{title}: {line['codec']}": line["ratio"] for line in raw[title][1:]}
    publish("codecs", sections, releases=versions("numcodecs", "numpy"), ratios=shares, raw=raw)


if __name__ == "__main__":
    typer.run(main)
