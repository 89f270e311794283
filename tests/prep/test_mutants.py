"""Mutated compressed files through the scan and the isolated decoder: each costs itself at most."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from ich_prep.dicom.decode import PIXEL_FIELDS, Decoder, PixelSource
from ich_prep.errors import Reason, SliceError
from ich_prep.sources import FolderSource
from tests.support.compressed import COMPRESSED, line_of, slope_of_hu, source_of

EXPECTED = (Reason.DECODE_FAILED, Reason.SIZE_MISMATCH, Reason.DECODER_DIED)
EVERY = 25  # mutants between two innocent slices


@pytest.mark.parametrize("mutants", [500, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(2400)])])
def test_a_mutated_file_costs_itself_at_most(
    mutants: int, frames: dict[str, bytes], decoder: Decoder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bytes changed, removed, inserted and repeated, in the header and in the frame; the seed is the mutant's number."""
    innocent, path = tmp_path / "innocent.dcm", tmp_path / "mutant.dcm"
    decoded = failed = 0
    for seed in range(mutants):
        syntax = COMPRESSED[seed % len(COMPRESSED)]
        path.write_bytes(mutant(frames[syntax], random.Random(seed)))
        line = line_of(tmp_path, path.name.encode())
        if line.get("reason") is None:
            values = {name: line[name] for name in PIXEL_FIELDS}
            source = PixelSource(source=FolderSource(tmp_path), key=os.fsencode(path.name), **values)
            try:
                assert decoder.read(source).shape == (source.rows, source.columns), seed
                decoded += 1
            except SliceError as error:
                assert error.reason in EXPECTED, (seed, error)
                assert len(error.detail) < 500, seed
                failed += 1
        if seed % EVERY == 0:
            innocent.write_bytes(frames[syntax])
            np.testing.assert_array_equal(decoder.read(source_of(innocent)).view(np.int16), slope_of_hu(), str(seed))
    assert decoded > mutants / 20 and failed > mutants / 5
    assert capfd.readouterr() == ("", "")


def mutant(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    # The frame follows the Basic Offset Table; a third of the changes are before it.
    first = 132 if rng.random() < 0.3 else data.index(bytes.fromhex("feff00e0"))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(first, max(first + 1, len(changed)))
        kind = rng.randrange(4)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))])
        elif kind == 1:
            del changed[at : at + rng.choice((1, 2, 40, 4000))]
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.choice((1, 2, 40)))
        else:
            changed[at:at] = changed[at : at + rng.choice((4, 16, 400))]
    return bytes(changed)
