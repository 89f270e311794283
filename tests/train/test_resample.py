"""Resampling is linear interpolation by position: exact on a linear ramp, whatever the distances of the slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.errors import UsageError
from ich_train.resample import Resample

FAR = torch.tensor([[5.0, 1.0, 1.0]])


def ramp(positions: list[float], *, slope: float = 10.0, size: int = 4) -> tuple[torch.Tensor, ...]:
    """Planes whose HU are ``slope`` times their position: volume, mask, positions."""
    values = torch.tensor(positions) * slope
    volume = values.round().to(torch.int16)[None, :, None, None, None].expand(1, -1, 1, size, size).contiguous()
    return volume, torch.ones(1, len(positions), dtype=torch.bool), torch.tensor([positions])


@given(gaps=st.lists(st.integers(1, 8), min_size=1, max_size=20), spacing=st.floats(0.7, 6))
@settings(max_examples=60, deadline=None)
def test_a_ramp_stays_a_ramp(gaps: list[int], spacing: float) -> None:
    positions = [0.0, *np.cumsum(gaps).astype(float).tolist()]
    grid = Resample(spacing_mm=spacing, air=-1024)(*ramp(positions), FAR)
    depth = grid.volumes.shape[1]
    assert depth == int(positions[-1] / spacing + 1e-4) + 1
    wanted = positions[-1] / 2 + (np.arange(depth) - (depth - 1) / 2) * spacing
    np.testing.assert_allclose(grid.volumes[0, :, 0, 0, 0].numpy(), wanted * 10, atol=0.6)
    assert grid.mask.all()
    assert grid.volumes.dtype == torch.int16


def test_planes_at_the_slices_are_the_slices() -> None:
    volume = torch.randint(0, 255, (1, 7, 3, 5, 5), dtype=torch.uint8)
    mask, positions = torch.ones(1, 7, dtype=torch.bool), torch.arange(7.0)[None] * 5
    grid = Resample(spacing_mm=5)(volume, mask, positions, FAR)
    assert torch.equal(grid.volumes, volume)


def test_the_depth_in_millimetres_cuts_and_pads_about_the_middle() -> None:
    volume, mask, positions = ramp([0.0, 5.0, 10.0, 15.0, 20.0])
    deep = Resample(spacing_mm=5, depth_mm=45, air=-1024)(volume, mask, positions, FAR)
    assert deep.volumes[0, :, 0, 0, 0].tolist() == [-1024, -1024, 0, 50, 100, 150, 200, -1024, -1024]
    assert deep.mask[0].tolist() == [False] * 2 + [True] * 5 + [False] * 2
    flat = Resample(spacing_mm=5, depth_mm=15, air=-1024)(volume, mask, positions, FAR)
    assert flat.volumes[0, :, 0, 0, 0].tolist() == [50, 100, 150]
    assert flat.mask.all()


def test_padding_never_leaks_into_a_scan() -> None:
    volume, mask, positions = ramp([0.0, 4.0, 8.0])
    alone = Resample(spacing_mm=2, depth_mm=12, air=-1024)(volume, mask, positions, FAR)
    padded = Resample(spacing_mm=2, depth_mm=12, air=-1024)(
        torch.cat([volume, torch.full_like(volume, 3000)], dim=1),
        torch.cat([mask, ~mask], dim=1),
        torch.cat([positions, torch.zeros_like(positions)], dim=1),
        FAR,
    )
    assert torch.equal(alone.volumes, padded.volumes)
    assert torch.equal(alone.mask, padded.mask)


@given(
    spans=st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=12), min_size=2, max_size=4),
    spacing=st.floats(0.7, 6),
)
@settings(max_examples=60, deadline=None)
def test_a_scan_is_the_same_alone_and_beside_others(spans: list[list[int]], spacing: float) -> None:
    scans = [ramp([0.0, *np.cumsum(gaps).astype(float).tolist()]) for gaps in spans]
    depth = max(volume.shape[1] for volume, _, _ in scans)
    padded = [
        torch.cat([torch.cat([part, torch.zeros_like(part[:, :1]).expand(-1, depth - part.shape[1], *part.shape[2:])], dim=1)
                   for part in (scan[k] for scan in scans)])
        for k in range(3)
    ]  # fmt: skip
    resample = Resample(spacing_mm=spacing, air=-1024)
    together = resample(*padded, FAR.expand(len(scans), 3))
    for k, scan in enumerate(scans):
        alone = resample(*scan, FAR)
        planes = alone.volumes.shape[1]
        assert torch.equal(together.volumes[k, :planes], alone.volumes[0])
        assert (together.volumes[k, planes:] == -1024).all()
        assert not together.mask[k, planes:].any()


def test_two_slices_at_one_position_and_a_single_slice_are_no_division_by_zero() -> None:
    for positions in ([0.0, 5.0, 5.0, 10.0], [0.0]):
        grid = Resample(spacing_mm=2.5)(*ramp(positions), FAR)
        expected = np.arange(grid.volumes.shape[1]) * 25
        assert grid.volumes[0, :, 0, 0, 0].tolist() == expected.tolist()


def test_isotropic_planes_scale_about_the_centre() -> None:
    x = torch.arange(16.0) - 7.5
    plane = (x * 20).round().to(torch.int16).expand(1, 2, 1, 16, 16).contiguous()
    mask, positions = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0.0, 1.0]])
    grid = Resample(spacing_mm=1, isotropic=True, air=-1024)(plane, mask, positions, torch.tensor([[1.0, 2.0, 2.0]]))
    # A pixel of the result is half a pixel of the scan.
    np.testing.assert_allclose(grid.volumes[0, 0, 0, 8].numpy(), (x * 10).numpy(), atol=0.6)
    wide = Resample(spacing_mm=1, isotropic=True, air=-1024)(plane, mask, positions, torch.tensor([[1.0, 0.5, 0.5]]))
    assert (wide.volumes[0, 0, 0, :3] == -1024).all()
    assert (wide.volumes[0, 0, 0, 8, 5:11] > -1024).all()


def test_what_is_missing_or_invalid_is_refused() -> None:
    with pytest.raises(UsageError, match="spacing_mm > 0"):
        Resample(spacing_mm=0)
    with pytest.raises(UsageError, match="pixel spacing"):
        Resample(spacing_mm=1, isotropic=True)(*ramp([0.0, 1.0]), torch.tensor([[1.0, float("nan"), 1.0]]))
