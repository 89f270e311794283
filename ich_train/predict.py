"""A trained network's probabilities for rows of a dataset, and the competition's submission file made of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import csv
from torch import nn

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.schema import OK
from ich_prep.dataset.windows import Window
from ich_prep.errors import UsageError
from ich_train.augment import Preprocess
from ich_train.checkpoint import load_model
from ich_train.data import SliceLoader, on_device
from ich_train.ranks import own_stream
from ich_train.runs import BEST
from ich_train.split import label_matrix, split_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictor:
    """A trained network, the preprocessing that it was trained with, and what ``meta.json`` says of it."""

    model: nn.Module
    preprocess: Preprocess
    meta: dict[str, Any]
    device: torch.device


def load_predictor(run: Path, dataset: Dataset, *, device: torch.device | str) -> Predictor:
    """Return the best network of the folder ``run``, ready for the slices of ``dataset``.

    Raises `TrainError` where the run has none, and `UsageError` where the dataset's images are not of the kind that the
    network was trained on.
    """
    loaded = load_model(run / BEST, device)
    windows = tuple(Window(**window) for window in loaded.meta["windows"])
    spec = dataset.spec
    expected = _kind(loaded.meta["store"], loaded.meta["size"], windows)
    found = _kind(spec.store, spec.size, tuple(spec.windows))
    if expected != found:
        raise UsageError(
            f"Expected a dataset of {expected}, which {run} was trained on; found {found} in {dataset.path}. Name "
            "another with --data, or build one with the recipe of the run's dataset."
        )
    preprocess = Preprocess(store=spec.store, windows=windows).to(device)
    return Predictor(loaded.model, preprocess, loaded.meta, torch.device(device))


def predict_rows(
    model: nn.Module,
    preprocess: nn.Module,
    dataset: Dataset,
    rows: NDArray[np.int64],
    *,
    context: int,
    batch_size: int = 64,
    threads: int = 2,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Return the probabilities of the six labels, (n, 6) float32, for ``rows`` (n,), in their order.

    Computed in float32. ``model`` must be in evaluation mode and on ``device``, as ``preprocess`` must.
    """
    # Neighbours in the dataset are neighbours on the disk: they are read in that order, whatever the order asked for.
    order = np.argsort(rows, kind="stable")
    device = torch.device(device)
    loader = SliceLoader(
        dataset,
        rows[order],
        batch_size=batch_size,
        order="sequential",
        threads=threads,
        context=context,
        pin=device.type == "cuda",
    )
    probabilities = np.empty((len(rows), len(RSNA_CLASSES)), np.float32)
    with torch.inference_mode(), own_stream(device):
        found = [torch.sigmoid(model(preprocess(batch.images)).float()) for batch in on_device(loader, device)]
        if found:
            probabilities[order] = torch.cat(found).cpu().numpy()
    return probabilities


