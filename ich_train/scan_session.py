"""The parts of a run that reads whole scans, made from its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ich_prep.errors import UsageError, count
from ich_train.resample import Resample
from ich_train.scan_network import HeadShape
from ich_train.scan_step import ScanStep
from ich_train.scans import scan_labels, scans_of, without_position
from ich_train.split import balanced_weights
from ich_train.volume_loader import AIR, VolumeLoader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset
    from ich_train.config import TrainConfig
    from ich_train.ranks import Ranks
    from ich_train.split import Split
    from ich_train.volume_loader import Rows


NO_FEATURES = ("none", "volume")  # heads that read no features of slices


def head_shape(settings: TrainConfig) -> HeadShape | None:
    """Return the head of a run with these ``settings``, None if it sees slices.

    Raises `UsageError` for settings of scans that do not go together.
    """
    volume, resampled = settings.head == "volume", settings.spacing_mm > 0
    for wrong, text in (
        (settings.features and settings.head in NO_FEATURES, "features need a head of gru, lstm, transformer or attention"),
        (resampled and settings.head not in NO_FEATURES, 'spacing_mm is for head = "volume" only'),
        ((settings.depth_mm or settings.isotropic) and not resampled, "depth_mm and isotropic need spacing_mm"),
        (volume and settings.context, 'context is for slices: with head = "volume" it must be 0'),
        (volume and not settings.scan_weight, 'with head = "volume" scan_weight must be above 0'),
        (settings.compile and settings.head != "none", "compile is for slices: with a head every batch has another shape"),
    ):  # fmt: skip
        if wrong:
            raise UsageError(f"These settings of [train] do not go together: {text}.")
    if settings.head == "none":
        return None
    return HeadShape(
        kind=settings.head,
        size=settings.head_size,
        layers=settings.head_layers,
        spacing_mm=settings.spacing_mm,
        depth_mm=settings.depth_mm,
        isotropic=settings.isotropic,
    )


def resample_of(shape: HeadShape, store: str) -> Resample | None:
    """Return what brings scans of a dataset that stores ``store`` to the grid of ``shape``, None if nothing does."""
    if not shape.spacing_mm:
        return None
    return Resample(spacing_mm=shape.spacing_mm, depth_mm=shape.depth_mm, isotropic=shape.isotropic, air=AIR[store])


def scan_loaders(
    dataset: Dataset, split: Split, settings: TrainConfig, ranks: Ranks, *, source: Rows | None
) -> tuple[VolumeLoader, VolumeLoader | None]:
    """Return the loaders of training and validation: whole series of the ``split``, or their features from ``source``.

    Only the labels of the rows of the ``split`` count. Raises `UsageError` if there are too few scans, if slabs are cut
    from scans that are labelled as a whole, or if no label is left to learn from.
    """
    train, val = (series_of(dataset, rows) for rows in (split.train, split.val))
    if len(train) < settings.scans_per_batch * ranks.world_size:
        if len(without_position(dataset, split.train)) == len(split.train):
            raise UsageError(
                "No slice to train on has a position, so there are no scans to read. Train without a head."
            )
        raise UsageError(
            f"Expected at least one batch of {count(settings.scans_per_batch, 'scan')} for each of "
            f"{count(ranks.world_size, 'process', 'processes')}; found {count(len(train), 'scan')} to train on. Lower "
            "scans_per_batch."
        )
    if settings.val_fold != "none" and len(val) < ranks.world_size:
        raise UsageError(
            f"Expected at least one scan to validate for each of {count(ranks.world_size, 'process', 'processes')}; "
            f"found {len(val)}. Start fewer processes."
        )
    shared: dict[str, Any] = {
        "batch_size": settings.scans_per_batch,
        "threads": settings.threads,
        "pin": ranks.device.type == "cuda",
        "source": source,
    }
    weights = None
    if settings.sampling == "balanced":
        weights = balanced_weights(scan_labels(dataset, scans_of(dataset, train), split.train))
    loader = VolumeLoader(
        dataset,
        train,
        order=settings.order,
        seed=settings.seed,
        slab=settings.slab,
        weights=weights,
        rows=split.train,
        rank=ranks.rank,
        world_size=ranks.world_size,
        drop_last=True,
        **shared,
    )
    if loader.cuts_scans and not loader.has_slice_labels:
        raise UsageError(
            f"The labels are those of whole scans, which say nothing of a slab of {count(settings.slab, 'slice')}. Set slab "
            "= 0; to save memory, lower scans_per_batch."
        )
    _require_labels(loader, "train on", settings)
    if not len(val):
        return loader, None
    if settings.head == "volume" and not settings.depth_mm:
        shared["batch_size"] = 1  # as in predictions: no padding to the longer of two
    val_loader = VolumeLoader(
        dataset, val[ranks.rank :: ranks.world_size], order="sequential", rows=split.val, **shared
    )
    _require_labels(val_loader, "validate", settings)
    return loader, val_loader


def _require_labels(loader: VolumeLoader, part: str, settings: TrainConfig) -> None:
    if loader.has_scan_labels or (loader.has_slice_labels and settings.head != "volume"):
        return
    filtered = f", and the filter {settings.where!r} selects some slices only" if settings.where else ""
    raise UsageError(
        f"No label is known of any scan to {part}: it needs those of all its slices{filtered}. Select whole series."
    )


def scan_step(settings: TrainConfig, loader: VolumeLoader, parts: dict[str, Any]) -> ScanStep:
    """Return the step of a run on scans, of the ``parts`` of every `ich_train.step.Step`."""
    shape = head_shape(settings)
    assert shape is not None
    return ScanStep(
        **parts,
        context=settings.context,
        scan_weight=settings.scan_weight,
        volumes=shape.kind == "volume",
        resample=resample_of(shape, loader.dataset.spec.store),
        by_slice=shape.kind != "volume" and loader.has_slice_labels,
    )


def series_of(dataset: Dataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the series_row of the series that ``rows`` belong to and that can be read as scans, ascending."""
    series = np.unique(dataset.slices["series_row"].take(pa.array(rows)).to_numpy().astype(np.int64))
    readable = dataset.is_ok & dataset.slices["position_mm"].is_valid().to_numpy()
    with_rows = np.unique(dataset.slices["series_row"].filter(pa.array(readable)).to_numpy().astype(np.int64))
    found: NDArray[np.int64] = np.intersect1d(series, with_rows)
    return found
