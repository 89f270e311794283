"""The commands that change a finished dataset, and show how it changed: parse, call one function, print."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ich_prep.cli_build import reporting
from ich_prep.command_options import BuildDir, Json, options_from
from ich_prep.errors import InterruptError, count
from ich_prep.options import BuildOptions

if TYPE_CHECKING:
    from ich_prep.relabel import Relabelling

Finished = Annotated[Path, typer.Argument(help="A finished dataset.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")]


@options_from(
    BuildOptions,
    *("labels", "label_key", "label_column", "ignore_columns", "keep_columns", "build_dir", "key", "workers"),
    *("scheduler", "tls_ca", "tls_cert", "tls_key", "max_quarantined", "allow_unlabelled", "allow_missing_images"),
    *("allow_lost_labels", "allow_kept_columns", "allow_contradictions", "allow_full_disk", "log_json"),
)
def append(
    src: Annotated[list[Path], typer.Option(help="Folder of DICOM files, or zip archive; may be repeated.")],
    out: Annotated[Path, typer.Option(help="The dataset to add them to.")],
    *,
    given: dict[str, Any],
) -> None:
    """Add slices to a dataset, as its next generation: the rows that are there stay as they are."""
    from ich_prep import append as command
    from ich_prep.recipe import validate

    options = validate(BuildOptions, given, where="ich-prep append")
    try:
        with reporting(as_json=options.log_json) as progress:
            found = command.append(src, out, key=options.key, progress=progress, **options.arguments())
    except KeyboardInterrupt:
        raise InterruptError("The dataset is as it was. Run the same command again to resume.") from None
    typer.echo(
        f"{out}: {count(found.slices, 'slice')} appended; of {count(found.found, 'file')} {found.duplicates:,} are there "
        f"already or duplicates, and {found.quarantined:,} were quarantined for other reasons."
    )
    if found.reasons:
        typer.echo(f"Quarantined: {', '.join(f'{number:,} {reason}' for reason, number in found.reasons.items())}.")
    for reason, loss in found.lost.items():
        typer.echo(f"Lost with {reason}: {count(loss.labels, 'label')}, {loss.positive:,} of them positive.")
    if found.fold_conflicts:
        typer.echo(
            f"{count(found.fold_conflicts, 'group')} of patients would be merged, or moved to another fold, by the new "
            "slices. All keep their folds, with the flag fold_conflict."
        )
    typer.echo("Nothing new." if found.generation is None else f"This is generation {found.generation}.")


@options_from(
    BuildOptions,
    *("label_key", "label_column", "ignore_columns", "key", "allow_contradictions", "allow_missing_images"),
)
def relabel(
    dataset: Finished,
    labels: Annotated[Path, typer.Option(help="A label table, or the corrections made in the viewer.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Labels that the table does not state become unknown.")
    ] = False,
    dry_run: DryRun = False,
    build_dir: BuildDir = None,
    as_json: Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Change the labels of a dataset, as its next generation: no pixel is read."""
    from ich_prep import relabel as command
    from ich_prep.layouts.labels import LabelOptions
    from ich_prep.recipe import validate

    options = validate(BuildOptions, given, where="ich-prep relabel")
    found = command.relabel(
        dataset,
        labels,
        label_options=LabelOptions(
            key=options.label_key, column=options.label_column, ignore=options.ignore_columns, keep=()
        ),
        replace_all=replace,
        allow_contradictions=options.allow_contradictions,
        allow_missing_images=options.allow_missing_images,
        dry_run=dry_run,
        build_dir=build_dir,
        key=options.key,
    )
    if as_json:
        typer.echo(json.dumps({"dataset": str(dataset), **asdict(found)}, indent=2))
        return
    _print_relabelling(dataset, found, dry_run=dry_run)


def _print_relabelling(dataset: Path, found: Relabelling, *, dry_run: bool) -> None:
    for note in found.notes:
        typer.echo(f"Labels: {note}.")
    for change in found.changes:
        before, after = ("unknown" if value is None else str(value) for value in (change.before, change.after))
        typer.echo(f"  {change.label}: {before} -> {after}: {count(change.slices, 'slice')}")
    if not found.slices:
        typer.echo(f"{dataset} has these labels already: nothing to do.")
    elif dry_run:
        typer.echo(f"{dataset}: the labels of {count(found.slices, 'slice')} would change.")
    else:
        typer.echo(
            f"{dataset}: the labels of {count(found.slices, 'slice')} changed; this is generation {found.generation}."
        )


def drop(
    dataset: Finished,
    where: Annotated[str, typer.Option(help="Which slices: a filter, such as \"patient_id == 'A12'\".")],
    purge: Annotated[bool, typer.Option("--purge", help="Remove their pixels from the shards, too.")] = False,
    dry_run: DryRun = False,
    build_dir: BuildDir = None,
    as_json: Json = False,
) -> None:
    """Withdraw slices from a dataset, as its next generation: they are never read again."""
    from ich_prep import drop as command

    found = command.drop(dataset, where, purge_pixels=purge, dry_run=dry_run, build_dir=build_dir)
    if as_json:
        typer.echo(json.dumps({"dataset": str(dataset), **asdict(found)}, indent=2))
        return
    what = f"{count(found.slices, 'slice')} in {count(found.volumes, 'volume')} of {count(found.patients, 'patient')}"
    already = f"; {found.already:,} were withdrawn already" if found.already else ""
    if dry_run:
        typer.echo(f"{dataset}: {what} would be withdrawn{already}.")
        return
    typer.echo(f"{dataset}: {what} withdrawn{already}.")
    if purge:
        typer.echo(f"The pixels of {count(found.purged, 'slice')} were removed. Copies remain:")
        for copy in found.copies:
            typer.echo(f"  {copy}")
    if found.generation is not None:
        typer.echo(f"This is generation {found.generation}.")


def history(dataset: Finished, as_json: Json = False) -> None:
    """Show the generations of a dataset: commands, counts, digests."""
    from ich_prep.dataset.dataset import open_dataset
    from ich_prep.summary import history_of

    generations = history_of(open_dataset(dataset))
    if as_json:
        typer.echo(json.dumps(generations, indent=2))
        return
    for line in generations:
        counts = {name: number for name, number in line["counts"].items() if name not in _NOT_SHOWN}
        typer.echo(f"generation {line['generation']}: {line['command']}")
        typer.echo(f"  digest {line['digest'] or 'not recorded'}")
        typer.echo(f"  {', '.join(f'{number:,} {name}' for name, number in counts.items())}")
        for name, digest in line["digests"].items():
            typer.echo(f"  {name} {digest}")


def clean_generations(dataset: Path, build_dir: Path | None) -> None:
    """Remove the tables of earlier generations, and say what that freed."""
    from ich_prep.stages import generation

    files, freed = generation.clean_generations(dataset, build_dir)
    typer.echo(
        f"Removed {count(files, 'file')} of earlier generations of {dataset} ({freed / 1e6:,.1f} MB). Programs that "
        "have one of them open must reopen the dataset."
        if files
        else f"{dataset} has no files of earlier generations."
    )


_NOT_SHOWN = frozenset(("bytes", "planned"))

# In the order of the help text.
COMMANDS: tuple[Callable[..., None], ...] = (append, relabel, drop, history)
