"""Flipped bits in the files of a dataset: verify reports each, every reader refuses it or gives what was written."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ich_prep.dataset.dataset import open_dataset
from ich_prep.errors import IchError
from ich_prep.progress import NoProgress
from ich_prep.verify import verify
from ich_train.loader import SliceLoader
from ich_train.split import split_rows

KEPT = Path(__file__).parents[1] / "contract"


def slices_in_batches(path: Path) -> list[Any]:
    """Return what a training on slices gets."""
    batches = SliceLoader(path, batch_size=8, order="shuffled", seed=3)
    return [tensor.numpy().copy() for batch in batches for tensor in batch]


def tables(path: Path) -> list[Any]:
    """Return what an evaluation reads, and a view of the tables."""
    with open_dataset(path) as dataset:
        parts = split_rows(dataset, val_fold=0, test_fold=1, allow_series_labels=True, needed=())
        labels = [dataset.labels[rows] for rows in (parts.train, parts.val, parts.test)]
        return [dataset.slices, dataset.series, dataset.is_ok, parts.train, parts.val, parts.test, *labels]


READERS: dict[str, Callable[[Path], list[Any]]] = {"slices": slices_in_batches, "tables": tables}


def results(path: Path) -> dict[str, list[Any] | None]:
    """Return what each reader gets, None where it refuses: in one message of ours, or the test fails."""
    found: dict[str, list[Any] | None] = {}
    for name, read in READERS.items():
        try:
            found[name] = read(path)
        except IchError as error:
            assert 10 < len(str(error)) < 2000
            found[name] = None
    return found


def same(one: Any, other: Any) -> bool:
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else bool(one.equals(other))


@pytest.mark.parametrize("flips", [60, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
@pytest.mark.parametrize("name", ["windows", "hu"])
def test_any_flipped_bit_of_a_dataset(name: str, flips: int, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    copy = Path(shutil.copytree(KEPT / f"{name}.zarr", tmp_path / "data.zarr"))
    files = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    whole = results(copy)
    assert all(whole.values()) and not verify(copy, progress=NoProgress()).problems
    refusals = 0
    for number in range(flips):
        file = rng.choice(files)
        data = file.read_bytes()
        bit = rng.randrange(8 * len(data))
        context = (file.name, bit, number, seed)
        file.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        found = results(copy)
        for reader, expected in whole.items():
            got = found[reader]
            refusals += got is None
            assert got is None or all(map(same, got, expected or [])), (reader, *context)
        try:
            assert verify(copy, progress=NoProgress()).problems, context
        except IchError as error:
            assert str(copy) in str(error), context
        file.write_bytes(data)
    assert refusals > flips / 10
