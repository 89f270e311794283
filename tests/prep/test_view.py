"""The viewer's server: what it answers, to whom, and what it refuses. Real requests to a real server."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.corrections import append_correction, read_corrections
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.explanations import read_explanations
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.windows import PRESETS
from ich_prep.errors import UsageError
from ich_prep.phantom import synthesize
from ich_prep.view.assets import SCRIPTS
from ich_prep.view.data import SLICES_PER_READ, ViewData
from ich_prep.view.guard import MAX_BODY
from tests.support.sealing import replace_table, reseal
from tests.support.viewer import Viewer, viewing

PREP = str(Path(sys.executable).with_name("ich-prep"))


@pytest.fixture(scope="module")
def defects(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tree with each known defect, and the HU dataset built from it; read only."""
    folder = tmp_path_factory.mktemp("defects")
    synthesize(folder / "rsna", series=2, size=64, defects=True, workers=0)
    spec = Spec(size=64, store="hu", slices_per_shard=16)
    build(folder / "rsna", folder / "hu.zarr", spec, allow=Allowances(max_quarantined=1.0), workers=0)
    return folder / "rsna", folder / "hu.zarr"


@pytest.fixture(scope="module")
def dataset(defects: tuple[Path, Path]) -> Iterator[Dataset]:
    with open_dataset(defects[1]) as opened:
        yield opened


@pytest.fixture(scope="module")
def predictions(dataset: Dataset) -> np.ndarray[Any, np.dtype[np.float32]]:
    probabilities = np.random.default_rng(0).random((len(dataset), len(dataset.classes)), np.float32)
    probabilities[~dataset.is_ok] = np.nan
    return probabilities


@pytest.fixture
def viewer(dataset: Dataset, defects: tuple[Path, Path], tmp_path: Path) -> Iterator[Viewer]:
    with viewing(ViewData(dataset), tmp_path / "marks.csv", src=defects[0]) as running:
        yield running


# --- what it answers --------------------------------------------------------------------------------------------------


def test_the_page_and_its_files_are_served_with_a_strict_policy(viewer: Viewer) -> None:
    page = viewer.ask(f"/?token={viewer.token}", X_Ich_Token=None)
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    names = re.findall(r'(?:src|href)="(static/[^"]+)"', page.body.decode())
    assert names == ["static/style.css", *(f"static/{name}.js" for name in SCRIPTS)]
    for name in names:
        assert viewer.ask(f"/{name}", X_Ich_Token=None).status == 200
    assert not re.search(r"<script>|onclick=|style=|https?://", page.body.decode())
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'") and "unsafe" not in policy
    for answer in (page, viewer.ask("/api/about"), viewer.ask("/api/none"), viewer.ask("/api/about", Host="evil")):
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == policy


def test_pixels_are_the_stored_ones(viewer: Viewer, dataset: Dataset) -> None:
    for line in range(len(dataset.series)):
        stored = dataset.volume(series_row=line)
        for first in range(0, len(stored), SLICES_PER_READ):
            part = stored[first : first + SLICES_PER_READ]
            answer = viewer.ask(f"/api/volumes/{line}/pixels/{first}/{len(part)}")
            np.testing.assert_array_equal(np.frombuffer(answer.body, "<i2").reshape(part.shape), part)


def test_a_volume_has_its_labels_slices_and_geometry(viewer: Viewer, dataset: Dataset) -> None:
    slices = dataset.slices.to_pylist()
    for line in range(len(dataset.series)):
        volume = viewer.ask(f"/api/volumes/{line}").json()
        rows = volume["slices"]["row"]
        assert [slices[row]["series_row"] for row in rows] == [line] * len(rows)
        assert volume["ok"] == dataset.is_ok[rows].tolist()
        for name in dataset.classes:
            assert volume["labels"][name] == [slices[row][name] for row in rows]
        geometry = volume["geometry"]
        affine = dataset.affine(line)
        assert (affine is None) == (geometry["problem"] is not None)
        if affine is not None:
            placed = np.array([offset for offset, ok in zip(geometry["offsets"], volume["ok"], strict=True) if ok])
            for index, offset in enumerate(placed):
                for column, row in ((0, 0), (17, 40)):
                    here = np.array(geometry["grid"]) @ [column + offset[0], row + offset[1], offset[2], 1]
                    np.testing.assert_allclose(here, affine @ [column, row, index, 1], atol=0.2)


