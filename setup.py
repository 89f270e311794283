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


def own_compiler() -> str | None:
    """Return the C compiler of this machine: the one that CC names, the one that built this Python, or a usual one."""
    for command in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        if command and shutil.which(shlex.split(command)[0]):
            return str(command)
    return None


compiler = own_compiler()
os.environ["CC"] = compiler or ZIG_COMMAND
native = Path("ich_prep/native")

setup(
    ext_modules=[
        # No module: a library that ich_prep/kernels.py loads by its name, and that needs nothing of Python's headers.
        Extension(
            "ich_prep._native",
            sources=sorted(map(str, native.glob("*.c"))),
            depends=sorted(map(str, native.glob("*.h"))),
            extra_compile_args=["-std=c11", "-O3", "-pthread", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
        )
    ],
    # What pip installs to build with, and for nothing else.
    setup_requires=[] if compiler else [ZIG],
)
