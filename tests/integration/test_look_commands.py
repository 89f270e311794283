"""The commands scan, quarantine and find: what they say is what a build does, and they change nothing else."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import series_schema
from ich_prep.dataset.spec import Spec
from ich_prep.dicom.decode import Decoder
from ich_prep.dry_run import DryRun, dry_run
from ich_prep.errors import BuildError, DatasetError, Reason, SourceError, UsageError
from ich_prep.layouts.label_template import LEVELS, label_template
from ich_prep.look_commands import write_csvs
from ich_prep.lookup import copy_quarantined, find
from ich_prep.progress import NoProgress
from ich_prep.stages.quarantined import KINDS, by_reason, kind_of, read_quarantine
from tests.support.cli import prep, working
from tests.support.hospital import ANY_LABELS, TINY, built, ct_bytes, write_files, write_labels

HEAD = {"BodyPartExamined": "HEAD", "SeriesDescription": "Kopf nativ", "SliceThickness": "5"}


def series(name: str, number: int, slices: int = 4, **attributes: Any) -> dict[str, bytes]:
    """The files of one series of a patient and study of its own."""
    usual = {
        "PatientID": f"P{number}",
        "StudyInstanceUID": f"1.2.1.{number}",
        "SeriesInstanceUID": f"1.2.2.{number}",
        "AccessionNumber": f"ACC{number}",
    }
    return {f"{name}/{one}.dcm": ct_bytes(100 * number + one, **(HEAD | usual | attributes)) for one in range(slices)}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three series, a shared Series Instance UID, a copy, a scout, a damaged file and litter; read only."""
    chest = series("chest", 2, SeriesInstanceUID="1.2.2.1", BodyPartExamined="CHEST", SeriesDescription="Thorax")
    files = {**series("head", 1), **chest, **series("bone", 3, slices=2, SeriesDescription="Knochen \x1b[31m")}
    files["head/copy.dcm"] = files["head/0.dcm"]
    files["head/scout.dcm"] = ct_bytes(900, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], PatientID="P1")
    files["head/cut.dcm"] = ct_bytes(901, PatientID="P1")[:-200]
    files["head/.DS_Store"] = b"\0\0\0\1Bud1" + bytes(100)
    return write_files(tmp_path_factory.mktemp("hospital") / "src", files)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def cut_while_decoding(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a file lose its end after its header was read."""
    read = Decoder.read

    def changed_meanwhile(decoder: Decoder, pixels: Any) -> Any:
        os.truncate(path, 700)
        return read(decoder, pixels)

    monkeypatch.setattr(Decoder, "read", changed_meanwhile)


def looked_at(src: Path, **options: Any) -> DryRun:
    return dry_run(src, options.pop("spec", TINY), workers=0, **options)


# --- scan ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_the_build_then_does(hospital: Path, tmp_path: Path) -> None:
    before = snapshot(hospital)
    found = looked_at(hospital)
    dataset = built(hospital, tmp_path / "data.zarr", allow=Allowances(unlabelled=True, max_quarantined=1.0))
    assert snapshot(hospital) == before
    assert found.files == dataset.counts.found
    assert found.volumes.schema == series_schema()
    same = [name for name in found.volumes.column_names if name not in ("n_ok", "flags", "fold", "fold_group")]
    assert found.volumes.select(same) == dataset.series.select(same)
    assert found.quarantine == dataset.read_table("quarantine").sort_by("path")
    assert all(
        {*line} <= {*known}
        for line, known in zip(found.volumes["flags"].to_pylist(), dataset.series["flags"].to_pylist(), strict=True)
    )
    assert [(one.name, one.slices, one.volumes, one.path) for one in found.conflicts()] == [
        ("series_uid_shared", 8, 2, "chest/0.dcm")
    ]
    assert found.flags()["series_uid_shared"] == 8
    assert [stop.split(" (")[0] for stop in found.stops] == ["1 of 11 slices damaged"]


def test_the_estimate_is_of_all_slices(hospital: Path, tmp_path: Path) -> None:
    dataset = built(hospital, tmp_path / "data.zarr", allow=Allowances(unlabelled=True, max_quarantined=1.0))
    estimate = looked_at(hospital).estimate
    assert estimate.sample.slices == len(dataset) == 10
    assert estimate.uncompressed_bytes == 10 * 16 * 16 * 2
    # Every slice was in the sample: the same chunks, without the index of the shard.
    assert estimate.dataset_bytes == dataset.counts.bytes - (16 * TINY.slices_per_shard + 4)
    assert estimate.source_bytes == sum(
        (hospital / path).stat().st_size for path in looked_at(hospital).slices["path"].to_pylist()
    )
    assert estimate.slice_seconds is not None
    assert estimate.slice_seconds > 0


def test_an_archive_and_several_sources_are_looked_at_alike(hospital: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", hospital)
    found = dry_run(archive, TINY, workers=0)
    assert found.volumes == looked_at(hospital).volumes
    assert found.quarantine == looked_at(hospital).quarantine
    more = write_files(tmp_path / "more", series("late", 7))
    both = dry_run([archive, more], TINY, workers=0)
    assert sorted(both.slices["path"].to_pylist())[0] == "more/late/0.dcm"
    assert len(both.volumes) == len(found.volumes) + 1


def test_slices_of_the_sample_that_do_not_decode_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = write_files(tmp_path / "src", series("head", 1, slices=5))
    cut_while_decoding(src / "head" / "3.dcm", monkeypatch)
    sample = looked_at(src).estimate.sample
    assert [failure.split(":")[0] for failure in sample.failures] == ["head/3.dcm"]
    assert sample.slices == 5
    assert sample.bytes is not None


def test_options_choose_as_in_a_build(hospital: Path, tmp_path: Path) -> None:
    spec = TINY.model_copy(update={"include": ("BodyPartExamined=HEAD",), "min_slices": 3})
    found = looked_at(hospital, spec=spec)
    assert found.volumes["series_description"].to_pylist() == ["Kopf nativ"]
    groups = {group.reason: (group.kind, group.files) for group in by_reason(found.quarantine)}
    assert groups == {
        "truncated": ("damage", 1),
        "filtered": ("filter", 6),
        "duplicate": ("copy", 1),
        "localizer": ("not a slice", 1),
        "not_an_image": ("not a slice", 1),
    }
    dataset = built(hospital, tmp_path / "data.zarr", spec=spec, allow=Allowances(unlabelled=True, max_quarantined=1.0))
    assert dataset.read_table("quarantine").sort_by("path") == found.quarantine


def test_what_would_stop_a_build_is_told_and_the_volumes_are_listed_all_the_same(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(12):
        files |= series(f"s{number}", number, slices=1, StudyInstanceUID="1.2.77")
    src = write_files(tmp_path / "src", files)
    with pytest.raises(BuildError, match="would be in one fold") as stopped:
        build(src, tmp_path / "data.zarr", TINY, workers=0, allow=ANY_LABELS)
    found = looked_at(src)
    assert list(found.stops) == [str(stopped.value)]
    assert len(found.volumes) == 12
    assert found.volumes["fold"].null_count == 12


def test_a_source_without_a_slice_is_no_error(tmp_path: Path) -> None:
    src = write_files(tmp_path / "src", {"readme.txt": b"nothing here"})
    found = looked_at(src)
    assert (len(found.volumes), len(found.quarantine), found.conflicts()) == (0, 1, [])
    assert label_template(found.slices, found.volumes, "series", RSNA_CLASSES).table.num_rows == 0
    shown = prep("scan", src, "--workers", 0)
    assert shown.returncode == 0, shown.stderr
    assert "0 slices in 0 volumes" in shown.stdout.replace("\n", " ")
    with pytest.raises(SourceError, match="No CT slices") as stopped:
        build(src, tmp_path / "data.zarr", TINY, workers=0, allow=ANY_LABELS)
    assert found.stops == (str(stopped.value),)


def test_labels_are_counted_where_there_are_some(hospital: Path, tmp_path: Path) -> None:
    labels = write_labels(
        tmp_path / "labels.csv", "sop_instance_uid", {"1.2.3.100": [0, 1, 0, 0, 0, 1], "1.2.3.5": [0] * 6}
    )
    found = looked_at(hospital, labels=labels, allow=Allowances(max_quarantined=1.0))
    assert pc.sum(pc.equal(found.slices["label_level"], "slice")).as_py() == 1
    # The build's own two checks of labels end at the first.
    assert len(found.stops) == 1
    assert "9 slices without a label" in found.stops[0]
    assert "label_problems" not in found.stops[0]
    with pytest.raises(Exception, match="9 slices without a label"):
        build(hospital, tmp_path / "data.zarr", TINY, workers=0, labels=labels, allow=Allowances(max_quarantined=1.0))


def test_headers_in_a_working_folder_are_read_once(hospital: Path, tmp_path: Path) -> None:
    words = ["--workers", 0, "--size", 16, "--layout", "folder", "--build-dir", tmp_path / "kept.build"]
    first = prep("scan", hospital, *words)
    assert first.returncode == 0, first.stderr
    assert "resuming" not in first.stderr
    # A batch with damage is read again: only without the damaged file are the headers final.
    whole = Path(shutil.copytree(hospital, tmp_path / "whole"))
    (whole / "head" / "cut.dcm").unlink()
    words[-1] = tmp_path / "whole.build"
    assert prep("scan", whole, *words).returncode == 0
    again = prep("scan", whole, *words)
    assert "Reading headers: resuming after 13 of 13 files" in again.stderr
    assert "for headers" not in again.stdout
    done = prep("build", "--src", whole, "--out", tmp_path / "data.zarr", *words, "--allow-unlabelled")
    assert done.returncode == 0, done.stderr
    assert "Reading headers: resuming after 13 of 13 files" in done.stderr
    refused = prep("scan", whole, *words)
    assert refused.returncode == 2
    assert "that of a build that has a plan" in refused.stderr
    assert prep("verify", tmp_path / "data.zarr").returncode == 0


@pytest.mark.parametrize("inside", ["--build-dir", "--csv", "--label-template"])
def test_nothing_is_written_into_the_source(inside: str, hospital: Path) -> None:
    before = snapshot(hospital)
    done = prep("scan", hospital, "--workers", 0, inside, hospital / "new")
    assert done.returncode == 2
    assert "lies inside the source" in done.stderr
    assert snapshot(hospital) == before


def test_a_temporary_folder_inside_the_source_is_refused(
    hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = Path(shutil.copytree(hospital, tmp_path / "src"))
    monkeypatch.setattr("tempfile.tempdir", str(src / "head"))
    with pytest.raises(UsageError, match="--build-dir"):
        looked_at(src)


def test_the_tables_of_scan_fit_a_terminal_and_obey_no_header(hospital: Path, tmp_path: Path) -> None:
    words = ["--workers", 0, "--size", 16, "--layout", "folder"]
    done = prep("scan", hospital, *words, "--csv", tmp_path / "volumes.csv")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "\x1b" not in done.stdout
    for part in (
        "Kopf nativ",
        "series_uid_shared",
        "not_an_image",
        "truncated",
        "Estimate, from 10 slices",
        "No labels",
    ):
        assert part in done.stdout
    assert "A build with these options would end: 1 of 11 slices damaged" in done.stdout.replace("\n", " ")
    with (tmp_path / "volumes.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == series_schema().names
    assert sorted(line["series_description"] for line in lines) == ["Knochen \x1b[31m", "Kopf nativ", "Thorax"]
    whole = json.loads(prep("scan", hospital, *words, "--json").stdout)
    assert whole["counts"] == {"files": 14, "slices": 10, "volumes": 3, "studies": 3, "patients": 3, "quarantined": 4}
    assert len(whole["volumes"]) == 3
    assert len(whole["quarantine"]) == 4
    assert {group["reason"] for group in whole["leaves"]} == {"duplicate", "localizer", "not_an_image", "truncated"}
    again = prep("scan", hospital, *words, "--csv", tmp_path / "volumes.csv")
    assert again.returncode == 2
    assert "is not overwritten" in again.stderr


def test_a_filter_is_refused_before_a_header_is_read(hospital: Path, tmp_path: Path) -> None:
    for words in (["scan", hospital], ["build", "--src", hospital, "--out", tmp_path / "x.zarr"]):
        done = prep(*words, "--workers", 0, "--include", "BodyPart=HEAD")
        assert done.returncode == 2
        assert "Did you mean 'BodyPartExamined'" in done.stderr
        assert "Reading headers" not in done.stderr
    assert not (tmp_path / "x.zarr").exists()


def test_series_are_chosen_from_the_command_line(hospital: Path, tmp_path: Path) -> None:
    words = ["--layout", "folder", "--size", 16, "--workers", 0, "--allow-unlabelled", "--max-quarantined", 1]
    words += ["--include", "BodyPartExamined=head,Brain", "--exclude", "SeriesDescription~knochen|bone"]
    done = prep("build", "--src", hospital, "--out", tmp_path / "data.zarr", *words, "--min-slices", 4)
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(tmp_path / "data.zarr")
    assert dataset.series["series_description"].to_pylist() == ["Kopf nativ"]
    left = dataset.read_table("quarantine")
    details = left.filter(pc.equal(left["reason"], "filtered"))["detail"].to_pylist()
    assert sorted({*details}) == [
        "--exclude SeriesDescription~knochen|bone",
        "not --include BodyPartExamined=head,Brain",
    ]
    assert "6 filtered" in done.stdout
    assert prep("verify", tmp_path / "data.zarr").returncode == 0


# --- label templates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_filled_template_labels_every_slice(level: Any, hospital: Path, tmp_path: Path) -> None:
    found = looked_at(hospital)
    template = label_template(found.slices, found.volumes, level, RSNA_CLASSES)
    lines = {"slice": 10, "series": 2, "study": 3, "patient": 3}
    assert template.table.num_rows == lines[level]
    assert (template.notes != ()) == (level == "series")
    path = tmp_path / "labels.csv"
    write_csvs({path: template.table})
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row[name] == "" for row in rows for name in RSNA_CLASSES)
    for number, row in enumerate(rows):
        row.update(dict.fromkeys(RSNA_CLASSES, "0") | ({"any": "1", "subdural": "1"} if number == 0 else {}))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    dataset = built(hospital, tmp_path / "data.zarr", labels=path, allow=Allowances(max_quarantined=1.0))
    assert {*dataset.slices["label_level"].to_pylist()} == {level}
    assert dataset.labels.min() == 0
    assert dataset.labels[:, -1].sum() > 0


def test_an_empty_template_is_read_and_labels_nothing(hospital: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    words = ["--workers", 0, "--size", 16, "--layout", "folder"]
    done = prep("scan", hospital, *words, "--label-template", path)
    assert done.returncode == 0, done.stderr
    assert "2 lines to fill in" in " ".join(done.stdout.split())
    dataset = built(
        hospital, tmp_path / "data.zarr", labels=path, allow=Allowances(unlabelled=True, max_quarantined=1.0)
    )
    assert {*dataset.slices["label_level"].to_pylist()} == {"none"}
    before = path.read_bytes()
    again = prep("scan", hospital, *words, "--label-template", path)
    assert again.returncode == 2
    assert path.read_bytes() == before


def test_coarser_keys_are_filled_in_only_where_they_are_one(hospital: Path) -> None:
    found = looked_at(hospital)
    lines = label_template(found.slices, found.volumes, "series", RSNA_CLASSES).table.to_pylist()
    keys = {
        line["series_instance_uid"]: (line["patient_id"], line["accession_number"], line["n_slices"]) for line in lines
    }
    assert keys == {"1.2.2.1": ("", "", "8"), "1.2.2.3": ("P3", "ACC3", "2")}


def test_shared_uids_and_missing_patients_are_told(tmp_path: Path) -> None:
    files = {**series("a", 1), **series("b", 2, PatientID=None)}
    files["b/0.dcm"] = ct_bytes(700, **(HEAD | {"SOPInstanceUID": "1.2.3.100", "SeriesInstanceUID": "1.2.2.2"}))
    found = looked_at(write_files(tmp_path / "src", files))
    by_slice = label_template(found.slices, found.volumes, "slice", RSNA_CLASSES)
    assert by_slice.table.num_rows == 6
    assert "2 slices whose SOP Instance UID another image has" in by_slice.notes[0]
    by_patient = label_template(found.slices, found.volumes, "patient", RSNA_CLASSES)
    assert by_patient.table["patient_id"].to_pylist() == ["P1"]
    assert "3 slices without a patient_id that names one patient" in by_patient.notes[0]


def test_a_placeholder_is_no_patient_to_label(tmp_path: Path) -> None:
    files = series("a", 1) | series("b", 2, PatientID="ANONYMOUS") | series("c", 3, PatientID="ANONYMOUS")
    found = looked_at(write_files(tmp_path / "src", files))
    template = label_template(found.slices, found.volumes, "patient", RSNA_CLASSES)
    assert template.table["patient_id"].to_pylist() == ["P1"]
    assert "8 slices without a patient_id" in template.notes[0]


def test_helpful_columns_give_way_to_classes(hospital: Path) -> None:
    spec = TINY.model_copy(update={"classes": ("path_seen", "slices", "body_parts")})
    found = looked_at(hospital, spec=spec)
    names = label_template(found.slices, found.volumes, "series", spec.classes).table.column_names
    assert {"path_seen", "slices", "body_parts"} <= {*names}
    assert "body_part" not in names


def test_a_template_is_for_the_folder_layout(phantom_tree: Path, tmp_path: Path) -> None:
    done = prep("scan", phantom_tree, "--workers", 0, "--size", 32, "--label-template", tmp_path / "labels.csv")
    assert done.returncode == 2
    assert "the source has the layout rsna" in done.stderr
    assert "Reading headers" not in done.stderr
    assert not (tmp_path / "labels.csv").exists()


# --- quarantine ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(hospital: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of ``hospital`` and its working folder; read only."""
    out = tmp_path_factory.mktemp("finished") / "data.zarr"
    built(hospital, out, allow=Allowances(unlabelled=True, max_quarantined=1.0))
    return out


LEFT = {"duplicate": 1, "localizer": 1, "not_an_image": 1, "truncated": 1}


def counted(path: Path) -> dict[str, int]:
    return {group.reason: group.files for group in by_reason(read_quarantine(path).files)}


def test_the_quarantine_of_a_dataset_and_of_its_working_folder(finished: Path) -> None:
    assert counted(finished) == counted(working(finished)) == LEFT
    assert read_quarantine(finished).stage == read_quarantine(working(finished)).stage == "finished"
    assert read_quarantine(finished).files == read_quarantine(working(finished)).files


def test_the_quarantine_of_a_build_that_stopped_at_its_plan(hospital: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    with pytest.raises(BuildError, match="damaged"):
        build(hospital, out, TINY, workers=0, allow=ANY_LABELS)
    assert counted(out) == counted(working(out)) == LEFT
    assert read_quarantine(out).stage == "planned"
    done = prep("quarantine", out)
    assert done.returncode == 0, done.stderr
    assert "head/cut.dcm" in done.stdout
    assert "The build is not finished" in done.stdout
    # Headers alone, as of a build that was killed before its plan.
    (working(out) / "quarantine.parquet").unlink()
    assert read_quarantine(out).stage == "scanned"
    assert counted(out) == {name: number for name, number in LEFT.items() if name != "duplicate"}
    assert "before it had a plan" in prep("quarantine", working(out)).stdout


def test_a_new_scan_forgets_the_quarantine_of_the_last_plan(
    hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, out = Path(shutil.copytree(hospital, tmp_path / "src")), tmp_path / "data.zarr"
    with pytest.raises(BuildError, match="damaged"):
        build(src, out, TINY, workers=0, allow=ANY_LABELS)
    (src / "head" / "cut.dcm").unlink()
    monkeypatch.setattr("ich_prep.stages.survey.make_plan", lambda *_, **__: 1 / 0)  # as if killed there
    with pytest.raises(ZeroDivisionError):
        build(src, out, TINY, workers=0, allow=ANY_LABELS)
    assert "truncated" not in counted(out)


def test_slices_that_failed_in_shards_are_listed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, out = write_files(tmp_path / "src", series("head", 1, slices=5)), tmp_path / "data.zarr"
    cut_while_decoding(src / "head" / "3.dcm", monkeypatch)
    with pytest.raises(BuildError, match="damaged"):
        build(src, out, TINY, workers=0, allow=ANY_LABELS)
    (line,) = read_quarantine(out).files.to_pylist()
    assert (line["path"], line["stage"], line["row"]) == ("head/3.dcm", "shard", 3)
    assert kind_of(line["reason"]) == "damage"


def test_reasons_can_be_chosen_and_written(finished: Path, tmp_path: Path) -> None:
    words = ["--reason", "truncated", "--reason", "localizer"]
    done = prep("quarantine", finished, *words, "--csv", tmp_path / "left.csv", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert [line["path"] for line in shown["files"]] == ["head/cut.dcm", "head/scout.dcm"]
    with (tmp_path / "left.csv").open(encoding="utf-8") as file:
        assert [line["reason"] for line in csv.DictReader(file)] == ["truncated", "localizer"]
    listed = prep("quarantine", finished, *words).stdout
    assert listed.startswith("truncated head/cut.dcm\n")
    assert "Nothing was quarantined as burned_in." in prep("quarantine", finished, "--reason", "burned_in").stdout
    unknown = prep("quarantine", finished, "--reason", "localiser")
    assert unknown.returncode == 2
    assert "Did you mean 'localizer'?" in unknown.stderr


def test_where_there_is_no_build_there_is_no_quarantine(finished: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DatasetError, match="Expected a dataset"):
            read_quarantine(path)
    with pytest.raises(UsageError, match="is itself a working folder"):
        read_quarantine(working(finished), tmp_path)


def test_every_reason_has_a_kind_also_one_of_a_later_version() -> None:
    kinds = {str(reason): kind_of(reason) for reason in Reason}
    assert {*kinds.values()} == {*KINDS}
    assert kinds["truncated"] == kinds["decode_failed"] == "damage"
    assert kinds["not_hu"] == kinds["sop_conflict"] == "rule"
    assert kinds["scan_type"] == kinds["filtered"] == "filter"
    assert kind_of("a reason of a later version") in KINDS


def test_quarantined_files_are_copied_whole_and_never_overwritten(
    hospital: Path, finished: Path, tmp_path: Path
) -> None:
    target = tmp_path / "copies"
    words = ["quarantine", finished, "--src", hospital, "--copy-to", target]
    done = prep(*words)
    assert done.returncode == 0, done.stderr
    assert "Copied 4 files" in done.stdout
    copies = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    expected = {
        "duplicate/head/copy.dcm": "head/copy.dcm",
        "localizer/head/scout.dcm": "head/scout.dcm",
        "not_an_image/head/.DS_Store": "head/.DS_Store",
        "truncated/head/cut.dcm": "head/cut.dcm",
    }
    assert copies == {copy: (hospital / path).read_bytes() for copy, path in expected.items()}
    (target / "truncated" / "head" / "cut.dcm").write_bytes(b"mine")
    (target / "localizer" / "head" / "scout.dcm").unlink()
    again = prep(*words)
    assert "Copied 1 file" in again.stdout
    assert "3 were there already" in again.stdout
    assert (target / "truncated" / "head" / "cut.dcm").read_bytes() == b"mine"


def test_copies_come_from_archives_too(hospital: Path, finished: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "src"), "zip", hospital)
    files = read_quarantine(finished).files
    done = copy_quarantined(files, [archive], tmp_path / "copies", progress=NoProgress())
    assert (done.copied, done.existing, done.failed) == (4, 0, ())
    assert (tmp_path / "copies/truncated/head/cut.dcm").read_bytes() == (hospital / "head" / "cut.dcm").read_bytes()


def test_a_file_that_is_gone_is_told_and_a_wrong_source_is_refused(
    hospital: Path, finished: Path, tmp_path: Path
) -> None:
    files = read_quarantine(finished).files
    src = Path(shutil.copytree(hospital, tmp_path / "src"))
    (src / "head" / "scout.dcm").unlink()
    done = copy_quarantined(files, [src], tmp_path / "copies", progress=NoProgress())
    assert done.copied == 3
    assert [problem.split(":")[0] for problem in done.failed] == ["head/scout.dcm"]
    other = write_files(tmp_path / "other", {"a.dcm": b"x"})
    with pytest.raises(UsageError, match="Give the same --src"):
        copy_quarantined(files, [other], tmp_path / "more", progress=NoProgress())
    for inside in (src / "new", finished / "new"):
        with pytest.raises(UsageError, match="lies inside"):
            copy_quarantined(files, [src], inside, progress=NoProgress())
    assert prep("quarantine", finished, "--copy-to", tmp_path / "x").returncode == 2


# --- find ------------------------------------------------------------------------------------------------------------


def test_a_row_is_found_with_its_file_and_identifiers(finished: Path) -> None:
    dataset = open_dataset(finished)
    for row in range(len(dataset)):
        (line,) = find(finished, row=row).rows
        assert line["sop_instance_uid"] == dataset.slices["sop_instance_uid"][row].as_py()
        assert (line["row"], line["status"]) == (row, "ok")
        folder, number = line["path"].removesuffix(".dcm").split("/")
        start = {"head": 100, "chest": 200, "bone": 300}[folder]
        assert line["sop_instance_uid"] == f"1.2.3.{start + int(number)}"
        assert line["accession_number"] == f"ACC{start // 100}"
        assert dataset.series["first_row"][line["series_row"]].as_py() + line["slice_index"] == row


def test_a_uid_finds_rows_and_quarantined_files(finished: Path) -> None:
    first, copy = find(finished, sop="1.2.3.100").rows
    assert (first["path"], first["status"]) == ("head/0.dcm", "ok")
    assert (copy["path"], copy["status"]) == ("head/copy.dcm", "duplicate")
    (scout,) = find(finished, sop=" 1.2.3.900 ").rows
    assert (scout["path"], scout["status"], scout["patient_id"]) == ("head/scout.dcm", "localizer", "P1")


def test_without_the_working_folder_the_file_is_said_to_be_missing(finished: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(finished, tmp_path / "alone.zarr"))
    done = prep("find", alone, "--row", 0)
    assert done.returncode == 0
    assert "sop_instance_uid" in done.stdout
    assert "there is no working folder" in done.stderr
    found = json.loads(prep("find", alone, "--sop", "1.2.3.301", "--build-dir", working(finished), "--json").stdout)
    assert [line["path"] for line in found["rows"]] == ["bone/1.dcm"]
    assert found["missing"] is None
    shutil.copytree(working(finished), working(alone))
    state = json.loads((working(alone) / "state.json").read_text())
    (working(alone) / "state.json").write_text(json.dumps(state | {"published": "another"}))
    missing = find(alone, row=0).missing
    assert missing is not None
    assert "belongs to another dataset" in missing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of the two"),
        ({"row": 1, "sop": "1"}, "one of the two"),
        ({"row": 10}, "has rows 0 to 9; got --row 10"),
        ({"row": -1}, "got --row -1"),
        ({"sop": "1.2.99"}, "No slice of .* has the SOP Instance UID 1.2.99"),
    ],
)
def test_a_row_that_is_not_there_is_one_message(options: dict[str, Any], message: str, finished: Path) -> None:
    with pytest.raises(UsageError, match=message):
        find(finished, **options)


def test_a_build_with_windows_is_estimated_too(hospital: Path) -> None:
    found = looked_at(hospital, spec=Spec(size=32, layout="folder", codec="none"))
    assert found.estimate.dataset_bytes is not None
    assert found.estimate.dataset_bytes >= found.estimate.uncompressed_bytes == 10 * 3 * 32 * 32
