"""How does the cost of a slice depend on the number of slices and workers? From that: how long will the RSNA set take?

    python -m benchmarks.scaling [--most 100000] [--repeats 5] [--data bench-data]

The cost by number of slices is measured at 128 x 128, where the share of non-pixel work is largest. The model is fitted to
that and to the CPU times of builds at 512 x 512, and then checked against the times of these and other builds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import typer

from benchmarks.build import PACKAGES, contend
from benchmarks.files import cohort, warm
from benchmarks.measure import Result, Run, Section, compete, publish, versions

RSNA_SLICES = 874_035
STEPS = (1_000, 10_000, 100_000)
SERIAL, PARALLEL = ("list", "plan", "publish"), ("scan", "shards")
CORES = (2, 16, 64)


@dataclass(frozen=True)
class Model:
    """The cost model of a build: ``fixed`` seconds, and seconds per slice."""

    fixed: float
    serial: float  # stages that run in the driver only
    driver: float  # CPU of the driver while workers work
    worker: float  # CPU of a worker

    def seconds(self, slices: int, *, workers: int, cores: int) -> float:
        """Return the seconds of a build: all CPU time is shared by the cores, and no process uses more than one."""
        parallel = max(
            (self.worker + self.driver) / min(cores, workers + 1), self.worker / min(workers, cores), self.driver
        )
        return self.fixed + slices * (self.serial + parallel)


def fit(few: Run, many: Run, *, serial: float) -> Model:
    """Return the model fitted to two builds of different sizes with two workers, and the ``serial`` cost."""
    more = many["slices"] - few["slices"]
    driver, worker = ((many["cpu"][name] - few["cpu"][name]) / more for name in ("driver", "workers"))
    # The driver-only stages keep one core busy.
    model = Model(0.0, serial, max(0.0, driver - serial), worker)
    return replace(model, fixed=total(few) - model.seconds(few["slices"], workers=2, cores=2))


def serial_cost(few: Run, many: Run) -> float:
    """Return the seconds that each further slice adds to the driver-only stages, which do not touch pixels."""
    spent = [sum(run["stages"][name] for name in SERIAL) for run in (few, many)]
    return float(spent[1] - spent[0]) / (many["slices"] - few["slices"])


def total(run: Run) -> float:
    """Return the seconds of a build without the start of its workers."""
    return float(sum(run["stages"][name] for name in (*SERIAL, *PARALLEL)))


def typical(measured: Result) -> Run:
    """Return a run with the median over the runs for each stage and each process."""
    first = measured.runs[0]
    medians = {
        part: {name: statistics.median(run[part][name] for run in measured.runs) for name in first[part]}
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


def by_number(data: Path, steps: list[int], repeats: int) -> dict[str, Result]:
    """Return builds with each number of slices at 128 x 128."""
    trees = {step: cohort(data, slices=step, size=128) for step in steps}
    for tree in trees.values():
        warm(sorted(tree.rglob("*.dcm")))

    def run(tree: Path, raised: bool) -> Run:
        result = contend("ours", tree, data / "out", 128, "windows", "rsna", raised=raised)
        return {**result, "rate": result["slices"] / total(result)}

    return compete({f"{step:,}": partial(run, tree) for step, tree in trees.items()}, repeats, both_settings=False)


def cost_table(results: dict[str, Result]) -> tuple[Section, dict[str, float]]:
    """Return the cost of a slice for each number of slices, and relative to the previous number."""
    lines, costs = [], {}
    before = None
    for one in results.values():
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


def by_workers(data: Path, repeats: int, *, serial: float) -> tuple[list[Section], dict[str, Result]]:
    """Return slices/s with one worker and two, the model, how well it predicts them, and its prediction for RSNA."""
    sizes = {"few": 1_000, "half": 4_096, "many": 8_192}
    trees = {name: cohort(data, slices=slices) for name, slices in sizes.items()}
    for tree in trees.values():
        warm(sorted(tree.rglob("*.dcm")))

    def run(name: str, workers: int, raised: bool) -> Run:
        result = contend("ours", trees[name], data / "out", 512, "windows", "rsna", workers=workers, raised=raised)
        return {**result, "rate": result["slices"] / total(result)}

    cases = [("few", 2), ("many", 2), ("half", 2), ("half", 1)]
    builds = {f"{name}, {workers}": partial(run, name, workers) for name, workers in cases}
    results = compete(builds, repeats, both_settings=False)  # a build raises the thresholds of its workers itself
    model = fit(typical(results["few, 2"]), typical(results["many, 2"]), serial=serial)
    lines = []
    for (_, workers), label in zip(cases, results, strict=True):
        one = typical(results[label])
        predicted = model.seconds(one["slices"], workers=workers, cores=2)
        error = "fitted to" if label == "few, 2" else f"{predicted / total(one) - 1:+.0%}"
        rate = f"{results[label].median():,.0f}"
        lines.append([f"{one['slices']:,}", str(workers), rate, f"{total(one):.2f}", f"{predicted:.2f}", error])
    header = ["slices", "workers", "slices/s", "seconds", "by the model", "model is off by"]
    checked = Section("Scaling: workers, three windows, 512 x 512, listing included", header, lines)
    checked.notes = [
        f"Model: seconds = {model.fixed:.2f} + slices x ({model.serial * 1e6:.0f} us + the larger of "
        f"({model.worker * 1e6:.0f} + {model.driver * 1e6:.0f}) us / cores and {model.driver * 1e6:.0f} us): what the "
        "driver does by itself, then the CPU time of workers and driver shared by all cores, limited by the one driver. "
        "The first is from the two largest builds at 128 x 128, the others from the CPU times of the first two here."
    ]
    one = results["many, 2"].runs[0]
    source = sum(path.stat().st_size for path in trees["many"].rglob("*.dcm")) / one["slices"]
    written = one["bytes"] / one["slices"]
    lines = []
    for cores in CORES:
        seconds = model.seconds(RSNA_SLICES, workers=cores, cores=cores)
        rate = RSNA_SLICES / seconds
        lines.append([str(cores), f"{seconds / 60:,.0f}", f"{rate:,.0f}"])
        lines[-1] += [f"{rate * source / 1e6:,.0f}", f"{rate * written / 1e6:,.0f}"]
    header = ["cores and workers", "minutes", "slices/s", "MB/s to read", "MB/s to write"]
    prediction = Section(f"Scaling: the RSNA set ({RSNA_SLICES:,} slices) by that model", header, lines)
    prediction.notes = [
        "The model covers these cores only: disk and network must sustain these rates, and hardware threads of one core, or "
        "cores short of memory bandwidth, deliver less."
    ]
    return [checked, prediction], results


if __name__ == "__main__":
    typer.run(main)
