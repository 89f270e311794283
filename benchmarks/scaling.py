"""What does a slice cost as there are more of them, and with one worker or two? From that: what will the RSNA set take?

    python -m benchmarks.scaling [--most 100000] [--repeats 5] [--data bench-data]

The cost by number of slices is taken at 128 x 128, where what is not pixels counts most. The model is made of that and of
the CPU times of builds at 512 x 512, and then checked against the time that these and others took.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import typer

from benchmarks.build import PACKAGES, contend
from benchmarks.files import cohort, warm
from benchmarks.measure import Found, Run, Section, compete, publish, versions

RSNA_SLICES = 874_035
STEPS = (1_000, 10_000, 100_000)
SERIAL, PARALLEL = ("list", "plan", "publish"), ("scan", "shards")
CORES = (2, 16, 64)


@dataclass(frozen=True)
class Model:
    """Seconds and CPU seconds: of a build whatever its size, and of a slice."""

    fixed: float
    serial: float  # stages of the driver alone
    driver: float  # CPU of the driver while workers work
    worker: float  # CPU of a worker

    def seconds(self, slices: int, *, workers: int, cores: int) -> float:
        """Return what a build takes: all CPU time shared by the cores, no process on more than one of them."""
        together = max(
            (self.worker + self.driver) / min(cores, workers + 1), self.worker / min(workers, cores), self.driver
        )
        return self.fixed + slices * (self.serial + together)


def fit(few: Run, many: Run, *, serial: float) -> Model:
    """Return the model of which two builds of different size, with two workers, tell all but the ``serial`` cost."""
    more = many["slices"] - few["slices"]
    driver, worker = ((many["cpu"][name] - few["cpu"][name]) / more for name in ("driver", "workers"))
    # The stages of the driver alone keep one core busy.
    model = Model(0.0, serial, max(0.0, driver - serial), worker)
    return replace(model, fixed=total(few) - model.seconds(few["slices"], workers=2, cores=2))


def serial_cost(few: Run, many: Run) -> float:
    """Return the seconds for which each further slice keeps the driver alone busy; pixels have no part in that."""
    spent = [sum(run["stages"][name] for name in SERIAL) for run in (few, many)]
    return float(spent[1] - spent[0]) / (many["slices"] - few["slices"])


def total(run: Run) -> float:
    """Return the seconds of a build without the start of its workers."""
    return float(sum(run["stages"][name] for name in (*SERIAL, *PARALLEL)))


def typical(found: Found) -> Run:
    """Return a run that took, for each stage and of each process, the median over the runs."""
    first = found.runs[0]
    medians = {
        part: {name: statistics.median(run[part][name] for run in found.runs) for name in first[part]}
        for part in ("stages", "cpu")
    }
    return {**first, **medians}


def main(most: int = 100_000, repeats: int = 5, data: Path = Path("bench-data")) -> None:
    data = data.absolute()
    sizes = [step for step in STEPS if step <= most]
    if len(sizes) < 2:
        raise SystemExit(
            f"Expected --most of {STEPS[1]:,} or more: the cost of a slice needs two sizes; found {most:,}."
        )
    numbers = by_number(data, sizes, repeats)
    *_, few, many = numbers.values()
    model_sections, workers = by_workers(data, repeats, serial=serial_cost(typical(few), typical(many)))
    cost, ratios = cost_table(numbers)
    raw = {label: vars(one) for label, one in {**numbers, **workers}.items()}
    publish("scaling", [cost, *model_sections], releases=versions(*PACKAGES), ratios=ratios, raw=raw)


def by_number(data: Path, steps: list[int], repeats: int) -> dict[str, Found]:
    """Return builds of each of so many slices at 128 x 128."""
    trees = {step: cohort(data, slices=step, size=128) for step in steps}
    for tree in trees.values():
        warm(sorted(tree.rglob("*.dcm")))

    def run(tree: Path, raised: bool) -> Run:
        result = contend("ours", tree, data / "out", 128, "windows", "rsna", raised=raised)
        return {**result, "rate": result["slices"] / total(result)}

    return compete({f"{step:,}": partial(run, tree) for step, tree in trees.items()}, repeats, both_settings=False)


def cost_table(found: dict[str, Found]) -> tuple[Section, dict[str, float]]:
    """Return the cost of a slice for each number of slices, and as a share of that of the number before."""
    lines, costs = [], {}
    before = None
    for one in found.values():
        each = typical(one)["stages"]
        slices, cost = one.runs[0]["slices"], 1e6 / one.median()
        share = "" if before is None else f"{cost / before:.2f}"
        if before is not None:
            costs[f"cost at {slices:,}"] = cost / before
        before = cost
        stages = [f"{each[name] / slices * 1e6:,.0f}" for name in (*SERIAL, *PARALLEL)]
        lines.append([f"{slices:,}", f"{cost:,.0f}", share, *stages])
    header = ["slices", "us a slice", "of the line above", *SERIAL, *PARALLEL]
    return Section("Scaling: cost of a slice, 128 x 128, three windows, 2 workers", header, lines), costs


def by_workers(data: Path, repeats: int, *, serial: float) -> tuple[list[Section], dict[str, Found]]:
    """Return slices/s with one worker and two, the model, how well it foretells them, and what it says of RSNA."""
    sizes = {"few": 1_000, "half": 4_096, "many": 8_192}
    trees = {name: cohort(data, slices=slices) for name, slices in sizes.items()}
    for tree in trees.values():
        warm(sorted(tree.rglob("*.dcm")))

    def run(name: str, workers: int, raised: bool) -> Run:
        result = contend("ours", trees[name], data / "out", 512, "windows", "rsna", workers=workers, raised=raised)
        return {**result, "rate": result["slices"] / total(result)}

    asked = [("few", 2), ("many", 2), ("half", 2), ("half", 1)]
    builds = {f"{name}, {workers}": partial(run, name, workers) for name, workers in asked}
    found = compete(builds, repeats, both_settings=False)  # a build raises the thresholds of its workers itself
    model = fit(typical(found["few, 2"]), typical(found["many, 2"]), serial=serial)
    lines = []
    for (_, workers), label in zip(asked, found, strict=True):
        one = typical(found[label])
        foretold = model.seconds(one["slices"], workers=workers, cores=2)
        seen = "fitted to" if label == "few, 2" else f"{foretold / total(one) - 1:+.0%}"
        rate = f"{found[label].median():,.0f}"
        lines.append([f"{one['slices']:,}", str(workers), rate, f"{total(one):.2f}", f"{foretold:.2f}", seen])
    header = ["slices", "workers", "slices/s", "seconds", "by the model", "model is off by"]
    checked = Section("Scaling: workers, three windows, 512 x 512, listing included", header, lines)
    checked.notes = [
        f"Model: seconds = {model.fixed:.2f} + slices x ({model.serial * 1e6:.0f} us + the larger of "
        f"({model.worker * 1e6:.0f} + {model.driver * 1e6:.0f}) us / cores and {model.driver * 1e6:.0f} us): what the "
        "driver does alone, then the CPU time of workers and driver shared by all cores, which one driver cannot outrun. "
        "The first is taken from the largest two builds at 128 x 128, the others from the CPU times of the first two here."
    ]
    one = found["many, 2"].runs[0]
    source = sum(path.stat().st_size for path in trees["many"].rglob("*.dcm")) / one["slices"]
    written = one["bytes"] / one["slices"]
    lines = []
    for cores in CORES:
        seconds = model.seconds(RSNA_SLICES, workers=cores, cores=cores)
        rate = RSNA_SLICES / seconds
        lines.append([str(cores), f"{seconds / 60:,.0f}", f"{rate:,.0f}"])
        lines[-1] += [f"{rate * source / 1e6:,.0f}", f"{rate * written / 1e6:,.0f}"]
    header = ["cores and workers", "minutes", "slices/s", "MB/s to read", "MB/s to write"]
    foretold = Section(f"Scaling: the RSNA set ({RSNA_SLICES:,} slices) by that model", header, lines)
    foretold.notes = [
        "Nothing but these cores is in the model: disk and network must give the rates named, and cores that are threads of "
        "one, or share too narrow a memory, give less."
    ]
    return [checked, foretold], found


if __name__ == "__main__":
    typer.run(main)
