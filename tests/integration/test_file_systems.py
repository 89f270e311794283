"""File systems without locks and without a sync of folders, made by a library that is loaded before the C library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import PREP, published, working
from tests.support.pausing import pausing, wait_until_paused
from tests.support.preload import compiled

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static int asked(const char *name) { const char *value = getenv(name); return value ? atoi(value) : 0; }

int flock(int fd, int operation) {
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    if (asked("NO_FLOCK")) { errno = asked("NO_FLOCK"); return -1; }
    return real(fd, operation);
}

int link(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "link");
    if (asked("NO_LINK")) { errno = asked("NO_LINK"); return -1; }
    return real(from, to);
}

int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    struct stat status;
    int is_folder = fstat(fd, &status) == 0 && S_ISDIR(status.st_mode);
    int error = asked(is_folder ? "NO_FOLDER_SYNC" : "NO_FILE_SYNC");
    if (error) { errno = error; return -1; }
    return real(fd);
}
"""
WORDS = ("--size", "64", "--slices-per-shard", "16")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(SHIM, tmp_path_factory.mktemp("shim") / "shim.so", "file systems without locks and syncs are")


def lacking(shim: Path, **errors: int) -> dict[str, str]:
    return {**os.environ, "LD_PRELOAD": str(shim), **{name: str(number) for name, number in errors.items()}}


def start(src: Path, out: Path, environment: dict[str, str], *more: str) -> subprocess.Popen[str]:
    words = [PREP, "build", "--src", str(src), "--out", str(out), *WORDS, "--workers", "0", *more]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


