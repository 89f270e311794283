"""Label tables as people write them: separators, encodings, spellings, values, kinds of keys, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.dataset.classes import RSNA_CLASSES, UNKNOWN
from ich_prep.errors import IchError, SourceError, UsageError
from ich_prep.layouts import folder
from ich_prep.layouts.label_keys import choose_key
from ich_prep.layouts.labels import LabelOptions, LabelRules, LabelTable, join_labels
from ich_prep.sources import FolderSource, check_table_path, table_at
from ich_prep.stages import scan

ANY = RSNA_CLASSES.index("any")
PATIENT = "Mustermann-4711"  # must be in no message


def labels_of(path: Path, **options: tuple[str, ...]) -> LabelTable:
    """Return the labels of the table at ``path``, in a tree with one other file."""
    root = path.parent / "tree"
    root.mkdir(exist_ok=True)
    (root / "1.dcm").touch()
    rules = LabelRules(options=LabelOptions(**options))
    return folder.read_labels(FolderSource(root).list(), table_at(path), rules)


def written(tmp_path: Path, content: str | bytes, name: str = "labels.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def files(*lines: dict[str, str]) -> pa.Table:
    """Return a scan of files with these headers."""
    named = [{"path": f"{number}.dcm", **line} for number, line in enumerate(lines)]
    table = pa.Table.from_pylist(named, scan.SCHEMA)
    if "accession_number" not in table.column_names:
        numbers = [line.get("accession_number") for line in named]
        table = table.append_column("accession_number", pa.array(numbers, pa.string()))
    return table


# --- forms -----------------------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[pandas.DataFrame, Path], None]] = {
    "comma.csv": lambda table, path: table.to_csv(path, index=False),
    "semicolon.csv": lambda table, path: table.to_csv(path, index=False, sep=";"),
    "tab.tsv": lambda table, path: table.to_csv(path, index=False, sep="\t"),
    "index.tsv": lambda table, path: table.to_csv(path, sep="\t"),
    "bom.csv": lambda table, path: table.to_csv(path, index=False, encoding="utf-8-sig"),
    "utf16.csv": lambda table, path: table.to_csv(path, index=False, encoding="utf-16", sep="\t"),
    "cp1252.csv": lambda table, path: table.to_csv(path, index=False, encoding="cp1252", sep=";"),
    "crlf.csv": lambda table, path: table.to_csv(path, index=False, lineterminator="\r\n"),
    "cr.csv": lambda table, path: table.to_csv(path, index=False, lineterminator="\r", quoting=1),
    "quoted.csv": lambda table, path: table.to_csv(path, index=False, quoting=1),
    "table.parquet": lambda table, path: table.to_parquet(path, index=False),
    "index.parquet": lambda table, path: table.set_index("SOP Instance UID", drop=False).to_parquet(path),
    "table.xlsx": lambda table, path: table.to_excel(path, index=False),
    "workbook.csv": lambda table, path: _write_workbook(table, path),  # noqa: PLW0108 - defined below
}


def _write_workbook(table: pandas.DataFrame, path: Path) -> None:
    table.to_excel(path.with_suffix(".xlsx"), index=False)
    path.with_suffix(".xlsx").rename(path)


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_of_a_table_gives_the_same_labels(name: str, tmp_path: Path) -> None:
    table = pandas.DataFrame(
        {
            "SOP Instance UID": ["1.2.30", "1.2.4.dcm", " 1.2.5 "],
            "Größe, Befund": ["klein;\nunklar", "“groß”", None],
            "any": [1.0, None, 0.0],  # as pandas has a column with a gap
            "Subdural": [1, 0, 0],
        }
    )
    WRITERS[name](table, tmp_path / name)
    labels = labels_of(tmp_path / name)
    assert labels.key == "sop_instance_uid" and labels.level == "slice"
    assert labels.keys.to_pylist() == ["1.2.30", "1.2.4", "1.2.5"]
    assert labels.values[:, ANY].tolist() == [1, UNKNOWN, 0]
    assert labels.values[:, RSNA_CLASSES.index("subdural")].tolist() == [1, 0, 0]
    (note,) = [note for note in labels.notes if "other column" in note]
    assert "Größe, Befund" in note


def test_a_utf16_table_of_either_byte_order(tmp_path: Path) -> None:
    text = "\ufeffsop_instance_uid;any\r\n1.2;1\r\n"
    for name in ("utf-16-le", "utf-16-be"):
        labels = labels_of(written(tmp_path, text.encode(name)))
        assert labels.keys.to_pylist() == ["1.2"]


def test_the_line_that_tells_excel_the_separator_is_not_the_header(tmp_path: Path) -> None:
    assert labels_of(written(tmp_path, "sep=;\nPatientID;any\nA, B;1\n")).keys.to_pylist() == ["A, B"]


def test_blank_lines_are_skipped_and_lines_are_counted_in_the_file(tmp_path: Path) -> None:
    start = '\n\nPatientID,any,remark\nA,1,"two\nlines"\n\n,,\n  \n'
    assert labels_of(written(tmp_path, start + "B,0,\n")).keys.to_pylist() == ["A", "B"]
    with pytest.raises(SourceError, match=r"column any of .*another value in line 10\."):
        labels_of(written(tmp_path, start + "B,0,\nC,maybe,\n"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(word, 1) for word in ("1", "1.0", "1.", "1.000", " 1 ", "true", "TRUE", "Yes", "y", "ja", "WAHR")],
        *[(word, 0) for word in ("0", "0.0", "0.", " 0", "false", "False", "NO", "n", "nein", "FALSCH")],
        *[(word, UNKNOWN) for word in ("", " ", "NA", "N/A", "n/a", "nan", "NaN", "null", "None", "#N/A", "<NA>")],
        *[(word, None) for word in ("2", "-1", "0.5", "1.01", "10", "unclear", "?", "x", "00", "1e0", "9" * 5000)],
    ],
)
def test_values(value: str, expected: int | None, tmp_path: Path) -> None:
    path = written(tmp_path, f"SOPInstanceUID,any\n1.2,{value}\n")
    if expected is None:
        with pytest.raises(SourceError, match=r"Expected 0, 1 or nothing .* column any of .* line 2") as error:
            labels_of(path)
        assert len(str(error.value)) < 1000 and (value not in str(error.value).split("found")[1] or len(value) == 1)
    else:
        assert labels_of(path).values[:, ANY].tolist() == [expected]


def test_decimal_commas_are_numbers_where_the_separator_is_another(tmp_path: Path) -> None:
    assert labels_of(written(tmp_path, "sop_uid;any\n1;1,0\n2;0,0\n")).values[:, ANY].tolist() == [1, 0]


@pytest.mark.parametrize(
    "text", ["'1.2.3'", '"""1.2.3"""', '"=""1.2.3"""', "'1.2.3", " 1.2.3 ", "1.2.3.dcm", "1.2.3.DCM"]
)
def test_what_programs_put_around_uids_is_removed(text: str, tmp_path: Path) -> None:
    assert labels_of(written(tmp_path, f"sop_instance_uid,any\n{text},1\n")).keys.to_pylist() == ["1.2.3"]


