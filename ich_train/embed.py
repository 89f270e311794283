"""Writes the features of a dataset's slices that a trained network makes before its last layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ich_prep.errors import UsageError
from ich_train.features import Origin, window_texts, write_features
from ich_train.predict import load_predictor
from ich_train.runs import require_writable
from ich_train.scan_network import SequenceNetwork, without_last_layer
from ich_train.scan_predict import embed_rows

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ich_prep.dataset.dataset import Dataset


def embed(
    run: Path, dataset: Dataset, out: Path, *, device: torch.device | str = "cpu", threads: int = 2
) -> tuple[int, int]:
    """Write the features of every row of ``dataset`` by the best network of ``run`` to ``out``; return (rows, features).

    A network with a head gives those of its encoder. Raises `UsageError` for a network without a last fully connected
    layer, one of volumes, or an ``out`` that cannot be written.
    """
    require_writable(out, hint="Name another folder with --out.")
    predictor = load_predictor(run, dataset, device=device)
    meta = predictor.meta
    if meta.head is not None and meta.head.kind == "volume":
        raise UsageError(f"{run} reads volumes: it has no features of slices.")
    if isinstance(predictor.model, SequenceNetwork):
        encoder = predictor.model.encoder
    else:
        model = predictor.model.cpu()  # where it is tried
        encoder, _ = without_last_layer(model, meta.network, channels=meta.channels, size=meta.images.size)
        encoder.to(predictor.device)
    values = embed_rows(predictor, encoder, dataset, threads=threads)
    origin = Origin(
        network=meta.network,
        context=meta.context,
        windows=window_texts(meta.windows),
        dataset_digest=dataset.digest,
        val_fold=meta.val_fold,
        test_fold=meta.test_fold,
    )
    write_features(out, origin, values, encoder)
    return values.shape[0], values.shape[1]
