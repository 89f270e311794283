"""Append: what is there stays, what is new comes behind it, and the result is what one build would have made."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pandas
import pytest

from ich_prep import open_dataset
from ich_prep.append import Appended, append
from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.spec import Spec
from ich_prep.drop import drop
from ich_prep.errors import SourceError, UsageError
from ich_prep.events import read_events
from ich_prep.phantom import synthesize
from ich_prep.progress import NoProgress
from ich_prep.status import status_of
from ich_prep.verify import verify
from ich_train.loader import SliceLoader
from ich_train.rows import labelled_rows, neighbours
from tests.support.cli import prep, published, start, working
from tests.support.parts import by_uid, split
from tests.support.pausing import pausing, wait_until_paused

SPEC = Spec(size=32, slices_per_shard=16)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven series of RSNA's layout with patients who were scanned twice, and a label file."""
    tree = tmp_path_factory.mktemp("cohort") / "rsna"
    synthesize(tree, series=14, size=32, layout="rsna", workers=0)
    return tree


def problems(path: Path, src: Path | list[Path] | None = None) -> list[str]:
    found = verify(path, src=src, sample=1.0 if src else 0.01, progress=NoProgress())
    return [f"{problem.culprit}: {problem.what}" for problem in found.problems]


ALLOW = Allowances(missing_images=True)


def test_appending_twice_is_one_build_but_for_the_numbers(cohort: Path, tmp_path: Path) -> None:
    parts = split(cohort, tmp_path, 3)
    out = tmp_path / "data.zarr"
    build(parts[0], out, SPEC, workers=0, allow=ALLOW)
    for generation, part in enumerate(parts[1:], 2):
        before, opened = published(out), open_dataset(out)
        old, pixels = opened.slices.to_pandas(), opened.read(np.flatnonzero(opened.is_ok))
        done = prep("append", "--src", part, "--out", out, "--workers", 0, "--allow-missing-images")
        assert done.returncode == 0, done.stderr
        assert f"generation {generation}" in done.stdout and "0 are there already" in done.stdout
        after = published(out)
        changed = {name for name in before if after[name] != before[name]}
        assert changed == {"zarr.json", "images/zarr.json"}
        grown = open_dataset(out)
        kept = grown.slices.to_pandas().iloc[: len(old)]
        same = [name for name in old.columns if name not in ("flags",)]
        pandas.testing.assert_frame_equal(kept[same], old[same], check_dtype=False)
        np.testing.assert_array_equal(grown.read(np.flatnonzero(opened.is_ok)), pixels)
        # Whoever had it open goes on with what was opened.
        np.testing.assert_array_equal(opened.read(np.flatnonzero(opened.is_ok)), pixels)
        assert len(opened.slices) == len(old)
        first = opened.counts.shards * 16
        assert set(grown.slices["status"].to_pylist()[len(old) : first]) <= {"unused"}
        assert grown.slices["status"][first].as_py() == "ok"
        assert problems(out) == []
        rows = labelled_rows(grown)
        assert grown.is_ok[neighbours(grown, rows, 2)].all()

    whole, grown = open_dataset(tmp_path / "all.zarr"), open_dataset(out)
    pandas.testing.assert_frame_equal(by_uid(out), by_uid(tmp_path / "all.zarr"), check_dtype=False)
    for name in ("ok", "found", "planned", "series", "patients", "fold_groups", "quarantined"):
        assert getattr(grown.counts, name) == getattr(whole.counts, name), name
    order = [np.argsort(np.array(d.slices["sop_instance_uid"].take(np.flatnonzero(d.is_ok)))) for d in (whole, grown)]
    pixels = [d.read(np.flatnonzero(d.is_ok)[at]) for d, at in zip((whole, grown), order, strict=True)]
    np.testing.assert_array_equal(*pixels)
    series = [
        d.series.to_pandas().drop(columns=["series_row", "first_row"]).sort_values(["series_instance_uid"])
        for d in (whole, grown)
    ]
    pandas.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in series))
    # The plan in the working folder is that of all rows.
    merged = tmp_path / "merged"
    for part in parts:
        shutil.copytree(part, merged / "rsna", dirs_exist_ok=True)
    assert problems(out, merged / "rsna") == []
    assert problems(out, parts) == []
    assert [event.command for event in grown.root.history] == ["build", "append", "append"]
    assert grown.root.history[2].counts["appended"] > 0


