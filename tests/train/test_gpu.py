"""What only a GPU shows. Without one, these tests are skipped, and say so."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from ich_prep.build_dataset import build
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.errors import TrainError
from ich_prep.phantom import synthesize
from ich_train.config import EvalConfig, TrainConfig
from ich_train.loader import SliceLoader
from ich_train.predict import predict_rows
from ich_train.ranks import Ranks, own_stream
from ich_train.session import Session, prepare
from ich_train.step import UNRECORDED_STEPS
from ich_train.to_device import to_device
from ich_train.train import train
from tests.support.slow_reads import interrupt_at_read, slow_down

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: what runs on one is NOT tested here"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    synthesize(folder / "rsna", series=12, size=64, workers=0)
    build(folder / "rsna", folder / "data.zarr", Spec(size=64, store="hu", slices_per_shard=16, folds=3), workers=0)
    return folder / "data.zarr"


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run use the same kernels, and float32 for float32."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def dataset(path: Path) -> Dataset:
    return open_dataset(path)


def session_of(dataset: Dataset, **changed: Any) -> Session:
    given = {"batch_size": 8, "model": "resnet18", "window_jitter": 0.1, "noise": 0.01, "device": "cuda"} | changed
    settings = TrainConfig.model_validate(given)
    return prepare(dataset, settings, Ranks(0, 1, torch.device("cuda:0")), weights=None)


def lessons(dataset: Dataset, steps: int, **changed: Any) -> tuple[list[float], torch.Tensor]:
    """The loss of each step, and the first kernel after the last."""
    with own_stream(torch.device("cuda:0")):
        one = session_of(dataset, **changed)
        one.model.train()
        losses = []
        for number, batch in zip(range(steps), to_device(one.loader, torch.device("cuda:0")), strict=False):
            sums = one.step(batch.images, batch.labels, rate=1e-3 / (1 + number), seed=number)
            losses.append(float(sums[0] / sums[1]))
        return losses, next(one.model.parameters()).detach().cpu()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["baseline", "resnet18"])
def test_a_recorded_step_learns_what_a_launched_one_does(dataset: Dataset, precision: str, model: str) -> None:
    steps = UNRECORDED_STEPS + 8
    of = {"precision": precision, "model": model}
    recorded, kernel = lessons(dataset, steps, **of)
    launched, expected = lessons(dataset, steps, cuda_graph=False, **of)
    assert recorded == launched
    assert torch.equal(kernel, expected)
    assert len(set(recorded)) == steps, "each step has pixels and chances of its own"


def test_chance_is_another_one_at_each_step_that_is_played_back(dataset: Dataset) -> None:
    with own_stream(torch.device("cuda:0")):
        one = session_of(dataset, learning_rate=1e-9)
        one.model.train()
        batch = next(to_device(one.loader, torch.device("cuda:0")))
        seeds = [*range(UNRECORDED_STEPS + 4), UNRECORDED_STEPS + 3]
        losses = [one.step(batch.images, batch.labels, rate=0.0, seed=seed)[0].item() for seed in seeds]
    assert len(set(losses[:-1])) == len(seeds) - 1
    assert losses[-1] == pytest.approx(losses[-2], rel=1e-4)


@pytest.mark.parametrize("slow", ["GPU", "reader"])
def test_time_spent_waiting_for_data_is_the_gpus(dataset: Dataset, slow: str) -> None:
    """The host is ahead of the GPU: what it waits for is data only where the GPU does, too."""
    if slow == "reader":
        slow_down(dataset, 0.05)
    device = torch.device("cuda:0")
    rows = np.resize(np.arange(len(dataset)), 8 * 40)
    loader = SliceLoader(dataset, rows, 8)
    matrix = torch.randn(8192, 8192, device=device)
    with own_stream(device):
        start = time.perf_counter()
        for _ in to_device(loader, device):
            if slow == "GPU":
                torch.mm(matrix, matrix)
        share = loader.wait_seconds / (time.perf_counter() - start)
    assert share > 0.8 if slow == "reader" else share < 0.2


def test_a_run_is_stopped_resumed_and_evaluated(path: Path, tmp_path: Path) -> None:
    of = TrainConfig.model_validate({"batch_size": 8, "epochs": 3, "device": "cuda"})
    console = Console(file=io.StringIO(), width=200)
    stopping = open_dataset(path)
    interrupt_at_read(stopping, 50)
    stopped = train(stopping, tmp_path / "run", of, None, console=console)
    assert not stopped.finished
    resumed = train(open_dataset(path), tmp_path / "run", of, EvalConfig(bootstrap=20), console=console, resume=True)
    assert resumed.finished
    assert resumed.metrics is not None
    assert [line.epoch for line in resumed.history] == [1, 2, 3]
    assert resumed.history[-1].train_loss < resumed.history[0].train_loss
    without = of.model_copy(update={"device": "cpu"})
    again = train(open_dataset(path), tmp_path / "run", without, None, console=console, resume=True)
    assert again.history == resumed.history, "what was saved on a GPU is found again without one"


def test_predictions_are_those_of_the_processor(dataset: Dataset) -> None:
    one = session_of(dataset, model="baseline", precision="float32")
    one.model.eval()
    rows = np.random.default_rng(0).permutation(len(dataset))[:50]
    there = predict_rows(one.model, one.preprocess, dataset, rows, context=0, batch_size=16, device="cuda:0")
    here = predict_rows(one.model.cpu(), one.preprocess.cpu(), dataset, rows, context=0, batch_size=7)
    np.testing.assert_allclose(there, here, atol=2e-3)


def test_the_error_for_a_network_that_cannot_be_recorded_names_the_setting(dataset: Dataset) -> None:
    """Stands last: the generator of a process in which a recording broke off is of no more use."""
    with own_stream(torch.device("cuda:0")):
        one = session_of(dataset)
        network = one.step.network
        one.step.network = lambda images: network(images) * (1.0 if images.sum().item() else 0.5)
        batch = next(to_device(one.loader, torch.device("cuda:0")))
        for seed in range(UNRECORDED_STEPS):
            one.step(batch.images, batch.labels, rate=1e-3, seed=seed)
        with pytest.raises(TrainError, match="cuda_graph = false"):
            one.step(batch.images, batch.labels, rate=1e-3, seed=9)
