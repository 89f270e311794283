"""No knob of training is ignored: each alone changes what a run learns, or is tested where it does something else."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ich_prep.dataset.dataset import open_dataset
from ich_train.config import TrainConfig
from ich_train.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).parent
COMMON = {"device": "cpu", "epochs": 2, "threads": 1, "learning_rate": 1e-3}
OF_SLICES = {**COMMON, "batch_size": 32}
OF_SCANS = {**COMMON, "head": "gru", "head_size": 8}

# Another value than that of the run it is compared with.
SLICE_KNOBS: dict[str, Any] = {
    "where": "slice_index > 3",
    "context": 1,
    "val_fold": "none",
    "test_fold": "none",
    "sampling": "balanced",
    "model": "resnet18",
    "dropout": 0.5,
    "loss": "rsna",
    "focal_gamma": 2.0,
    "pos_weight": (3.0,),
    "epochs": 1,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "weight_decay": 0.5,
    "warmup_epochs": 0.0,
    "accumulate": 2,
    "ema_decay": 0.9,
    "average_epochs": 2,
    "clip_norm": 0.01,
    "seed": 1,
    "flip": False,
    "rotation_degrees": 0.0,
    "zoom": 0.0,
    "shift": 0.0,
    "window_jitter": 0.2,
    "noise": 0.1,
}
SCAN_KNOBS: dict[str, Any] = {
    "head": "lstm",
    "head_size": 16,
    "head_layers": 2,
    "scans_per_batch": 3,
    "scan_weight": 1.0,
    "slab": 4,
}
# What they do shows elsewhere than in the weights of a short run.
TESTED: dict[str, str] = {
    "data": "test_union.py",
    "endpoint": "../s3/test_training.py",
    "cache": "../s3/test_training.py",
    "cache_size": "../s3/test_training.py",
    "shared_patients": "test_union.py",
    "windows": "test_loop.py::test_hu_windowed_on_the_device_teach_what_windows_teach",
    "allow_series_labels": "test_split.py",
    "weights": "test_loop.py::test_a_run_goes_on_without_the_weights_that_it_began_with",
    "choose_best": "test_knobs.py::test_the_area_may_choose_the_best_epoch",
    "patience": "test_knobs.py::test_a_run_stops_when_it_gets_no_better",
    "features": "test_scan_runs.py::test_a_head_is_trained_on_features_in_a_second_stage",
    "spacing_mm": "test_scan_runs.py::test_a_network_of_volumes_trains_and_predicts",
    "depth_mm": "test_scan_runs.py::test_a_network_of_volumes_trains_and_predicts",
    "isotropic": "test_resample.py",
    "augmentation": "test_knobs.py::test_an_augmentation_of_ones_own_follows_the_others",
    "order": "test_loader.py",  # a window of a small dataset is all of it
    "device": "test_gpu.py",
    "precision": "test_loop.py::test_mixed_precision_learns",
    "compile": "test_loop.py::test_a_compiled_network_learns_the_same",
    "cuda_graph": "test_gpu.py",
    "threads": "test_loader.py",
    "logger": "test_listeners.py::test_a_logger_is_told_what_the_history_has",
}


def learned(twelve: Path, out: Path, settings: dict[str, Any]) -> str:
    """The digest of the best weights of a short run."""
    config = TrainConfig.model_validate({"data": twelve, **settings})
    train(open_dataset(twelve), out, config, None, console=Console(file=io.StringIO()))
    return hashlib.sha256((out / "best" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def usual(twelve: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What runs learn without another knob."""
    folder = tmp_path_factory.mktemp("usual")
    return {name: learned(twelve, folder / name, of) for name, of in (("slices", OF_SLICES), ("scans", OF_SCANS))}


def test_every_knob_is_here() -> None:
    assert {*SLICE_KNOBS, *SCAN_KNOBS, *TESTED} == {*TrainConfig.model_fields}
    assert len(SLICE_KNOBS) + len(SCAN_KNOBS) + len(TESTED) == len(TrainConfig.model_fields)
    for name, place in TESTED.items():
        file, _, test = place.partition("::")
        text = (HERE / file).read_text(encoding="utf-8")
        assert name in text, f"{file} does not name {name}"
        assert not test or f"def {test}(" in text, place


@pytest.mark.parametrize(
    ("kind", "name"), [*(("slices", name) for name in SLICE_KNOBS), *(("scans", name) for name in SCAN_KNOBS)]
)
def test_a_knob_changes_what_is_learned(
    twelve: Path, usual: dict[str, str], tmp_path: Path, kind: str, name: str
) -> None:
    base, value = (OF_SLICES, SLICE_KNOBS.get(name)) if kind == "slices" else (OF_SCANS, SCAN_KNOBS.get(name))
    assert getattr(TrainConfig.model_validate(base), name) != value
    assert learned(twelve, tmp_path / "run", {**base, name: value}) != usual[kind]


def test_equal_knobs_learn_the_same(twelve: Path, usual: dict[str, str], tmp_path: Path) -> None:
    assert learned(twelve, tmp_path / "one", OF_SLICES) == usual["slices"]
    assert learned(twelve, tmp_path / "other", OF_SCANS) == usual["scans"]
