"""The report of a dataset: whole pages of real datasets, parsed; what is hostile is text; old datasets have one too."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset import open_dataset
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.html import LEVELS
from ich_prep.report.page import report_html, write_report
from tests.support.cli import SMALL, copy_with_working_folder, prep, working
from tests.support.hospital import built, ct_bytes, write_files, write_labels
from tests.support.sealing import replace_table, rewrite_root, with_column

CONTRACT = Path(__file__).parents[1] / "contract"
VOID = {"meta", "img", "br"}
MAX_BYTES = 5_000_000
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[31m\u202e"


class Page(HTMLParser):
    """Collects a page's tags, attributes and text, and fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def all(self, name: str) -> list[str]:
        """Return the values of an attribute, wherever it stands."""
        return [value for attribute, value in self.attributes if attribute == name]


def checked(html: str) -> tuple[Page, str]:
    """Return the parsed page and its text, after checking what must hold for any report."""
    page = Page()
    page.feed(html)
    page.close()
    assert not page.open
    assert not page.tags & {"script", "link", "iframe", "object", "form", "base", "embed"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in html
    assert "@import" not in html
    assert "http-equiv" in html  # the content security policy
    assert "default-src 'none'" in html
    ids = page.all("id")
    assert len(ids) == len(set(ids)) > 5
    assert {link.removeprefix("#") for link in page.all("href")} <= set(ids)
    for source in page.all("src"):
        assert base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True).startswith(b"\x89PNG")
    assert len(html.encode()) < MAX_BYTES
    text = " ".join("".join(page.text).split())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)
    return page, text


def row_of(html: str, name: str) -> list[str]:
    """Return the texts of the cells of the table row that starts with ``name``."""
    found = re.search(rf"<tr><th>\s*{re.escape(name)}\s*(?:<small>[^<]*</small>\s*)?</th>(.*?)</tr>", html, re.DOTALL)
    assert found, name
    return [
        " ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in re.findall(r"<td.*?>(.*?)</td>", found[1], re.S)
    ]


