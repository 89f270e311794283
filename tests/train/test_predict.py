from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.errors import UsageError
from ich_prep.phantom import synthesize
from ich_train.loader import SliceLoader
from ich_train.predict import load_predictor, predict_rows
from ich_train.preprocess import Scaling
from tests.support.training_runs import rewrite_meta, save_untrained, with_classes
from tests.support.turned import write_turned


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
    rewrite_meta(copy, lambda values: values["scaling"].update(mean=0.5, std=0.25))
    assert load_predictor(run, dataset, device="cpu").preprocess.scaling == Scaling()
    assert load_predictor(copy, dataset, device="cpu").preprocess.scaling == Scaling(mean=0.5, std=0.25)


@pytest.mark.parametrize("classes", [("fracture", "any"), ("a", "b", "c", "d", "e", "any")])
def test_a_dataset_of_other_classes_is_refused(
    dataset: Dataset, run: Path, tmp_path: Path, classes: tuple[str, ...]
) -> None:
    other = with_classes(dataset.path, tmp_path / "other.zarr", classes)
    with pytest.raises(UsageError, match=rf"other classes .*: epidural, .* any, not {', '.join(classes)}\. Name"):
        load_predictor(run, other, device="cpu")


def test_a_run_of_another_orientation_is_refused_where_volumes_lie_otherwise(dataset: Dataset, tmp_path: Path) -> None:
    synthesize(tmp_path / "head", series=1, size=64, layout="folder", workers=0)
    files = sorted((tmp_path / "head").rglob("*.dcm"))[:3]
    write_turned(files, tmp_path / "tree" / "one", "")
    write_turned(files, tmp_path / "tree" / "two", "flip_y")
    paths = {name: tmp_path / f"{name}.zarr" for name in ("patient", "as-stored")}
    for name, path in paths.items():
        spec = Spec.model_validate({"size": 64, "layout": "folder", "orientation": name})
        build(tmp_path / "tree", path, spec, workers=0, allow=Allowances(unlabelled=True))
    runs = {name: save_untrained(tmp_path / f"run {name}", open_dataset(path)) for name, path in paths.items()}
    for trained_on, run in runs.items():
        for built, path in paths.items():
            if trained_on == built:
                load_predictor(run, open_dataset(path), device="cpu")
                continue
            expected = (
                rf'orientation "{trained_on}"; .* has "{built}", and 1 volume of 2 lies otherwise .* series_row \d\).*'
                rf"--orientation {trained_on}`"
            )
            with pytest.raises(UsageError, match=expected):
                load_predictor(run, open_dataset(path), device="cpu")
        assert load_predictor(run, dataset, device="cpu").meta.images.orientation == trained_on  # all lie upright


def test_a_run_without_an_orientation_was_trained_on_slices_as_stored(dataset: Dataset, tmp_path: Path) -> None:
    run = save_untrained(tmp_path / "run", dataset)
    rewrite_meta(run, lambda values: values["images"].pop("orientation"))
    assert load_predictor(run, dataset, device="cpu").meta.images.orientation == "as-stored"
