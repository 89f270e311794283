"""Self-contained HTML pages, light and dark: one style, one palette, and the parts that reports are made of.

A template extends ``page.html`` (blocks ``title`` and ``body``) and imports the macros of ``kit.html``: ``section``,
``tiles``, ``table``, ``fold``, ``figure`` and ``image``. A page has no scripts and fetches nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from ich_prep.messages import escaped

# The palette of the pages in light mode, and of the pictures in them.
INK, MUTED, FAINT = "#1f2933", "#66727f", "#d5dae0"
BLUE, GREY, ORANGE = "#1f5a96", "#8a96a3", "#c2571a"

NOTICE = "Research software, not a medical device: nothing here may guide the care of a patient."


@dataclass(frozen=True)
class Cell:
    """A cell of a table, with lines in small print below. ``undefined``: there is no value, and ``text`` says why."""

    text: str
    small: tuple[str, ...] = ()
    undefined: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table, the first cell its name; a row of ``mean`` values has a background."""

    cells: Sequence[Cell | str]
    mean: bool = False


@dataclass(frozen=True)
class Tile:
    """One number at the top of a page, and what it means."""

    value: Cell
    words: str
    more: str = ""


def render(template: str, **values: Any) -> str:
    """Return the page rendered from ``template``, Jinja source, and ``values``. Text is escaped; a missing value raises."""
    return _environment().from_string(template).render(values)


def png_uri(png: bytes) -> str:
    """Return a PNG file as the ``src`` of an image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _environment() -> Environment:
    loader = DictLoader({"page.html": _PAGE, "kit.html": _KIT})
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters["png_uri"] = png_uri
    environment.tests["cell"] = lambda value: isinstance(value, Cell)
    environment.globals["notice"] = NOTICE
    return environment


def _visible(value: Any) -> Any:
    """Return a value with escapes for control characters, if it is text that is not yet HTML."""
    return escaped(value) if type(value) is str else value


_STYLE = f"""
:root {{ --ink: {INK}; --muted: {MUTED}; --faint: {FAINT}; --blue: {BLUE}; --orange: {ORANGE}; --paper: #fff;
  --wash: #f4f6f8; --line: #eceff2; --note: #fdf6f1; color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e8ec; --muted: #9aa5b1; --faint: #3b4550; --blue: #7db1e8;
  --orange: #e08a52; --paper: #15191e; --wash: #1f252c; --line: #262d35; --note: #2a211a; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--faint); }}
h3 {{ font-size: 1rem; margin: 1.75rem 0 .25rem; }}
p {{ margin: .25rem 0 .75rem; max-width: 42rem; }}
.muted, figcaption, caption {{ color: var(--muted); font-size: .875rem; }}
.note {{ border-left: 3px solid var(--orange); background: var(--note); padding: .5rem .75rem; max-width: 42rem; }}
nav {{ display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0; font-size: .875rem; }}
nav a {{ color: var(--blue); text-decoration: none; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }}
.tile {{ background: var(--wash); border-radius: .5rem; padding: .75rem 1rem; }}
.tile b {{ display: block; font-size: 1.6rem; line-height: 1.25; font-weight: 600; }}
.tile span {{ display: block; color: var(--muted); font-size: .8125rem; }}
.tile b .undefined {{ display: inline; font-size: 1.2rem; }}
.wide {{ overflow-x: auto; margin: .5rem 0 1rem; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .75rem .3rem 0; text-align: right; white-space: nowrap; vertical-align: top; }}
th {{ font-weight: 600; }} thead th {{ color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--faint); }}
tbody tr + tr {{ border-top: 1px solid var(--line); }} tr.mean th, tr.mean td {{ background: var(--wash); }}
th:first-child, td:first-child, .facts td {{ text-align: left; }}
.facts td {{ white-space: normal; overflow-wrap: anywhere; }}
th small, td small {{ display: block; color: var(--muted); font-size: .75rem; font-weight: 400; }}
.undefined {{ color: var(--muted); font-style: italic; }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 1.5rem; }}
.pair img {{ min-width: 0; }}
figure {{ margin: 1rem 0 1.5rem; }}
img {{ display: block; width: 100%; height: auto; min-width: 34rem; background: #fff; }}
@media (prefers-color-scheme: dark) {{ img {{ border-radius: .375rem; padding: .25rem; filter: brightness(.9); }} }}
img.tall {{ max-width: 48rem; }} details {{ margin: .5rem 0; }} summary {{ cursor: pointer; color: var(--blue); }}
footer {{ margin-top: 3rem; border-top: 1px solid var(--faint); padding-top: .75rem; }}
@media print {{ .wide {{ overflow: visible; }} img {{ min-width: 0; }} h2 {{ break-after: avoid; }} }}
"""

_PAGE = f"""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{% block title %}}{{% endblock %}}</title><style>{_STYLE}</style></head>
<body>
<header><h1>{{{{ self.title() }}}}</h1><p class="muted">{{{{ notice }}}}</p></header>
{{% block body %}}{{% endblock %}}
<footer class="muted">{{{{ notice }}}}</footer>
</body></html>
"""

_KIT = """\
{% macro cell(value) %}
{% if value is cell %}
{% if value.undefined %}<span class="undefined">{{ value.text }}</span>{% else %}{{ value.text }}{% endif %}
{% for line in value.small %}<small>{{ line }}</small>{% endfor %}
{% else %}{{ value }}{% endif %}
{% endmacro %}

{% macro navigation(places) %}
<nav>{% for place in places %}<a href="#{{ place }}">{{ place }}</a>{% endfor %}</nav>
{% endmacro %}

{% macro tiles(tiles) %}
<div class="tiles">
{% for tile in tiles %}
<div class="tile"><b>{{ cell(tile.value) }}</b><span>{{ tile.words }}</span><span>{{ tile.more }}</span></div>
{% endfor %}
</div>
{% endmacro %}

{% macro section(place, title) %}
<section id="{{ place }}"><h2>{{ title }}</h2>
{{ caller() }}
</section>
{% endmacro %}

{% macro table(head, rows, kind="") %}
<div class="wide"><table class="{{ kind }}">
{% if head %}<thead><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr></thead>{% endif %}
<tbody>
{% for row in rows %}
<tr{% if row.mean %} class="mean"{% endif %}><th>{{ cell(row.cells[0]) }}</th>
{% for value in row.cells[1:] %}<td>{{ cell(value) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}

{% macro fold(summary, open=False) %}
<details{% if open %} open{% endif %}><summary>{{ summary }}</summary>
{{ caller() }}
</details>
{% endmacro %}

{% macro image(name, png, kind="") %}
<div class="wide"><img class="{{ kind }}" alt="{{ name }}" src="{{ png | png_uri }}"></div>
{% endmacro %}

{% macro figure(title, caption, name, png, kind="") %}
<figure><h3>{{ title }}</h3><figcaption>{{ caption }}</figcaption>{{ image(name, png, kind) }}</figure>
{% endmacro %}
"""
