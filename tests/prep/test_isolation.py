"""The decoding process: it crashes, hangs, panics, prints, runs out of memory or is killed."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest

from ich_prep.dicom import isolation
from ich_prep.dicom.decode import Decoder, PixelSource, decode_with_pydicom
from ich_prep.dicom.elements import DEFLATED_LE
from ich_prep.errors import Reason, SliceError
from tests.support.compressed import (
    J2K_LOSSLESS,
    JPEG_LS,
    RLE,
    SliceBytes,
    compressed,
    refused,
    slope_of_hu,
    source_of,
    to_bytes,
)

# --- a decoding process that crashes ---------------------------------------------------------------------------------


@pytest.fixture
def good(frames: dict[str, bytes], tmp_path: Path) -> PixelSource:
    path = tmp_path / "good.dcm"
    path.write_bytes(frames[J2K_LOSSLESS])
    return source_of(path)


def child_of(decoder: Decoder) -> int:
    assert decoder._child is not None and decoder._child._process is not None
    return decoder._child._process.pid


def test_a_decoder_killed_between_two_slices_costs_none(good: PixelSource) -> None:
    decoder = Decoder()
    before = decoder.read(good).copy()
    for _ in range(3):
        os.kill(child_of(decoder), signal.SIGKILL)
        np.testing.assert_array_equal(decoder.read(good), before)
    decoder.close()


class Stopper(threading.Thread):
    """Stops each decoding process as soon as it exists, so that it hangs on its slice; ``kill``: also kills it."""

    def __init__(self, decoder: Decoder, *, kill: bool, times: int) -> None:
        super().__init__()
        self.decoder, self.kill, self.times = decoder, kill, times
        self.stopped: list[int] = []

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while len(self.stopped) < self.times and time.monotonic() < deadline:
            process = self.decoder._child._process if self.decoder._child else None
            if process is None or process.pid in self.stopped:  # there is none between the two
                time.sleep(0.001)
                continue
            os.kill(process.pid, signal.SIGSTOP)
            self.stopped.append(process.pid)
            if self.kill:
                time.sleep(0.3)
                os.kill(process.pid, signal.SIGKILL)


def test_a_decoder_killed_over_a_slice_costs_that_slice(good: PixelSource) -> None:
    decoder = Decoder()
    before = decoder.read(good).copy()
    # Once in the process that had decoded before, once in the new one for the retry.
    stopper = Stopper(decoder, kill=True, times=2)
    os.kill(child_of(decoder), signal.SIGSTOP)
    stopper.start()
    error = refused(decoder, good)
    stopper.join()
    assert (error.reason, error.detail) == (Reason.DECODER_DIED, "the decoder ended with exit status -9")
    np.testing.assert_array_equal(decoder.read(good), before)
    decoder.close()


def test_a_decoder_that_hangs_is_ended(good: PixelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder()
    stopper = Stopper(decoder, kill=False, times=1)
    monkeypatch.setattr(isolation, "SECONDS_PER_SLICE", 0.5)
    stopper.start()
    begun = time.monotonic()
    error = refused(decoder, good)
    stopper.join()
    assert 0.4 < time.monotonic() - begun < 5
    assert (error.reason, error.detail) == (Reason.DECODER_DIED, "no pixels after 0.5 s")
    monkeypatch.undo()
    np.testing.assert_array_equal(decoder.read(good).view(np.int16), slope_of_hu())
    decoder.close()


def test_an_unread_answer_is_discarded(
    good: PixelSource, slice_bytes: SliceBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example Ctrl-C in a notebook: the next slice must not get the pixels of the interrupted one."""
    decoder = Decoder()
    before = decoder.read(good).copy()
    other = tmp_path / "other.dcm"
    other.write_bytes(compressed(slice_bytes(slope_of_hu()[::-1].copy()), J2K_LOSSLESS))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(isolation.select, "poll", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.read(source_of(other))
    np.testing.assert_array_equal(decoder.read(good), before)
    decoder.close()


def test_closing_ends_the_process(good: PixelSource) -> None:
    decoder = Decoder()
    decoder.read(good)
    pid = child_of(decoder)
    decoder.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    decoder.close()
    decoder.read(good)
    decoder.close()


def test_native_pixels_need_no_process(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "slice.dcm"
    path.write_bytes(slice_bytes())
    decoder = Decoder()
    decoder.read(source_of(path))
    assert decoder._child is None


# --- what libraries do to the process --------------------------------------------------------------------------------


@pytest.fixture
def panicking(frames: dict[str, bytes], tmp_path: Path) -> PixelSource:
    """A slice over which pylibjpeg-rle panics: its header has fewer rows than its frame."""
    dataset = pydicom.dcmread(io.BytesIO(frames[RLE]))
    dataset.Rows = 24
    path = tmp_path / "panic.dcm"
    path.write_bytes(to_bytes(dataset))
    return source_of(path)


def test_a_panic_is_a_failure_of_the_slice_and_prints_nothing(
    panicking: PixelSource, good: PixelSource, capfd: pytest.CaptureFixture[str]
) -> None:
    decoder = Decoder()
    before = decoder.read(good).copy()
    child = child_of(decoder)
    error = refused(decoder, panicking)
    assert error.reason == Reason.DECODE_FAILED and not error.reason.is_transient
    assert "PanicException" in error.detail
    assert child_of(decoder) == child
    np.testing.assert_array_equal(decoder.read(good), before)
    decoder.close()
    assert capfd.readouterr() == ("", "")


def test_pydicom_alone_reports_the_same_failure(panicking: PixelSource, tmp_path: Path) -> None:
    with pytest.raises(SliceError) as caught:
        decode_with_pydicom((tmp_path / "panic.dcm").read_bytes())
    assert caught.value.reason == Reason.DECODE_FAILED


@pytest.mark.parametrize("spare", [20 << 20, 60 << 20])
def test_too_little_memory_is_reported_as_such(
    spare: int, good: PixelSource, slice_bytes: SliceBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the pixels in shared memory, and for the inflated file, which has 32 MiB."""
    path = tmp_path / "large.dcm"
    path.write_bytes(slice_bytes(np.zeros((4096, 4096), np.int16), syntax=DEFLATED_LE))
    decoder = Decoder()
    decoder.read(good)
    status = Path(f"/proc/{child_of(decoder)}/status").read_text()
    decoder.close()
    limit = 1024 * int(status.split("VmPeak:")[1].split()[0]) + spare
    monkeypatch.setattr(isolation, "MEMORY_LIMIT", limit)
    np.testing.assert_array_equal(decoder.read(good).view(np.int16), slope_of_hu())
    error = refused(decoder, source_of(path))
    assert (error.reason, error.detail) == (Reason.DECODER_DIED, f"more than {limit >> 20} MiB of memory")
    np.testing.assert_array_equal(decoder.read(good).view(np.int16), slope_of_hu())
    decoder.close()


def test_what_a_dying_process_printed_is_in_the_detail(
    good: PixelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "openjpeg.py").write_text(
        "import os\nos.write(1, b'x' * 5000)\nos.write(2, b'out of \\x1b[31m luck\\n')\nos.abort()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}:{Path.cwd()}")
    decoder = Decoder()
    error = refused(decoder, good)
    assert error.reason == Reason.DECODER_DIED
    assert error.detail.startswith("the decoder ended with exit status -6: xxx")
    assert error.detail.endswith("out of \\x1b[31m luck")
    assert len(error.detail) < 300
    decoder.close()
    assert capfd.readouterr() == ("", "")


def test_a_library_that_prints_does_not_disturb_the_answers(
    good: PixelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "openjpeg").mkdir()
    (tmp_path / "openjpeg" / "__init__.py").touch()
    (tmp_path / "openjpeg" / "utils.py").write_text(
        "import os, sys\nprint('{}', flush=True)\nos.write(2, b'y' * (1 << 20))\n"
        "def get_parameters(*_):\n    print('{}', flush=True)\n    raise ValueError('no \\x07 such')\n"
        "def decode_pixel_data(*_): pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}:{Path.cwd()}")
    decoder = Decoder()
    for _ in range(3):
        error = refused(decoder, good)
        assert (error.reason, error.detail) == (Reason.DECODE_FAILED, "ValueError: no \\x07 such")
    decoder.close()
    assert capfd.readouterr() == ("", "")


def test_a_slice_larger_than_the_last_ones_fits_into_the_shared_memory(
    decoder: Decoder, frames: dict[str, bytes], slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    large = np.random.default_rng(0).integers(-1000, 1000, (300, 301)).astype(np.int16)
    for name, data in {"a": frames[RLE], "b": compressed(slice_bytes(large), RLE), "c": frames[JPEG_LS]}.items():
        (tmp_path / name).write_bytes(data)
    first = decoder.read(source_of(tmp_path / "a"))
    np.testing.assert_array_equal(first.view(np.int16), slope_of_hu())
    np.testing.assert_array_equal(decoder.read(source_of(tmp_path / "b")).view(np.int16), large)
    np.testing.assert_array_equal(decoder.read(source_of(tmp_path / "c")).view(np.int16), slope_of_hu())
    assert first.shape == (40, 40)  # no longer this slice's values, but still memory that can be read


def test_a_closed_decoder_leaves_no_descriptor(good: PixelSource) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        decoder = Decoder()
        stored = decoder.read(good)
        decoder.close()
        np.testing.assert_array_equal(stored.view(np.int16), slope_of_hu())
        del stored  # it holds the memory
    assert len(list(Path("/proc/self/fd").iterdir())) == before
