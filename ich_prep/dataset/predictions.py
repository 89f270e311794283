"""The predictions of a training run for the rows of a dataset, read from its ``predictions.parquet``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.tables import read_parquet
from ich_prep.errors import DatasetError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset

PREDICTIONS = "predictions.parquet"


def read_predictions(run: Path, dataset: Dataset) -> NDArray[np.float32]:
    """Return the probabilities that the run in the folder ``run`` gave, (rows, classes) float32, NaN where there are none.

    Raises ``UsageError`` if the run has no predictions, or they are of other slices or classes than those of ``dataset``.
    """
    path = run / PREDICTIONS
    if not path.is_file():
        raise UsageError(f"There is no {PREDICTIONS} in {run}. Write it with `ich-train eval {run}`.")
    columns = {"row": pa.int64(), "sop_instance_uid": pa.string()} | {f"p_{n}": pa.float32() for n in dataset.classes}
    again = f"Write it again with `ich-train eval {run}`."
    try:
        table = read_parquet(path)
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise UsageError(
                f"{path} lacks the columns {', '.join(missing)}: it is of other classes than {dataset.path}."
            )
        table = table.select([*columns]).cast(pa.schema(columns.items()))
        table.validate(full=True)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read: {error}. {again}") from None
    rows = table["row"].fill_null(-1).to_numpy()
    if len(rows) and not (rows.min() >= 0 and rows.max() < len(dataset) and _same_slices(dataset, rows, table)):
        raise UsageError(
            f"{path} is of other slices than {dataset.path}. Name the dataset that the run was evaluated on, or evaluate "
            f"the run on this one: ich-train eval {run} --data {dataset.path} --subset all --out FOLDER."
        )
    predictions = np.full((len(dataset), len(dataset.classes)), np.nan, np.float32)
    for j, name in enumerate(dataset.classes):
        predictions[rows, j] = table[f"p_{name}"].fill_null(float("nan")).to_numpy()
    return predictions


def _same_slices(dataset: Dataset, rows: NDArray[np.int64], table: pa.Table) -> bool:
    here = dataset.slices["sop_instance_uid"].take(pa.array(rows))
    same = pc.equal(here, table["sop_instance_uid"])
    return not same.null_count and bool(pc.all(same).as_py())
