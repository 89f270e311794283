"""The command line, in its own process: fast help, messages without tracebacks, exit codes."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ich_prep.cli import app
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.windows import PRESETS
from tests.support.pausing import pausing, wait_until_paused

PREP = str(Path(sys.executable).with_name("ich-prep"))


def prep(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PREP, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)


def test_help_comes_after_half_a_second_of_work() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert prep("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5, seconds


def test_help_names_every_preset() -> None:
    assert all(name in prep("build", "--help").stdout for name in PRESETS)


def test_help_has_the_exit_codes() -> None:
    for words in ((), ("build",), ("shards",)):
        assert "128 + n ended by signal n" in " ".join(prep(*words, "--help").stdout.split())


def test_help_names_every_command() -> None:
    text = prep("--help").stdout
    commands = [command.callback.__name__ for command in app.registered_commands if command.callback]
    building = ["build", "plan", "shards", "publish", "status"]
    looking = ["scan", "info", "report", "find", "quarantine", "verify", "clean", "export", "view"]
    assert commands == ["synth", *building, *looking, "append", "relabel", "drop", "history"]
    assert all(name in text for name in commands)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["build", "--src", "nowhere", "--out", "x.zarr", "--workers", "0"], 1, "Expected a folder of DICOM files"),
        (["build", "--src", ".", "--out", ".", "--workers", "0"], 2, "lies inside the source"),
        (["build", "--src", ".", "--out", "x.zarr", "--codec", "gzip"], 2, "Invalid value for '--codec'"),
        (["build", "--src", ".", "--out", "x.zarr", "--layout", "rsn"], 2, "Did you mean 'rsna'?"),
        (["build", "--src", ".", "--out", "x.zarr", "--classes", "any,Any"], 2, "'Any' is not a class name"),
        (["build", "--src", ".", "--out", "x.zarr", "--classes", "a,row", "--layout", "folder"], 2, "another column"),
        (["build", "--src", ".", "--out", "x.zarr", "--classes", "a", "--layout", "rsna"], 2, "needs --layout folder"),
        (["build", "--src", ".", "--out", "ftp://bucket/x.zarr"], 2, "--out ftp://bucket/x.zarr is not a place"),
        (["build", "--src", "https://host/rsna", "--out", "x.zarr"], 2, "web servers cannot be listed"),
        (["plan", "--src", ".", "--out", "s3://bucket/x.zarr"], 2, "the parts of a build share a file system"),
        (["status", "s3://bucket/x.zarr"], 2, "The dataset is a URL"),
        (["clean", "nowhere.zarr"], 1, "Expected a dataset at nowhere.zarr"),
        (["build", "--src", ".", "--out", "x.zarr", "--windows", "brian"], 2, "Did you mean 'brain'?"),
        (["build", "--src", ".", "--out", "x.zarr", "--recipe", "none.toml"], 2, "there is no such file"),
        (["build", "--src", ".", "--out", "x.zarr", "--recipe", "."], 2, "it cannot be read (Is a directory)"),
        (["build", "--src", "."], 2, "Missing option '--out'"),
        (["build", "--src", ".", "--out", "x.zarr", "--size", "big"], 2, "Invalid value for '--size'"),
        (["synth", "--out", "x", "--layout", "dicomdir"], 2, "Expected a layout of"),
        (["synth", "--out", "/dev/full/x", "--workers", "0"], 1, "Not a directory (/dev/full/x"),
        (["info", "nowhere.zarr"], 1, "Expected a dataset at nowhere.zarr; found nothing"),
        (["verify", "nowhere.zarr"], 1, "Expected a dataset at nowhere.zarr; found nothing"),
        (["verify", "nowhere.zarr", "--sample", "2"], 2, "--sample within 0..1"),
        (["paint"], 2, "No such command 'paint'"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(words: list[str], code: int, message: str, tmp_path: Path) -> None:
    done = subprocess.run([PREP, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_from_nothing_to_a_verified_dataset(tmp_path: Path) -> None:
    src, out = tmp_path / "tree", tmp_path / "data.zarr"
    made = prep("synth", "--out", src, "--series", 1, "--size", 32, "--defects", "--workers", 0)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("1 series, ")
    assert "sign_12bit: 12 bits unsigned" in made.stdout

    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[build]\nsize = 32\nworkers = 0\nmax_quarantined = 1.0\n", encoding="utf-8")
    built = prep("build", "--src", src, "--out", out, "--recipe", recipe, "--slices-per-shard", 16)
    assert built.returncode == 0, built.stderr
    assert "Layout: rsna, because there is a folder stage_2_t" in built.stderr
    dataset = open_dataset(out)
    assert (dataset.spec.size, dataset.spec.slices_per_shard) == (32, 16)
    assert f"{len(dataset)} slices in" in built.stdout

    shown = prep("info", out)
    assert shown.returncode == 0, shown.stderr
    assert f"{len(dataset)} x 3 x 32 x 32 (slice, channel, y, x)" in shown.stdout
    summary = json.loads(prep("info", out, "--json").stdout)
    assert summary["digest"] == dataset.digest
    assert sum(line["slices"] for line in summary["folds"]) == len(dataset)
    for name in RSNA_CLASSES:
        assert sum(line[name] for line in summary["folds"]) == sum(filter(None, dataset.slices[name].to_pylist()))
    assert sum(line["files"] for line in summary["quarantine"]) == dataset.counts.quarantined

    held = prep("verify", out, "--src", src, "--sample", 1)
    assert held.returncode == 0, held.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_ends_with_one_message_and_the_build_resumes(workers: int, phantom_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    words = ["build", "--src", phantom_tree, "--out", out, "--size", 32, "--slices-per-shard", 2, "--workers"]
    # A process started in the background ignores Ctrl-C, and so do its children: not this one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    building = subprocess.Popen(
        [PREP, *map(str, words), str(workers)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=pausing("*/shards/*.json", 3),  # the process that writes shards: this one, or its worker
    )
    signal.signal(signal.SIGINT, before)
    wait_until_paused(building)
    os.killpg(building.pid, signal.SIGINT)  # as a terminal does: to the whole group
    os.killpg(building.pid, signal.SIGCONT)
    stdout, stderr = building.communicate(timeout=60)
    assert building.returncode == 130, stderr
    assert stderr.endswith("Interrupted. Run the same command again to resume.\n")
    assert "Traceback" not in stderr
    assert stdout == ""
    resumed = prep(*words, 0)
    assert resumed.returncode == 0, resumed.stderr
    assert "Writing slices: resuming after" in resumed.stderr


def test_ctrl_c_is_never_silent(dataset_path: Path, tmp_path: Path) -> None:
    """Also in a command that has nothing to resume."""
    script = (
        "import os, signal, sys\n"
        "from ich_prep import verify\n"
        "def interrupted(*_, **__):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    signal.pause()\n"
        "verify.open_dataset = interrupted\n"
        "from ich_prep.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "verify", dataset_path], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 130
    assert done.stderr == "Interrupted.\n"


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(phantom_tree: Path, tmp_path: Path) -> None:
    words = ["build", "--src", phantom_tree, "--size", 32, "--workers", 0, "--out"]
    lines = prep(*words, tmp_path / "piped.zarr").stderr
    assert "\x1b" not in lines
    assert "Writing slices: " in lines
    parent, child = pty.openpty()
    with os.fdopen(parent, "rb", buffering=0) as terminal:
        shown = subprocess.Popen(
            [PREP, *map(str, words), str(tmp_path / "shown.zarr")],
            stderr=child,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"},
        )
        os.close(child)
        seen = b""
        while True:
            try:
                part = terminal.read(65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
        assert shown.wait(60) == 0
    assert b"\x1b[" in seen
    assert b"slices/s" in seen
