from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from ich_prep.dataset.dataset import open_dataset
from ich_train.config import MODELS, TrainConfig
from ich_train.runs import read_history, settings_of
from tests.support.slow_reads import interrupt_at_read

Call = Callable[..., int]

pytestmark = pytest.mark.usefixtures("one_thread")


def test_run_eval_and_predict_in_the_folder_of_a_build(
    call: Call, twelve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.zarr").symlink_to(twelve)
    (tmp_path / "quick.toml").write_text("[train]\nepochs = 7\nseed = 5\n[eval]\nbootstrap = 20\n", encoding="utf-8")
    assert call("run", "--recipe", "quick.toml", "--epochs", 2, "--batch-size", 8, "--device", "cpu") == 0
    run = tmp_path / "runs" / "quick"
    settings, evaluation = settings_of(run)
    assert (settings.epochs, settings.seed, settings.batch_size, evaluation.bootstrap) == (2, 5, 8, 20)
    assert len(read_history(run)) == 2
    printed = capsys.readouterr().err
    assert "epoch 2/2" in printed
    assert "Note" not in printed
    assert "ROC AUC" in printed
    assert "Report: runs/quick/report.html" in printed
    before = (run / "metrics.json").read_text(encoding="utf-8")

    assert call("run", "--recipe", "quick.toml", "--epochs", 2, "--batch-size", 8, "--device", "cpu", "--resume") == 0
    assert not (tmp_path / "runs" / "quick-2").exists()
    assert (run / "metrics.json").read_text(encoding="utf-8") == before
    assert capsys.readouterr().err == "runs/quick is already finished: nothing to do.\n"

    assert call("eval", "runs/quick", "--subset", "val", "--limit", 30, "--out", "val_only") == 0
    printed = capsys.readouterr().err
    assert "30 slices of the part val:" in printed
    assert all(line == line.rstrip() for line in printed.splitlines())
    assert "Report: val_only/report.html" in printed
    assert (run / "metrics.json").read_text(encoding="utf-8") == before

    assert call("predict", "runs/quick", "--out", "submission.csv") == 0
    lines = (tmp_path / "submission.csv").read_text(encoding="utf-8").splitlines()
    listed = (twelve.parent / "rsna" / "stage_2_sample_submission.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in lines] == [line.split(",")[0] for line in listed]


def test_ctrl_c_prints_the_command_that_resumes(
    call: Call, twelve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = "[train]\nepochs = 3\nbatch_size = 8\ndevice = 'cpu'\n[eval]\nbootstrap = 20\n"
    (tmp_path / "quick.toml").write_text(recipe, encoding="utf-8")
    stopping = open_dataset(twelve)
    interrupt_at_read(stopping, 50)
    with monkeypatch.context() as patched:
        patched.setattr("ich_prep.dataset.union.open_dataset", lambda *_, **__: stopping)
        assert call("run", "--recipe", "quick.toml", "--data", twelve, "--out", "runs/mine") == 130
    run = tmp_path / "runs" / "mine"
    assert "Interrupted. Resume with: ich-train run --resume --out runs/mine\n" in capsys.readouterr().err
    assert len(read_history(run)) < 3
    assert call("run", "--resume", "--out", "runs/mine") == 0
    assert len(read_history(run)) == 3
    assert (run / "report.html").is_file()


def test_a_dataset_that_the_recipe_does_not_build_is_remarked_on(
    call: Call, twelve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = '[build]\nsize = 512\nstore = "hu"\nwindows = ["brain"]\n[train]\nwindows = ["stroke"]\n'
    (tmp_path / "large.toml").write_text(recipe, encoding="utf-8")
    assert call("run", "--recipe", "large.toml", "--data", twelve) == 2
    printed = capsys.readouterr().err
    assert f"Note: {twelve} was not built with large.toml: size is 32, not 512; store is windows, not hu;" in printed
    assert "windows is brain, subdural, bone, not brain." in printed
    assert "Expected no windows in [train]" in printed


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run"], 1, "ich-prep build"),
        (["run", "--recipe", "none.toml"], 2, "there is no such file"),
        (["run", "--recipe", "wrong.toml"], 2, "Did you mean 'epochs'?"),
        (["run", "--resume"], 2, "Name its folder with --out"),
        (
            ["run", "--resume", "--out", "nothing"],
            2,
            "nothing is not the folder of a run: there is no recipe.toml in it",
        ),
        (["run", "--resume", "--recipe", "wrong.toml", "--out", "nothing"], 2, "nothing is not the folder of a run"),
        (["run", "--epochs", "0"], 2, "--epochs"),
        (["run", "--model", "resnet19"], 1, "ich-prep build"),
        (["eval", "nothing"], 2, "nothing is not the folder of a run"),
        (["predict", "nothing", "--out", "x.csv"], 2, "nothing is not the folder of a run"),
        (["predict", "nothing"], 2, "--out"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    (tmp_path / "wrong.toml").write_text("[train]\nepoch = 3\n", encoding="utf-8")
    assert call(*words) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert {path.name for path in tmp_path.iterdir()} == {"wrong.toml"}


def test_help_names_the_commands_and_imports_nothing_heavy() -> None:
    printed = subprocess.run([sys.executable, "-m", "ich_train", "--help"], check=True, capture_output=True, text=True)
    for command in ("run", "eval", "predict"):
        assert command in printed.stdout
    program = "import sys, ich_train.cli; assert not {'torch', 'pyarrow', 'numpy', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_help_of_run_names_the_models_and_defaults(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for word in (*MODELS, "timm:NAME", "package.module:NAME", f"[default: {TrainConfig().epochs}]"):
        assert word in printed


def test_the_version_is_that_of_the_distribution(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"ich-train {version('ich')}\n"


def test_an_option_given_twice_is_refused(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "--model", "baseline", "--model", "resnet18") == 2
    assert "--model was given 2 times (baseline, resnet18)" in capsys.readouterr().err


def test_a_dataset_that_was_moved_is_asked_for(
    call: Call, twelve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here.zarr").symlink_to(twelve)
    (tmp_path / "quick.toml").write_text("[train]\nepochs = 1\nbatch_size = 8\ndevice = 'cpu'\n[eval]\nbootstrap = 5\n")
    assert call("run", "--recipe", "quick.toml", "--data", "here.zarr") == 0
    (tmp_path / "here.zarr").rename(tmp_path / "there.zarr")
    capsys.readouterr()
    for words in (
        ["eval", "runs/quick"],
        ["predict", "runs/quick", "--out", "x.csv"],
        ["run", "--resume", "--out", "runs/quick"],
    ):
        assert call(*words) == 1
        printed = capsys.readouterr().err
        assert "here.zarr" in printed
        assert "Error: If the dataset of runs/quick was moved, pass its path with --data." in printed
    assert call("eval", "runs/quick", "--data", "nowhere.zarr") == 1
    assert "was moved" not in capsys.readouterr().err
    assert call("eval", "runs/quick", "--data", "there.zarr") == 0


def test_what_cannot_be_written_is_refused_before_the_work(
    call: Call, twelve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quick.toml").write_text("[train]\nepochs = 1\nbatch_size = 8\ndevice = 'cpu'\n[eval]\nbootstrap = 5\n")
    assert call("run", "--recipe", "quick.toml", "--data", twelve) == 0
    capsys.readouterr()
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "runs" / "quick" / "best" / "model.safetensors").unlink()  # a network that was loaded would be an error
    for words, message in (
        (["predict", "runs/quick", "--out", "runs"], "runs is a folder. Name the CSV file to write with --out."),
        (
            ["predict", "runs/quick", "--out", "file/x.csv"],
            "file is a file, not a folder. Name another file with --out.",
        ),
        (["eval", "runs/quick", "--out", "file"], "file is a file, not a folder. Name another folder with --out."),
        (["eval", "runs/quick", "--out", "/proc/new"], "Cannot write to /proc: "),
        (["predict", "runs/quick", "--out", "/proc/x.csv"], "Cannot write to /proc: "),
        (
            ["run", "--data", twelve, "--device", "cpu", "--batch-size", 8, "--out", "file"],
            "file is a file; a run needs",
        ),
    ):
        if "/proc" in str(words[-1]) and not Path("/proc/self").exists():
            continue
        assert call(*words) == (1 if "/proc" in str(words[-1]) else 2)
        assert message in capsys.readouterr().err


def test_a_network_that_cannot_be_trained_leaves_no_folder(
    call: Call, twelve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, *, channels, size, classes):\n"
        "        super().__init__()\n"
        "        self.classes = classes\n"
        "    def forward(self, images):\n"
        "        return images.mean(dim=(2, 3))[:, :1].expand(-1, self.classes)\n"
    )
    (tmp_path / "no_weights_net.py").write_text(source, encoding="utf-8")
    assert call("run", "--model", "no_weights_net:Net", "--data", twelve, "--device", "cpu", "--batch-size", 8) == 2
    monkeypatch.delitem(sys.modules, "no_weights_net")
    printed = capsys.readouterr().err
    assert "has nothing to train: it needs a parameter with requires_grad." in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "runs").exists()


def test_what_the_operating_system_refuses_is_one_message(
    call: Call, twelve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file")
    assert call("run", "--data", twelve, "--device", "cpu", "--epochs", 1, "--batch-size", 8) == 1
    printed = capsys.readouterr().err
    assert "Error: The run in runs/baseline stopped: Not a directory (runs/baseline). Fix" in printed
    assert "Traceback" not in printed