@pytest.fixture(scope="module")
def damaged(damaged_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of a tree with every known defect."""
    out = tmp_path_factory.mktemp("report") / "data.zarr"
    build(damaged_tree, out, SMALL, workers=0, allow=Allowances(max_quarantined=1.0))
    return out


def test_a_damaged_cohort_leads_with_what_to_do(damaged: Path) -> None:
    with open_dataset(damaged) as dataset:
        html = report_html(dataset)
        page, text = checked(html)
        reasons = dataset.read_table("quarantine")["reason"].to_pylist()
        flags = {flag for line in dataset.slices["flags"].to_pylist() for flag in line}
        lost = dataset.root.lost_labels
    assert text.index("What needs attention") < text.index("Labels") < text.index("What was built")
    assert 'class="act"' in html
    for reason in set(reasons):
        cells = row_of(html, reason)
        assert cells[0] == str(reasons.count(reason))
        assert cells[1] == (str(lost[reason].labels) if reason in lost else "")
        assert len(cells[4]) > 5, "what to do"
    assert len(flags) > 3
    for flag in flags:
        assert len(row_of(html, flag)[3]) > 5
    assert "1 image under different patients with conflicting labels" in text
    assert "One image, different patients, conflicting labels" in text
    assert text.count("patient ID_") >= 2
    assert len(page.all("src")) > 10


def test_the_numbers_are_those_of_the_tables(dataset_path: Path) -> None:
    with open_dataset(dataset_path) as dataset:
        html = report_html(dataset)
        slices = dataset.slices.to_pandas()
    labelled = slices[slices["any"].notna()]
    for name in RSNA_CLASSES:
        positive = labelled[labelled[name] == 1]
        cells = row_of(html, name)
        assert cells[0] == f"{len(positive)} {len(positive) / len(labelled):.2%}"
        assert cells[1:3] == [str(positive["series_row"].nunique()), str(positive["patient_id"].nunique())]
        assert cells[3:] == [str((labelled[name] == 0).sum()), str(slices[name].isna().sum())]
    for (subset, fold), part in slices.groupby(["subset", slices["fold"].fillna(-1)]):
        cells = row_of(html, f"{subset} {int(fold)}" if fold >= 0 else subset)
        assert cells[:2] == [str(len(part)), str(part["series_row"].nunique())]
        known = part["any"].notna().any()
        assert cells[-1].split()[0] == (str(int((part["any"] == 1).sum())) if known else "no")
    subdural = labelled[labelled["subdural"] == 1]
    together = html.split("Together on one slice", 1)[1]
    assert row_of(together, "subdural") == [f"{(subdural[name] == 1).mean():.0%}" for name in RSNA_CLASSES]


def test_the_same_dataset_and_seed_give_the_same_bytes(dataset_path: Path, tmp_path: Path) -> None:
    copy = copy_with_working_folder(dataset_path, tmp_path / dataset_path.name)
    pages = [write_report(path, tmp_path / f"{k}.html", seed=3) for k, path in enumerate([dataset_path, copy])]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert write_report(copy, tmp_path / "other.html", seed=4).read_bytes() != pages[0].read_bytes()
    assert str(tmp_path) not in pages[0].read_text()


@pytest.mark.parametrize("name", ["hu", "windows"])
def test_old_datasets_have_a_report(name: str) -> None:
    with open_dataset(CONTRACT / f"{name}.zarr") as dataset:
        page, text = checked(report_html(dataset))
    assert "not known" in text  # scan types, which these lack
    assert "Time" not in text
    assert len(page.all("src")) > 5


def test_columns_and_words_of_other_versions(damaged: Path, tmp_path: Path) -> None:
    """A dataset may lack any column that no reader requires, and have words and columns that this version lacks."""
    copy = Path(shutil.copytree(damaged, tmp_path / "data.zarr"))
    slices = open_dataset(copy).slices.drop_columns(
        ["fold_group", "turn", "hu_mean", "content_hash", "chunk_crc32c", "share_air"]
    )
    flags = [["novel_flag"], *slices["flags"].to_pylist()[1:]]
    slices = with_column(slices, "flags", flags)
    replace_table(copy, "slices", with_column(slices, "repairs", [["novel_repair"]] * len(slices)))
    series = open_dataset(copy).series
    replace_table(copy, "series", series.select([name for name in series.column_names if name != "scan_type"]))
    shards = open_dataset(copy).read_table("shards")
    replace_table(copy, "shards", shards.drop_columns(["hu_histogram"]))
    quarantine = open_dataset(copy).read_table("quarantine")
    replace_table(copy, "quarantine", with_column(quarantine, "reason", ["novel_reason"] * len(quarantine)))
    rewrite_root(copy, lambda ich: ich["lost_labels"].update({"newer_reason": {"labels": 3, "positive": 2}}))
    with open_dataset(copy) as dataset:
        html = report_html(dataset)
    _, text = checked(html)
    for word in ("novel_flag", "novel_repair", "novel_reason", "newer_reason"):
        assert "does not know" in " ".join(row_of(html, word))
    assert "3 labels lost, 2 of them positive" in text
    assert "This dataset has no histogram." in text


def test_a_dataset_without_texts_has_a_report(damaged: Path, tmp_path: Path) -> None:
    """As one whose identifiers and texts were taken out."""
    copy = Path(shutil.copytree(damaged, tmp_path / "data.zarr"))
    for table, kept in (("series", {"patient_id"}), ("quarantine", {"stage", "reason"})):
        found = open_dataset(copy).read_table(table)
        texts = [field.name for field in found.schema if pa.types.is_string(field.type) and field.name not in kept]
        for name in texts:
            found = with_column(found, name, [None] * len(found))
        replace_table(copy, table, found)
    with open_dataset(copy) as dataset:
        checked(report_html(dataset))


def hostile_files() -> Iterator[tuple[str, bytes]]:
    for image in range(6):
        texts = {
            "SpecificCharacterSet": "ISO_IR 192",
            "SeriesDescription": EVIL,
            "Manufacturer": EVIL,
            "PatientID": f"{EVIL}{image % 2}",
        }
        uids = {"StudyInstanceUID": "1.2.1", "SeriesInstanceUID": f"1.2.{image % 2}<b>"}
        yield f"head/{image}.dcm", ct_bytes(image, SOPInstanceUID=f"1.2.3.{image}", **texts, **uids)
    yield "head/<b onclick=alert(3)>\n\x07\u202e.dcm", b""
    yield 'head/"><script>alert(4)<.dcm', ct_bytes(9, Rows=None)


def test_hostile_texts_and_file_names_are_shown_as_text(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", dict(hostile_files()))
    labels = {f"1.2.3.{k}": (0, 0, 0, 0, k % 2, k % 2) for k in range(6)}
    write_labels(src / "labels.csv", "sop_instance_uid", labels)
    allow = Allowances(unlabelled=True, max_quarantined=1.0)
    with built(src, tmp_path / "<i>&\x07.zarr", allow=allow) as dataset:
        html = report_html(dataset)
    _, text = checked(html)
    assert "<script" not in html
    assert "<b " not in html
    assert "<i>&\\x07.zarr: dataset report" in text
    assert "head/<b onclick=alert(3)>\\n\\x07\\u202e.dcm" in text
    assert "<script>alert(1)</script><img src=x" in text
    assert "patient_conflict" in text


def test_the_pictures_are_those_of_the_store(tmp_path: Path, phantom_tree: Path, dataset_path: Path) -> None:
    """A page of HU shows them in the first window: the same pictures as a page of windows."""
    hu = tmp_path / "hu.zarr"
    build(phantom_tree, hu, SMALL.model_copy(update={"store": "hu"}), workers=0)
    pages = []
    for path in (hu, dataset_path):
        with open_dataset(path) as dataset:
            pages.append(checked(report_html(dataset))[0])
    assert pages[0].all("src") == pages[1].all("src")


def test_seconds_are_shown_of_the_own_build_only(dataset_path: Path, tmp_path: Path) -> None:
    copy = copy_with_working_folder(dataset_path, tmp_path / "data.zarr")
    with open_dataset(copy) as dataset:
        html = report_html(dataset)
        rate = row_of(html.split("<h3>Time</h3>", 1)[1], "shards")[1]
        assert rate.endswith(" slices/s")
        other = build_folder_of_another(tmp_path)
        assert "<h3>Time</h3>" not in report_html(dataset, build_dir=other)
        log = working(copy) / "log.jsonl"
        log.write_bytes(b'{"event": "start"}\n' + log.read_bytes() + b'{"event": "sta')
        html = report_html(dataset)
        assert "it took 2 runs" in html
        assert row_of(html.split("<h3>Time</h3>", 1)[1], "shards")[1] == ""
        log.unlink()
        assert "<h3>Time</h3>" not in report_html(dataset)


def build_folder_of_another(tmp_path: Path) -> Path:
    src = write_files(tmp_path / "other", {"0.dcm": ct_bytes(0)})
    built(src, tmp_path / "other.zarr").close()
    return working(tmp_path / "other.zarr")


def test_a_dataset_in_which_all_is_well_says_so(tmp_path: Path) -> None:
    """Heads of many patients, each fold with positive slices, every file a slice."""
    files, labels = {}, {}
    for image in range(60):
        number = image // 2
        uids = {"StudyInstanceUID": f"1.2.{number}", "SeriesInstanceUID": f"1.2.{number}.1", "PatientID": f"P{number}"}
        files[f"{number}/{image}.dcm"] = ct_bytes(
            image, PatientSex="F", BodyPartExamined="HEAD", InstanceNumber=image, **uids
        )
        labels[f"1.2.3.{image}"] = (1, 1, 1, 1, 1, 1) if image % 2 else (0,) * 6
    src = write_files(tmp_path / "src", files)
    write_labels(src / "labels.csv", "sop_instance_uid", labels)
    with built(src, tmp_path / "data.zarr") as dataset:
        flags = {flag for line in dataset.slices["flags"].to_pylist() for flag in line}
        html = report_html(dataset)
    _, text = checked(html)
    points = re.findall(r'<div class="(act|check|fine)">', html)
    assert set(points) <= set(LEVELS)
    assert points == ["fine"] or flags, text
    assert "Nothing was quarantined" in text


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_beside_the_dataset_or_where_told(dataset_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset_path, tmp_path / "data.zarr"))
    done = prep("report", copy)
    assert (done.returncode, done.stdout) == (0, f"Report: {tmp_path}/data.zarr.report.html\n"), done.stderr
    checked((tmp_path / "data.zarr.report.html").read_text())
    assert prep("report", copy, "--out", tmp_path / "page.html", "--seed", 5).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.zarr", "data.zarr.report.html", "page.html"]
    assert prep("verify", copy).returncode == 0, "the dataset was left as it was"


def test_a_build_writes_its_report(phantom_tree: Path, tmp_path: Path) -> None:
    words = ["build", "--src", phantom_tree, "--out", tmp_path / "data.zarr", "--size", 64, "--workers", 0, "--report"]
    for _ in range(2):  # the second finds the dataset finished
        done = prep(*words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f"Report: {tmp_path}/data.zarr.report.html\n")
        assert "<h3>Time</h3>" in (tmp_path / "data.zarr.report.html").read_text()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("data.zarr/page.html", "lies inside the dataset"),
        ("data.zarr", "is a folder"),
        (".", "is a folder"),
        ("none/page.html", "Cannot write the report"),
        ("s3://bucket/page.html", "--out is a URL"),
    ],
)
def test_a_place_that_cannot_be_is_one_message(out: str, message: str, dataset_path: Path, tmp_path: Path) -> None:
    (tmp_path / "data.zarr").symlink_to(dataset_path)
    target = out if "://" in out else tmp_path / out
    done = prep("report", tmp_path / "data.zarr", "--out", target)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(dataset_path.glob("*.html")) == []


def test_damaged_pixels_are_an_error_and_no_page(dataset_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset_path, tmp_path / "data.zarr"))
    for shard in (copy / "images" / "c").glob("*/0/0/0"):
        data = np.frombuffer(shard.read_bytes(), np.uint8).copy()
        data[: len(data) // 2] ^= 0x55
        shard.write_bytes(data.tobytes())
    done = prep("report", copy)
    assert done.returncode == 1
    assert "Restore" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data.zarr.report.html").exists()
