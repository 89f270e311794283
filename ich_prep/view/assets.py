"""The files of the page, read from the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = "index.html"
STYLE = "style.css"
# In the order in which the page loads them: plain scripts, because a page opened from disk cannot load modules.
SCRIPTS = ("core", "source", "pixels", "geometry", "panes", "strip", "volumes", "marks", "quarantine", "app")
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


@dataclass(frozen=True)
class Asset:
    """A file of the page and its media type."""

    content: bytes
    media_type: str


def page(*, head: str = "", data: tuple[str, ...] = ()) -> Asset:
    """Return the page, with more elements in its ``head``, and scripts of ``data`` that are loaded before it starts."""
    names = [f"static/{name}.js" for name in SCRIPTS]
    names[-1:-1] = data
    scripts = "\n".join(f'<script src="{name}"></script>' for name in names)
    text = (_folder() / PAGE).read_text(encoding="utf-8")
    return _asset(PAGE, text.replace("<!--static-->\n", head).replace("<!--scripts-->", scripts).encode())


def static_files() -> dict[str, Asset]:
    """Return the scripts and the style by file name."""
    names = (STYLE, *(f"{name}.js" for name in SCRIPTS))
    return {name: _asset(name, (_folder() / name).read_bytes()) for name in names}


def _asset(name: str, content: bytes) -> Asset:
    return Asset(content, f"{_TYPES[Path(name).suffix]}; charset=utf-8")


def _folder() -> Path:
    return Path(__file__).with_name("static")
