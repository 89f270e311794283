"""The hard phantom: bleeds across several slices that hardly stand out of the noise, and mimics in single ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.build_dataset import build
from ich_prep.dataset.classes import SUBTYPES
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.phantom import LAYOUTS, synthesize
from ich_prep.phantom.bleeds import Bleed
from ich_prep.phantom.hard import MIMICS, NOISE_HU, SPAN_MM, THICKNESS_MM
from ich_prep.phantom.series import BLOCK, Place, Scan, Slice, draw_patient, draw_scan, draw_slices, place
from tests.support.cli import prep

SIZE = 64


def hard_place(index: int, *, seed: int = 0) -> Place:
    return place(seed, index, second_series=3, hard=True)


def drawn(where: Place, scan: Scan, bleeds: tuple[Bleed, ...] | None = None) -> list[Slice]:
    head, own = draw_patient(0, where)
    return [*draw_slices(0, where, scan, head, own if bleeds is None else bleeds)]


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_arguments_write_equal_bytes_that_are_not_the_ordinary_ones(layout: str, tmp_path: Path) -> None:
    given_ = {"series": 2, "seed": 3, "size": 32, "layout": layout}
    for name, workers in (("one", 0), ("other", 2)):
        synthesize(tmp_path / name, hard=True, workers=workers, **given_)  # type: ignore[arg-type]
    synthesize(tmp_path / "ordinary", **given_)  # type: ignore[arg-type]
    assert digests(tmp_path / "one") == digests(tmp_path / "other")
    ends = {path.suffix for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert ends == {path.suffix for path in (tmp_path / "ordinary").rglob("*") if path.is_file()}
    slices = [
        {digest for name, digest in digests(tmp_path / tree).items() if name.endswith(".dcm")}
        for tree in ("one", "ordinary")
    ]
    assert slices[0] and not slices[0] & slices[1]


@given(seed=st.integers(0, 2**32), block=st.integers(0, 50))
def test_half_of_the_series_have_two_bleeds(seed: int, block: int) -> None:
    places = [hard_place(block * BLOCK + k, seed=seed) for k in range(BLOCK)]
    assert Counter(len(where.kinds) for where in places) == {0: 10, 2: 10}
    assert Counter(kind for where in places for kind in where.kinds) == dict.fromkeys(SUBTYPES, 4)


@settings(max_examples=10, deadline=None)
@given(index=st.integers(0, 59))
def test_a_bleed_spans_neighbouring_slices(index: int) -> None:
    where = hard_place(index)
    scan = draw_scan(0, where, size=SIZE)
    slices = drawn(where, scan)
    for kind in where.kinds:
        positive = np.flatnonzero([kind in one.painted_mm2 for one in slices])
        assert np.array_equal(positive, np.arange(len(positive)) + (positive[0] if len(positive) else 0))
        assert len(positive) <= SPAN_MM[1] / scan.thickness_mm + 2
    assert not {kind for one in slices for kind in one.painted_mm2} - {*where.kinds}


def test_most_bleeds_span_three_slices_or_more() -> None:
    spans = []
    for index in range(BLOCK):
        where = hard_place(index)
        slices = drawn(where, draw_scan(0, where, size=32))
        spans += [sum(kind in one.painted_mm2 for one in slices) for kind in where.kinds]
    assert len(spans) == 20
    assert np.mean(np.array(spans) >= 3) >= 0.8
    assert max(spans) <= 9


def test_slices_are_thick_and_noisy() -> None:
    where = hard_place(0)
    scan = draw_scan(0, where, size=SIZE)
    assert scan.thickness_mm in THICKNESS_MM and scan.cuts == 3
    assert np.allclose(np.diff(scan.heights_mm), scan.thickness_mm, atol=2e-3)
    assert NOISE_HU[0] <= scan.noise_hu <= NOISE_HU[1]
    assert 15 <= len(scan.heights_mm) <= 21


def test_a_slice_is_the_mean_of_what_lies_in_its_thickness() -> None:
    where = replace(hard_place(1), hard=False)  # without mimics
    scan = replace(draw_scan(0, hard_place(1), size=SIZE), noise_hu=0.0, tilt_deg=0.0)
    third = scan.thickness_mm / 3
    whole = drawn(where, scan)
    parts = [
        drawn(where, replace(scan, cuts=1, heights_mm=tuple(height + step for height in scan.heights_mm)))
        for step in (-third, 0.0, third)
    ]
    for number, one in enumerate(whole):
        mean = np.mean([part[number].hu.astype(np.float64) for part in parts], axis=0)
        inside = mean > -900  # the head-holder is as wide as before
        assert np.abs(one.hu - mean)[inside].max() <= 1.5


def test_a_bleed_is_fainter_than_the_noise_of_a_pixel() -> None:
    where = replace(next(w for w in map(hard_place, range(BLOCK)) if "intraparenchymal" in w.kinds), hard=False)
    scan = draw_scan(0, replace(where, hard=True), size=SIZE)
    head, bleeds = draw_patient(0, replace(where, hard=True))
    one = [bleed for bleed in bleeds if bleed.kind == "intraparenchymal"]
    with_bleed = [*draw_slices(0, where, scan, head, tuple(one))]
    without = [*draw_slices(0, where, scan, head, ())]
    changes = np.concatenate([(a.hu - b.hu)[a.hu != b.hu] for a, b in zip(with_bleed, without, strict=True)])
    noise = np.concatenate([np.diff(one.hu.astype(np.float64)[20:44, 20:44], axis=1).ravel() for one in without[5:9]])
    assert 0 < np.mean(changes) < noise.std()


def test_mimics_are_in_single_slices_and_have_no_label() -> None:
    numbers = []
    for index in range(12):
        where = hard_place(index)
        scan = draw_scan(0, where, size=SIZE)
        _, bleeds = draw_patient(0, where)
        with_mimics, without = drawn(where, scan), drawn(replace(where, hard=False), scan, bleeds)
        assert [one.painted_mm2 for one in with_mimics] == [one.painted_mm2 for one in without]
        differing = [not np.array_equal(a.hu, b.hu) for a, b in zip(with_mimics, without, strict=True)]
        numbers.append(sum(differing))
    assert max(numbers) <= MIMICS[1]
    assert min(numbers) >= 1


def test_the_command_writes_a_tree_that_builds(tmp_path: Path) -> None:
    words = ["synth", "--out", tmp_path / "tree", "--series", 3, "--size", 32, "--layout", "folder", "--hard"]
    assert "3 series" in prep(*words, "--workers", 0).stdout
    build(tmp_path / "tree", tmp_path / "data.zarr", Spec(size=32, layout="folder", slices_per_shard=16), workers=0)
    dataset = open_dataset(tmp_path / "data.zarr")
    assert len(dataset.series) == 3
    assert dataset.is_ok.all()
