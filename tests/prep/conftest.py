"""Fixtures of the tests that decode compressed slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ich_prep.dicom.decode import Decoder
from tests.support.compressed import COMPRESSED, compressed, slope_of_hu


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    """One decoder for all tests of a module: one slice must not affect the next."""
    shared = Decoder()
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def frames(slice_bytes: Callable[..., bytes]) -> dict[str, bytes]:
    """One slice, ``slope_of_hu``, in each compressed transfer syntax: its file."""
    native = slice_bytes(slope_of_hu())
    return {syntax: compressed(native, syntax) for syntax in COMPRESSED}
