"""Draw docs/speed.svg, the bar chart of the README, from the tables of docs/benchmarks.md.

python -m benchmarks.chart
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "benchmarks.md"
CHART = ROOT / "docs" / "speed.svg"


@dataclass(frozen=True)
class Question:
    """One group of bars: a table of docs/benchmarks.md, found by the start of its title, and four of its lines."""

    name: str
    table: str
    ours: str
    usual: str
    fastest: str
    limit: str


QUESTIONS = (
    Question(
        name="Build: DICOM to three windows, 512 x 512",
        table=r"Build: three windows, 512 x 512, [\d,]+ slices",
        ours="ich-prep build",
        usual="pool of pydicom + NumPy + PNG",
        fastest="dcm2niix",
        limit="two bare processes",
    ),
    Question(
        name="Random batches, 3 x 256 x 256 uint8",
        table=r"Loader: 3 x 256 x 256 uint8, [\d,]+ slices",
        ours="SliceLoader, lz4",
        usual="DataLoader over PNG",
        fastest="FFCV",
        limit="memmap gather",
    ),
    Question(
        name="Random batches, 512 x 512 HU",
        table=r"Loader: 1 x 512 x 512 HU, [\d,]+ slices",
        ours="SliceLoader, lz4",
        usual="DataLoader over PNG",
        fastest="FFCV",
        limit="memmap gather",
    ),
    Question(
        name="Training ResNet-50 on one GPU, 3 x 256 x 256",
        table=r"Training on [^:]+: ResNet-50, 3 x 256 x 256",
        ours="ich-train",
        usual="DataLoader over PNG",
        fastest="DataLoader over a memmap",
        limit="batches that lie on the GPU",
    ),
)
ROLES = ("ours", "usual", "fastest", "limit")
FILLS = {"ours": "#1f6feb", "usual": "#9aa4b2", "fastest": "#5f6b7a", "limit": "#d8dee6"}

WIDTH, LEFT, BAR, STEP, GROUP = 760, 232, 15, 19, 112  # pixels
SCALE = WIDTH - LEFT - 70  # of the longest bar


def rates(question: Question, document: str) -> dict[str, int]:
    """Return the slices/s of each role; raises ``ValueError`` if ``document`` has no such table."""
    section = re.search(rf"^## {question.table}.*?(?=^## |\Z)", document, re.MULTILINE | re.DOTALL)
    if section is None:
        raise ValueError(f"Expected a table titled {question.table!r} in {DOC}; found none.")
    lines = dict(re.findall(r"^\| ([^|]+?) \| ([\d,]+) \|", section[0], re.MULTILINE))
    return {role: int(lines[getattr(question, role)].replace(",", "")) for role in ROLES}


def chart_text(document: str) -> str:
    """Return the chart as SVG: four bars per question, scaled to the fastest of them."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{GROUP * len(QUESTIONS) + 8}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        "<title>Slices per second: this project, the usual way, the fastest other tool, the limit of the machine</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for number, question in enumerate(QUESTIONS):
        top = GROUP * number + 24
        parts.append(
            f'<text x="12" y="{top}" font-weight="600" fill="#1b1f24">{escape(question.name)}, slices/s</text>'
        )
        results = rates(question, document)
        for index, role in enumerate(ROLES):
            y = top + 8 + STEP * index
            length = max(1, round(SCALE * results[role] / max(results.values())))
            name = f"limit: {question.limit}" if role == "limit" else getattr(question, role)
            parts += [
                f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end" fill="#3d4651">{escape(name)}</text>',
                f'<rect x="{LEFT}" y="{y}" width="{length}" height="{BAR}" fill="{FILLS[role]}"/>',
                f'<text x="{LEFT + length + 6}" y="{y + 12}" fill="#1b1f24">{results[role]:,}</text>',
            ]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    CHART.write_text(chart_text(DOC.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
