"""Features of every slice of a dataset, made once by a trained network, on which a head is trained in minutes.

::

    features.zarr/             a Zarr v3 array (row, feature) float32, uncompressed, NaN for rows without pixels
        zarr.json              its attribute ``ich_features``: the network, the dataset, and how the slices were made
        c/<k>/0                rows k x 4096 and on
        encoder.safetensors    the network without its last layer
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ich_prep.dataset.storage import write_whole
from ich_prep.errors import UsageError, describe_os_error
from ich_prep.files import read_regular
from ich_train.config import Fold
from ich_train.weights import load_exactly, tensor_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import nn

    from ich_prep.dataset.dataset import Dataset
    from ich_prep.dataset.windows import Window
    from ich_train.config import TrainConfig

ROWS_PER_CHUNK = 4096
ROOT, ENCODER, KEY = "zarr.json", "encoder.safetensors", "ich_features"


class Origin(BaseModel):
    """Where features come from: the network, and what it saw of which dataset."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    network: str
    context: int
    windows: tuple[str, ...]  # as text, such as brain=40/80
    dataset_digest: str
    val_fold: Fold
    test_fold: Fold


@dataclass(frozen=True)
class Features:
    """Features of the rows of a dataset: ``values`` (rows, features) float32."""

    path: Path
    origin: Origin
    values: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, features)."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32."""
        return self.values.dtype

    def read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> NDArray[Any]:
        """Fill ``out``, (len(rows), features), with the features of ``rows``."""
        return np.take(self.values, rows, axis=0, out=out, mode="clip")

    def load_encoder(self, encoder: nn.Module) -> None:
        """Fill ``encoder`` with the weights that made the features, which are not to be trained."""
        load_exactly(encoder, self.path / ENCODER)
        encoder.requires_grad_(False)


def window_texts(windows: Sequence[Window]) -> tuple[str, ...]:
    """Return windows as text, such as brain=40/80."""
    return tuple(f"{window.name}={window.center:g}/{window.width:g}" for window in windows)


def write_features(path: Path, origin: Origin, values: NDArray[np.float32], encoder: nn.Module) -> None:
    """Write ``values`` (rows, features) float32 and the ``encoder`` that made them to the folder ``path``.

    Raises `UsageError` if ``path`` exists and is not a folder of features.
    """
    if path.exists() and any(path.iterdir() if path.is_dir() else [path]) and not (path / ENCODER).is_file():
        raise UsageError(f"{path} exists and holds no features. Name another folder with --out.")
    rows, features = values.shape
    (path / "c").mkdir(parents=True, exist_ok=True)
    (path / ROOT).unlink(missing_ok=True)  # of features that are replaced; written last
    write_whole(path / ENCODER, tensor_bytes(encoder.state_dict()))  # first: it marks the folder as one of features
    for chunk in range(-(-rows // ROWS_PER_CHUNK)):
        part = np.full((ROWS_PER_CHUNK, features), np.nan, "<f4")
        given = values[chunk * ROWS_PER_CHUNK : (chunk + 1) * ROWS_PER_CHUNK]
        part[: len(given)] = given
        (path / "c" / str(chunk)).mkdir(exist_ok=True)
        write_whole(path / "c" / str(chunk) / "0", part.tobytes())
    root = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows, features],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [ROWS_PER_CHUNK, features]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN",
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "dimension_names": ["row", "feature"],
        "attributes": {KEY: origin.model_dump(mode="json")},
    }
    write_whole(path / ROOT, json.dumps(root, indent=1).encode())


def read_features(path: Path) -> Features:
    """Return the features in the folder ``path``; raises `UsageError` if it holds none, or they are damaged."""
    try:
        root = json.loads(read_regular(path / ROOT))
        origin = Origin.model_validate(root["attributes"][KEY])
        values = _read_values(path, root["shape"])
    except OSError as error:
        raise UsageError(
            f"Cannot read features from {path}: {describe_os_error(error)}. Make them with `ich-train embed`."
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        raise UsageError(
            f"{path} holds no features of ich-train embed, or they are damaged. Make them again with `ich-train embed`."
        ) from error
    return Features(path, origin, values)


def _read_values(path: Path, shape: Any) -> NDArray[np.float32]:
    """Return the values of the chunks, all of which must be there in full before any memory is allocated."""
    rows, features = shape
    if not (isinstance(rows, int) and isinstance(features, int) and rows > 0 and features > 0):
        raise ValueError(f"the shape is {shape}")
    count = -(-rows // ROWS_PER_CHUNK)
    if count > len(os.listdir(path / "c")):
        raise ValueError("chunks are missing")
    chunks = [path / "c" / str(number) / "0" for number in range(count)]
    if {chunk.stat().st_size for chunk in chunks} != {ROWS_PER_CHUNK * features * 4}:
        raise ValueError("a chunk has another size than the shape says")
    values = np.empty((rows, features), np.float32)
    for number, chunk in enumerate(chunks):
        part = np.frombuffer(read_regular(chunk), "<f4").reshape(ROWS_PER_CHUNK, features)
        values[number * ROWS_PER_CHUNK : (number + 1) * ROWS_PER_CHUNK] = part[: rows - number * ROWS_PER_CHUNK]
    return values


def open_features(path: Path, dataset: Dataset, settings: TrainConfig, windows: Sequence[Window]) -> Features:
    """Return the features in the folder ``path`` for a run with ``settings`` on ``dataset``.

    Raises `UsageError` if they are of another dataset, network or input than the settings say, if the network was
    trained on the part that the run validates or tests on, or if they cannot be read.
    """
    features = read_features(path)
    origin = features.origin
    for what, made, wanted in (
        ("dataset", origin.dataset_digest, dataset.digest),
        ("model", origin.network, settings.model),
        ("context", origin.context, settings.context),
        ("windows", ", ".join(origin.windows), ", ".join(window_texts(windows))),
        ("test_fold", origin.test_fold, settings.test_fold),
        ("val_fold", origin.val_fold, settings.val_fold),
    ):
        if made != wanted:
            raise UsageError(
                f"The features in {path} were made with {what} {made}; this run has {wanted}. Set it as the run that made "
                "them had it, or make other features with `ich-train embed`."
            )
    return features
