"""The commands that look before and after a build: scan, find, quarantine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ich_prep.command_options import BuildDir, Json, options_from
from ich_prep.errors import Reason, UsageError, count
from ich_prep.messages import duration_text, size_text
from ich_prep.options import BuildOptions, resolve
from ich_prep.recipe import refuse_unknown
from ich_prep.text_tables import check_new_file, print_table, print_text, printable, write_csvs

if TYPE_CHECKING:
    import pyarrow as pa

    from ich_prep.dataset.spec import Spec
    from ich_prep.dry_run import DryRun
    from ich_prep.progress import Progress
    from ich_prep.stages.quarantined import Group

MOST_LINES = 40  # of a table in the terminal
MOST_EXAMPLES = 5
MOST_DETAIL = 300  # characters

CsvFile = Annotated[Path | None, typer.Option("--csv", help="New CSV file to write the whole table to.")]


@options_from(BuildOptions)
def scan(
    src: Annotated[list[Path], typer.Argument(help="Folders, zip archives or URLs with the DICOM files.")],
    *,
    recipe: Annotated[Path | None, typer.Option(help="TOML file whose [build] sets any of these; options win.")] = None,
    csv_file: CsvFile = None,
    label_template: Annotated[Path | None, typer.Option(help="New CSV file for labels, to be filled in.")] = None,
    level: Annotated[
        Literal["slice", "series", "study", "patient"], typer.Option(help="What a line of the template is about.")
    ] = "series",
    as_json: Json = False,
    given: dict[str, Any],
) -> None:
    """Look at a source before a build: volumes, conflicts, what would leave, disk and time. Needs no labels."""
    options = resolve(recipe, given)

    from ich_prep.dry_run import dry_run
    from ich_prep.layouts.label_template import label_template as template_of

    for path, option in ((csv_file, "--csv"), (label_template, "--label-template")):
        check_new_file(path, option, src)
    with _progress(quiet=as_json, lines=options.log_json) as progress:
        check = None if label_template is None else _refuse_template
        found = dry_run(src, options.spec(), check=check, progress=progress, **options.arguments(), **options.buckets())
    notes = list(found.notes)
    tables = {} if csv_file is None else {csv_file: found.volumes}
    if label_template is not None:
        template = template_of(found.slices, found.volumes, level, found.spec.classes)
        tables[label_template] = template.table
        notes += [f"{label_template}: {count(len(template.table), 'line')} to fill in", *template.notes]
    write_csvs(tables)
    if as_json:
        typer.echo(json.dumps({**_as_json(found), "notes": notes}, indent=2, default=str))
    else:
        _print_dry_run(found, notes)


def find(
    dataset: Annotated[Path, typer.Argument(help="A finished dataset.")],
    row: Annotated[int | None, typer.Option(help="Number of a row.")] = None,
    sop: Annotated[str | None, typer.Option(help="SOP Instance UID of a slice.")] = None,
    build_dir: BuildDir = None,
    key: Annotated[
        Path | None, typer.Option(help="Key of the pseudonyms, for --sop. [identifiers.key in the working folder]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the source file, UIDs and accession number of a row, or of a SOP Instance UID."""
    from ich_prep import lookup

    found = lookup.find(dataset, row=row, sop=sop, build_dir=build_dir, key=key)
    if as_json:
        typer.echo(json.dumps({"rows": found.rows, "missing": found.missing}, indent=2))
        return
    for number, line in enumerate(found.rows):
        typer.echo("\n" if number else "", nl=False)
        for name, value in line.items():
            typer.echo(f"{name:20} {'-' if value is None else printable(value)}")
    if found.missing:
        typer.echo(found.missing, err=True)


