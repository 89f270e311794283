"""DICOM files rendered in memory, as a build renders them, without a dataset: one file, or the scans of a source."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.affine import upright_turns
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.components import codes_of
from ich_prep.dataset.dataset import Dataset, row_numbers
from ich_prep.dataset.native import require
from ich_prep.dataset.schema import AS_STORED, FORMAT, OK, QUARANTINE_SCHEMA, Counts, Root
from ich_prep.dataset.shard_reader import output_array
from ich_prep.dataset.storage import local_path
from ich_prep.dataset.tables import with_columns
from ich_prep.dicom.decode import Decoder
from ich_prep.errors import Reason, SliceError
from ich_prep.execute import Pool
from ich_prep.layouts import LAYOUTS, check_layout, choose_layout
from ich_prep.layouts.labels import no_labels
from ich_prep.progress import NoProgress, Progress
from ich_prep.sources import FolderSource, Source, open_source, read_ahead
from ich_prep.stages import identity
from ich_prep.stages.checks import check_any_slice
from ich_prep.stages.plan import Plan
from ich_prep.stages.plan_tables import PLAN_COLUMNS
from ich_prep.stages.publish import with_results, with_rows
from ich_prep.stages.results import reports_table
from ich_prep.stages.scan import FILES_PER_BATCH, SCHEMA, scan_file, scan_files
from ich_prep.stages.shard import COLUMNS, FILES_AHEAD, RowReport, SliceRenderer, pixel_source, row_reports
from ich_prep.stages.state import BuildFolder
from ich_prep.stages.survey import Job, plan_files, settle_files, source_keys

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.spec import Spec, Stored
    from ich_prep.pixels.audit import Audit

LOST_SCANS = ("series_instance_uid", "study_instance_uid", "patient_id", "n_damaged")
_FOLDS = ("fold", "fold_group")  # columns that say something about training data only


def render_file(path: str | os.PathLike[str], spec: Spec) -> NDArray[Any]:
    """Return the pixels of one DICOM file, (channel, y, x), as a build with ``spec`` stores them.

    uint8 window codes, or int16 HU if ``spec.store`` is "hu". Known defects are repaired as ``spec.layout`` says; with
    the layout "auto" none are, because one file does not show which data set it is from. The slice is turned upright by its
    own orientation, unless ``spec.orientation`` is "as-stored"; a build turns the slices of a volume alike. Raises
    ``SliceError``, with the reason, for a file that is not a CT slice or that cannot be decoded.
    """
    file = Path(path)
    folder, key = FolderSource(file.parent), os.fsencode(file.name)
    line = dict.fromkeys(SCHEMA.names) | scan_file(folder, key, key)
    if line["reason"] is not None:
        raise SliceError(Reason(line["reason"]), line["detail"])
    line["repairs"] = _repairs(line, spec, file)
    line["turn"] = _turn(line, spec)
    decoder = Decoder()
    try:
        stored = decoder.read(pixel_source(folder, key, line))
        slices = SliceRenderer(spec)
        slices.render(stored, line)
    finally:
        decoder.close()
    return slices.out


def _turn(line: dict[str, Any], spec: Spec) -> str:
    if spec.orientation == AS_STORED or line["orientation"] is None:
        return ""
    return str(upright_turns(np.array([line["orientation"]], np.float64))[0])


def _repairs(line: dict[str, Any], spec: Spec, file: Path) -> list[str]:
    if spec.layout == "auto":
        return []
    assignment = LAYOUTS[spec.layout].assign(pa.Table.from_pylist([line], SCHEMA), file.absolute().parent.name)
    names: list[str] = assignment.repairs[0].as_py()
    return names


# --- the scans of a source -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedScans:
    """The scans of a ``source``, ordered as a build orders them, no pixel decoded yet.

    ``slices`` and ``series`` are the plan's tables without folds, ``keys`` (binary) the source keys of the slices,
    ``quarantine`` the files that are left out so far, with ``series_instance_uid`` (null where no header was read).
    ``damaged``, int64 (volumes,), counts the files that belong to each volume by their headers and are too damaged for a
    row; ``lost`` (``LOST_SCANS``) has the volumes of which every file is. ``found`` is the number of files.
    """

    source: Source
    path: Path
    spec: Spec
    slices: pa.Table
    series: pa.Table
    keys: pa.ChunkedArray
    quarantine: pa.Table
    damaged: NDArray[np.int64]
    lost: pa.Table
    found: int


def plan_scans(src: Sequence[str | Path], spec: Spec, *, progress: Progress | None = None) -> PlannedScans:
    """Return the scans of the folders and zip archives ``src``, in the rows that a build without labels gives them.

    Label tables are not read: labels of all classes of ``spec``, which may be any, are unknown. Patients are not linked: no
    fold is assigned. Raises ``SourceError`` if there is no CT slice, or nothing that can be read, and ``UsageError``.
    """
    require()
    progress = progress or NoProgress()
    assumed = spec.model_copy(update={"link": (), "classes": RSNA_CLASSES})  # which classes a layout has, labels decide
    check_layout(assumed)
    paths = [local_path(path, "--src").absolute() for path in src]
    source = open_source(paths)
    listing = source.list()
    layout, assumed = choose_layout(assumed, listing, progress)
    spec = assumed.model_copy(update={"classes": spec.classes})
    progress.begin("Reading headers", len(listing.files), "files", 0)
    scanned = pa.concat_tables(_scanned(source, listing.files, progress))
    progress.end()
    with tempfile.TemporaryDirectory(prefix="ich-scans-") as temporary, Pool(workers=0) as pool:
        job = Job(pool, BuildFolder(Path(temporary)), paths, listing, progress)
        found = settle_files(job, scanned, spec)
        scanned = found.scanned  # which the plan takes out of it
        plan = plan_files(job, found, layout=layout, labels=no_labels(spec.classes), spec=spec)
    check_any_slice(plan)
    damaged, lost = _damage(plan, scanned)
    return PlannedScans(
        source=source,
        path=paths[0],
        spec=spec,
        slices=_without_folds(plan.slices),
        series=_without_folds(plan.series),
        keys=source_keys(listing, plan.slices["path"]),
        quarantine=_with_series(plan, scanned),
        damaged=damaged,
        lost=lost,
        found=len(listing.files),
    )


def _scanned(source: Source, files: pa.Table, progress: Progress) -> Iterator[pa.Table]:
    for start in range(0, len(files), FILES_PER_BATCH):
        part = scan_files(source, files.slice(start, FILES_PER_BATCH).to_pylist())
        progress.advance(len(part), len(part) - part["reason"].null_count)
        yield part


def _without_folds(table: pa.Table) -> pa.Table:
    return with_columns(table, {name: [None] * len(table) for name in _FOLDS})


def _with_series(plan: Plan, scanned: pa.Table) -> pa.Table:
    """Return the plan's quarantine table with the Series Instance UID of each file whose header was read."""
    index = pc.index_in(plan.quarantine["path"], value_set=scanned["path"])
    return plan.quarantine.append_column("series_instance_uid", scanned["series_instance_uid"].take(index))


