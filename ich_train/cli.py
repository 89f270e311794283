"""The command line: parses, calls one function, prints, sets the exit code.

Exit codes: 0 done; 1 an error; 2 an invalid command or recipe; 128 + n stopped by signal n
(130: Ctrl-C), to be resumed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from ich_prep.command_options import options_from, run_program
from ich_prep.errors import InterruptError, UsageError, count
from ich_prep.recipe import read_recipe, validate
from ich_train.cli_compare import compare_command
from ich_train.config import EvalConfig, PredictConfig, TrainConfig
from ich_train.metrics_table import print_metrics
from ich_train.place import PLACE, SOURCE, cache_of, dataset_of, open_named, read_as

if TYPE_CHECKING:
    from rich.console import Console

    from ich_prep.dataset.dataset import Dataset

Section = TypeVar("Section", TrainConfig, EvalConfig)

RUNS = Path("runs")

app = typer.Typer(
    help="Train a hemorrhage classifier on a dataset of ich-prep, evaluate it, predict with it. "
    "Research software, not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, such as runs/baseline.")]
Out = Annotated[Path | None, typer.Option(help="The run's folder. [default: runs/NAME, of the recipe or model]")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A TOML file of sections; options win over it.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the run in --out, or the last of its name.")]
Evaluation = Annotated[Path | None, typer.Option("--out", help="Where to write. [default: the run's folder]")]
RunFolders = Annotated[list[Path], typer.Argument(metavar="RUN...", help="The folders of one run or of several.")]
Predicted = Annotated[Path, typer.Option("--out", help="The slices to write: .csv or .parquet; a submission is a CSV.")]
ScanTable = Annotated[Path | None, typer.Option("--scans", help="The scans to write: .csv or .parquet.")]
QuarantineTable = Annotated[Path | None, typer.Option("--quarantine", help="The files left out: .csv or .parquet.")]
Report = Annotated[Path | None, typer.Option("--report", help="A page to write: .html.")]
FeaturesFolder = Annotated[Path, typer.Option("--out", help="The folder to write, such as features.zarr.")]
Where = Annotated[
    str | None, typer.Option(help="A filter (docs/filters.md) of the slices. [default: those of predictions.parquet]")
]
Folds = Annotated[
    str | None,
    typer.Option(
        help="The folds to test on in turn: all, or numbers such as 0,2. [default: all; with --resume as before]"
    ),
]
Sample = Annotated[Path | None, typer.Option(help="A sample submission: its lines, in its order.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ich-train {version('ich')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")]


@app.callback()
def program(*, show_version: Version = False) -> None:
    """Options of the program itself."""


@app.command("run")
@options_from(
    TrainConfig,
    *(
        *SOURCE,
        "where",
        "model",
        "head",
        "epochs",
        "weights",
        "features",
        "seed",
        "batch_size",
        "threads",
        "device",
    ),
)
def run_command(*, given: dict[str, Any], out: Out = None, recipe: RecipeFile = None, resume: Resume = False) -> None:
    """Train, keep the best epoch in validation, evaluate it on held-out slices, write a report."""
    plan = _plan(given, out, recipe, resume=resume, ending="")

    from ich_train.train import train

    console = _console()
    _note_differences(console, plan)
    result = train(plan.dataset, plan.out, plan.settings, plan.evaluation, console=console, resume=resume)
    if not result.finished:
        raise InterruptError(f"Resume with: ich-train run --resume --out {plan.out}")
    if result.metrics is not None:
        print_metrics(console, result.metrics, plan.out)


@app.command("cv")
@options_from(
    TrainConfig,
    *(*SOURCE, "model", "head", "epochs", "weights", "seed", "batch_size", "threads", "device"),
)
def cv_command(
    *,
    given: dict[str, Any],
    folds: Folds = None,
    out: Out = None,
    recipe: RecipeFile = None,
    resume: Resume = False,
) -> None:
    """Cross-validate: train for each fold, test on it, and report on the predictions of all test folds together."""
    plan = _plan(given, out, recipe, resume=resume, ending="-cv")

    from ich_train.cross_validation import cross_validate, resuming

    console = _console()
    _note_differences(console, plan)
    metrics = cross_validate(
        plan.dataset, plan.out, plan.settings, plan.evaluation, folds=folds, console=console, resume=resume
    )
    if metrics is None:
        raise InterruptError(f"Resume with: {resuming(plan.out)}")
    print_metrics(console, metrics, plan.out)


@app.command("eval")
@options_from(
    EvalConfig,
    *("subset", "where", "limit", "seed", "batch_size", "by", "mirror", "sensitivity"),
    default="as in the run's recipe",
)
@options_from(TrainConfig, *SOURCE, "threads", "device", into="place", default="the run's")
def eval_command(run: RunFolder, *, given: dict[str, Any], place: dict[str, Any], out: Evaluation = None) -> None:
    """Evaluate a run's best epoch on a part of a dataset and rewrite the run's report, or write another to --out."""
    from ich_train.runs import RECIPE, settings_of

    settings, _ = settings_of(run)
    evaluation = _section(run / RECIPE, read_recipe(run / RECIPE), EvalConfig, given)
    dataset = dataset_of(run, settings, place)

    from ich_train.evaluation.evaluate import evaluate_run
    from ich_train.evaluation.evaluated import replaced_words
    from ich_train.ranks import choose_device

    replaced = replaced_words(out or run, dataset.digest, evaluation.subset)
    metrics = evaluate_run(
        run,
        dataset,
        evaluation,
        device=str(choose_device(place.get("device", settings.device))),
        threads=place.get("threads", settings.threads),
        out=out,
    )
    console = _console()
    print_metrics(console, metrics, out or run)
    if replaced:
        console.print(replaced, soft_wrap=True, markup=False)


@app.command("predict")
@options_from(PredictConfig)
@options_from(EvalConfig, "batch_size", "mirror", into="batches", default="as in the recipe of the first run")
@options_from(TrainConfig, *PLACE, "threads", "device", into="place", default="the first run's")
def predict_command(
    runs: RunFolders,
    *,
    given: dict[str, Any],
    batches: dict[str, Any],
    place: dict[str, Any],
    out: Predicted,
    scans: ScanTable = None,
    quarantine: QuarantineTable = None,
    report: Report = None,
    sample: Sample = None,
) -> None:
    """Write the mean probabilities of one run or several for DICOM files or a dataset, or a Kaggle submission.

    With --src: for all its slices, as a table. Without: for the test subset of the run's dataset, as a submission.
    """
    from ich_train.runs import settings_of

    wanted = validate(PredictConfig, given, where="options")
    if wanted.src and "data" in place:
        raise UsageError("Give the slices to predict with --src or with --data, not with both.")
    if wanted.where is not None and sample is not None:
        raise UsageError("--where selects the slices, and --sample names them: give one of the two.")
    settings, evaluation = [settings_of(run) for run in runs][0]  # noqa: RUF015  # all are checked

    from ich_prep.dataset.store_url import use_endpoint
    from ich_train.infer import predict
    from ich_train.infer_files import (
        Outputs,
        calibration_lines,
        check_outputs,
        check_source,
        summary_lines,
        write_outputs,
    )
    from ich_train.infer_source import metas_of, open_source, refuse_source_options
    from ich_train.ranks import choose_device

    kaggle = (wanted.format or ("table" if wanted.src else "kaggle")) == "kaggle"
    outputs = Outputs(out, kaggle, scans=scans, quarantine=quarantine, report=report, sample=sample)
    if wanted.src:
        meta = metas_of(runs)[0]
        check_outputs(outputs, meta.classes)
        read = read_as(settings, place)
        use_endpoint(read.endpoint)
        source = open_source(meta, wanted, cache=cache_of(read))
    else:
        source = dataset_of(runs[0], settings, place)
        refuse_source_options(wanted, source.path)
        check_outputs(outputs, source.classes)
    check_source(outputs, source)
    found = predict(
        runs,
        source,
        wanted,
        kaggle=kaggle,
        mirror=batches.get("mirror", evaluation.mirror),
        batch_size=batches.get("batch_size", evaluation.batch_size),
        threads=place.get("threads", settings.threads),
        device=choose_device(place.get("device", settings.device)),
    )
    submission = write_outputs(outputs, found, source)
    console = _console()
    for line in calibration_lines(found) + (summary_lines(found) if submission is None or wanted.src else []):
        console.print(line, soft_wrap=True, markup=False)
    if submission is None:
        return
    console.print(f"{count(submission.lines, 'line')} in {out}", soft_wrap=True)
    if submission.without_image:
        filled = "mean probability" if wanted.src else "share of the training slices"
        console.print(
            f"Without a usable image in the test subset: {submission.without_image:,} of "
            f"{count(submission.slices, 'slice')}. The lines of these give each label's {filled}.",
            soft_wrap=True,
        )


@app.command("embed")
@options_from(TrainConfig, *PLACE, "threads", "device", into="place", default="the run's")
def embed_command(run: RunFolder, *, place: dict[str, Any], out: FeaturesFolder) -> None:
    """Write the features of all slices by a run's network, on which a head is trained with features = "..." in [train]."""
    from ich_train.runs import settings_of

    settings, _ = settings_of(run)
    dataset = dataset_of(run, settings, place)

    from ich_train.embed import embed
    from ich_train.ranks import choose_device

    rows, features = embed(
        run,
        dataset,
        out,
        device=choose_device(place.get("device", settings.device)),
        threads=place.get("threads", settings.threads),
    )
    _console().print(f"{count(features, 'feature')} of {count(rows, 'slice')} in {out}", soft_wrap=True)


