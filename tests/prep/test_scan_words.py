"""What the words of headers and folder names say about each slice of a scan."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from ich_prep.layouts.scan_types import is_not_head, scan_type_of
from ich_prep.stages.scan import SCHEMA
from ich_prep.stages.scan_words import with_scan_words


def words(*lines: dict[str, Any]) -> list[dict[str, Any]]:
    table = with_scan_words(pa.Table.from_pylist(list(lines), SCHEMA))
    return table.select(["scan_type", "contrast_stated", "header_not_head"]).to_pylist()


def scan_type(**values: Any) -> str:
    return str(words({"path": "x.dcm"} | values)[0]["scan_type"])


def test_the_folder_of_a_file_is_the_last_one_of_its_path() -> None:
    assert scan_type(path="CT BONE/x.dcm") == "bone"
    assert scan_type(path="study/CT Plain/x.dcm") == "plain"
    assert scan_type(path="CT BONE/study/x.dcm") == "unknown"
    assert scan_type(path="bone.dcm") == "unknown"
    assert scan_type(path="CT BONE/x.dcm", series_description="HEAD W/O") == "plain"


def test_each_line_gets_its_own_words_whatever_the_others_have() -> None:
    lines = [
        {
            "path": f"{folder}/{number}",
            "series_description": text,
            "convolution_kernel": kernel,
            "contrast_agent": agent,
        }
        for number, (folder, text, kernel, agent) in enumerate(
            (folder, text, kernel, agent)
            for folder in ("a", "CT BONE", "CT Plain")
            for text in (None, "", "CTA HEAD", "Kopf nativ")
            for kernel in (None, "H70h", "H30s")
            for agent in (None, "NONE", "Omnipaque")
        )
    ]
    for found, line in zip(words(*lines), lines, strict=True):
        folder = line["path"].split("/")[0]
        kind, stated = scan_type_of(
            line["series_description"], folder, line["convolution_kernel"], line["contrast_agent"]
        )
        assert (found["scan_type"], found["contrast_stated"]) == (kind, stated)


@pytest.mark.parametrize(
    ("rows", "columns", "spacing", "body_part"),
    [
        (512, 512, [0.5, 0.5], None),
        (512, 512, [0.7, 0.7], None),
        (512, 100, [0.7, 0.5], None),
        (100, 512, [0.5, 0.7], "HEAD"),
        (512, 512, None, "CHEST"),
        (None, None, [0.9, 0.9], None),
        (512, 512, None, None),
        (700, 700, [0.5, 0.5], None),
        (701, 701, [0.5, 0.5], None),
    ],
)
def test_a_large_field_of_view_or_another_body_part_is_no_head(
    rows: int | None, columns: int | None, spacing: list[float] | None, body_part: str | None
) -> None:
    line = {"path": "x", "rows": rows, "columns": columns, "pixel_spacing": spacing, "body_part": body_part}
    view = max(rows * spacing[0], columns * spacing[1]) if rows and columns and spacing else None
    beside = {"path": "y", "rows": 512, "columns": 512, "pixel_spacing": [0.4, 0.4], "body_part": "HEAD"}
    assert [found["header_not_head"] for found in words(line, beside)] == [is_not_head(body_part, view), False]


def test_sizes_without_sense_are_taken_as_they_are() -> None:
    lines = [{"path": "x", "rows": 512, "columns": 512, "pixel_spacing": [size, size]} for size in (1e300, 0.0, -1.0)]
    assert [found["header_not_head"] for found in words(*lines)] == [True, False, False]


def test_no_file_at_all() -> None:
    assert words() == []
