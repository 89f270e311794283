"""The figures of the README are those of docs/benchmarks.md, and the page and the chart are what their scripts write."""

from __future__ import annotations

import re

from benchmarks.chart import CHART, DOC, QUESTIONS, ROLES, ROOT, chart_text, rates
from benchmarks.document import INTRODUCTION

README = (ROOT / "README.md").read_text(encoding="utf-8")
HOW_FAST = README.split("\n## How fast\n", 1)[1].split("\n## ", 1)[0]
DOCUMENT = DOC.read_text(encoding="utf-8")


def test_the_readme_has_four_rows_of_four_figures_from_the_benchmarks() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in HOW_FAST.splitlines() if line[:2] == "| "]
    found = [[int(cell.replace(",", "")) for cell in row[1:]] for row in rows[1:]]
    assert found == [[rates(question, DOCUMENT)[role] for role in ROLES] for question in QUESTIONS]


def test_the_readme_names_no_other_figure_than_those_of_the_benchmarks() -> None:
    prose = "\n".join(line for line in HOW_FAST.splitlines() if not line.startswith("|"))
    figures = re.findall(r"\b\d+\.\d+\b", prose)
    assert figures
    assert all(re.search(rf"\| {re.escape(figure)} ", DOCUMENT) for figure in figures), figures


def test_the_chart_is_drawn_from_the_benchmarks() -> None:
    assert CHART.read_text(encoding="utf-8") == chart_text(DOCUMENT), "run python -m benchmarks.chart"


def test_the_introduction_of_the_benchmarks_is_that_of_the_script() -> None:
    assert DOCUMENT.startswith(f"{INTRODUCTION}\n## "), "run python -m benchmarks.document"
