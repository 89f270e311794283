"""What the integration tests share: the real command line, and a dataset as a mapping of its files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

PREP = str(Path(sys.executable).with_name("ich-prep"))


def prep(*words: object) -> subprocess.CompletedProcess[str]:
    """Run ``ich-prep`` to its end and return what it said."""
    return subprocess.run([PREP, *map(str, words)], capture_output=True, text=True, timeout=240, check=False)


def start(*words: object) -> subprocess.Popen[bytes]:
    """Start ``ich-prep`` as the head of a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [PREP, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def published(dataset: Path) -> Mapping[str, str]:
    """Return the digest of each file of a dataset, by relative path; the folder of the build is left out."""
    return {
        str(path.relative_to(dataset)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(dataset.rglob("*"))
        if path.is_file() and path.relative_to(dataset).parts[0] != "build"
    }