@pytest.mark.parametrize(
    ("errors", "note"),
    [
        ({"NO_FLOCK": 38}, "has no locks"),
        ({"NO_FLOCK": 37}, "has no locks"),
        ({"NO_FLOCK": 95}, "has no locks"),
        ({"NO_FLOCK": 22}, "has no locks"),
        ({"NO_FLOCK": 38, "NO_LINK": 1}, "has no locks"),
        ({"NO_FOLDER_SYNC": 22}, "cannot sync folders"),
        ({"NO_FOLDER_SYNC": 9}, "cannot sync folders"),
    ],
)
def test_a_lacking_file_system_costs_a_note_and_no_byte(
    errors: dict[str, int], note: str, shim: Path, phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data.zarr"
    for second in (False, True):
        process = start(phantom_tree, out, lacking(shim, **errors))
        _, printed = process.communicate(timeout=120)
        assert process.returncode == 0, printed
        assert printed.count(note) == (not second)
        assert published(out) == published(dataset_path)
        assert not [path for path in working(out).iterdir() if path.name.startswith("lease")]


@pytest.mark.parametrize("moment", ["*/lease", "*/.lease", "*/plan.parquet"])
def test_a_build_killed_without_locks_leaves_a_lease_that_the_next_one_breaks(
    moment: str, shim: Path, phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out, environment = tmp_path / "data.zarr", lacking(shim, NO_FLOCK=37, NO_FOLDER_SYNC=22)
    process = start(phantom_tree, out, pausing(moment, environment=environment))
    wait_until_paused(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (working(out) / "lease").exists() or (out / ".lease").exists()
    process = start(phantom_tree, out, environment)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert published(out) == published(dataset_path)


def test_of_two_builders_without_locks_one_builds_and_the_other_names_it(
    shim: Path, phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out, environment = tmp_path / "data.zarr", lacking(shim, NO_FLOCK=38)
    first = start(phantom_tree, out, pausing("*/lease", environment=environment))
    wait_until_paused(first)
    second = start(phantom_tree, out, environment)
    other_folder = start(phantom_tree, out, environment, "--build-dir", str(tmp_path / "elsewhere"))
    _, printed = second.communicate(timeout=120)
    assert second.returncode == 1
    assert f"Another process (process {first.pid} on " in printed
    other_folder.communicate(timeout=120)
    os.kill(first.pid, signal.SIGCONT)
    _, printed = first.communicate(timeout=120)
    assert first.returncode == 0, printed
    assert published(out) == published(dataset_path)


def test_of_many_builders_without_locks_exactly_one_writes(
    shim: Path, phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    """They start together, over the lease of a process that is gone."""
    out, environment = tmp_path / "data.zarr", lacking(shim, NO_FLOCK=95)
    crashed = start(phantom_tree, out, pausing("*/plan.parquet", environment=environment))
    wait_until_paused(crashed)
    os.killpg(crashed.pid, signal.SIGKILL)
    crashed.communicate()
    builders = [start(phantom_tree, out, environment) for _ in range(4)]
    answers = [(builder.communicate(timeout=200)[1], builder.returncode) for builder in builders]
    assert all(code == 0 or "Another process" in printed for printed, code in answers), answers
    assert any(code == 0 for _, code in answers)
    assert published(out) == published(dataset_path)


@pytest.mark.parametrize("errors", [{"NO_FOLDER_SYNC": 5}, {"NO_FILE_SYNC": 5}, {"NO_FILE_SYNC": 22}])
def test_a_sync_that_fails_ends_the_build(
    errors: dict[str, int], shim: Path, phantom_tree: Path, tmp_path: Path
) -> None:
    """An input/output error of a folder, and any error of a file, is a failure and no missing feature."""
    process = start(phantom_tree, tmp_path / "data.zarr", lacking(shim, **errors))
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 1, printed
    assert "Traceback" not in printed
    assert not (tmp_path / "data.zarr" / "zarr.json").exists()


CHECKPOINT = """
import sys
from pathlib import Path
import torch
from ich_train.checkpoint import Images, Meta, load_state, read_meta, save_checkpoint
meta = Meta(network="baseline", channels=1, classes=("any",), images=Images(size=8, pixels="hu", windows=()), context=0,
            windows=(), dataset_digest="", val_fold=0, test_fold=1, epoch=1, val_loss=None)
for epoch in (1, 2):
    save_checkpoint(Path(sys.argv[1]), torch.nn.Linear(2, 1), meta.model_copy(update={"epoch": epoch}), {"step": epoch})
assert read_meta(Path(sys.argv[1])).epoch == load_state(Path(sys.argv[1]))["step"] == 2
"""


def test_checkpoints_are_written_where_folders_cannot_be_synced(shim: Path, tmp_path: Path) -> None:

    words = [sys.executable, "-c", CHECKPOINT, str(tmp_path / "last")]
    environment = lacking(shim, NO_FOLDER_SYNC=22, NO_FLOCK=38)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_parts_without_locks_run_together_and_keep_builds_away(
    shim: Path, phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    out, environment = tmp_path / "data.zarr", lacking(shim, NO_FLOCK=37)

    def command(*words: object, environment: dict[str, str] = environment) -> subprocess.Popen[bytes]:
        return subprocess.Popen([PREP, *map(str, words)], env=environment, stderr=subprocess.PIPE)

    def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
        _, printed = process.communicate(timeout=120)
        return process.returncode, printed.decode()

    planned = command("plan", "--src", phantom_tree, "--out", out, *WORDS, "--workers", 0)
    assert ended(planned)[0] == 0
    stopping = pausing("*/parts/1-of-3.lease", environment=environment)
    first = command("shards", out, "--part", "1/3", "--workers", 0, environment=stopping)
    wait_until_paused(first)
    refused: dict[str, tuple[object, ...]] = {
        "is writing part 1/3": ("shards", out, "--part", "1/3", "--workers", 0),
        "Part 1/3 is being written": ("shards", out, "--part", "2/4", "--workers", 0),
        "Part 1/3 of the shards is being written": ("publish", out),
    }
    for message, words in refused.items():  # one after the other: a publish, too, keeps parts away for a moment
        code, printed = ended(command(*words))
        assert (code, message in printed) == (1, True), printed
    others = [command("shards", out, "--part", f"{number}/3", "--workers", 0) for number in (2, 3)]
    assert [ended(process)[0] for process in others] == [0, 0]
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert ended(command("shards", out, "--part", "1/3", "--workers", 0))[0] == 0  # over the lease of the killed one
    assert ended(command("publish", out))[0] == 0
    assert published(out) == published(dataset_path)
    assert not [path for path in (working(out) / "parts").iterdir() if "lease" in path.name]