def test_the_list_has_every_volume_with_statuses_and_flags(viewer: Viewer, dataset: Dataset) -> None:
    listed = viewer.ask("/api/volumes").json()
    columns, words = listed["columns"], listed["words"]
    assert columns["series_row"] == dataset.series["series_row"].to_pylist()
    for line in range(len(dataset.series)):
        slices = [entry for entry in dataset.slices.to_pylist() if entry["series_row"] == line]
        assert {words["status"][k] for k in columns["statuses"][line]} == {entry["status"] for entry in slices}
        assert {words["flag"][k] for k in columns["flags"][line]} == {
            flag for entry in slices for flag in entry["flags"]
        }
        for name in dataset.classes:
            assert columns["labels"][name][line] == dataset.series[name][line].as_py()
    assert any(columns["flags"])


def test_filters_select_volumes_with_a_matching_slice(viewer: Viewer, dataset: Dataset) -> None:
    found = viewer.ask("/api/where?filter=any%20%3D%3D%201").json()
    rows = dataset.where("any == 1")
    lines, counts = np.unique(dataset.slices["series_row"].to_numpy()[rows], return_counts=True)
    assert found == {"lines": lines.tolist(), "counts": counts.tolist(), "rows": len(rows)}
    wrong = viewer.ask("/api/where?filter=anny%20%3D%3D%201")
    assert wrong.status == 422 and "Did you mean 'any'?" in wrong.json()["error"]
    assert viewer.ask(f"/api/where?filter={'a' * 2001}").status == 422


def test_the_quarantine_says_why_and_what_to_do(viewer: Viewer, dataset: Dataset) -> None:
    page = viewer.ask("/api/quarantine").json()
    table = dataset.read_table("quarantine")
    assert page["total"] == len(page["lines"]) == len(table)
    assert {entry["reason"] for entry in page["reasons"]} == set(table["reason"].to_pylist())
    assert all(entry["meaning"] and entry["action"] for entry in page["reasons"])
    only = viewer.ask("/api/quarantine?reason=duplicate").json()
    assert only["lines"] and {line["reason"] for line in only["lines"]} == {"duplicate"}
    beyond = viewer.ask(f"/api/quarantine?first={10**12}").json()
    assert beyond["lines"] == []
    for line in page["lines"]:
        if line["row"] is not None:
            assert line["line"] == dataset.slices["series_row"][line["row"]].as_py()


def test_files_that_can_be_decoded_are_shown_as_pictures(viewer: Viewer, dataset: Dataset) -> None:
    table = dataset.read_table("quarantine")
    shown = {}
    for number, reason in enumerate(table["reason"].to_pylist()):
        answer = viewer.ask(f"/api/quarantine/{number}.png")
        assert answer.status in (200, 404)
        shown.setdefault(reason, []).append(answer.status == 200)
        if answer.status == 200:
            assert answer.headers["content-type"] == "image/png"
            assert cv2.imdecode(np.frombuffer(answer.body, np.uint8), cv2.IMREAD_UNCHANGED).ndim == 2
        else:
            assert answer.json()["error"]
    assert all(shown["duplicate"]) and not any(shown["empty_file"]) and not any(shown["not_dicom"])


def test_errors_of_a_run_are_counted(
    dataset: Dataset, predictions: np.ndarray[Any, np.dtype[np.float32]], tmp_path: Path
) -> None:
    with viewing(ViewData(dataset, predictions=predictions, run_name="r"), tmp_path / "marks.csv") as viewer:
        assert viewer.ask("/api/about").json()["run"] == "r"
        columns = viewer.ask("/api/volumes").json()["columns"]
        for line in range(len(dataset.series)):
            rows = dataset.where(f"series_row == {line}")
            volume = viewer.ask(f"/api/volumes/{line}").json()
            false_positive = false_negative = 0
            worst = 0.0
            for row in rows:
                for j, name in enumerate(dataset.classes):
                    label, probability = dataset.labels[row, j], predictions[row, j]
                    shown = volume["probabilities"][name][row - rows[0]]
                    assert (shown is None) == np.isnan(probability)
                    if label >= 0 and not np.isnan(probability):
                        assert shown == pytest.approx(float(probability), abs=1e-5)
                        false_positive += probability >= 0.5 and label == 0
                        false_negative += probability < 0.5 and label == 1
                        worst = max(worst, abs(label - probability))
            assert columns["false_positive"][line] == false_positive
            assert columns["false_negative"][line] == false_negative
            assert columns["worst"][line] == pytest.approx(worst, abs=1e-3)


