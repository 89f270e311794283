"""A real browser, and the datasets of the tests; skipped where Playwright and Chromium are not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.spec import Spec
from ich_prep.phantom import synthesize
from tests.support.axe import axe_script


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: make test-web")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails the test if a script does, or if it asks anything but this machine."""
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    failures: list[str] = []
    opened.on("pageerror", lambda error: failures.append(str(error)))
    local = ("http://127.0.0.1:", "file:", "data:", "blob:")
    opened.on("request", lambda asked: None if asked.url.startswith(local) else failures.append(asked.url))
    yield opened
    opened.close()
    assert not failures


@pytest.fixture(scope="session")
def axe() -> str:
    """The script of axe-core."""
    return axe_script()


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dataset of HU and one of windows, with the defects of real data. Tests must not change them."""
    folder = tmp_path_factory.mktemp("web")
    synthesize(folder / "rsna", series=8, size=96, seed=10, defects=True, workers=0)
    for store in ("hu", "windows"):
        spec = Spec(size=96, store=store, slices_per_shard=32)
        build(folder / "rsna", folder / store, spec, allow=Allowances(max_quarantined=1.0), workers=0)
    return {store: folder / store for store in ("hu", "windows")}
