"""Write docs/benchmarks.md from the results of the last runs.

python -m benchmarks.document
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

DOC = Path(__file__).parent.parent / "docs" / "benchmarks.md"

INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks.document` from the results of the commands below; each figure is the median of
interleaved repeats, with the spread beside it. Ratios are what counts: they are taken in one run on one machine. Rates are
illustrations of the machine that is named.

```
make bench                     # the main questions; then this page
make bench-full                # all of them
python -m benchmarks.build     # one of them; --help shows the options
```

The files are a phantom cohort in RSNA's form (`ich-prep synth`), read warm. Everybody has glibc's
`MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` raised, one thread a process for library code, and two processes or
threads. Starting processes counts for nobody. The limit of a build is two bare processes that read, rescale, window,
compress and write the same files with everything known beforehand; they do not hash or audit anything, or publish. Nor do
they wait for the disk, as a build does, whose bytes must outlive a power cut: the line `synced` is the limit with that
wait. Slower contenders read 512 of the files.

The limit of a loader is a gather of uncompressed pixels from a memory map into reused buffers.
"""


def _rates(result: dict[str, Any]) -> list[str]:
    medians = {rate["name"]: rate["median"] for rate in result["rates"]}
    limit, ours = medians[result["against"]], medians[result["ours"]]
    lines = [
        f"| | slices/s | spread | of {result['against']} | {result['ours']} is | KB/slice | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for rate in result["rates"]:
        size = "" if rate["bytes_per_slice"] is None else f"{rate['bytes_per_slice'] / 1e3:,.0f}"
        spread = f"{min(rate['rates']):,.0f} to {max(rate['rates']):,.0f}"
        lines.append(
            f"| {rate['name']} | {rate['median']:,.0f} | {spread} | {rate['median'] / limit:.2f} "
            f"| {ours / rate['median']:.2f} x | {size} | {rate['note']} |"
        )
    if "stages" in result:
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in result["stages"].items())
        lines += ["", f"Seconds of each stage of ours: {stages} (the last two are left out of the rate)."]
    return lines


def _feeding(result: dict[str, Any]) -> list[str]:
    lines = ["| simulated GPUs | slices/s they eat | waiting for data |", "|---:|---:|---:|"]
    for gpus, share in result["wait_share"].items():
        lines.append(f"| {gpus} | {int(gpus) * result['rate']:,.0f} | {share:.1%} |")
    first = f"First batch {result['first_batch_seconds']:.2f} s after opening a dataset of {result['shards']:,} shards."
    return [*lines, "", first]


def _codecs(result: dict[str, Any]) -> list[str]:
    lines = []
    for title, codecs in result["codecs"].items():
        lines += [f"{title}:", "", "| | of the bytes | encode, us | decode, us |", "|---|---:|---:|---:|"]
        for line in codecs:
            lines.append(f"| {line['codec']} | {line['size']:.3f} | {line['encode']:,.0f} | {line['decode']:,.0f} |")
        lines.append("")
    return lines[:-1]


def _body(result: dict[str, Any]) -> list[str]:
    if "rates" in result:
        return _rates(result)
    return _codecs(result) if "codecs" in result else _feeding(result)


def main() -> None:
    sections = [INTRODUCTION]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        machine = result["machine"]
        names = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
        taken = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}" + (
            f"; {names}." if names else "."
        )
        sections.append("\n".join([f"## {result['title']}", "", *_body(result), "", taken, ""]))
    DOC.write_text("\n".join(sections))


if __name__ == "__main__":
    main()
