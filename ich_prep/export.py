"""Volumes of a dataset as files for other tools: NIfTI, PNG or NumPy, with labels and predictions as CSV beside them.

::

    DIR/
      volumes.csv                a line for each volume: file, identity, affine (RAS), or why it has none
      labels.csv                 a line for each slice: its place in the file, identity, labels
      predictions.csv            the same with a run's probabilities
      series_000012.nii.gz       int16 HU, (x, y, z)
      series_000012/brain/000.png    window codes, one picture for each slice with pixels
      series_000012.npy          as stored, (slice, channel, y, x)
"""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ich_prep.dataset.affine import AffineError, to_ras
from ich_prep.dataset.corrections import guarded
from ich_prep.dataset.placement import RESAMPLED, Placement, equal_steps, onto_equal_steps, place_slices
from ich_prep.dataset.storage import filling, new_folder, write_whole
from ich_prep.dataset.volumes import find_series
from ich_prep.dataset.windows import window_table
from ich_prep.errors import UsageError, count

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.affine import Affine
    from ich_prep.dataset.dataset import Dataset

FORMATS = ("nifti", "png", "npy")
SHOWN_PROBLEMS = 5
IDENTITY = ("row", "sop_instance_uid", "series_instance_uid", "patient_id", "subset", "fold", "status", "label_level")
GZIP_LEVEL = 4


@dataclass(frozen=True)
class Exported:
    """What was written: numbers of volumes and of slices with pixels, and the ``series_row`` of those resampled."""

    volumes: int
    slices: int
    resampled: tuple[int, ...]


@dataclass(frozen=True)
class _Volume:
    """One volume to write. ``rows`` are all its rows, ``ok`` those with pixels; ``problem``: why there is no affine."""

    series_row: int
    name: str
    uid: str
    rows: NDArray[np.int64]
    ok: NDArray[np.int64]
    orientation: Sequence[float] | None
    affine: Affine | None  # RAS
    problem: AffineError | None


@dataclass(frozen=True)
class _Written:
    """The file of a volume, its affine (RAS), and the plane of each of its slices with pixels, which may be a fraction."""

    file: str
    affine: Affine | None
    planes: NDArray[np.float64]


def export(
    dataset: Dataset,
    series_rows: Sequence[int],
    out: Path,
    *,
    form: str,
    resample: bool = False,
    predictions: NDArray[np.float32] | None = None,
) -> Exported:
    """Write the volumes ``series_rows`` to the new or empty folder ``out`` as ``form``, one of ``FORMATS``.

    NIfTI needs HU and one affine for the volume. With ``resample``, a volume whose slices are not at equal steps is
    resampled to planes that are. ``predictions``, (rows, classes), are written beside the labels.

    Raises ``UsageError``, before anything is written, for a folder that is not empty, an unknown form, a store of windows
    as NIfTI, and volumes that have no affine, with the reason for each; missing dependencies too.
    """
    if form not in FORMATS:
        raise UsageError(f"Expected --as {', '.join(FORMATS)}; got {form!r}.")
    out = new_folder(out, "--out", outside=dataset.path)
    volumes = [_volume(dataset, series_row) for series_row in series_rows]
    if form == "nifti":
        _check_nifti(dataset, volumes, resample=resample)
    write: Callable[[Dataset, _Volume, Path], _Written] = {"nifti": _nifti, "png": _pngs, "npy": _npy}[form]
    with filling(out):
        written = [write(dataset, volume, out) for volume in volumes]
        _write_tables(dataset, out, volumes, written, predictions)
    return Exported(
        volumes=len(volumes),
        slices=sum(len(volume.ok) for volume in volumes),
        resampled=tuple(v.series_row for v in volumes if v.affine is None) if form == "nifti" else (),
    )


def _volume(dataset: Dataset, series_row: int) -> _Volume:
    line = dataset.series.slice(find_series(dataset.series, series_row=series_row), 1).to_pylist()[0]
    rows = np.arange(line["first_row"], line["first_row"] + line["n_slices"], dtype=np.int64)
    return _Volume(
        series_row=series_row,
        name=f"series_{series_row:06d}",
        uid=str(line["series_instance_uid"]),
        rows=rows,
        ok=rows[dataset.is_ok[rows]],
        orientation=line["orientation"],
        affine=dataset.affine(series_row, ras=True),
        problem=dataset.affine_problem(series_row),
    )


# --- NIfTI -----------------------------------------------------------------------------------------------------------


def _check_nifti(dataset: Dataset, volumes: Sequence[_Volume], *, resample: bool) -> None:
    if dataset.spec.store != "hu":
        raise UsageError(
            f"{dataset.path} stores windows, from which HU cannot be recovered: it cannot be exported as NIfTI. Build it "
            "with --store hu, or export it --as png or npy."
        )
    try:
        import nibabel  # noqa: F401
    except ImportError:
        raise UsageError("NIfTI needs nibabel: pip install 'ich[nifti]'.") from None
    problems = [(volume.series_row, _nifti_problem(dataset, volume, resample=resample)) for volume in volumes]
    refused = [(number, problem) for number, problem in problems if problem is not None]
    if not refused:
        return
    shown = "\n".join(f"  series_row {number}: {problem}" for number, problem in refused[:SHOWN_PROBLEMS])
    more = f"\n  and {len(refused) - SHOWN_PROBLEMS:,} more" if len(refused) > SHOWN_PROBLEMS else ""
    mended = any(problem.reason in RESAMPLED for _, problem in refused)
    hint = "Add --resample to bring them to equal steps, or leave" if mended and not resample else "Leave"
    excluded = ", ".join(str(number) for number, _ in refused[:20])
    raise UsageError(
        f"{count(len(refused), 'volume')} of {len(volumes):,} cannot be written as NIfTI, which needs one affine:\n"
        f"{shown}{more}\n{hint} them out, as with --where 'series_row not in ({excluded})'. Nothing was written."
    )


