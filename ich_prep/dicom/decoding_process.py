"""The main loop of the process that decodes compressed slices: python -m ich_prep.dicom.decoding_process FILES PIXELS LIMIT.

FILES and PIXELS are descriptors of shared memory, LIMIT is the most memory in bytes. Requests and answers are lines of
JSON on standard input and output. What the libraries print goes to standard error, of which only the last request's is kept.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys

import numpy as np

from ich_prep.dicom.frames import PixelRecord, decode_into
from ich_prep.dicom.shared_memory import Attached
from ich_prep.errors import Reason, SliceError

PRINTED_LIMIT = 16 << 20  # bytes


def main() -> None:
    """Answer requests until standard input ends."""
    files, pixels, limit = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (PRINTED_LIMIT, PRINTED_LIMIT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # handled by the parent; this process ends with its input
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not write into the answers
    printed = sys.stderr.fileno()
    source, target = Attached(files, writable=False), Attached(pixels, writable=True)
    for line in sys.stdin.buffer:
        answer = _answer(json.loads(line), source, target, limit)
        if os.fstat(printed).st_size:
            os.ftruncate(printed, 0)
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _answer(fields: dict[str, object], source: Attached, target: Attached, limit: int) -> dict[str, str]:
    """Decode the file in ``source`` into ``target``; return the reason and the detail of a failure."""
    record = PixelRecord(**fields)  # type: ignore[arg-type]
    try:
        stored = np.frombuffer(target.view(record.rows * record.columns * 2), np.uint16)
        decode_into(record, source.view(record.file_size), stored.reshape(record.rows, record.columns))
    except SliceError as error:
        return {"reason": error.reason, "detail": error.detail}
    except BaseException as error:  # libraries raise what they like on damaged bytes; a panic of Rust is no Exception
        # A decoder's library that is installed fails to load only where there is no room for it.
        if isinstance(error, MemoryError | ImportError) or getattr(error, "errno", None) == errno.ENOMEM:
            return {"reason": Reason.DECODER_DIED, "detail": f"more than {limit >> 20} MiB of memory"}
        return {"reason": Reason.DECODE_FAILED, "detail": f"{type(error).__name__}: {error}"[:200]}
    return {}


if __name__ == "__main__":
    main()