# --- keys ------------------------------------------------------------------------------------------------------------

SPELLINGS = {
    "sop_instance_uid": ["sop_instance_uid", "SOPInstanceUID", "SOP Instance UID", "sop-instance-uid", "SOP_UID"],
    "series_instance_uid": ["SeriesInstanceUID", "Series Instance UID", "seriesuid", "Series Instance UID (0020,000E)"],
    "study_instance_uid": ["StudyInstanceUID", "StudyUID", "study uid"],
    "accession_number": ["AccessionNumber", "accession", "Accession No."],
    "patient_id": ["PatientID", "Patient ID", "patient_id", "PATIENT-ID", "(0010,0020)"],
}
LEVELS = {
    "sop_instance_uid": "slice",
    "series_instance_uid": "series",
    "study_instance_uid": "study",
    "accession_number": "study",
    "patient_id": "patient",
}


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in SPELLINGS.items() for name in names])
def test_a_key_in_any_spelling(key: str, name: str, tmp_path: Path) -> None:
    labels = labels_of(written(tmp_path, f'"{name}";Any\nk1;1\nk2;0\n'))
    assert (labels.key, labels.level) == (key, LEVELS[key])
    chosen = choose_key(labels, files({key: "k2"}, {key: "k1"}))
    assert chosen.key == key
    assert join_labels(chosen, pa.array(["k2", "k1"])).values[:, ANY].tolist() == [0, 1]


