"""All that a reader or a trainer needs: the contract on disk, an open dataset, its shards, tables, windows and classes."""

from __future__ import annotations

from ich_prep.dataset.dataset import Dataset, open_dataset

__all__ = ["Dataset", "open_dataset"]
