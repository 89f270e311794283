"""The compiled library: built by one call of a compiler, and by one that pip installs if the machine has none."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASK = """
import json, runpy, setuptools
asked = {}
setuptools.setup = asked.update
made = runpy.run_path("setup.py")
print(json.dumps([asked["setup_requires"], made["COMPILER"]]))
"""

pytest.importorskip("setuptools", minversion="77", reason="setuptools is not installed here")


def asked_with(path: Path, **environment: str) -> tuple[list[str], list[str]]:
    """Return what setup.py asks pip to install for the build, and the compiler it takes, with ``path`` as PATH."""
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=ROOT,
        env={"PATH": str(path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    required, compiler = json.loads(done.stdout)
    return required, compiler


def test_a_compiler_is_installed_if_there_is_none(tmp_path: Path) -> None:
    required, compiler = asked_with(tmp_path)
    assert [one.split("==")[0] for one in required] == ["ziglang"]
    assert compiler == [sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"]


@pytest.mark.parametrize("name", ["cc", "gcc", "clang"])
def test_the_compiler_of_the_machine_is_used(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / name).chmod(0o755)
    assert asked_with(tmp_path) == ([], [name])


def test_the_named_compiler_is_used(tmp_path: Path) -> None:
    assert asked_with(tmp_path, CC="my-own-cc -m64") == ([], ["my-own-cc", "-m64"])


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no cc here")
def test_one_call_builds_a_library_that_ctypes_loads(tmp_path: Path) -> None:
    """Flags of the environment are passed on, and the file name has no Python version."""
    subprocess.run(
        [
            sys.executable,
            "setup.py",
            "--quiet",
            "build_ext",
            "--build-lib",
            tmp_path,
            "--build-temp",
            tmp_path / "temp",
        ],
        cwd=ROOT,
        env={**os.environ, "CFLAGS": "-Werror -DICH_PORTABLE"},
        capture_output=True,
        check=True,
    )
    (built,) = tmp_path.rglob("*.so")
    assert built.name == "_native.so"
    assert ctypes.CDLL(str(built)).ich_interface() > 0


def test_the_wheel_serves_every_python(tmp_path: Path) -> None:
    script = (
        "import runpy, setuptools; setuptools.setup = lambda **_: None\n"
        "tag = runpy.run_path('setup.py')['TagWheel'](setuptools.Distribution())\n"
        "tag.ensure_finalized(); tag.root_is_pure = False; print(*tag.get_tag())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    python, abi, platform = done.stdout.split()
    assert (python, abi) == ("py3", "none")
    assert platform.startswith("linux_")