def test_maps_are_served_by_slice(dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "explanations"
    folder.mkdir(parents=True)
    rows = np.flatnonzero(dataset.is_ok)[1::2]
    values = np.random.default_rng(0).integers(0, 256, (len(rows), len(dataset.classes), 3, 4)).astype(np.uint8)
    np.save(folder / "rows.npy", rows)
    np.save(folder / "maps.npy", values)
    about = {"dataset_digest": dataset.digest, "classes": list(dataset.classes)}
    (folder / "explanations.json").write_text(json.dumps(about))
    data = ViewData(dataset, explanations=read_explanations(tmp_path / "run", dataset))
    with viewing(data, tmp_path / "marks.csv") as viewer:
        volume = viewer.ask("/api/volumes/0").json()
        for index, row in enumerate(volume["slices"]["row"]):
            answer = viewer.ask(f"/api/volumes/0/maps/{index}")
            assert volume["explained"][index] == (row in rows) == (answer.status == 200)
            if answer.status == 200:
                assert (answer.headers["x-height"], answer.headers["x-width"]) == ("3", "4")
                assert answer.body == values[np.searchsorted(rows, row)].tobytes()
    (folder / "explanations.json").write_text(json.dumps(about | {"dataset_digest": "other"}))
    with pytest.raises(UsageError, match="of another dataset"):
        read_explanations(tmp_path / "run", dataset)
    assert read_explanations(tmp_path, dataset) is None


def test_a_dataset_without_the_newer_columns_is_shown(defects: tuple[Path, Path], tmp_path: Path) -> None:
    """As an earlier version of the format wrote it."""
    copy = Path(shutil.copytree(defects[1], tmp_path / "old.zarr"))
    for table, dropped in (
        ("slices", ["turn", "fold_group", "share_air", "share_soft", "share_bone"]),
        ("series", ["scan_type", "acquisition", "volume_in_series", "slice_thickness_mm", "manufacturer", "flags"]),
    ):
        path = copy / "labels" / f"{table}.parquet"
        pq.write_table(pq.read_table(path).drop_columns(dropped), path)
    reseal(copy)
    with open_dataset(copy) as old, viewing(ViewData(old), tmp_path / "marks.csv") as viewer:
        assert viewer.ask("/api/volumes").json()["columns"]["scan_type"] == [None] * len(old.series)
        for line in range(len(old.series)):
            volume = viewer.ask(f"/api/volumes/{line}").json()
            assert "scan_type" not in volume["known"] and volume["slices"]["turn"][0] is None


@pytest.mark.parametrize("name", ["hu", "windows"])
def test_a_released_dataset_is_shown(name: str, tmp_path: Path) -> None:
    """The golden datasets, which every version must be able to read."""
    golden = Path(__file__).parents[1] / "contract" / f"{name}.zarr"
    with open_dataset(golden) as dataset, viewing(ViewData(dataset), tmp_path / "marks.csv") as viewer:
        assert viewer.ask("/api/about").json()["slices"] == len(dataset)
        assert viewer.ask("/api/quarantine").json()["total"] == len(dataset.read_table("quarantine"))
        for line in range(len(dataset.series)):
            volume = viewer.ask(f"/api/volumes/{line}").json()
            if any(volume["ok"]):
                stored = dataset.volume(series_row=line)[:1].astype(dataset.dtype.newbyteorder("<"))
                assert viewer.ask(f"/api/volumes/{line}/pixels/0/1").body == stored.tobytes()


def test_a_volume_without_positions_is_shown(defects: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(defects[1], tmp_path / "flat.zarr"))
    path = copy / "labels" / "slices.parquet"
    table = pq.read_table(path)
    for name in ("position_mm", "position_x_mm", "position_y_mm", "position_z_mm"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.nulls(len(table), pa.float64()))
    replace_table(copy, "slices", table)
    with open_dataset(copy) as flat:
        geometry = ViewData(flat).volume(0)["geometry"]
    assert "grid" not in geometry and geometry["problem"]
    assert len(geometry["axes"]) == 3 and min(geometry["pixel_mm"]) > 0  # letters and a scale bar


# --- marks ------------------------------------------------------------------------------------------------------------


def test_a_mark_is_in_the_file_when_it_is_answered(viewer: Viewer, dataset: Dataset) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.path.rglob("*")}
    answer = viewer.mark(row=5, note=" thin, left ", value=0)
    assert answer.status == 201
    (mark,) = read_corrections(viewer.corrections)
    uid = dataset.slices["sop_instance_uid"][5].as_py()
    assert (mark.row, mark.sop_instance_uid, mark.class_name, mark.value) == (5, uid, "subdural", 0)
    assert (mark.note, mark.reader, mark.dataset_digest) == ("thin, left", "AB", dataset.digest)
    assert viewer.mark(value=None).status == 201
    assert [entry["value"] for entry in viewer.ask("/api/corrections").json()] == [0, None]
    assert {path: path.stat().st_mtime_ns for path in dataset.path.rglob("*")} == before


