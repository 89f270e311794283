from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.schema import digest_of
from ich_prep.dataset.windows import PRESETS
from ich_prep.errors import TrainError
from ich_train.checkpoint import (
    Images,
    Meta,
    has_checkpoint,
    load_model,
    load_parameters,
    load_state,
    read_meta,
    save_checkpoint,
)
from ich_train.model import build_model
from ich_train.preprocess import Scaling

WINDOWS = (PRESETS["brain"], PRESETS["subdural"], PRESETS["bone"])
META = Meta(
    network="baseline",
    channels=3,
    classes=RSNA_CLASSES,
    images=Images(size=32, pixels="windows", windows=WINDOWS),
    context=0,
    windows=WINDOWS,
    scaling=Scaling(),
    dataset_digest="0f",
    val_fold=0,
    test_fold=1,
    epoch=4,
    val_loss=0.25,
)


def model_of(value: float) -> torch.nn.Module:
    model = build_model("baseline", channels=3, size=32, classes=6)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def value_of(folder: Path) -> float:
    values = {float(p.detach().flatten()[0]) for p in load_model(folder, "cpu").model.parameters()}
    assert len(values) == 1
    return values.pop()


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model = build_model("baseline", channels=3, size=32, classes=6)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "history": [{"loss": 0.1 + 0.2}], "place": (3, "x", None)}
    save_checkpoint(tmp_path / "last", model, META, state)
    loaded = load_model(tmp_path / "last", "cpu")
    assert loaded.meta == META
    assert not loaded.model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.model.parameters(), strict=True))
    again = load_state(tmp_path / "last")
    assert again["history"] == state["history"]
    assert again["place"] == state["place"]
    moments = again["optimizer"]["state"][0]
    assert torch.equal(moments["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert {path.name for path in tmp_path.iterdir()} == {"last"}


def test_a_network_in_channels_last_is_saved_whole(tmp_path: Path) -> None:
    model = build_model("baseline", channels=3, size=32, classes=6).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_checkpoint(tmp_path / "best", model, META)
    loaded = load_model(tmp_path / "best", "cpu").model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_checkpoint_replaces_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best", model_of(1), META, {"old": 1})
    save_checkpoint(tmp_path / "best", model_of(2), META)
    assert value_of(tmp_path / "best") == 2
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["meta.json", "model.safetensors"]


def test_a_replacement_cut_short_leaves_one_of_the_two(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", model_of(1), META)
    # Cut before the renames: what was being written lies beside.
    (tmp_path / "last.tmp").mkdir()
    (tmp_path / "last.tmp" / "model.safetensors").write_bytes(b"half")
    assert value_of(tmp_path / "last") == 1
    # Cut between the renames: the earlier one has another name.
    (tmp_path / "last").rename(tmp_path / "last.old")
    assert has_checkpoint(tmp_path / "last")
    assert value_of(tmp_path / "last") == 1
    # Cut after them: the earlier one is still there.
    save_checkpoint(tmp_path / "last.old", model_of(0), META)
    assert value_of(tmp_path / "last") == 1
    save_checkpoint(tmp_path / "last", model_of(2), META)
    assert value_of(tmp_path / "last") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"last"}


WRITER = """
import sys
from pathlib import Path
import torch
from tests_checkpoint_model import model_of, META
from ich_train.checkpoint import save_checkpoint
for value in range(1, 10**6):
    save_checkpoint(Path(sys.argv[1]), model_of(value), META, {"value": value})
    print(value, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    program = WRITER.replace("tests_checkpoint_model", Path(__file__).stem)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    for delay in (0.0, 0.004):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
        ) as writer:
            assert writer.stdout is not None
            for _ in range(20):
                writer.stdout.readline()
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
            printed = writer.stdout.read().split()
        written = int(printed[-1]) if printed else 20
        assert load_state(folder)["value"] == value_of(folder)
        assert value_of(folder) >= written
        save_checkpoint(folder, model_of(0), META)  # the next run is not in the way of what was left lying about


def test_damaged_files_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    with pytest.raises(TrainError, match="No checkpoint"):
        load_model(folder, "cpu")
    save_checkpoint(folder, model_of(1), META, {"step": 1})
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainError, match=r"model\.safetensors are damaged"):
        load_model(folder, "cpu")
    weights.write_bytes(whole)
    with pytest.raises(TrainError, match=r"do not fit the network .* 1 tensor of \d+ has another shape, such as conv1"):
        load_parameters(folder, build_model("baseline", channels=1, size=32, classes=6))
    (folder / "state.pt").write_bytes(b"")
    with pytest.raises(TrainError, match="cannot be resumed"):
        load_state(folder)
    (folder / "meta.json").write_text("{", encoding="utf-8")
    with pytest.raises(TrainError, match=r"meta\.json is damaged: .* line 1 column 2 \(char 1\)\.$"):
        load_model(folder, "cpu")
    (folder / "meta.json").write_text(META.model_dump_json(exclude={"epoch"}), encoding="utf-8")
    with pytest.raises(TrainError, match=r"meta\.json is damaged: epoch: Field required\.$"):
        load_model(folder, "cpu")


def test_a_state_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", model_of(1), META, {"path": Path("x")})
    with pytest.raises(TrainError, match="cannot be resumed"):
        load_state(tmp_path / "last")


def test_meta_is_plain_json_of_which_unknown_keys_are_ignored(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best", model_of(1), META)
    file = tmp_path / "best" / "meta.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["classes"] == list(RSNA_CLASSES)
    assert content["images"]["windows"][0] == {"name": "brain", "center": 40.0, "width": 80.0}
    content["of_a_later_version"] = 1
    file.write_text(json.dumps(content | {"digest": digest_of(content)}), encoding="utf-8")
    assert read_meta(tmp_path / "best") == META


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path / "last", model_of(1), META, {"step": 1})
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "last").iterdir()} == dict.fromkeys(
        ("model.safetensors", "meta.json", "state.pt"), mode
    )


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = build_model("baseline", channels=3, size=32, classes=6)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(dict(model.state_dict())))
    with pytest.raises(TrainError, match="not finite"):
        load_parameters(folder, model)


@pytest.mark.parametrize("state", [[1], 3, "text"])
def test_a_state_of_another_type_is_damage(state: object, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(TrainError, match="is damaged: it is a"):
        load_state(tmp_path)
