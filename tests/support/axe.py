"""Faults of accessibility that axe-core finds in a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def axe_script() -> str:
    """The script of axe-core; skips the test where it is not installed."""
    package = pytest.importorskip("axe_playwright_python", reason="no axe: make test-web")
    return (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def faults(page: Any) -> list[str]:
    """What axe-core, which the page has, finds in it as it is now, with the first place of each."""
    found: list[str] = page.evaluate(
        "async () => (await axe.run()).violations.map("
        "(fault) => `${fault.impact}: ${fault.help}: ${fault.nodes[0].html.slice(0, 200)}`)"
    )
    return found
