"""The command line: parses, calls one function, prints, sets the exit code.

Exit codes: 0 success; 1 an error, or a failed verification; 2 an invalid command or recipe; 128 + n ended by signal n
(130: Ctrl-C).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ich_prep import cli_build, cli_change, look_commands
from ich_prep.cli_report import report
from ich_prep.command_options import EXIT_CODES, BuildDir, Endpoint, Json, run_program, say
from ich_prep.errors import UsageError, count

if TYPE_CHECKING:
    from ich_prep.verify import Verification

app = typer.Typer(
    help="Head-CT DICOM files in, one sharded Zarr v3 dataset with a label table out. Research software on "
    "de-identified data; not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ich_prep import __version__

        say(f"ich-prep {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
]


@app.callback(epilog=EXIT_CODES)
def _options(version: Version = False) -> None:
    pass


@app.command()
def synth(
    out: Annotated[Path, typer.Option(help="New or empty folder to write to.")],
    series: Annotated[int, typer.Option(help="Number of series (volumes).")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Seed; equal seeds give equal bytes.")] = 0,
    size: Annotated[int, typer.Option(help="Rows and columns of a slice.")] = 512,
    layout: Annotated[str, typer.Option(help="rsna, cq500 or folder.")] = "rsna",
    defects: Annotated[bool, typer.Option("--defects", help="Add each known defect of real data.")] = False,
    hard: Annotated[
        bool, typer.Option("--hard", help="Thick, noisy slices, faint bleeds across several, and mimics of them.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes; 0: this one. [default: one per core]")] = None,
) -> None:
    """Write a synthetic cohort of head CT: real DICOM files and their labels."""
    from ich_prep.dataset.storage import local_path
    from ich_prep.execute import default_workers
    from ich_prep.phantom import DEFECTS, synthesize

    out = local_path(out, "--out")
    count = default_workers() if workers is None else workers
    done = synthesize(
        out, series=series, seed=seed, size=size, layout=layout, defects=defects, hard=hard, workers=count
    )
    say(f"{done.series} series, {done.slices} slices, {done.files} files in {out}.")
    for name in done.defects:
        say(f"  {name}: {DEFECTS[name]}")


app.command(epilog=EXIT_CODES)(cli_build.build)
for _step in cli_build.STEPS:
    app.command(epilog=EXIT_CODES)(_step)
app.command()(look_commands.scan)


@app.command()
def info(
    dataset: Annotated[Path, typer.Argument(help="A finished dataset: a path or a URL.")],
    endpoint: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Show a summary of a dataset: counts, labels by fold, quarantine, flags."""
    from ich_prep.dataset.dataset import open_dataset
    from ich_prep.dataset.store_url import use_endpoint
    from ich_prep.summary import summary_of

    use_endpoint(endpoint)
    summary = summary_of(open_dataset(dataset))
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    _show_summary(summary)


def _show_summary(summary: dict[str, Any]) -> None:
    from ich_prep.summary import identifiers_line

    spec, counts = summary["spec"], summary["counts"]
    shown = ", ".join(f"{w['name']} {w['center']:g}/{w['width']:g}" for w in spec["windows"])
    stored = f"uint8 windows {shown}" if spec["store"] == "windows" else "int16 HU"
    withdrawn = f", {counts['withdrawn']:,} withdrawn" if counts.get("withdrawn") else ""
    lines = [
        f"{summary['path']}  ({summary['format']}, layout {spec['layout']})",
        f"  {' x '.join(map(str, summary['shape']))} (slice, channel, y, x), {stored}",
        f"  {count(counts['ok'], 'slice')} ok of {counts['planned']:,} planned{withdrawn}, {counts['series']:,} series, "
        f"{count(counts['patients'], 'patient')}",
        f"  {count(counts['found'], 'file')} found, {counts['quarantined']:,} quarantined",
        f"  {count(counts['shards'], 'shard')}, {counts['bytes'] / 1e6:,.1f} MB, codec {spec['codec']}",
        f"  digest {summary['digest']}",
        f"  {identifiers_line(spec.get('identifiers', 'keep'))}",
        *_label_table(summary),
    ]
    for title, counted in (
        ("Quarantined", {f"{line['stage']}: {line['reason']}": line["files"] for line in summary["quarantine"]}),
        ("Flags", summary["flags"]),
        ("Repairs", summary["repairs"]),
    ):
        if counted:
            lines.append(f"{title}: {', '.join(f'{name} {count}' for name, count in counted.items())}")
    say("\n".join(lines))


