"""How fast are compressed slices decoded in a process that may crash, compared with bare calls of the same decoders?

    python -m benchmarks.decoding [--slices 512] [--repeats 5] [--data bench-data]

Two processes each. The limit is two bare processes that call the same decoder on the same frames, which are in their memory.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import typer

from benchmarks.files import COMPRESSED, in_syntax, warm
from benchmarks.measure import Run, Section, compete, in_process, publish, ratio, undisturbed, versions

SCAN, DECODE, LIMIT = "scan and decode", "decode", "bare decoder"
PACKAGES = ("numpy", "pylibjpeg-openjpeg", "pylibjpeg-rle", "imagecodecs")


def main(slices: int = 512, repeats: int = 5, data: Path = Path("bench-data")) -> None:
    lines, shares, raw = [], {}, {}
    for name in COMPRESSED:
        folder = in_syntax(data.absolute(), name, slices=slices)
        warm(sorted(folder.iterdir()))
        results = compete(
            {label: partial(contend, label, folder) for label in (SCAN, DECODE, LIMIT)}, repeats, both_settings=False
        )
        scan, decode, limit = (results[label] for label in (SCAN, DECODE, LIMIT))
        shares |= {f"{name}, {SCAN}": ratio(scan, limit), f"{name}, {DECODE}": ratio(decode, limit)}
        raw[name] = {label: vars(one) for label, one in results.items()}
        rates = [text for one in (scan, decode, limit) for text in (f"{one.median():,.0f}", one.spread)]
        lines.append([name, *rates, f"{ratio(scan, limit):.2f}", f"{ratio(decode, limit):.2f}"])
    header = ["", "scan and decode, slices/s", "spread", "decode", "spread", "two bare processes", "spread"]
    header += ["scan and decode, of the bare", "decode, of the bare"]
    title = f"Decoding: compressed slices of 512 x 512, {slices} slices, 2 processes"
    publish("build-decoding", [Section(title, header, lines)], releases=versions(*PACKAGES), ratios=shares, raw=raw)


def contend(name: str, folder: Path, raised: bool) -> Run:
    """Run one contender in its own process, and again if much CPU time was stolen meanwhile."""
    return undisturbed(partial(in_process, "benchmarks.decoding_contenders", name, str(folder), raised=raised))


if __name__ == "__main__":
    typer.run(main)
