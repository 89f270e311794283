"""Self-contained HTML pages, light and dark: one style, one palette, and the parts that reports are made of.

A template extends ``page.html`` (blocks ``title`` and ``body``) and imports the macros of ``kit.html``: ``section``,
``tiles``, ``points``, ``table``, ``bars``, ``heat``, ``thumbs``, ``fold``, ``figure`` and ``image``. A page has no
scripts and fetches nothing; its content security policy forbids both. Every value is escaped, and characters that
cannot be seen, or that change the order of others, are shown by a sign or by their number.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined, Undefined
from markupsafe import Markup

from ich_prep.messages import escaped_line

# The palette of the pages in light mode, and of the pictures in them.
INK, MUTED, FAINT = "#1f2933", "#66727f", "#d5dae0"
BLUE, GREY, ORANGE = "#1f5a96", "#8a96a3", "#c2571a"

# A page may use its own styles and the pictures in it, and nothing else.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
NOTICE = "Research software, not a medical device: nothing here may guide the care of a patient."


@dataclass(frozen=True)
class Cell:
    """A cell of a table, with lines in small print below.

    ``undefined``: there is no value, and ``text`` says why. ``words``: prose, that may be broken into lines.
    """

    text: str
    small: tuple[str, ...] = ()
    undefined: bool = False
    words: bool = False


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


LEVELS = {"act": "act", "check": "look", "fine": "good to know"}


@dataclass(frozen=True)
class Heat:
    """A row of a table of shades: of each cell its shade, 0 to 1, and its text."""

    name: str
    cells: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Point:
    """One thing to know, with its weight: "act", "check" or "fine". ``place`` is the id of the section about it."""

    level: str
    title: str
    text: str = ""
    place: str = ""


@dataclass(frozen=True)
class Bar:
    """A bar of a chart of named values: its length is ``share``, 0 to 1, and ``text`` the value in words."""

    name: str
    share: float
    text: str


@dataclass(frozen=True)
class Thumb:
    """A small picture, a PNG file, with lines of text below it."""

    png: bytes
    name: str
    lines: tuple[str, ...] = ()


def render(template: str, **values: Any) -> str:
    """Return the page rendered from ``template``, Jinja source, and ``values``. Text is escaped; a missing value raises."""
    return _environment().from_string(template).render(values)


def png_uri(png: bytes) -> str:
    """Return a PNG file as the ``src`` of an image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def escape(text: str) -> Markup:
    """Return ``text`` as HTML shows it: escaped, with all its characters visible."""
    return Markup.escape(escaped_line(text))


def _shown(value: Any) -> Any:
    """Return what a template prints of a value: its text, all of it visible, unless it is markup already."""
    return value if isinstance(value, Markup | Undefined) else escaped_line(str(value))


def _environment() -> Environment:
    loader = DictLoader({"page.html": _PAGE, "kit.html": _KIT})
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png_uri"] = png_uri
    environment.filters["words"] = lambda text: Cell(text, words=True)
    environment.tests["cell"] = lambda value: isinstance(value, Cell)
    environment.globals["notice"] = NOTICE
    environment.globals["levels"] = LEVELS
    return environment


