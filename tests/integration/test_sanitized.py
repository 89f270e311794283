"""The compiled library under gcc's sanitizers: for any input, no byte outside of the given buffers is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numcodecs import blosc
from numpy.typing import NDArray

from ich_prep.dataset import native
from ich_prep.dataset.codecs import block_bytes
from tests.support.images import SHAPES, picture

NATIVE = Path(native.__file__).with_name("native")
FLAGS = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
DTYPES = (np.uint8, np.int16)
# Runs in its own process, with the sanitizers loaded first: the calls from Python.
SCRIPT = """
import os
import sys
from pathlib import Path

import numpy as np

from ich_prep.dataset import native

library, folder = sys.argv[1:]
native.__file__ = library
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
    stored = one[0].astype(np.uint16)
    table = np.arange(65536, dtype=np.uint32)
    native.window_codes_by_table(stored, table, out=np.empty((3, *stored.shape), np.uint8))

path = Path(folder) / "chunks"
for _ in range(600):
    frame = frames[rng.integers(len(frames))].copy()
    size = int.from_bytes(frame[4:8].tobytes(), "little")
    if rng.integers(2):
        frame[rng.integers(12, len(frame), 3)] = rng.integers(0, 256, 3)
    payload = frame.tobytes()
    chunk = payload + native.crc32c(payload).to_bytes(4, "little")
    if not rng.integers(4):
        chunk = chunk[: rng.integers(len(chunk))]
    path.write_bytes(chunk[:-1] if not rng.integers(8) else chunk)
    file = os.open(path, os.O_RDONLY)
    for codec in native.ChunkCodec:
        room = len(chunk) if codec == native.ChunkCodec.UNDECODED else size
        scratch = np.empty(native.scratch_bytes(codec, max_chunk=len(chunk), slice_bytes=size), np.uint8)
        expected = int(rng.integers(2)), int(rng.integers(2))
        requests = np.array([(file, 0, len(chunk), 0, *expected)], native.REQUEST)
        native.read_chunks(requests, codec, out=np.empty(room, np.uint8), slice_bytes=size, scratch=scratch)
    os.close(file)
print("done")
"""


@pytest.fixture(scope="module")
def gcc() -> str:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("SKIPPED: no gcc")
    return compiler


def frame_of(pixels: NDArray[np.generic]) -> NDArray[np.uint8]:
    encoder = native.FrameEncoder(pixels.shape, pixels.dtype, block_bytes(pixels.shape, pixels.itemsize))
    return encoder.encode(pixels).copy()


def damaged(frame: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A copy with up to four changed bytes, half of them in the header and the first offsets, and possibly truncated."""
    frame = frame.copy()
    for _ in range(rng.integers(1, 5)):
        frame[rng.integers(len(frame)) if rng.integers(2) else rng.integers(min(60, len(frame)))] = rng.integers(256)
    return frame[: len(frame) - rng.integers(0, 20)]


def test_python_calls_stay_within_their_buffers(gcc: str, tmp_path: Path) -> None:
    target, folder = tmp_path / "_native.so", tmp_path / "frames"
    sources = map(str, NATIVE.glob("*.c"))
    subprocess.run([gcc, *FLAGS, *SANITIZE, "-shared", "-fPIC", "-o", str(target), *sources], check=True)
    folder.mkdir()
    for number, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            pixels = picture(shape, dtype, number)
            np.save(folder / f"slice-{number}-{pixels.itemsize}.npy", pixels)
            frame = np.frombuffer(blosc.compress(pixels, b"lz4", 5), np.uint8)
            np.save(folder / f"blosc-{number}-{pixels.itemsize}.npy", frame)
    sanitizer = subprocess.run([gcc, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {**os.environ, "LD_PRELOAD": sanitizer.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(target), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


@pytest.fixture(scope="module")
def replay(gcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fuzz target as a program that takes the files of its inputs."""
    program = tmp_path_factory.mktemp("fuzz") / "replay"
    sources = map(str, [*NATIVE.glob("fuzz/*.c"), *NATIVE.glob("*.c")])
    subprocess.run([gcc, *FLAGS, *SANITIZE, "-o", str(program), *sources], check=True)
    return program


def run_inputs(replay: Path, folder: Path, inputs: list[bytes]) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    for number, data in enumerate(inputs):
        (folder / str(number)).write_bytes(data)
    names = [str(number) for number in range(len(inputs))]
    return subprocess.run([str(replay), *names], cwd=folder, capture_output=True, text=True, check=False)


def test_damaged_frames_stay_within_their_buffers(replay: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [picture(shape, dtype, number) for number, shape in enumerate(SHAPES) for dtype in DTYPES]
    frames = [np.frombuffer(blosc.compress(pixels, b"lz4", 5), np.uint8) for pixels in pictures]
    frames += [frame_of(pixels) for pixels in pictures]
    inputs = [b"\0\0\0\1" + damaged(frames[rng.integers(len(frames))], rng).tobytes() for _ in range(3000)]
    inputs += [b"\0\0\0\1" + frame.tobytes() for frame in frames]
    inputs += [bytes([1, *rng.integers(0, 256, 3)]) + pixels.tobytes() for pixels in pictures for _ in range(5)]
    inputs += [b"", b"\0" * 3, b"\0" * 4, b"\1" * 4]
    done = run_inputs(replay, tmp_path / "inputs", inputs)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_fuzz_target_detects_an_overrun(gcc: str, tmp_path: Path) -> None:
    """With a check of the decoder removed, the same inputs are reported."""
    source = (NATIVE / "lz4.c").read_text()
    check = "count > in_left || count > left"
    assert source.count(check) == 1
    broken = tmp_path / "native"
    shutil.copytree(NATIVE, broken)
    (broken / "lz4.c").write_text(source.replace(check, "count > in_left"))
    program = tmp_path / "replay"
    sources = map(str, [*broken.glob("fuzz/*.c"), *broken.glob("*.c")])
    subprocess.run([gcc, *FLAGS, *SANITIZE, "-o", str(program), *sources], check=True)
    frame = frame_of(picture((1, 40, 40), np.uint8, 0)).copy()
    block = b"\xf0" + b"\xff" * 6 + b"\0" + bytes(15 + 6 * 255)  # 1,545 literals, for a slice of 1,200 bytes
    header = frame[:16].copy()
    for at, value in ((4, 1200), (8, 1200), (12, 24 + len(block))):
        header[at : at + 4] = np.frombuffer(value.to_bytes(4, "little"), np.uint8)
    data = header.tobytes() + (20).to_bytes(4, "little") + len(block).to_bytes(4, "little") + block
    done = run_inputs(program, tmp_path / "inputs", [b"\0\0\0\1" + data])
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
