"""Draw docs/layers.svg from the table of layers in docs/architecture.md.

python -m benchmarks.layers
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "layers.svg"
LEFT, RIGHT, TOP = 168, 598, 12
HEIGHT, GAP, ROOM = 34, 10, 6  # of a box, between rows, between boxes of a row
GREY, BLUE, RED, EDGE, INK, PALE = "#f0f2f5", "#cfe3ff", "#ffe9e3", "#8c959f", "#1b1f24", "#59636e"
# What a folder's box says besides its name.
ROLES = {"dataset": " · format, reader, C", "sources": " · folders, archives"}


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    table = page.split("\n## Layers\n", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    layers = [(title, re.findall(r"`(\w+)`", names)) for title, names, _ in rows[2:]]
    (sentence,) = re.findall(r"^`ich_train` imports (.*), and nothing else", page, re.MULTILINE)
    blue = {name.removeprefix("ich_prep.") for name in re.findall(r"`([\w.]+)`", sentence)}
    height = TOP + len(layers) * (HEIGHT + GAP) + TOP - GAP
    words = sorted(blue)
    title = (
        "The layers of ich_prep, from commands to errors; imports point downward, and ich_train imports "
        f"{', '.join(words[:-1])} and {words[-1]}"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" viewBox="0 0 760 {height}" '
        'font-family="system-ui, sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for number, (name, modules) in enumerate(layers):
        y = TOP + number * (HEIGHT + GAP)
        lines.append(f'<text x="156" y="{y + 20}" font-size="12" text-anchor="end" fill="{PALE}">{escape(name)}</text>')
        lines += _row(modules, y, blue)
    middle = TOP + (height - 2 * TOP) // 2
    lines += [
        f'<rect x="622" y="{TOP}" width="126" height="{height - 2 * TOP}" rx="4" fill="{RED}" stroke="{EDGE}"/>',
        f'<text x="685" y="{middle - 24}" font-size="14" font-weight="600" text-anchor="middle" fill="{INK}">'
        "ich_train</text>",
        *(
            f'<text x="685" y="{middle - 2 + 16 * line}" font-size="12" text-anchor="middle" fill="{PALE}">{text}</text>'
            for line, text in enumerate(("imports only", "what is blue"))
        ),
        "</svg>",
    ]
    PICTURE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(modules: list[str], y: int, blue: set[str]) -> list[str]:
    """Return the boxes of one layer, each as wide as its name needs, together as wide as the picture."""
    labels = [f"{name}/{ROLES.get(name, '')}" if (ROOT / "ich_prep" / name).is_dir() else name for name in modules]
    available = RIGHT - LEFT - ROOM * (len(modules) - 1)
    letters = [len(label) + 2.5 for label in labels]
    size = 12 if 6.4 * sum(letters) < available else 11 if 5.9 * sum(letters) < available else 9.5
    lines, x = [], float(LEFT)
    for name, label, share in zip(modules, labels, letters, strict=True):
        width = available * share / sum(letters)
        fill = BLUE if name in blue else GREY
        lines += [
            f'<rect x="{round(x)}" y="{y}" width="{round(width)}" height="{HEIGHT}" rx="4" fill="{fill}" stroke="{EDGE}"/>',
            f'<text x="{round(x + width / 2)}" y="{y + 21}" font-size="{size:g}" text-anchor="middle" fill="{INK}">'
            f"{escape(label)}</text>",
        ]
        x += width + ROOM
    return lines


if __name__ == "__main__":
    main()