_STYLE = f"""
:root {{ --ink: {INK}; --muted: {MUTED}; --faint: {FAINT}; --blue: {BLUE}; --orange: {ORANGE}; --paper: #fff;
  --wash: #f4f6f8; --line: #eceff2; --note: #fdf6f1; --amber: #b7860b; --green: #2f7d4f; color-scheme: light dark; }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e8ec; --muted: #9aa5b1; --faint: #3b4550;
  --blue: #7db1e8; --orange: #e08a52; --paper: #15191e; --wash: #1f252c; --line: #262d35; --note: #2a211a; --amber: #d8ae45;
  --green: #6fbf8e; }} }}
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
.act, .check, .fine {{ border-left: 4px solid var(--orange); background: var(--note); padding: .5rem .75rem; margin: .5rem 0;
  border-radius: 0 .375rem .375rem 0; }}
.check {{ border-color: var(--amber); background: var(--wash); }} .fine {{ border-color: var(--green); background: none; }}
.points {{ display: grid; gap: .5rem .75rem; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }}
.points > div {{ margin: 0; font-size: .9375rem; line-height: 1.45; }}
.points p {{ margin: 0; max-width: none; overflow-wrap: anywhere; }} .points a {{ color: var(--blue); }}
.level {{ font-size: .75rem; font-weight: 600; letter-spacing: .04em; text-transform: uppercase; color: var(--muted); }}
.wide {{ overflow-x: auto; margin: .5rem 0 1rem; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .75rem .3rem 0; text-align: right; white-space: nowrap; vertical-align: top; }}
th {{ font-weight: 600; }} thead th {{ color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--faint); }}
tbody tr + tr {{ border-top: 1px solid var(--line); }} tr.mean th, tr.mean td {{ background: var(--wash); }}
th:first-child, td:first-child, .facts td {{ text-align: left; }}
.facts td {{ white-space: normal; overflow-wrap: anywhere; }}
th small, td small {{ display: block; color: var(--muted); font-size: .75rem; font-weight: 400; }}
td.words, th.words {{ text-align: left; white-space: normal; min-width: 13rem; max-width: 26rem; overflow-wrap: anywhere; }}
.bars {{ width: 100%; max-width: 34rem; }}
.bars th {{ font-weight: 400; white-space: normal; overflow-wrap: anywhere; max-width: 12rem; }}
.bars td {{ width: 1%; }} .bars td:nth-child(2) {{ width: 60%; }} .bars tbody tr + tr {{ border: 0; }}
.bars svg {{ display: block; width: 100%; height: .8rem; margin-top: .3rem; }}
.heat td {{ background: color-mix(in srgb, var(--blue) var(--heat, 0%), transparent); padding: .3rem .5rem; }}
.chart {{ display: block; width: 100%; max-width: 34rem; height: auto; }}
.chart text {{ font-size: 11px; fill: var(--muted); }}
.chart line {{ stroke: var(--faint); }} .fill {{ fill: var(--blue); }} .band {{ fill: var(--orange); opacity: .13; }}
.chart .bound {{ stroke: var(--orange); stroke-width: 1.5; }} .chart .name {{ fill: var(--orange); font-weight: 600; }}
.thumbs {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--thumb, 6rem), 1fr)); gap: .5rem;
  margin: .5rem 0 1rem; }}
.thumbs figure {{ margin: 0; break-inside: avoid; }} .thumbs figcaption {{ font-size: .75rem; line-height: 1.3;
  overflow-wrap: anywhere; }} .thumbs figcaption b {{ display: block; color: var(--ink); font-weight: 600; }}
.thumbs img {{ min-width: 0; padding: 0; background: #000; border-radius: .25rem; image-rendering: auto; filter: none; }}
.large {{ --thumb: 9rem; }} .pairs {{ --thumb: 8.5rem; max-width: 32rem; }}
.undefined {{ color: var(--muted); font-style: italic; }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 1.5rem; }}
.pair img {{ min-width: 0; }}
figure {{ margin: 1rem 0 1.5rem; }}
img {{ display: block; width: 100%; height: auto; min-width: 34rem; background: #fff; }}
@media screen and (prefers-color-scheme: dark) {{
  img {{ border-radius: .375rem; padding: .25rem; filter: brightness(.9); }} }}
img.tall {{ max-width: 48rem; }} details {{ margin: .5rem 0; }} summary {{ cursor: pointer; color: var(--blue); }}
footer {{ margin-top: 3rem; border-top: 1px solid var(--faint); padding-top: .75rem; }}
@media (max-width: 40rem) {{ body {{ padding: 1rem 1rem 3rem; }} th, td {{ padding-right: .5rem; }}
  .wide th:first-child {{ position: sticky; left: 0; background: var(--paper); }}
  .stack, .stack tbody, .stack tr, .stack tbody th, .stack td {{ display: block; text-align: left; white-space: normal;
    max-width: none; min-width: 0; overflow-wrap: anywhere; }} .stack thead {{ display: none; }}
  .stack tr {{ padding: .5rem 0; }} .stack tbody th, .stack td {{ padding: .1rem 0; }} .stack td:empty {{ display: none; }}
  .stack td[data-head]::before {{ content: attr(data-head) ": "; color: var(--muted); }}
  .stack small {{ display: inline; margin-left: .4rem; }} }}
@media print {{ :root {{ color-scheme: light; font-size: 12px; }} body {{ max-width: none; padding: 0; font-size: 1rem; }}
  .wide {{ overflow: visible; }} img {{ min-width: 0; }} h2, h3, summary {{ break-after: avoid; }} nav {{ display: none; }}
  h2 {{ margin-top: 2rem; }} th, td {{ white-space: normal; overflow-wrap: break-word; padding-right: .4rem; }}
  td.words, th.words {{ min-width: 0; }} tr, figure, .tile {{ break-inside: avoid; }}
  .thumbs {{ --thumb: 5rem; }} .large {{ --thumb: 9rem; }}
  details::details-content {{ content-visibility: visible; }}
  .tile, .act, .check, .heat td, tr.mean > * {{ -webkit-print-color-adjust: exact; print-color-adjust: exact; }} }}
"""

