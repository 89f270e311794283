"""Builds from label tables as people write them, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas
import pytest

from ich_prep import open_dataset
from ich_prep.phantom import synthesize
from tests.support.cli import prep

SECRET = "Mustermann^Erika"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pandas.DataFrame]:
    """Return a tree without labels, and a line for each of its slices: keys and the label ``any``."""
    base = tmp_path_factory.mktemp("tables")
    synthesize(base / "src", series=4, size=32, layout="folder")
    labelled = prep("build", "--src", base / "src", "--out", base / "by-slice.zarr", "--size", 32, "--workers", 0)
    assert labelled.returncode == 0, labelled.stderr
    for path in (base / "src").glob("*.csv"):
        path.unlink()
    return base / "src", open_dataset(base / "by-slice.zarr").slices.to_pandas()


def build(src: Path, out: Path, *words: object) -> str:
    done = prep("build", "--src", src, "--out", out, "--size", 32, "--workers", 0, "--layout", "folder", *words)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stderr + done.stdout
    assert SECRET not in (Path(f"{out}.build") / "log.jsonl").read_text(encoding="utf-8")
    return done.stderr


@pytest.mark.parametrize(
    ("column", "header", "level"),
    [
        ("series_instance_uid", "SeriesInstanceUID", "series"),
        ("study_instance_uid", "Study UID", "study"),
        ("patient_id", "Patient ID", "patient"),
    ],
)
def test_labels_of_each_level(
    column: str, header: str, level: str, tree: tuple[Path, pandas.DataFrame], tmp_path: Path
) -> None:
    src, slices = tree
    table = slices.groupby(column, as_index=False)["any"].max().rename(columns={column: header})
    table.assign(Age=np.arange(len(table)) + 50, note=SECRET).to_excel(tmp_path / "labels.xlsx", index=False)
    out = tmp_path / "data.zarr"
    said = build(src, out, "--labels", tmp_path / "labels.xlsx", "--keep-columns", "Age")
    assert "1 other column of" in said and "not read: note" in said
    built = open_dataset(out).slices.to_pandas()
    assert set(built["label_level"]) == {level}
    expected = slices.groupby(column)["any"].max()
    assert built["any"].tolist() == expected[built[column]].tolist()
    ages = dict(zip(table[header], np.arange(len(table)) + 50, strict=True))
    assert built["x_Age".lower()].tolist() == [ages[key] for key in built[column]]
    assert len(open_dataset(out).where("x_age == 50")) == sum(built["x_age"] == 50)
    assert not set(slices.columns) ^ set(built.columns) ^ {"x_age"}
    assert prep("verify", out).returncode == 0
    summary = json.loads(prep("info", out, "--json").stdout)
    assert summary["label_level"] == {level: len(built)}


def test_the_shards_do_not_depend_on_the_label_table(tree: tuple[Path, pandas.DataFrame], tmp_path: Path) -> None:
    src, slices = tree
    slices.assign(SOPInstanceUID=slices["sop_instance_uid"] + ".dcm", site=SECRET)[
        ["SOPInstanceUID", "any", "site"]
    ].to_csv(tmp_path / "labels.tsv", sep="\t", index=False, encoding="utf-16")
    words = ("--labels", tmp_path / "labels.tsv", "--keep-columns", "site")
    build(src, tmp_path / "data.zarr", *words)
    built = open_dataset(tmp_path / "data.zarr").slices.to_pandas()
    assert set(built["x_site"]) == {SECRET}
    assert built["content_hash"].tolist() == slices["content_hash"].tolist()
    assert built["any"].tolist() == slices["any"].tolist()
    # The same command is finished; another table is another dataset.
    assert "already finished" in prep(
        "build", "--src", src, "--out", tmp_path / "data.zarr", "--size", 32, "--workers", 0, "--layout", "folder", *words
    ).stdout  # fmt: skip
    changed = prep("build", "--src", src, "--out", tmp_path / "data.zarr", "--size", 32, "--workers", 0, *words[:2])
    assert changed.returncode == 1 and "labels" in changed.stderr


def test_a_table_that_cannot_be_used_ends_the_build_before_it_begins(
    tree: tuple[Path, pandas.DataFrame], tmp_path: Path
) -> None:
    src, _ = tree
    table = tmp_path / "labels.csv"
    for text, words, code, message in (
        (f"PatientID,any\n{SECRET},vielleicht\n", (), 1, "line 2"),
        (f"PatientID,subdual\n{SECRET},1\n", (), 1, "Did you mean 'subdural'"),
        (f"PatientID,any\n{SECRET},1\n{SECRET},0\n", (), 1, "contradict"),
        (f"PatientID,any\n{SECRET},1\n", ("--allow-unlabelled",), 1, "1 label without an image"),
        ("PatientID,any\nA,1\n", ("--label-key", "patient"), 2, "names no key"),
        ("PatientID,any\nA,1\n", ("--label-column", "mass=any"), 2, "no class of this build"),
    ):
        table.write_text(text, encoding="utf-8")
        refused = prep(
            "build", "--src", src, "--out", tmp_path / "data.zarr", "--workers", 0, "--labels", table, *words
        )
        assert refused.returncode == code and message in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr and SECRET not in refused.stderr and len(refused.stderr) < 2000
    for path, message in ((tmp_path, "found a folder"), (tmp_path / "gone.csv", "no such file")):
        refused = prep("build", "--src", src, "--out", tmp_path / "data.zarr", "--labels", path)
        assert refused.returncode == 1 and message in refused.stderr and "Layout" not in refused.stderr


def test_other_layouts_have_label_files_of_their_own(tmp_path: Path) -> None:
    synthesize(tmp_path / "rsna", series=1, size=32)
    words = ("build", "--src", tmp_path / "rsna", "--out", tmp_path / "data.zarr", "--workers", 0)
    refused = prep(*words, "--keep-columns", "age", "--keep-columns", "sex")
    assert refused.returncode == 2 and "are for --layout folder" in refused.stderr