def _label_table(summary: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of positive slices: a line a label, a column a fold, as many as fit in 80 columns."""
    names = ["slices", *summary["classes"]]
    title = "Positive slices"
    width = max(len(name) for name in (*names, title)) + 2
    columns = max(1, (80 - width) // 9)
    for first in range(0, len(summary["folds"]), columns):
        folds = summary["folds"][first : first + columns]
        headings = [f"{line['subset']} {line['fold']}".removesuffix(" -") for line in folds]
        yield f"{title:{width}}" + "".join(f"{heading:>9}" for heading in headings)
        for name in names:
            yield f"  {name:{width - 2}}" + "".join(f"{line[name]:9,}" for line in folds)


app.command()(report)
app.command()(look_commands.find)
app.command()(look_commands.quarantine)


@app.command()
def verify(
    dataset: Annotated[Path, typer.Argument(help="A finished dataset: a path or a URL.")],
    src: Annotated[
        list[Path] | None, typer.Option(help="The sources, as build was given them, to compare a sample of the pixels.")
    ] = None,
    build_dir: BuildDir = None,
    sample: Annotated[float, typer.Option(help="Share of the slices to compare.")] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
    where: Annotated[
        str | None, typer.Option(help="Check the shards, and compare the slices, of this filter only.")
    ] = None,
    endpoint: Endpoint = None,
    as_json: Json = False,
) -> None:
    """Check a dataset's integrity and report every problem."""
    from ich_prep.dataset.store_url import use_endpoint
    from ich_prep.files import whole_url
    from ich_prep.progress import NoProgress, TerminalProgress
    from ich_prep.verify import verify as run

    use_endpoint(endpoint)
    if as_json:
        result = run(
            dataset, src=src, build_dir=build_dir, sample=sample, seed=seed, where=where, progress=NoProgress()
        )
    else:
        with TerminalProgress() as progress:
            result = run(
                dataset, src=src, build_dir=build_dir, sample=sample, seed=seed, where=where, progress=progress
            )
    _print_verification(whole_url(dataset), result, as_json=as_json)
    raise typer.Exit(1 if result.problems else 0)


def _print_verification(dataset: str, result: Verification, *, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        typer.echo(json.dumps({"dataset": dataset, "ok": not result.problems, **asdict(result)}, indent=2))
        return
    for note in result.notes:
        say(f"Note: {note.culprit} {note.what}.", err=True)
    for problem in result.problems:
        say(f"{problem.culprit}: {problem.what}", err=True)
    if result.problems:
        say(
            f"{dataset}: verification failed: {count(len(result.problems), 'problem')}. Restore the dataset, or build it "
            "again with --overwrite.",
            err=True,
        )
        return
    compared = f"; {count(result.compared, 'slice')} compared with the sources" if result.compared else ""
    say(f"{dataset}: OK ({count(result.shards, 'shard')}, {count(result.slices, 'slice')} verified{compared})")


@app.command()
def clean(
    dataset: Annotated[Path, typer.Argument(help="A finished dataset.")],
    generations: Annotated[
        bool, typer.Option("--generations", help="Remove the tables of earlier generations instead.")
    ] = False,
    build_dir: BuildDir = None,
    forget_key: Annotated[bool, typer.Option("--forget-key", help="Remove the key of pseudonyms too.")] = False,
    endpoint: Endpoint = None,
) -> None:
    """Remove the working folder of a finished dataset: paths, identifiers, plan and log of its build, not its key."""
    if generations:
        cli_change.clean_generations(dataset, build_dir)
        return
    from ich_prep.dataset.storage import place_of
    from ich_prep.stages import output
    from ich_prep.stages.state import build_folder

    place = place_of(dataset, "The dataset", endpoint=endpoint)
    folder = build_folder(place.absolute(), build_dir, endpoint=endpoint)
    freed = output.clean(place, folder, forget_key=forget_key)
    done = f"Removed {folder.path} ({freed / 1e6:,.1f} MB)." if freed else f"There is no working folder {folder.path}."
    if folder.key.exists():
        done = (
            f"Removed all but the key of the pseudonyms from {folder.path} ({freed / 1e6:,.1f} MB). With the key, later "
            "builds give the same pseudonyms, and pseudonyms can be traced back; --forget-key removes it."
        )
    say(f"{done} Resume, verify --src and find need that folder; the dataset does not.")


Series = Annotated[
    list[int] | None, typer.Option("--series", min=0, help="A volume by its series_row; may be repeated.")
]
Where = Annotated[str | None, typer.Option(help="A filter (docs/filters.md): the volumes of the slices it selects.")]
RunFolder = Annotated[Path | None, typer.Option("--run", help="The folder of a training run with its predictions.")]


@app.command()
def export(
    dataset: Annotated[Path, typer.Argument(help="A finished dataset: a path or a URL.")],
    *,
    series: Series = None,
    where: Where = None,
    endpoint: Endpoint = None,
    out: Annotated[Path, typer.Option(help="New or empty folder to write to.")],
    form: Annotated[str, typer.Option("--as", help="nifti (HU), png (window codes) or npy (as stored).")],
    run: RunFolder = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="For NIfTI, bring volumes with unequal steps to equal ones.")
    ] = False,
) -> None:
    """Write volumes as NIfTI, PNG or NumPy files, with labels and predictions as CSV."""
    from ich_prep.dataset.dataset import open_dataset
    from ich_prep.dataset.predictions import read_predictions
    from ich_prep.dataset.selection import choose_volumes
    from ich_prep.dataset.store_url import use_endpoint
    from ich_prep.export import export as write

    use_endpoint(endpoint)
    with open_dataset(dataset) as opened:
        chosen = choose_volumes(opened, series=series or (), where=where)
        predictions = None if run is None else read_predictions(run, opened)
        done = write(opened, chosen, out, form=form, resample=resample, predictions=predictions)
    say(f"{count(done.volumes, 'volume')} with {count(done.slices, 'slice')} in {out}.")
    if done.resampled:
        typer.echo(
            f"Resampled to equal steps: series_row {', '.join(map(str, done.resampled))}. Their voxels are interpolated, "
            "not the stored ones."
        )