_PAGE = f"""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{% block title %}}{{% endblock %}}</title><style>{_STYLE}</style></head>
<body>
<header><h1>{{{{ self.title() }}}}</h1><p class="muted">{{{{ notice }}}}</p></header>
<main>
{{% block body %}}{{% endblock %}}
</main>
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

{% macro words(value) %}{% if value is cell and value.words %} class="words"{% endif %}{% endmacro %}

{% macro heading(name) %}
{% if name %}<th{{ words(name) }}>{{ cell(name) }}</th>{% else %}<td></td>{% endif %}
{% endmacro %}

{% macro place(head, index) %} data-head="{{ head[index].text if head[index] is cell else head[index] }}"{% endmacro %}

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

{% macro points(points) %}
<div class="points">
{% for point in points %}
<div class="{{ point.level }}"><p><span class="level">{{ levels[point.level] }}</span>
<b>{% if point.place %}<a href="#{{ point.place }}">{{ point.title }}</a>{% else %}{{ point.title }}{% endif %}</b></p>
{% if point.text %}<p>{{ point.text }}</p>{% endif %}</div>
{% endfor %}
</div>
{% endmacro %}

{% macro section(place, title) %}
<section id="{{ place }}"><h2>{{ title }}</h2>
{{ caller() }}
</section>
{% endmacro %}

{% macro table(head, rows, kind="") %}
<div class="wide" tabindex="0"><table class="{{ kind }}">
{% if head %}<thead><tr>{% for name in head %}{{ heading(name) }}{% endfor %}</tr></thead>{% endif %}
<tbody>
{% for row in rows %}
<tr{% if row.mean %} class="mean"{% endif %}><th>{{ cell(row.cells[0]) }}</th>
{% for value in row.cells[1:] %}
<td{{ words(value) }}{{ place(head, loop.index) if kind == "stack" }}>{{ cell(value) | trim }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}

{% macro bars(bars) %}
<table class="bars"><tbody>
{% for bar in bars %}
<tr><th>{{ bar.name }}</th><td><svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">
<rect class="fill" width="{{ "%.2f" | format(100 * bar.share) }}" height="10"/></svg></td><td>{{ bar.text }}</td></tr>
{% endfor %}
</tbody></table>
{% endmacro %}

{% macro heat(head, rows) %}
<div class="wide" tabindex="0"><table class="heat">
<thead><tr>{% for name in head %}{{ heading(name) }}{% endfor %}</tr></thead><tbody>
{% for row in rows %}
<tr><th>{{ row.name }}</th>
{% for share, text in row.cells %}<td style="--heat: {{ "%.0f" | format(50 * share) }}%">{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}

{% macro thumbs(thumbs, kind="") %}
<div class="thumbs {{ kind }}">
{% for thumb in thumbs %}
<figure><img alt="{{ thumb.name }}" src="{{ thumb.png | png_uri }}"><figcaption><b>{{ thumb.name }}</b>
{% for line in thumb.lines %}{{ line }}{% if not loop.last %}<br>{% endif %}{% endfor %}</figcaption></figure>
{% endfor %}
</div>
{% endmacro %}

{% macro fold(summary, open=False) %}
<details{% if open %} open{% endif %}><summary>{{ summary }}</summary>
{{ caller() }}
</details>
{% endmacro %}

{% macro image(name, png, kind="") %}
<div class="wide" tabindex="0"><img class="{{ kind }}" alt="{{ name }}" src="{{ png | png_uri }}"></div>
{% endmacro %}

{% macro figure(title, caption, name, png, kind="") %}
<figure><h3>{{ title }}</h3><figcaption>{{ caption }}</figcaption>{{ image(name, png, kind) }}</figure>
{% endmacro %}
"""
