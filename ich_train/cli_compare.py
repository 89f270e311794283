"""The command `ich-train compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ich_prep.command_options import options_from
from ich_prep.recipe import validate
from ich_train.config import EvalConfig


@options_from(EvalConfig, "bootstrap", "seed")
def compare_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, cross-validations or `eval --out`.")
    ],
    *,
    given: dict[str, Any],
    out: Annotated[Path, typer.Option(help="The page to write; .json and .csv are beside it.")] = Path("compare.html"),
) -> None:
    """Compare runs that were evaluated on the same slices: each with the first, by paired resamples of the patients."""
    evaluation = validate(EvalConfig, given, where="options")

    from ich_prep.terminal import Terminal
    from ich_train.evaluation.compare import compare
    from ich_train.evaluation.compare_report import cases_words, notes, text_tables, verdicts

    found = compare(runs, out, resamples=evaluation.bootstrap, seed=evaluation.seed)
    console = Terminal()
    for text in (
        f"On the same {cases_words(found)}:",
        *text_tables(found),
        *(f"{title}. {words}" for title, words in verdicts(found)),
        *(f"Note: {note}" for note in notes(found)),
        f"Comparison: {out}",
    ):
        console.print(text, soft_wrap=True, markup=False)
