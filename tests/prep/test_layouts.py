"""Layouts: how a tree is recognised, where its labels are, and what is assigned to its slices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ich_prep.dataset.classes import RSNA_CLASSES, UNKNOWN
from ich_prep.errors import SourceError
from ich_prep.layouts import LAYOUTS, cq500, folder, recognise, rsna
from ich_prep.layouts.labels import LabelRules, fill_any
from ich_prep.phantom import synthesize
from ich_prep.pixels.repairs import SIGN_12BIT
from ich_prep.sources import FolderSource, Listing, table_at
from ich_prep.stages import scan

READERS = ("R1", "R2", "R3")


def tree(root: Path, files: dict[str, str]) -> Listing:
    """Write text files by relative path and list them."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return FolderSource(root).list()


def long_csv(values: dict[str, Sequence[float | str]]) -> str:
    lines = [
        f"{sop}_{name},{value}"
        for sop, labels in values.items()
        for name, value in zip(RSNA_CLASSES, labels, strict=True)
    ]
    return "\n".join(["ID,Label", *lines]) + "\n"


def scanned(lines: list[dict[str, object]]) -> pa.Table:
    usual = {"sop_instance_uid": "a", "bits_stored": 16, "signed": True, "rescale_intercept": -1024.0}
    return pa.Table.from_pylist([usual | line for line in lines], scan.SCHEMA)


# --- which layout ----------------------------------------------------------------------------------------------------

RSNA_FOLDERS = [
    f"{above}stage_{stage}_{subset}{below}"
    for above in ("", "rsna-intracranial-hemorrhage-detection/")
    for stage in (1, 2)
    for subset in ("train", "test")
    for below in ("", "_images")
]


@pytest.mark.parametrize("place", RSNA_FOLDERS)
def test_every_spelling_of_the_rsna_folders_is_recognised(place: str, tmp_path: Path) -> None:
    listing = tree(tmp_path, {f"{place}/ID_1.dcm": ""})
    name, why = recognise(listing)
    assert name == "rsna"
    assert place.rsplit("/", 1)[-1] in why


@pytest.mark.parametrize("place", RSNA_FOLDERS)
def test_the_rsna_folder_says_the_subset(place: str) -> None:
    placed = rsna.assign(scanned([{"path": f"{place}/ID_1.dcm"}]), "rsna")
    assert placed.subset.to_pylist() == ["test" if "test" in place else "train"]


@pytest.mark.parametrize(("name", "subset"), [("stage_2_train", "train"), ("stage_2_test_images", "test")])
def test_an_rsna_folder_may_itself_be_the_source(name: str, subset: str, tmp_path: Path) -> None:
    assert recognise(tree(tmp_path / name, {"ID_1.dcm": ""}))[0] == "rsna"
    assert rsna.assign(scanned([{"path": "ID_1.dcm"}]), name).subset.to_pylist() == [subset]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("CQ500CT0 CQ500CT0/Unknown Study/CT Plain/CT000000.dcm", "cq500"),
        ("qct01/CQ500CT12 CQ500CT12/Unknown Study/CT 5mm/CT000000.dcm", "cq500"),
        ("stage_2_training/ID_1.dcm", "folder"),
        ("patient/1.dcm", "folder"),
        ("1.dcm", "folder"),
    ],
)
def test_other_trees_are_recognised(name: str, layout: str, tmp_path: Path) -> None:
    assert recognise(tree(tmp_path, {name: ""}))[0] == layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_phantom_of_each_layout_is_recognised(layout: str, tmp_path: Path) -> None:
    synthesize(tmp_path / "tree", series=1, size=32, layout=layout)
    listing = FolderSource(tmp_path / "tree").list()
    assert recognise(listing)[0] == layout
    labels = LAYOUTS[layout].read_labels(listing, None)
    fill_any(labels)
    assert (labels.values != UNKNOWN).all()
    assert len(labels.keys) > 0


# --- RSNA ------------------------------------------------------------------------------------------------------------

SLICE = "stage_2_train/ID_a.dcm"
NEGATIVE, SUBDURAL = (0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 1, 1)
SAMPLE = long_csv({"ID_z": [0.5] * 6, "ID_y": [0.5] * 6})