def test_what_is_there_already_is_a_duplicate(cohort: Path, tmp_path: Path) -> None:
    parts = split(cohort, tmp_path, 2)
    out = tmp_path / "data.zarr"
    build(parts[0], out, SPEC, workers=0, allow=ALLOW)
    shutil.rmtree(working(out))
    found = append(cohort, out, workers=0)
    whole = open_dataset(tmp_path / "all.zarr")
    assert found.duplicates == build_count(parts[0]) and open_dataset(out).counts.ok == whole.counts.ok
    assert not working(out).exists()
    files = published(out)
    again = prep("append", "--src", cohort, "--out", out, "--workers", 0)
    assert again.returncode == 0 and "Nothing new." in again.stdout
    assert published(out) == files and not working(out).exists()
    assert problems(out) == []


def build_count(tree: Path) -> int:
    return len(list(tree.rglob("*.dcm")))


def test_a_withdrawn_slice_does_not_return(cohort: Path, tmp_path: Path) -> None:
    parts = split(cohort, tmp_path, 2)
    out = tmp_path / "data.zarr"
    build(parts[0], out, SPEC, workers=0, allow=ALLOW)
    drop(out, "row < 40", purge_pixels=True)
    found = append(cohort, out, workers=0)
    assert found.duplicates == build_count(parts[0])
    assert open_dataset(out).counts.withdrawn == 40 and problems(out) == []


def one_slice(folder: Path, number: int, slice_bytes, **attributes: object) -> None:
    pixels = np.random.default_rng(number).integers(0, 2000, (32, 32)).astype(np.int16)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        "SOPInstanceUID": f"2.25.9{number}",
        "ImagePositionPatient": ["0", "0", str(5 * number)],
        "InstanceNumber": str(number),
        "PixelSpacing": ["0.5", "0.5"],
    }
    (folder / f"{number}.dcm").write_bytes(slice_bytes(pixels, **(plain | attributes)))


UNLABELLED = Allowances(unlabelled=True)


def test_a_known_patient_keeps_the_fold_and_merged_groups_are_flagged(tmp_path: Path, slice_bytes) -> None:
    base, more = tmp_path / "a", tmp_path / "b"
    for number in range(1, 9):  # four patients of two slices each
        patient = (number - 1) // 2
        one_slice(base, number, slice_bytes, PatientID=f"P{patient}", StudyInstanceUID=f"2.25.1{patient}",
                  SeriesInstanceUID=f"2.25.2{patient}")  # fmt: skip
    build(base, tmp_path / "data.zarr", Spec(size=32, slices_per_shard=4, layout="folder"), workers=0, allow=UNLABELLED)
    before = open_dataset(tmp_path / "data.zarr").slices.to_pandas()
    fold = dict(zip(before["patient_id"], before["fold"], strict=True))
    # A new study of P1; a smaller name that shares a study with P2; a study of P3 with a file that names P0.
    one_slice(more, 11, slice_bytes, PatientID="P1", StudyInstanceUID="2.25.31", SeriesInstanceUID="2.25.41")
    one_slice(more, 12, slice_bytes, PatientID="A", StudyInstanceUID="2.25.12", SeriesInstanceUID="2.25.42")
    one_slice(more, 13, slice_bytes, PatientID="P0", StudyInstanceUID="2.25.13", SeriesInstanceUID="2.25.43")
    # Another slice of P1's old series.
    one_slice(more, 14, slice_bytes, PatientID="P1", StudyInstanceUID="2.25.11", SeriesInstanceUID="2.25.21")
    done = append(more, tmp_path / "data.zarr", workers=0, allow=UNLABELLED)
    assert done == Appended(found=4, slices=4, duplicates=0, quarantined=0, fold_conflicts=1, generation=2)
    after = open_dataset(tmp_path / "data.zarr").slices.to_pandas()
    pandas.testing.assert_series_equal(after["fold"][:8], before["fold"][:8], check_dtype=False)
    new = after.set_index("sop_instance_uid").loc[[f"2.25.9{number}" for number in (11, 12, 13, 14)]]
    assert new["fold"].tolist() == [fold["P1"], fold["P2"], fold["P0"], fold["P1"]]
    assert new["fold_group"].tolist() == ["P1", "P2", "P0", "P1"]
    flagged = after[[("fold_conflict" in flags) for flags in after["flags"]]]
    assert set(flagged["patient_id"]) == {"P0", "P3"} and len(flagged) == 5
    assert [flags for flags in new["flags"] if "volume_continued" in flags] == [new["flags"].iloc[3]]
    series = open_dataset(tmp_path / "data.zarr").series.to_pandas()
    assert series.loc[series["series_instance_uid"] == "2.25.21", "volume_in_series"].tolist() == [0, 1]
    verified = prep("verify", tmp_path / "data.zarr")
    assert verified.returncode == 0, verified.stderr
    assert open_dataset(tmp_path / "data.zarr").root.history[1].counts["fold_conflicts"] == 1


