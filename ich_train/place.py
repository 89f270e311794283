"""Which dataset a command reads, where it is, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ich_prep.errors import DatasetError
from ich_prep.files import is_url
from ich_prep.recipe import validate
from ich_train.config import TrainConfig

if TYPE_CHECKING:
    from ich_prep.dataset.dataset import Dataset
    from ich_prep.dataset.shard_cache import ShardCache

# The fields of TrainConfig that say it.
PLACE = ("data", "endpoint", "cache", "cache_size")
SOURCE = (*PLACE, "shared_patients")


def dataset_of(run: Path, settings: TrainConfig, place: Mapping[str, Any]) -> Dataset:
    """Return the dataset that ``place`` names, or the one that ``run`` was trained on."""
    return open_named(read_as(settings, place), moved_from=None if "data" in place else run)


def read_as(settings: TrainConfig, place: Mapping[str, Any]) -> TrainConfig:
    """Return ``settings`` with what ``place`` says of the dataset."""
    given = {name: place[name] for name in SOURCE if name in place}
    named = validate(TrainConfig, given, where="options")
    return settings.model_copy(update={name: getattr(named, name) for name in given})


def open_named(settings: TrainConfig, *, moved_from: Path | None) -> Dataset:
    """Return the datasets of ``settings`` as one; those of the run ``moved_from`` may have been moved: it says so."""
    from ich_prep.dataset.store_url import use_endpoint
    from ich_prep.dataset.union import open_union

    use_endpoint(settings.endpoint)
    paths = settings.data
    try:
        return open_union(paths, shared_patients=settings.shared_patients, cache=cache_of(settings))
    except DatasetError as error:
        if moved_from is None or all(is_url(path) or (path / "zarr.json").exists() for path in paths):
            raise
        raise DatasetError(f"If the dataset of {moved_from} was moved, pass its path with --data. {error}") from error


def cache_of(settings: TrainConfig) -> ShardCache | None:
    """Return the cache that ``settings`` name, None if they name none."""
    from ich_prep.dataset.shard_cache import ShardCache

    return None if settings.cache is None else ShardCache(settings.cache, settings.cache_bytes)