@app.command("explain")
@options_from(EvalConfig, "limit", "seed", "batch_size", default="as in the run's recipe")
@options_from(TrainConfig, *PLACE, "threads", "device", into="place", default="the run's")
def explain_command(run: RunFolder, *, given: dict[str, Any], place: dict[str, Any], where: Where = None) -> None:
    """Write class activation maps (Grad-CAM) of the evaluated slices, for `ich-prep view --run`."""
    from ich_train.runs import RECIPE, settings_of

    settings, _ = settings_of(run)
    evaluation = _section(run / RECIPE, read_recipe(run / RECIPE), EvalConfig, given)
    dataset = dataset_of(run, settings, place)

    from ich_train.explain import explain_run
    from ich_train.ranks import choose_device

    written = explain_run(
        run,
        dataset,
        where=where,
        limit=evaluation.limit,
        seed=evaluation.seed,
        batch_size=evaluation.batch_size,
        device=str(choose_device(place.get("device", settings.device))),
        threads=place.get("threads", settings.threads),
    )
    _console().print(
        f"Maps of {count(written.slices, 'slice')} from {written.layer} in {written.folder}. See them with: ich-prep view "
        f"{dataset.path} --run {run}",
        soft_wrap=True,
        markup=False,
    )


app.command("compare")(compare_command)


