from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_train.loss import label_weights
from ich_train.ranks import Ranks
from ich_train.step import Step

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def noisy(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return images.float() / 255 + torch.rand(images.shape, generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 8 * 8, len(RSNA_CLASSES)))


def step_of(model: nn.Module, *, clip_norm: float = 1.0, precision: torch.dtype = torch.float32) -> Step:
    return Step(
        model=model,
        network=model,
        augment=noisy,
        preprocess=lambda images: images.float() / 255,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1.0),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        weights=label_weights("rsna", RSNA_CLASSES),
        precision=precision,
        clip_norm=clip_norm,
        ranks=Ranks(rank=0, world_size=1, device=CPU),
        use_cuda_graph=False,
    )


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (5, 3, 8, 8), dtype=np.uint8))
    return images, torch.from_numpy(rng.integers(-1, 2, (5, len(RSNA_CLASSES))).astype(np.int8))


def test_a_step_is_what_the_formula_says(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = batch
    model = network()
    expected = copy.deepcopy(model)
    sums = step_of(model)(images, labels, rate=1e-3, seed=7)

    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=float(np.float32(1e-3)))
    logits = expected(noisy(images, torch.Generator().manual_seed(7)))
    known = (labels >= 0).float() * torch.tensor([1, 1, 1, 1, 1, 2.0])
    entropy = nn.functional.binary_cross_entropy_with_logits(
        logits, (labels > 0).float(), weight=known, reduction="sum"
    )
    (entropy / known.sum()).backward()
    nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    optimizer.step()
    assert sums[:2].tolist() == pytest.approx([entropy.item(), known.sum().item()])
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_seed_of_a_step_decides_its_chance(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    losses = []
    for seed in (1, 1, 2):
        torch.rand(3)  # whatever was drawn before does not count
        losses.append(step_of(network())(*batch, rate=1e-3, seed=seed)[0].item())
    assert losses[0] == losses[1] != losses[2]


def test_a_gradient_is_clipped(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = network()
    step_of(model, clip_norm=1e-3)(*batch, rate=1e-3, seed=0)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_convolutions_compute_in_the_precision() -> None:
    with step_of(network(), precision=torch.bfloat16).autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    with step_of(network()).autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
