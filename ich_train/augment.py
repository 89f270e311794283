"""From stored pixels to what a network takes, on the device: windows, normalisation, augmentation of whole batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ich_prep.dataset.windows import Window, window_table
from ich_prep.errors import UsageError
from ich_train.config import TrainConfig

# Mean and standard deviation of ImageNet, averaged over its colours: so weights from there meet inputs of the scale
# that they know, however many channels there are. A network that starts from nothing does not mind.
MEAN, STD = 0.449, 0.226


class Preprocess(nn.Module):
    """Turns stored pixels into normalised windows.

    ``store`` is ``windows`` or ``hu``, as in the dataset; ``windows`` are the dataset's, or for HU those to compute.
    """

    tables: torch.Tensor  # (windows, 65536) uint8, by int16 HU seen as uint16; of an HU store
    centers: torch.Tensor  # (windows,) float32, in HU; where windows are stored (1,), in codes
    widths: torch.Tensor

    def __init__(self, *, store: str, windows: Sequence[Window], channels_last: bool = False) -> None:
        super().__init__()
        if store not in ("windows", "hu"):
            raise UsageError(f"Expected a store of windows or hu; found {store!r}.")
        self.store = store
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        tables = np.stack([window_table(window) for window in windows]) if store == "hu" else np.empty((0, 65536))
        self.register_buffer("tables", torch.from_numpy(tables.astype(np.uint8)), persistent=False)
        spans = [(window.center, window.width) for window in windows] if store == "hu" else [(127.5, 255.0)]
        centers, widths = torch.tensor(spans).unbind(1)
        self.register_buffer("centers", centers, persistent=False)
        self.register_buffer("widths", widths, persistent=False)

    def codes(self, images: torch.Tensor) -> torch.Tensor:
        """Return the 8-bit window codes of ``images``, (b, c', h, w) uint8.

        (b, c, h, w) uint8 windows come back as they are. Of int16 HU, each channel becomes one channel for each window,
        side by side, with the very codes that a build with ``store = "windows"`` would have written: they come from
        the same table.
        """
        if self.store == "windows":
            return images
        b, c, h, w = images.shape
        place = (images.to(torch.int32) & 0xFFFF).flatten()
        codes = torch.empty((b, c, len(self.tables), h, w), dtype=torch.uint8, device=images.device)
        for k, table in enumerate(self.tables):
            codes[:, :, k] = table.index_select(0, place).view(b, c, h, w)
        return codes.flatten(1, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (b, c', h, w) float32, the codes of ``images`` brought to mean 0 and standard deviation 1."""
        return self.normalised(self.codes(images) / 255)

    def jittered(self, images: torch.Tensor, shift: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """Return the windows of ``images`` as values of 0..1, not rounded, each image through windows of its own.

        ``shift`` (b,) moves the centers up, in units of the width; ``gain`` (b,) divides the widths. The result is
        (b, c', h, w) float32. HU beyond the dataset's window come into view only where HU are stored: a store of
        windows has clipped them, and stays clipped.
        """
        b = len(images)
        # ((x - center) / width - shift) * gain + 0.5, in one pass over the pixels.
        scale = (gain.unsqueeze(1) / self.widths).view(b, 1, -1, 1, 1)
        offset = (0.5 - gain.unsqueeze(1) * (self.centers / self.widths + shift.unsqueeze(1))).view(b, 1, -1, 1, 1)
        return torch.addcmul(offset, images.float().unsqueeze(2), scale).flatten(1, 2).clamp_(0, 1)

    def normalised(self, values: torch.Tensor) -> torch.Tensor:
        """Return window values of 0..1 brought to mean 0 and standard deviation 1, in place, in the memory format."""
        return values.sub_(MEAN).div_(STD).contiguous(memory_format=self.memory_format)


class Augment:
    """Turns stored pixels into normalised windows as `Preprocess` does, after chance has moved and changed them.

    How much is said by ``amounts``; every image of a batch has its own window jitter, flip, rotation, zoom, shift and
    noise, the same for all its channels (the noise excepted).
    """

    def __init__(self, preprocess: Preprocess, amounts: TrainConfig) -> None:
        self.preprocess = preprocess
        self.amounts = amounts

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return (b, c', h, w) float32 for (b, c, h, w) uint8 windows or int16 HU.

        ``generator`` lives on the device of ``images``; its state decides everything.
        """
        b, device, amounts = len(images), images.device, self.amounts

        def between(low: float, high: float) -> torch.Tensor:
            return torch.rand(b, generator=generator, device=device) * (high - low) + low

        if amounts.window_jitter:
            shift = between(-amounts.window_jitter, amounts.window_jitter)
            gain = torch.exp(between(-1, 1) * math.log1p(amounts.window_jitter))
            values = self.preprocess.jittered(images, shift, gain)
        else:
            values = self.preprocess.codes(images) / 255
        if amounts.flip or amounts.rotation_degrees or amounts.zoom or amounts.shift:
            mirror = between(0, 1).lt(0.5).float() * -2 + 1 if amounts.flip else torch.ones(b, device=device)
            angle = between(-1, 1) * math.radians(amounts.rotation_degrees)
            scale = torch.exp(between(-1, 1) * math.log1p(amounts.zoom))
            move_x, move_y = between(-2, 2) * amounts.shift, between(-2, 2) * amounts.shift
            values = _warped(values, mirror=mirror, angle=angle, scale=scale, move_x=move_x, move_y=move_y)
        if amounts.noise:
            values.add_(torch.randn(values.shape, generator=generator, device=device), alpha=amounts.noise)
        return self.preprocess.normalised(values)


def _warped(
    values: torch.Tensor,
    *,
    mirror: torch.Tensor,
    angle: torch.Tensor,
    scale: torch.Tensor,
    move_x: torch.Tensor,
    move_y: torch.Tensor,
) -> torch.Tensor:
    # affine_grid wants the way back, from a place in the result to one in the image, in units of half its side.
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    back = torch.stack([cos * mirror, -sin, move_x, sin * mirror, cos, move_y], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(back, list(values.shape), align_corners=False)
    # Outside the image there is air, which is 0 in every window that shows a head.
    return functional.grid_sample(values, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
