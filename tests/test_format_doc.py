"""docs/format.md against the code: every file, column, type, key, and word of the contract, in the same order."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import (
    FORMAT,
    QUARANTINE_SCHEMA,
    ROOT,
    SHARD_SCHEMA,
    TABLES,
    Counts,
    series_schema,
    slice_schema,
    table_name,
)
from ich_prep.dataset.spec import Spec
from ich_prep.errors import Reason

DOCUMENT = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Return the text below a heading, up to the next one."""
    return DOCUMENT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def table_of(text: str) -> list[list[str]]:
    """Return the cells of the lines of a table, without its heading, backticks off."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line] for line in lines]


def named(text: str) -> list[str]:
    """Return the words in backticks, with the six labels expanded."""
    return re.findall(r"`([a-z_]+)`", text.replace("the six labels", ", ".join(f"`{name}`" for name in RSNA_CLASSES)))


def shown(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {shown(kind.value_type)}"
    return {"double": "float64", "float": "float32"}.get(str(kind), str(kind))


def test_the_page_is_about_this_format() -> None:
    assert DOCUMENT.startswith(f"# The on-disk format `{FORMAT}`\n")


def test_every_published_file_is_in_the_tree() -> None:
    tree = DOCUMENT.split("```")[1]
    listed = set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    assert listed == {
        ROOT, "images/zarr.json", "images/c/<k>/0/0/0", "labels/zarr.json", *(table_name(table, 1) for table in TABLES)
    }  # fmt: skip


def test_every_column_of_the_slices_has_its_type() -> None:
    columns = [line[:2] for line in table_of(section(f"`{table_name('slices', 1)}`"))]
    assert columns == [[field.name, shown(field.type)] for field in slice_schema()]


@pytest.mark.parametrize(("name", "schema"), [("series", series_schema()), ("shards", SHARD_SCHEMA)])
def test_every_column_of_the_other_tables(name: str, schema: pa.Schema) -> None:
    assert named(section(f"`labels/{name}.parquet`")) == schema.names


def test_every_column_and_reason_of_the_quarantine() -> None:
    text = section(f"`{table_name('quarantine', 1)}`")
    columns, rest = text.split("| reason | what |", 1)
    assert named(columns) == QUARANTINE_SCHEMA.names
    assert [line[0] for line in table_of(rest)] == [str(reason) for reason in Reason]
    spared = rest.split("count against `--max-quarantined`", 1)[1]
    assert named(spared) == [str(reason) for reason in Reason if not reason.is_damage]


def test_every_key_of_the_root(dataset_path: Path) -> None:
    attributes = open_dataset(dataset_path).attributes
    lines = re.findall(r"^\| (`.*?`) \| (.*) \|$", section("The root's attribute `ich`"), re.MULTILINE)
    described = {name: what for names, what in lines for name in re.findall(r"`(\w+)`", names)}
    assert described.keys() == attributes.keys()
    assert described["spec"].split(", ") == [name for name in Spec.model_fields if name != "classes"]
    assert set(attributes["spec"]) == set(described["spec"].split(", "))
    assert described["counts"].split(", ") == list(Counts.model_fields)
    assert attributes["counts"].keys() == Counts.model_fields.keys()


def test_every_flag_and_repair_that_a_dataset_carries_is_explained(dataset_path: Path) -> None:
    slices = open_dataset(dataset_path).slices
    words = {word for name in ("flags", "repairs") for line in slices[name].to_pylist() for word in line}
    assert words <= set(named(section(f"`{table_name('slices', 1)}`")))
