"""One contender of the archive benchmark (inflating, listing) in its own process: prints the result as JSON.

python -m benchmarks.archive_contenders NAME ARCHIVE
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.build_contenders import PROCESSES, _race
from ich_prep import Spec
from ich_prep.sources import open_source

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

Location = tuple[int, int, int]  # offset of the local header, compressed size, size


def inflate(archive: Path, library: str) -> dict[str, Any]:
    """Two processes that only read and inflate the DICOM files of the archive, with all locations known in advance."""
    with zipfile.ZipFile(archive) as file:
        slices = [info for info in file.infolist() if info.filename.endswith(".dcm")]
    locations = [(info.header_offset, info.compress_size, info.file_size) for info in slices]
    parts = [locations[part::PROCESSES] for part in range(PROCESSES)]
    return _race(partial(_inflate, library, archive), parts, archive.parent, Spec())


def _inflate(
    library: str, archive: Path, locations: list[Location], _: Path, __: Spec, barrier: Barrier, queue: Any
) -> None:
    if library == "isal":
        from isal.isal_zlib import decompress
    else:
        from zlib import decompress
    descriptor = os.open(archive, os.O_RDONLY)
    barrier.wait()
    for offset, compressed_size, size in locations:
        name, extra = struct.unpack("<HH", os.pread(descriptor, 4, offset + 26))
        data = os.pread(descriptor, compressed_size, offset + 30 + name + extra)
        assert len(decompress(data, wbits=-zlib.MAX_WBITS, bufsize=size)) == size
    barrier.wait()
    queue.put(0)


def listing(archive: Path, *, by_zipfile: bool) -> dict[str, Any]:
    """List the members; ``rate`` in members/s, ``memory`` the peak of this process in bytes."""
    start = time.perf_counter()
    if by_zipfile:
        with zipfile.ZipFile(archive) as file:
            count = len(file.infolist())
    else:
        count = len(open_source([archive]).list().files)
    seconds = time.perf_counter() - start
    return {"slices": count, "seconds": seconds, "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


CONTENDERS = {
    "inflate by zlib": partial(inflate, library="zlib"),
    "inflate by ISA-L": partial(inflate, library="isal"),
    "list": partial(listing, by_zipfile=False),
    "list by zipfile": partial(listing, by_zipfile=True),
}


def main() -> None:
    name, archive = sys.argv[1:]
    result = CONTENDERS[name](Path(archive))
    print(json.dumps({**result, "rate": result["slices"] / result["seconds"]}))


if __name__ == "__main__":
    main()