@pytest.mark.parametrize("text", ["patient_id=Fallnummer", "Fallnummer=patient_id", "PatientID=fall nummer"])
def test_a_key_that_is_named(text: str, tmp_path: Path) -> None:
    path = written(tmp_path, "Fallnummer,any\nA,1\n")
    with pytest.raises(SourceError, match="--label-key"):
        labels_of(path)
    assert labels_of(path, key=(text,)).key == "patient_id"


def test_the_finest_key_that_matches_files_is_chosen(tmp_path: Path) -> None:
    path = written(tmp_path, "SOPInstanceUID,StudyInstanceUID,PatientID,any\n1.1,2.1,A,1\n1.2,2.1,A,1\n1.3,2.2,B,0\n")
    labels = labels_of(path)
    slices = files({"sop_instance_uid": "1.1", "study_instance_uid": "2.1", "patient_id": "A"})
    assert choose_key(labels, slices).keys.to_pylist() == ["1.1", "1.2", "1.3"]
    renamed = choose_key(labels, files({"sop_instance_uid": "9.1", "study_instance_uid": "2.1", "patient_id": "A"}))
    assert (renamed.key, renamed.keys.to_pylist()) == ("study_instance_uid", ["2.1", "2.2"])
    assert renamed.values[:, ANY].tolist() == [1, 0]
    assert any("joined by study_instance_uid" in note for note in renamed.notes)
    by_choice = choose_key(labels_of(path, key=("patient_id",)), slices)
    assert (by_choice.key, by_choice.keys.to_pylist()) == ("patient_id", ["A", "B"])


def test_lines_of_a_coarse_key_that_contradict_each_other(tmp_path: Path) -> None:
    path = written(tmp_path, f"SOPInstanceUID,PatientID,any\n1.1,{PATIENT},1\n1.2,{PATIENT},0\n")
    by_slice = files({"sop_instance_uid": "1.1", "patient_id": PATIENT})
    assert len(choose_key(labels_of(path), by_slice).keys) == 2
    with pytest.raises(SourceError, match=r"1 label lines contradict .*any in line 2 of") as error:
        choose_key(labels_of(path), files({"sop_instance_uid": "9", "patient_id": PATIENT}))
    assert PATIENT not in str(error.value)


def test_a_line_whose_finer_key_is_another_patients_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, f"SOPInstanceUID,PatientID,any\n1.1,A,1\n1.2,{PATIENT},0\n1.3,,0\n")
    headers = [{"sop_instance_uid": f"1.{n}", "patient_id": name} for n, name in ((1, "A"), (2, "B"), (3, "C"))]
    with pytest.raises(
        SourceError, match=r"^1 line of .*line 3: it has the sop_instance_uid of 1\.dcm, and another pat"
    ) as e:
        choose_key(labels_of(path), files(*headers))
    assert PATIENT not in str(e.value)
    assert len(choose_key(labels_of(path, ignore=("PatientID",)), files(*headers)).keys) == 3
    # A file without a patient contradicts nobody.
    assert len(choose_key(labels_of(path), files(headers[0], {"sop_instance_uid": "1.2"})).keys) == 3


