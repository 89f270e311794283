"""A power cut between two fsyncs: writes that were not synced are lost or reach the disk in another order.

A build and the saving of checkpoints are recorded, call by call. Of the recording, states are made that a disk may hold
after a cut: what an fsync promised is there, of the rest some things are and some are not. The dataset is then absent or
whole, and the same command ends with the same bytes; a checkpoint is the old or the new one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ich_prep.build_dataset import build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.errors import DatasetError, TrainError
from ich_prep.phantom import synthesize
from tests.support.cli import published
from tests.support.preload import compiled

SPEC = Spec(size=32, slices_per_shard=16)
ROOT = Path(__file__).parents[2]

# Records what changes files below a folder. Where a call is not seen (Arrow writes to memory, never to these files), the
# last test of the recording, its replay in full, fails.
RECORDER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include <pthread.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *below;
static int record = -1;

static int watched(const char *path) {
    if (!below) {
        below = getenv("RECORD_BELOW");
        if (!below) below = "";
    }
    return *below && !strncmp(path, below, strlen(below));
}
static void put(char kind, const char *one, const char *two, long at, const void *data, long size) {
    char head[9000];
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    ssize_t (*real_write)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    pthread_mutex_lock(&lock);
    if (record < 0) record = real_open(getenv("RECORD_TO"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    int length = snprintf(head, sizeof head, "%c\t%s\t%s\t%ld\t%ld\n", kind, one, two, at, size);
    real_write(record, head, length);
    if (size) real_write(record, data, size);
    pthread_mutex_unlock(&lock);
}
static int path_of(int descriptor, char *path) {
    char name[40];
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(name, path, 4095);
    path[length > 0 ? length : 0] = 0;
    return length > 0 && watched(path);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name); \
        va_list more; va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; va_end(more); \
        int found = real(path, flags, mode); \
        char whole[4096]; \
        if (found >= 0 && flags & (O_CREAT | O_TRUNC) && !(flags & O_DIRECTORY) && path_of(found, whole)) \
            put(flags & O_TRUNC ? 't' : 'c', whole, "", 0, NULL, 0); \
        return found; }
OPEN(open)
OPEN(open64)

ssize_t write(int descriptor, const void *data, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    char path[4096];
    long at = lseek(descriptor, 0, SEEK_CUR);
    int append = fcntl(descriptor, F_GETFL) & O_APPEND;
    ssize_t done = real(descriptor, data, size);
    if (done > 0 && path_of(descriptor, path))
        put('w', path, "", append ? lseek(descriptor, 0, SEEK_CUR) - done : at, data, done);
    return done;
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    ssize_t total = 0;
    for (int k = 0; k < count; k++) {
        ssize_t done = write(descriptor, parts[k].iov_base, parts[k].iov_len);
        if (done < 0) return total ? total : done;
        total += done;
    }
    return total;
}
#define SYNC(name) \
    int name(int descriptor) { \
        int (*real)(int) = dlsym(RTLD_NEXT, #name); \
        char path[4096]; \
        int done = real(descriptor); \
        if (!done && path_of(descriptor, path)) put('s', path, "", 0, NULL, 0); \
        return done; }
SYNC(fsync)
SYNC(fdatasync)
int mkdir(const char *path, mode_t mode) {
    int (*real)(const char *, mode_t) = dlsym(RTLD_NEXT, "mkdir");
    int done = real(path, mode);
    if (!done && watched(path)) put('d', path, "", 0, NULL, 0);
    return done;
}
int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    int done = real(from, to);
    if (!done && watched(to)) put('r', from, to, 0, NULL, 0);
    return done;
}
int unlink(const char *path) {
    int (*real)(const char *) = dlsym(RTLD_NEXT, "unlink");
    int done = real(path);
    if (!done && watched(path)) put('u', path, "", 0, NULL, 0);
    return done;
}
#define AT(name, test, kind) \
    int name(int folder, const char *path, int flags) { \
        int (*real)(int, const char *, int) = dlsym(RTLD_NEXT, #name); \
        char whole[9000] = ""; \
        if (path[0] != '/') { if (path_of(folder, whole)) strcat(whole, "/"); } \
        strcat(whole, path); \
        int done = real(folder, path, flags); \
        if (!done && watched(whole)) put(kind, whole, "", 0, NULL, 0); \
        return done; }
AT(unlinkat, 1, 'u')
int rmdir(const char *path) {
    int (*real)(const char *) = dlsym(RTLD_NEXT, "rmdir");
    int done = real(path);
    if (!done && watched(path)) put('u', path, "", 0, NULL, 0);
    return done;
}
"""


