"""How long does the viewer's server take for any slice of a large dataset, and how smoothly does a browser scroll?

    python -m benchmarks.viewer [--slices 100000] [--requests 400] [--data bench-data]

The dataset repeats the volumes of a small one (HU, 512 x 512): its tables are as long as those of a large dataset, and its
shards are links to one file, so the times are those of warm files. A request is what the page sends for one slice, over a
connection that stays open. The frame rate needs Playwright and Chromium, and is left out without them.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer

from ich_prep.build_dataset import build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import ROOT, digest_of, shard_path
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.tables import write_table
from ich_prep.phantom import synthesize
from ich_prep.view.data import ViewData
from ich_prep.view.server import Corrections, Server, make_app

SCROLL = """async () => {
    const begun = performance.now();
    let frames = 0;
    while (performance.now() - begun < 3000) {
        ICH.go((ICH.state.slice + 1) % ICH.state.volume.slices.row.length);
        await new Promise(requestAnimationFrame);
        frames += 1;
    }
    return frames / 3;
}"""


def repeated(small: Path, out: Path, slices: int) -> Path:
    """Write a dataset of at least ``slices`` rows to ``out``: the one at ``small``, of one full shard, many times."""
    dataset = open_dataset(small)
    times = -(-slices // len(dataset))
    rows, volumes = len(dataset), len(dataset.series)
    (out / "labels").mkdir(parents=True)
    for name, table, shifts in (
        ("slices", dataset.slices, {"row": rows, "series_row": volumes}),
        ("series", dataset.series, {"series_row": volumes, "first_row": rows}),
    ):
        many = pa.concat_tables([table] * times)
        for column, step in shifts.items():
            moved = many[column].to_numpy() + np.repeat(np.arange(times), len(table)) * step
            many = many.set_column(many.schema.get_field_index(column), column, pa.array(moved, pa.int64()))
        write_table(out / "labels" / f"{name}.parquet", many)
    shards = dataset.read_table("shards")
    columns = {"shard": np.arange(times), "first_row": np.arange(times) * rows}
    many = pa.concat_tables([shards] * times)
    for column, values in columns.items():
        many = many.set_column(many.schema.get_field_index(column), column, pa.array(values, pa.int64()))
    write_table(out / "labels" / "shards.parquet", many)
    shutil.copy(dataset.table_path("quarantine"), out / "labels" / "quarantine.parquet")
    for shard in range(times):
        path = shard_path(out, shard)
        path.parent.mkdir(parents=True)
        os.link(shard_path(small, 0), path)
    root = json.loads((small / ROOT).read_bytes())
    ich = root["attributes"]["ich"]
    ich["counts"] |= {name: ich["counts"][name] * times for name in ("rows", "ok", "series", "shards")}
    for name in ich["tables"].values():
        ich["digests"][name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    ich["digest"] = digest_of(ich)
    (out / ROOT).write_text(json.dumps(root))
    return out


def small_dataset(folder: Path) -> Path:
    """Return a dataset of three volumes in one full shard, made in ``folder``."""
    synthesize(folder / "rsna", series=3, size=512)
    build(folder / "rsna", folder / "first.zarr", Spec(size=512, store="hu", slices_per_shard=1024))
    slices = len(open_dataset(folder / "first.zarr"))
    build(folder / "rsna", folder / "small.zarr", Spec(size=512, store="hu", slices_per_shard=slices))
    return folder / "small.zarr"


def frame_rate(url: str) -> float | None:
    """Return how many slices a second the page shows while it scrolls, None if there is no browser."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if chromium is None:
        return None
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(url)
        page.wait_for_function("() => ICH.state.volume?.pixels.complete", timeout=60_000)
        rate = float(page.evaluate(SCROLL))
        browser.close()
    return rate


def main(
    slices: Annotated[int, typer.Option(help="At least this many slices.")] = 100_000,
    requests: Annotated[int, typer.Option(help="Slices that are asked for, at random.")] = 400,
    data: Annotated[Path, typer.Option(help="Where the datasets are made.")] = Path("bench-data"),
) -> None:
    folder = data / "viewer"
    shutil.rmtree(folder, ignore_errors=True)
    dataset = open_dataset(repeated(small_dataset(folder), folder / "large.zarr", slices))
    begun = time.perf_counter()
    view = ViewData(dataset)
    server = Server(
        lambda port, token: make_app(view, port=port, token=token, corrections=Corrections(folder / "marks.csv", view))
    )
    print(f"{len(dataset):,} slices in {len(view):,} volumes; ready after {time.perf_counter() - begun:.2f} s")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    random = np.random.default_rng(0)

    def ask(path: str) -> tuple[float, Any]:
        started = time.perf_counter()
        connection.request("GET", path, headers={"X-Ich-Token": server.token})
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return (time.perf_counter() - started) * 1000, body

    counts = dataset.series["n_ok"].to_numpy()
    lines = random.integers(0, len(view), requests)
    for title, paths in (
        ("a slice", [f"/api/volumes/{line}/pixels/{random.integers(counts[line])}/1" for line in lines]),
        ("a volume's table", [f"/api/volumes/{line}" for line in lines]),
        ("the list of volumes", ["/api/volumes"] * 5),
        ("a filter", ["/api/where?filter=subdural%20%3D%3D%201%20and%20slice_spacing_mm%20%3C%206"] * 5),
    ):
        took = [ask(path)[0] for path in paths]
        print(f"{title}: median {np.median(took):.1f} ms, p95 {np.percentile(took, 95):.1f} ms")
    connection.close()
    rate = frame_rate(server.url)
    print("frame rate: no browser" if rate is None else f"scrolling: {rate:.0f} slices/s at 512 x 512")
    server.stop()
    thread.join()


if __name__ == "__main__":
    typer.run(main)