def test_ids_that_became_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, "PatientID,any\n12345.0,1\n678.0,0\n")
    as_written = choose_key(labels_of(path), files({"patient_id": "12345.0"}, {"patient_id": "12345"}))
    assert as_written.keys.to_pylist() == ["12345.0", "678.0"] and not as_written.notes
    changed = choose_key(labels_of(path), files({"patient_id": "12345"}))
    assert changed.keys.to_pylist() == ["12345", "678"]
    assert "2 values of patient_id" in changed.notes[0]
    # Leading zeros are not guessed, but said.
    missing = choose_key(labels_of(path), files({"patient_id": "00012345"}))
    assert missing.keys.to_pylist() == ["12345.0", "678.0"]
    assert "leading zeros" in missing.notes[0] and "12345" not in missing.notes[0]


def test_numbers_of_a_typed_table_are_ids_as_integers(tmp_path: Path) -> None:
    table = pandas.DataFrame({"PatientID": [12345, 678], "any": [True, False]})
    for name in ("t.parquet", "t.xlsx"):
        WRITERS["table." + name[2:]](table, tmp_path / name)
        labels = labels_of(tmp_path / name)
        assert labels.keys.to_pylist() == ["12345", "678"]
        assert labels.values[:, ANY].tolist() == [1, 0]


def test_labels_without_a_key_are_an_error_and_empty_lines_are_not(tmp_path: Path) -> None:
    assert labels_of(written(tmp_path, "PatientID,any\nA,1\n,\n,NA\n")).keys.to_pylist() == ["A"]
    with pytest.raises(SourceError, match=r"1 line of .* with labels and without patient_id, among them line 3"):
        labels_of(written(tmp_path, "PatientID,any\nA,1\n,1\n"))


# --- columns ---------------------------------------------------------------------------------------------------------


def test_a_column_may_be_named_as_a_class(tmp_path: Path) -> None:
    path = written(tmp_path, "PatientID,Blutung,Epidural ,note\nA,ja,0,x\n")
    labels = labels_of(path, column=("any=blutung",))
    assert labels.values[0].tolist() == [0, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, 1]
    assert [note for note in labels.notes if note.endswith("not read: note")]
    with pytest.raises(UsageError, match=r"'hemorrhage' is no class"):
        labels_of(path, column=("hemorrhage=Blutung",))
    with pytest.raises(UsageError, match=r"no column 'Blutug'.*Did you mean 'Blutung'"):
        labels_of(path, column=("any=Blutug",))


@pytest.mark.parametrize(
    "name", ["subdual", "Sub-dural2", "subdurall", "sub dual", "subdural_hemorrhage", "ANNY", "nay"]
)
def test_a_name_close_to_that_of_a_class_is_an_error(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"PatientID,epidural,{name}\nA,0,1\n")
    with pytest.raises(SourceError, match=r"Did you mean '(subdural|any)'"):
        labels_of(path)
    for ignored in (name, "all"):
        assert labels_of(path, ignore=(ignored,)).values[0, 0] == 0


@pytest.mark.parametrize("name", ["age", "PatientName", "remarks", "day", "hospital", "slice_thickness", "volume_ml"])
def test_other_names_are_ignored_with_a_note(name: str, tmp_path: Path) -> None:
    labels = labels_of(written(tmp_path, f"PatientID,any,{name}\nA,0,{PATIENT}\n"))
    (note,) = labels.notes
    assert name in note and PATIENT not in note


