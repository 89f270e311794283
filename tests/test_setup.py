"""What pip is asked to bring for the build: a C compiler where the machine has none, and nothing where it has one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASK = """
import json, os, runpy, sysconfig
import setuptools
sysconfig.get_config_vars()["CC"] = "compiler-that-is-gone -pthread"
asked = {}
setuptools.setup = asked.update
runpy.run_path("setup.py")
print(json.dumps([asked["setup_requires"], os.environ["CC"], os.environ.get("CFLAGS")]))
"""


@pytest.mark.parametrize("given", ["nothing", "CC", "cc"])
def test_a_compiler_is_brought_where_there_is_none(given: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="SKIPPED: setuptools is not installed here")
    environment = {"PATH": str(tmp_path), "CC": "my-own-cc"} if given == "CC" else {"PATH": str(tmp_path)}
    if given == "cc":
        (tmp_path / "cc").write_text("#!/bin/sh\n")
        (tmp_path / "cc").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    brought, compiler, flags = json.loads(done.stdout)
    if given == "nothing":
        assert [one.split("==")[0] for one in brought] == ["ziglang"]
        assert "-m ziglang cc" in compiler
    else:
        assert brought == []
        assert compiler == environment.get("CC", "cc")
    # Flags of the compiler that is gone are for no other; whoever names one of their own knows what it takes.
    assert flags == (None if given == "CC" else "")
