"""What ``ich-train predict`` writes and prints: tables as Parquet or CSV, a submission, a page, a summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from ich_prep.dataset.classes import ANY
from ich_prep.dataset.dataset import Dataset
from ich_prep.dataset.tables import parquet_bytes
from ich_prep.errors import UsageError, count
from ich_prep.html import Cell, Row, Tile, render
from ich_train.infer import DAMAGE, NO_CALL, Predictions
from ich_train.runs import require_writable
from ich_train.submission import (
    Submission,
    check_submission,
    require_names,
    training_shares,
    write_output,
    write_submission,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_train.infer_source import Source

TEMPLATE = "infer.html.jinja"
NETWORKS = "ich_networks"  # the key of a Parquet file's metadata
ENDINGS = (".csv", ".parquet")
MOST_LISTED = 5  # damaged files in the summary
MOST_LETTERS = 500  # of a path in the summary
MOST_LINES = 1000  # of a table of the page


@dataclass(frozen=True)
class Outputs:
    """The files to write; ``out`` has the slices, as a table or as a submission."""

    out: Path
    kaggle: bool
    scans: Path | None = None
    quarantine: Path | None = None
    report: Path | None = None
    sample: Path | None = None


def check_outputs(outputs: Outputs, classes: tuple[str, ...]) -> None:
    """Raise `UsageError`, before any work, for a file that cannot be written or has another ending than its format's."""
    if outputs.kaggle:
        check_submission(outputs.out, classes)
    elif outputs.sample is not None:
        raise UsageError("--sample is for a submission: add --format kaggle, or leave it out.")
    tables = {"--scans": outputs.scans, "--quarantine": outputs.quarantine}
    named = {"--out": outputs.out, **tables, "--report": outputs.report}
    paths = [path.absolute() for path in named.values() if path is not None]
    if len({*paths}) < len(paths):
        raise UsageError(f"Two outputs have the same path: {', '.join(map(str, paths))}. Name different files.")
    for option, path in named.items():
        if path is None or (outputs.kaggle and option == "--out"):
            continue
        endings = (".html",) if option == "--report" else ENDINGS
        if path.suffix.lower() not in endings:
            raise UsageError(f"{option} {path}: expected a name that ends in {' or '.join(endings)}.")
        if path.is_dir():
            raise UsageError(f"{path} is a folder. Name the file to write with {option}.")
        require_writable(path.parent, hint=f"Name another file with {option}.")


def check_source(outputs: Outputs, source: Source) -> None:
    """Raise `UsageError` if a submission is wanted from a dataset with pseudonyms."""
    if outputs.kaggle and isinstance(source, Dataset):
        require_names(source)


def write_outputs(outputs: Outputs, found: Predictions, source: Source) -> Submission | None:
    """Write all files; return what the submission holds, if there is one."""
    found = replace(found, **{name: _with_networks(getattr(found, name), found) for name in ("slices", "scans")})
    submission = None
    if outputs.kaggle:
        submission = write_submission(
            outputs.out, found.slices, found.classes, sample=outputs.sample, shares=lambda: _shares(found, source)
        )
    else:
        write_output(outputs.out, _table_bytes(outputs.out, found.slices.drop_columns("label_line")))
    for path, table in ((outputs.scans, found.scans), (outputs.quarantine, found.quarantine)):
        if path is not None:
            write_output(path, _table_bytes(path, table))
    if outputs.report is not None:
        write_output(outputs.report, report_html(found, source).encode())
    return submission


def _with_networks(table: pa.Table, found: Predictions) -> pa.Table:
    """Return ``table`` with the networks and their temperatures in its schema's metadata, which a Parquet file keeps."""
    networks = [{"run": one.run, "temperature": one.value} for one in found.temperatures]
    return table.replace_schema_metadata({NETWORKS: json.dumps(networks)})


def _shares(found: Predictions, source: Source) -> NDArray[np.float32]:
    """Return the best guess for a slice without an image: of a dataset the labels' shares, else the mean probabilities."""
    if isinstance(source, Dataset):
        return training_shares(source, found.predictors[0].meta)
    values = found.matrix()
    known = values[~np.isnan(values[:, 0])]
    return np.asarray(known.mean(axis=0) if len(known) else np.full(len(found.classes), 0.5), np.float32)