def test_one_patient_of_a_small_batch_is_no_placeholder(tmp_path: Path, slice_bytes) -> None:
    base, more = tmp_path / "a", tmp_path / "b"
    for number in range(20, 40):
        one_slice(base, number, slice_bytes, PatientID=f"P{number}", StudyInstanceUID=f"2.25.1{number}",
                  SeriesInstanceUID=f"2.25.2{number}")  # fmt: skip
    for number in range(11, 15):
        one_slice(more, number, slice_bytes, PatientID="Q", StudyInstanceUID=f"2.25.1{number}",
                  SeriesInstanceUID=f"2.25.2{number}")  # fmt: skip
    build(base, tmp_path / "data.zarr", Spec(size=32, layout="folder"), workers=0, allow=UNLABELLED)
    append(more, tmp_path / "data.zarr", workers=0, allow=UNLABELLED)
    after = open_dataset(tmp_path / "data.zarr").slices.to_pandas()
    assert set(after["patient_id"][after["status"] == "ok"].iloc[20:]) == {"Q"}
    assert after["row"].iloc[256:].tolist() == [256, 257, 258, 259]


def test_another_image_with_a_known_uid(tmp_path: Path, slice_bytes) -> None:
    base, more = tmp_path / "a", tmp_path / "b"
    for number in (1, 2, 3):
        one_slice(base, number, slice_bytes)
    one_slice(more, 7, slice_bytes, SOPInstanceUID="2.25.92")
    one_slice(more, 3, slice_bytes)
    build(base, tmp_path / "data.zarr", Spec(size=32, layout="folder"), workers=0, allow=UNLABELLED)
    done = append(more, tmp_path / "data.zarr", workers=0, allow=UNLABELLED)
    assert (done.slices, done.duplicates) == (1, 1)
    slices = open_dataset(tmp_path / "data.zarr").slices.to_pandas()
    shared = slices[slices["sop_instance_uid"] == "2.25.92"]
    assert len(shared) == 2 and all("sop_uid_shared" in flags for flags in shared["flags"])
    assert problems(tmp_path / "data.zarr") == []

    (base / "labels.csv").write_text("sop_instance_uid,any\n2.25.91,0\n2.25.92,1\n2.25.93,0\n")
    build(base, tmp_path / "keyed.zarr", Spec(size=32, layout="folder"), workers=0)
    one_slice(more, 8, slice_bytes)
    (tmp_path / "more.csv").write_text("sop_instance_uid,any\n2.25.92,1\n2.25.98,1\n")
    done = append(
        more, tmp_path / "keyed.zarr", labels=tmp_path / "more.csv", workers=0, allow=Allowances(max_quarantined=1)
    )
    assert (done.slices, done.duplicates, done.quarantined) == (1, 1, 1)
    quarantine = open_dataset(tmp_path / "keyed.zarr").read_table("quarantine").to_pylist()
    assert {line["reason"] for line in quarantine} == {"duplicate", "sop_conflict"}
    assert problems(tmp_path / "keyed.zarr") == []


def test_columns_that_only_one_label_table_has(tmp_path: Path, slice_bytes) -> None:
    from ich_prep.layouts.labels import LabelOptions

    base, more = tmp_path / "a", tmp_path / "b"
    one_slice(base, 1, slice_bytes)
    one_slice(more, 2, slice_bytes, SeriesInstanceUID="2.25.4", StudyInstanceUID="2.25.5", PatientID="Z")
    (tmp_path / "a.csv").write_text("sop_instance_uid,any,age\n2.25.91,0,70\n")
    (tmp_path / "b.csv").write_text("sop_instance_uid,any,age,site\n2.25.92,1,old,north\n")
    build(base, tmp_path / "d.zarr", Spec(size=32, layout="folder"), workers=0, labels=tmp_path / "a.csv",
          label_options=LabelOptions(keep=("age",)))  # fmt: skip
    append(more, tmp_path / "d.zarr", workers=0, labels=tmp_path / "b.csv",
           label_options=LabelOptions(keep=("age", "site")))  # fmt: skip
    lines = open_dataset(tmp_path / "d.zarr").slices.to_pandas().query("status == 'ok'")
    assert lines["x_age"].tolist() == ["70", "old"] and lines["x_site"].fillna("").tolist() == ["", "north"]
    assert problems(tmp_path / "d.zarr") == []