@app.command()
def view(
    dataset: Annotated[Path, typer.Argument(help="A finished dataset.")],
    *,
    run: RunFolder = None,
    src: Annotated[
        list[Path] | None, typer.Option(help="The sources, as build was given them, to show quarantined files.")
    ] = None,
    build_dir: BuildDir = None,
    key: Annotated[Path | None, typer.Option(help="Key of the pseudonyms, for --src. [identifiers.key there]")] = None,
    corrections: Annotated[
        Path | None, typer.Option(help="CSV file to which marks are appended. [DATASET.corrections.csv]")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine; 0: a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in the browser.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the page as files to this new folder instead.")] = None,
    series: Series = None,
    where: Where = None,
) -> None:
    """Show a dataset in the browser: volumes, labels, quarantine, and a run's predictions. To this machine only."""
    from ich_prep.dataset.dataset import open_dataset
    from ich_prep.view.command import serve, write_html

    with open_dataset(dataset) as opened:
        if html is not None:
            if src or build_dir or key or corrections or port or browser:
                raise UsageError(
                    "--src, --build-dir, --key, --corrections, --port and --browser are of the server; --html writes files."
                )
            volumes = write_html(opened, html, run=run, series=series or (), where=where)
            typer.echo(f"{count(volumes, 'volume')} in {html}: open {html / 'index.html'} in a browser.")
            return
        if series or where is not None:
            raise UsageError("--series and --where choose the volumes for --html; the page itself has filters.")
        serve(
            opened,
            run=run,
            src=src or (),
            build_dir=build_dir,
            key=key,
            corrections=corrections,
            port=port,
            browser=browser,
            say=typer.echo,
        )


for _command in cli_change.COMMANDS:
    app.command()(_command)


def main() -> NoReturn:
    """Run the command line; see ``run_program``."""
    run_program(app)


if __name__ == "__main__":
    main()
