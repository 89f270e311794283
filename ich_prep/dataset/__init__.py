"""Reading a dataset: the on-disk contract, an open dataset, its shards, tables, windows and classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ich_prep.dataset.dataset import Dataset, open_dataset

__all__ = ["Dataset", "open_dataset"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line imports the spec from here, which must not load pyarrow.
    if name in __all__:
        from ich_prep.dataset import dataset

        return getattr(dataset, name)
    raise AttributeError(f"module 'ich_prep.dataset' has no attribute {name!r}")
