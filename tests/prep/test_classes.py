"""Classes are data: a folder dataset may have other classes than RSNA's six, and the root lists them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ich_prep.build_dataset import build
from ich_prep.dataset import open_dataset
from ich_prep.dataset.classes import RSNA_CLASSES, is_rsna
from ich_prep.dataset.schema import RESERVED_COLUMNS, series_schema, slice_schema
from ich_prep.dataset.spec import Spec
from ich_prep.errors import UsageError
from ich_prep.phantom import synthesize
from ich_prep.progress import NoProgress
from ich_prep.verify import verify
from tests.support.cli import prep

names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: name not in RESERVED_COLUMNS and not name.startswith("x_")
)


@given(classes=st.lists(names, min_size=1, max_size=8, unique=True))
def test_any_proper_names_are_classes(classes: list[str]) -> None:
    spec = Spec(classes=",".join(classes))  # type: ignore[arg-type]
    assert spec.classes == tuple(classes)
    for schema in (slice_schema(classes), series_schema(classes)):
        assert len(set(schema.names)) == len(schema.names)
        assert set(classes) <= set(schema.names)
    assert is_rsna(spec.classes) == (spec.classes == RSNA_CLASSES)


@pytest.mark.parametrize("wrong", ["", "Mass", "1st", "a b", "x_age", "a,a", "_a", "ä", "a,,b"])
def test_other_names_are_refused(wrong: str) -> None:
    with pytest.raises(ValidationError):
        Spec(classes=wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def labelled_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labels of two custom classes, one of them unknown for every third slice."""
    tree = tmp_path_factory.mktemp("classes") / "tree"
    synthesize(tree, series=4, size=32, layout="folder")
    with (tree / "labels.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    with (tree / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sop_instance_uid", "mass_effect", "fracture"])
        for number, line in enumerate(lines):
            writer.writerow([line["sop_instance_uid"], number % 2, "" if number % 3 == 0 else 1])
    return tree


def test_a_folder_with_custom_classes(labelled_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    words = ["build", "--src", labelled_tree, "--out", out, "--size", 32, "--workers", 0]
    refused = prep(*words)
    assert refused.returncode == 1 and re.search("found none among .*mass_effect", refused.stderr)
    built = prep(*words, "--classes", "fracture,mass_effect")
    assert built.returncode == 0, built.stderr
    dataset = open_dataset(out)
    assert dataset.classes == ("fracture", "mass_effect")
    assert dataset.attributes["classes"] == ["fracture", "mass_effect"]
    assert dataset.slices.schema == slice_schema(dataset.classes)
    assert dataset.labels.shape == (len(dataset), 2)
    assert set(dataset.labels[:, 0].tolist()) == {-1, 1} and set(dataset.labels[:, 1].tolist()) == {0, 1}
    assert not verify(out, progress=NoProgress()).problems
    shown = prep("info", out)
    assert "mass_effect" in shown.stdout and "epidural" not in shown.stdout
    summary = json.loads(prep("info", out, "--json").stdout)
    assert sum(line["mass_effect"] for line in summary["folds"]) == int((dataset.labels[:, 1] == 1).sum())
    again = prep(*words, "--classes", "mass_effect,fracture")
    assert again.returncode == 1 and "classes was fracture,mass_effect, now mass_effect,fracture" in again.stderr


def test_a_class_without_a_column_is_unknown_everywhere(labelled_tree: Path, tmp_path: Path) -> None:
    spec = Spec(size=32, layout="folder", classes=("fracture", "mass_effect", "midline_shift"))
    build(labelled_tree, tmp_path / "data.zarr", spec, workers=0)
    assert set(open_dataset(tmp_path / "data.zarr").labels[:, 2].tolist()) == {-1}


def test_a_column_that_is_not_a_class_is_named_and_not_read(labelled_tree: Path, tmp_path: Path) -> None:
    words = ["build", "--src", labelled_tree, "--out", tmp_path / "data.zarr", "--size", 32, "--workers", 0]
    built = prep(*words, "--classes", "fracture", "--allow-unlabelled")
    assert built.returncode == 0, built.stderr
    assert "1 other column of" in built.stderr and "not read: mass_effect" in built.stderr
    assert open_dataset(tmp_path / "data.zarr").classes == ("fracture",)


@pytest.mark.parametrize("name", ["row", "fold", "status", "kvp"])
def test_a_class_may_not_be_another_column(name: str, labelled_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is the name of another column"):
        build(labelled_tree, tmp_path / "data.zarr", Spec(size=32, layout="folder", classes=("mass", name)), workers=0)


def test_an_rsna_tree_without_labels_is_built_if_allowed(tmp_path: Path) -> None:
    tree, out = tmp_path / "tree", tmp_path / "data.zarr"
    synthesize(tree, series=2, size=32)
    for path in tree.glob("*.csv"):
        path.unlink()
    words = ["build", "--src", tree, "--out", out, "--size", 32, "--workers", 0]
    refused = prep(*words)
    assert refused.returncode == 1 and "label file with the header ID,Label" in refused.stderr
    built = prep(*words, "--allow-unlabelled")
    assert built.returncode == 0, built.stderr
    assert set(open_dataset(out).slices["label_level"].to_pylist()) == {"none"}
