"""What is predicted: a dataset, or DICOM files that are rendered in memory as a build does, in blocks of whole volumes.

The blocks of a dataset are those of the files it was built from, so that batches are the same; each has at most
``BLOCK_BYTES`` of pixels, unless one volume has more, which bounds the memory for DICOM files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import ROOT
from ich_prep.dataset.spec import Spec, Stored
from ich_prep.errors import UsageError
from ich_prep.recipe import validate
from ich_train.checkpoint import Images, Meta, read_meta
from ich_train.config import SOURCE_OPTIONS
from ich_train.runs import BEST

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.bucket_path import Place
    from ich_prep.dataset.shard_cache import ShardCache
    from ich_prep.scans import PlannedScans
    from ich_train.config import PredictConfig

    Source = Dataset | PlannedScans

BLOCK_BYTES = 1 << 30
QUARANTINE_COLUMNS = ("path", "reason", "detail", "series_instance_uid")


def metas_of(runs: Sequence[Path]) -> list[Meta]:
    """Return the descriptions of the networks of ``runs``; raises ``UsageError`` unless they can be averaged."""
    metas = [read_meta(run / BEST) for run in runs]
    for run, meta in zip(runs, metas, strict=True):
        for what, first, own in (
            ("classes", metas[0].classes, meta.classes),
            ("orientations of images", (metas[0].images.orientation,), (meta.images.orientation,)),
        ):
            if first != own:
                raise UsageError(
                    f"{run} and {runs[0]} cannot be averaged: they were trained on other {what}, {', '.join(own)} and "
                    f"{', '.join(first)}. Predict with each of them."
                )
    return metas


def open_source(meta: Meta, settings: PredictConfig, *, cache: ShardCache | None = None) -> Source:
    """Return the dataset at ``settings.src``, or the scans of the DICOM files there, for networks like ``meta``'s.

    A dataset in an object store is read with the ``cache``, or without one.

    The terminal shows how reading their headers goes. Raises ``DatasetError``, ``SourceError`` or ``UsageError``.
    """
    src = settings.src
    if len(src) == 1 and (src[0].suffix == ".zarr" or (src[0] / ROOT).exists()):
        refuse_source_options(settings, src[0])
        return open_dataset(src[0], cache=cache)
    from ich_prep.progress import TerminalProgress
    from ich_prep.scans import plan_scans  # pydicom and OpenCV: only where DICOM files are read

    options = settings.model_dump(mode="json", include=set(SOURCE_OPTIONS))  # lists, which Spec parses
    spec = validate(Spec, {**dict(stored_as(meta.images)), "classes": meta.classes, **options}, where="options")
    with TerminalProgress() as progress:
        return plan_scans(src, spec, progress=progress)


def refuse_source_options(settings: PredictConfig, path: Place) -> None:
    """Raise ``UsageError`` if ``settings`` say how to read DICOM files, and it is the dataset at ``path`` that is read."""
    given = [f"--{name.replace('_', '-')}" for name in SOURCE_OPTIONS if name in settings.model_fields_set]
    if given:
        raise UsageError(
            f"{', '.join(given)}: for DICOM files only, and {path} is the name of a dataset. Leave "
            f"{'it' if len(given) == 1 else 'them'} out; --where selects slices of a dataset."
        )


def stored_as(images: Images) -> Stored:
    """Return how a build stores ``images``."""
    return Stored(
        size=images.size,
        store=images.pixels,
        windows=images.windows,
        orientation=images.orientation,
        slices_per_shard=1,
    )


def has_subsets(source: Source) -> bool:
    """Return whether the subset test is meant: of DICOM files it may be that nothing says which of them are."""
    return isinstance(source, Dataset) or bool(pc.any(pc.equal(source.slices["subset"], "test")).as_py())


# --- the blocks of a source -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Some whole volumes, adjacent: ``datasets`` by the images that networks read, with equal rows.

    ``rows`` are those of the block; ``first_series`` is to be added to a dataset's ``series_row`` to give the source's.
    """

    datasets: Mapping[str, Dataset]
    rows: NDArray[np.int64]
    first_series: int
    quarantine: list[pa.Table]

    @property
    def first(self) -> Dataset:
        """Any of the datasets: their tables are equal."""
        return next(iter(self.datasets.values()))

    def of(self, meta: Meta) -> Dataset:
        """Return the dataset for the network of ``meta``."""
        return self.datasets.get(meta.images.describe(), self.first)

    def selected(self, where: str | None, subset: str | None) -> NDArray[np.int64]:
        """Return the rows that are to be predicted."""
        rows = self.rows
        if where is not None:
            rows = np.intersect1d(rows, self.first.where(where))
        if subset is not None:
            of_subset = pc.equal(self.first.slices["subset"].take(pa.array(rows)), subset).fill_null(False)
            rows = rows[of_subset.to_numpy(zero_copy_only=False)]
        return rows


def blocks(source: Source, metas: Sequence[Meta], threads: int) -> Iterator[Block]:
    """Yield the blocks of ``source`` for the networks of ``metas``; ``threads`` render DICOM files."""
    images = {meta.images.describe(): meta.images for meta in metas}
    stored = {name: stored_as(one) for name, one in images.items()}
    slice_bytes = sum(one.channels * one.size**2 * one.dtype.itemsize for one in stored.values())
    volumes = _divided(source.series["n_slices"].to_numpy(), slice_bytes)
    if isinstance(source, Dataset):
        series_row = source.slices["series_row"].fill_null(-1).to_numpy()
        for lines in volumes:
            rows = np.flatnonzero((series_row >= lines.start) & (series_row < lines.stop))
            yield Block({"": source}, rows, 0, [])
        return
    from ich_prep.scans import render_scans

    for lines in volumes:
        rendered = {name: render_scans(source, one, lines, threads=threads) for name, one in stored.items()}
        first = next(iter(rendered.values()))
        yield Block(rendered, np.arange(len(first)), lines.start, [first.quarantine.select(QUARANTINE_COLUMNS)])


def _divided(n_slices: NDArray[Any], slice_bytes: int) -> Iterator[range]:
    """Yield ranges of volumes of at most ``BLOCK_BYTES``, or of one volume."""
    start = size = 0
    for number, slices in enumerate(n_slices.tolist()):
        if number > start and (size + slices) * slice_bytes > BLOCK_BYTES:
            yield range(start, number)
            start, size = number, 0
        size += slices
    if len(n_slices):
        yield range(start, len(n_slices))


def first_quarantine(source: Source) -> pa.Table:
    """Return what is left out of ``source`` before a slice is rendered; of a dataset, all that is."""
    if not isinstance(source, Dataset):
        return source.quarantine.select(QUARANTINE_COLUMNS)
    table = source.read_table("quarantine")
    series = source.slices["series_instance_uid"].take(table["row"])
    return table.append_column("series_instance_uid", series).select(QUARANTINE_COLUMNS)
