"""Networks that read a scan: an encoder of its slices and a head over their sequence, or one that takes the volume.

The head's answer for a scan is the mean of its slices' logits under a learned attention, one for each class (attention
pooling: Ilse et al., arXiv:1802.04712; pooling logits instead of features: Javed et al., arXiv:2206.01794). So labels of
scans alone train the slices' logits as well: multiple-instance learning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence

from ich_prep.errors import UsageError
from ich_train.model import build_checked, build_model
from ich_train.weights import load_head

HEADS = ("none", "gru", "lstm", "transformer", "attention", "volume")
HeadKind = Literal["gru", "lstm", "transformer", "attention", "volume"]
CHUNK = 64  # slices that an encoder takes at a time when no gradient is needed
ATTENTION_HEADS = 4
TRIED_DEPTH = 32  # planes of the volume on which a network for volumes is tried, unless the depth is fixed


class HeadShape(BaseModel):
    """What is needed beside an encoder's name to build a network for scans, and to make its input."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: HeadKind
    size: int = 128  # hidden units, of each direction in a gru or lstm
    layers: int = 1
    spacing_mm: float = 0.0  # of `ich_train.resample.Resample`; 0: the slices as they are
    depth_mm: float = 0.0
    isotropic: bool = False


class ScanLogits(NamedTuple):
    """The logits of n slices of b scans: ``slices`` (n, classes), ``scans`` (b, classes)."""

    slices: torch.Tensor
    scans: torch.Tensor


