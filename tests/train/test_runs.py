from __future__ import annotations

import dataclasses
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
    overfitting_text,
    read_history,
    require_writable,
    run_lock,
    settings_of,
    start,
    write_history,
)

NUMBER = st.floats(allow_nan=False, allow_infinity=False)


def history(train: list[float], val: list[float], lowest: int, *, rise: float = 0.1) -> list[Epoch]:
    """Epochs with these accuracies; the validation loss is lowest in the epoch ``lowest`` and rises by ``rise`` an epoch."""
    return [
        Epoch(k, 1.0, 0.5, rising, 0.5 + abs(k - lowest) * rise, falling, 1e-3, 100.0, 0.0)
        for k, (rising, falling) in enumerate(zip(train, val, strict=True), start=1)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@given(epochs=st.lists(st.builds(Epoch, st.integers(1, 99), *[NUMBER] * 9)))
def test_a_history_reads_back_as_what_was_written(folder: Path, epochs: list[Epoch]) -> None:
    write_history(folder, epochs)
    assert read_history(folder) == epochs


def test_the_columns_of_a_history(tmp_path: Path) -> None:
    write_history(tmp_path, [])
    assert (tmp_path / "history.csv").read_text(encoding="utf-8") == (
        "epoch,seconds,train_loss,train_accuracy,val_loss,val_accuracy,learning_rate,slices_per_s,wait_share,val_auc\n"
    )
    (tmp_path / "history.csv").write_text("epoch,loss\n1,0.5\n", encoding="utf-8")
    with pytest.raises(TrainError, match=r"Expected the history of a run.*history\.csv; found epoch, loss\."):
        read_history(tmp_path)


@pytest.mark.parametrize("line", ["1,2,3", "x,1,1,1,1,1,1,1,1", "1,1,1,1,1,1,1,1,"])
def test_a_damaged_history_names_its_line(tmp_path: Path, line: str) -> None:
    write_history(tmp_path, [])
    with (tmp_path / "history.csv").open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    with pytest.raises(TrainError, match=r"history\.csv is damaged: line 2 is not numbers\.$"):
        read_history(tmp_path)


RISING, FALLING = [0.7, 0.8, 0.9, 0.95, 0.97], [0.7, 0.8, 0.78, 0.75, 0.76]


@pytest.mark.parametrize(
    ("train", "val", "lowest", "since"),
    [
        ([], [], 1, None),
        ([0.7, 0.8, 0.9, 0.95], [0.7, 0.8, 0.85, 0.9], 2, None),  # both rise
        (RISING, FALLING, 2, 3),
        (RISING, FALLING, 5, None),  # the loss is lowest in the last epoch
        (RISING, FALLING, 4, None),  # one epoch later is too early to tell
        ([0.7, 0.8, 0.7, 0.6], [0.7, 0.8, 0.7, 0.6], 2, None),  # both fall: something else is wrong
        ([0.7, 0.8, 0.9, 0.95], [0.9, 0.8, 0.8, 0.8], 1, 2),
        ([0.7, 0.8, 0.9, 0.95], [0.9, 0.8, 0.8, 0.85], 2, None),  # accuracy fell before, and rises again
        ([0.7, 0.8, 0.9, 0.95], [0.8, 0.8, 0.8, 0.8 - 1e-12], 2, None),  # rounding
        ([0.7, 0.8, 0.9, 0.95], [0.8, 0.8, 0.799, 0.799], 2, None),  # below the margin
    ],
)
def test_overfitting_is_dated(train: list[float], val: list[float], lowest: int, since: int | None) -> None:
    text = overfitting_text(history(train, val, lowest))
    assert (text == "") if since is None else text.startswith(f"Overfitting since epoch {since}: ")


def test_overfitting_gives_the_numbers_that_were_compared() -> None:
    assert overfitting_text(history(RISING, FALLING, 2)) == (
        "Overfitting since epoch 3: epoch 2 has the lowest validation loss, 0.5000; the later epochs have on average "
        "0.7000, a validation accuracy of 0.7633 (epoch 2: 0.8000) and a training accuracy of 0.9400 (0.8000)."
    )


def test_a_flat_validation_loss_is_not_overfitting() -> None:
    assert overfitting_text(history(RISING, FALLING, 2, rise=0.001)) == ""


def test_epochs_with_a_nan_are_ignored_in_overfitting() -> None:
    lines = history(RISING, FALLING, 2)
    broken = [dataclasses.replace(line, val_accuracy=float("nan")) for line in lines]
    assert overfitting_text([broken[0], *lines[1:]]) == overfitting_text(lines)
    assert overfitting_text([lines[0], broken[1], *lines[2:4], broken[4]]) == ""
    assert overfitting_text([dataclasses.replace(line, val_loss=float("nan")) for line in lines]) == ""


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
    with pytest.raises(UsageError, match="run is not empty"):
        start(tmp_path / "run", settings, evaluation)
    with pytest.raises(UsageError, match=r"recipe\.toml"):
        settings_of(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    require_writable(tmp_path / "new" / "folder", hint="")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"file is a file, not a folder\. Name another\."):
            require_writable(folder, hint="Name another.")
    with pytest.raises(UsageError, match=r"file is a file; a run needs a folder"):
        start(tmp_path / "file", TrainConfig(), None)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no file system here that refuses files to every user")
def test_a_file_system_that_takes_no_files_is_refused() -> None:
    with pytest.raises(TrainError, match=r"Cannot write to /proc: .*\. Name another\."):
        require_writable(Path("/proc/folder"), hint="Name another.")


def test_a_run_goes_on_with_its_settings_only(tmp_path: Path) -> None:
    check_same(tmp_path, TrainConfig(), TrainConfig(threads=7, device="cpu", data=Path("elsewhere.zarr")))
    with pytest.raises(UsageError, match=r"epochs \(was 10, now 9\)"):
        check_same(tmp_path, TrainConfig(), TrainConfig(epochs=9))
    check_same(tmp_path, TrainConfig(), TrainConfig(epochs=11))  # makes it longer


def test_two_processes_do_not_train_one_run(tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(TrainError, match="Another process trains the run"), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        assert list(tmp_path.iterdir()) == []
