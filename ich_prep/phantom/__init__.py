"""A synthetic head CT cohort: DICOM files generated from a seed, with known defects on request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ich_prep.dataset.storage import filling, naming
from ich_prep.errors import UsageError
from ich_prep.phantom.defects import KNOWN_DEFECTS, damaged_files
from ich_prep.phantom.series import Place, place
from ich_prep.phantom.trees import SECOND_SERIES, Listed, series_files, write_labels

LAYOUTS = ("rsna", "cq500", "folder")

# Every known defect that `synthesize(defects=True)` adds, with a sentence that describes it.
DEFECTS: dict[str, str] = {name: defect.sentence for name, defect in KNOWN_DEFECTS.items()}


@dataclass(frozen=True)
class PhantomSummary:
    """What was written: series and slices of the clean cohort, all files with labels and defects, names of defects."""

    series: int
    slices: int
    files: int
    defects: tuple[str, ...]


@dataclass(frozen=True)
class _Cohort:
    out: str
    seed: int
    size: int
    layout: str
    hard: bool

    def place(self, index: int) -> Place:
        return place(self.seed, index, second_series=SECOND_SERIES[self.layout], hard=self.hard)


def synthesize(
    out: Path,
    *,
    series: int,
    seed: int = 0,
    size: int = 512,
    layout: str = "rsna",
    defects: bool = False,
    hard: bool = False,
    workers: int = 0,
) -> PhantomSummary:
    """Write a tree of DICOM head CT slices with their label files into ``out`` and return what was written.

    ``series`` volumes of 16-60 slices, each (size, size) with stored values of 12 or 16 bits. A slice is labelled with
    a kind of bleed when at least ``bleeds.MIN_AREA_MM2`` mm2 of it was painted. ``layout`` is one of LAYOUTS.
    ``defects`` adds those DEFECTS that the layout supports. ``hard`` draws the cohort of `ich_prep.phantom.hard`: thick,
    noisy slices with faint bleeds across several of them, and with mimics. Equal arguments write equal bytes, with any
    number of ``workers`` (processes; 0: this one). Raises ``UsageError`` for invalid values and an ``out`` that is not
    empty.
    """
    _refuse(out, series=series, seed=seed, size=size, layout=layout)
    with filling(out):
        cohort = _Cohort(out=str(out), seed=seed, size=size, layout=layout, hard=hard)
        return _synthesize(out, cohort, series=series, defects=defects, workers=workers)


def _synthesize(out: Path, cohort: _Cohort, *, series: int, defects: bool, workers: int) -> PhantomSummary:
    layout, seed = cohort.layout, cohort.seed
    listed = [line for lines in _written(cohort, series, workers) for line in lines]
    slices = files = len(listed)
    places = [cohort.place(index) for index in range(series)]
    names: list[str] = []
    if defects:
        for damage in damaged_files(layout, seed, size=cohort.size):
            names.append(damage.defect)
            listed += damage.listed
            if damage.listed:  # CQ500's readers vote only on series with readable files
                places.append(damage.place)
            for path, content in damage.files:
                _write(out, path, content)
                files += 1
    files += write_labels(layout, out, seed, places, listed)
    return PhantomSummary(series=series, slices=slices, files=files, defects=tuple(names))


def _refuse(out: Path, *, series: int, seed: int, size: int, layout: str) -> None:
    if layout not in LAYOUTS:
        raise UsageError(f"Expected a layout of {', '.join(LAYOUTS)}; got {layout!r}.")
    if series < 1:
        raise UsageError(f"Expected at least 1 series; got {series}.")
    if seed < 0:
        raise UsageError(f"Expected a seed of 0 or more; got {seed}.")
    if not 32 <= size <= 1024:
        raise UsageError(f"Expected a size of 32 to 1024 pixels; got {size}. CT slices have 512.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} must be a new or an empty folder; it has contents. Remove it, or give another folder.")


def _written(cohort: _Cohort, series: int, workers: int) -> Iterator[tuple[Listed, ...]]:
    """Yield what the label files say about each series, in the order of the series."""
    from ich_prep.execute import run

    done = dict(run(partial(_write_series, cohort), range(series), workers=workers))
    for index in range(series):
        yield done[index]


def _write_series(cohort: _Cohort, index: int) -> tuple[Listed, ...]:
    where = cohort.place(index)
    listed = []
    for file in series_files(cohort.layout, cohort.seed, where, size=cohort.size):
        _write(Path(cohort.out), file.path, file.content())
        listed.append(file.listed)
    return tuple(listed)


def _write(out: Path, path: str, content: bytes) -> None:
    target = out / path
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
