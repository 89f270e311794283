"""Class activation maps: where a network that is known by heart looks, the layer that is taken, the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.explanations import read_explanations
from ich_prep.errors import UsageError
from ich_train.config import EvalConfig, TrainConfig
from ich_train.explain import LARGEST_MAP, class_activation_maps, explain_run, find_layer
from ich_train.model import build_model
from ich_train.runs import start
from tests.support.training_runs import save_untrained


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.conv(images)).flatten(1))  # type: ignore[no-any-return]


def test_a_map_is_bright_where_the_logit_comes_from() -> None:
    """Class 0 is the mean of the image, class 1 that of its negative: bright and dark corners are found."""
    image = torch.zeros(1, 1, 8, 8)
    image[..., :2, :3], image[..., 6:, 5:] = 2.0, -4.0
    model = OneLayer().eval()
    name, layer = find_layer(model, 1, 8)
    assert name == "conv"
    maps = class_activation_maps(model, layer, image)[0]
    expected = torch.zeros(3, 8, 8)
    expected[0, :2, :3], expected[1, 6:, 5:], expected[2, 6:, 5:] = 255, 255, 255
    assert maps.dtype == torch.uint8
    torch.testing.assert_close(maps.float(), expected)


def test_each_map_is_scaled_by_its_own_maximum_and_an_empty_one_is_zero() -> None:
    model = OneLayer().eval()
    images = torch.stack([torch.full((1, 4, 4), 1.0), torch.full((1, 4, 4), 100.0), torch.full((1, 4, 4), -1.0)])
    maps = class_activation_maps(model, model.conv, images)
    assert maps[:, 0].amax(dim=(1, 2)).tolist() == [255, 255, 0]
    assert maps[:, 2].amax(dim=(1, 2)).tolist() == [0, 0, 255]


@pytest.mark.parametrize("network", ["baseline", "resnet18", "seresnext50", "densenet121"])
def test_every_network_has_a_layer(network: str) -> None:
    model = build_model(network, channels=3, size=64, classes=6).eval()
    name, layer = find_layer(model, 3, 64)
    assert name and dict(model.named_modules())[name] is layer
    maps = class_activation_maps(model, layer, torch.rand(2, 3, 64, 64))
    assert maps.shape[:2] == (2, 6) and 1 < maps.shape[2] <= LARGEST_MAP
    assert not any(module._forward_hooks for module in model.modules())


def test_a_network_without_feature_maps_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(UsageError, match="Grad-CAM needs a layer"):
        find_layer(model, 1, 4)


@pytest.fixture(scope="module")
def dataset(dataset_path: Path) -> Dataset:
    return open_dataset(dataset_path)


def predicted(run: Path, dataset: Dataset, rows: list[int]) -> None:
    table = dataset.slices.select(["row", "sop_instance_uid"]).take(pa.array(rows))
    for name in dataset.classes:
        table = table.append_column(f"p_{name}", pa.array(np.full(len(rows), 0.5, np.float32)))
    pq.write_table(table, run / "predictions.parquet")


@pytest.mark.usefixtures("one_thread")
def test_the_maps_of_the_predicted_slices_are_written(dataset: Dataset, tmp_path: Path) -> None:
    run = save_untrained(tmp_path / "run", dataset, context=1)
    predicted(run, dataset, [20, 3, 4, 7, 90])
    written = explain_run(run, dataset, batch_size=2)
    assert (written.slices, written.layer) == (5, "conv4")
    found = read_explanations(run, dataset)
    assert found is not None and found.rows.tolist() == [3, 4, 7, 20, 90]
    assert found.values.shape == (5, 6, 8, 8) and found.values.max() == 255
    assert json.loads((run / "explanations" / "explanations.json").read_text())["method"] == "Grad-CAM"
    explain_run(run, dataset, where="row in (1, 2, 3)", limit=2, seed=1, batch_size=8)
    again = read_explanations(run, dataset)
    assert again is not None and len(again.rows) == 2 and set(again.rows.tolist()) <= {1, 2, 3}
    if 3 in again.rows:
        np.testing.assert_array_equal(again.maps(3), found.maps(3))
    with pytest.raises(UsageError, match="no slice to explain"):
        explain_run(run, dataset, where="row == -1")


@pytest.mark.usefixtures("one_thread")
def test_the_command_says_where_the_maps_are(dataset: Dataset, tmp_path: Path, call: Callable[..., int]) -> None:
    run = tmp_path / "run"
    start(run, TrainConfig(data=dataset.path, device="cpu"), EvalConfig(batch_size=4))
    save_untrained(run, dataset)
    predicted(run, dataset, [0, 1])
    assert call("explain", run) == 0
    assert call("explain", run, "--where", "rows == 1") == 2
    found = read_explanations(run, dataset)
    assert found is not None and found.rows.tolist() == [0, 1]
