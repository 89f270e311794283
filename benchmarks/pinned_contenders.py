"""Loaders that need other library versions: FFCV, MosaicML Streaming, LitData. They run in their own venv.

    python -m benchmarks.pinned_contenders write FOLDER/FORM
    python -m benchmarks.pinned_contenders race FOLDER NAME SECONDS SLICES

Of this project, only ``racing`` is imported. All three store uncompressed pixels.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.racing import BATCH, CORES, Opened, forever, race

PIXELS = "rows.npy"
EPOCHS = 500  # presented as one
FFCV, MOSAIC, LITDATA = "rows.beton", "mosaic", "litdata"


class Rows:
    """The rows of the memory map next to ``path``, with the interface of FFCV's writer."""

    def __init__(self, path: Path) -> None:
        self.rows = np.load(path.with_name(PIXELS), mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.array(self.rows[index]), index


def write_ffcv(path: Path) -> None:
    from ffcv.fields import IntField, NDArrayField
    from ffcv.writer import DatasetWriter

    rows = Rows(path)
    fields = {"image": NDArrayField(rows.rows.dtype, rows.rows.shape[1:]), "row": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(rows)


def open_ffcv(path: Path) -> Opened:
    """FFCV's loader with two threads, random order, and the page cache as its cache.

    It allocates its buffers at the start of each epoch. That is negligible for a real dataset, but not for sixty batches:
    so many epochs are presented as one.
    """
    import torch
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    torch.set_num_threads(1)
    pipelines = {"image": [NDArrayDecoder(), ToTensor()], "row": [IntDecoder(), ToTensor()]}

    def loader(order: Any, drop_last: bool) -> Any:
        return Loader(str(path), BATCH, CORES, True, order, drop_last=drop_last, pipelines=pipelines)

    def read(indices: np.ndarray) -> np.ndarray:
        first = next(iter(loader(OrderOption.SEQUENTIAL, False)))[0].numpy()
        return first[indices]

    batches = loader(OrderOption.RANDOM, True)
    order = np.concatenate([batches.traversal_order.sample_order(epoch) for epoch in range(EPOCHS)])
    batches.first_traversal_order = order
    batches.next_traversal_order = lambda: order
    return (images for images, _ in forever(batches)), read


def write_mosaic(path: Path) -> None:
    from streaming import MDSWriter

    rows = Rows(path).rows
    shape = ",".join(map(str, rows.shape[1:]))
    with MDSWriter(out=str(path), columns={"image": f"ndarray:{rows.dtype}:{shape}"}, compression=None) as out:
        for row in rows:
            out.write({"image": np.array(row)})


def open_mosaic(path: Path) -> Opened:
    """StreamingDataset over local shards in a DataLoader with two workers."""
    import streaming
    import torch

    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(path), shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, num_workers=CORES, drop_last=True, persistent_workers=True, collate_fn=_stack
    )
    return forever(loader), lambda indices: np.stack([dataset[int(row)]["image"] for row in indices])


def _stack(samples: list[dict[str, np.ndarray]]) -> Any:
    import torch

    return torch.from_numpy(np.stack([sample["image"] for sample in samples]))


def write_litdata(path: Path) -> None:
    import litdata

    rows = Rows(path).rows
    litdata.optimize(
        partial(_row_of, path.with_name(PIXELS)),
        inputs=list(range(len(rows))),
        output_dir=str(path),
        chunk_bytes="64MB",
        num_workers=1,
    )


def _row_of(pixels: Path, index: int) -> dict[str, np.ndarray]:
    return {"image": np.array(np.load(pixels, mmap_mode="r")[index])}


def open_litdata(path: Path) -> Opened:
    """StreamingDataset over local chunks in LitData's own loader with two workers."""
    import litdata

    dataset = litdata.StreamingDataset(str(path), shuffle=True, drop_last=True)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=CORES, drop_last=True, persistent_workers=True
    )

    def read(indices: np.ndarray) -> np.ndarray:
        plain = litdata.StreamingDataset(str(path), shuffle=False)
        return np.stack([plain[int(row)]["image"] for row in indices])

    return (batch["image"] for batch in forever(loader)), read


def _one_by_one(open_: Callable[[Path], Opened], path: Path) -> Opened:
    os.environ["LITDATA_BATCH_DECODE"] = "0"
    return open_(path)


FORMS: dict[str, Callable[[Path], None]] = {FFCV: write_ffcv, MOSAIC: write_mosaic, LITDATA: write_litdata}
CONTENDERS: dict[str, tuple[str, Callable[[Path], Opened]]] = {
    "FFCV": (FFCV, open_ffcv),
    "MosaicML Streaming": (MOSAIC, open_mosaic),
    "LitData": (LITDATA, open_litdata),
    "LitData, LITDATA_BATCH_DECODE=0": (LITDATA, partial(_one_by_one, open_litdata)),
}


def _make_torchvision_importable() -> None:
    """Declare two operators of torchvision's compiled part if that part does not match the installed torch.

    Two of the three import torchvision without using it here.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor a, Tensor b, float c) -> Tensor")
        library.define("qnms(Tensor a, Tensor b, float c) -> Tensor")
        globals()["_library"] = library  # the operators are removed when it is garbage-collected
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]


def main() -> None:
    command, location, *rest = sys.argv[1:]
    path = Path(location)
    _make_torchvision_importable()
    if command == "write":
        shutil.rmtree(path, ignore_errors=True)
        FORMS[path.name](path)
        print(json.dumps({}))
        return
    name, seconds, slices = rest
    form, open_ = CONTENDERS[name]
    race(lambda: open_(path / form), seconds=float(seconds), slices=int(slices))


if __name__ == "__main__":
    main()