def test_a_training_that_reads_goes_on(cohort: Path, tmp_path: Path) -> None:
    parts = split(cohort, tmp_path, 2)
    out = tmp_path / "data.zarr"
    build(parts[0], out, SPEC, workers=0, allow=ALLOW)
    opened = open_dataset(out)
    rows = labelled_rows(opened)
    expected = opened.read(rows)
    batches = iter(SliceLoader(opened, rows, batch_size=4, order="sequential"))
    seen = [next(batches).images.numpy().copy()]
    append(parts[1], out, workers=0, allow=ALLOW)
    seen += [batch.images.numpy().copy() for batch in batches]
    np.testing.assert_array_equal(np.concatenate(seen), expected)


def test_sources_and_folders_that_cannot_be_used(cohort: Path, tmp_path: Path) -> None:
    parts = split(cohort, tmp_path, 2)
    out = tmp_path / "data.zarr"
    build(parts[0], out, SPEC, workers=0, allow=ALLOW)
    files = published(out)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("nothing")
    with pytest.raises(SourceError):
        append(tmp_path / "text", out, workers=0)
    for words in (("--out", tmp_path / "gone.zarr"), ("--out", out, "--build-dir", parts[1] / "x")):
        refused = prep("append", "--src", parts[1], *words, "--workers", 0)
        assert refused.returncode in (1, 2) and "Traceback" not in refused.stderr
    with pytest.raises(UsageError, match="belongs to another dataset"):
        append(parts[1], out, workers=0, build_dir=working(tmp_path / "all.zarr"), allow=ALLOW)
    (working(out) / "state.json").write_text("{}")
    with pytest.raises(UsageError, match="is not that of"):
        append(parts[1], out, workers=0, allow=ALLOW)
    assert published(out) == files


def test_what_is_damaged_is_counted_once(cohort: Path, tmp_path: Path) -> None:
    tree, out = tmp_path / "rsna", tmp_path / "data.zarr"
    shutil.copytree(cohort, tree)
    files = sorted((tree / "stage_2_train").glob("*.dcm"))
    later = files.pop()
    later.rename(tmp_path / later.name)
    header, pixels = files[0], files[1]
    header.write_bytes(b"\0" * 200)
    pixels.write_bytes(pixels.read_bytes()[:-500])
    allow = Allowances(missing_images=True, max_quarantined=1)
    build(tree, out, SPEC, workers=0, allow=allow)
    first = open_dataset(out)
    reasons = Counter(first.read_table("quarantine")["reason"].to_pylist())
    assert reasons.total() == 2
    (tmp_path / later.name).rename(later)
    for expected in (1, 0):
        again = append(tree, out, workers=0, allow=allow)
        assert (again.slices, again.quarantined, again.lost) == (expected, 0, {})
    grown = open_dataset(out)
    assert grown.root.lost_labels == first.root.lost_labels
    counted = Counter(grown.read_table("quarantine")["reason"].to_pylist())
    assert counted.pop("duplicate") == len(list(tree.rglob("*.dcm"))) - 1 and counted == reasons
    assert grown.counts.ok == first.counts.ok + 1 and problems(out) == []

    pixels.write_bytes((cohort / pixels.relative_to(tree)).read_bytes())  # repaired: no longer a duplicate
    assert append(tree, out, workers=0, allow=allow).slices == 1
    assert problems(out) == []


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_the_status_and_the_log_of_an_append(cohort: Path, tmp_path: Path, signal_number: signal.Signals) -> None:
    parts, out = split(cohort, tmp_path, 2), tmp_path / "data.zarr"
    build(parts[0], out, SPEC.model_copy(update={"slices_per_shard": 1}), workers=0, allow=ALLOW)
    words = ("append", "--src", parts[1], "--out", out, "--workers", 0, "--allow-missing-images", "--log-json")
    process = start(*words, environment=pausing("*/append/shards/*.json", 4))
    wait_until_paused(process)
    try:
        running = status_of(out)
    finally:
        os.kill(process.pid, signal_number)
        os.kill(process.pid, signal.SIGCONT)
        process.wait()
    assert (running.command, running.state, running.stage) == ("append", "running", "shards")
    assert 3 < running.done < running.total == build_count(parts[1])
    stopped = prep("status", out)
    assert f"append stopped while writing slices: {status_of(out).done} of {running.total} slices" in stopped.stdout
    assert f"was {'killed' if signal_number is signal.SIGKILL else 'interrupted'}" in stopped.stdout

    done = prep(*words)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert {"start", "estimate", "stage", "stage_end", "published"} <= {event["event"] for event in events}
    assert status_of(out).state == "finished" and problems(out) == []
    logged = list(read_events(working(out) / "log.jsonl"))
    assert [event["event"] for event in logged].count("published") == 2
    assert not (working(out) / "append").exists()