def test_columns_to_keep_have_types_and_names(tmp_path: Path) -> None:
    text = "PatientID;any;Age;Größe (cm);sex;code;when;huge\nA;1;63;1.75;F;007;NA;" + "9" * 5000 + "\nB;0;;2;m;1;;1\n"
    names = ("age,Größe (cm)", "sex", "code", "when", "huge")
    labels = labels_of(written(tmp_path, text), keep=names)
    assert labels.extra is not None
    kinds = {field.name: field.type for field in labels.extra.schema}
    strings = dict.fromkeys(("x_sex", "x_code", "x_when", "x_huge"), pa.string())
    assert kinds == {"x_age": pa.int64(), "x_groe_cm": pa.float64(), **strings}
    assert labels.extra.select(["x_age", "x_sex", "x_code", "x_when"]).to_pylist() == [
        {"x_age": 63, "x_sex": "F", "x_code": "007", "x_when": None},
        {"x_age": None, "x_sex": "m", "x_code": "1", "x_when": None},
    ]
    joined = join_labels(labels, pa.array(["B", "unknown", "A"]))
    assert joined.extra is not None and joined.extra["x_age"].to_pylist() == [None, None, 63]
    with pytest.raises(UsageError, match="no column 'weight'"):
        labels_of(tmp_path / "labels.csv", keep=("weight",))


def test_subset_and_fold_of_a_table(tmp_path: Path) -> None:
    labels = labels_of(written(tmp_path, "PatientID,any,Subset,FOLD\nA,1,train,3.0\nB,0,TEST,\nC,1,,0\n"))
    assert labels.subset is not None and labels.fold is not None
    assert labels.subset.to_pylist() == ["train", "test", None]
    assert labels.fold.tolist() == [3, -1, 0] and labels.fold.dtype == np.int8
    joined = join_labels(labels, pa.array(["C", "unknown"]))
    assert joined.subset is not None and joined.subset.to_pylist() == [None, None]
    assert joined.fold is not None and joined.fold.tolist() == [0, -1]
    for column, value in (
        ("subset", "validation"),
        ("fold", "-1"),
        ("fold", "127"),
        ("fold", "2.5"),
        ("fold", "9" * 5000),
    ):
        with pytest.raises(SourceError, match=f"Expected .* in column {column} of .* line 2") as error:
            labels_of(written(tmp_path, f"PatientID,any,{column}\nA,1,{value}\n"))
        assert len(str(error.value)) < 500
    with pytest.raises(SourceError, match=r"contradict.*subset in line"):
        labels_of(written(tmp_path, "PatientID,any,subset\nA,1,train\nA,1,test\n"))


def test_what_a_table_brings_is_in_its_digest(tmp_path: Path) -> None:
    texts = ("A,1,63,train,1", "A,1,64,train,1", "A,1,63,test,1", "A,1,63,train,2", "A,0,63,train,1", "B,1,63,train,1")
    digests = {
        labels_of(written(tmp_path, f"PatientID,any,age,subset,fold\n{text}\n"), keep=("age",)).digest()
        for text in texts
    }
    assert len(digests) == len(texts)


# --- what is refused -------------------------------------------------------------------------------------------------

BROKEN: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n \n\n",
    "zero bytes": b"\0" * 100,
    "zero byte": b"PatientID,any\nA\0,1\n",
    "utf-16 without a mark": "PatientID,any\nA,1\n".encode("utf-16-le"),
    "utf-32": "PatientID,any\nA,1\n".encode("utf-32"),
    "no encoding": b"PatientID,any\n\x81\x8d,1\n",
    "long header": b"PatientID,any," + b"a" * 10_000_000 + b"\nA,1,2\n",
    "many columns": b"PatientID,any," + b",".join(b"c%d" % n for n in range(100_000)) + b"\n",
    "open quote in the header": b'PatientID,"any\nA,1\n',
    "open quote": b'PatientID,any\n"A,1\nB,1\n',
    "short line": b"PatientID,any,c\nA,1,x\n" + PATIENT.encode() + b",1\n",
    "long line": b"PatientID,any\n" + PATIENT.encode() + b",1,2\n",
    "a column twice": b"PatientID,any,any\nA,1,1\n",
    "a class in two spellings": b"PatientID,any,ANY\nA,1,1\n",
    "a key twice": b"PatientID,patient id,any\nA,A,1\n",
    "no label column": b"PatientID,age\nA,1\n",
    "no key": b"name,any\nA,1\n",
    "gzip": b"\x1f\x8b\x08\0" + b"\0" * 50,
    "old excel": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 1000,
    "a zip that is no workbook": b"PK\x03\x04" + b"\0" * 100,
    "damaged parquet": b"PAR1" + b"\0" * 100 + b"PAR1",
    "header only": b"PatientID,any\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_one_message_without_its_cells(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, BROKEN[name])
    with pytest.raises(SourceError) as error:
        labels_of(path)
    assert len(str(error.value)) < 1000
    assert str(path) in str(error.value) and PATIENT not in str(error.value)
    assert error.value.__cause__ is None