def test_marks_of_this_dataset_come_back_after_a_restart(dataset: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "marks.csv"
    with viewing(ViewData(dataset), file) as viewer:
        viewer.mark(row=3)
    (mark,) = read_corrections(file)
    append_correction(file, replace(mark, dataset_digest="another", row=4))
    with viewing(ViewData(dataset), file) as viewer:
        assert [entry["row"] for entry in viewer.ask("/api/corrections").json()] == [3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"row": -1}, {"row": 10**9}, {"row": 10**30}, {"row": "5"}, {"row": 1.0}, {"row": True}, {"row": None},
        {"class": "sub"}, {"class": "=cmd()"}, {"class": ["any"]},
        {"value": 2}, {"value": True}, {"value": "1"}, {"value": []},
        {"note": "a\nb"}, {"note": "a\x00b"}, {"note": "\x1b[2J"}, {"note": "\u202eabc"}, {"note": "\ud800"},
        {"note": "x" * 1001}, {"note": 5}, {"reader": "a\rb"}, {"reader": "x" * 101}, {"path": "../x"},
    ],
)  # fmt: skip
def test_an_invalid_mark_is_refused_and_nothing_is_written(viewer: Viewer, wrong: dict[str, Any]) -> None:
    answer = viewer.mark(**wrong)
    assert answer.status == 422 and answer.json()["error"]
    assert not viewer.corrections.exists()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 5000, b'{"row": NaN}'])
def test_a_body_that_is_no_mark_is_refused(viewer: Viewer, body: bytes) -> None:
    assert viewer.ask("/api/corrections", method="POST", body=body).status in (400, 422)
    assert not viewer.corrections.exists()


@pytest.mark.parametrize("note", ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "'=1", "<script>alert(1)</script>", '",0\\'])
def test_a_note_is_text_in_a_spreadsheet_and_here(viewer: Viewer, note: str) -> None:
    assert viewer.mark(note=note, reader=note).json()["note"] == note
    (mark,) = read_corrections(viewer.corrections)
    assert (mark.note, mark.reader) == (note, note)
    assert not re.search(r"(^|,)\"?[=+\-@]", viewer.corrections.read_text().splitlines()[1])


# --- who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/api/about", "/api/volumes/0/pixels/0/1", "/api/corrections"])
@pytest.mark.parametrize("token", [None, "", "wrong", "é"])
def test_without_the_token_nothing_is_answered(viewer: Viewer, path: str, token: str | None) -> None:
    answer = viewer.ask(path, X_Ich_Token=token)
    assert answer.status == 403 and viewer.token not in answer.body.decode()
    assert viewer.ask("/?token=wrong").status == 403
    assert viewer.ask(f"/?token={viewer.token}&token=x").status == 403


def test_tokens_are_random_and_long(dataset: Dataset, tmp_path: Path) -> None:
    tokens = set()
    for _ in range(2):
        with viewing(ViewData(dataset), tmp_path / "marks.csv") as viewer:
            tokens.add(viewer.token)
    assert len(tokens) == 2 and all(len(token) >= 40 for token in tokens)