def _table_bytes(path: Path, table: pa.Table) -> bytes:
    """Return ``table`` in the format of the name ``path``; in CSV, words of a list are separated by spaces."""
    if path.suffix.lower() == ".parquet":
        return parquet_bytes(table, compression="zstd")
    for index, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            table = table.set_column(index, field.name, pc.binary_join(table[field.name], " "))
    sink = pa.BufferOutputStream()
    csv.write_csv(table, sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def calibration_lines(found: Predictions) -> list[str]:
    """Return for each network whether its probabilities are calibrated."""
    return [f"{one.run}: {one.describe()}." for one in found.temperatures]


def summary_lines(found: Predictions) -> list[str]:
    """Return what was predicted and what was not, and why, in sentences."""
    predicted = int((~np.isnan(found.matrix()[:, 0])).sum())
    called = found.scans[NO_CALL].null_count
    slices, scans = count(len(found.slices), "slice"), count(len(found.scans), "scan")
    lines = [f"{predicted:,} of {slices} and {called:,} of {scans} predicted."]
    for row, uid, reason in _without_call(found)[:MOST_LISTED]:
        lines.append(f"No call for scan {'' if row is None else f'{row}, '}{uid}: {reason}.")
    if len(found.scans) - called > MOST_LISTED:
        lines.append(f"... and for {count(len(found.scans) - called - MOST_LISTED, 'other scan')}; see --scans.")
    if len(found.quarantine):
        lines.append(f"{count(len(found.quarantine), 'file')} quarantined: {_reasons(found)}.")
    damaged = [line for line in found.quarantine.to_pylist() if line["reason"] in DAMAGE]
    lines += [f"{line['path'][:MOST_LETTERS]}: {line['reason']}, {line['detail']}" for line in damaged[:MOST_LISTED]]
    if len(damaged) > MOST_LISTED:
        lines.append(f"... and {count(len(damaged) - MOST_LISTED, 'other damaged file')}; --quarantine lists them.")
    return lines


def _without_call(found: Predictions) -> list[tuple[int | None, str, str]]:
    table = found.scans.filter(pc.is_valid(found.scans[NO_CALL]))
    columns = (table[name].to_pylist() for name in ("series_row", "series_instance_uid", NO_CALL))
    return list(zip(*columns, strict=True))


def _reasons(found: Predictions) -> str:
    reasons = Counter(found.quarantine["reason"].to_pylist())
    return ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())


# --- the page --------------------------------------------------------------------------------------------------------


def report_html(found: Predictions, source: Source) -> str:
    """Return a page with the probabilities of each scan, its flags, and the files that were left out."""
    scans = found.scans
    return render(
        files("ich_train").joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=f"Predictions for {source.path.name}",
        tiles=_tiles(found),
        facts=_facts(found, source),
        head=("scan", *found.classes, "highest slice", "slices", "flags"),
        scans=_scan_rows(found)[:MOST_LINES],
        scans_left_out=max(0, len(scans) - MOST_LINES),
        quarantine=[
            Row([line["path"], line["reason"], line["detail"] or ""])
            for line in found.quarantine.slice(0, MOST_LINES).to_pylist()
        ],
        quarantine_left_out=max(0, len(found.quarantine) - MOST_LINES),
    )


def _tiles(found: Predictions) -> list[Tile]:
    called = found.scans[NO_CALL].null_count
    predicted = int((~np.isnan(found.matrix()[:, 0])).sum())
    return [
        Tile(Cell(f"{called:,}"), "scans with a call", f"of {len(found.scans):,}"),
        Tile(Cell(f"{predicted:,}"), "slices predicted", f"of {len(found.slices):,}"),
        Tile(Cell(f"{len(found.quarantine):,}"), "files quarantined", _reasons(found)),
    ]


def _facts(found: Predictions, source: Source) -> list[Row]:
    rows = [Row(["source", str(source.path)])]
    networks = zip(found.predictors, found.temperatures, strict=True)
    for number, (predictor, temperature) in enumerate(networks, start=1):
        meta = predictor.meta
        words = f"{meta.network}, epoch {meta.epoch}, {meta.images.describe()}, orientation {meta.images.orientation}"
        rows.append(Row([f"network {number}", f"{words}; {temperature.describe()}"]))
    return rows


def _scan_rows(found: Predictions) -> list[Row]:
    """Return a line for each scan, the highest probability first, those without a call last."""
    key = ANY if ANY in found.classes else found.classes[0]
    ordered = found.scans.sort_by([(key, "descending"), ("series_row", "ascending")])
    highest = _highest_slices(found, key)
    rows = []
    for line in ordered.slice(0, MOST_LINES).to_pylist():
        name = Cell(_text(line["series_row"]), (line["series_instance_uid"], f"patient {_text(line['patient_id'])}"))
        undefined = [Cell("no call", undefined=True)] * len(found.classes)
        values = [f"{line[name]:.3f}" for name in found.classes] if line[NO_CALL] is None else undefined
        slices = Cell(f"{line['n_predicted']:,}", _slices_words(line))
        rows.append(Row([name, *values, highest.get(line["series_row"], ""), slices, ", ".join(line["flags"] or ())]))
    return rows


def _text(value: object) -> str:
    return "unknown" if value is None else str(value)


def _slices_words(line: dict[str, object]) -> tuple[str, ...]:
    words = [f"{line['n_damaged']} damaged"] if line["n_damaged"] else []
    return (*words, *((str(line[NO_CALL]),) if line[NO_CALL] else ()))


def _highest_slices(found: Predictions, key: str) -> dict[int, Cell]:
    """Return for each scan the slice with the highest probability of the class ``key``: its number and position."""
    table = found.slices.filter(pc.is_valid(found.slices[key])).sort_by(
        [(key, "descending"), ("slice_index", "ascending")]
    )
    cells: dict[int, Cell] = {}
    names: Sequence[str] = ("series_row", "slice_index", "position_mm", "sop_instance_uid")
    for row, index, position, uid in zip(*(table[name].to_pylist() for name in names), strict=True):
        place = "position unknown" if position is None else f"at {position:.1f} mm"
        cells.setdefault(row, Cell(f"{index}", (place, uid)))
    return cells
