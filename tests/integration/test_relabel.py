"""Relabel: new tables and a new root, from label tables and from corrections, by the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest

from ich_prep import open_dataset
from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.corrections import HEADER, Correction, append_correction, default_file
from ich_prep.dataset.spec import Spec
from ich_prep.errors import BuildError
from ich_prep.progress import NoProgress
from ich_prep.relabel import relabel
from ich_prep.stages.output import output_lock
from ich_prep.verify import verify
from tests.support.cli import copy_with_working_folder, prep, published, working

CLASSES = ["epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any"]


@pytest.fixture
def dataset(dataset_path: Path, tmp_path: Path) -> Path:
    return copy_with_working_folder(dataset_path, tmp_path / "data.zarr")


def problems(path: Path) -> list[str]:
    return [f"{found.culprit}: {found.what}" for found in verify(path, progress=NoProgress()).problems]


def table_of(path: Path) -> pandas.DataFrame:
    return open_dataset(path).slices.to_pandas()


def test_one_corrected_label_changes_two_tables_and_the_root(dataset: Path, tmp_path: Path) -> None:
    before, files = table_of(dataset), published(dataset)
    digest = open_dataset(dataset).digest
    opened = open_dataset(dataset)
    pick = before.loc[(before["any"] == 0) & (before["subset"] == "train")].iloc[0]
    (tmp_path / "new.csv").write_text(f"SOPInstanceUID,subdural\n{pick['sop_instance_uid']},1\n")

    dry = prep("relabel", dataset, "--labels", tmp_path / "new.csv", "--dry-run")
    assert dry.returncode == 0 and "the labels of 1 slice would change" in dry.stdout
    assert published(dataset) == files

    done = prep("relabel", dataset, "--labels", tmp_path / "new.csv")
    assert done.returncode == 0, done.stderr
    assert "subdural: 0 -> 1: 1 slice" in done.stdout and "any: 0 -> 1: 1 slice" in done.stdout
    assert "this is generation 2" in done.stdout
    now = published(dataset)
    assert {name for name in now if now[name] != files.get(name)} == {
        "zarr.json", "labels/slices.2.parquet", "labels/series.2.parquet"
    }  # fmt: skip
    assert set(files) <= set(now)

    after = table_of(dataset)
    differ = before.index[(before[CLASSES].fillna(-1) != after[CLASSES].fillna(-1)).any(axis=1)]
    assert differ.tolist() == [pick["row"]]
    assert after.loc[pick["row"], ["subdural", "any"]].tolist() == [1, 1]
    pandas.testing.assert_frame_equal(before.drop(columns=CLASSES), after.drop(columns=CLASSES))
    series = open_dataset(dataset).series.to_pandas()
    assert series.loc[pick["series_row"], "subdural"] == 1
    assert problems(dataset) == []

    # Whoever had it open goes on with what was opened.
    assert opened.slices["subdural"][int(pick["row"])].as_py() == 0
    assert opened.read([int(pick["row"])]).any()

    # The working folder still belongs to it, and a build does not take it for its own.
    assert prep("clean", dataset, "--generations").returncode == 0
    assert not (dataset / "labels/slices.parquet").exists() and (dataset / "labels/shards.parquet").exists()
    assert problems(dataset) == []
    listed = json.loads(prep("history", dataset, "--json").stdout)
    assert [line["command"] for line in listed] == ["build", "relabel"]
    assert listed[0]["digest"] == digest and listed[1]["digest"] == open_dataset(dataset).digest
    assert listed[1]["counts"]["relabelled"] == 1 and len(listed[1]["digests"]["labels"]) == 64
    shown = prep("history", dataset)
    assert "generation 2: relabel" in shown.stdout and digest in shown.stdout
    assert prep("clean", dataset).returncode == 0 and not working(dataset).exists()


def test_labels_that_are_there_already_change_nothing(dataset: Path, tmp_path: Path) -> None:
    files = published(dataset)
    table_of(dataset)[["sop_instance_uid", *CLASSES]].query("any >= 0").to_parquet(tmp_path / "same.parquet")
    done = prep("relabel", dataset, "--labels", tmp_path / "same.parquet")
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert published(dataset) == files


def test_labels_of_withdrawn_slices_are_told_not_to_change(dataset: Path, tmp_path: Path) -> None:
    uid = table_of(dataset)["sop_instance_uid"][0]
    assert prep("drop", dataset, "--where", "row == 0").returncode == 0
    (tmp_path / "new.csv").write_text(f"SOPInstanceUID,subdural\n{uid},1\n")
    found = relabel(dataset, tmp_path / "new.csv")
    assert found.slices == 0 and found.notes[-1] == "1 withdrawn slice keeps the old labels"


def test_relabelled_with_a_whole_table_it_is_what_a_build_would_be(phantom_tree: Path, tmp_path: Path) -> None:
    """Also without the working folder."""
    spec = Spec(size=32, slices_per_shard=32)
    build(phantom_tree, tmp_path / "a.zarr", spec, workers=0)
    for path in sorted(working(tmp_path / "a.zarr").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    before = open_dataset(tmp_path / "a.zarr").labels
    original = next(path for path in phantom_tree.glob("*.csv") if "sample" not in path.name)
    lines = pandas.read_csv(original).drop_duplicates("ID").sample(frac=1, random_state=3)
    lines["Label"] = np.random.default_rng(3).integers(0, 2, len(lines))
    name = lines["ID"].str.rsplit("_", n=1, expand=True)
    positive = lines[name[1] != "any"].groupby(name[0])["Label"].max()
    is_any = name[1] == "any"
    lines.loc[is_any, "Label"] = positive[name[0][is_any]].to_numpy()
    lines.to_csv(tmp_path / "new.csv", index=False)
    build(phantom_tree, tmp_path / "b.zarr", spec, labels=tmp_path / "new.csv", workers=0)

    found = relabel(tmp_path / "a.zarr", tmp_path / "new.csv", replace_all=True)
    after = open_dataset(tmp_path / "a.zarr").labels
    assert found.generation == 2 and found.slices == (before != after).any(axis=1).sum() > 50
    assert sum(change.slices for change in found.changes) == (before != after).sum()
    for table in ("slices", "series"):
        relabelled, built = (open_dataset(tmp_path / f"{name}.zarr").read_table(table) for name in "ab")
        assert relabelled.equals(built)
    assert problems(tmp_path / "a.zarr") == []


def test_labels_of_whole_series_make_their_slices_weakly_labelled(dataset: Path, tmp_path: Path) -> None:
    before = table_of(dataset)
    series = before.loc[before["subset"] == "train"].groupby("series_instance_uid")["any"].max()
    uid = series.index[series == 0][0]
    (tmp_path / "new.tsv").write_text(f"SeriesInstanceUID\tsubdural\n{uid}\t1\n")
    found = relabel(dataset, tmp_path / "new.tsv")
    after = table_of(dataset)
    mine = after["series_instance_uid"] == uid
    assert found.slices == mine.sum()
    assert set(after.loc[mine, "label_level"]) == {"series"} and set(after.loc[mine, "any"]) == {1}
    assert after.loc[~mine, "label_level"].equals(before.loc[~mine, "label_level"])
    assert problems(dataset) == []


def marked(file: Path, dataset: Path, *marks: tuple[int, str, int | None], reader: str = "anna") -> Path:
    """Append marks (row, class, value) to ``file`` as the viewer does."""
    opened = open_dataset(dataset)
    for row, name, value in marks:
        uid = opened.slices["sop_instance_uid"][row].as_py()
        append_correction(file, Correction(row, uid, name, value, "not sure, yet", reader, opened.digest))
    return file


def test_corrections_as_a_reader_makes_them(dataset: Path, tmp_path: Path) -> None:
    before = table_of(dataset)
    first, second, third = (
        before.loc[before["label_level"] == "slice"].query("any == 1 and subdural != 1").index.tolist()[:3]
    )
    file = marked(default_file(dataset), dataset, (first, "subdural", 0), (first, "subdural", 1))
    marked(file, dataset, (second, "subdural", 1), (third, "epidural", None), reader="ben")
    found = relabel(dataset, file)
    after = table_of(dataset)
    assert found.slices == 3 and problems(dataset) == []
    assert after.loc[[first, second], "subdural"].tolist() == [1, 1]
    assert pandas.isna(after.loc[third, "epidural"]) and after.loc[third, "any"] == 1
    assert set(after.loc[[first, second, third], "label_level"]) == {"slice"}

    # Rows never move: the file still fits after another change, by the digest of the earlier generation.
    again = prep("relabel", dataset, "--labels", file)
    assert again.returncode == 0 and "nothing to do" in again.stdout

    # Of two readers the later mark counts, and the command says that they disagree.
    marked(file, dataset, (first, "subdural", 0), reader="ben")
    disputed = prep("relabel", dataset, "--labels", file)
    assert disputed.returncode == 0 and "readers disagree about 1 label" in disputed.stdout
    assert "subdural: 1 -> 0: 1 slice" in disputed.stdout


def test_corrections_that_cannot_be_of_this_dataset(dataset: Path, tmp_path: Path) -> None:
    opened, files = open_dataset(dataset), published(dataset)
    uids = opened.slices["sop_instance_uid"].to_pylist()
    row = int(np.argmax(opened.labels[:, 4] == 1))
    good = Correction(row, uids[row], "subdural", 1, "", "anna", opened.digest)
    for changes, message in (
        ({"dataset_digest": "0" * 64}, "none of the generations"),
        ({"sop_instance_uid": uids[row + 1]}, "two different slices"),
        ({"row": len(uids)}, "is no slice"),
        ({"row": -1}, "is no slice"),
        ({"class_name": "subdual"}, "none of epidural"),
        ({"class_name": "any", "value": 0}, "not the OR"),
    ):
        file = tmp_path / "wrong.csv"
        file.unlink(missing_ok=True)
        append_correction(file, replace(good, **changes))
        refused = prep("relabel", dataset, "--labels", file)
        assert refused.returncode == 1 and message in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr and published(dataset) == files
    (tmp_path / "empty.csv").write_text(",".join(HEADER) + "\n")
    (tmp_path / "half.csv").write_text(",".join(HEADER) + "\n1,x,subdural,perhaps,,,\n")
    for name, message in (("empty", "found none"), ("half", "Line 2")):
        refused = prep("relabel", dataset, "--labels", tmp_path / f"{name}.csv")
        assert refused.returncode and message in refused.stderr and "Traceback" not in refused.stderr


def test_a_patient_id_of_two_issuers_is_no_key(tmp_path: Path, slice_bytes) -> None:
    for number, issuer in enumerate(("NORTH", "SOUTH", "SOUTH")):
        pixels = np.random.default_rng(number).integers(0, 2000, (32, 32)).astype(np.int16)
        attributes = {
            "SOPInstanceUID": f"2.25.9{number}", "StudyInstanceUID": f"2.25.1{number}", "PatientID": f"P{number // 2}",
            "SeriesInstanceUID": f"2.25.2{number}", "IssuerOfPatientID": issuer,
        }  # fmt: skip
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / f"{number}.dcm").write_bytes(slice_bytes(pixels, **attributes))
    spec = Spec(size=32, layout="folder")
    build(tmp_path / "src", tmp_path / "data.zarr", spec, workers=0, allow=Allowances(unlabelled=True))
    for patient, code in (("P0", 1), ("P1", 0)):
        (tmp_path / "new.csv").write_text(f"patient_id,any\n{patient},1\n")
        done = prep("relabel", tmp_path / "data.zarr", "--labels", tmp_path / "new.csv")
        assert done.returncode == code and ("two issuers" in done.stderr) == bool(code), done.stderr


def test_tables_that_cannot_be_used(dataset: Path, tmp_path: Path) -> None:
    files, uid = published(dataset), table_of(dataset).query("any == 0")["sop_instance_uid"].iloc[0]
    for text, words, code, message in (
        ("sop_instance_uid,subdural\n1.2.3,1\n", (), 1, "is of a slice of"),
        (f"sop_instance_uid,subdural\n{uid},1\n1.2.3,1\n", (), 1, "1 label of"),
        (f"sop_instance_uid,subdural\n{uid},1\n{uid},0\n", (), 1, "contradict"),
        (f"sop_instance_uid,subdural,any\n{uid},1,0\n", (), 1, "not the OR"),
        (f"sop_instance_uid,subdural\n{uid},maybe\n", (), 1, "0, 1 or nothing"),
        (f"id,subdural\n{uid},1\n", (), 1, "--label-key"),
        (f"id,subdural\n{uid},1\n", ("--label-key", "sop_instance_uid=ID2"), 2, "no column 'ID2'"),
    ):
        (tmp_path / "new.csv").write_text(text, encoding="utf-8")
        refused = prep("relabel", dataset, "--labels", tmp_path / "new.csv", *words)
        assert refused.returncode == code and message in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr and published(dataset) == files
    assert prep("relabel", dataset, "--labels", tmp_path / "gone.csv").returncode == 1
    assert prep("relabel", tmp_path / "gone.zarr", "--labels", tmp_path / "new.csv").returncode == 1
    assert not (tmp_path / "gone.zarr").exists()


def test_a_dataset_that_is_being_changed_is_not_changed_by_another(dataset: Path, tmp_path: Path) -> None:
    uid = table_of(dataset)["sop_instance_uid"].iloc[0]
    (tmp_path / "new.csv").write_text(f"sop_instance_uid,subdural\n{uid},1\n")
    with output_lock(dataset), pytest.raises(BuildError, match="Another process"):
        relabel(dataset, tmp_path / "new.csv")


def test_what_an_interrupted_change_leaves_is_named_and_removed(dataset: Path) -> None:
    (dataset / "labels/slices.2.parquet").write_bytes(b"half")
    assert len(found := problems(dataset)) == 1 and "clean --generations" in found[0]
    assert "Removed 1 file" in prep("clean", dataset, "--generations").stdout
    assert problems(dataset) == []
    assert "no files of earlier generations" in prep("clean", dataset, "--generations").stdout


def test_a_build_with_the_same_settings_says_that_the_dataset_was_changed(
    dataset: Path, phantom_tree: Path, tmp_path: Path
) -> None:
    slices = table_of(dataset)
    uid = slices.query("any == 0")["sop_instance_uid"].iloc[0]
    (tmp_path / "new.csv").write_text(f"sop_instance_uid,subdural\n{uid},1\n")
    relabel(dataset, tmp_path / "new.csv")
    with pytest.raises(BuildError, match=r"generation 2, changed since it was built \(relabel\)"):
        build(phantom_tree, dataset, Spec(size=64, slices_per_shard=16), workers=0)
    assert verify(dataset, src=phantom_tree, sample=0.05, progress=NoProgress()).problems == ()
