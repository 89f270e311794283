"""Heads over the slices of a scan: padding never matters, order does, and only what a head needs is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ich_prep.errors import UsageError
from ich_train.evaluation.metrics import roc_aucs
from ich_train.model import build_model
from ich_train.resample import Resample
from ich_train.scan_inputs import select_planes, select_slices
from ich_train.scan_network import HeadShape, ScanHead, SequenceNetwork, VolumeNetwork, build_scan_network

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("gru", "lstm", "transformer", "attention")


def head_of(kind: str, *, layers: int = 2) -> ScanHead:
    torch.manual_seed(0)
    return ScanHead(kind, features=12, size=16, layers=layers, classes=6, dropout=0.3).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_gets_the_same_logits_alone_and_beside_longer_ones(kind: str) -> None:
    head, lengths = head_of(kind), [5, 9, 1]
    features = torch.randn(sum(lengths), 12)
    together = head(features, lengths)
    assert together.slices.shape == (15, 6)
    assert together.scans.shape == (3, 6)
    for k, part in enumerate(torch.split(features, lengths)):
        alone = head(part, [len(part)])
        torch.testing.assert_close(alone.slices, torch.split(together.slices, lengths)[k])
        torch.testing.assert_close(alone.scans[0], together.scans[k])


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_matter_to_all_heads_but_attention(kind: str) -> None:
    head, features = head_of(kind), torch.randn(8, 12)
    changed = features.clone()
    changed[7] = 0
    first = head(features, [8]).slices[0] - head(changed, [8]).slices[0]
    assert bool(first.abs().max() > 1e-6) == (kind != "attention")


@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
def test_the_order_of_the_slices_matters(kind: str) -> None:
    head, features = head_of(kind), torch.randn(8, 12)
    assert not torch.allclose(head(features, [8]).scans, head(features.flip(0), [8]).scans, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scan_is_between_its_lowest_and_its_highest_slice(kind: str) -> None:
    logits = head_of(kind)(torch.randn(8, 12), [8])
    assert (logits.scans <= logits.slices.max(dim=0).values + 1e-6).all()
    assert (logits.scans >= logits.slices.min(dim=0).values - 1e-6).all()


@pytest.mark.parametrize("kind", ["gru", "attention"])
def test_labels_of_scans_teach_an_encoder_to_find_bright_slices(kind: str) -> None:
    """Scans of ten images, each of the same shape; in positive ones, three are brighter."""
    torch.manual_seed(1)
    shape, scans, depth = torch.rand(1, 32, 32), 240, 10
    positive = torch.arange(scans) % 2 == 0
    bright = (positive.unsqueeze(1) & (torch.rand(scans, depth).argsort(dim=1) < 3)).flatten()
    images = (1 + bright.float()).view(-1, 1, 1, 1) * (shape + 0.1 * torch.randn(scans * depth, 1, 32, 32))
    network = build_scan_network("baseline", HeadShape(kind=kind, size=16), channels=1, size=32, classes=1)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for first in range(0, scans // 2, 4):
        batch = images[depth * first : depth * (first + 4)]
        logits = network(batch, [depth] * 4).scans[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, positive[first : first + 4].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = network.eval()(images[depth * scans // 2 :], [depth] * (scans // 2))
    labels = positive[scans // 2 :].to(torch.int8).unsqueeze(1).numpy()
    assert (roc_aucs(labels, found.scans.numpy(), ("any",))["any"] or 0) > 0.95


@pytest.mark.parametrize("name", ["baseline", "resnet18", "densenet121", "seresnext50"])
def test_a_head_replaces_the_last_layer_of_any_network(name: str) -> None:
    shape = HeadShape(kind="gru", size=8)
    network = build_scan_network(name, shape, channels=3, size=32, classes=6)
    assert isinstance(network, SequenceNetwork)
    of_slices = build_model(name, channels=3, size=32, classes=6)
    last = [module for module in of_slices.modules() if isinstance(module, nn.Linear)][-1]
    assert network.head.project.in_features == last.in_features
    logits = network.eval()(torch.zeros(5, 3, 32, 32), [3, 2])
    assert logits.slices.shape == (5, 6)
    assert logits.scans.shape == (2, 6)
    removed = set(of_slices.state_dict()) - {key.removeprefix("encoder.") for key in network.state_dict()}
    assert len(removed) == 2, "weight and bias of the last layer"


def test_the_weights_of_a_slice_network_go_into_the_encoder(tmp_path: Path) -> None:
    source = build_model("baseline", channels=3, size=32, classes=6)
    torch.save(source.state_dict(), tmp_path / "slices.pt")
    network = build_scan_network(
        "baseline", HeadShape(kind="lstm"), channels=3, size=32, classes=6, weights=tmp_path / "slices.pt"
    )
    assert isinstance(network, SequenceNetwork)
    for key, value in network.encoder.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


def test_an_encoder_takes_chunks_when_no_gradient_is_needed() -> None:
    network = build_scan_network("baseline", HeadShape(kind="gru"), channels=1, size=32, classes=6).eval()
    assert isinstance(network, SequenceNetwork)
    images = torch.randn(150, 1, 32, 32)
    whole = network.encode(images)
    sizes: list[int] = []
    network.encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    with torch.no_grad():
        chunked = network.encode(images)
    assert sizes == [64, 64, 22]
    torch.testing.assert_close(chunked, whole.detach())


def test_a_network_of_ones_own_takes_volumes(nets: str) -> None:
    shape = HeadShape(kind="volume", spacing_mm=5, depth_mm=50)
    network = build_scan_network(f"{nets}:Volume", shape, channels=3, size=32, classes=6)
    assert isinstance(network, VolumeNetwork)
    seen: list[torch.Size] = []
    network.network.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    planes = torch.randn(20, 3, 32, 32)
    logits = network(planes, [10, 10])
    assert seen == [(2, 3, 10, 32, 32)]
    assert logits.scans.shape == (2, 6)
    torch.testing.assert_close(logits.slices, logits.scans.repeat_interleave(10, dim=0))
    torch.testing.assert_close(logits.scans[1], network.network(planes[10:].transpose(0, 1)[None])[0])


def test_a_network_of_monai_takes_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    (tmp_path / "monai_nets.py").write_text(
        "from monai.networks.nets import resnet10\n"
        "def small(*, channels, size, classes):\n"
        "    return resnet10(spatial_dims=3, n_input_channels=channels, num_classes=classes, conv1_t_stride=2)\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    network = build_scan_network("monai_nets:small", HeadShape(kind="volume"), channels=3, size=32, classes=6)
    assert network.eval()(torch.zeros(16, 3, 32, 32), [8, 8]).scans.shape == (2, 6)


def test_networks_that_a_head_cannot_follow_are_refused(nets: str) -> None:
    of = {"channels": 3, "size": 32, "classes": 6}
    with pytest.raises(UsageError, match="no fully connected layer"):
        build_scan_network(f"{nets}:Convolutional", HeadShape(kind="gru"), **of)
    with pytest.raises(UsageError, match="only if nothing follows it"):
        build_scan_network(f"{nets}:Scaled", HeadShape(kind="gru"), **of)
    with pytest.raises(UsageError, match=r"package\.module:NAME for a network of volumes; found resnet18"):
        build_scan_network("resnet18", HeadShape(kind="volume"), **of)
    with pytest.raises(UsageError, match=r"fails on a batch of \(2, 3, 32, 32, 32\)"):
        build_scan_network(f"{nets}:Convolutional", HeadShape(kind="volume"), **of)
    with pytest.raises(UsageError, match="multiple of 4"):
        build_scan_network("baseline", HeadShape(kind="transformer", size=10), **of)


@pytest.mark.parametrize("context", [0, 1, 2])
def test_slices_are_selected_with_their_neighbours(context: int) -> None:
    volumes = torch.arange(2 * 4 * 1 * 2 * 2).view(2, 4, 1, 2, 2)
    rows = torch.tensor([[7, 8, 9, -1], [20, 21, 22, 23]])
    selected = select_slices(volumes, rows, context=context)
    assert selected.lengths == [3, 4]
    assert selected.slices.shape == (7, 2 * context + 1, 2, 2)
    for n, (scan, place) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]):
        last = selected.lengths[scan] - 1
        expected = [volumes[scan, min(max(place + k, 0), last), 0] for k in range(-context, context + 1)]
        assert torch.equal(selected.slices[n], torch.stack(expected))


def test_planes_of_a_batch_are_equally_many() -> None:
    volumes = torch.randint(0, 255, (2, 6, 1, 4, 4), dtype=torch.uint8)
    mask = torch.ones(2, 6, dtype=torch.bool)
    positions, spacing = torch.arange(6.0).repeat(2, 1) * 5, torch.full((2, 3), 5.0)
    assert select_planes(volumes, mask, positions, spacing, None).lengths == [6, 6]
    resampled = select_planes(volumes, mask, positions, spacing, Resample(spacing_mm=5, depth_mm=40))
    assert resampled.lengths == [8, 8]
    assert torch.equal(resampled.slices.view(2, 8, 1, 4, 4)[:, 1:7], volumes)
