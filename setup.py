"""The compiled library, which pyproject.toml cannot describe: built by the machine's C compiler, or by one from PyPI."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

# Zig's, which is clang with all that it needs to link. Code for any processor of this machine's kind, not for this one.
ZIG = "ziglang==0.15.2"
ZIG_COMMAND = shlex.join([sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"])
BUILT_WITH = str(sysconfig.get_config_var("CC") or "cc")


def is_here(command: str) -> bool:
    """Return whether the program that ``command`` calls is on this machine."""
    return shutil.which(shlex.split(command)[0]) is not None


# The compiler that CC names; the one that built this Python; a usual one; Zig's.
asked_for = os.environ.get("CC", "").strip()
compiler = asked_for or next(filter(is_here, (BUILT_WITH, "cc", "gcc", "clang")), ZIG_COMMAND)
os.environ["CC"] = compiler
if not asked_for and compiler != BUILT_WITH:
    # Flags that this Python was built with are for the compiler that it was built with.
    os.environ.setdefault("CFLAGS", "")
    os.environ.setdefault("LDSHARED", f"{compiler} -shared")
native = Path("ich_prep/dataset/native")

setup(
    ext_modules=[
        # No module: a library that ich_prep/dataset/native.py loads by its name, and that needs nothing of Python's headers.
        Extension(
            "ich_prep.dataset._native",
            sources=sorted(map(str, native.glob("*.c"))),
            depends=sorted(map(str, native.glob("*.h"))),
            extra_compile_args=["-std=c11", "-O3", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
        )
    ],
    # What pip installs to build with, and for nothing else.
    setup_requires=[ZIG] if compiler == ZIG_COMMAND else [],
)
