"""Datasets of pseudonyms that grow and change: with the key as one build would be, and without it nothing is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest

from ich_prep import open_dataset
from ich_prep.append import append
from ich_prep.build_dataset import Allowances, build
from ich_prep.drop import drop
from ich_prep.errors import BuildError, SourceError, UsageError
from ich_prep.lookup import find
from ich_prep.phantom import synthesize
from ich_prep.progress import NoProgress
from ich_prep.relabel import relabel
from ich_prep.stages.pseudonyms import Level, key_id, pseudonym
from ich_prep.verify import verify
from tests.support.cli import prep, working
from tests.support.parts import SPEC, by_uid, split

KEY = bytes(range(32))
HIDDEN = SPEC.model_copy(update={"identifiers": "pseudonymise"})
ALLOW = Allowances(missing_images=True)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset ``all.zarr`` of one build, and ``data.zarr`` of a build and an append, by one ``key``."""
    folder = tmp_path_factory.mktemp("hidden")
    synthesize(folder / "rsna", series=10, size=32, layout="rsna", workers=0)
    key = folder / "key"
    key.write_bytes(KEY)
    key.chmod(0o600)
    parts = split(folder / "rsna", folder, 2, HIDDEN, key)
    build(parts[0], folder / "data.zarr", HIDDEN, workers=0, allow=ALLOW, key=key)
    shutil.copytree(folder / "data.zarr", folder / "small.zarr")
    append(parts[1], folder / "data.zarr", workers=0, allow=ALLOW, key=key)
    return folder


@pytest.fixture
def dataset(grown: Path, tmp_path: Path) -> Path:
    shutil.copytree(working(grown / "data.zarr"), working(tmp_path / "data.zarr"))
    return Path(shutil.copytree(grown / "data.zarr", tmp_path / "data.zarr"))


def is_sound(path: Path, **src: Path) -> bool:
    return verify(path, progress=NoProgress(), **src).problems == ()


def originals(folder: Path) -> pandas.DataFrame:
    plan = pandas.read_parquet(working(folder / "data.zarr") / "plan.parquet")
    return plan[plan["sop_instance_uid"].notna()]


def test_appended_it_is_one_build_but_for_the_numbers(grown: Path) -> None:
    pandas.testing.assert_frame_equal(by_uid(grown / "data.zarr"), by_uid(grown / "all.zarr"), check_dtype=False)
    whole, found = (open_dataset(grown / f"{name}.zarr") for name in ("all", "data"))
    for name in ("ok", "patients", "fold_groups", "series"):
        assert getattr(found.counts, name) == getattr(whole.counts, name), name
    assert is_sound(grown / "data.zarr") and found.root.pseudonym_key == key_id(KEY)
    assert is_sound(grown / "data.zarr", src=grown / "rsna")


def test_no_original_is_published(grown: Path) -> None:
    lines = originals(grown)
    secret = {*lines["sop_instance_uid"], *lines["series_instance_uid"], *lines["study_instance_uid"]}
    dataset = open_dataset(grown / "data.zarr")
    for table in ("slices", "series", "quarantine"):
        texts = {str(value) for column in dataset.read_table(table).columns for value in column.to_pylist()}
        assert not secret & texts
        assert not any(path.rsplit("/", 1)[-1] in text for path in lines["path"][:5] for text in texts)
    plain = open_dataset(grown / "data.zarr").root.history[1].digests
    assert plain["key"] == key_id(KEY)


def test_find_names_the_source_of_an_appended_row(grown: Path) -> None:
    last = len(open_dataset(grown / "data.zarr")) - 1
    assert str(find(grown / "data.zarr", row=last).rows[0]["path"]).endswith(".dcm")
    hole = int(np.flatnonzero(open_dataset(grown / "data.zarr").slices["status"].to_numpy() == "unused")[0])
    assert find(grown / "data.zarr", row=hole).rows[0]["status"] == "unused"


def test_an_append_needs_the_key(grown: Path, tmp_path: Path) -> None:
    small = Path(shutil.copytree(grown / "small.zarr", tmp_path / "small.zarr"))
    for words, message in (((), "key of the pseudonyms is missing"), (("--key", tmp_path / "other"), "is another key")):
        (tmp_path / "other").write_bytes(KEY[::-1])
        refused = prep("append", "--src", grown / "part1" / "rsna", "--out", small, "--workers", 0, *words)
        assert refused.returncode == 1 and message in refused.stderr, refused.stderr
    with pytest.raises(UsageError, match="--allow-kept-columns"):
        from ich_prep.layouts.labels import LabelOptions

        append(grown / "part1" / "rsna", small, workers=0, label_options=LabelOptions(keep=("site",)))


def test_what_is_there_already_is_recognised(grown: Path, dataset: Path) -> None:
    again = append(grown / "rsna", dataset, workers=0, key=grown / "key")
    assert again.generation is None and again.slices == 0
    assert again.duplicates == len(list((grown / "rsna").rglob("*.dcm"))) - again.quarantined


def test_labels_by_originals_need_the_key_and_by_pseudonyms_do_not(grown: Path, dataset: Path, tmp_path: Path) -> None:
    opened = open_dataset(dataset)
    row = int(np.flatnonzero(opened.is_ok & (opened.labels[:, -1] == 0))[0])
    shown = opened.slices["sop_instance_uid"][row].as_py()
    original = originals(grown).set_index("row").loc[row, "sop_instance_uid"]
    assert shown == pseudonym(KEY, Level.INSTANCE, original)
    table = tmp_path / "new.csv"
    table.write_text(f"sop_instance_uid,subdural\n{original},1\n")
    with pytest.raises(SourceError, match="give the key with --key"):
        relabel(dataset, table)
    done = prep("relabel", dataset, "--labels", table, "--key", grown / "key", "--replace")
    assert done.returncode == 0, done.stderr
    after = open_dataset(dataset)
    assert after.labels[row].tolist()[4] == 1 and after.slices["label_line"].null_count == len(after)
    assert after.root.pseudonym_key == key_id(KEY) and is_sound(dataset)
    table.write_text(f"sop_instance_uid,subdural\n{shown},0\n")
    assert relabel(dataset, table).generation == 4
    patient = originals(grown).set_index("row").loc[row, "patient_id"]
    table.write_text(f"patient_id,epidural\n{patient},1\n")
    assert relabel(dataset, table, key=grown / "key").slices
    with pytest.raises(BuildError, match="is another key"):
        (tmp_path / "other").write_bytes(KEY[::-1])
        relabel(dataset, table, key=tmp_path / "other")


def test_a_key_is_refused_where_there_are_no_pseudonyms(dataset_path: Path, grown: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("sop_instance_uid,subdural\n1.2,1\n")
    with pytest.raises(UsageError, match="leave it out"):
        relabel(dataset_path, tmp_path / "new.csv", key=grown / "key")


def test_a_patient_can_be_dropped_by_the_pseudonym(grown: Path, dataset: Path) -> None:
    patient = open_dataset(dataset).slices["patient_id"][0].as_py()
    assert drop(dataset, f"patient_id == '{patient}'").slices and is_sound(dataset)
    assert open_dataset(dataset).root.pseudonym_key == key_id(KEY)
