"""The viewer's page in a real browser, as a reader uses it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ich_prep.dataset.corrections import read_corrections
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.explanations import Explanations
from ich_prep.dataset.windows import PRESETS, Window, window_codes
from ich_prep.view.data import ViewData
from ich_prep.view.pages import write_pages
from tests.support.axe import faults
from tests.support.sealing import reseal
from tests.support.viewer import Viewer, viewing

CANVAS = """(number) => {
    const canvas = document.querySelectorAll('.pane .pixels')[number];
    const { width, height } = canvas;
    const { data } = canvas.getContext('2d').getImageData(0, 0, width, height);
    return [width, height, Array.from(data.filter((_, i) => i % 4 === 0))];
}"""
STATE = "() => ({ line: ICH.state.line, slice: ICH.state.slice, rows: ICH.state.volume?.slices.row })"

OVERLAY = """() => {
    const overlay = document.querySelector('.pane .overlay');
    const image = document.querySelector('.pane .pixels').getBoundingClientRect();
    const pane = overlay.getBoundingClientRect();
    const alpha = (share) => overlay.getContext('2d').getImageData(
        image.left - pane.left + image.width * share, image.top - pane.top + image.height * share, 1, 1).data[3];
    return [alpha(0.2), alpha(0.8)];
}"""


@pytest.fixture
def hu(datasets: dict[str, Path]) -> Iterator[Dataset]:
    with open_dataset(datasets["hu"]) as dataset:
        yield dataset


@pytest.fixture
def viewer(hu: Dataset, tmp_path: Path) -> Iterator[Viewer]:
    with viewing(ViewData(hu), tmp_path / "marks.csv") as running:
        yield running


def opened(page: Any, url: str) -> Any:
    page.goto(url)
    settle(page)
    return page


def settle(page: Any) -> None:
    """Wait until the volume is loaded and drawn."""
    page.wait_for_function("() => ICH.state.volume?.pixels.complete")
    page.evaluate(
        "() => new Promise((done) => { ICH.redraw(); requestAnimationFrame(() => requestAnimationFrame(done)); })"
    )


def canvas(page: Any, number: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    width, height, values = page.evaluate(CANVAS, number)
    return np.array(values, np.uint8).reshape(height, width)


def shown_row(page: Any) -> int:
    state = page.evaluate(STATE)
    return int(state["rows"][state["slice"]])


def shown_label(page: Any, number: int) -> str:
    """What the page says of a class of the slice."""
    return str(page.locator("#label-rows .state").all_text_contents()[number])


def codes_of(dataset: Dataset, row: int, window: Window) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return window_codes(dataset.read([row])[0, 0], window)


def test_the_canvas_holds_the_codes_of_the_window(page: Any, viewer: Viewer, hu: Dataset) -> None:
    opened(page, viewer.url)
    for window in PRESETS.values():
        page.get_by_role("button", name=window.name.replace("_", " "), exact=True).click()
        settle(page)
        np.testing.assert_array_equal(canvas(page), codes_of(hu, shown_row(page), window))
    page.keyboard.press("t")
    settle(page)
    for number, window in enumerate(hu.spec.windows):
        np.testing.assert_array_equal(canvas(page, number), codes_of(hu, shown_row(page), window))


def test_a_store_of_windows_is_shown_by_channel(page: Any, datasets: dict[str, Path], tmp_path: Path) -> None:
    with open_dataset(datasets["windows"]) as dataset, viewing(ViewData(dataset), tmp_path / "marks.csv") as viewer:
        opened(page, viewer.url)
        for channel, window in enumerate(dataset.spec.windows):
            page.get_by_role("button", name=window.name, exact=True).click()
            settle(page)
            np.testing.assert_array_equal(canvas(page), dataset.read([shown_row(page)])[0, channel])
        assert page.get_by_role("button", name="stroke").count() == 0


def test_wheel_keys_and_drags_move_through_the_slices(page: Any, viewer: Viewer, hu: Dataset) -> None:
    opened(page, viewer.url)
    place = page.locator(".pane").bounding_box()
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    moves: list[tuple[Callable[[], None], int | None]] = [
        (lambda: page.keyboard.press("Home"), None),
        (lambda: page.keyboard.press("ArrowDown"), 1),
        (lambda: page.keyboard.press("PageDown"), 10),
        (lambda: page.keyboard.press("ArrowUp"), -1),
        (lambda: (page.mouse.move(x, y), page.mouse.wheel(0, 120))[1], 3),
    ]
    for act, by in moves:
        before = page.evaluate(STATE)["slice"]
        act()
        page.wait_for_timeout(50)
        after = page.evaluate(STATE)["slice"]
        assert after == (0 if by is None else before + by)
    before = after
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y + 24, steps=6)
    page.mouse.up()
    assert page.evaluate(STATE)["slice"] == before + 4
    settle(page)
    np.testing.assert_array_equal(canvas(page), codes_of(hu, shown_row(page), hu.spec.windows[0]))


def test_a_drag_changes_the_window(page: Any, viewer: Viewer, hu: Dataset) -> None:
    opened(page, viewer.url)
    place = page.locator(".pane").bounding_box()
    page.mouse.move(place["x"] + 200, place["y"] + 200)
    page.mouse.down(button="right")
    page.mouse.move(place["x"] + 260, place["y"] + 180, steps=5)
    page.mouse.up(button="right")
    free = page.evaluate("() => ICH.state.window")
    assert free["name"] == "free" and free["width"] > 80 and free["center"] > 40
    settle(page)
    window = Window("free", free["center"], free["width"])
    np.testing.assert_array_equal(canvas(page), codes_of(hu, shown_row(page), window))


def test_what_is_under_the_cursor_is_said(page: Any, viewer: Viewer, hu: Dataset) -> None:
    opened(page, viewer.url)
    place = page.locator(".pane .pixels").bounding_box()
    scale = place["width"] / hu.spec.size
    column, row = 30, 51
    page.mouse.move(place["x"] + (column + 0.5) * scale, place["y"] + (row + 0.5) * scale)
    said = page.locator(".pane .readout").inner_text()
    state = page.evaluate(STATE)
    value = hu.read([shown_row(page)])[0, 0, row, column]
    assert said.startswith(f"{value} HU") and f"x {column}, y {row}" in said
    affine = hu.affine(int(hu.series["series_row"][state["line"]].as_py()))
    if affine is not None:
        mm = affine @ [column, row, state["slice"], 1]
        numbers = [float(word) for word in said.splitlines()[1].split()[1::2]]
        np.testing.assert_allclose(numbers, mm[:3], atol=0.3)


def test_filters_the_strip_and_the_next_positive(page: Any, viewer: Viewer, hu: Dataset) -> None:
    opened(page, viewer.url)
    expected = np.flatnonzero(np.array([value == 1 for value in hu.series["subdural"].to_pylist()]))
    page.select_option("#filter-label", "subdural=1")
    assert page.locator("#list-count").inner_text().startswith(f"{len(expected)} of {len(hu.series)}")
    longest = max(expected, key=lambda line: hu.series["n_slices"][int(line)].as_py())
    page.locator(f"#volume-{longest}").click()
    page.wait_for_function(f"() => ICH.state.volume.line === {longest}")
    settle(page)
    state = page.evaluate(STATE)
    positive = [k for k, row in enumerate(state["rows"]) if hu.slices["subdural"][row].as_py() == 1]
    box = page.locator("#strip-box").bounding_box()
    page.mouse.click(box["x"] + (positive[-1] + 0.5) * box["width"] / len(state["rows"]), box["y"] + 20)
    assert page.evaluate(STATE)["slice"] == positive[-1]
    page.keyboard.press("Home")
    page.evaluate("() => ICH.chooseClass(ICH.about.classes.indexOf('subdural'))")
    page.keyboard.press("n")
    assert page.evaluate(STATE)["slice"] == next(k for k in [*positive, *positive] if k > 0)
    page.keyboard.press("p")
    assert page.evaluate(STATE)["slice"] in positive
    page.fill("#filter-where", "n_slices > 9999")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('list-count').textContent.startsWith('0 of')")
    page.fill("#filter-where", "n_slice > 9999")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('where-error').textContent.includes('n_slices')")


def test_a_slice_is_marked_by_keys(page: Any, viewer: Viewer, hu: Dataset) -> None:
    opened(page, viewer.url)
    row = shown_row(page)
    page.fill("#note", "<b>=1+1</b>")
    page.keyboard.press("Escape")
    page.keyboard.press("5")
    page.wait_for_function("() => ICH.marks.count === 1")
    page.keyboard.press("Shift+2")
    page.wait_for_function("() => ICH.marks.count === 2")
    first, second = read_corrections(viewer.corrections)
    assert (first.row, first.class_name, first.note) == (row, "subdural", "<b>=1+1</b>")
    assert first.value == (0 if hu.slices["subdural"][row].as_py() == 1 else 1)
    assert (second.class_name, second.value) == ("intraparenchymal", None)
    page.keyboard.press("u")
    page.wait_for_function("() => document.getElementById('toast').textContent.includes('intraparenchymal')")
    page.reload()
    settle(page)
    assert page.evaluate("() => ICH.marks.count") == 2


def test_the_quarantine_opens_by_key(page: Any, viewer: Viewer, hu: Dataset) -> None:
    opened(page, viewer.url)
    page.keyboard.press("q")
    page.wait_for_selector("#quarantine tbody tr")
    assert page.locator("#quarantine tbody tr").count() == len(hu.read_table("quarantine"))
    page.locator(".reason", has_text="duplicate").click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('tbody code')].every((code) => code.textContent === 'duplicate')"
    )
    page.keyboard.press("5")  # no slice is seen here, so none is marked
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert page.evaluate("() => document.body.dataset.tab") == "viewer"
    assert not viewer.corrections.exists()


def test_a_sphere_is_round_in_all_three_planes(
    page: Any, hu: Dataset, datasets: dict[str, Path], tmp_path: Path
) -> None:
    """Its voxels are not cubes: the slices are further apart than the pixels."""
    copy = Path(shutil.copytree(datasets["hu"], tmp_path / "sphere.zarr"))
    volume, radius, center = (
        next(
            row for row in range(len(hu.series)) if hu.affine(row) is not None and hu.series["n_ok"][row].as_py() > 20
        ),
        30.0,
        (50, 44),
    )
    affine = hu.affine(volume)
    assert affine is not None
    count = int(hu.series["n_ok"][volume].as_py())
    z, y, x = np.indices((count, 96, 96))
    place = np.tensordot(affine[:3, :3], np.stack([x - center[0], y - center[1], z - count // 2]), 1)
    sphere = np.where(np.linalg.norm(place, axis=0) < radius, 40, 0).astype(np.int16)

    class Painted(ViewData):
        def pixels(self, line: int, first: int, count: int) -> bytes:
            return sphere[first : first + count].tobytes()

    with open_dataset(copy) as dataset, viewing(Painted(dataset), tmp_path / "marks.csv") as viewer:
        opened(page, viewer.url)
        page.evaluate(f"() => ICH.open({volume})")
        page.wait_for_function(f"() => ICH.state.volume?.line === {volume}")
        page.keyboard.press("m")
        page.evaluate(f"() => {{ ICH.state.point = [{center[0]}, {center[1]}]; ICH.go({count // 2}); }}")
        settle(page)
        pixel = float(np.linalg.norm(affine[:3, 0]))
        for number in range(3):
            inside = np.argwhere(canvas(page, number) > 60)
            height, width = np.ptp(inside, axis=0) + 1
            assert width * pixel == pytest.approx(2 * radius, abs=2 * pixel + 0.5)
            assert height * pixel == pytest.approx(2 * radius, abs=6.0 if number else 2 * pixel + 0.5)


def test_a_run_is_shown_errors_first_with_its_maps(page: Any, hu: Dataset, tmp_path: Path) -> None:
    predictions = np.where(hu.labels == 1, 0.9, 0.1).astype(np.float32)
    predictions[~hu.is_ok] = np.nan
    row = int(hu.where("status == 'ok' and any == 0 and n_slices > 10")[7])
    predictions[row, 4] = 0.97
    rows = np.flatnonzero(hu.is_ok)
    values = np.zeros((len(rows), len(hu.classes), 8, 8), np.uint8)
    values[:, :, :4, :4] = 255
    data = ViewData(hu, predictions=predictions, explanations=Explanations(rows, values), run_name="net")
    with viewing(data, tmp_path / "marks.csv") as viewer:
        opened(page, viewer.url)
        assert shown_row(page) == row  # the worst error of the worst volume
        assert "run net" in page.locator("#subtitle").inner_text()
        assert page.locator("#label-rows .wrong").all_inner_texts() == ["0.970"]
        page.keyboard.press("Home")
        page.keyboard.press("e")
        assert shown_row(page) == row
        page.keyboard.press("g")
        page.wait_for_function("() => ICH.heatMap(ICH.state.slice)")
        settle(page)
        shown = page.evaluate(OVERLAY)
        assert shown[0] > 100 and shown[1] == 0  # red over the upper left quarter, nothing over the lower right
        page.select_option("#filter-error", "fp")
        assert page.locator("#list-count").inner_text().startswith("1 of")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(browser: Any, axe: str, viewer: Viewer, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
    page = opened(context.new_page(), viewer.url)
    page.evaluate(axe)
    for show in (
        *(f"() => ICH.tab('{tab}')" for tab in ("viewer", "volumes", "quarantine")),
        "() => ICH.byId('help').showModal()",
    ):
        page.evaluate(show)
        page.wait_for_timeout(200)
        assert faults(page) == []
    context.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_a_reader_finds_a_bleed_marks_it_and_relabels(
    browser: Any, page: Any, datasets: dict[str, Path], tmp_path: Path, width: int
) -> None:
    """Everything by the hands of a reader: from a filter to the label that the reopened viewer shows."""
    copy = Path(shutil.copytree(datasets["hu"], tmp_path / "data.zarr"))
    marks = tmp_path / "marks.csv"
    page.set_viewport_size({"width": width, "height": 800})
    with open_dataset(copy) as dataset, viewing(ViewData(dataset), marks) as viewer:
        opened(page, viewer.url)
        if width == 400:
            page.click("#tab-volumes")
        page.select_option("#filter-label", "subdural=1")
        positive = np.flatnonzero(dataset.series["subdural"].to_numpy(zero_copy_only=False) == 1)
        line = int(max(positive, key=lambda number: dataset.series["n_slices"][int(number)].as_py()))
        page.locator(f"#volume-{line}").click()
        page.wait_for_function(f"() => ICH.state.volume?.line === {line}")
        settle(page)
        box = page.locator(".pane").bounding_box()
        page.mouse.click(
            box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        )  # from here on, keys are the images'
        page.keyboard.press("Home")
        page.mouse.wheel(0, 120)
        page.wait_for_function("() => ICH.state.slice === 3")
        page.keyboard.press("ArrowDown")
        page.wait_for_function("() => ICH.state.slice === 4")
        page.get_by_role("button", name="bone", exact=True).click()
        settle(page)
        np.testing.assert_array_equal(canvas(page), codes_of(dataset, shown_row(page), PRESETS["bone"]))
        rows = page.evaluate(STATE)["rows"]
        bleeding = [k for k, row in enumerate(rows) if dataset.slices["subdural"][row].as_py() == 1][-1]
        strip = page.locator("#strip-box").bounding_box()
        page.mouse.click(strip["x"] + (bleeding + 0.5) * strip["width"] / len(rows), strip["y"] + 20)
        page.wait_for_function(f"() => ICH.state.slice === {bleeding}")
        row, at = rows[bleeding], dataset.classes.index("subdural")
        assert dataset.slices["subdural"][row].as_py() == 1 and shown_label(page, at) == "positive"
        page.click("#tab-quarantine")
        page.wait_for_selector("#quarantine tbody tr")
        page.click("#tab-viewer")
        page.locator("#stage").focus()
        page.keyboard.press(str(at + 1))
        page.wait_for_function("() => ICH.marks.count === 1")
        assert [(mark.row, mark.class_name, mark.value) for mark in read_corrections(marks)] == [(row, "subdural", 0)]

    program = Path(sys.executable).with_name("ich-prep")
    words = [program, "relabel", copy, "--labels", marks, "--allow-contradictions"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    with open_dataset(copy) as dataset, viewing(ViewData(dataset), tmp_path / "more.csv") as viewer:
        assert dataset.slices["subdural"][row].as_py() == 0
        opened(page, viewer.url)
        page.evaluate(f"() => ICH.open({line})")
        page.wait_for_function(f"() => ICH.state.volume?.line === {line}")
        page.evaluate(f"() => ICH.go({bleeding})")
        settle(page)
        assert shown_row(page) == row and shown_label(page, at) == "negative"


def test_pages_from_disk_show_the_same(page: Any, hu: Dataset, tmp_path: Path) -> None:
    assert write_pages(ViewData(hu), tmp_path / "site", [1, 3]) == 2
    opened(page, (tmp_path / "site" / "index.html").as_uri())
    assert page.locator("#list-count").inner_text() == "2 of 2 volumes"
    np.testing.assert_array_equal(canvas(page), codes_of(hu, shown_row(page), hu.spec.windows[0]))
    page.keyboard.press("]")
    page.wait_for_function("() => ICH.state.line === 3")
    settle(page)
    np.testing.assert_array_equal(canvas(page), codes_of(hu, shown_row(page), hu.spec.windows[0]))
    page.keyboard.press("q")
    page.wait_for_selector("#quarantine tbody tr")


def test_text_from_a_dataset_is_never_html(page: Any, datasets: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(datasets["hu"], tmp_path / "hostile.zarr"))
    hostile = "<img src=x onerror=\"document.title='owned'\">\x1b\u202e"
    for table, names in (
        ("slices", ("sop_instance_uid", "patient_id")),
        ("series", ("series_instance_uid", "patient_id", "scan_type", "series_description")),
        ("quarantine", ("path", "detail")),
    ):
        path = copy / "labels" / f"{table}.parquet"
        read = pq.read_table(path)
        for name in names:
            read = read.set_column(read.schema.get_field_index(name), name, pa.array([hostile] * len(read)))
        pq.write_table(read, path)
    reseal(copy)
    with open_dataset(copy) as dataset, viewing(ViewData(dataset), tmp_path / "marks.csv") as viewer:
        opened(page, viewer.url)
        page.keyboard.press("q")
        page.wait_for_selector("#quarantine tbody tr")
        assert page.locator("img").count() == 0 and "owned" not in page.title()
        assert "\\u001b\\u202e" in page.locator("#quarantine .path").first.inner_text()


def test_a_narrow_window_shows_everything(page: Any, viewer: Viewer) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    opened(page, viewer.url)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 400
    page.click("#tab-volumes")
    before = page.evaluate(STATE)["line"]
    page.locator(".volume").nth(1).click()
    page.wait_for_function(
        f"() => ICH.state.volume?.line > -1 && ICH.state.volume.line !== {before} && document.body.dataset.tab === 'viewer'"
    )
    settle(page)
    assert page.locator(".pane .pixels").is_visible()
    for key in ("t", "m"):
        page.keyboard.press(key)
        settle(page)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 400