@pytest.mark.parametrize(
    "host", [None, "evil.example", "127.0.0.1", "127.0.0.1:1", "evil.example:{port}", "[::1]:{port}"]
)
def test_another_host_is_refused(viewer: Viewer, host: str | None) -> None:
    """Also of the page and its files: a name of an attacker's that resolves to this machine."""
    named = None if host is None else host.format(port=viewer.port)
    for path in (f"/?token={viewer.token}", "/static/app.js", "/api/about"):
        assert viewer.ask(path, Host=named).status in (400, 403)
    assert viewer.ask("/api/about", Host=f"localhost:{viewer.port}").status == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1:{port}", "http://127.0.0.1:1", ""]
)
def test_another_origin_is_refused(viewer: Viewer, origin: str) -> None:
    named = origin.format(port=viewer.port)
    assert viewer.ask("/api/about", Origin=named).status == 403
    body = json.dumps({"row": 0, "class": "any", "value": 1, "note": "", "reader": ""}).encode()
    assert viewer.ask("/api/corrections", method="POST", body=body, Origin=named).status == 403
    assert viewer.ask("/api/corrections", method="POST", body=body, Origin=None).status == 403
    assert viewer.ask("/api/about", Sec_Fetch_Site="cross-site").status == 403
    assert not viewer.corrections.exists()


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods_are_refused(viewer: Viewer, method: str) -> None:
    assert viewer.ask("/api/corrections", method=method).status == 405
    assert viewer.ask("/api/about", method="POST", body=b"{}").status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py", "/static/..%2fserver.py", "/static/%2e%2e/server.py", "/static//etc/passwd",
        "/static/%2fetc%2fpasswd", "/static/index.html", "/static/app.js%00", "/../pyproject.toml", "/etc/passwd",
        "/api/volumes/../about", "/api/volumes/-1", "/api/volumes/1e0", "/api/volumes/999", "/api/volumes/%D9%A1",
        "/api/volumes/99999999999999999999999999", "/api/volumes/0/pixels/0/0", "/api/volumes/0/pixels/0/9",
        "/api/volumes/0/pixels/9999/1", "/api/volumes/0/pixels/..%2f0/1", "/api/volumes/0/maps/0",
        "/api/volumes/0/maps/9999", "/api/quarantine/9999.png", "/api/quarantine/..%2f0.png", "/api/none",
    ],
)  # fmt: skip
def test_what_is_not_there_is_not_found(viewer: Viewer, path: str) -> None:
    answer = viewer.ask(path)
    assert answer.status == 404
    assert b"Traceback" not in answer.body and b"import" not in answer.body


def test_requests_that_are_too_large_are_refused(viewer: Viewer) -> None:
    assert viewer.ask("/api/corrections", method="POST", body=b" " * (MAX_BODY + 1)).status == 413
    assert viewer.ask(f"/api/about?{'a' * 9000}").status == 414
    connection = http.client.HTTPConnection("127.0.0.1", viewer.port, timeout=30)
    headers = {"X-Ich-Token": viewer.token, "Origin": viewer.own, "Transfer-Encoding": "chunked"}
    connection.request("POST", "/api/corrections", (b"[" * 4096 for _ in range(20)), headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert viewer.ask("/api/about").status == 200


def test_only_this_machine_is_listened_to(viewer: Viewer) -> None:
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    local = [line.split()[1] for line in listening if line.split()[3] == "0A"]
    assert f"0100007F:{viewer.port:04X}" in local and f"00000000:{viewer.port:04X}" not in local


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_its_address_and_ends_with_ctrl_c(defects: tuple[Path, Path], tmp_path: Path) -> None:
    marks = tmp_path / "marks.csv"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background would ignore it
    process = subprocess.Popen(
        [PREP, "view", str(defects[1]), "--corrections", str(marks)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)", line)
    assert found, line
    viewer = Viewer(int(found[1]), found[2], found[0], marks)
    assert viewer.ask(f"/?token={found[2]}").status == 200
    assert viewer.mark().status == 201
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == ""
    assert len(read_corrections(marks)) == 1


def test_mistakes_are_one_message(defects: tuple[Path, Path], tmp_path: Path) -> None:
    data = str(defects[1])
    (tmp_path / "other.csv").write_text("a,b\n")
    for words, message in (
        ([data, "--corrections", f"{data}/labels/marks.csv"], "inside the dataset"),
        ([data, "--corrections", str(tmp_path / "other.csv")], "Expected corrections with the columns"),
        ([data, "--corrections", str(tmp_path)], "it is a folder"),
        ([data, "--run", str(tmp_path)], "There is no predictions.parquet"),
        ([data, "--where", "any == 1"], "--html"),
        ([data, "--html", str(tmp_path)], "not a new or empty folder"),
        ([data, "--html", str(tmp_path / "x"), "--series", "999"], "There is no series_row 999"),
    ):
        done = subprocess.run([PREP, "view", *words], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_presets_reach_the_page(viewer: Viewer) -> None:
    assert [preset["name"] for preset in viewer.ask("/api/about").json()["presets"]] == list(PRESETS)