def write_submission(
    run: Path,
    dataset: Dataset,
    out: Path,
    *,
    sample: Path | None = None,
    device: torch.device | str = "cpu",
    threads: int = 2,
    batch_size: int = 64,
) -> int:
    """Write the probabilities of the test subset to ``out`` as the competition wants them; return the lines written.

    The lines are ``ID,Label`` with IDs of the form ``<sop_instance_uid>_<class>``: those of the file ``sample`` in its
    order, or without it six for each row of the subset, in the order of the label file and then of the dataset. A slice
    without an image that can be used gets the training slices' share of each label and is counted in a warning, to this
    module's logger. Raises `UsageError` where the dataset has no test subset or ``sample`` is not such a file.
    """
    predictor = load_predictor(run, dataset, device=device)
    slices = dataset.slices
    test = np.flatnonzero(pc.equal(slices["subset"], "test").to_numpy())
    if not len(test):
        raise UsageError(
            f"Expected slices of the subset test in {dataset.path}; found none. Build from a tree that holds the "
            "competition's test files."
        )
    usable = test[pc.equal(slices["status"], OK).to_numpy()[test]]
    slice_ids, classes = _ids_in(sample) if sample is not None else _ids_of(dataset, test)
    # One line more than there are usable slices: for those without an image, found at index -1.
    place = pc.fill_null(pc.index_in(slice_ids, slices["sop_instance_uid"].take(pa.array(usable))), -1).to_numpy()
    missing = len(pc.unique(slice_ids.filter(pa.array(place < 0))))
    shares = _training_shares(dataset, predictor.meta) if missing else np.zeros(len(RSNA_CLASSES), np.float32)
    out.parent.mkdir(parents=True, exist_ok=True)

    probabilities = predict_rows(
        predictor.model,
        predictor.preprocess,
        dataset,
        usable,
        context=predictor.meta["context"],
        batch_size=batch_size,
        threads=threads,
        device=device,
    )
    values = np.vstack([probabilities, shares])[place, classes]
    if missing:
        logger.warning(
            "%d of %d slices have no usable image in the test subset: their lines give each label's share of the "
            "training slices.",
            missing,
            len(pc.unique(slice_ids)),
        )

    new = out.with_name(f"{out.name}.tmp")
    with new.open("w", encoding="utf-8", newline="\n") as file:
        file.write("ID,Label\n")
        names = np.array(RSNA_CLASSES)[classes]
        # Nine digits are what a float32 needs to read back as the same number.
        file.writelines(
            f"{slice_id}_{name},{value:.9g}\n"
            for slice_id, name, value in zip(slice_ids.to_pylist(), names, values.tolist(), strict=True)
        )
    new.replace(out)
    return len(values)


def _kind(store: str, size: int, windows: tuple[Window, ...]) -> str:
    """Return in words what sort of images a dataset holds; an HU store fits whatever windows a network computes."""
    if store == "hu":
        return f"HU at {size} x {size}"
    shown = ", ".join(f"{window.name} {window.center:g}/{window.width:g}" for window in windows)
    return f"windows {shown} at {size} x {size}"


def _ids_of(dataset: Dataset, rows: NDArray[np.int64]) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return slice and class of each line for ``rows``, six lines a slice, in the order of the label file."""
    line = pc.fill_null(dataset.slices["label_line"].take(pa.array(rows)), np.iinfo(np.int64).max).to_numpy()
    ordered = rows[np.argsort(line, kind="stable")]
    slice_ids = (
        dataset.slices["sop_instance_uid"].take(pa.array(np.repeat(ordered, len(RSNA_CLASSES)))).combine_chunks()
    )
    return slice_ids, np.tile(np.arange(len(RSNA_CLASSES)), len(rows))


def _ids_in(sample: Path) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return slice and class of each line of a sample submission; raises `UsageError` where it is none."""
    wanted = "Expected a sample submission with the columns ID,Label and lines such as ID_0123abcde_any,0.5"
    try:
        table = csv.read_csv(sample, convert_options=csv.ConvertOptions(column_types={"ID": pa.string()}))
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{wanted}; {sample} does not read: {error}.") from error
    if table.column_names != ["ID", "Label"] or not len(table):
        raise UsageError(f"{wanted}; {sample} has {len(table)} lines of {', '.join(table.column_names)}.")
    ids = table["ID"].combine_chunks()
    parts = pc.extract_regex(ids, f"(?s)^(?P<slice>.+)_(?P<class>{'|'.join(RSNA_CLASSES)})$")
    if parts.null_count:
        first = ids[pc.index(pc.is_null(parts), True).as_py()]
        raise UsageError(f"{wanted}; {sample} has {parts.null_count} lines of other names, the first {first!s}.")
    classes = pc.index_in(parts.field("class"), pa.array(RSNA_CLASSES)).to_numpy().astype(np.int64)
    return parts.field("slice"), classes


def _training_shares(dataset: Dataset, meta: dict[str, Any]) -> NDArray[np.float32]:
    """Return the share of positives of each label among the training slices, (6,), 0 where none is known."""
    split = split_rows(dataset, **meta["split"], allow_series_labels=True)
    labels = label_matrix(dataset, split.train)
    known = (labels >= 0).sum(axis=0)
    shares: NDArray[np.float32] = ((labels > 0).sum(axis=0) / np.maximum(known, 1)).astype(np.float32)
    return shares
