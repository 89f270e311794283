"""The command line: parses, calls one function, prints, sets the exit code.

Exit codes: 0 done; 1 an error; 2 a command or recipe that cannot be meant; 130 stopped by Ctrl-C, to be resumed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ich_prep.errors import IchError, UsageError
from ich_prep.recipe import read_section, validate
from ich_train.config import MODELS, EvalConfig, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from ich_prep.dataset.dataset import Dataset

Section = TypeVar("Section", TrainConfig, EvalConfig)

DEFAULT = TrainConfig()
RUNS = Path("runs")
INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended

app = typer.Typer(
    help="Train a hemorrhage classifier on a dataset of ich-prep, judge it, predict with it. "
    "Research software, not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, such as runs/baseline.")]
Data = Annotated[Path | None, typer.Option(help=f"The dataset. Default: the run's own, else {DEFAULT.data}.")]
Out = Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/NAME, of the recipe or model.")]
Model = Annotated[str | None, typer.Option(help=f"{', '.join(MODELS)} or timm:NAME. Default: {DEFAULT.model}.")]
Epochs = Annotated[int | None, typer.Option(min=1, help=f"Passes over the slices. Default: {DEFAULT.epochs}.")]
Recipe = Annotated[Path | None, typer.Option(help="A TOML file of sections; options win over it.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, or the last of its name.")]
Weights = Annotated[Path | None, typer.Option(help="Weights to start from, in torchvision's key names.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The seed of all that is drawn.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Slices in a batch, of each process.")]
Threads = Annotated[int | None, typer.Option(min=1, help=f"Threads that read data. Default: {DEFAULT.threads}.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU where there is one.")]
Subset = Annotated[str | None, typer.Option(help="train, val, test or all. Default: as in the run's recipe.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Judge so many slices, drawn by the seed.")]
Evaluation = Annotated[Path | None, typer.Option("--out", help="Where to write. Default: the run's folder.")]
Submission = Annotated[Path, typer.Option("--out", help="The CSV to write, with the columns ID,Label.")]
Sample = Annotated[Path | None, typer.Option(help="A sample submission: its lines, in its order.")]


@app.command("run")
def run_command(
    *,
    data: Data = None,
    out: Out = None,
    model: Model = None,
    epochs: Epochs = None,
    recipe: Recipe = None,
    resume: Resume = False,
    weights: Weights = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    threads: Threads = None,
    device: Device = None,
) -> None:
    """Train, keep the epoch of the lowest validation loss, judge it on held-out slices, write a report."""
    from ich_train.runs import RECIPE, latest_folder, new_folder

    name = recipe.stem if recipe else (model or DEFAULT.model).replace(":", "-").replace("/", "-")
    if out is None:
        out = latest_folder(RUNS, name) if resume else new_folder(RUNS, name)
    if recipe is None and resume:
        recipe = out / RECIPE
    given = {
        "data": data,
        "model": model,
        "epochs": epochs,
        "weights": weights,
        "seed": seed,
        "batch_size": batch_size,
        "threads": threads,
        "device": device,
    }
    settings = _section(recipe, "train", TrainConfig, given)
    evaluation = _section(recipe, "eval", EvalConfig, {})

    from ich_prep.dataset.dataset import open_dataset
    from ich_train.train import train

    console, dataset = _console(), open_dataset(settings.data)
    difference = _built_otherwise(recipe, dataset) if recipe else ""
    if difference:
        console.print(difference, soft_wrap=True, style="bold")
    result = train(dataset, out, settings, evaluation, console=console, resume=resume)
    if not result.finished:
        console.print(f"Stopped. Go on with: ich-train run --resume --out {out}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    if result.metrics is not None:
        _print_metrics(console, result.metrics, out)


@app.command("eval")
def eval_command(
    run: RunFolder,
    *,
    data: Data = None,
    subset: Subset = None,
    limit: Limit = None,
    out: Evaluation = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    threads: Threads = None,
    device: Device = None,
) -> None:
    """Judge a run's best epoch on a part of a dataset and write the run's report anew, or another one to --out."""
    from ich_train.runs import RECIPE, settings_of

    settings, _ = settings_of(run)
    given = {"subset": subset, "limit": limit, "seed": seed, "batch_size": batch_size}
    evaluation = _section(run / RECIPE, "eval", EvalConfig, given)

    from ich_prep.dataset.dataset import open_dataset
    from ich_train.evaluate import evaluate_run
    from ich_train.ranks import choose_device

    metrics = evaluate_run(
        run,
        open_dataset(data or settings.data),
        **evaluation.model_dump(),
        device=str(choose_device(device or settings.device)),
        threads=threads or settings.threads,
        out=out,
    )
    _print_metrics(_console(), metrics, out or run)


@app.command("predict")
def predict_command(
    run: RunFolder,
    *,
    out: Submission,
    data: Data = None,
    sample: Sample = None,
    batch_size: BatchSize = None,
    threads: Threads = None,
    device: Device = None,
) -> None:
    """Write the probabilities of the test subset in the format of a Kaggle submission."""
    from ich_train.runs import settings_of

    settings, evaluation = settings_of(run)

    from ich_prep.dataset.dataset import open_dataset
    from ich_train.predict import write_submission
    from ich_train.ranks import choose_device

    lines = write_submission(
        run,
        open_dataset(data or settings.data),
        out,
        sample=sample,
        device=choose_device(device or settings.device),
        threads=threads or settings.threads,
        batch_size=batch_size or evaluation.batch_size,
    )
    _console().print(f"{lines:,} lines in {out}", soft_wrap=True)


def main() -> None:
    """Run the command line; a known error is shown as one message, without a traceback."""
    try:
        app()
    except IchError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        typer.echo("Stopped. What was finished by then is kept.", err=True)
        sys.exit(INTERRUPTED)


def _section(recipe: Path | None, section: str, model: type[Section], given: dict[str, Any]) -> Section:
    """Return a section of ``recipe``, or of none, with what was ``given`` on the command line put over it."""
    values = read_section(recipe, section) if recipe else {}
    values |= {key: value for key, value in given.items() if value is not None}
    return validate(model, values, where=f"{recipe} [{section}]" if recipe else "options")


def _built_otherwise(recipe: Path, dataset: Dataset) -> str:
    """Say where ``dataset`` is not what the section [build] of ``recipe`` makes; nothing where it is."""
    from ich_prep.dataset.schema import Spec

    written, built = read_section(recipe, "build"), dataset.spec
    kept = ("size", "store") if built.store == "hu" else ("size", "store", "windows")  # HU are windowed as one likes
    stated: dict[str, Any] = {name: written[name] for name in kept if name in written}
    asked = validate(Spec, stated, where=f"{recipe} [build]")
    differences = [
        f"{name} is {_shown(getattr(built, name))} and not {_shown(getattr(asked, name))}"
        for name in stated
        if getattr(built, name) != getattr(asked, name)
    ]
    return f"Note: {dataset.path} was not built with {recipe}: {'; '.join(differences)}." if differences else ""


def _shown(value: object) -> str:
    return ", ".join(window.name for window in value) if isinstance(value, tuple) else str(value)


def _console() -> Console:
    """Return standard error; of the processes that torchrun started, only the first one's speaks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")


def _print_metrics(console: Console, metrics: dict[str, Any], run: Path) -> None:
    from rich.table import Table

    from ich_train.evaluate import REPORT

    judged, view = metrics["evaluated"], metrics["by_slice"]
    title = f"{judged['slices']:,} slices of {judged['subset']}"
    if judged["series_labels"] and metrics["by_series_max"]:
        title, view = f"Series of {title}, by their highest slice", metrics["by_series_max"]
    table = Table(title=title, title_justify="left")
    table.add_column("label")
    for heading in ("positive", "ROC AUC", "95%", "average precision"):
        table.add_column(heading, justify="right")
    for name, entry in view["labels"].items():
        interval = entry["intervals"]["roc_auc"]
        table.add_row(
            name,
            f"{entry['positives']:,}",
            _number(entry["roc_auc"]),
            f"{interval[0]:.3f}-{interval[1]:.3f}" if interval else "undefined",
            _number(entry["average_precision"]),
        )
    console.print(table)
    console.print(f"Weighted log loss {_number(view['log_loss'])}. Report: {run / REPORT}", soft_wrap=True)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
