"""The commands that build: build, or plan, shards and publish; and status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ich_prep import signals
from ich_prep.cli_report import report
from ich_prep.command_options import BuildDir, Json, exit_code_of, options_from, say
from ich_prep.errors import IchError, InterruptError, UsageError, count
from ich_prep.messages import duration_text
from ich_prep.options import BuildOptions, resolve

if TYPE_CHECKING:
    from ich_prep.build_dataset import Outcome, Request
    from ich_prep.dataset.bucket_path import Place
    from ich_prep.progress import Progress
    from ich_prep.status import Status

MOST_PARTS = 20  # that a line of the status names

Sources = Annotated[list[Path], typer.Option(help="Folder or zip archive with the DICOM files; may be repeated.")]
Recipe = Annotated[Path | None, typer.Option(help="TOML file whose [build] sets any of these; options win.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset or build.")]
Planned = Annotated[Path, typer.Argument(help="The dataset that ich-prep plan was given as --out.")]


@options_from(BuildOptions)
def build(
    *,
    src: Annotated[
        list[Path],
        typer.Option(help="Folder, zip archive or URL (s3://, gs://) with the DICOM files; may be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="The dataset to build, or to resume: a path, or a URL of a bucket.")],
    recipe: Recipe = None,
    overwrite: Overwrite = False,
    given: dict[str, Any],
) -> None:
    """Build a dataset. To resume an interrupted build, run the same command again."""
    options = resolve(recipe, given)

    from ich_prep import build_dataset
    from ich_prep.dataset.storage import place_of

    place = place_of(out, "--out", **options.buckets())
    if options.report and not isinstance(place, Path):
        raise UsageError(f"--report writes a page beside the dataset, and {place} is in a bucket. Leave --report out.")
    with _explaining_interrupts(place, overwrite=overwrite), reporting(as_json=options.log_json) as progress:
        outcome = build_dataset.run(_request(src, place, options, progress, overwrite=overwrite))
    _print_outcome(place, outcome)
    if options.report:
        report(out, build_dir=options.build_dir)


@options_from(
    BuildOptions, *(name for name in BuildOptions.model_fields if name not in ("report", "endpoint", "atomic"))
)
def plan(
    *,
    src: Sources,
    out: Annotated[Path, typer.Option(help="The dataset to plan.")],
    recipe: Recipe = None,
    overwrite: Overwrite = False,
    given: dict[str, Any],
) -> None:
    """Build a dataset as far as its plan; shards and publish do the rest, on one host or many, without Dask."""
    options = resolve(recipe, given)

    from ich_prep.build_parts import plan_build

    with _explaining_interrupts(out, overwrite=overwrite), reporting(as_json=options.log_json) as progress:
        counts = plan_build(_request(src, out, options, progress, overwrite=overwrite))
    say(
        f"{out}: {count(counts.slices, 'slice')} planned in {count(counts.shards, 'shard')}, {counts.written:,} of them "
        f"written. Next: `ich-prep shards {out} --part I/N` for each I from 1 to N, then `ich-prep publish {out}`."
    )


@options_from(BuildOptions, "build_dir", "workers", "log_json")
def shards(
    dataset: Planned,
    *,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Which shards: part I of N, counted from 1; several may run at once.")
    ] = "1/1",
    recipe: Recipe = None,
    given: dict[str, Any],
) -> None:
    """Write the shards of a planned build, or a part of them. Run it again if it was killed."""
    options = resolve(recipe, given)

    from ich_prep.build_parts import write_part
    from ich_prep.stages.parts import parse_part

    wanted = parse_part(part)
    with _explaining_interrupts(dataset), reporting(as_json=options.log_json) as progress:
        counts = write_part(dataset, wanted, build_dir=options.build_dir, workers=options.workers, progress=progress)
    say(f"{dataset}: part {wanted} is written: {count(counts.slices, 'slice')} in {count(counts.shards, 'shard')}.")


@options_from(BuildOptions, "build_dir", "key", "max_quarantined", "report", "log_json")
def publish(dataset: Planned, *, recipe: Recipe = None, given: dict[str, Any]) -> None:
    """Publish a planned dataset once all of its shards are written."""
    options = resolve(recipe, given)

    from ich_prep.build_parts import publish_build

    with _explaining_interrupts(dataset), reporting(as_json=options.log_json) as progress:
        outcome = publish_build(
            dataset,
            build_dir=options.build_dir,
            key=options.key,
            allow=options.arguments()["allow"],
            progress=progress,
        )
    _print_outcome(dataset, outcome)
    if options.report:
        report(dataset, build_dir=options.build_dir)


def status(
    dataset: Annotated[Path, typer.Argument(help="A dataset, or what a build that runs or stopped will make.")],
    build_dir: BuildDir = None,
    as_json: Json = False,
) -> None:
    """Show how far a build is, while it runs on any host or after it stopped: stage, rate, time left, quarantine."""
    from ich_prep.status import status_of

    found = status_of(dataset, build_dir)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "share": round(found.share, 4)}, indent=2))
        return
    for line in _status_lines(dataset, found):
        say(line)


STEPS = (plan, shards, publish, status)
STAGES = {
    "list": "listing files",
    "scan": "reading headers",
    "plan": "planning",
    "shards": "writing slices",
    "publish": "publishing",
}


def _request(src: list[Path], out: Place, options: BuildOptions, progress: Progress, *, overwrite: bool) -> Request:
    from ich_prep.build_dataset import Request

    arguments = {**options.arguments(), **options.buckets()}
    return Request(src, out, options.spec(), overwrite=overwrite, key=options.key, **arguments, progress=progress)


@contextmanager
def reporting(*, as_json: bool) -> Iterator[Progress]:
    """Yield what reports the progress: to a terminal, or as lines of JSON, of which an error is then one."""
    from ich_prep.progress import JsonProgress, TerminalProgress

    if not as_json:
        with TerminalProgress() as shown:
            yield shown
        return
    lines = JsonProgress()
    try:
        yield lines
    except (IchError, OSError, KeyboardInterrupt) as error:
        interrupted = signals.is_interrupted() or isinstance(error, KeyboardInterrupt)
        code = signals.exit_status() if interrupted else exit_code_of(error)
        signals.settle()
        if interrupted:
            lines.event("interrupted", exit_code=code)
        else:
            lines.event("error", kind=type(error).__name__, text=str(error), exit_code=code)
        raise typer.Exit(code) from None


@contextmanager
def _explaining_interrupts(out: Place, *, overwrite: bool = False) -> Iterator[None]:
    """Turn Ctrl-C into an ``InterruptError`` that says how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        if not overwrite:
            hint = "Run the same command again to resume."
        elif (out / "zarr.json").exists():
            hint = "Nothing was replaced yet: run the same command again."
        else:
            hint = "Run the same command without --overwrite to resume."
        raise InterruptError(hint) from None