def _damage(plan: Plan, scanned: pa.Table) -> tuple[NDArray[np.int64], pa.Table]:
    """Return for each volume of the ``plan`` its number of damaged files, and the volumes that are lost with all files.

    Damaged files are assigned to volumes by patient and study, as slices are, so that damage to the files of one patient
    does not count for another.
    """
    reasons = [reason is not None and Reason(reason).is_damage for reason in scanned["reason"].to_pylist()]
    is_damaged = np.array(reasons, bool) & pc.is_valid(scanned["series_instance_uid"]).to_numpy()
    is_slice = pc.is_in(scanned["path"], value_set=plan.slices["path"]).to_numpy()
    headers = scanned.filter(pa.array(is_damaged | is_slice))
    is_damaged = is_damaged[is_damaged | is_slice]
    patient = identity.with_issuer(identity.usable(headers["patient_id"]), headers["issuer_of_patient_id"])
    owner, _ = identity.divide_series(
        codes_of(headers["series_instance_uid"]),
        codes_of(identity.usable(headers["study_instance_uid"])),
        codes_of(patient),
    )
    numbers = np.bincount(owner, weights=is_damaged).astype(np.int64)
    first = pc.index_in(plan.slices["path"].take(plan.series["first_row"]), value_set=headers["path"])
    without_slice = np.bincount(owner, weights=~is_damaged) == 0
    lost = [
        {**headers.slice(int(np.argmax(owner == number)), 1).select(LOST_SCANS[:-1]).to_pylist()[0], "n_damaged": total}
        for number, total in enumerate(numbers.tolist())
        if without_slice[number] and total
    ]
    fields = [*((name, pa.string()) for name in LOST_SCANS[:-1]), (LOST_SCANS[-1], pa.int32())]
    found = pa.Table.from_pylist(lost, pa.schema(fields))
    return numbers[owner[first.to_numpy()]], found.sort_by([(name, "ascending") for name in LOST_SCANS])


