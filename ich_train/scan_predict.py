"""A trained network's probabilities for slices and scans, whichever of the two it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from ich_train.predict import Predictor, predict_rows
from ich_train.ranks import own_stream
from ich_train.scan_inputs import select_planes, select_slices
from ich_train.scan_network import SequenceNetwork
from ich_train.scan_session import resample_of
from ich_train.to_device import to_device
from ich_train.volume_loader import VolumeLoader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset

SCANS_PER_BATCH = 2


@dataclass(frozen=True)
class ScanProbabilities:
    """Probabilities by slice, (n, classes) for n ``rows``, and by scan, (m, classes) for m ``series``."""

    rows: NDArray[np.int64]  # ascending
    slices: NDArray[np.float32]
    series: NDArray[np.int64]  # series_row, ascending
    scans: NDArray[np.float32]

    def of_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the probabilities of ``rows``, which must be among those predicted."""
        return self.slices[np.searchsorted(self.rows, rows)]


def predict_scans(
    predictor: Predictor, dataset: Dataset, series: NDArray[np.int64], *, threads: int = 2
) -> ScanProbabilities:
    """Return the probabilities of the volumes ``series`` by a network with a head, from all of their slices with pixels.

    A slice without a position is read where the dataset has it, after the others. What a scan gets does not depend on
    the others.
    """
    meta, device = predictor.meta, predictor.device
    assert meta.head is not None
    loader = VolumeLoader(
        dataset,
        series,
        # Padding to the longer of two would change what a network of volumes answers.
        batch_size=1 if meta.head.kind == "volume" and not meta.head.depth_mm else SCANS_PER_BATCH,
        order="sequential",
        threads=threads,
        pin=device.type == "cuda",
        ordered=False,
    )
    resample = resample_of(meta.head, dataset.spec.store)
    slices, scans, rows = [], [], []
    with torch.inference_mode(), own_stream(device):
        for batch in to_device(loader, device):
            if meta.head.kind == "volume":
                taken = select_planes(batch.volumes, batch.mask, batch.positions_mm, batch.spacing_mm, resample)
            else:
                taken = select_slices(batch.volumes, batch.rows, context=meta.context)
            logits = predictor.model(predictor.preprocess(taken.slices), taken.lengths)
            real = batch.rows >= 0
            of_scans = torch.sigmoid(logits.scans.float())
            of_slices = torch.sigmoid(logits.slices.float())
            if meta.head.kind == "volume":
                of_slices = of_scans.repeat_interleave(real.sum(dim=1).to(device), dim=0)
            slices.append(of_slices)
            scans.append(of_scans)
            rows.append(batch.rows[real].numpy())
    return ScanProbabilities(
        np.concatenate(rows), torch.cat(slices).cpu().numpy(), loader.scans.series, torch.cat(scans).cpu().numpy()
    )


def predict_slices(
    predictor: Predictor, dataset: Dataset, rows: NDArray[np.int64], *, batch_size: int = 64, threads: int = 2
) -> NDArray[np.float32]:
    """Return the probabilities of ``rows`` (n,), (n, classes) float32, in their order; ``rows`` may be empty.

    A network with a head reads the whole scans that the rows belong to.
    """
    if predictor.meta.head is not None and len(rows):
        return predict_scans(predictor, dataset, series_rows(dataset, rows), threads=threads).of_rows(rows)
    return predict_rows(
        predictor.model,
        predictor.preprocess,
        dataset,
        rows,
        context=predictor.meta.context,
        batch_size=batch_size,
        threads=threads,
        device=predictor.device,
    )


def series_rows(dataset: Dataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the series_row of the series that ``rows`` belong to, ascending."""
    found: NDArray[np.int64] = np.unique(dataset.slices["series_row"].take(pa.array(rows)).to_numpy().astype(np.int64))
    return found


def embed_rows(
    predictor: Predictor, encoder: torch.nn.Module, dataset: Dataset, *, threads: int = 2
) -> NDArray[np.float32]:
    """Return the features that ``encoder`` makes of every row of ``dataset``, (rows, features), NaN without pixels."""
    device, context = predictor.device, predictor.meta.context
    usable = np.flatnonzero(dataset.is_ok)
    loader = VolumeLoader(
        dataset,
        series_rows(dataset, usable),
        batch_size=SCANS_PER_BATCH,
        order="sequential",
        threads=threads,
        pin=device.type == "cuda",
        ordered=False,
    )
    network = SequenceNetwork(encoder, torch.nn.Identity())  # type: ignore[arg-type]  # only its encoder is used
    values = None
    with torch.inference_mode(), own_stream(device):
        for batch in to_device(loader, device):
            taken = select_slices(batch.volumes, batch.rows, context=context)
            found = network.encode(predictor.preprocess(taken.slices)).float().cpu().numpy()
            if values is None:
                values = np.full((len(dataset), found.shape[1]), np.nan, np.float32)
            values[batch.rows[batch.rows >= 0].numpy()] = found
    assert values is not None  # a dataset has slices with pixels
    return values
