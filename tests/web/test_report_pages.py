"""The reports of a dataset, a run and a comparison in a real browser: from disk, offline, on a narrow screen, on paper."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ich_prep.dataset.dataset import open_dataset
from ich_prep.report.page import write_report
from ich_train.config import EvalConfig, TrainConfig
from ich_train.evaluation.compare import compare
from ich_train.train import train
from tests.support.axe import faults

PAGES = ("dataset", "run", "comparison")
# A4 without the margins of a printer, 1 cm on each side, in CSS pixels.
PAPER = round((21.0 - 2.0) / 2.54 * 96)
# What is wider than its box, and what ends right of the page. A table may be scrolled on a screen, not on paper.
CUT = """(scrollable) => [...document.querySelectorAll('body *')].filter((element) => {
    const box = element.getBoundingClientRect();
    if (!box.width || element.closest('svg')) return false;
    const scrolled = element.parentElement.closest('.wide');
    if (scrollable && (scrolled || element.matches('.wide'))) return false;
    return box.right > document.documentElement.clientWidth + 1 || element.scrollWidth > element.clientWidth + 1
        && getComputedStyle(element).display !== 'inline' && element.clientWidth > 0;
}).map((element) => element.outerHTML.slice(0, 160))"""
HIDDEN = "() => [...document.querySelectorAll('details > *:not(summary)')].filter((e) => !e.checkVisibility()).length"


@pytest.fixture(scope="module")
def pages(browser: Any, datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    run = folder / "run"
    settings = TrainConfig(epochs=1, batch_size=16, device="cpu", threads=1, data=(datasets["hu"],))
    console = Console(file=io.StringIO())
    train(open_dataset(datasets["hu"]), run, settings, EvalConfig(bootstrap=20), console=console)
    shutil.copytree(run, folder / "again")
    compare([run, folder / "again"], folder / "compare.html", resamples=20, seed=0)
    return {
        "dataset": write_report(datasets["hu"], folder / "dataset.html"),
        "run": run / "report.html",
        "comparison": folder / "compare.html",
    }


@pytest.fixture
def offline(browser: Any) -> Iterator[Any]:
    """A function that makes a page without a network, which fails the test if it asks for anything but files."""
    contexts, asked = [], list[str]()

    def make(**options: Any) -> Any:
        context = browser.new_context(bypass_csp=True, **options)
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: asked.append(str(error)))
        return page

    yield make
    for context in contexts:
        context.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(offline: Any, axe: str, pages: dict[str, Path], name: str, scheme: str) -> None:
    for width in (1280, 400):
        page = offline(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.goto(pages[name].as_uri())
        page.evaluate("() => document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
        page.evaluate(axe)
        assert faults(page) == []


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_off_on_a_narrow_screen(offline: Any, pages: dict[str, Path], name: str) -> None:
    page = offline(viewport={"width": 400, "height": 800})
    page.goto(pages[name].as_uri())
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 400
    assert page.evaluate(CUT, True) == []


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_off_or_hidden_on_paper(offline: Any, pages: dict[str, Path], name: str) -> None:
    page = offline(viewport={"width": PAPER, "height": 1000})
    page.goto(pages[name].as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= PAPER
    assert page.evaluate(CUT, False) == []
    assert page.evaluate(HIDDEN) == 0
    printed = page.pdf(format="A4", margin=dict.fromkeys(("top", "right", "bottom", "left"), "1cm"))
    assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") >= 2


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_is_shown(offline: Any, pages: dict[str, Path], name: str) -> None:
    page = offline(viewport={"width": 1280, "height": 800})
    page.goto(pages[name].as_uri())
    sizes = page.evaluate("() => [...document.images].map((image) => [image.complete, image.naturalWidth])")
    assert len(sizes) >= 5 and all(complete and width > 10 for complete, width in sizes)
