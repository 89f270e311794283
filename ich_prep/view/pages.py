"""The viewer as files: the page with some volumes, to be opened from disk or put on any web server.

::

    DIR/index.html  static/*       the page
    DIR/data/*.js                  each a call that hands over one piece: JSON, or pixels as gzip in base64

A page opened from disk may load scripts but not read files, so the data are scripts.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ich_prep.dataset.storage import filling, new_folder, write_whole
from ich_prep.errors import UsageError
from ich_prep.view.assets import PAGE, page, static_files
from ich_prep.view.data import SLICES_PER_READ

if TYPE_CHECKING:
    from ich_prep.view.data import ViewData

MAX_QUARANTINE = 5000  # lines of the table in a page
MAX_UNASKED = 100  # volumes that are written without being named
_HEAD = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'self' file:; style-src "
    "'self' file:; img-src 'self' file: data: blob:; base-uri 'none'; form-action 'none'\">\n"
    '<meta name="referrer" content="no-referrer">\n'
)


def write_pages(data: ViewData, out: Path, lines: Sequence[int] | None = None) -> int:
    """Write the page with the volumes on ``lines`` of the series table (default: all) to ``out``; return their number.

    Raises ``UsageError`` for a folder that is not new or empty, and for more than 100 volumes unless ``lines`` names them.
    """
    out = new_folder(out, "--html", outside=data.dataset.folder)
    if lines is None and len(data) > MAX_UNASKED:
        raise UsageError(
            f"{data.dataset.path} has {len(data):,} volumes. Choose some with --series NUMBER or --where FILTER."
        )
    chosen = list(range(len(data))) if lines is None else list(lines)
    with filling(out):
        _write_all(data, out, chosen)
    return len(chosen)


def _write_all(data: ViewData, out: Path, chosen: Sequence[int]) -> None:
    (out / "static").mkdir()
    (out / "data").mkdir()
    for name, file in static_files().items():
        write_whole(out / "static" / name, file.content)
    for line in chosen:
        _write_volume(data, out, line)
    more = {"static": True, "marking": False, "pictures": False}
    _put(out, "quarantine", _quarantine(data))
    _put(out, "volumes", _list(data, chosen))
    _put(out, "about", data.about() | more)
    write_whole(out / PAGE, page(head=_HEAD, data=("data/about.js",)).content)


def _write_volume(data: ViewData, out: Path, line: int) -> None:
    volume = data.volume(line)
    _put(out, f"volume-{line}", volume)
    count = sum(volume["ok"])
    for first in range(0, count, SLICES_PER_READ):
        raw = data.pixels(line, first, min(SLICES_PER_READ, count - first))
        _put(out, f"pixels-{line}-{first}", _text(gzip.compress(raw, 6, mtime=0)))
    maps, shape = {}, {"width": 0, "height": 0}
    for index, explained in enumerate(volume.get("explained", ())):
        found = data.maps(line, index) if explained else None
        if found is not None:
            maps[index] = _text(found[0])
            shape = {"width": found[1]["width"], "height": found[1]["height"]}
    if "explained" in volume:
        _put(out, f"maps-{line}", {**shape, "maps": maps})


def _list(data: ViewData, chosen: Sequence[int]) -> dict[str, Any]:
    """Return the list of volumes with the ``chosen`` lines only, and which lines they are."""
    columns = {
        name: {key: [values[line] for line in chosen] for key, values in column.items()}
        if isinstance(column, dict)
        else [column[line] for line in chosen]
        for name, column in data.volumes["columns"].items()
    }
    return {"columns": columns, "words": data.volumes["words"], "lines": list(chosen)}


def _quarantine(data: ViewData) -> dict[str, Any]:
    found = data.quarantine(reason="", first=0, count=MAX_QUARANTINE)
    shown, total = len(found["lines"]), found["total"]
    note = f"The first {shown:,} of {total:,} files." if shown < total else None
    return {"reasons": data.reasons(), "total": shown, "lines": found["lines"], "note": note}


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _put(out: Path, name: str, value: Any) -> None:
    script = f'ICH.StaticSource.put("{name}", {json.dumps(value, allow_nan=False)});\n'
    write_whole(out / "data" / f"{name}.js", script.encode("ascii"))
