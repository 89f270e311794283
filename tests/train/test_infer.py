"""Predictions for DICOM files: those of the dataset that a build makes of them, and what is said about bad files."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import digest_of
from ich_prep.dataset.spec import Spec
from ich_prep.errors import DatasetError, UsageError
from ich_prep.phantom import synthesize
from ich_prep.scans import RenderedScans, plan_scans, render_scans
from ich_train import infer_source
from ich_train.config import SOURCE_OPTIONS, EvalConfig, PredictConfig, TrainConfig
from ich_train.infer import Answer, Predictions, predict, scan_probabilities
from ich_train.infer_source import open_source, stored_as
from ich_train.predict import Mirrored, load_predictor, predict_rows
from ich_train.runs import start
from ich_train.scan_predict import predict_scans
from ich_train.train import train
from tests.support.compressed import JPEG_LS, compressed
from tests.support.hospital import SIDE, ct_bytes, write_files
from tests.support.training_runs import save_untrained, with_classes
from tests.support.turned import write_turned

Call = Callable[..., int]
pytestmark = pytest.mark.usefixtures("one_thread")
# What a source of DICOM files does not know: labels, and what only training or a file on disk has.
NOT_RENDERED = {"fold", "fold_group", "label_level", "label_line", "chunk_crc32c"}


def new_run(folder: Path, dataset: Dataset, *, context: int = 0) -> Path:
    """A run of an untrained network for ``dataset``, with its recipe."""
    start(folder, TrainConfig(data=dataset.path, device="cpu", batch_size=8), EvalConfig(batch_size=16))
    return save_untrained(folder, dataset, context=context)


@pytest.fixture(scope="module")
def run(twelve: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_run(tmp_path_factory.mktemp("runs") / "a", open_dataset(twelve), context=1)


@pytest.fixture(scope="module")
def hospital_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for the 16 x 16 pixels of ``hospital``'s files, as HU."""
    folder = tmp_path_factory.mktemp("hospital")
    write_files(folder / "one", {"1.dcm": ct_bytes(1)})
    spec = Spec(size=SIDE, store="hu", slices_per_shard=16, layout="folder")
    build(folder / "one", folder / "one.zarr", spec, workers=0, allow=Allowances(unlabelled=True))
    return new_run(folder / "run", open_dataset(folder / "one.zarr"))


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predicted(run: Path, *src: Path, settings: Mapping[str, Any] | None = None) -> Predictions:
    """The predictions of one run for the source ``src``."""
    wanted = PredictConfig.model_validate({"src": src, **(settings or {})})
    return predict([run], open_source(infer_source.metas_of([run])[0], wanted), wanted, batch_size=16, threads=2)


def equal_tables(one: pa.Table, other: pa.Table) -> bool:
    return bool(one.combine_chunks().equals(other.combine_chunks()))


# --- a build and then predict, or predict at once ----------------------------------------------------------------------


def turned_tree(folder: Path) -> Path:
    """A tree of heads that lie in different ways."""
    synthesize(folder / "head", series=1, size=64, layout="folder", workers=0)
    files = sorted((folder / "head").rglob("*.dcm"))[:9]
    for number, turn in enumerate(("", "flip_y", "rotate_180")):
        write_turned(files[3 * number : 3 * number + 3], folder / "tree" / turn.replace("", "upright", not turn), turn)
    return folder / "tree"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"store": "hu"},
        {"size": 48, "windows": ["stroke", "blood=75/215"]},
        {"orientation": "as-stored", "store": "hu", "size": 80},
    ],
    ids=str,
)
def test_rendered_scans_are_the_dataset_that_a_build_makes(options: dict[str, Any], tmp_path: Path) -> None:
    tree = turned_tree(tmp_path)
    spec = Spec.model_validate({"size": 64, "layout": "folder", **options})
    build(tree, tmp_path / "data.zarr", spec, workers=0, allow=Allowances(unlabelled=True))
    dataset = open_dataset(tmp_path / "data.zarr")
    planned = plan_scans([tree], spec)
    rendered = render_scans(planned, spec, range(len(planned.series)), threads=3)
    assert_same(rendered, dataset)


