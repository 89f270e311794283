"""The arithmetic of the benchmarks: the better setting, tables, what a model predicts, whether two runs agree."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import agree, document, files, full_count, measure, racing, scaling, training, viewer
from benchmarks import relabel as relabelling
from benchmarks.measure import Result, compete, contest, in_process, publish, ratios
from ich_prep.build_dataset import build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.dicom.header import read_header
from ich_prep.phantom import synthesize
from ich_prep.relabel import relabel
from ich_train.config import TrainConfig
from ich_train.loader import Batch, SliceLoader
from ich_train.ranks import Ranks
from ich_train.session import prepare
from tests.support.slow_reads import slow_down


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "results"
    for module in (measure, agree):
        monkeypatch.setattr(module, "RESULTS", folder)
        monkeypatch.setattr(module, "BEFORE", folder / "before")
    monkeypatch.setattr(document, "RESULTS", folder)
    return folder


def test_each_contender_stays_with_its_better_setting() -> None:
    asked: list[tuple[str, bool]] = []

    def contender(name: str, plain: float, raised: float) -> Any:
        def run(with_raised: bool) -> dict[str, float]:
            asked.append((name, with_raised))
            return {"rate": raised if with_raised else plain}

        return run

    found = compete({"a": contender("a", 1, 2), "b": contender("b", 5, 3)}, 3)
    first, *counted = asked
    assert first == ("a", True)
    assert counted == [("a", False), ("a", True), ("b", False), ("b", True)] + [("a", True), ("b", False)] * 2
    assert (found["a"].median(), found["a"].malloc) == (2, "raised; as it comes 1")
    assert (found["b"].median(), found["b"].malloc) == (5, "as it comes; raised 3")
    assert len(found["a"].runs) == len(found["b"].runs) == 3


def test_a_failing_contender_is_skipped_and_the_others_continue(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(raised: bool) -> dict[str, float]:
        raise RuntimeError("no such library")

    found = compete({"a": fails, "b": lambda raised: {"rate": 1.0}}, 2)
    assert {name: len(one.runs) for name, one in found.items()} == {"b": 2}
    assert "Skipped: a: no such library" in capsys.readouterr().err


def test_a_table_shows_shares_of_the_limit_and_how_many_times_as_fast() -> None:
    rates = {"ours": (100.0, 50.0, 130.0), "limit": (200.0, 100.0, 200.0), "peer": (25.0, 12.5, 20.0)}
    found = {name: Result([{"rate": rate} for rate in some]) for name, some in rates.items()}
    lines = contest("x", found, limit="limit", ours="ours", more={}).lines
    assert [line[0] for line in lines] == ["ours", "limit", "peer"]
    assert [line[-2:] for line in lines] == [["0.50", "1.00 x"], ["1.00", "0.50 x"], ["0.12", "4.00 x"]]
    assert lines[0][1:3] == ["100", "50 to 130"]
    assert ratios(found, ours="ours") == {"limit": 0.5, "peer": 4.0}


def test_results_are_kept_next_to_the_last_ones_and_become_the_page(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = measure.Section("Build: a title", ["", "slices/s"], [["ours", "1,234"]], ["a note"])
    publish("build-x", [section], ratios={"peer": 4.0})
    publish("build-x", [section], ratios={"peer": 4.3})
    assert json.loads((results / "before" / "build-x.json").read_text())["ratios"] == {"peer": 4.0}
    assert "1,234" in capsys.readouterr().out
    page = tmp_path / "benchmarks.md"
    monkeypatch.setattr(document, "DOC", page)
    document.main()
    assert "## Build: a title\n\n|  | slices/s |\n|---|---:|\n| ours | 1,234 |\n\na note\n" in page.read_text()


@pytest.mark.parametrize(("now", "code"), [(4.3, 0), (4.5, 1), (3.5, 1)])
def test_two_runs_agree_or_not(now: float, code: int, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for peer in (4.0, now):
        publish("build-x", [], ratios={"peer": peer, "other": 2.0})
    with pytest.raises(agree.typer.Exit) as ended:
        agree.main(within=0.1)
    assert ended.value.exit_code == code
    assert f"{2 - code} of 2 ratios agree" in capsys.readouterr().out


def test_one_run_cannot_agree_with_another(results: Path) -> None:
    publish("build-x", [], ratios={"peer": 4.0})
    with pytest.raises(SystemExit, match="two runs"):
        agree.main()


def run_of(slices: int, *, fixed: float, serial: float, driver: float, worker: float, workers: int) -> dict[str, Any]:
    """A build that behaves as the model says, on two cores."""
    together = max((worker + driver) / 2, worker / workers, driver) * slices
    stages = {"list": fixed + serial * slices, "plan": 0.0, "publish": 0.0, "scan": 0.0, "shards": together}
    cpu = {"driver": 3 + (serial + driver) * slices, "workers": 2 + worker * slices}
    return {"slices": slices, "stages": stages, "cpu": cpu}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_model_predicts_a_build_that_behaves_like_it(workers: int) -> None:
    truth = {"fixed": 1.5, "serial": 1e-4, "driver": 2e-4, "worker": 1.2e-3}
    few, many = run_of(1_000, **truth, workers=2), run_of(4_000, **truth, workers=2)
    model = scaling.fit(few, many, serial=scaling.serial_cost(few, many))
    for name, value in truth.items():
        assert getattr(model, name) == pytest.approx(value, rel=1e-6)
    seen = scaling.total(run_of(9_000, **truth, workers=workers))
    assert model.seconds(9_000, workers=workers, cores=2) == pytest.approx(seen, rel=1e-6)
    # No number of cores is faster than the driver.
    assert model.seconds(10_000, workers=999, cores=999) == pytest.approx(1.5 + 10_000 * (1e-4 + 2e-4))


def test_a_typical_run_is_made_of_medians() -> None:
    runs = [{"slices": 9, "stages": {"scan": a, "plan": b}, "cpu": {"driver": b}} for a, b in ((1, 6), (5, 4), (2, 5))]
    assert scaling.typical(Result(runs)) == {"slices": 9, "stages": {"scan": 2, "plan": 5}, "cpu": {"driver": 5}}


@pytest.mark.parametrize("name", ["ID_0123456789", "1.2.840.113619.2.5.1762583153.9"])
def test_a_copy_has_another_identifier_of_the_same_form(name: str) -> None:
    names = {files._renamed(name, copy) for copy in range(5)}
    assert name in names
    assert {len(one) for one in names} == {len(name)}
    assert all(one.startswith("ID_") or all(part.isdigit() for part in one.split(".")) for one in names)


def test_copies_of_a_slice_are_other_files_with_its_pixels(tmp_path: Path) -> None:
    synthesize(tmp_path / "rsna", series=1, size=32, workers=0)
    source = next((tmp_path / "rsna").rglob("*.dcm"))
    files._copy(source, tmp_path / "copy.dcm", 1)
    before, after = read_header(source), read_header(tmp_path / "copy.dcm")
    assert before.sop_instance_uid != after.sop_instance_uid
    assert before.series_instance_uid != after.series_instance_uid
    assert (tmp_path / "copy.dcm").read_bytes()[after.pixel_offset :] == source.read_bytes()[before.pixel_offset :]


def test_a_race_reports_rate_first_batch_memory_and_checksum_without_its_warm_up(tmp_path: Path) -> None:
    script = tmp_path / "contender.py"
    script.write_text(
        "import time\n"
        "import numpy as np\n"
        "from benchmarks.racing import random_batches, race\n"
        "rows = np.arange(256, dtype=np.uint8)\n"
        "def batches():\n"
        "    for number, one in enumerate(random_batches(256)):\n"
        "        if number == 2:\n"
        "            time.sleep(0.5)\n"
        "        yield rows[one]\n"
        "race(lambda: (batches(), lambda wanted: rows[wanted]), seconds=0.1, slices=0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(measure.ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, check=True, timeout=60)
    run = json.loads(done.stdout)
    assert run["rate"] > 1000
    assert 0 <= run["first_batch"] < 1
    assert 1e6 < run["memory"] < 1e9
    assert run["checksum"] == 0x100ECE8C


@pytest.mark.parametrize(("quiet_windows", "expected"), [(2, 6400), (0, 640)])
def test_disturbed_windows_count_only_if_there_are_no_others(
    monkeypatch: pytest.MonkeyPatch, quiet_windows: int, expected: float
) -> None:
    """Batches take ten times as long in a window of which half was stolen, which is every second window."""
    clock, number = 0.0, 0

    def stolen_since(_: object) -> float:
        nonlocal number
        number += 1
        return 0.5 if is_disturbed(number - 1) else 0.0

    def is_disturbed(window: int) -> bool:
        return window % 2 == 0 or window // 2 >= quiet_windows

    def batches() -> Iterator[np.ndarray]:
        nonlocal clock
        while True:
            clock += 0.1 if is_disturbed(number) else 0.01
            yield np.zeros(64)

    monkeypatch.setattr(racing, "time", SimpleNamespace(perf_counter=lambda: clock))
    monkeypatch.setattr(racing, "stolen_since", stolen_since)
    assert racing.steady_rate(batches(), 2 * racing.WINDOW) == pytest.approx(expected, rel=0.05)


def test_a_disturbed_run_is_repeated_and_the_less_disturbed_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rates(shares: list[float]) -> list[float]:
        left, runs = iter(shares), iter([{"rate": 1.0}, {"rate": 2.0}, {"rate": 3.0}])
        monkeypatch.setattr(measure, "stolen_since", lambda _: next(left))
        return [measure.undisturbed(lambda: next(runs))["rate"], next(runs)["rate"]]

    assert rates([0.01]) == [1.0, 2.0]
    assert rates([0.2, 0.1]) == [2.0, 3.0]
    assert rates([0.2, 0.3]) == [1.0, 3.0]


def test_stolen_time_is_a_share_of_the_time_of_all_cores() -> None:
    before = racing.core_time()
    time.sleep(0.05)
    assert racing.core_time()[1] > before[1] > before[0] >= 0
    assert 0 <= racing.stolen_since(before) <= 1


def test_memory_counts_the_private_memory_of_a_process() -> None:
    before = racing.memory_of(os.getpid())
    block = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE)  # from the kernel: the heap may have free memory
    np.frombuffer(block, np.uint8)[:] = 1
    assert racing.memory_of(os.getpid()) - before == pytest.approx(len(block), rel=0.2)


def test_a_failing_contender_is_reported_with_its_error_output() -> None:
    with pytest.raises(RuntimeError, match="No module named"):
        in_process("benchmarks.no_such_thing")


@pytest.mark.parametrize("syntax", files.SYNTAXES.values(), ids=list(files.SYNTAXES))
def test_the_png_pool_reads_slices_of_every_syntax(syntax: str, tmp_path: Path) -> None:
    synthesize(tmp_path / "rsna", series=1, size=32, workers=0)
    (tmp_path / "slices").mkdir()
    for source in sorted((tmp_path / "rsna").rglob("*.dcm"))[:3]:
        files._encode(syntax, tmp_path / "slices", source)
    words = (str(tmp_path / "slices"), str(tmp_path / "out"), "32", "windows", "folder", "2")
    assert in_process("benchmarks.build_contenders", "png pool", *words)["slices"] == 3


def test_a_failed_process_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "slices").mkdir()
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / "slices" / name).write_bytes(b"no slice")
    words = (str(tmp_path / "slices"), str(tmp_path / "out"), "32", "windows", "folder", "2")
    with pytest.raises(RuntimeError, match="InvalidDicomError"):
        in_process("benchmarks.build_contenders", "png pool", *words, seconds=60)


def test_training_reports_how_long_it_waited_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WARM_STEPS", 2)
    synthesize(tmp_path / "rsna", series=6, size=32, workers=0)
    build(tmp_path / "rsna", tmp_path / "data.zarr", Spec(size=32, slices_per_shard=16, folds=3), workers=0)
    dataset = open_dataset(tmp_path / "data.zarr")
    learner = prepare(dataset, TrainConfig(batch_size=8, device="cpu"), Ranks(0, 1, torch.device("cpu")), weights=None)
    loader = SliceLoader(dataset, np.resize(learner.loader.rows, 8 * 2000), 8)
    kept = [Batch(*(tensor.clone() for tensor in batch)) for batch, _ in zip(loader, range(2), strict=False)]
    resident = training.pace(learner, training.Resident(kept), 0.3)
    assert resident["waiting"] == 0
    assert resident["rate"] > 0
    slow_down(dataset, 0.1)  # a step takes a few milliseconds, and two threads read
    fed = training.pace(learner, loader, 1.0)
    assert 0 < fed["waiting"] <= 1
    assert fed["rate"] > 0


def test_without_a_gpu_nothing_is_trained_and_the_last_results_are_kept(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    training.main()
    assert "No GPU was found" in capsys.readouterr().out
    assert not results.exists()


def test_a_repeated_dataset_has_the_same_slices_again(dataset_path: Path, phantom_tree: Path, tmp_path: Path) -> None:
    slices = len(open_dataset(dataset_path))
    build(phantom_tree, tmp_path / "small.zarr", Spec(size=64, slices_per_shard=slices), workers=0)
    many = open_dataset(viewer.repeated(tmp_path / "small.zarr", tmp_path / "many.zarr", 2 * slices + 1))
    assert len(many) == 3 * slices and many.slices["row"].to_pylist() == list(range(3 * slices))
    small = open_dataset(tmp_path / "small.zarr")
    for copy in range(3):
        volume = many.volume(series_row=1 + copy * len(small.series))
        np.testing.assert_array_equal(volume, small.volume(series_row=1))


def test_the_files_of_the_full_count_are_slices_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_count, "TEMPLATE_SERIES", 4)
    of = full_count.templates(tmp_path / "phantom", 32)
    files = 2 * len(of) + 5
    full_count.make(tmp_path / "rsna", of, 0, files, 32)
    full_count.make(tmp_path / "rsna.zip", of, 0, files, 32)
    spec = Spec(size=32, layout="rsna")
    for name in ("rsna", "rsna.zip"):
        build(tmp_path / name, tmp_path / f"{name}.zarr", spec, workers=0)
    dataset, packed = (open_dataset(tmp_path / f"{name}.zarr") for name in ("rsna", "rsna.zip"))
    assert dataset.counts.ok == files and packed.digest == dataset.digest
    for name in ("sop_instance_uid", "content_hash"):
        assert len(set(dataset.slices[name].to_pylist())) == files
    train = np.array(dataset.slices["subset"].to_pylist()) == "train"
    assert (dataset.labels[train] >= 0).all() and (dataset.labels[train][:, -1] == 1).any()


def test_no_two_files_of_the_full_count_have_one_identifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_count, "TEMPLATE_SERIES", 4)
    of = full_count.templates(tmp_path / "phantom", 32)
    copies = full_count.FULL_COUNT // len(of) + 1
    names = {full_count.renamed(template, copy)[template.sop] for template in of for copy in range(copies)}
    assert len(names) == len(of) * copies


def test_enlarged_tables_are_those_of_a_dataset(tmp_path: Path) -> None:
    synthesize(tmp_path / "rsna", series=2, size=32, layout="rsna", workers=0)
    build(tmp_path / "rsna", tmp_path / "data.zarr", Spec(size=32, slices_per_shard=16), workers=0)
    relabelling.enlarge(open_dataset(tmp_path / "data.zarr"), 500)
    dataset = open_dataset(tmp_path / "data.zarr")
    assert len(dataset) >= 500 and len(set(dataset.slices["sop_instance_uid"].to_pylist())) == len(dataset)
    relabelling.label_lines(dataset, tmp_path / "old.csv")
    with (tmp_path / "old.csv").open() as old:
        full_count.changed_labels(old, tmp_path / "new.csv")
    assert relabel(tmp_path / "data.zarr", tmp_path / "new.csv").slices > 0