def test_the_long_csv_is_read_in_order_and_duplicates_are_counted(tmp_path: Path) -> None:
    text = long_csv({"ID_b": SUBDURAL, "ID_a": NEGATIVE}) + long_csv({"ID_b": SUBDURAL}).split("\n", 1)[1]
    listing = tree(tmp_path, {SLICE: "", "stage_2_train.csv": text})
    labels = rsna.read_labels(listing, None)
    assert labels.key == "sop_instance_uid"
    assert labels.keys.to_pylist() == ["ID_b", "ID_a"]
    assert labels.values.tolist() == [list(SUBDURAL), list(NEGATIVE)]
    assert labels.notes == ("6 duplicate label lines (ignored)",)
    assert labels.listed.to_pylist() == []


def test_the_label_file_may_be_in_a_nested_folder_next_to_the_sample_submission(tmp_path: Path) -> None:
    nested = "rsna-intracranial-hemorrhage-detection"
    listing = tree(
        tmp_path,
        {
            f"{nested}/{SLICE}": "",
            f"{nested}/stage_2_train.csv": long_csv({"ID_a": NEGATIVE}),
            f"{nested}/stage_2_sample_submission.csv": SAMPLE,
            "notes.csv": "name,remark\n",
        },
    )
    labels = rsna.read_labels(listing, None)
    assert labels.keys.to_pylist() == ["ID_a"]
    assert labels.listed.to_pylist() == ["ID_z", "ID_y"]  # in the order of the file, each once


def test_contradictory_rsna_lines_are_refused_or_unknown(tmp_path: Path) -> None:
    other = long_csv({"ID_a": SUBDURAL}).split("\n", 1)[1]
    listing = tree(tmp_path, {SLICE: "", "train.csv": long_csv({"ID_a": NEGATIVE}) + other})
    with pytest.raises(SourceError, match=r"2 label lines contradict.*ID_a \(any\), ID_a \(subdural\)"):
        rsna.read_labels(listing, None)
    labels = rsna.read_labels(listing, None, LabelRules(allow_contradictions=True))
    assert labels.values.tolist() == [[0, 0, 0, 0, UNKNOWN, UNKNOWN]]
    assert labels.contradicted.to_pylist() == ["ID_a"]


def test_a_uid_may_hold_underscores_and_class_names(tmp_path: Path) -> None:
    listing = tree(tmp_path, {SLICE: "", "train.csv": long_csv({"ID_any_subdural": NEGATIVE})})
    assert rsna.read_labels(listing, None).keys.to_pylist() == ["ID_any_subdural"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "Expected one label file .* found none"),
        ({"stage_2_sample_submission.csv": SAMPLE}, "Expected one label file .* found none"),
        ({"a.csv": long_csv({"ID_a": NEGATIVE}), "b.csv": long_csv({"ID_a": NEGATIVE})}, r"a\.csv, .*b\.csv"),
        (
            {"a.csv": long_csv({"ID_a": NEGATIVE}), **{f"stage_{n}_sample_submission.csv": SAMPLE for n in (1, 2)}},
            r"one sample submission.*stage_1.*stage_2.*Keep only the one of the stage",
        ),
        ({"a.csv": "ID,Label\nID_a_haematoma,0\n"}, r"that of line 2 does not"),
        ({"a.csv": "ID,Label\nID_a_any,0\nID_b_any,0.5\n"}, r"found another value in line 3"),
        ({"a.csv": "ID,Label\nID_a_any,\n"}, r"found another value in line 2"),
        ({"a.csv": "ID,Label\nID_a_any,yes\n"}, "cannot be read"),
    ],
)
def test_invalid_rsna_label_files_are_refused(files: dict[str, str], message: str, tmp_path: Path) -> None:
    listing = tree(tmp_path, {SLICE: "", **files})
    with pytest.raises(SourceError, match=message):
        rsna.read_labels(listing, None)