def assert_same(rendered: RenderedScans, dataset: Dataset) -> None:
    """All that DICOM files say is equal: pixels, tables, filters and geometry."""
    assert len(rendered) == len(dataset)
    rows = np.flatnonzero(dataset.is_ok)
    assert np.array_equal(rendered.is_ok, dataset.is_ok)
    assert np.array_equal(rendered.read(rows), dataset.read(rows))
    for name in ("slices", "series"):
        one, other = getattr(rendered, name), getattr(dataset, name)
        assert one.schema.equals(other.schema)
        names = [column for column in other.column_names if column not in {*NOT_RENDERED, *dataset.classes}]
        assert equal_tables(one.select(names), other.select(names)), name
    assert (rendered.labels == -1).all()
    assert np.array_equal(rendered.where("hu_max > 500"), dataset.where("hu_max > 500"))
    for series in range(len(dataset.series)):
        assert np.array_equal(rendered.volume(series_row=series), dataset.volume(series_row=series))
        assert np.array_equal(rendered.affine(series), dataset.affine(series))


def test_reading_rendered_scans_fails_as_reading_a_dataset_does(twelve_tree: Path, twelve: Path) -> None:
    dataset = open_dataset(twelve)
    planned = plan_scans([twelve_tree], Spec(size=32))
    rendered = render_scans(planned, dataset.spec, range(1, 3))
    for rows, error in (([len(rendered)], IndexError), ([-1], IndexError), (["1"], TypeError)):
        with pytest.raises(error):
            rendered.read(rows)  # type: ignore[arg-type]
    first = int(dataset.series["first_row"][1].as_py())
    assert np.array_equal(rendered.read([4, 0, 4]), dataset.read([first + 4, first, first + 4]))
    with pytest.raises(ValueError, match="Expected out to be"):
        rendered.read([0], out=np.empty((2, *rendered.shape[1:]), rendered.dtype))


def test_probabilities_are_those_of_the_dataset_bit_for_bit(
    call: Call, run: Path, twelve: Path, twelve_tree: Path, tmp_path: Path
) -> None:
    shutil.make_archive(str(tmp_path / "rsna"), "zip", twelve_tree.parent, "rsna")
    sources = {"dataset": twelve, "folder": twelve_tree, "zip": tmp_path / "rsna.zip"}
    found = {}
    for name, src in sources.items():
        out, scans = tmp_path / f"{name}.parquet", tmp_path / f"{name}-scans.parquet"
        assert call("predict", run, "--src", src, "--out", out, "--scans", scans) == 0
        found[name] = (pq.read_table(out), pq.read_table(scans))
    for name in ("folder", "zip"):
        for one, other in zip(found[name], found["dataset"], strict=True):
            assert equal_tables(one, other), name
    dataset = open_dataset(twelve)
    predictor = load_predictor(run, dataset, device="cpu")
    expected = predict_rows(
        predictor.model, predictor.preprocess, dataset, np.arange(len(dataset)), context=1, batch_size=16, threads=2
    )
    slices = found["folder"][0]
    assert np.array_equal(np.stack([slices[name].to_numpy() for name in dataset.classes], axis=1), expected)
    assert slices["sop_instance_uid"].to_pylist() == dataset.slices["sop_instance_uid"].to_pylist()


