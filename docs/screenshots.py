"""Takes the pictures of the README: the viewer and both reports of a phantom cohort, in a real browser.

    python docs/screenshots.py [--work FOLDER]

The cohort is made, built and trained on in FOLDER, in some minutes. Needs the extra `web` and Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
WIDTH, HEIGHT, SCALE = 1180, 760, 1.25
QUALITY = 82  # of WebP
LARGEST = 200_000  # bytes
PROGRAMS = Path(sys.executable).parent


def program(*words: object) -> None:
    """Run a command of ours."""
    subprocess.run([PROGRAMS / str(words[0]), *map(str, words[1:])], check=True, stdout=subprocess.DEVNULL)


def prepare(work: Path) -> tuple[Path, Path]:
    """Return the paths of a dataset and of a run on it, with their reports, made in ``work``."""
    data, run = work / "head_ct.zarr", work / "baseline"
    if not (run / "report.html").exists():
        shutil.rmtree(work, ignore_errors=True)
        program("ich-prep", "synth", "--out", work / "rsna", "--series", 48, "--size", 192, "--seed", 1, "--defects")
        built = ("--size", 192, "--store", "hu", "--max-quarantined", 1, "--report")
        program("ich-prep", "build", "--src", work / "rsna", "--out", data, *built)
        program("ich-train", "run", "--data", data, "--out", run, "--epochs", 4, "--batch-size", 32, "--device", "cpu")
        program("ich-train", "explain", run)
    return data, run


@contextmanager
def viewer(data: Path, run: Path) -> Iterator[str]:
    """Yield the address of a viewer of ``data`` with the predictions of ``run``."""
    words = [PROGRAMS / "ich-prep", "view", data, "--run", run, "--corrections", data.with_name("marks.csv")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield next(word for line in process.stdout for word in line.split() if word.startswith("http://127.0.0.1"))
        finally:
            process.terminate()


def settle(page: Any) -> None:
    """Wait until the volume is loaded and drawn."""
    page.wait_for_function("() => ICH.state.volume?.pixels.complete")
    page.evaluate("() => new Promise((done) => { ICH.redraw(); requestAnimationFrame(() => setTimeout(done, 300)); })")


def take(page: Any, name: str) -> None:
    """Write what the page shows to the documentation, as WebP."""
    picture = cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_COLOR)
    encoded = cv2.imencode(".webp", picture, [cv2.IMWRITE_WEBP_QUALITY, QUALITY])[1].tobytes()
    if len(encoded) > LARGEST:
        raise SystemExit(f"{name} has {len(encoded):,} bytes, more than {LARGEST:,}.")
    (DOCS / f"{name}.webp").write_bytes(encoded)
    print(f"docs/{name}.webp: {len(encoded):,} bytes")


def main() -> None:
    """Make the cohort and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ich-screenshots")
    data, run = prepare(parser.parse_args().work)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as started, viewer(data, run) as address:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE)
        page.goto(address)
        settle(page)
        page.select_option("#filter-label", "subdural=1")
        page.select_option("#filter-fold", "1")  # on which the run was tested
        fewest_errors = max(page.locator(".volume").all(), key=lambda volume: volume.bounding_box()["y"])
        fewest_errors.click()
        settle(page)
        page.evaluate("() => ICH.chooseClass(ICH.about.classes.indexOf('subdural'))")
        page.locator("#stage").focus()
        page.keyboard.press("Home")
        page.keyboard.press("n")
        for _ in range(6):
            page.keyboard.press("ArrowDown")
        page.mouse.move(WIDTH - 1, HEIGHT - 1)
        page.wait_for_function("() => getComputedStyle(document.getElementById('toast')).opacity === '0'")
        settle(page)
        take(page, "viewer")
        page.goto(data.with_name(f"{data.name}.report.html").as_uri())
        take(page, "dataset-report")
        page.goto((run / "report.html").as_uri())
        page.evaluate("() => document.getElementById('curves').scrollIntoView()")
        take(page, "run-report")
        browser.close()


if __name__ == "__main__":
    main()
