"""A dataset of three classes of its own, from training to report: nothing that belongs to RSNA alone is left in."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ich_train.checkpoint import load_model
from tests.support.training_runs import with_classes

CLASSES = ("fracture", "mass", "any")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def three(twelve: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_classes(twelve, tmp_path_factory.mktemp("three") / "data.zarr", CLASSES).path


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path) -> None:
    (tmp_path / "quick.toml").write_text("[train]\nepochs = 1\nbatch_size = 8\n[eval]\nbootstrap = 5\n")


def test_training_metrics_report_and_predictions_follow_the_dataset(
    call: Callable[..., int], three: Path, twelve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", "--recipe", "quick.toml", "--data", three, "--device", "cpu") == 0
    printed = capsys.readouterr().err
    assert re.search(r"^Log loss \d\.\d+", printed, re.MULTILINE)
    run = tmp_path / "runs" / "quick"
    loaded = load_model(run / "best", "cpu")
    assert loaded.meta.classes == CLASSES
    assert [*loaded.model.parameters()][-1].shape == (3,)
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["by_slice"]["labels"]) == list(CLASSES)
    assert set(metrics["dataset"]["parts"]["train"]["positives"]) == set(CLASSES)
    columns = pq.read_schema(run / "predictions.parquet").names
    assert columns[-6:] == [*CLASSES, *(f"p_{name}" for name in CLASSES)]
    assert {path.stem for path in (run / "pictures").glob("sheet_*")} == {f"sheet_{name}" for name in CLASSES}
    report = (run / "report.html").read_text()
    assert "ROC AUC of any, by slice" in report
    assert "epidural" not in report
    assert "eighted log loss" not in report

    assert call("predict", run, "--out", "submission.csv") == 2
    assert "A submission needs the six classes of RSNA 2019" in capsys.readouterr().err
    assert call("eval", run, "--data", twelve) == 2
    assert "was trained on other classes than those of" in capsys.readouterr().err


def test_any_is_not_asked_for(call: Callable[..., int], twelve: Path, tmp_path: Path) -> None:
    with_classes(twelve, tmp_path / "two.zarr", ("fracture", "mass"))
    assert call("run", "--recipe", "quick.toml", "--data", "two.zarr", "--device", "cpu") == 0
    assert "of any" not in (tmp_path / "runs" / "quick" / "report.html").read_text()


def test_the_loss_of_the_competition_is_refused(
    call: Callable[..., int], three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rsna.toml").write_text('[train]\nloss = "rsna"\n')
    assert call("run", "--recipe", "rsna.toml", "--data", three) == 2
    assert "any counts twice, needs the six classes of RSNA 2019" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


OWN = """
from torch import nn

class Small(nn.Sequential):
    def __init__(self, *, channels, size, classes):
        super().__init__(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
"""


def test_a_network_of_ones_own_is_trained_and_found_again(
    call: Callable[..., int], three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small_networks.py").write_text(OWN)
    model = ("--model", "small_networks:Small")
    assert call("run", "--recipe", "quick.toml", "--data", three, "--device", "cpu", *model) == 0
    assert load_model(tmp_path / "runs" / "quick" / "best", "cpu").meta.network == "small_networks:Small"
    assert call("eval", "runs/quick", "--subset", "val") == 0
    capsys.readouterr()
    (tmp_path / "small_networks.py").unlink()
    sys.modules.pop("small_networks")
    assert call("eval", "runs/quick") == 2
    assert "Cannot import small_networks" in capsys.readouterr().err
