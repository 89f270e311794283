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
from pictures import SHAPES, picture

from ich_prep import kernels
from ich_prep.kernels import FrameEncoder
from ich_prep.sharding import block_bytes

NATIVE = Path(kernels.__file__).with_name("native")
SANITIZED = """
import sys
import numpy as np
from pathlib import Path
from ich_prep import kernels
kernels.EXTENSION_SUFFIXES, kernels.__file__ = [".so"], sys.argv[1]
rng = np.random.default_rng(0)
frames = [np.load(path) for path in sorted(Path(sys.argv[2]).glob("*.npy"))]
for _ in range(3000):
    frame = frames[rng.integers(len(frames))].copy()
    for _ in range(rng.integers(1, 5)):
        frame[rng.integers(len(frame)) if rng.integers(2) else rng.integers(min(60, len(frame)))] = rng.integers(256)
    size = int.from_bytes(frame[4:8].tobytes(), "little")
    if size < 1 << 20:
        frame[12:16] = np.frombuffer(len(frame).to_bytes(4, "little"), np.uint8)
        kernels.decode_frame(frame, np.empty(size, np.uint8))
print("done")
"""


@pytest.mark.slow
def test_damaged_frames_do_no_harm(tmp_path: Path) -> None:
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
            encoder = FrameEncoder(shape, pixels.dtype, block_bytes(shape, pixels.itemsize))
            theirs = np.frombuffer(blosc.compress(pixels, b"lz4", 5), np.uint8)
            np.save(folder / f"{number}{pixels.itemsize}-ours.npy", encoder.encode(pixels))
            np.save(folder / f"{number}{pixels.itemsize}-blosc.npy", theirs)
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
