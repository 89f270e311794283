"""Interleaved repeats, medians and spread, the machine, and results as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ich_prep.execute import MALLOC_ENVIRONMENT, ONE_THREAD

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Rate:
    """What one contender reached: slices/s in each repeat, and bytes per slice on disk where it wrote or read any."""

    name: str
    rates: tuple[float, ...]
    bytes_per_slice: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def spread(self) -> str:
        return f"{min(self.rates):,.0f}-{max(self.rates):,.0f}"


def interleave(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """Return what each contender returned in each of ``repeats`` rounds, A B C A B C, so that drift hits all alike."""
    found: dict[str, list[Any]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            found[name].append(run())
    return found


def in_process(module: str, *arguments: str, malloc: bool = True, python: str = sys.executable) -> dict[str, Any]:
    """Run ``python -m module arguments`` and return the JSON in the last line that it prints.

    With ``malloc`` glibc keeps freed memory (see docs/benchmarks.md); libraries use one thread a process.
    """
    environment = {**os.environ, **ONE_THREAD, **(MALLOC_ENVIRONMENT if malloc else {})}
    done = subprocess.run(
        [python, "-m", module, *arguments],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def warm(paths: Sequence[Path]) -> None:
    """Read files once, so that they lie in the page cache."""
    for path in paths:
        path.read_bytes()


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return the releases of the named distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def report(title: str, rates: Sequence[Rate], *, against: str, ours: str, name: str, extra: dict[str, Any]) -> None:
    """Print a table of ``rates`` with ratios, and write it to ``results/<name>.json``.

    ``against`` names the limit: each rate is shown as a share of it. ``ours`` is compared with each rate.
    """
    by_name = {rate.name: rate for rate in rates}
    table = Table(
        "", "slices/s", "spread", f"of {against}", f"{ours} is", "KB/slice", "", title=title, title_justify="left"
    )
    for rate in rates:
        table.add_row(
            rate.name,
            f"{rate.median:,.0f}",
            rate.spread,
            f"{rate.median / by_name[against].median:.2f}",
            f"{by_name[ours].median / rate.median:.2f} x",
            "" if rate.bytes_per_slice is None else f"{rate.bytes_per_slice / 1e3:,.0f}",
            rate.note,
        )
    Console(width=140, highlight=False).print(table)
    RESULTS.mkdir(exist_ok=True)
    document = {
        "title": title,
        "machine": machine(),
        "against": against,
        "ours": ours,
        "rates": [{**asdict(rate), "median": rate.median} for rate in rates],
        **extra,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
