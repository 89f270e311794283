"""docs/architecture.md against the code: its layers are those of the import contracts, its stations exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
WALK = (ROOT / "docs" / "walk.svg").read_text(encoding="utf-8")
LAYERS = (ROOT / "docs" / "layers.svg").read_text(encoding="utf-8")
BLUE = "#cfe3ff"  # of the boxes that ich_train imports


def table_under(title: str) -> list[list[str]]:
    """Return the cells of the table under a heading, without its heading line."""
    section = PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_layers_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = [
        contract["layers"]
        for contract in contracts
        if contract["type"] == "layers" and contract.get("containers", ["ich_prep"]) == ["ich_prep"]
    ]
    held = [{name.strip(" ()").removeprefix("ich_prep.") for name in re.split(r"[|:]", layer)} for layer in layers]
    assert [set(re.findall(r"`(\w+)`", line[1])) for line in table_under("Layers")] == held


def test_the_picture_of_the_layers_shows_the_same_modules() -> None:
    heights: dict[str, list[str]] = {}  # the y of boxes -> their names, from top to bottom
    for y, label in re.findall(r'<rect x="\d+" y="(\d+)" [^>]*/>\n<text [^>]*>(\w+)', LAYERS):
        if label != "ich_train":  # it is next to all of them
            heights.setdefault(y, []).append(label)
    shown = [set(names) for names in heights.values()]
    assert [set(re.findall(r"`(\w+)`", line[1])) for line in table_under("Layers")] == shown


def test_what_ich_train_imports_is_blue_and_on_the_page() -> None:
    blue = set(re.findall(rf'fill="{BLUE}"[^>]*/>\n<text [^>]*>(\w+)', LAYERS))
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "ich_train").rglob("*.py")]
    imported = {
        name for text in sources for name in re.findall(r"^\s*(?:from|import) ich_prep\.(\w+)", text, re.MULTILINE)
    }
    assert imported == blue
    (sentence,) = re.findall(r"^`ich_train` imports (.*), and nothing else", PAGE, re.MULTILINE)
    assert {name.removeprefix("ich_prep.") for name in re.findall(r"`([\w.]+)`", sentence)} == imported


@pytest.mark.parametrize("station", table_under("One slice's walk"), ids=lambda station: station[0])
def test_every_station_of_a_slice_exists(station: list[str]) -> None:
    name, path = station[1].strip("`"), ROOT / station[2].strip("`")
    definition = rf"^(?:def|class) {name}\b" if path.suffix == ".py" else rf"\b{name}\("
    assert re.search(definition, path.read_text(encoding="utf-8"), re.MULTILINE), f"{path} has no {name}"


def test_the_picture_shows_files_that_exist() -> None:
    shown = re.findall(r'font-family="monospace">([^<]+)<', WALK)
    assert len(shown) > 20
    known = [
        str(path.relative_to(ROOT)) for package in ("ich_prep", "ich_train") for path in (ROOT / package).rglob("*")
    ]
    missing = [name for name in shown if not any(path.endswith(name.rstrip("/")) for path in known)]
    assert not missing