def main() -> NoReturn:
    """Run the command line; see ``run_program``."""
    run_program(app)


@dataclass(frozen=True)
class _Plan:
    """What a command that trains was asked for: the recipe, if one was read, its sections, and what follows from them."""

    out: Path
    recipe: Path | None
    sections: Mapping[str, Mapping[str, Any]]
    settings: TrainConfig
    evaluation: EvalConfig
    dataset: Dataset


def _plan(given: dict[str, Any], out: Path | None, recipe: Path | None, *, resume: bool, ending: str) -> _Plan:
    """Return what to train; ``ending`` is that of the default name of the folder."""
    from ich_train.runs import RECIPE, latest_folder, new_folder, require_run

    name = recipe.stem if recipe else given.get("model", TrainConfig().model).replace(":", "-").replace("/", "-")
    if out is None:
        out = latest_folder(RUNS, name + ending) if resume else new_folder(RUNS, name + ending)
    if resume:
        require_run(out)
        recipe = recipe or out / RECIPE
    sections = read_recipe(recipe) if recipe else {}
    settings = _section(recipe, sections, TrainConfig, given)
    evaluation = _section(recipe, sections, EvalConfig, {})
    dataset = open_named(settings, moved_from=out if resume and "data" not in given else None)
    return _Plan(out, recipe, sections, settings, evaluation, dataset)


def _note_differences(console: Console, plan: _Plan) -> None:
    difference = _built_otherwise(plan.recipe, plan.sections, plan.dataset) if plan.recipe else ""
    if difference:
        console.print(difference, soft_wrap=True, style="bold")


def _section(
    recipe: Path | None, sections: Mapping[str, Mapping[str, Any]], model: type[Section], given: Mapping[str, Any]
) -> Section:
    """Return the section of ``model`` of a recipe, overridden by what was ``given`` on the command line."""
    name = "train" if model is TrainConfig else "eval"
    where = f"{recipe} [{name}]" if recipe else "options"
    return validate(model, {**sections.get(name, {}), **given}, where=where)


def _built_otherwise(recipe: Path, sections: Mapping[str, Mapping[str, Any]], dataset: Dataset) -> str:
    """Say where ``dataset`` differs from what the section [build] of ``recipe`` makes; empty if it does not."""
    from ich_prep.dataset.spec import Spec

    written, built = sections["build"], dataset.spec
    kept = (
        ("size", "store") if built.store == "hu" else ("size", "store", "windows")
    )  # any windows can be computed from HU
    stated: dict[str, Any] = {name: written[name] for name in kept if name in written}
    expected = validate(Spec, stated, where=f"{recipe} [build]")
    differences = [
        f"{name} is {_shown(getattr(built, name))}, not {_shown(getattr(expected, name))}"
        for name in stated
        if getattr(built, name) != getattr(expected, name)
    ]
    return f"Note: {dataset.path} was not built with {recipe}: {'; '.join(differences)}." if differences else ""


def _shown(value: object) -> str:
    return ", ".join(window.name for window in value) if isinstance(value, tuple) else str(value)


def _console() -> Console:
    """Return standard error; of the processes that torchrun started, only the first one prints."""
    from ich_prep.terminal import Terminal

    return Terminal(quiet=os.environ.get("RANK", "0") != "0")