def quarantine(
    dataset: Annotated[Path, typer.Argument(help="A dataset, a build that stopped, or the working folder of either.")],
    reason: Annotated[list[str] | None, typer.Option(help="List the files of this reason. May be repeated.")] = None,
    csv_file: CsvFile = None,
    copy_to: Annotated[
        Path | None,
        typer.Option(help="Copy the files there, into a folder per reason; overwrites nothing. Needs --src."),
    ] = None,
    src: Annotated[list[Path] | None, typer.Option(help="The sources, as build was given them, for --copy-to.")] = None,
    build_dir: BuildDir = None,
    key: Annotated[
        Path | None, typer.Option(help="Key of the pseudonyms, for --copy-to. [identifiers.key in the working folder]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a build quarantined, and why; also of one that stopped."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from ich_prep.stages.quarantined import by_reason, key_of_quarantine, read_quarantine

    refuse_unknown(reason or (), map(str, Reason), where="--reason", listed=False)
    if copy_to is not None and not src:
        raise UsageError("--copy-to needs the sources: give --src as to `ich-prep build`.")
    check_new_file(csv_file, "--csv", src or ())
    found = read_quarantine(dataset, build_dir)
    files = found.files
    if reason:
        files = files.filter(pc.is_in(files["reason"], value_set=pa.array(reason, pa.string())))
    groups = by_reason(files)
    copied = None
    if copy_to is not None:
        secret = key_of_quarantine(dataset, build_dir, key)
        copied = _copy(files, src or (), copy_to, secret, quiet=as_json)
    if csv_file is not None:  # last: an existing file is not overwritten, and the command may have to run again
        write_csvs({csv_file: files})
    if as_json:
        parts = {"stage": found.stage, "reasons": [vars(group) for group in groups], "files": files.to_pylist()}
        typer.echo(json.dumps({**parts, **({} if copied is None else {"copied": vars(copied)})}, indent=2))
        return
    if not len(files):
        typer.echo("Nothing was quarantined" + (f" as {', '.join(reason)}." if reason else "."))
    elif reason:
        _print_files(files)
    else:
        _print_groups("Quarantined", groups)
    if found.stage == "scanned":
        typer.echo("The build stopped before it had a plan: duplicates, filters and units are not checked yet.")
    elif found.stage == "planned":
        typer.echo("The build is not finished: slices that do not decode may follow.")
    if copied is not None:
        typer.echo(f"Copied {count(copied.copied, 'file')} to {copy_to}; {copied.existing:,} were there already.")
        for problem in copied.failed[:MOST_EXAMPLES]:
            typer.echo(f"  not copied: {printable(problem)}", err=True)
        if copied.failed:
            typer.echo(f"{count(len(copied.failed), 'file')} could not be copied.", err=True)
            raise typer.Exit(1)


def _copy(files: pa.Table, src: Sequence[Path], target: Path, secret: bytes | None, *, quiet: bool) -> Any:
    from ich_prep.lookup import copy_quarantined

    with _progress(quiet=quiet) as progress:
        return copy_quarantined(files, src, target, secret=secret, progress=progress)


def _progress(*, quiet: bool, lines: bool = False) -> Any:
    """Return a context of a ``Progress``."""
    from contextlib import nullcontext

    from ich_prep.progress import JsonProgress, NoProgress, TerminalProgress

    if lines:
        return nullcontext(JsonProgress())
    silent: Progress = NoProgress()
    return nullcontext(silent) if quiet else TerminalProgress()


# --- a dry run -------------------------------------------------------------------------------------------------------


def _as_json(found: DryRun) -> dict[str, Any]:
    from ich_prep.stages.quarantined import by_reason

    return {
        "sources": list(map(str, found.sources)),
        "spec": found.spec.model_dump(mode="json"),
        "counts": _counts(found),
        "volumes": found.volumes.to_pylist(),
        "conflicts": [vars(conflict) for conflict in found.conflicts()],
        "flags": found.flags(),
        "leaves": [vars(group) for group in by_reason(found.quarantine)],
        "quarantine": found.quarantine.to_pylist(),
        "labels": _labels(found),
        "stops": list(found.stops),
        "estimate": {**vars(found.estimate), "sample": vars(found.estimate.sample)},
    }


def _counts(found: DryRun) -> dict[str, int]:
    import pyarrow.compute as pc

    return {
        "files": found.files,
        "slices": len(found.slices),
        "volumes": len(found.volumes),
        "studies": len(pc.unique(found.volumes["study_instance_uid"])),
        "patients": len(pc.unique(found.volumes["patient_id"])),
        "quarantined": len(found.quarantine),
    }


def _labels(found: DryRun) -> dict[str, Any] | None:
    import pyarrow.compute as pc

    if not len(found.labels.keys):
        return None
    labelled = pc.sum(pc.not_equal(found.slices["label_level"], "none")).as_py() or 0
    return {"key": found.labels.key, "labels": len(found.labels.keys), "labelled_slices": labelled}


def _print_dry_run(found: DryRun, notes: Iterable[str]) -> None:
    from ich_prep.stages.quarantined import by_reason

    counts = _counts(found)
    print_text(
        f"{', '.join(map(str, found.sources))} (layout {found.spec.layout}): {count(counts['slices'], 'slice')} in "
        f"{count(counts['volumes'], 'volume')} of {count(counts['patients'], 'patient')}; {counts['quarantined']:,} of "
        f"{count(counts['files'], 'file')} would be quarantined."
    )
    _print_volumes(found.volumes)
    conflicts = [
        (
            conflict.name,
            f"{conflict.slices:,}",
            "-" if conflict.volumes is None else f"{conflict.volumes:,}",
            conflict.path,
        )
        for conflict in found.conflicts()
    ]
    if conflicts:
        print_table("Conflicts", (("conflict", 20), (">slices", 9), (">volumes", 9), ("<for example", 56)), conflicts)
    _print_groups("Would be quarantined", by_reason(found.quarantine))
    if found.flags():
        typer.echo()
        print_text("Flags: " + ", ".join(f"{number:,} {name}" for name, number in found.flags().items()) + ".")
    typer.echo()
    for line in (_labels_line(found), *_estimate_lines(found), *(f"{note}." for note in notes)):
        print_text(line)
    for stop in found.stops:
        typer.echo()
        print_text(f"A build with these options would end: {stop}")


def _labels_line(found: DryRun) -> str:
    labels = _labels(found)
    if labels is None:
        return "No labels: a build needs a label table (--label-template writes an empty one), or --allow-unlabelled."
    return (
        f"Labels: {labels['labels']:,} by {labels['key']}; {labels['labelled_slices']:,} of "
        f"{count(len(found.slices), 'slice')} have one."
    )


def _print_volumes(volumes: pa.Table) -> None:
    lines = volumes.slice(0, MOST_LINES).to_pylist()
    rows = [
        (
            str(line["series_row"]),
            line["patient_id"],
            line["series_instance_uid"],
            f"{line['n_slices']:,}",
            "-" if line["slice_spacing_mm"] is None else f"{line['slice_spacing_mm']:.2f}",
            line["scan_type"],
            line["convolution_kernel"],
            line["series_description"],
            ", ".join(line["flags"]),
        )
        for line in lines
    ]
    columns = (
        (">#", 5), ("patient", 12), ("<series", 11), (">slices", 6), (">mm", 5), ("type", 8), ("kernel", 8),
        ("description", 16), ("flags", 20),
    )  # fmt: skip
    if rows:
        print_table("Volumes", columns, rows)
    if len(volumes) > MOST_LINES:
        typer.echo(f"... and {len(volumes) - MOST_LINES:,} more: --csv or --json has all.")


def _estimate_lines(found: DryRun) -> Iterable[str]:
    estimate, slices = found.estimate, len(found.slices)
    sample = estimate.sample
    if sample.failures:
        yield (
            f"{len(sample.failures)} of {count(sample.slices, 'sampled slice')} do not decode, such as "
            f"{printable(sample.failures[0])}."
        )
    if estimate.dataset_bytes is None or estimate.slice_seconds is None:
        return
    processes = count(estimate.processes, "process", "processes")
    header = "" if estimate.header_seconds is None else f" and {duration_text(estimate.header_seconds)} for headers"
    yield (
        f"Estimate, from {count(sample.slices, 'slice')} decoded on this machine: {size_text(estimate.dataset_bytes)} "
        f"on disk (uncompressed {size_text(estimate.uncompressed_bytes)}), {size_text(estimate.folder_bytes)} or more in "
        "the working folder."
    )
    yield (
        f"Time, an estimate too: {duration_text(estimate.slice_seconds)} for {count(slices, 'slice')} in "
        f"{processes}{header}; "
        f"longer if the disk cannot read {size_text(estimate.source_bytes)} in that time."
    )


def _refuse_template(spec: Spec) -> None:
    if spec.layout != "folder":
        raise UsageError(
            f"--label-template is for the layout folder; the source has the layout {spec.layout}, which brings its own "
            "labels. Leave the option out, or give --layout folder to both scan and build."
        )


# --- quarantined files -----------------------------------------------------------------------------------------------


def _print_groups(title: str, groups: Sequence[Group]) -> None:
    """Print how many files left for each reason, and one of them."""
    from ich_prep.stages.quarantined import KINDS

    if groups:
        typer.echo(f"\n{title}")
    for group in groups:
        typer.echo(f"{group.files:9,} {group.reason} ({KINDS[group.kind]})")
        print_text(f"for example {printable(group.path)}: {printable(group.detail)[:MOST_DETAIL]}", indent=10)


def _print_files(files: pa.Table) -> None:
    for line in files.slice(0, MOST_LINES).to_pylist():
        print_text(f"{line['reason']} {printable(line['path'])}")
        print_text(printable(line["detail"] or "")[:MOST_DETAIL], indent=10)
    if len(files) > MOST_LINES:
        typer.echo(f"... and {len(files) - MOST_LINES:,} more: --csv or --json has all.")
