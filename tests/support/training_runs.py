"""Untrained runs, and datasets with other classes than RSNA's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import digest_of
from ich_prep.dataset.tables import write_table
from ich_train.checkpoint import Images, Meta, save_checkpoint
from ich_train.model import build_model
from tests.support.sealing import reseal, rewrite_root


def meta_for(dataset: Dataset, *, context: int = 0, network: str = "baseline") -> Meta:
    """The ``meta.json`` of a network for ``dataset``."""
    return Meta(
        network=network,
        channels=len(dataset.spec.windows) * (2 * context + 1),
        classes=dataset.classes,
        images=Images.of(dataset),
        context=context,
        windows=dataset.spec.windows,
        dataset_digest=dataset.digest,
        val_fold=0,
        test_fold=1,
        epoch=2,
        val_loss=0.4,
    )


def save_untrained(run: Path, dataset: Dataset, *, context: int = 0) -> Path:
    """Save a network with its initial weights as the best of ``run``."""
    torch.manual_seed(0)
    meta = meta_for(dataset, context=context)
    model = build_model("baseline", channels=meta.channels, size=meta.images.size, classes=len(meta.classes))
    save_checkpoint(run / "best", model, meta)
    return run


def rewrite_meta(run: Path, change: Callable[[dict[str, Any]], object], *, checkpoint: str = "best") -> None:
    """Apply ``change`` to the ``meta.json`` of a ``checkpoint`` of ``run``, and compute its digest again."""
    file = run / checkpoint / "meta.json"
    values = json.loads(file.read_bytes())
    change(values)
    file.write_text(json.dumps(values | {"digest": digest_of(values)}))


def with_classes(source: Path, copy: Path, classes: tuple[str, ...]) -> Dataset:
    """A copy of a dataset whose label columns are those of its first classes under other names.

    ``any``, if it is one of them, stays what it was.
    """
    shutil.copytree(source, copy)
    dataset = open_dataset(source)
    subtypes = iter(RSNA_CLASSES[1:])
    chosen = {name: name if name in RSNA_CLASSES else next(subtypes) for name in classes}
    for table_name, table in (("slices", dataset.slices), ("series", dataset.series)):
        values = {name: table[original] for name, original in chosen.items()}
        place = table.schema.get_field_index(RSNA_CLASSES[0])
        kept = table.drop_columns([*RSNA_CLASSES])
        for number, (name, column) in enumerate(values.items()):
            kept = kept.add_column(place + number, pa.field(name, pa.int8()), column)
        write_table(copy / "labels" / f"{table_name}.parquet", kept)
    rewrite_root(copy, lambda ich: ich.update(classes=list(classes)))
    reseal(copy)
    opened = open_dataset(copy)
    assert np.array_equal(opened.labels, dataset.labels[:, [RSNA_CLASSES.index(name) for name in chosen.values()]])
    return opened