def test_a_label_file_that_is_given_is_the_one_that_is_read(tmp_path: Path) -> None:
    given = tmp_path / "mine.csv"
    given.write_text(long_csv({"ID_a": SUBDURAL}), encoding="utf-8")
    listing = tree(tmp_path / "tree", {SLICE: "", "train.csv": long_csv({"ID_a": NEGATIVE})})
    labels = rsna.read_labels(listing, table_at(given))
    assert labels.values.tolist() == [list(SUBDURAL)]
    with pytest.raises(SourceError, match=r"gone\.csv; it cannot be read"):
        rsna.read_labels(listing, table_at(tmp_path / "gone.csv"))
    given.write_text("Image,any,subdural\nID_a,1,1\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"columns ID,Label in .*mine\.csv.* found Image,any,subdural"):
        rsna.read_labels(listing, table_at(given))


@pytest.mark.parametrize(
    ("header", "repaired"),
    [
        ({"bits_stored": 12, "signed": False, "rescale_intercept": 0.0}, True),
        ({"bits_stored": 12, "signed": False, "rescale_intercept": 1.0}, True),
        ({"bits_stored": 12, "signed": False, "rescale_intercept": -100.0}, False),
        ({"bits_stored": 12, "signed": False, "rescale_intercept": -1024.0}, False),
        ({"bits_stored": 12, "signed": True, "rescale_intercept": 0.0}, False),
        ({"bits_stored": 16, "signed": True, "rescale_intercept": 0.0}, False),
    ],
)
def test_the_sign_defect_is_detected_by_bits_sign_and_intercept(header: dict[str, object], repaired: bool) -> None:
    placed = rsna.assign(scanned([{"path": SLICE, "patient_id": "p", **header}]), "rsna")
    assert placed.repairs.to_pylist() == [[SIGN_12BIT] if repaired else []]
    assert placed.patient_id.to_pylist() == ["p"]
    assert placed.excluded_because.to_pylist() == [None]


# --- a folder and a CSV ----------------------------------------------------------------------------------------------


def test_a_folder_without_a_csv_has_no_labels(tmp_path: Path) -> None:
    listing = tree(tmp_path, {"1.dcm": "", "remarks.csv": "file,remark\n"})
    labels = folder.read_labels(listing, None)
    assert len(labels.keys) == 0
    (note,) = labels.notes
    assert "remarks.csv is not read: it has no column sop_instance_uid" in note
    assert "file, remark" in note


@pytest.mark.parametrize("key", ["sop_instance_uid", "series_instance_uid"])
def test_a_csv_by_slice_or_by_series(key: str, tmp_path: Path) -> None:
    text = f"subdural,{key},any\n1,1.2.3,1\n,1.2.4,0\n0,1.2.5,\n"
    labels = folder.read_labels(tree(tmp_path, {"1.dcm": "", "labels.csv": text}), None)
    assert labels.key == key
    assert labels.keys.to_pylist() == ["1.2.3", "1.2.4", "1.2.5"]
    assert labels.values[:, RSNA_CLASSES.index("subdural")].tolist() == [1, UNKNOWN, 0]
    assert labels.values[:, RSNA_CLASSES.index("any")].tolist() == [1, 0, UNKNOWN]
    assert (labels.values[:, : RSNA_CLASSES.index("subdural")] == UNKNOWN).all()


def test_uids_that_look_like_numbers_stay_text(tmp_path: Path) -> None:
    text = "sop_instance_uid,any\n1.20,1\n007,0\n"
    labels = folder.read_labels(tree(tmp_path, {"1.dcm": "", "labels.csv": text}), None)
    assert labels.keys.to_pylist() == ["1.20", "007"]


def test_a_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    text = '\ufeff"sop_instance_uid","any"\r\n"a",1\r\n'
    labels = folder.read_labels(tree(tmp_path, {"1.dcm": "", "labels.csv": text}), None)
    assert labels.keys.to_pylist() == ["a"]


def test_blanks_around_names_and_values_are_ignored(tmp_path: Path) -> None:
    listing = tree(tmp_path, {"1.dcm": "", "labels.csv": "sop_instance_uid, any\n a , 1 \n"})
    labels = folder.read_labels(listing, None)
    assert labels.keys.to_pylist() == ["a"]
    assert labels.values[0, RSNA_CLASSES.index("any")] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sop_instance_uid\na\n", "Expected label columns"),
        ("sop_instance_uid,any\na,2\n", "another value in line 2"),
        ("sop_instance_uid,any\na,0\nb,-1\n", "another value in line 3"),
        ("sop_instance_uid,any\na,maybe\n", "Expected 0, 1 or nothing"),
        ("sop_instance_uid,any\na,0\na,1\n", r"contradict.*a \(any\)"),
    ],
)
def test_invalid_label_csvs_are_refused(text: str, message: str, tmp_path: Path) -> None:
    listing = tree(tmp_path, {"1.dcm": "", "labels.csv": text})
    with pytest.raises(SourceError, match=message):
        folder.read_labels(listing, None)


