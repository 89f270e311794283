"""Headers that only pydicom can read, in a separate process under limits of time and memory.

A small file can hold millions of elements, which cost pydicom minutes and gigabytes. Here it costs one file.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from ich_prep.dicom.elements import Elements
from ich_prep.dicom.pydicom_header import read_with_pydicom
from ich_prep.errors import Reason, SliceError

SECONDS_PER_HEADER: Final = 5.0
SECONDS_TO_START: Final = 120.0  # the interpreter and pydicom, on a busy machine
MEMORY_LIMIT: Final = 1 << 29
_FRAME: Final = struct.Struct("<I")


def read_slowly(data: bytes, read_first: Callable[[int], bytes], *, stop: int) -> Elements:
    """Return the elements before ``stop`` as ``read_with_pydicom`` does, and with its errors.

    Also raises DECODER_DIED if that takes more than 5 seconds or 512 MiB, or ends the process.
    """
    with _lock:
        return _reader.read(data, read_first, stop)


class _Reader:
    """A process that reads headers, one at a time; it is started when needed, and again after it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, data: bytes, read_first: Callable[[int], bytes], stop: int) -> Elements:
        try:
            self._start()
            deadline = time.monotonic() + SECONDS_PER_HEADER
            self._send(json.dumps({"stop": stop}).encode(), deadline)
            self._send(data, deadline)
            while "more" in (answer := json.loads(self._receive(deadline))):
                self._send(read_first(answer["more"]), deadline)
        except (BrokenPipeError, EOFError):
            code = self.close()
            raise SliceError(Reason.DECODER_DIED, f"reading the header ended with exit status {code}") from None
        except TimeoutError:
            self.close()
            raise SliceError(Reason.DECODER_DIED, f"the header was not read within {SECONDS_PER_HEADER:g} s") from None
        except BaseException:
            self.close()  # such as Ctrl-C: an unread answer would be mistaken for the next file's
            raise
        if "reason" in answer:
            raise SliceError(Reason(answer["reason"]), answer["detail"])
        syntax, values, offset, length, flags = answer["elements"]
        return Elements(syntax, values, offset, length, tuple(flags))

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        # The stacks of NumPy's threads, one per core, would count towards the memory limit.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ich_prep.dicom.slow_header"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        os.set_blocking(self._process.stdin.fileno(), False)  # type: ignore[union-attr]
        self._receive(time.monotonic() + SECONDS_TO_START)  # it is ready

    def _send(self, data: bytes, deadline: float) -> None:
        stdin = self._process.stdin.fileno()  # type: ignore[union-attr]
        left = memoryview(_FRAME.pack(len(data)) + data)
        while left:
            if not select.select([], [stdin], [], max(0.0, deadline - time.monotonic()))[1]:
                raise TimeoutError
            left = left[os.write(stdin, left) :]

    def _receive(self, deadline: float) -> bytes:
        (size,) = _FRAME.unpack(self._receive_bytes(_FRAME.size, deadline))
        return self._receive_bytes(size, deadline)

    def _receive_bytes(self, size: int, deadline: float) -> bytes:
        stdout = self._process.stdout.fileno()  # type: ignore[union-attr]
        received = bytearray()
        while len(received) < size:
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(stdout, size - len(received))
            if not part:
                raise EOFError
            received += part
        return bytes(received)

    def close(self) -> int | None:
        """End the process and return its exit status, None if there was none."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        code = process.wait()
        process.stdin.close()  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        return code


_reader = _Reader()
_lock = threading.Lock()
atexit.register(_reader.close)


def _serve() -> None:
    """Answer requests on standard input until it ends: the main loop of the reading process."""
    import pydicom  # noqa: F401  # loaded before the first request, whose time is limited

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # handled by the parent; this process ends with its input
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not write into the answers

    def send(answer: object) -> None:
        text = json.dumps(answer).encode()
        answers.write(_FRAME.pack(len(text)) + text)
        answers.flush()

    def read_first(length: int) -> bytes:
        send({"more": length})
        return requests.read(*_FRAME.unpack(requests.read(_FRAME.size)))

    send("ready")
    while prefix := requests.read(_FRAME.size):
        request = json.loads(requests.read(*_FRAME.unpack(prefix)))
        data = requests.read(*_FRAME.unpack(requests.read(_FRAME.size)))
        try:
            found = read_with_pydicom(data, read_first, stop=request["stop"])
            at = found.pixel_offset, found.pixel_length
            send({"elements": [found.transfer_syntax, found.values, *at, found.flags]})
        except SliceError as error:
            send({"reason": str(error.reason), "detail": error.detail})
        except MemoryError:
            detail = f"reading the header takes more than {MEMORY_LIMIT >> 20} MiB of memory"
            send({"reason": str(Reason.DECODER_DIED), "detail": detail})


if __name__ == "__main__":
    _serve()
