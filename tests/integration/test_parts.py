"""Plan, shards in parts, publish: byte for byte as one build, whatever the order, and whoever is killed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest

from ich_prep.build_dataset import Request, build
from ich_prep.build_parts import plan_build, publish_build, write_part
from ich_prep.dataset.spec import Spec
from ich_prep.errors import BuildError, UsageError
from ich_prep.stages.parts import Part, part_lock
from ich_prep.stages.state import BuildFolder, read_state, write_state
from tests.support.cli import SMALL, prep, published, start, working
from tests.support.pausing import pausing, wait_until_paused

MANY = Spec(size=64, slices_per_shard=1)


def plan_of(tree: Path, out: Path, spec: Spec = SMALL) -> BuildFolder:
    plan_build(Request(tree, out, spec, workers=0))
    return BuildFolder(working(out))


def test_eight_parts_in_any_order_two_of_them_killed_equal_a_build(phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts.zarr"
    planned = prep("plan", "--src", phantom_tree, "--out", out, "--size", 64, "--slices-per-shard", 1, "--workers", 0)
    assert planned.returncode == 0, planned.stderr
    shards = int(re.search(r"in (\d+) shards, 0 of them written", planned.stdout)[1])  # type: ignore[index]

    def killed_after_two_shards(number: int) -> None:
        words = ["shards", out, "--part", f"{number}/8", "--workers", 0]
        process = start(*words, environment=pausing("*/shards/*.json", 2))
        wait_until_paused(process)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    killed_after_two_shards(3)
    killed_after_two_shards(8)
    early = prep("publish", out)
    assert early.returncode == 1
    assert re.search(rf"\d+ of {shards} shards are not written, such as shard 0\. Run the parts", early.stderr)

    order = random.Random(0).sample(range(1, 9), 8)
    for first, second in zip(order[::2], order[1::2], strict=True):  # two at the same time
        running = [start("shards", out, "--part", f"{number}/8", "--workers", 0) for number in (first, second)]
        assert [process.wait(120) for process in running] == [0, 0]
    done_ = prep("publish", out)
    assert done_.returncode == 0, done_.stderr
    build(phantom_tree, tmp_path / "whole.zarr", MANY, workers=0)
    assert published(out) == published(tmp_path / "whole.zarr")
    for words in (["publish", out], ["shards", out, "--part", "3/8"]):
        assert prep(*words).returncode == 0
    cleaned = prep("clean", out)
    assert cleaned.returncode == 0, cleaned.stderr
    assert not working(out).exists()


def test_a_build_goes_on_with_parts_and_parts_with_a_build(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data.zarr"
    plan_of(phantom_tree, out)
    counts = write_part(out, Part(2, 2), workers=0)
    assert (counts.written, counts.shards) == (counts.shards, counts.shards)
    assert plan_build(Request(phantom_tree, out, SMALL, workers=0)).written == counts.written
    build(phantom_tree, out, SMALL, workers=0)
    assert published(out) == published(dataset_path)
    assert publish_build(out).already_finished


def test_workers_write_a_part_too(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    plan_of(phantom_tree, out)
    write_part(out, workers=2)
    publish_build(out)
    assert published(out) == published(dataset_path)


def test_pseudonyms_are_those_of_a_build_with_the_same_key(phantom_tree: Path, tmp_path: Path) -> None:
    spec, key = SMALL.model_copy(update={"identifiers": "pseudonymise"}), tmp_path / "one.key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    build(phantom_tree, tmp_path / "whole.zarr", spec, workers=0, key=key)
    out = tmp_path / "parts.zarr"
    plan_build(Request(phantom_tree, out, spec, workers=0, key=key))
    write_part(out, workers=0)
    with pytest.raises(BuildError, match="key of the pseudonyms is missing"):
        publish_build(out)
    publish_build(out, key=key)
    assert published(out) == published(tmp_path / "whole.zarr")


def test_a_key_without_pseudonyms_is_refused(phantom_tree: Path, tmp_path: Path) -> None:
    plan_of(phantom_tree, tmp_path / "data.zarr")
    (tmp_path / "one.key").write_bytes(bytes(32))
    with pytest.raises(UsageError, match="planned with --identifiers keep"):
        publish_build(tmp_path / "data.zarr", key=tmp_path / "one.key")


# --- at the same time ------------------------------------------------------------------------------------------------


def test_what_would_meddle_with_a_running_part_is_refused(phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    folder = plan_of(phantom_tree, out)
    with part_lock(folder, Part(1, 2)):
        with pytest.raises(BuildError, match="is writing part 1/2"):
            write_part(out, Part(1, 2), workers=0)
        with pytest.raises(BuildError, match=r"Part 1/2 is being written.*--part N/2"):
            write_part(out, Part(3, 8), workers=0)
        for refused in (
            lambda: build(phantom_tree, out, SMALL, workers=0),
            lambda: plan_of(phantom_tree, out),
            lambda: publish_build(out),
            lambda: build(phantom_tree, out, SMALL, workers=0, overwrite=True),
        ):
            with pytest.raises(BuildError, match="Part 1/2 of the shards is being written"):
                refused()
        write_part(out, Part(2, 2), workers=0)
    write_part(out, Part(1, 2), workers=0)
    publish_build(out)


def test_no_part_starts_while_a_process_builds(phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    words = ["build", "--src", phantom_tree, "--out", out, "--size", 64, "--slices-per-shard", 1, "--workers", 0]
    process = start(*words, environment=pausing("*/shards/*.json", 3))
    try:
        wait_until_paused(process)
        with pytest.raises(BuildError, match="building, planning or publishing"):
            write_part(out, workers=0)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    write_part(out, workers=0)  # a killed process holds nothing
    publish_build(out)
    build(phantom_tree, tmp_path / "whole.zarr", MANY, workers=0)
    assert published(out) == published(tmp_path / "whole.zarr")


# --- what a host may lack --------------------------------------------------------------------------------------------


def test_a_folder_without_a_plan_is_refused(phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    for step in (lambda: write_part(out, workers=0), lambda: publish_build(out)):
        with pytest.raises(BuildError, match="no build in the working folder"):
            step()
    assert not list(tmp_path.iterdir())
    folder = plan_of(phantom_tree, out)
    write_state(folder, read_state(folder).model_copy(update={"plan": None}))
    with pytest.raises(BuildError, match="has no plan yet"):
        write_part(out, workers=0)


def test_a_host_with_other_versions_is_refused(phantom_tree: Path, tmp_path: Path) -> None:
    folder = plan_of(phantom_tree, tmp_path / "data.zarr")
    state = read_state(folder)
    write_state(folder, state.model_copy(update={"versions": {**state.versions, "numpy": "0.1"}}))
    for step in (lambda: write_part(tmp_path / "data.zarr", workers=0), lambda: publish_build(tmp_path / "data.zarr")):
        with pytest.raises(BuildError, match=r"made with numpy 0\.1, this machine has"):
            step()


def test_a_host_that_does_not_see_the_sources_quarantines_nothing(tree: Path, tmp_path: Path) -> None:
    folder = plan_of(tree, tmp_path / "data.zarr")
    tree.rename(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match="does not see the sources of the plan"):
        write_part(tmp_path / "data.zarr", workers=0)
    assert not list(folder.done.iterdir())


def test_a_damaged_list_of_files_is_made_again_by_the_plan(
    phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data.zarr"
    folder = plan_of(phantom_tree, out)
    write_part(out, Part(1, 2), workers=0)
    data = bytearray(folder.keys.read_bytes())
    data[len(data) // 3] ^= 1
    folder.keys.write_bytes(data)
    with pytest.raises(BuildError, match=r"list of files in .* is damaged .* Run `ich-prep plan`"):
        write_part(out, Part(2, 2), workers=0)
    plan_of(phantom_tree, out)
    write_part(out, Part(2, 2), workers=0)
    publish_build(out)
    assert published(out) == published(dataset_path)


def test_a_shard_that_changed_is_missing(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    plan_of(phantom_tree, out)
    write_part(out, workers=0)
    with (out / "images/c/1/0/0/0").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BuildError, match=r"1 of \d+ shards are not written, such as shard 1\."):
        publish_build(out)
    write_part(out, Part(2, 3), workers=0)
    publish_build(out)
    assert published(out) == published(dataset_path)


def test_a_part_of_an_archive_reads_the_archive(phantom_tree: Path, dataset_path: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "rsna"), "zip", phantom_tree))
    out = tmp_path / "data.zarr"
    plan_build(Request([archive], out, SMALL, workers=0))
    write_part(out, Part(1, 2), workers=0)
    write_part(out, Part(2, 2), workers=0)
    publish_build(out)
    assert published(out) == published(dataset_path)


def test_each_part_keeps_a_log_of_its_tasks(phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    folder = plan_of(phantom_tree, out)
    write_part(out, Part(2, 3), workers=0)
    lines = (folder.parts / "2-of-3.log.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    shards = len(list(folder.done.iterdir()))
    assert [event["task"] for event in events if event["event"] == "task"] == list(range(1, 3 * shards, 3))


@pytest.mark.parametrize("text", ["0/8", "9/8", "3", "3/0", "-1/8", "a/b", "3/8/1", "1/1000000", "٣/٨", ""])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    done = prep("shards", "data.zarr", "--part", text)
    assert done.returncode == 2
    assert "Expected a part such as 3/8" in done.stderr
