"""Libraries for ``LD_PRELOAD``, which stand between a program and the operating system."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def compiled(source: str, library: Path, untested: str) -> Path:
    """Compile C ``source`` to ``library`` and return it; without a compiler, skip the test and say what is ``untested``."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip(f"no C compiler: {untested} NOT tested")
    code = library.with_suffix(".c")
    code.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, code, "-ldl"], check=True)
    return library