@pytest.mark.parametrize("kind", ["gru", "attention"])
def test_a_network_that_reads_whole_scans_predicts_files_as_the_dataset_bit_for_bit(
    kind: str, twelve: Path, twelve_tree: Path, tmp_path: Path
) -> None:
    dataset = open_dataset(twelve)
    config = TrainConfig(data=twelve, device="cpu", batch_size=8, head=kind, head_size=16, context=1, epochs=1)
    train(dataset, tmp_path / "run", config, None, console=Console(file=io.StringIO()))
    one, other = predicted(tmp_path / "run", twelve), predicted(tmp_path / "run", twelve_tree)
    assert equal_tables(one.scans, other.scans)
    assert equal_tables(one.slices.drop_columns("label_line"), other.slices.drop_columns("label_line"))
    expected = predict_scans(
        load_predictor(tmp_path / "run", dataset, device="cpu"), dataset, np.arange(len(dataset.series)), threads=2
    )
    assert np.array_equal(one.matrix(), expected.of_rows(np.arange(len(dataset))))
    assert np.array_equal(np.stack([one.scans[name].to_numpy() for name in one.classes], axis=1), expected.scans)
    # The answer for a scan is that of the head, not an aggregate of its slices, and a filter does not change it.
    some = predicted(tmp_path / "run", twelve_tree, settings={"where": "slice_index != 2"})
    assert len(some.slices) == len(one.slices) - len(one.scans)
    assert equal_tables(some.scans.select(one.classes), one.scans.select(one.classes))


