"""From stored pixels to a network's input, on the device: windows, normalization, augmentation of whole batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ich_prep.dataset.windows import Window, window_table
from ich_prep.errors import UsageError
from ich_train.config import TrainConfig
from ich_train.own_code import described, imported


@dataclass(frozen=True)
class Scaling:
    """The mean and standard deviation that normalize window values of 0..1.

    The default is ImageNet's, averaged over its colours: so weights from there get inputs of the scale that they were
    trained on, however many channels there are. For random weights it makes no difference.
    """

    mean: float = 0.449
    std: float = 0.226


class Preprocess(nn.Module):
    """Turns stored pixels into normalized windows.

    ``pixels`` is ``windows`` or ``hu``, as in the dataset; ``windows`` are the dataset's, or for HU those to compute.
    """

    tables: torch.Tensor  # (windows, 65536) uint8, indexed by int16 HU seen as uint16; empty if windows are stored
    centers: torch.Tensor  # (windows,) float32, in HU; if windows are stored (1,), in codes
    widths: torch.Tensor

    def __init__(
        self, *, pixels: str, windows: Sequence[Window], scaling: Scaling = Scaling(), channels_last: bool = False
    ) -> None:
        super().__init__()
        if pixels not in ("windows", "hu"):
            raise UsageError(f"Unknown pixels {pixels!r}; expected windows or hu.")
        self.pixels, self.scaling = pixels, scaling
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        tables = np.stack([window_table(window) for window in windows]) if pixels == "hu" else np.empty((0, 65536))
        self.register_buffer("tables", torch.from_numpy(tables.astype(np.uint8)), persistent=False)
        spans = [(window.center, window.width) for window in windows] if pixels == "hu" else [(127.5, 255.0)]
        centers, widths = torch.tensor(spans).unbind(1)
        self.register_buffer("centers", centers, persistent=False)
        self.register_buffer("widths", widths, persistent=False)

    def codes(self, images: torch.Tensor) -> torch.Tensor:
        """Return the 8-bit window codes of ``images``, (b, c', h, w) uint8.

        (b, c, h, w) uint8 windows are returned as they are. Each channel of int16 HU becomes one channel for each
        window, side by side, with exactly the codes that a build of windows would have written: they come from the same
        table.
        """
        if self.pixels == "windows":
            return images
        b, c, h, w = images.shape
        place = (images.to(torch.int32) & 0xFFFF).flatten()
        codes = torch.empty((b, c, len(self.tables), h, w), dtype=torch.uint8, device=images.device)
        for k, table in enumerate(self.tables):
            codes[:, :, k] = table.index_select(0, place).view(b, c, h, w)
        return codes.flatten(1, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (b, c', h, w) float32, the codes of ``images``, normalized."""
        return self.normalized(self.codes(images) / 255)

    def jittered(self, images: torch.Tensor, shift: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """Return the windows of ``images`` as values of 0..1, not rounded, each image through its own windows.

        ``shift`` (b,) moves the centers up, in units of the width; ``gain`` (b,) divides the widths. The result is
        (b, c', h, w) float32. HU beyond the dataset's window become visible only if HU are stored: stored windows are
        clipped, and stay clipped.
        """
        b = len(images)
        # ((x - center) / width - shift) * gain + 0.5, in one pass over the pixels.
        scale = (gain.unsqueeze(1) / self.widths).view(b, 1, -1, 1, 1)
        offset = (0.5 - gain.unsqueeze(1) * (self.centers / self.widths + shift.unsqueeze(1))).view(b, 1, -1, 1, 1)
        return torch.addcmul(offset, images.float().unsqueeze(2), scale).flatten(1, 2).clamp_(0, 1)

    def normalized(self, values: torch.Tensor) -> torch.Tensor:
        """Return window values of 0..1 scaled in place by ``scaling``, in the memory format."""
        return values.sub_(self.scaling.mean).div_(self.scaling.std).contiguous(memory_format=self.memory_format)


class Augment:
    """Turns stored pixels into normalized windows as `Preprocess` does, moved and changed at random.

    ``amounts`` says how much; every image of a batch has its own window jitter, flip, rotation, zoom, shift and noise,
    the same for all its channels (except the noise). The slices of a scan share all but the noise. A function of one's
    own that ``amounts`` names follows: called with the images as windows of 0..1, (b, c', h, w) float32, and the
    generator, it returns images of that shape.
    """

    def __init__(self, preprocess: Preprocess, amounts: TrainConfig) -> None:
        self.preprocess = preprocess
        self.amounts = amounts
        self.own = imported(amounts.augmentation, "an augmentation") if amounts.augmentation else None

    def __call__(
        self, images: torch.Tensor, generator: torch.Generator, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return (b, c', h, w) float32 for (b, c, h, w) uint8 windows or int16 HU.

        ``generator`` lives on the device of ``images``; its state determines the result. ``lengths`` says that the images
        are those of scans, one after the other, of so many slices each.
        """
        b, device, amounts = len(images), images.device, self.amounts
        scan = None
        if lengths is not None:
            scan = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

        def between(low: float, high: float) -> torch.Tensor:
            drawn = torch.rand(b if lengths is None else len(lengths), generator=generator, device=device)
            drawn = drawn * (high - low) + low
            return drawn if scan is None else drawn[scan]

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
        if self.own is not None:
            values = self._own_result(values, generator)
        return self.preprocess.normalized(values)

    def _own_result(self, values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        assert self.own is not None
        name, given = self.amounts.augmentation, values.shape
        try:
            changed = self.own(values, generator)
        except Exception as error:  # anything: it is someone else's code
            raise UsageError(
                f"The augmentation {name} fails on images of {tuple(given)}: {described(error)}"
            ) from error
        if not isinstance(changed, torch.Tensor) or changed.shape != given:
            found = tuple(changed.shape) if isinstance(changed, torch.Tensor) else type(changed).__name__
            raise UsageError(
                f"The augmentation {name} returned {found} for images of {tuple(given)}: expected the same."
            )
        return changed


def _warped(
    values: torch.Tensor,
    *,
    mirror: torch.Tensor,
    angle: torch.Tensor,
    scale: torch.Tensor,
    move_x: torch.Tensor,
    move_y: torch.Tensor,
) -> torch.Tensor:
    # affine_grid wants the inverse, from a point of the result to one of the image, in units of half its side.
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    back = torch.stack([cos * mirror, -sin, move_x, sin * mirror, cos, move_y], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(back, list(values.shape), align_corners=False)
    # Outside the image there is air, which is 0 in every window that shows a head.
    return functional.grid_sample(values, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