def _status_lines(dataset: Path, found: Status) -> Iterator[str]:
    if found.state == "finished":
        yield f"{dataset}: finished, {count(found.total, 'slice')}."
    else:
        where = "running," if found.state == "running" else "stopped while"
        numbers = [f"{found.done:,} of {found.total:,} {found.unit} ({found.share:.1%})"] if found.total else []
        if found.per_second is not None:
            numbers.append(f"{found.per_second:,.0f} {found.unit}/s")
        if found.seconds_left is not None:
            numbers.append(f"about {duration_text(found.seconds_left)} left")
        what = "append " if found.command == "append" else ""
        yield f"{dataset}: {what}{': '.join([f'{where} {STAGES[found.stage]}', *filter(None, [', '.join(numbers)])])}."
    if found.ended is not None:
        words = {
            "done": "The last run planned, and left the shards to `ich-prep shards`.",
            "interrupted": "The last run was interrupted.",
            "killed": "The last run was killed.",
            "failed": f"The last run failed: {found.error}",
        }
        yield words[found.ended]
    by_state: dict[str, list[str]] = {}
    for part in found.parts:
        by_state.setdefault(part.state, []).append(part.part)
        if part.error:
            yield f"Part {part.part} failed: {part.error}"
    for state, names in by_state.items():
        yield f"Parts {state}: {', '.join(names[:MOST_PARTS])}{'' if len(names) <= MOST_PARTS else ', ...'}."
    if found.quarantined:
        yield f"Quarantined: {', '.join(f'{number:,} {reason}' for reason, number in found.quarantined.items())}."
    if found.last_write and found.state != "finished":
        yield f"Last result: {found.last_write}."


def _print_outcome(out: Place, outcome: Outcome) -> None:
    from ich_prep.dataset.dataset import open_dataset
    from ich_prep.summary import closing_lines

    counts = outcome.counts
    if outcome.already_finished:
        say(f"{out} is already finished, with the same settings: nothing to do.")
    say(
        f"{out}: {count(counts['ok'], 'slice')} in {counts['series']} series of {count(counts['patients'], 'patient')}; "
        f"{counts['quarantined']} of {count(counts['found'], 'file')} quarantined; {count(counts['shards'], 'shard')}, "
        f"{counts['bytes'] / 1e6:,.1f} MB."
    )
    work = sum(seconds for stage, seconds in outcome.seconds.items() if stage not in ("list", "start workers"))
    if work and "shards" in outcome.seconds:
        say(
            f"{work:.1f} s, {counts['planned'] / work:,.0f} slices/s after the workers had started "
            f"({', '.join(f'{stage} {seconds:.1f} s' for stage, seconds in outcome.seconds.items())})."
        )
    for line in closing_lines(open_dataset(out)):
        typer.echo(line)
