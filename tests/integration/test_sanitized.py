"""The compiled library under gcc's sanitizers: whatever a frame says, no byte outside of its memory is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numcodecs import blosc

from ich_prep.dataset import native
from tests.support.images import SHAPES, picture

NATIVE = Path(native.__file__).with_name("native")
SANITIZED = """
import os
import sys
from pathlib import Path

import numpy as np

from ich_prep.dataset import native

library, folder = sys.argv[1:]
native.EXTENSION_SUFFIXES, native.__file__ = [".so"], library
rng = np.random.default_rng(0)

slices = [np.load(path) for path in sorted(Path(folder).glob("slice-*.npy"))]
frames = [np.load(path) for path in sorted(Path(folder).glob("blosc-*.npy"))]
for one in slices:
    row, rows = one.shape[-1] * one.itemsize, one.size // one.shape[-1]
    for blocks in (1, rows // 3 + 1, rows):
        encoder = native.FrameEncoder(one.shape, one.dtype, blocks * row)
        frames.append(encoder.encode(one).copy())
        out = np.empty(one.nbytes, np.uint8)
        assert native.decode_frame(frames[-1], out) and out.tobytes() == one.tobytes()
    words = one[0].astype(np.uint16)
    native.window_codes_by_table(words, np.arange(65536, dtype=np.uint32), out=np.empty((3, *words.shape), np.uint8))


def damaged(frame):
    frame = frame.copy()
    for _ in range(rng.integers(1, 5)):
        frame[rng.integers(len(frame)) if rng.integers(2) else rng.integers(min(60, len(frame)))] = rng.integers(256)
    frame = frame[: len(frame) - rng.integers(0, 20)].copy()
    frame[12:16] = np.frombuffer(len(frame).to_bytes(4, "little"), np.uint8)
    return frame


for _ in range(3000):
    frame = damaged(frames[rng.integers(len(frames))])
    size = int.from_bytes(frame[4:8].tobytes(), "little")
    if 0 < size < 1 << 20:
        native.decode_frame(frame, np.empty(size, np.uint8))

path = Path(folder) / "chunks"
for _ in range(600):
    frame = frames[rng.integers(len(frames))]
    size = int.from_bytes(frame[4:8].tobytes(), "little")
    payload = (damaged(frame) if rng.integers(2) else frame).tobytes()
    chunk = payload + native.crc32c(payload).to_bytes(4, "little")
    if not rng.integers(4):
        chunk = chunk[: rng.integers(len(chunk))]
    path.write_bytes(chunk[:-1] if not rng.integers(8) else chunk)
    file = os.open(path, os.O_RDONLY)
    for codec in native.Codec:
        room = len(chunk) if codec == native.Codec.OTHER else size
        scratch = np.empty(native.scratch_bytes(codec, longest_chunk=len(chunk), slice_bytes=size), np.uint8)
        requests = np.array([[file, 0, len(chunk), 0]], np.int64)
        native.read_chunks(requests, codec, out=np.empty(room, np.uint8), slice_bytes=size, scratch=scratch)
    os.close(file)
print("done")
"""


def test_no_byte_outside_is_touched(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("SKIPPED: there is no gcc here")
    target, folder = tmp_path / "_native.so", tmp_path / "frames"
    flags = ["-std=c11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(target), *map(str, NATIVE.glob("*.c"))], check=True)
    folder.mkdir()
    for number, shape in enumerate(SHAPES):
        for dtype in (np.uint8, np.int16):
            pixels = picture(shape, dtype, number)
            np.save(folder / f"slice-{number}-{pixels.itemsize}.npy", pixels)
            frame = np.frombuffer(blosc.compress(pixels, b"lz4", 5), np.uint8)
            np.save(folder / f"blosc-{number}-{pixels.itemsize}.npy", frame)
    sanitizer = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {**os.environ, "LD_PRELOAD": sanitizer.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(target), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
