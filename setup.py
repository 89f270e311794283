"""The compiled library, which pyproject.toml cannot describe: one call of a C compiler.

The library is a plain shared object that ctypes loads. It needs no Python headers, and one build serves every Python, so
the wheel is tagged ``py3-none``. A wheel carries the library; only an installation from source needs a compiler.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "ich_prep.dataset._native"
SOURCES = Path("ich_prep/dataset/native")
FLAGS = ["-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"]

# clang as Zig packages it, for machines without a compiler. Baseline: for every processor of this kind, not only this one.
ZIG = "ziglang==0.15.2"
ZIG_COMMAND = [sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"]


def find_compiler() -> list[str]:
    """Return the command of the C compiler: what ``CC`` names, else the first one installed, else Zig's."""
    if named := os.environ.get("CC", "").strip():
        return shlex.split(named)
    installed = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    return [installed] if installed else ZIG_COMMAND


COMPILER = find_compiler()


class BuildLibrary(build_ext):
    """Build the shared object; ``CFLAGS`` and ``LDFLAGS`` are passed on."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return a file name without the tag of one Python version."""
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link all sources in one call."""
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        extra, linked = (shlex.split(os.environ.get(name, "")) for name in ("CFLAGS", "LDFLAGS"))
        self.spawn([*COMPILER, *FLAGS, *extra, "-o", str(out), *ext.sources, *linked])


class TagWheel(bdist_wheel):
    """Tag the wheel for every Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags: Python, ABI, platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(LIBRARY, sources=sorted(map(str, SOURCES.glob("*.c"))), depends=sorted(map(str, SOURCES.glob("*.h"))))
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TagWheel},
    # setuptools passes this on to pip as a requirement of the build (PEP 517), and pip installs it for the build only.
    setup_requires=[ZIG] if COMPILER == ZIG_COMMAND else [],
)