def test_blocks_of_a_source_have_the_rows_of_the_whole(
    run: Path, twelve: Path, twelve_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predicted(run, twelve)
    monkeypatch.setattr(infer_source, "BLOCK_BYTES", 100 * 3 * 32 * 32)  # two or three volumes
    by_blocks = predicted(run, twelve_tree)
    assert len([*infer_source.blocks(open_dataset(twelve), infer_source.metas_of([run]), 1)]) > 3
    assert equal_tables(
        by_blocks.slices, predicted(run, twelve).slices.set_column(5, "label_line", by_blocks.slices["label_line"])
    )
    names = [name for name in whole.slices.column_names if name not in (*whole.classes, "label_line")]
    assert equal_tables(by_blocks.slices.select(names), whole.slices.select(names))
    np.testing.assert_allclose(by_blocks.matrix(), whole.matrix(), atol=1e-6)


def test_a_filter_selects_the_same_slices_of_files_and_dataset(run: Path, twelve: Path, twelve_tree: Path) -> None:
    settings = {"where": "subset == 'test' and position_mm > -400 or slice_index < 3"}
    one, other = predicted(run, twelve, settings=settings), predicted(run, twelve_tree, settings=settings)
    assert 0 < len(one.slices) < len(open_dataset(twelve))
    assert equal_tables(one.slices.drop_columns("label_line"), other.slices.drop_columns("label_line"))
    assert equal_tables(one.scans, other.scans)
    few = predicted(run, twelve_tree, settings={"where": "slice_index < 3"}).scans
    numbers = zip(few["n_slices"].to_pylist(), few["no_call"].to_pylist(), strict=True)
    assert all(
        why == f"only 3 of {n} slices could be predicted; the filter leaves out {n - 3}" for n, why in numbers if n > 6
    )
    assert few["any"].null_count == sum(n > 6 for n in few["n_slices"].to_pylist())
    with pytest.raises(UsageError, match=r"--where 'slice_index > 999' selects no slice of"):
        predicted(run, twelve_tree, settings={"where": "slice_index > 999"})


def test_a_dataset_is_predicted_without_what_reads_dicom(run: Path, twelve: Path, tmp_path: Path) -> None:
    words = ["predict", str(run), "--src", str(twelve), "--out", str(tmp_path / "x.csv")]
    program = (
        f"import sys; sys.argv = ['ich-train', *{words!r}]\n"
        "from ich_train.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'pydicom', 'cv2', 'dask', 'zarr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert len(read_table(tmp_path / "x.csv")) == len(open_dataset(twelve))


# --- scans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", ["max", "top3", "mean"])
def test_a_scan_has_the_aggregate_of_its_slices(run: Path, twelve_tree: Path, aggregate: str) -> None:
    found = predicted(run, twelve_tree, settings={"aggregate": aggregate})
    combine = {
        "max": lambda values: values.max(axis=0),
        "top3": lambda values: (
            np.mean(sorted(values.astype(np.float64), reverse=True)[:3])
            if values.ndim == 1
            else np.stack([np.mean(sorted(column.astype(np.float64))[-3:]) for column in values.T])
        ),
        "mean": lambda values: values.astype(np.float64).mean(axis=0),
    }[aggregate]
    of_slice = found.slices["series_row"].to_numpy()
    assert found.scans["series_row"].to_pylist() == [*range(12)]
    for line in found.scans.to_pylist():
        values = found.matrix()[of_slice == line["series_row"]]
        assert [line[name] for name in found.classes] == pytest.approx(combine(values), abs=1e-7)


def test_networks_that_see_scans_are_averaged_with_those_that_see_slices() -> None:
    one = Answer(np.array([[0.2], [0.4], [0.6]], np.float32), None)
    two = Answer(np.array([[0.4], [0.2], [0.2]], np.float32), None)
    scans = Answer(np.array([[0.1], [0.1], [0.1]], np.float32), np.array([[0.9], [0.0]], np.float32))
    scan_of = np.array([0, 0, 4])
    mean = np.array([[0.3], [0.3], [0.4]], np.float32)
    assert scan_probabilities([one, two], mean, scan_of, "max") == pytest.approx(np.array([[0.3], [0.4]]))
    assert scan_probabilities([scans], mean, scan_of, "max") == pytest.approx(np.array([[0.9], [0.0]]))
    mixed = scan_probabilities([one, two, scans], mean, scan_of, "max")
    assert mixed == pytest.approx(np.array([[(0.3 + 0.3 + 0.9) / 3], [(0.4 + 0.4 + 0.0) / 3]]))


def slices(numbers: Sequence[int], **attributes: Any) -> dict[str, bytes]:
    """Files of a series: one for each of the ``numbers``, which are also their positions in mm."""
    return {f"{number:03}.dcm": ct_bytes(number, **attributes) for number in numbers}


def below(folder: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in files.items()}


@pytest.mark.parametrize(("broken", "called"), [(0, True), (5, True), (6, False), (10, False)])
def test_a_scan_with_fewer_than_half_of_its_slices_gets_no_call(
    call: Call, hospital_run: Path, tmp_path: Path, broken: int, called: bool
) -> None:
    files = slices(range(10))
    for name in sorted(files)[:broken]:
        files[name] = files[name][:-100]  # the header says that there is more
    write_files(tmp_path / "src", below("a", files) | below("b", slices([20, 21], SeriesInstanceUID="1.2.9")))
    assert (
        call("predict", hospital_run, "--src", "src", "--out", "x.csv", "--scans", "s.csv", "--quarantine", "q.csv")
        == 0
    )
    lines = {line["series_instance_uid"]: line for line in read_table(tmp_path / "s.csv")}
    line = lines["1.2.2"]
    assert (line["any"] != "") == called
    assert (int(line["n_slices"]), int(line["n_damaged"])) == (10 - broken, broken)
    assert line["no_call"] == (
        "" if called else "no slice could be predicted" if broken == 10 else "only 4 of 10 slices could be predicted"
    )
    assert lines["1.2.9"]["any"] != ""
    found = read_table(tmp_path / "x.csv")
    assert all(one["any"] for one in found)
    assert len(found) == 12 - broken
    quarantined = read_table(tmp_path / "q.csv")
    assert {one["reason"] for one in quarantined} == ({"truncated"} if broken else set())
    assert {one["series_instance_uid"] for one in quarantined} == ({"1.2.2"} if broken else set())


@pytest.mark.parametrize("whole", [3, 0])
@pytest.mark.parametrize("differing", ["PatientID", "StudyInstanceUID"])
def test_damage_counts_for_the_volume_that_the_headers_name(
    call: Call, hospital_run: Path, tmp_path: Path, differing: str, whole: int
) -> None:
    """A de-identifier gave two patients, or two studies, one series UID; most files of the second are cut off."""
    second = {"a": slices(range(10)), "b": slices(range(30, 60), **{differing: "1.2.77"})}
    for name in sorted(second["b"])[whole:]:
        second["b"][name] = second["b"][name][:-100]
    write_files(tmp_path / "src", below("a", second["a"]) | below("b", second["b"]))
    assert call("predict", hospital_run, "--src", "src", "--out", "x.csv", "--scans", "s.csv") == 0
    column = "patient_id" if differing == "PatientID" else "study_instance_uid"
    other, one = sorted(read_table(tmp_path / "s.csv"), key=lambda line: line[column] != "1.2.77")
    assert (one["n_slices"], one["n_damaged"], one["no_call"]) == ("10", "0", "")
    assert (other["n_slices"], other["n_damaged"]) == (str(whole), str(30 - whole))
    assert other["no_call"] and not other["any"]
    assert other[column] == "1.2.77"


def test_damage_counts_for_the_series_if_every_file_has_an_identifier_of_its_own(
    call: Call, hospital_run: Path, tmp_path: Path
) -> None:
    files = {f"{n:03}.dcm": ct_bytes(n, PatientID=f"P{n}", StudyInstanceUID=f"1.9.{n}") for n in range(10)}
    for name in sorted(files)[:6]:
        files[name] = files[name][:-100]
    write_files(tmp_path / "src", files)
    assert call("predict", hospital_run, "--src", "src", "--out", "x.csv", "--scans", "s.csv") == 0
    (scan,) = read_table(tmp_path / "s.csv")
    assert (scan["n_damaged"], scan["no_call"]) == ("6", "only 4 of 10 slices could be predicted")


def test_a_slice_whose_pixels_do_not_decode_is_named_and_has_no_probability(
    call: Call, hospital_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: compressed(data, JPEG_LS) for name, data in slices(range(3)).items()}
    codestream = files["001.dcm"].index(b"\xff\xd8\xff")
    files["001.dcm"] = files["001.dcm"][:codestream] + bytes(len(files["001.dcm"]) - codestream)
    write_files(tmp_path / "src", files)
    words = ["--scans", "s.csv", "--quarantine", "q.csv"]
    assert call("predict", hospital_run, "--src", "src", "--out", "x.csv", *words) == 0
    lines = read_table(tmp_path / "x.csv")
    assert [(line["status"], line["any"] != "") for line in lines] == [
        ("ok", True),
        ("decode_failed", False),
        ("ok", True),
    ]
    (scan,) = read_table(tmp_path / "s.csv")
    assert (scan["n_slices"], scan["n_predicted"], scan["n_damaged"], scan["no_call"]) == ("3", "2", "1", "")
    (left_out,) = read_table(tmp_path / "q.csv")
    assert (left_out["path"], left_out["reason"], left_out["series_instance_uid"]) == (
        "001.dcm",
        "decode_failed",
        "1.2.2",
    )
    assert "001.dcm: decode_failed, " in capsys.readouterr().err


def test_a_hospital_folder_is_answered_and_what_is_left_out_is_told(
    call: Call, hospital_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = slices(range(8))
    head["003.dcm"] = head["003.dcm"][:-200]
    other = slices(range(30, 36), SeriesInstanceUID="1.2.7", StudyInstanceUID="1.2.70", PatientID="P2")
    litter = {
        "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100),
        "report.pdf": b"%PDF-1.4 ...",
        "DICOMDIR": b"nothing",
        "empty.dcm": b"",
        "labels.csv": b"sop_instance_uid,any\n1.2.3.1,x\n",  # not even read
        "mr.dcm": ct_bytes(90, Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4", SeriesInstanceUID="1.2.8"),
    }
    write_files(tmp_path / "src", below("P1/head", head) | below("P2", other) | below("misc", litter))
    words = ["--scans", "s.parquet", "--quarantine", "q.csv", "--report", "r.html"]
    assert call("predict", hospital_run, "--src", "src", "--out", "out/x.csv", *words) == 0
    printed = capsys.readouterr().err
    assert "13 of 13 slices and 2 of 2 scans predicted." in printed
    assert "P1/head/003.dcm: truncated" in printed
    scans = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert [(one["series_instance_uid"], one["n_predicted"], one["n_damaged"]) for one in scans] == [
        ("1.2.2", 7, 1),
        ("1.2.7", 6, 0),
    ]
    assert scans[0]["flags"] == ["gap_before"]
    quarantined = {line["path"]: line["reason"] for line in read_table(tmp_path / "q.csv")}
    assert quarantined["P1/head/003.dcm"] == "truncated"
    assert quarantined["misc/mr.dcm"] == "not_ct"
    assert quarantined["misc/empty.dcm"] == "empty_file"
    assert quarantined["misc/Thumbs.db"] == "not_an_image"
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    for word in ("1.2.2", "gap_before", "P1/head/003.dcm", "truncated", "Research software"):
        assert word in page
    assert "<script" not in page


def test_flagged_scans_can_be_skipped(call: Call, hospital_run: Path, tmp_path: Path) -> None:
    whole = slices(range(6), PatientID=None)  # flagged as patient_is_study: no reason to skip it
    gap = slices([10, 11, 12, 20, 21], SeriesInstanceUID="1.2.5", StudyInstanceUID="1.2.50")
    write_files(tmp_path / "src", below("a", whole) | below("b", gap))
    for words, skipped in (([], False), (["--skip-flagged"], True)):
        assert call("predict", hospital_run, "--src", "src", "--out", "x.csv", "--scans", "s.csv", *words) == 0
        lines = {line["series_instance_uid"]: line for line in read_table(tmp_path / "s.csv")}
        assert lines["1.2.5"]["flags"] == "gap_before"
        assert lines["1.2.5"]["no_call"] == ("flagged: gap_before" if skipped else "")
        assert (lines["1.2.5"]["any"] == "") == skipped
        assert lines["1.2.2"]["flags"] == "patient_is_study"
        assert lines["1.2.2"]["any"] != ""
        by_series = [line["any"] for line in read_table(tmp_path / "x.csv") if line["series_instance_uid"] == "1.2.5"]
        assert [value == "" for value in by_series] == [skipped] * 5


def test_files_can_be_chosen_as_for_a_build(call: Call, hospital_run: Path, tmp_path: Path) -> None:
    head = slices(range(4), SeriesDescription="HEAD 5mm")
    bone = slices(range(10, 14), SeriesDescription="BONE thin", SeriesInstanceUID="1.2.6", BurnedInAnnotation="YES")
    other = slices(range(20, 24), SeriesInstanceUID="1.2.4", RescaleType="TBD")  # random values do not look like HU
    write_files(tmp_path / "src", below("a", head) | below("b", bone) | below("c", other))
    for words, found in (
        ([], {"1.2.2"}),
        (["--allow-burned-in", "--rescale-types", "XYZ,TBD"], {"1.2.2", "1.2.4", "1.2.6"}),
        (["--allow-burned-in", "--exclude", "SeriesDescription~head"], {"1.2.6"}),
        (["--allow-burned-in", "--include", "SeriesDescription~bone"], {"1.2.6"}),
        (["--allow-burned-in", "--one-series-per-study", "thickest"], {"1.2.2"}),
    ):
        assert call("predict", hospital_run, "--src", "src", "--out", "x.csv", *words) == 0
        assert {line["series_instance_uid"] for line in read_table(tmp_path / "x.csv")} == found, words


def test_what_chooses_files_is_declared_as_for_a_build() -> None:
    for name in SOURCE_OPTIONS:
        one, other = PredictConfig.model_fields[name], Spec.model_fields[name]
        assert (one.annotation, one.default, one.description) == (other.annotation, other.default, other.description)


# --- several runs ------------------------------------------------------------------------------------------------------


def test_runs_are_averaged_also_those_of_other_images(
    call: Call, run: Path, twelve: Path, twelve_tree: Path, tmp_path: Path
) -> None:
    build(twelve_tree, tmp_path / "hu.zarr", Spec(size=48, store="hu", folds=3), workers=0)
    other = new_run(tmp_path / "b", open_dataset(tmp_path / "hu.zarr"))
    settings = {"where": "series_row < 2"}
    one, two = predicted(run, twelve, settings=settings), predicted(other, tmp_path / "hu.zarr", settings=settings)
    words = ["--where", settings["where"], "--batch-size", 16]
    assert call("predict", run, other, "--src", twelve_tree, "--out", "x.parquet", "--scans", "s.parquet", *words) == 0
    found, scans = pq.read_table(tmp_path / "x.parquet"), pq.read_table(tmp_path / "s.parquet")
    values = np.stack([found[name].to_numpy() for name in one.classes], axis=1)
    assert not np.array_equal(one.matrix(), two.matrix())
    np.testing.assert_allclose(values, (one.matrix() + two.matrix()) / 2, atol=1e-6)
    of_slice = found["series_row"].to_numpy()
    highest = np.stack([values[of_slice == series].max(axis=0) for series in (0, 1)])
    assert np.array_equal(np.stack([scans[name].to_numpy() for name in one.classes], axis=1), highest)


def test_mirror_images_are_averaged_on_request(call: Call, run: Path, twelve: Path, tmp_path: Path) -> None:
    dataset = open_dataset(twelve)
    predictor = load_predictor(run, dataset, device="cpu")
    rows = np.arange(len(dataset))
    expected = predict_rows(
        Mirrored(predictor.model), predictor.preprocess, dataset, rows, context=1, batch_size=16, threads=2
    )
    for option, equal in (("--mirror", True), ("--no-mirror", False)):
        assert call("predict", run, "--src", twelve, "--out", "x.parquet", option) == 0
        found = pq.read_table(tmp_path / "x.parquet")
        values = np.stack([found[name].to_numpy() for name in dataset.classes], axis=1)
        assert np.array_equal(values, expected) == equal


def test_runs_that_cannot_be_averaged_are_refused(
    run: Path, twelve: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = new_run(tmp_path / "classes", with_classes(twelve, tmp_path / "c.zarr", ("fracture", "any")))
    assert call("predict", run, classes, "--src", twelve, "--out", "x.csv") == 2
    assert "cannot be averaged: they were trained on other classes, fracture, any and " in capsys.readouterr().err
    turned = shutil.copytree(run, tmp_path / "turned")
    meta = turned / "best" / "meta.json"
    document = json.loads(meta.read_text())
    document["images"]["orientation"] = "as-stored"
    meta.write_text(json.dumps({**document, "digest": digest_of(document)}))
    assert call("predict", run, turned, "--src", twelve, "--out", "x.csv") == 2
    assert "trained on other orientations of images, as-stored and patient" in capsys.readouterr().err


def test_any_classes_are_predicted_from_any_tree(run: Path, twelve: Path, twelve_tree: Path, tmp_path: Path) -> None:
    other = new_run(tmp_path / "run", with_classes(twelve, tmp_path / "c.zarr", ("fracture", "any")))
    found = predicted(other, twelve_tree, settings={"where": "series_row == 0"})
    assert found.classes == ("fracture", "any")
    assert np.isfinite(found.matrix()).all()


# --- submissions -------------------------------------------------------------------------------------------------------


def test_a_submission_can_be_made_of_dicom_files(
    call: Call, run: Path, twelve: Path, twelve_tree: Path, tmp_path: Path
) -> None:
    sample = twelve_tree / "stage_2_sample_submission.csv"
    words = ["--sample", sample, "--batch-size", 16, "--device", "cpu"]
    assert call("predict", run, "--data", twelve, "--out", "one.csv", *words) == 0
    assert call("predict", run, "--src", twelve_tree, "--format", "kaggle", "--out", "two.csv", *words) == 0
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()
    assert call("predict", run, "--src", twelve_tree, "--format", "kaggle", "--out", "three.csv") == 0
    assert sorted(line["ID"] for line in read_table(tmp_path / "three.csv")) == sorted(
        line["ID"] for line in read_table(tmp_path / "one.csv")
    )


def test_files_of_no_subset_are_all_in_a_submission(call: Call, run: Path, twelve_tree: Path, tmp_path: Path) -> None:
    files = sorted((twelve_tree / "stage_2_test").iterdir())[:3]
    (tmp_path / "flat").mkdir()
    for file in files[:2]:
        shutil.copy(file, tmp_path / "flat")
    names = [f"{file.stem}_{name}" for file in files for name in ("any", "subdural")]
    (tmp_path / "sample.csv").write_text("ID,Label\n" + "".join(f"{name},0.5\n" for name in names))
    words = ["--format", "kaggle", "--sample", "sample.csv"]
    assert call("predict", run, "--src", "flat", "--out", "x.csv", *words) == 0
    lines = {line["ID"]: float(line["Label"]) for line in read_table(tmp_path / "x.csv")}
    assert [*lines] == names
    assert lines[names[4]] == pytest.approx((lines[names[0]] + lines[names[2]]) / 2, abs=1e-6)


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--src", "nothing", "--out", "x.csv"], 1, "Expected a folder of DICOM files or a zip archive at"),
        (["--src", "empty", "--out", "x.csv"], 1, "Expected DICOM files below"),
        (["--src", "texts", "--out", "x.csv"], 1, "No CT slices: 1 file quarantined: 1 not_an_image"),
        (["--src", "cut", "--out", "x.csv"], 1, "Copy or export these files again, or point --src at axial CT."),
        (["--src", "broken.zip", "--out", "x.csv"], 1, "broken.zip"),
        (["--src", "nothing.zarr", "--out", "x.csv"], 1, "Expected a dataset at nothing.zarr; found nothing"),
        (["--src", "nothing.zarr", "--layout", "rsna", "--out", "x.csv"], 2, "--layout: for DICOM files only"),
        (["--layout", "rsna", "--out", "x.csv"], 2, "--layout: for DICOM files only"),
        (["--src", "texts", "--src", "texts", "--out", "x.csv"], 2, "names the same place twice"),
        (["--src", "texts", "--out", "x.txt"], 2, "expected a name that ends in .csv or .parquet"),
        (["--src", "texts", "--out", "x.csv", "--scans", "x.csv"], 2, "Two outputs have the same path"),
        (["--src", "texts", "--out", "x.csv", "--report", "r.pdf"], 2, "expected a name that ends in .html"),
        (["--src", "texts", "--out", "x.csv", "--scans", "texts"], 2, "expected a name that ends in"),
        (["--src", "texts", "--out", "texts/note.txt/x.csv"], 2, "is a file, not a folder"),
        (["--src", "texts", "--data", "d.zarr", "--out", "x.csv"], 2, "--src or with --data, not with both"),
        (["--src", "texts", "--out", "x.csv", "--sample", "s.csv"], 2, "--sample is for a submission"),
        (["--src", "texts", "--out", "x.csv", "--layout", "rsn"], 2, "Did you mean 'rsna'?"),
        (["--src", "s3://bucket/x", "--out", "x.csv"], 2, "is a URL"),
    ],
)
def test_bad_input_is_one_message(
    call: Call,
    hospital_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    message: str,
) -> None:
    write_files(tmp_path, {"texts/note.txt": b"hello", "broken.zip": b"PK\3\4 cut off"})
    write_files(tmp_path / "cut", {name: data[:-100] for name, data in slices(range(2)).items()})
    (tmp_path / "empty").mkdir()
    assert call("predict", hospital_run, *words) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert printed.count("Error: ") == 1
    assert not (tmp_path / "x.csv").exists()


def test_a_filter_that_is_not_valid_is_refused(
    call: Call, hospital_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path / "src", slices(range(2)))
    assert call("predict", hospital_run, "--src", "src", "--out", "x.csv", "--where", "slice_indx < 1") == 2
    assert "slice_index" in capsys.readouterr().err


def test_a_row_without_pixels_is_refused(hospital_run: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "src", slices(range(4)))
    stored = stored_as(infer_source.metas_of([hospital_run])[0].images)
    planned = plan_scans([tmp_path / "src"], Spec(**dict(stored)))
    (tmp_path / "src" / "002.dcm").write_bytes(ct_bytes(77))  # after its header was read
    rendered = render_scans(planned, stored, range(1))
    assert rendered.slices["status"].to_pylist() == ["ok", "ok", "changed", "ok"]
    assert rendered.quarantine["path"].to_pylist() == ["002.dcm"]
    assert rendered.read([0, 1, 3]).shape == (3, 1, SIDE, SIDE)
    with pytest.raises(DatasetError, match="Row 2 has the status 'changed' and no pixels"):
        rendered.read([1, 2])
