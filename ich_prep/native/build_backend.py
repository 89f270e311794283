"""How pip builds this project: by setuptools, with a C compiler from PyPI where the machine has none."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 what pip asks for and does not stand below

# Zig's, which is clang with what it needs to link. Code for any processor of this machine's kind, not for this one alone.
ZIG = "ziglang==0.15.2"
ZIG_COMMAND = shlex.join([sys.executable, "-m", "ziglang", "cc", "-mcpu=baseline"])


def _own_compiler() -> str | None:
    """Return the C compiler of this machine: the one asked for by CC, the one that built this Python, or cc."""
    built_with = shlex.split(sysconfig.get_config_var("CC") or "cc")
    for command in (os.environ.get("CC", ""), shlex.join(built_with), "cc", "gcc", "clang"):
        if command and shutil.which(shlex.split(command)[0]):
            return command
    return None


def _requirements() -> list[str]:
    return [] if _own_compiler() else [ZIG]


def _choose_compiler() -> None:
    os.environ["CC"] = _own_compiler() or ZIG_COMMAND


def get_requires_for_build_wheel(config_settings: dict[str, object] | None = None) -> list[str]:
    """Return what a wheel needs to be built, besides what pyproject.toml says."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, object] | None = None) -> list[str]:
    """Return what an editable installation needs, besides what pyproject.toml says."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_requirements()]


def build_wheel(
    wheel_directory: str, config_settings: dict[str, object] | None = None, metadata_directory: str | None = None
) -> str:
    """Build a wheel with the compiler there is."""
    _choose_compiler()
    return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: dict[str, object] | None = None, metadata_directory: str | None = None
) -> str:
    """Compile into this tree, with the compiler there is."""
    _choose_compiler()
    return str(build_meta.build_editable(wheel_directory, config_settings, metadata_directory))