class ScanHead(nn.Module):
    """A sequence model over the features of a scan's slices, with a logit for each slice and for the scan.

    ``kind``: ``gru`` and ``lstm`` read both ways; ``transformer`` attends to all slices, with sinusoidal positions;
    ``attention`` has no sequence model, only the pooling. Features are not normalized: an encoder whose scale has no
    effect learns next to nothing from random weights. asinh, logarithmic in large values, keeps them from saturating
    what follows.
    """

    def __init__(self, kind: str, *, features: int, size: int, layers: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.kind = kind
        self.project = nn.Linear(features, size)
        between = dropout if layers > 1 else 0.0
        width = size
        self.body: nn.Module | None = None
        if kind == "transformer":
            if size % ATTENTION_HEADS:
                raise UsageError(f"Expected a head_size that is a multiple of {ATTENTION_HEADS}; found {size}.")
            layer = nn.TransformerEncoderLayer(
                size, ATTENTION_HEADS, 2 * size, dropout, batch_first=True, norm_first=True
            )
            self.body = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(size), enable_nested_tensor=False)
        elif kind in ("gru", "lstm"):
            make = nn.GRU if kind == "gru" else nn.LSTM
            self.body = make(size, size, layers, batch_first=True, bidirectional=True, dropout=between)
            width = 2 * size
        self.dropout = nn.Dropout(dropout)
        self.slice = nn.Linear(width, classes)
        self.attend = nn.Sequential(nn.Linear(width, size), nn.Tanh(), nn.Linear(size, classes))

    def forward(self, features: torch.Tensor, lengths: Sequence[int]) -> ScanLogits:
        """Return the logits for ``features`` (n, features), scan after scan, of which ``lengths`` (b,) slices are each."""
        projected = torch.asinh(self.project(features))
        padded = pad_sequence([*torch.split(projected, list(lengths))], batch_first=True)  # (b, d, size)
        mask = torch.arange(padded.shape[1]).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
        mask = mask.to(features.device)
        hidden = self.dropout(self._read(padded, mask, lengths))
        logits = self.slice(hidden)  # (b, d, classes)
        attention = self.attend(hidden).masked_fill(~mask.unsqueeze(2), -torch.inf).softmax(dim=1)
        return ScanLogits(logits[mask], (attention * logits).sum(dim=1))

    def _read(self, padded: torch.Tensor, mask: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        if self.body is None:
            return padded
        if self.kind == "transformer":
            places = positional(padded.shape[1], padded.shape[2]).to(padded)
            read: torch.Tensor = self.body(padded + places, src_key_padding_mask=~mask)
            return read
        packed = pack_padded_sequence(padded, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        output: PackedSequence = self.body(packed)[0]
        hidden: torch.Tensor = pad_packed_sequence(output, batch_first=True, total_length=padded.shape[1])[0]
        return hidden


class SequenceNetwork(nn.Module):
    """An ``encoder`` of slices, (n, c, y, x) -> (n, features), and a `ScanHead`."""

    def __init__(self, encoder: nn.Module, head: ScanHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def encode(self, slices: torch.Tensor) -> torch.Tensor:
        """Return the features (n, features) of ``slices`` (n, c, y, x); in chunks if no gradient is needed."""
        if torch.is_grad_enabled():
            return self.encoder(slices)  # type: ignore[no-any-return]
        return torch.cat([self.encoder(part) for part in torch.split(slices, CHUNK)])

    def forward(self, slices: torch.Tensor, lengths: Sequence[int]) -> ScanLogits:
        """Return the logits for ``slices``, scan after scan, ``lengths`` of each; or for their features, (n, features)."""
        features = slices if slices.ndim == 2 else self.encode(slices)
        return self.head(features.float(), lengths)  # type: ignore[no-any-return]


class VolumeNetwork(nn.Module):
    """A ``network`` of whole volumes, (b, c, depth, y, x) -> (b, classes)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, slices: torch.Tensor, lengths: Sequence[int]) -> ScanLogits:
        """Return the logits for ``slices`` (b x depth, c, y, x), all of the same ``lengths``; a slice gets its scan's."""
        b, depth = len(lengths), lengths[0]
        volumes = slices.unflatten(0, (b, depth)).transpose(1, 2).contiguous()  # type: ignore[no-untyped-call]
        scans = self.network(volumes)
        return ScanLogits(scans.repeat_interleave(depth, dim=0), scans)


ScanNetwork = SequenceNetwork | VolumeNetwork


def build_scan_network(
    name: str,
    shape: HeadShape,
    *,
    channels: int,
    size: int,
    classes: int,
    weights: Path | None = None,
    dropout: float = 0.0,
) -> ScanNetwork:
    """Return the network ``name`` of `ich_train.model.build_model` with a head of ``shape`` in place of its last layer.

    ``weights`` are those of the network before its last layer was replaced, or of such a network with its head,
    which is taken too if it fits.
    ``kind = "volume"`` takes ``package.module:NAME`` only, called as ``NAME(channels=channels, size=size,
    classes=classes)``, which must make a network of volumes (b, channels, depth, size, size). Raises `UsageError` as
    `build_model` does, and for a network whose output is not that of a fully connected layer.
    """
    if shape.kind == "volume":
        depth = round(shape.depth_mm / shape.spacing_mm) if shape.spacing_mm and shape.depth_mm else TRIED_DEPTH
        return VolumeNetwork(build_checked(name, channels, (max(depth, 1), size, size), classes, weights))
    network = build_model(name, channels=channels, size=size, classes=classes, weights=weights, dropout=dropout)
    encoder, features = without_last_layer(network, name, channels=channels, size=size)
    head = ScanHead(
        shape.kind, features=features, size=shape.size, layers=shape.layers, classes=classes, dropout=dropout
    )
    if weights is not None:
        load_head(head, weights)
    return SequenceNetwork(encoder, head)


def without_last_layer(network: nn.Module, name: str, *, channels: int, size: int) -> tuple[nn.Module, int]:
    """Return ``network`` with its last fully connected layer replaced by nothing, and how many features it then has.

    Raises `UsageError` if its output is not that layer's.
    """
    layers = [(key, layer) for key, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise UsageError(f"{name} has no fully connected layer (torch.nn.Linear) at its end for a head to replace.")
    key, last = layers[-1]
    parent, _, attribute = key.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    training = network.training
    with torch.no_grad():
        found = tuple(network.eval()(torch.zeros(2, channels, size, size)).shape)
    network.train(training)
    if found != (2, last.in_features):
        raise UsageError(
            f"{name} without its last fully connected layer, {key}, returns {found} for a batch of 2; expected "
            f"{(2, last.in_features)}. A head can replace that layer only if nothing follows it."
        )
    return network, last.in_features


def positional(length: int, size: int) -> torch.Tensor:
    """Return sinusoidal positions, (length, size) float32 (Vaswani et al., arXiv:1706.03762, section 3.5)."""
    place = torch.arange(length).unsqueeze(1)
    rate = torch.exp(torch.arange(0, size, 2) * (-math.log(10_000) / size))
    return torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=2).flatten(1)[:, :size]
