from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.errors import UsageError
from ich_train.loader import SliceLoader
from ich_train.predict import load_predictor, predict_rows
from ich_train.preprocess import Scaling
from tests.support.training_runs import save_untrained, with_classes


@pytest.fixture(scope="module")
def dataset(dataset_path: Path) -> Dataset:
    return open_dataset(dataset_path)


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("runs") / "baseline", dataset, context=1)


def test_probabilities_come_in_the_order_of_the_rows(dataset: Dataset, run: Path) -> None:
    predictor = load_predictor(run, dataset, device="cpu")
    rows = np.random.default_rng(0).permutation(40)
    found = predict_rows(predictor.model, predictor.preprocess, dataset, rows, context=1, batch_size=7)
    assert found.shape == (40, 6)
    assert found.dtype == np.float32
    for k, row in enumerate(rows[:5]):
        (batch,) = SliceLoader(dataset, np.array([row]), batch_size=1, order="sequential", context=1)
        with torch.inference_mode():
            expected = torch.sigmoid(predictor.model(predictor.preprocess(batch.images)))[0]
        assert found[k] == pytest.approx(expected.numpy(), abs=1e-6)


def test_a_network_predicts_with_the_scaling_that_it_was_trained_with(
    dataset: Dataset, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    save_untrained(copy, dataset, context=1)
    meta = copy / "best" / "meta.json"
    text = meta.read_text().replace('"mean": 0.449', '"mean": 0.5').replace('"std": 0.226', '"std": 0.25')
    meta.write_text(text)
    assert load_predictor(run, dataset, device="cpu").preprocess.scaling == Scaling()
    assert load_predictor(copy, dataset, device="cpu").preprocess.scaling == Scaling(mean=0.5, std=0.25)


@pytest.mark.parametrize("classes", [("fracture", "any"), ("a", "b", "c", "d", "e", "any")])
def test_a_dataset_of_other_classes_is_refused(
    dataset: Dataset, run: Path, tmp_path: Path, classes: tuple[str, ...]
) -> None:
    other = with_classes(dataset.path, tmp_path / "other.zarr", classes)
    with pytest.raises(UsageError, match=rf"other classes .*: epidural, .* any, not {', '.join(classes)}\. Name"):
        load_predictor(run, other, device="cpu")
