"""Write docs/benchmarks.md from the results of the last runs.

python -m benchmarks.document
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.measure import RESULTS, ROOT

DOC = ROOT / "docs" / "benchmarks.md"

INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks.document` from the results of the commands below. Contenders take turns, and each figure
is the median over the rounds, with the spread beside it. Ratios are what counts: each is taken within a round, side by
side on one machine, and the median of these is shown. Rates are illustrations of the machine that is named.

```
make bench-setup               # the peers, in two venvs of their own
make bench                     # the main questions; then this page
make bench-full                # all of them; training where there is a GPU
python -m benchmarks.build     # one of them; --help shows the options
python -m benchmarks.agree     # do the last two runs agree?
```

* *Files.* A phantom cohort in RSNA's form (`ich-prep synth`) and, where it is said, copies of real CT slices under other
  identifiers. They lie in the page cache, but for the questions that say *cold*: for these they are dropped from it before
  each run. Contenders that are slow read 256 of them, dask.array + zarr-python 1,024, dcm2niix 2,000.
* *Malloc.* The first round runs every contender as it comes and with glibc's `MALLOC_MMAP_THRESHOLD_` and
  `MALLOC_TRIM_THRESHOLD_` raised; the others stay with what was better. Both are shown. The workers of a build of ours
  have them raised in any case. Before the first round whoever is first runs once for nobody.
* *Stolen time.* A hypervisor may give a machine's cores to others for a while; Linux counts that (`steal`). A build of which
  more than 3% was stolen runs once more, and the better served run counts. A warm loader is timed in quarters of a second,
  of which those count that were stolen from least.
* *Peers.* FFCV is built when it is installed, which needs a C++ compiler, pkg-config, and the headers of OpenCV and
  libturbojpeg; dcm2niix is a program of its own. Where one of them is not there, it is left out, and that is said.
  dcm2niix also writes volumes straightened from a tilt and made even in spacing, which nobody else does.
* *Processes.* Two each, one thread a process for library code. Starting them, and importing libraries, counts for
  nobody.
* *The limit of a build* is two bare processes that read, rescale, window, compress and write the same files by the same
  compiled functions, with everything known beforehand; they do not hash or audit anything, or publish. Nor do they wait
  for the disk, as a build does, whose bytes must outlive a power cut: the line `synced` is the limit with that wait. The
  line `OpenCV and blosc` is the same by calls of these two libraries, without that wait. As a build, they ask
  the kernel for files before their turn. Where files are cold, they have read their headers, but not their pixels, before
  their clock starts.
* *The limit of a loader* is a gather of uncompressed pixels from a memory map by two threads, into as many buffers, used
  over and over, as SliceLoader has: of fewer a part would stay in the CPU's cache.
* *Loaders* all give the same pixels: the first 64 rows of each are compared. Before the clock of a warm one starts, it has
  run for as long as it will be timed: to touch buffers and maps for the first time can cost more than to fill them.
  SliceLoader, WebDataset, LitData and MosaicML Streaming go through several epochs, the workers of the last three stay for
  all of them; the epoch of each other lasts as long as it is timed. WebDataset shuffles a buffer of 1,000 slices, LitData
  chunks and then the rows of some chunks; all others visit slices in an order random over the whole. zarr-python and zarrs
  read slice by slice from two threads, which is their faster way. *First batch* includes what a loader imports of its own.
  *Memory* is what the process and its children hold of their own and in shared memory, without the page cache.
* *Training* takes the very steps of `ich-train run` on a GPU, from one process that stays on two cores with all that reads
  data for it. Its limit is eight batches that lie on the GPU and come again and again; what is compiled is
  compared with a limit that is compiled, too. Malloc is as it comes.
"""

ORDER = ("build", "loader", "feeding", "training", "scaling", "codecs")


def section_text(section: dict[str, Any]) -> str:
    """Return the Markdown of one table and its notes."""
    header = section["header"]
    lines = [f"## {section['title']}", "", f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    lines += [f"| {' | '.join(line)} |" for line in section["lines"]]
    for note in section["notes"]:
        lines += ["", note]
    return "\n".join([*lines, ""])


def main() -> None:
    parts = [INTRODUCTION]
    paths = sorted(RESULTS.glob("*.json"), key=lambda path: ORDER.index(path.stem.split("-")[0]))
    for path in paths:
        result = json.loads(path.read_text())
        parts += map(section_text, result["sections"])
        releases = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        parts.append(f"{result['machine']}{'; ' + releases if releases else ''}.\n")
    DOC.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
