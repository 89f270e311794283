"""Interleaved repeats at two malloc settings, medians and spread, and results as tables and JSON."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.racing import core_time, stolen_since
from ich_prep.execute import MALLOC_ENVIRONMENT, ONE_THREAD

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BEFORE = RESULTS / "before"
MAX_STOLEN = 0.03

Run = dict[str, Any]  # what a contender prints: its "rate" in slices/s, and more


@dataclass
class Result:
    """The result of one contender: its runs at the better malloc setting, and one run at the other."""

    runs: list[Run] = field(default_factory=list)
    raised: bool = False
    other: Run | None = None

    def median(self, key: str = "rate") -> float:
        return statistics.median(run[key] for run in self.runs)

    @property
    def spread(self) -> str:
        rates = [run["rate"] for run in self.runs]
        return f"{min(rates):,.0f} to {max(rates):,.0f}"

    @property
    def malloc(self) -> str:
        """Say which setting was better, and the rate at the other."""
        if self.other is None:
            return ""
        here, there = ("raised", "as it comes") if self.raised else ("as it comes", "raised")
        return f"{here}; {there} {self.other['rate']:,.0f}"


def compete(
    contenders: Mapping[str, Callable[[bool], Run]], repeats: int, *, both_settings: bool = True
) -> dict[str, Result]:
    """Run each contender in each of ``repeats`` rounds, A B C A B C, so that drift hits all alike.

    A contender's argument says whether to raise glibc's malloc thresholds. The first round tries both settings; the
    others keep the better one. Without ``both_settings`` they are always raised. A contender that fails is reported and
    skipped. The first contender has one uncounted warm-up run: the first process finds an idle machine.
    """
    results = {name: Result(raised=not both_settings) for name in contenders}
    with contextlib.suppress(RuntimeError):  # it fails again in the first round
        next(iter(contenders.values()))(True)
    for number in range(repeats):
        for name, one in list(results.items()):
            try:
                if number == 0 and both_settings:
                    plain, raised = contenders[name](False), contenders[name](True)
                    one.raised = raised["rate"] > plain["rate"]
                    one.runs, one.other = ([raised], plain) if one.raised else ([plain], raised)
                else:
                    one.runs.append(contenders[name](one.raised))
            except RuntimeError as error:
                Console(stderr=True).print(f"Skipped: {name}: {error}", markup=False)
                del results[name]
    return results


def in_process(
    module: str, *arguments: str, raised: bool = True, python: Path | str = sys.executable, seconds: float = 600
) -> Run:
    """Run ``python -m module arguments`` and return the JSON in the last line that it prints.

    ``raised``: glibc keeps freed memory (see docs/benchmarks.md). Libraries use one thread per process. Raises
    ``RuntimeError`` with its error output if it fails or takes longer than ``seconds``.
    """
    environment = {**os.environ, **ONE_THREAD, **(MALLOC_ENVIRONMENT if raised else {})}
    command = [str(python), "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{module} {' '.join(arguments)} took more than {seconds:,.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    result: Run = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def undisturbed(run: Callable[[], Run]) -> Run:
    """Return the result of ``run``; if much CPU time was stolen, run once more and return the less disturbed run.

    A hypervisor reports the CPU time that it gives to other machines (see ``racing.core_time``).
    """
    before = core_time()
    first = run()
    stolen = stolen_since(before)
    if stolen <= MAX_STOLEN:
        return first
    before = core_time()
    second = run()
    return second if stolen_since(before) < stolen else first


def machine() -> str:
    """Return a description of the machine."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def versions(*names: str, python: Path | str = sys.executable) -> dict[str, str]:
    """Return the versions of the named distributions that are installed for ``python``."""
    script = (
        "import json, sys; from importlib.metadata import distributions as all\n"
        "print(json.dumps({one.name: one.version for one in all() if one.name in sys.argv[1:]}))"
    )
    done = subprocess.run([str(python), "-c", script, *names], capture_output=True, text=True, check=True)
    installed: dict[str, str] = json.loads(done.stdout)
    return {name: installed[name] for name in names if name in installed}


@dataclass
class Section:
    """A table and the notes below it: the form in which results are printed and written."""

    title: str
    header: list[str]
    lines: list[list[str]]
    notes: list[str] = field(default_factory=list)


def contest(
    title: str, results: Mapping[str, Result], *, limit: str, ours: str, more: Mapping[str, Callable[[Result], str]]
) -> Section:
    """Return the table of a contest: each rate as a share of the ``limit``'s, and the speed of ``ours`` relative to it."""
    header = ["", "slices/s", "spread", "malloc thresholds", f"of {limit}", f"{ours} is", *more]
    lines = []
    for name, one in results.items():
        share, times = ratio(one, results[limit]), ratio(results[ours], one)
        lines.append([name, f"{one.median():,.0f}", one.spread, one.malloc, f"{share:.2f}", f"{times:.2f} x"])
        lines[-1] += [show(one) for show in more.values()]
    return Section(title, header, lines)


def ratio(one: Result, other: Result) -> float:
    """Return the speed of ``one`` relative to the ``other``: the median over the rounds, which drift does not affect."""
    return statistics.median(mine["rate"] / its["rate"] for mine, its in zip(one.runs, other.runs, strict=True))


def ratios(results: Mapping[str, Result], *, ours: str) -> dict[str, float]:
    """Return the speed of ``ours`` relative to each of the others."""
    return {name: ratio(results[ours], one) for name, one in results.items() if name != ours}


def publish(
    name: str,
    sections: Sequence[Section],
    *,
    releases: Mapping[str, str] | None = None,
    ratios: Mapping[str, float] | None = None,
    raw: Any = None,
) -> None:
    """Print ``sections`` and write them to ``results/<name>.json``; the last results move to ``results/before``.

    ``ratios`` must be reproduced by a second run (see ``benchmarks.agree``); ``raw`` is the data behind the sections.
    """
    for section in sections:
        table = Table(*section.header, title=section.title, title_justify="left")
        for line in section.lines:
            table.add_row(*line)
        console = Console(width=200, highlight=False)
        console.print(table)
        for note in section.notes:
            console.print(note)
    document = {
        "sections": [vars(section) for section in sections],
        "machine": machine(),
        "versions": releases or {},
        "ratios": ratios or {},
        "raw": raw,
    }
    BEFORE.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    if path.exists():
        path.replace(BEFORE / path.name)
    path.write_text(json.dumps(document, indent=2) + "\n")
