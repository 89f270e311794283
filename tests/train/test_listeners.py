"""Who is told of every epoch: a function of one's own, and TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ich_prep.dataset.dataset import open_dataset
from ich_prep.errors import TrainError, UsageError
from ich_train.config import TrainConfig
from ich_train.listeners import listening
from ich_train.runs import read_history
from ich_train.train import Result, train

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
pytestmark = pytest.mark.usefixtures("one_thread")
MODULE = "listener_of_a_test"
LOGGER = """
import json
from pathlib import Path

def log(record):
    with open("told.jsonl", "a") as file:
        file.write(json.dumps(record) + "\\n")
    if record["epoch"] == 2 and Path("fail").exists():
        raise ConnectionError("no server")
"""


@pytest.fixture
def logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a logger in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{MODULE}.py").write_text(LOGGER)
    yield f"{MODULE}:log"
    sys.modules.pop(MODULE, None)


def run(twelve: Path, *, resume: bool = False, **settings: object) -> Result:
    wanted = TrainConfig.model_validate(
        {"data": twelve, "device": "cpu", "epochs": 3, "batch_size": 64, "val_fold": "none", **settings}
    )
    return train(open_dataset(twelve), Path("run"), wanted, None, console=Console(file=io.StringIO()), resume=resume)


def told() -> list[dict[str, float]]:
    return [json.loads(line) for line in Path("told.jsonl").read_text().splitlines()]


def test_a_logger_is_told_what_the_history_has(twelve: Path, logger: str) -> None:
    run(twelve, logger=logger)
    records = told()
    assert [record["epoch"] for record in records] == [1, 2, 3]
    with Path("run/history.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [*records[0]] == [*lines[0]]
    assert [record["train_loss"] for record in records] == [float(line["train_loss"]) for line in lines]


def test_a_logger_that_fails_ends_the_run_which_can_be_resumed_without_it(twelve: Path, logger: str) -> None:
    Path("fail").touch()
    with pytest.raises(TrainError, match=r"listener_of_a_test:log raised ConnectionError: no server. Epoch 2 is saved"):
        run(twelve, logger=logger)
    assert len(read_history(Path("run"))) == 2
    assert run(twelve, resume=True).finished
    assert len(read_history(Path("run"))) == 3
    assert len(told()) == 2


def test_a_wrong_name_ends_the_run_before_it_starts(twelve: Path, logger: str) -> None:
    for name, said in (
        (logger[:-1], "the name"),
        ("nowhere:log", "there is no module nowhere"),
        ("log", "Expected package"),
    ):
        with pytest.raises(UsageError, match=said):
            run(twelve, logger=name)
    assert not Path("run").exists()


@pytest.mark.skipif(HAS_TENSORBOARD, reason="TensorBoard is installed")
def test_tensorboard_is_left_out_where_it_is_not_installed(tmp_path: Path) -> None:
    with listening(tmp_path, logger="", first_epoch=1) as listeners:
        assert listeners == ()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="TensorBoard is not installed: its events are NOT tested")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_the_values_of_the_history(twelve: Path, logger: str) -> None:
    run(twelve)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("run/tensorboard")
    events.Reload()
    found = [event.value for event in events.Scalars("train_loss")]
    assert found == pytest.approx([line.train_loss for line in read_history(Path("run"))], rel=1e-6)
