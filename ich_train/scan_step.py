"""A training step on whole scans: losses by slice and by scan together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ich_train.loss import Sums, loss_sums
from ich_train.resample import Resample
from ich_train.scan_inputs import Selected, select_planes, select_slices
from ich_train.scan_network import ScanLogits
from ich_train.step import Judged, Step


class ScanStep(Step):
    """A `Step` whose inputs are those of `ich_train.volume_loader.VolumeBatch`.

    The loss is the mean over all known labels, in which that of a scan counts for ``scan_weight`` slices. ``volumes``
    says that the network takes volumes, resampled by ``resample`` if given; its slices have no loss. ``by_slice`` says
    whether slices or scans are judged in validation.
    """

    def __init__(
        self,
        *,
        context: int,
        scan_weight: float,
        volumes: bool,
        resample: Resample | None,
        by_slice: bool,
        **parts: Any,
    ) -> None:
        super().__init__(**parts, use_cuda_graph=False)  # scans differ in length
        self.context, self.scan_weight, self.volumes = context, scan_weight, volumes
        self.resample, self.by_slice = resample, by_slice

    def measure(self, *inputs: torch.Tensor) -> Sums:
        """Return the loss of a batch of scans."""
        selected = self._selected(*inputs)
        slices = selected.slices
        if slices.ndim == 4:
            slices = self.augment(slices, self.generator, selected.lengths)
        with self.autocast():
            logits = self.network(slices, selected.lengths)
        return self._sums_of(logits, *inputs)[0]

    def validate(self, model: nn.Module, *inputs: torch.Tensor) -> Judged:
        """Return what ``model``, in evaluation mode, says of the slices of a batch, or of its scans."""
        with torch.inference_mode(), self.autocast():
            selected = self._selected(*inputs)
            slices = self.preprocess(selected.slices) if selected.slices.ndim == 4 else selected.slices
            logits = model(slices, selected.lengths)
            sums, of_slices = self._sums_of(logits, *inputs)
        if self.by_slice:
            return Judged(sums, logits.slices, of_slices)
        return Judged(sums, logits.scans, inputs[2])

    def _selected(self, *inputs: torch.Tensor) -> Selected:
        volumes, _, _, mask, positions_mm, spacing_mm, rows = inputs
        if self.volumes:
            return select_planes(volumes, mask, positions_mm, spacing_mm, self.resample)
        return select_slices(volumes, rows, context=self.context)

    def _sums_of(self, logits: ScanLogits, *inputs: torch.Tensor) -> tuple[Sums, torch.Tensor]:
        """Return the sums over slices and scans together, and the labels (n, classes) of the slices."""
        _, labels, scan_labels, _, _, _, rows = inputs
        of_scans = loss_sums(logits.scans, scan_labels, self.weights, self.entropy_of)
        weighted = Sums(of_scans.loss * self.scan_weight, of_scans.weight * self.scan_weight, *of_scans[2:])
        if self.volumes:
            return weighted, labels.flatten(0, 1)
        scan, place = (rows >= 0).nonzero(as_tuple=True)
        of_slices = labels[scan.to(labels.device), place.to(labels.device)]
        slices = loss_sums(logits.slices, of_slices, self.weights, self.entropy_of)
        return Sums(*(a + b for a, b in zip(slices, weighted, strict=True))), of_slices

    def _mean_weight(self, weight: torch.Tensor) -> torch.Tensor:
        # A batch of few scans may have no known label: it then teaches nothing.
        return super()._mean_weight(weight).clamp(min=1e-6)