def _nifti_problem(dataset: Dataset, volume: _Volume, *, resample: bool) -> AffineError | None:
    """Return why a volume cannot be written as NIfTI, None if it can."""
    if not resample or volume.problem is None or volume.problem.reason not in RESAMPLED:
        return volume.problem
    try:
        equal_steps(_placement(dataset, volume))
    except AffineError as error:
        return error
    return None


def _placement(dataset: Dataset, volume: _Volume) -> Placement:
    lines = dataset.slices.take(pa.array(volume.ok))
    return place_slices(lines, volume.orientation, stored_size=dataset.spec.size)


def _nifti(dataset: Dataset, volume: _Volume, out: Path) -> _Written:
    import nibabel

    hu = dataset.read(volume.ok)[:, 0]
    planes = np.arange(len(volume.ok), dtype=np.float64)
    affine = volume.affine
    if affine is None:
        placement = _placement(dataset, volume)
        hu, lps = onto_equal_steps(hu, placement)
        affine = to_ras(lps)
        planes = (placement.offsets[:, 2] - placement.offsets[:, 2].min()) / placement.step_mm
    image = nibabel.Nifti1Image(hu.T, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    if _is_orthogonal(affine):
        image.set_qform(affine, code="scanner")
    file = f"{volume.name}.nii.gz"
    write_whole(out / file, gzip.compress(image.to_bytes(), GZIP_LEVEL, mtime=0))
    return _Written(file, affine, planes)


def _is_orthogonal(affine: Affine) -> bool:
    """Return whether a quaternion can say it: a gantry tilt is a shear, which only the sform has."""
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(columns.T @ columns - np.eye(3)).max() < 1e-4)


# --- pictures and arrays ---------------------------------------------------------------------------------------------


def _pngs(dataset: Dataset, volume: _Volume, out: Path) -> _Written:
    from ich_prep.pixels.png import png_bytes

    windows = dataset.spec.windows
    folders = [out / volume.name / _folder_name(window.name, k) for k, window in enumerate(windows)]
    for folder in folders:
        folder.mkdir(parents=True)
    for index, row in enumerate(volume.ok):
        pixels = dataset.read([int(row)])[0]
        for channel, window in enumerate(windows):
            codes = (
                pixels[channel] if dataset.spec.store == "windows" else window_table(window)[pixels[0].view(np.uint16)]
            )
            write_whole(folders[channel] / f"{index:03d}.png", png_bytes(codes))
    return _Written(volume.name, volume.affine, np.arange(len(volume.ok), dtype=np.float64))


def _folder_name(window: str, number: int) -> str:
    """Return the window's name, or a number if a dataset from elsewhere has a name that is not safe as a folder's."""
    return window if re.fullmatch(r"[a-z][a-z0-9_]*", window) else f"window_{number}"


def _npy(dataset: Dataset, volume: _Volume, out: Path) -> _Written:
    file = f"{volume.name}.npy"
    data = io.BytesIO()
    np.save(data, dataset.read(volume.ok))
    write_whole(out / file, data.getvalue())
    return _Written(file, volume.affine, np.arange(len(volume.ok), dtype=np.float64))


# --- tables ----------------------------------------------------------------------------------------------------------


def _write_tables(
    dataset: Dataset,
    out: Path,
    volumes: Sequence[_Volume],
    written: Sequence[_Written],
    predictions: NDArray[np.float32] | None,
) -> None:
    pairs = list(zip(volumes, written, strict=True))
    heading = [
        "file",
        "series_row",
        "series_instance_uid",
        "slices",
        "problem",
        *(f"ras_{i}{j}" for i in range(3) for j in range(4)),
    ]
    lines: list[Iterable[Any]] = []
    for volume, done in pairs:
        numbers = [""] * 12 if done.affine is None else [repr(float(value)) for value in done.affine[:3].ravel()]
        lines.append([done.file, volume.series_row, volume.uid, len(volume.ok), str(volume.problem or ""), *numbers])
    _write_csv(out / "volumes.csv", heading, lines)

    identity = [name for name in IDENTITY if name in dataset.slices.column_names]
    labels, probabilities = [], []
    for volume, done in pairs:
        planes = dict(zip(volume.ok.tolist(), done.planes.tolist(), strict=True))
        taken = dataset.slices.select([*identity, *dataset.classes]).slice(int(volume.rows[0]), len(volume.rows))
        for row, line in zip(volume.rows.tolist(), taken.to_pylist(), strict=True):
            place = [done.file, _plane(planes.get(row))]
            labels.append([*place, *line.values()])
            if predictions is not None and not np.isnan(predictions[row]).all():
                probabilities.append([*place, row, line["sop_instance_uid"], *map(_probability, predictions[row])])
    _write_csv(out / "labels.csv", ["file", "z", *identity, *dataset.classes], labels)
    if predictions is not None:
        names = (f"p_{name}" for name in dataset.classes)
        _write_csv(out / "predictions.csv", ["file", "z", "row", "sop_instance_uid", *names], probabilities)


def _plane(plane: float | None) -> str:
    return "" if plane is None else f"{plane:.4f}".rstrip("0").rstrip(".")


def _probability(value: np.float32) -> str:
    return "" if np.isnan(value) else str(value)


def _write_csv(path: Path, heading: Sequence[str], lines: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(guarded, heading))
    writer.writerows(
        [guarded(value) if isinstance(value, str) and not _is_number(value) else value for value in line]
        for line in lines
    )
    write_whole(path, text.getvalue().encode("utf-8", "surrogatepass"))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