def test_an_unknown_label_column_names_the_nearest(tmp_path: Path) -> None:
    listing = tree(tmp_path, {"1.dcm": "", "labels.csv": "sop_instance_uid,subdual\na,1\n"})
    with pytest.raises(SourceError, match=r"'subdual' is unknown.*Did you mean 'subdural'"):
        folder.read_labels(listing, None)


def test_two_csvs_with_labels_are_one_too_many(tmp_path: Path) -> None:
    text = "sop_instance_uid,any\na,1\n"
    listing = tree(tmp_path, {"1.dcm": "", "one.csv": text, "two.csv": text})
    with pytest.raises(SourceError, match=r"one\.csv, .*two\.csv.*--labels"):
        folder.read_labels(listing, None)
    labels = folder.read_labels(listing, table_at(tmp_path / "two.csv"))
    assert labels.keys.to_pylist() == ["a"]


def test_a_given_csv_without_a_key_is_refused(tmp_path: Path) -> None:
    listing = tree(tmp_path, {"1.dcm": ""})
    (tmp_path / "mine.csv").write_text("who,any\na,1\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"Expected a column sop_instance_uid, series_instance_uid.*who, any"):
        folder.read_labels(listing, table_at(tmp_path / "mine.csv"))


def test_a_folder_assigns_every_slice_to_training() -> None:
    placed = folder.assign(scanned([{"path": "a/test/1", "patient_id": "p"}, {"path": "2"}]), "tree")
    assert placed.subset.to_pylist() == ["train", "train"]
    assert placed.patient_id.to_pylist() == ["p", None]
    assert placed.repairs.to_pylist() == [[], []]
    assert placed.excluded_because.to_pylist() == [None, None]


# --- CQ500 -----------------------------------------------------------------------------------------------------------

CQ500_SLICE = "CQ500CT0 CQ500CT0/Unknown Study/CT Plain/CT000000.dcm"


def reads_csv(subjects: dict[str, dict[str, Sequence[object]]]) -> str:
    """Return reads.csv; a finding maps to the votes of the three readers, 0 where it is not named."""
    shorts = list(cq500.COLUMNS.values())
    header = ["name", "Category", *[f"{reader}:{short}" for reader in READERS for short in shorts]]
    lines: list[list[object]] = [
        [name, "B1", *[votes.get(short, (0, 0, 0))[reader] for reader in range(3) for short in shorts]]
        for name, votes in subjects.items()
    ]
    return "\n".join(",".join(str(value) for value in line) for line in [header, *lines]) + "\n"


def test_two_of_three_readers_make_a_label(tmp_path: Path) -> None:
    text = reads_csv(
        {
            "CQ500-CT-7": {"ICH": (1, 1, 0), "SDH": (1, 0, 1), "SAH": (1, 0, 0)},
            "CQ500-CT-0": {"ICH": (1, 1, 1), "IPH": (1, 0, 0), "IVH": (0, 1, 0), "EDH": (0, 0, 1)},
            "CQ500-CT-12": {"ICH": (0, 0, 1)},
        }
    )
    labels = cq500.read_labels(tree(tmp_path, {CQ500_SLICE: "", "reads.csv": text}), None)
    assert labels.key == "subject"
    assert labels.keys.to_pylist() == ["CQ500-CT-7", "CQ500-CT-0", "CQ500-CT-12"]
    assert labels.values.tolist() == [list(SUBDURAL), [0, 0, 0, 0, 0, 1], list(NEGATIVE)]
    assert fill_any(labels).values.tolist() == labels.values.tolist()
    assert labels.notes == ()


def test_a_subtype_by_majority_without_ich_raises_any(tmp_path: Path) -> None:
    text = reads_csv({"CQ500-CT-1": {"ICH": (1, 0, 0), "SDH": (1, 1, 0)}})
    labels = cq500.read_labels(tree(tmp_path, {CQ500_SLICE: "", "reads.csv": text}), None)
    assert labels.values.tolist() == [list(SUBDURAL)]
    assert len(labels.notes) == 1
    assert labels.notes[0].startswith("1 subjects have a subtype by majority")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,Category,R1:ICH\nCQ500-CT-0,B1,1\n", r"columns .*R3:EDH.* are missing"),
        (reads_csv({"CQ500-CT-1": {}, "CQ500CT1": {"ICH": (1, 1, 0)}}), r"contradict.*CQ500-CT-1 \(any\)"),
        (reads_csv({"CQ500-CT-1": {"ICH": (1, 1, "")}}), r"0 or 1.*R3:ICH"),
        (reads_csv({"CQ500-CT-1": {"ICH": (1, 1, 2)}}), r"0 or 1.*R3:ICH"),
        (reads_csv({"CQ500-CT-1": {"ICH": (1, 1, "yes")}}), "cannot be read"),
    ],
)
def test_invalid_reads_are_refused(text: str, message: str, tmp_path: Path) -> None:
    listing = tree(tmp_path, {CQ500_SLICE: "", "reads.csv": text})
    with pytest.raises(SourceError, match=message):
        cq500.read_labels(listing, None)


