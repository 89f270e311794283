"""The command `ich-prep report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ich_prep.command_options import BuildDir


def report(
    dataset: Annotated[Path, typer.Argument(help="A finished dataset.")],
    out: Annotated[Path | None, typer.Option(help="The page to write. [default: DATASET.report.html]")] = None,
    build_dir: BuildDir = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the pictures.")] = 0,
) -> None:
    """Write a page that shows a dataset: labels, geometry, HU, what was quarantined or flagged, and what to do."""
    from ich_prep.report.page import write_report

    typer.echo(f"Report: {write_report(dataset, out, build_dir=build_dir, seed=seed)}")
