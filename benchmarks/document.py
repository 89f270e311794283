"""Write docs/benchmarks.md and its bar chart from the results of the last runs.

python -m benchmarks.document
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import chart
from benchmarks.measure import RESULTS, ROOT

DOC = ROOT / "docs" / "benchmarks.md"

INTRODUCTION = Path(__file__).with_name("introduction.md").read_text(encoding="utf-8")

ORDER = ("build", "loader", "feeding", "training", "scaling", "codecs")


def section_text(section: dict[str, Any]) -> str:
    """Return the Markdown of one table and its notes."""
    header = section["header"]
    lines = [f"## {section['title']}", "", f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    lines += [f"| {' | '.join(line)} |" for line in section["lines"]]
    for note in section["notes"]:
        lines += ["", note]
    return "\n".join([*lines, ""])


def main() -> None:
    parts = [INTRODUCTION]
    paths = sorted(RESULTS.glob("*.json"), key=lambda path: ORDER.index(path.stem.split("-")[0]))
    for path in paths:
        result = json.loads(path.read_text())
        parts += map(section_text, result["sections"])
        releases = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        parts.append(f"{result['machine']}{'; ' + releases if releases else ''}.\n")
    DOC.write_text("\n".join(parts))
    chart.main()


if __name__ == "__main__":
    main()