class RenderedScans(Dataset):
    """Scans in memory that are read like a dataset: equal rows, pixels and tables, but no labels, folds or checksums.

    ``quarantine`` (the columns of the table of a dataset, and ``series_instance_uid``) has the slices that could not be
    decoded; their rows have the reason as status, and no pixels.
    """

    def __init__(self, path: Path, spec: Spec, tables: Mapping[str, pa.Table], pixels: NDArray[Any]) -> None:
        slices = tables["slices"]
        ok = int(pc.sum(pc.equal(slices["status"], OK)).as_py() or 0)
        counts = Counts(
            rows=len(slices),
            ok=ok,
            quarantined=len(slices) - ok,
            series=len(tables["series"]),
            shards=0,
            found=len(slices),
        )
        root = Root.model_construct(format=FORMAT, spec=spec, classes=spec.classes, counts=counts, digest="")
        super().__init__(path, root, {})
        self._tables, self._pixels = dict(tables), pixels

    @property
    def quarantine(self) -> pa.Table:
        """The slices without pixels."""
        return self._tables["quarantine"]

    def read_table(self, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a table (slices, series or quarantine), or only some of its columns."""
        found = self._tables[table]
        return found if columns is None else found.select(list(columns))

    def read(
        self, rows: Sequence[int] | NDArray[np.integer[Any]], out: NDArray[Any] | None = None, *, threads: int = 1
    ) -> NDArray[Any]:
        """Return the pixels of ``rows``; see ``Dataset.read``."""
        wanted = row_numbers(rows)
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if len(outside):
            raise IndexError(f"Expected rows of 0 to {len(self) - 1}; got {outside[0]}.")
        missing = wanted[~self.is_ok[wanted]]
        if len(missing):
            self._refuse_row(int(missing[0]))
        out = output_array(out, (len(wanted), *self.shape[1:]), self.dtype)
        return np.take(self._pixels, wanted, axis=0, out=out, mode="clip")  # checked; "raise" would buffer a copy

    def _check_stored_form(self, slices: pa.Table) -> None:
        """Do nothing: there is no shard."""


def render_scans(planned: PlannedScans, stored: Stored, volumes: range, *, threads: int = 1) -> RenderedScans:
    """Return the ``volumes`` of the plan (lines of its series table, adjacent), rendered as a build stores them.

    ``stored`` says how: its orientation is the plan's. Rows and ``series_row`` start at 0. The flag ``same_image``
    marks equal images among these volumes. ``threads`` render at once.
    """
    series = planned.series.slice(volumes.start, len(volumes))
    first = int(series["first_row"][0].as_py())
    rows = int(pc.sum(series["n_slices"]).as_py())
    spec = planned.spec.model_copy(
        update={name: getattr(stored, name) for name in ("size", "store", "windows", "orientation")}
    )
    lines = planned.slices.slice(first, rows)
    pixels = np.empty((rows, spec.channels, spec.size, spec.size), spec.dtype)
    records, keys = lines.select(COLUMNS).to_pylist(), planned.keys.slice(first, rows).to_pylist()
    bounds = np.linspace(0, rows, min(threads, rows) + 1).astype(int).tolist()

    def part(number: int) -> list[RowReport]:
        chosen = slice(bounds[number], bounds[number + 1])
        return _rendered(planned.source, records[chosen], keys[chosen], spec, pixels[chosen])

    with ThreadPoolExecutor(len(bounds) - 1, thread_name_prefix="render") as pool:
        reports = [report for reports in pool.map(part, range(len(bounds) - 1)) for report in reports]
    return RenderedScans(planned.path, spec, _tables_of(lines, series, reports), pixels)


def _rendered(
    source: Source, lines: Sequence[Mapping[str, Any]], keys: Sequence[bytes], spec: Spec, pixels: NDArray[Any]
) -> list[RowReport]:
    """Fill ``pixels`` (n, channel, y, x) from the files of n ``lines`` of the plan; return the report of each."""
    decoder, slices = Decoder(), SliceRenderer(spec)
    results: list[Audit | SliceError] = []
    located = [pixel_source(source, key, line) for key, line in zip(keys, lines, strict=True)]
    try:
        for number, one in enumerate(read_ahead(source, located, lambda pixels: pixels.key, files=FILES_AHEAD)):
            slices.out = pixels[number]
            try:
                results.append(slices.render(decoder.read(one), lines[number]))
            except SliceError as error:
                results.append(error)
    finally:
        decoder.close()
    return list(row_reports(results, repeat(None), slices.histogram.tissues()))


def _tables_of(lines: pa.Table, series: pa.Table, reports: Sequence[RowReport]) -> dict[str, pa.Table]:
    """Return the tables of rendered volumes: what is published of their ``lines`` of the plan, and of their ``series``."""
    results = reports_table(reports)
    ok = pc.equal(results["status"], OK).to_numpy()
    slices = lines.drop_columns(list(PLAN_COLUMNS))
    origins = {"row": lines["row"][0], "series_row": series["series_row"][0]}
    slices = with_columns(slices, {name: pc.subtract(slices[name], origin) for name, origin in origins.items()})
    starts = {"series_row": origins["series_row"], "first_row": origins["row"]}
    series = with_columns(series, {name: pc.subtract(series[name], origin) for name, origin in starts.items()})
    slices = with_results(slices, results)
    failed = slices.filter(pa.array(~ok))
    quarantine = pa.table(
        [
            lines["path"].filter(pa.array(~ok)),
            pa.array(["shard"] * len(failed), pa.string()),
            failed["row"],
            failed["status"],
            results["detail"].filter(pa.array(~ok)),
        ],
        schema=QUARANTINE_SCHEMA,
    ).append_column("series_instance_uid", failed["series_instance_uid"])
    return {"slices": slices, "series": with_rows(series, slices, ok), "quarantine": quarantine}
