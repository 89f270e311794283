"""A tree of files dealt out to several, and what is to be equal in datasets that were built from them in another order."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas

from ich_prep import open_dataset
from ich_prep.build_dataset import build
from ich_prep.dataset.spec import Spec
from tests.support.cli import working

SPEC = Spec(size=32, slices_per_shard=16)
# What says where a line is, and not what it is about.
NUMBERS = ["row", "series_row", "label_line", "first_row", "slice_index"]


def split(tree: Path, folder: Path, parts: int, spec: Spec = SPEC, key: Path | None = None) -> list[Path]:
    """Deal the files of ``tree`` out, series by series, to that many trees, each with the whole label file.

    ``folder`` then has ``all.zarr`` too, a dataset built from all of them.
    """
    build(tree, folder / "all.zarr", spec, workers=0, key=key)
    plan = pandas.read_parquet(working(folder / "all.zarr") / "plan.parquet")
    series = {uid: number for number, uid in enumerate(sorted(plan["series_instance_uid"].unique()))}
    out = [folder / f"part{number}" / "rsna" for number in range(parts)]
    for path, uid in zip(plan["path"], plan["series_instance_uid"], strict=True):
        target = out[series[uid] % parts] / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / path, target)
    for part in out:
        for table in tree.glob("*.csv"):
            shutil.copy(table, part)
    return out


def by_uid(path: Path) -> pandas.DataFrame:
    slices = open_dataset(path).slices.to_pandas()
    slices = slices[slices["status"] != "unused"]
    return slices.drop(columns=NUMBERS, errors="ignore").sort_values("sop_instance_uid").reset_index(drop=True)