def test_a_subject_given_twice_is_known_where_its_lines_agree(tmp_path: Path) -> None:
    text = reads_csv({"CQ500-CT-1": {"SDH": (1, 1, 0)}, "CQ500CT1": {"SDH": (1, 1, 1), "SAH": (1, 1, 0)}})
    listing = tree(tmp_path, {CQ500_SLICE: "", "reads.csv": text})
    labels = cq500.read_labels(listing, None, LabelRules(allow_contradictions=True))
    assert labels.keys.to_pylist() == labels.contradicted.to_pylist() == ["CQ500-CT-1"]
    assert dict(zip(RSNA_CLASSES, labels.values[0].tolist(), strict=True)) == {
        **dict.fromkeys(RSNA_CLASSES, 0),
        **{"subdural": 1, "subarachnoid": -1, "any": 1},
    }


@pytest.mark.parametrize(
    ("path", "patient_id", "subject"),
    [
        (CQ500_SLICE, "CQ500-CT-0", "CQ500-CT-0"),
        (CQ500_SLICE, None, "CQ500-CT-0"),
        ("qct03/CQ500CT31 CQ500CT31/Unknown Study/CT 5mm/CT000001.dcm", "CQ500CT31", "CQ500-CT-31"),
        ("moved/CT Plain/1.dcm", "CQ500CT031", "CQ500-CT-31"),
        ("moved/CT Plain/1.dcm", "somebody", None),
        ("1.dcm", None, None),
    ],
)
def test_a_cq500_slice_is_under_its_subject(path: str, patient_id: str | None, subject: str | None) -> None:
    placed = cq500.assign(scanned([{"path": path, "patient_id": patient_id}]), "tree")
    assert placed.subject.to_pylist() == [subject]
    assert placed.patient_id.to_pylist() == [subject]
    assert placed.subset.to_pylist() == ["train"]


PLAIN = ["CT Plain", "CT PLAIN THIN", "CT Thin Plain", "CT 55mm Plain", "CT 5mm", "CT Plain 3mm", "CT 0.625mm"]
PLAIN += ["CT PRE CONTRAST 5MM STD", "CT Plain-2"]
NOT_PLAIN = ["CT POST CONTRAST-2", "CT C", "CT C THIN", "CT CECT THIN", "CT BONE", "CT HRCT", "CT Plain +C"]
NOT_PLAIN += ["CT 4cc sec 150cc D3D on-2", "CT 3D CT HEADORBIT", "CT BONE-3"]


@pytest.mark.parametrize("kind", PLAIN + NOT_PLAIN)
def test_series_that_are_not_plain_ct_are_excluded(kind: str) -> None:
    placed = cq500.assign(scanned([{"path": f"CQ500CT0 CQ500CT0/Unknown Study/{kind}/CT000000.dcm"}]), "tree")
    (why,) = placed.excluded_because.to_pylist()
    assert (why is not None) == (kind in NOT_PLAIN)
    assert why is None or kind in why


def test_label_values_are_small_integers(tmp_path: Path) -> None:
    text = reads_csv({"CQ500-CT-0": {"ICH": (1, 1, 1)}})
    for layout, files in (
        (rsna, {SLICE: "", "train.csv": long_csv({"ID_a": NEGATIVE})}),
        (folder, {"1.dcm": "", "labels.csv": "sop_instance_uid,any\na,1\n"}),
        (cq500, {CQ500_SLICE: "", "reads.csv": text}),
    ):
        root = tmp_path / layout.__name__.rsplit(".", 1)[-1]
        labels = layout.read_labels(tree(root, files), None)
        assert labels.values.dtype == np.int8
        assert labels.values.shape == (len(labels.keys), len(RSNA_CLASSES))