@dataclass(frozen=True)
class Call:
    """One recorded call: create, truncate, write, sync, mkdir, rename, unlink."""

    kind: str
    path: str
    to: str
    at: int
    data: bytes


@dataclass
class Node:
    """A file or folder of the simulated disk: its content in memory and what was synced of it."""

    is_folder: bool
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    names: dict[str, Node] = field(default_factory=dict)
    synced_names: dict[str, Node] = field(default_factory=dict)
    # What happened to the names since: each change is atomic, a rename too. None: the name is gone.
    changes: list[dict[str, Node | None]] = field(default_factory=list)

    def change(self, change: dict[str, Node | None]) -> None:
        self.changes.append(change)
        _apply(self.names, change)


def _apply(names: dict[str, Node], change: dict[str, Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def calls_of(record: Path) -> list[Call]:
    raw, place, calls = record.read_bytes(), 0, []
    while place < len(raw):
        end = raw.index(b"\n", place)
        kind, path, to, at, size = raw[place:end].decode().split("\t")
        calls.append(Call(kind, path, to, int(at), raw[end + 1 : end + 1 + int(size)]))
        place = end + 1 + int(size)
    return calls


class Disk:
    """What a file system would hold: applied calls, and what was synced."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.top = Node(is_folder=True)

    def _parts(self, path: str) -> list[str]:
        return [part for part in path.removeprefix(self.root).split("/") if part]

    def _parent(self, path: str) -> tuple[Node, str]:
        *folders, name = self._parts(path)
        node = self.top
        for part in folders:
            node = node.names[part]
        return node, name

    def find(self, path: str) -> Node:
        node = self.top
        for part in self._parts(path):
            node = node.names[part]
        return node

    def apply(self, call: Call) -> None:
        if call.kind == "s":
            node = self.find(call.path)
            if node.is_folder:
                node.synced_names = dict(node.names)
                node.changes.clear()
            else:
                node.synced = bytes(node.data)
            return
        parent, name = self._parent(call.path)
        if call.kind in "ct":
            if name not in parent.names:
                parent.change({name: Node(is_folder=False)})
            if call.kind == "t":
                parent.names[name].data.clear()
        elif call.kind == "w":
            data = parent.names[name].data
            data.extend(bytes(max(0, call.at - len(data))))
            data[call.at : call.at + len(call.data)] = call.data
        elif call.kind == "d":
            parent.change({name: Node(is_folder=True)})
        elif call.kind == "r":
            target, new = self._parent(call.to)
            assert target is parent, "a rename from one folder to another"
            parent.change({name: None, new: parent.names[name]})
        elif call.kind == "u":
            parent.change({name: None})

    def after_a_cut(self, rng: random.Random, to: Path) -> None:
        """Write to the folder ``to`` what may be left: synced names and data, and any of the later ones."""
        self._leave(self.top, rng, to)

    def _leave(self, node: Node, rng: random.Random, to: Path) -> None:
        to.mkdir(parents=True, exist_ok=True)
        names = dict(node.synced_names)
        for change in node.changes:
            if rng.random() < 0.5:
                _apply(names, change)
        for name, kept in sorted(names.items()):
            if kept.is_folder:
                self._leave(kept, rng, to / name)
            else:
                (to / name).write_bytes(self._left_of(kept, rng))

    @staticmethod
    def _left_of(node: Node, rng: random.Random) -> bytes:
        now, then = bytes(node.data), node.synced
        if now == then:
            return now
        kind = rng.randrange(4)
        if kind == 0:
            return then
        if kind == 1:
            return now
        if kind == 2:  # its end is missing
            return now[: rng.randint(0, len(now))]
        cut = rng.randint(0, len(now))  # it has its length, and zeros in place of some data
        return now[:cut] + bytes(len(now) - cut)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("recorder") / "record.so"
    return compiled(RECORDER, library, "power cuts between two syncs are")


def recorded(recorder: Path, program: str, below: Path, record: Path, *words: object) -> list[Call]:
    environment = {
        **os.environ,
        "LD_PRELOAD": str(recorder),
        "RECORD_BELOW": str(below),
        "RECORD_TO": str(record),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return calls_of(record)


BUILD = """
import sys
from pathlib import Path
from tests.integration.test_reordered import SPEC
from ich_prep.build_dataset import build
build(Path(sys.argv[1]), Path(sys.argv[2]) / "d.zarr", SPEC, workers=0)
"""
SAVE = """
import sys
from pathlib import Path
import torch
from ich_train.checkpoint import Images, Meta, save_checkpoint
meta = Meta(network="baseline", channels=1, classes=("any",), images=Images(size=8, pixels="hu", windows=()), context=0,
            windows=(), dataset_digest="", val_fold=0, test_fold=1, epoch=1, val_loss=None)
for epoch in range(1, 5):
    meta = meta.model_copy(update={"epoch": epoch})
    save_checkpoint(Path(sys.argv[1]) / "last", torch.nn.Linear(2, 1), meta, {"step": epoch})
"""


@pytest.mark.parametrize("cuts", [6, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_after_a_power_cut_a_dataset_is_absent_or_whole(cuts: int, recorder: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    synthesize(tmp_path / "tree", series=2, size=32)
    below = tmp_path / "disk"
    below.mkdir()
    calls = recorded(recorder, BUILD, below, tmp_path / "record", tmp_path / "tree", below)
    expected = published(below / "d.zarr")
    disk = Disk(str(below))
    for call in calls:
        disk.apply(call)
    disk.after_a_cut(random.Random(0), tmp_path / "all")
    assert published(tmp_path / "all" / "d.zarr") == expected, "a call was not recorded, or its result not synced"

    for cut in range(cuts):
        disk = Disk(str(below))
        for call in calls[: rng.randint(0, len(calls))]:
            disk.apply(call)
        after = tmp_path / f"cut-{cut}"
        disk.after_a_cut(rng, after)
        try:
            open_dataset(after / "d.zarr")
        except DatasetError:
            pass
        else:
            assert published(after / "d.zarr") == expected, (seed, cut)
        build(tmp_path / "tree", after / "d.zarr", SPEC, workers=0)
        assert published(after / "d.zarr") == expected, (seed, cut)
        shutil.rmtree(after)


@pytest.mark.parametrize("cuts", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_after_a_power_cut_a_checkpoint_is_the_old_or_the_new_one(cuts: int, recorder: Path, tmp_path: Path) -> None:
    from ich_train.checkpoint import load_state, read_meta

    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    below = tmp_path / "disk"
    below.mkdir()
    calls = recorded(recorder, SAVE, below, tmp_path / "record", below)
    renames = [k for k, call in enumerate(calls) if call.kind == "r" and call.to.endswith("/last")]
    assert len(renames) == 4
    for cut in range(cuts):
        end = rng.randint(renames[0] + 2, len(calls))
        disk = Disk(str(below))
        for call in calls[:end]:
            disk.apply(call)
        after = tmp_path / f"cut-{cut}"
        disk.after_a_cut(rng, after)
        whole = sum(rename + 1 < end for rename in renames)  # that were synced
        try:
            found = read_meta(after / "last").epoch
            assert load_state(after / "last")["step"] == found, (seed, cut)
        except TrainError as error:
            raise AssertionError(
                (seed, cut, end, json.dumps([c.kind + " " + c.path for c in calls[:end][-8:]]))
            ) from error
        assert found >= whole, (seed, cut)
        shutil.rmtree(after)
