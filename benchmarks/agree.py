"""Do the ratios of the last two runs agree?

    python -m benchmarks.agree [--within 0.1]

Compares the results of the last run of each benchmark with those of the run before; exits with 1 if a ratio changed by
more than that.
"""

from __future__ import annotations

import json

import typer

from benchmarks.measure import BEFORE, RESULTS


def main(within: float = 0.1) -> None:
    moved = compared = 0
    for path in sorted(BEFORE.glob("*.json")):
        now, before = (json.loads(file.read_text())["ratios"] for file in (RESULTS / path.name, path))
        both = sorted(set(now) & set(before), key=lambda name: -abs(now[name] / before[name] - 1))
        for name in both:
            change = now[name] / before[name] - 1
            if abs(change) > within:
                moved += 1
                typer.echo(f"{path.stem}, {name}: {before[name]:.2f}, then {now[name]:.2f} ({change:+.0%})")
        agreeing = sum(abs(now[name] / before[name] - 1) <= within for name in both)
        typer.echo(f"{path.stem}: {agreeing} of {len(both)} ratios agree within {within:.0%}.")
        unmatched = sorted(set(now) ^ set(before))
        if unmatched:
            typer.echo(f"{path.stem}: only in one of the runs: {', '.join(unmatched)}.")
        compared += len(both)
    if not compared:
        raise SystemExit(
            f"Expected two runs of a benchmark; found no earlier results in {BEFORE}. Run a benchmark again."
        )
    raise typer.Exit(1 if moved else 0)


if __name__ == "__main__":
    typer.run(main)
