from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.dataset.windows import PRESETS, Window, window_codes
from ich_prep.errors import UsageError
from ich_train.config import TrainConfig
from ich_train.preprocess import Augment, Preprocess, Scaling

BRAIN, SUBDURAL, BONE = PRESETS["brain"], PRESETS["subdural"], PRESETS["bone"]
MEAN, STD = Scaling().mean, Scaling().std
STILL = {"flip": False, "rotation_degrees": 0, "zoom": 0, "shift": 0, "window_jitter": 0, "noise": 0}
EVERY_HU = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(1, 1, 256, 256)


def augment(preprocess: Preprocess, images: torch.Tensor, seed: int = 0, **amounts: Any) -> torch.Tensor:
    settings = TrainConfig.model_validate(STILL | amounts)
    return Augment(preprocess, settings)(images, torch.Generator().manual_seed(seed))


def noise_images(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("window", PRESETS.values(), ids=lambda window: window.name)
def test_device_windows_equal_the_builds_for_every_hu_value(window: Window) -> None:
    codes = Preprocess(pixels="hu", windows=[window]).codes(EVERY_HU)
    assert codes.dtype == torch.uint8
    assert np.array_equal(codes.numpy(), window_codes(EVERY_HU.numpy(), window))


@given(center=st.floats(-2000, 2000), width=st.floats(0.5, 5000))
@settings(max_examples=25, deadline=None)
def test_device_windows_equal_the_builds_for_any_window(center: float, width: float) -> None:
    window = Window("any", center=center, width=width)
    codes = Preprocess(pixels="hu", windows=[window]).codes(EVERY_HU)
    assert np.array_equal(codes.numpy(), window_codes(EVERY_HU.numpy(), window))


def test_an_hu_store_and_a_window_store_give_the_network_the_same_numbers() -> None:
    windows = (BRAIN, SUBDURAL, BONE)
    hu = np.random.default_rng(1).integers(-1100, 3000, (4, 3, 16, 16), dtype=np.int16)  # 3: below, self, above
    # What a build with store = "windows" holds, and a loader with context = 1 puts side by side.
    stored = np.stack([window_codes(hu[:, k], window) for k in range(3) for window in windows], axis=1)
    of_hu = Preprocess(pixels="hu", windows=windows)(torch.from_numpy(hu))
    of_windows = Preprocess(pixels="windows", windows=windows)(torch.from_numpy(stored))
    assert of_hu.shape == (4, 9, 16, 16)
    assert torch.equal(of_hu, of_windows)


def test_normalisation_and_memory_format() -> None:
    codes = noise_images(2, 3, 8, 8)
    values = Preprocess(pixels="windows", windows=[BRAIN], channels_last=True)(codes)
    assert values.dtype == torch.float32
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(values, (codes.double() / 255 - MEAN).div(STD).float(), atol=1e-6)


def test_an_unknown_store_is_refused() -> None:
    with pytest.raises(UsageError, match="windows or hu"):
        Preprocess(pixels="uint8", windows=[BRAIN])


@pytest.mark.parametrize("pixels", ["windows", "hu"])
def test_no_augmentation_is_preprocessing(pixels: str) -> None:
    images = noise_images(3, 1, 16, 16)
    if pixels == "hu":
        images = images.to(torch.int16) - 60
    preprocess = Preprocess(pixels=pixels, windows=[BRAIN])
    assert torch.equal(augment(preprocess, images), preprocess(images))


@pytest.mark.parametrize("pixels", ["windows", "hu"])
def test_the_seed_decides_everything_and_the_images_stay(pixels: str) -> None:
    images = noise_images(4, 3, 32, 32) if pixels == "windows" else noise_images(4, 1, 32, 32).to(torch.int16)
    before = images.clone()
    preprocess = Preprocess(pixels=pixels, windows=[BRAIN, SUBDURAL, BONE])
    defaults = TrainConfig().model_dump(include=set(STILL))
    first, again, other = (augment(preprocess, images, seed=seed, **defaults) for seed in (5, 5, 6))
    assert first.shape == (4, 3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)


def test_a_flip_mirrors_about_half_of_the_images_and_nothing_else() -> None:
    images = noise_images(64, 3, 9, 16)
    preprocess = Preprocess(pixels="windows", windows=[BRAIN])
    plain, flipped = preprocess(images), augment(preprocess, images, flip=True)
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, flipped, strict=True)]
    mirrored = [torch.allclose(a.flip(-1), b, atol=1e-4) for a, b in zip(plain, flipped, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 20 < sum(mirrored) < 44


def test_rotation_zoom_and_shift_stay_within_their_amounts() -> None:
    # A bright square of 8 x 8 in the middle of 64 x 64; the mean place of its light tells where it went.
    images = torch.zeros(200, 1, 64, 64, dtype=torch.uint8)
    images[:, :, 28:36, 28:36] = 255
    preprocess = Preprocess(pixels="windows", windows=[BRAIN])
    place = torch.arange(64) - 31.5

    def light(**amounts: float) -> torch.Tensor:
        return augment(preprocess, images, **amounts)[:, 0].double() * STD + MEAN

    moved = light(shift=0.1)
    x = (moved * place).sum((1, 2)) / moved.sum((1, 2))
    assert x.abs().max() < 6.4 + 0.1
    assert x.abs().max() > 5
    area = light(zoom=0.2).sum((1, 2)) / 64
    assert 1 / 1.2**2 - 0.1 < area.min() < 0.8
    assert 1.25 < area.max() < 1.2**2 + 0.1
    turned = light(rotation_degrees=45)
    assert turned.sum((1, 2)).sub(64).abs().max() < 2
    assert (turned - light()).abs().amax((1, 2)).max() > 0.9


def test_window_jitter_of_hu_is_another_window() -> None:
    hu = torch.arange(-100, 156, dtype=torch.int16).view(1, 1, 16, 16)
    preprocess = Preprocess(pixels="hu", windows=[BRAIN])
    # Center 40 + 0.25 * 80 = 60, width 80 / 0.8 = 100.
    values = preprocess.jittered(hu, torch.tensor([0.25]), torch.tensor([0.8]))
    expected = window_codes(hu.numpy(), Window("moved", center=60, width=100)) / 255
    assert np.abs(values.numpy() - expected).max() <= 0.5 / 255 + 1e-6


@given(shift=st.floats(-0.2, 0.2), gain=st.floats(0.8, 1.25))
def test_window_jitter_agrees_between_the_stores_where_neither_clips(shift: float, gain: float) -> None:
    hu = torch.arange(0, 81, dtype=torch.int16).view(1, 1, 9, 9)
    moved = torch.tensor([shift]), torch.tensor([gain])
    of_hu = Preprocess(pixels="hu", windows=[BRAIN]).jittered(hu, *moved)
    codes = Preprocess(pixels="hu", windows=[BRAIN]).codes(hu)
    of_codes = Preprocess(pixels="windows", windows=[BRAIN]).jittered(codes, *moved)
    assert (of_hu - of_codes).abs().max() <= 0.5 / 255 * gain + 1e-6


def test_jitter_and_noise_differ_between_the_images_of_a_batch() -> None:
    images = torch.full((6, 1, 8, 8), 100, dtype=torch.uint8)
    preprocess = Preprocess(pixels="windows", windows=[BRAIN])
    jittered = augment(preprocess, images, window_jitter=0.2)
    assert len(jittered.flatten(1).unique(dim=0)) == 6
    assert all(len(image.unique()) == 1 for image in jittered)
    noisy = augment(preprocess, torch.full((8, 1, 64, 64), 100, dtype=torch.uint8), noise=0.05)
    assert float(noisy.std()) * STD == pytest.approx(0.05, rel=0.05)
