"""Decodes compressed slices in a separate process, which may crash, hang or run out of memory: that costs one slice."""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from ich_prep.dicom.frames import PixelRecord
from ich_prep.dicom.shared_memory import SharedMemory
from ich_prep.errors import Reason, SliceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SECONDS_PER_SLICE: Final = 30.0
MEMORY_LIMIT: Final = 1 << 30
LONGEST_DETAIL: Final = 200
# Each slice allocates and frees megabytes: glibc must not return their pages to the kernel each time. And the stacks of
# NumPy's threads, one per core, would count towards the memory limit.
ENVIRONMENT: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}


class IsolatedDecoder:
    """A process that decodes compressed pixels, one request at a time; it is restarted after a crash.

    A slice fails if it crashes a fresh process, so earlier slices cannot affect it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._files = SharedMemory("files")
        self._pixels = SharedMemory("pixels")
        self._printed = os.memfd_create("printed")
        fcntl.fcntl(self._printed, fcntl.F_SETFL, os.O_APPEND)  # the process empties it while it prints

    def buffer(self, size: int) -> memoryview:
        """Return ``size`` bytes to read the next file into."""
        return self._files.view(size)

    def decode(self, record: PixelRecord) -> NDArray[np.uint16]:
        """Return the stored values (rows, columns) of the file in ``buffer``, valid until the next call.

        Raises ``SliceError``.
        """
        used = self._process is not None
        stored = np.frombuffer(self._pixels.view(record.rows * record.columns * 2), np.uint16)
        try:
            self._ask(record)
        except SliceError as error:
            if not used or error.reason != Reason.DECODER_DIED:
                raise
            self._end_process()
            self._ask(record)
        return stored.reshape(record.rows, record.columns)

    def close(self) -> None:
        """End the process and give the shared memory back."""
        self._end_process()
        self._files.close()
        self._pixels.close()
        os.close(self._printed)

    def _ask(self, record: PixelRecord) -> None:
        """Let the process decode the file in the shared memory; raises ``SliceError``."""
        process = self._process = self._process or self._start_process()
        fields = {name: getattr(record, name) for name in PixelRecord.__slots__}
        try:
            os.write(process.stdin.fileno(), json.dumps(fields).encode() + b"\n")  # type: ignore[union-attr]
            answer = json.loads(_read_line(process.stdout.fileno()))  # type: ignore[union-attr]
        except (BrokenPipeError, EOFError) as error:
            code = self._end_process()
            printed = self._last_printed()
            detail = f"the decoder ended with exit status {code}" + (f": {printed}" if printed else "")
            raise SliceError(Reason.DECODER_DIED, detail) from error
        except TimeoutError as error:
            self._end_process()
            raise SliceError(Reason.DECODER_DIED, f"no pixels after {SECONDS_PER_SLICE:g} s") from error
        except BaseException:
            self._end_process()  # such as Ctrl-C: an unread answer would be mistaken for the next slice's
            raise
        if answer:
            raise SliceError(Reason(answer["reason"]), _on_one_line(answer["detail"]))

    def _start_process(self) -> subprocess.Popen[bytes]:
        os.ftruncate(self._printed, 0)
        shared = self._files.descriptor, self._pixels.descriptor
        return subprocess.Popen(
            [sys.executable, "-m", "ich_prep.dicom.decoding_process", *map(str, (*shared, MEMORY_LIMIT))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            bufsize=0,
            pass_fds=shared,
            env={**os.environ, **ENVIRONMENT},
        )

    def _last_printed(self) -> str:
        """Return the end of what the process printed last."""
        size = os.fstat(self._printed).st_size
        tail = os.pread(self._printed, LONGEST_DETAIL, max(0, size - LONGEST_DETAIL))
        return _on_one_line(tail.decode(errors="backslashreplace").strip("\n"))

    def _end_process(self) -> int | None:
        """End the process and return its exit status, None if there was none."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        code = process.wait()
        process.stdin.close()  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        return code


def _read_line(descriptor: int) -> bytes:
    """Return a line; raises ``EOFError``, and ``TimeoutError`` after ``SECONDS_PER_SLICE``."""
    deadline = time.monotonic() + SECONDS_PER_SLICE
    poll, line = select.poll(), b""
    poll.register(descriptor, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(descriptor, 1 << 16)
        if not part:
            raise EOFError
        line += part
    return line


def _on_one_line(text: str) -> str:
    """Return ``text`` with its control characters escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
