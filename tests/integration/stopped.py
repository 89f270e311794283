"""Stop a build by SIGKILL at the moment at which it would give a file its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import os, signal, sys
from pathlib import Path
from ich_prep.build_dataset import build
from tests.support.cli import SMALL
real = Path.replace
def replace(self, target):
    if Path(target).name == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
Path.replace = replace
build(Path(sys.argv[2]), Path(sys.argv[3]), SMALL, workers=0)
"""


def stop_before(name: str, src: Path, out: Path) -> None:
    """Build ``out`` in a process that dies before the first file of that ``name`` appears."""
    words = [sys.executable, "-c", _PROGRAM, name, str(src), str(out)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        words, check=False, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