@pytest.mark.parametrize("cut", [100, 0.5, -1])
@pytest.mark.parametrize("name", ["table.xlsx", "table.parquet"])
def test_a_cut_off_table_is_one_message(name: str, cut: float, tmp_path: Path) -> None:
    WRITERS[name](pandas.DataFrame({"PatientID": ["A"], "any": [1]}), tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(cut) if abs(cut) >= 1 else int(len(data) * cut)])
    with pytest.raises(SourceError, match=r"cannot be read|damaged"):
        labels_of(tmp_path / name)


def test_a_parquet_column_of_lists_is_refused_only_if_it_is_needed(tmp_path: Path) -> None:
    table = pa.table({"PatientID": ["A"], "any": [[1]], "other": [[2]]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(SourceError, match=r"columns PatientID, any of .*cannot be read as text"):
        labels_of(tmp_path / "t.parquet")
    pq.write_table(table.set_column(1, "any", pa.array([1])), tmp_path / "t.parquet")
    assert labels_of(tmp_path / "t.parquet").values[0, ANY] == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("key", "patient", "names no key"),
        ("key", "study_instance_uid", "no such column"),
        ("key", "patient_id=age", "no column 'age'"),
        ("column", "any", "expected CLASS=COLUMN"),
        ("column", "any=", "expected CLASS=COLUMN"),
        ("ignore", "age", "no column 'age'"),
        ("keep", "age", "no column 'age'"),
    ],
)
def test_options_that_fit_no_column(option: str, value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        labels_of(written(tmp_path, "PatientID,any\nA,1\n"), **{option: (value,)})


def test_label_paths_are_checked_before_they_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    written(tmp_path, "a", "real.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    check_table_path(tmp_path / "link.csv")
    for name, message in (
        ("pipe", "pipe, socket or device"),
        (".", "found a folder"),
        ("gone.csv", "no such file"),
        ("loop", "cannot be read"),
        ("real.csv/x.csv", "no folder"),
        ("a" * 300, "cannot be read"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(SourceError, match=message):
            check_table_path(tmp_path / name)
    check_table_path(written(tmp_path, "", "archive.zip") / "labels.csv")  # its listing knows


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"PatientID,any\n", b"PAR1", b"PK\x03\x04", b"\xff\xfe", b'"']))
def test_any_bytes_are_labels_or_one_message(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes
) -> None:
    path = written(tmp_path_factory.mktemp("any"), start + data)
    try:
        labels = labels_of(path)
    except IchError as error:
        assert len(str(error)) < 2000
    else:
        assert set(np.unique(labels.values)) <= {-1, 0, 1}
        assert labels.keys.null_count == 0 and len(labels.keys) == len(labels.values)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), st.sampled_from("01")),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_ids_come_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str]], separator: str, encoding: str
) -> None:
    unique = {f"id{key}id".strip(): value for key, value in lines}
    path = tmp_path_factory.mktemp("ids") / "labels.csv"
    frame = pandas.DataFrame({"PatientID": [*unique], "any": [*unique.values()]})
    frame.to_csv(path, sep=separator, encoding=encoding, index=False, quoting=1)
    labels = labels_of(path)
    assert labels.keys.to_pylist() == [*unique]
    assert labels.values[:, ANY].tolist() == [int(value) for value in unique.values()]
