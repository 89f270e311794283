"""What does each codec cost and save? Size, and one core's speed, on phantom slices and on real CT.

    python -m benchmarks.codecs [--data bench-data] [--real FOLDER]

``--real`` is any folder of CT files (default: head_ct beside the repository's shared data, left out with a remark where
there is none).
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numcodecs import blosc

from benchmarks.files import REAL, cohort
from benchmarks.measure import Section, publish, versions
from ich_prep import Spec, build
from ich_prep.build_dataset import Allowances
from ich_prep.sharding import BLOSC_LEVELS, block_bytes
from ich_prep.store import open_dataset

SLICES = 64
FORMS = {"3 windows, 512": ("windows", 512), "3 windows, 256": ("windows", 256), "HU, 512": ("hu", 512)}
# Name, level, and what is done to the bytes of an item before: whole bytes or bits of equal weight stand together.
CODECS = [
    ("lz4", BLOSC_LEVELS["lz4"], blosc.SHUFFLE),
    ("lz4", BLOSC_LEVELS["lz4"], blosc.BITSHUFFLE),
    ("lz4", 1, blosc.SHUFFLE),
    ("lz4", 9, blosc.SHUFFLE),
    ("zstd", BLOSC_LEVELS["zstd"], blosc.SHUFFLE),
    ("zstd", BLOSC_LEVELS["zstd"], blosc.BITSHUFFLE),
    ("zstd", 5, blosc.SHUFFLE),
]
SHUFFLES = {blosc.SHUFFLE: "byte shuffle", blosc.BITSHUFFLE: "bit shuffle"}


def slices_of(tree: Path, out: Path, store: str, size: int, layout: str) -> np.ndarray:
    """Return up to ``SLICES`` slices, spread over the tree, as a dataset of that form holds them."""
    if not (out / "zarr.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        spec = Spec(layout=layout, size=size, store=store, codec="none")  # type: ignore[arg-type]
        build(tree, out, spec, allow=Allowances(unlabelled=True, max_quarantined=1.0))
    dataset = open_dataset(out)
    ok = np.flatnonzero(dataset.slices["status"].to_numpy() == "ok")
    return dataset.read(ok[:: max(1, len(ok) // SLICES)][:SLICES])


def measure(slices: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """Return for each codec the share of the bytes that is left, and the median microseconds a slice of either way.

    Codecs take turns; ``ratio`` is the median of how many times as long as the first one it decodes in the same round.
    """
    blosc.use_threads = False
    out, blocks = np.empty_like(slices[0]), block_bytes(slices[0].nbytes)
    encoded = [
        [blosc.compress(one, name.encode(), level, shuffle, blocks) for one in slices]
        for name, level, shuffle in CODECS
    ]
    encode, decode = np.empty((repeats, len(CODECS))), np.empty((repeats, len(CODECS)))
    for number in range(repeats):
        for index, (name, level, shuffle) in enumerate(CODECS):
            start = time.perf_counter()
            for one in slices:
                blosc.compress(one, name.encode(), level, shuffle, blocks)
            middle = time.perf_counter()
            for frame in encoded[index]:
                blosc.decompress(frame, out)
            encode[number, index] = (middle - start) / len(slices) * 1e6
            decode[number, index] = (time.perf_counter() - middle) / len(slices) * 1e6
    return [
        {
            "codec": f"{name} {level}, {SHUFFLES[shuffle]}",
            "size": sum(map(len, encoded[index])) / slices.nbytes,
            "encode": float(np.median(encode[:, index])),
            "decode": float(np.median(decode[:, index])),
            "ratio": float(np.median(decode[:, index] / decode[:, 0])),
        }
        for index, (name, level, shuffle) in enumerate(CODECS)
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
