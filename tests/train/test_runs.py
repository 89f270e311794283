from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_prep.errors import TrainError, UsageError
from ich_train.config import EvalConfig, TrainConfig
from ich_train.runs import (
    Epoch,
    check_same,
    latest_folder,
    new_folder,
    overfitting_since,
    read_history,
    settings_of,
    start,
    write_history,
)

NUMBER = st.floats(allow_nan=False, allow_infinity=False)


def history(train: list[float], val: list[float], lowest: int) -> list[Epoch]:
    """Epochs with these accuracies, the validation loss of which is lowest in the epoch ``lowest``."""
    return [
        Epoch(k, 1.0, 0.5, rising, 0.5 + abs(k - lowest) / 10, falling, 1e-3, 100.0, 0.0)
        for k, (rising, falling) in enumerate(zip(train, val, strict=True), start=1)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@given(epochs=st.lists(st.builds(Epoch, st.integers(1, 99), *[NUMBER] * 8)))
def test_a_history_reads_back_as_what_was_written(folder: Path, epochs: list[Epoch]) -> None:
    write_history(folder, epochs)
    assert read_history(folder) == epochs


def test_the_columns_of_a_history(tmp_path: Path) -> None:
    write_history(tmp_path, [])
    assert (tmp_path / "history.csv").read_text(encoding="utf-8") == (
        "epoch,seconds,train_loss,train_accuracy,val_loss,val_accuracy,learning_rate,slices_per_s,wait_share\n"
    )
    (tmp_path / "history.csv").write_text("epoch,loss\n1,0.5\n", encoding="utf-8")
    with pytest.raises(TrainError, match=r"history\.csv"):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("train", "val", "lowest", "since"),
    [
        ([], [], 1, None),
        ([0.7, 0.8, 0.9, 0.95], [0.7, 0.8, 0.85, 0.9], 2, None),  # both rise
        ([0.7, 0.8, 0.9, 0.95, 0.97], [0.7, 0.8, 0.78, 0.75, 0.76], 2, 3),
        ([0.7, 0.8, 0.9, 0.95, 0.97], [0.7, 0.8, 0.78, 0.75, 0.76], 5, None),  # the loss is lowest in the last epoch
        ([0.7, 0.8, 0.9, 0.95, 0.97], [0.7, 0.8, 0.78, 0.75, 0.76], 4, None),  # one epoch later is too early to tell
        ([0.7, 0.8, 0.7, 0.6], [0.7, 0.8, 0.7, 0.6], 2, None),  # both fall: something else is wrong
        ([0.7, 0.8, 0.9, 0.95], [0.9, 0.8, 0.8, 0.8], 1, 2),
        ([0.7, 0.8, 0.9, 0.95], [0.9, 0.8, 0.8, 0.85], 2, None),  # accuracy fell before, and rises again
    ],
)
def test_overfitting_is_dated(train: list[float], val: list[float], lowest: int, since: int | None) -> None:
    assert overfitting_since(history(train, val, lowest)) == since


def test_folders_are_numbered_when_the_name_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--out"):
        latest_folder(tmp_path, "smoke")
    for expected in ("smoke", "smoke-2", "smoke-3"):
        folder = new_folder(tmp_path, "smoke")
        assert folder == tmp_path / expected
        folder.mkdir()
        assert latest_folder(tmp_path, "smoke") == folder


def test_a_deleted_folder_changes_no_number(tmp_path: Path) -> None:
    for name in ("smoke", "smoke-2", "smoke-10", "smoke-10-old", "smoke-1", "smoke-2024", "smoked-12", "other-11"):
        (tmp_path / name).mkdir()
    for deleted in ("smoke", "smoke-2"):
        (tmp_path / deleted).rmdir()
        assert latest_folder(tmp_path, "smoke") == tmp_path / "smoke-10"
        assert new_folder(tmp_path, "smoke") == tmp_path / "smoke-11"


def test_a_run_remembers_its_settings(tmp_path: Path) -> None:
    settings, evaluation = TrainConfig(epochs=3, weights=Path("w.pth")), EvalConfig(limit=100)
    start(tmp_path / "run", settings, evaluation)
    assert settings_of(tmp_path / "run") == (settings, evaluation)
    with pytest.raises(UsageError, match="not an empty folder"):
        start(tmp_path / "run", settings, evaluation)
    with pytest.raises(UsageError, match=r"recipe\.toml"):
        settings_of(tmp_path)


def test_a_run_goes_on_with_its_settings_only(tmp_path: Path) -> None:
    check_same(tmp_path, TrainConfig(), TrainConfig(threads=7, device="cpu", data=Path("elsewhere.zarr")))
    with pytest.raises(UsageError, match=r"epochs \(was 10, now 11\)"):
        check_same(tmp_path, TrainConfig(), TrainConfig(epochs=11))
