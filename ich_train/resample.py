"""Scans on a grid of equal depth and spacing, by linear interpolation on the device that holds them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ich_prep.errors import UsageError


class Grid(NamedTuple):
    """Scans after resampling: ``volumes`` (b, depth, channel, y, x), of the type that they had, ``mask`` (b, depth) bool.

    ``mask`` is false for planes outside of the scan, which hold air.
    """

    volumes: torch.Tensor
    mask: torch.Tensor


class Resample(nn.Module):
    """Resamples scans to planes of equal distance.

    ``spacing_mm`` is the distance of the planes, and ``depth_mm`` what they span together: round(depth_mm / spacing_mm)
    planes about the middle of each scan, cut or padded with air. Without ``depth_mm`` (0) a scan has as many as it spans,
    about its middle, and air after them up to those of the longest scan of the batch. ``isotropic`` resamples the planes
    too, to pixels of the same distance about their centre, without a change of their number. Each value is interpolated
    linearly between the two slices next to it by their positions, so unequal distances and missing slices are taken into
    account, then bilinearly in the plane, and rounded to the type of the stored pixels. ``air`` is what pads: -1024 for
    HU, 0 for windows. Gantry tilt is not undone: planes stay parallel to the slices, and are not shifted.
    """

    def __init__(self, *, spacing_mm: float, depth_mm: float = 0.0, isotropic: bool = False, air: int = 0) -> None:
        super().__init__()
        if spacing_mm <= 0 or depth_mm < 0:
            raise UsageError(f"Expected spacing_mm > 0 and depth_mm >= 0; found {spacing_mm} and {depth_mm}.")
        self.spacing_mm, self.depth_mm, self.isotropic, self.air = spacing_mm, depth_mm, isotropic, air

    def planes(self, spans_mm: torch.Tensor) -> torch.Tensor:
        """Return how many planes scans have that span ``spans_mm`` (b,) from first to last slice, int64 (b,)."""
        if self.depth_mm:
            return torch.full_like(spans_mm, max(1, round(self.depth_mm / self.spacing_mm)), dtype=torch.int64)
        return (spans_mm / self.spacing_mm + 1e-4).long() + 1

    def forward(
        self, volumes: torch.Tensor, mask: torch.Tensor, positions_mm: torch.Tensor, spacing_mm: torch.Tensor
    ) -> Grid:
        """Return scans on the grid; the arguments are those of `ich_train.volume_loader.VolumeBatch`.

        Raises `UsageError` if planes are to be isotropic and a scan has no pixel spacing.
        """
        lengths = mask.sum(dim=1)
        last = (lengths - 1).clamp(min=0)
        far = positions_mm.gather(1, last.unsqueeze(1))  # (b, 1), from the first slice
        planes = self.planes(far)  # (b, 1)
        numbers = torch.arange(int(planes.max()), device=volumes.device)
        wanted = far / 2 + (numbers - (planes - 1) / 2) * self.spacing_mm  # (b, depth)
        # Padding comes after the slices: at infinity it is no neighbour of any plane.
        known = torch.where(mask, positions_mm, torch.inf).contiguous()
        above = torch.searchsorted(known, wanted.contiguous()).clamp(max=last.unsqueeze(1))
        below = (above - 1).clamp(min=0)
        z_below, z_above = positions_mm.gather(1, below), positions_mm.gather(1, above)
        gap = z_above - z_below
        share = torch.where(gap > 0, (wanted - z_below) / gap.clamp(min=1e-6), 1.0).clamp(0, 1)
        inside = (numbers < planes) & (wanted >= -self.spacing_mm / 2) & (wanted <= far + self.spacing_mm / 2)
        scan = torch.arange(len(volumes), device=volumes.device).unsqueeze(1)
        moved = torch.lerp(
            volumes[scan, below].float(), volumes[scan, above].float(), share.to(torch.float32)[..., None, None, None]
        )
        if self.isotropic:
            moved = self._in_plane(moved, spacing_mm)
        moved = torch.where(inside[..., None, None, None], moved, float(self.air))
        return Grid(moved.round_().to(volumes.dtype), inside)

    def _in_plane(self, planes: torch.Tensor, spacing_mm: torch.Tensor) -> torch.Tensor:
        scale = self.spacing_mm / spacing_mm[:, 1:]  # (b, 2): y, x; in pixels of the scan
        if not bool(torch.isfinite(scale).all()):
            raise UsageError("Isotropic resampling needs the pixel spacing of each scan; one has none.")
        b, depth, channels, y, x = planes.shape
        zero = torch.zeros(b, device=planes.device)
        back = torch.stack([scale[:, 1], zero, zero, zero, scale[:, 0], zero], dim=1).view(-1, 2, 3)
        merged = planes.reshape(b, depth * channels, y, x) - self.air  # zeros then pad with air
        grid = functional.affine_grid(back, list(merged.shape), align_corners=False)
        moved = functional.grid_sample(merged, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return (moved + self.air).view(b, depth, channels, y, x)
