"""From a batch of scans on the device to what a network for scans takes: slices one after the other, and their numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ich_train.resample import Resample


class Selected(NamedTuple):
    """The slices of b scans without padding: ``slices`` (n, ...), scan after scan, ``lengths`` (b,) of each."""

    slices: torch.Tensor
    lengths: list[int]


def select_slices(volumes: torch.Tensor, rows: torch.Tensor, *, context: int) -> Selected:
    """Return the slices of ``volumes`` (b, depth, ...), each with ``context`` neighbours on each side as channels.

    ``rows`` (b, depth), on the CPU, are -1 where padded. At the ends of a scan the outermost slice stands for those
    that are missing. Features (b, depth, features) are taken as they are.
    """
    real = rows >= 0
    lengths = real.sum(dim=1)
    scan, place = real.nonzero(as_tuple=True)
    if volumes.ndim == 3:
        return Selected(volumes[scan.to(volumes.device), place.to(volumes.device)], lengths.tolist())
    around = place.unsqueeze(1) + torch.arange(-context, context + 1)
    around = around.clamp(min=0).minimum((lengths - 1)[scan].unsqueeze(1))
    taken = volumes[scan.unsqueeze(1).to(volumes.device), around.to(volumes.device)]  # (n, 2 context + 1, c, y, x)
    return Selected(taken.flatten(1, 2), lengths.tolist())


def select_planes(
    volumes: torch.Tensor,
    mask: torch.Tensor,
    positions_mm: torch.Tensor,
    spacing_mm: torch.Tensor,
    resample: Resample | None,
) -> Selected:
    """Return the planes of ``volumes`` (b, depth, c, y, x), equally many of each, after ``resample`` if given."""
    if resample is not None:
        volumes = resample(volumes, mask, positions_mm, spacing_mm).volumes
    b, depth = volumes.shape[:2]
    return Selected(volumes.flatten(0, 1), [depth] * b)
