"""Flipped bytes in the files of a run: refused in one message, or the result is the one of the file that was written."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.explanations import read_explanations
from ich_prep.dataset.predictions import read_predictions
from ich_prep.dataset.windows import PRESETS
from ich_prep.errors import IchError
from ich_train.checkpoint import Images, Meta, load_model, load_state, save_checkpoint
from ich_train.explain import explain_run
from ich_train.features import read_features
from ich_train.model import build_model
from ich_train.runs import read_history, settings_of
from tests.support.commands import Inputs
from tests.support.faults import programs

WINDOWS = (PRESETS["brain"],)
META = Meta(
    network="baseline",
    channels=1,
    classes=RSNA_CLASSES,
    images=Images(size=32, pixels="windows", windows=WINDOWS),
    context=0,
    windows=WINDOWS,
    dataset_digest="0f",
    val_fold=0,
    test_fold=1,
    epoch=4,
    val_loss=0.25,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "last"
    torch.manual_seed(0)
    model = build_model("baseline", channels=1, size=32, classes=len(RSNA_CLASSES))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 1, 32, 32)).sum().backward()
    optimizer.step()
    save_checkpoint(folder, model, META, {"optimizer": optimizer.state_dict(), "step": 3, "settings": {"seed": 0}})
    return folder


def refused(use: Callable[[], object]) -> bool:
    """Whether ``use`` raises an error of ours, in one short message; any other exception fails the test."""
    try:
        use()
    except IchError as error:
        assert 10 < len(str(error)) < 2000
        return True
    return False


def flipped(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def check_checkpoint(original: Path, folder: Path) -> None:
    whole = load_model(original, "cpu")

    def use_model() -> None:
        found = load_model(folder, "cpu")
        assert found.meta == whole.meta
        assert same(dict(found.model.state_dict()), dict(whole.model.state_dict()))

    refused(use_model)
    refused(lambda: same_state(load_state(folder), load_state(original)))


def same_state(found: Any, expected: Any) -> None:
    assert same(found, expected)


def places(sizes: dict[str, int]) -> st.SearchStrategy[tuple[str, int]]:
    return st.sampled_from(sorted(sizes)).flatmap(
        lambda name: st.tuples(st.just(name), st.integers(0, sizes[name] - 1))
    )


SIZES = {"model.safetensors": 100_000, "meta.json": 1000, "state.pt": 200_000}


@pytest.mark.parametrize("flips", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_flipped_byte_of_a_checkpoint(flips: int, checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "last"))

    @given(place=places(SIZES), mask=st.integers(1, 255))
    @settings(max_examples=flips, deadline=None)
    def try_one(place: tuple[str, int], mask: int) -> None:
        name, at = place
        data = (checkpoint / name).read_bytes()
        (copy / name).write_bytes(flipped(data, at % len(data), mask))
        try:
            check_checkpoint(checkpoint, copy)
        finally:
            (copy / name).write_bytes(data)

    try_one()


def test_a_flipped_weight_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "last"))
    for name in ("model.safetensors", "state.pt"):
        data = (checkpoint / name).read_bytes()
        (copy / name).write_bytes(flipped(data, len(data) // 2, 1))
    assert refused(lambda: load_model(copy, "cpu"))
    assert refused(lambda: load_state(copy))


def test_a_checkpoint_from_before_the_checksums_is_read(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "last"))
    (copy / "meta.json").write_text(META.model_dump_json(indent=1))
    check_checkpoint(checkpoint, copy)
    assert load_model(copy, "cpu").meta == META


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A dataset and a run on it, with maps and features."""
    folder = tmp_path_factory.mktemp("inputs")
    with programs() as server:
        made = Inputs.make(folder, server)
        done = server.run("ich-train", "embed", made.run, "--data", made.data, "--out", made.run / "features")
        assert done.status == 0, done.output
    explain_run(made.run, open_dataset(made.data), limit=4)
    return made


def use_everything(run: Path, dataset: Dataset) -> dict[str, Any]:
    """Return what each reader of a run's files gives, None where it refuses."""
    readers: dict[str, Callable[[], Any]] = {
        "predictions": lambda: read_predictions(run, dataset),
        "maps": lambda: np.array(getattr(read_explanations(run, dataset), "values", [])),
        "features": lambda: read_features(run / "features").values,
        "history": lambda: read_history(run),
        "settings": lambda: settings_of(run),
    }
    found: dict[str, Any] = {}
    for name, read in readers.items():
        found[name] = None
        refused(lambda name=name, read=read: found.update({name: read()}))  # type: ignore[misc]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_any_flipped_byte_of_a_run(inputs: Inputs, tmp_path: Path) -> None:
    """Every reader of every file; and the commands on some of them, by themselves."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    copy = Path(shutil.copytree(inputs.run, tmp_path / "run"))
    files = [path for path in copy.rglob("*") if path.is_file() and path.suffix != ".png"]
    dataset = open_dataset(inputs.data)
    whole = use_everything(copy, dataset)
    with programs() as server:
        commands = (
            ("ich-train", "predict", copy, "--data", inputs.data, "--out", tmp_path / "p.csv"),
            ("ich-train", "run", "--data", inputs.data, "--recipe", inputs.recipe, "--out", copy, "--resume"),
            ("ich-prep", "export", inputs.data, "--run", copy, "--as", "npy", "--series", 1, "--out", tmp_path / "e"),
            ("ich-prep", "view", inputs.data, "--run", copy, "--series", 1, "--html", tmp_path / "v"),
        )
        for number in range(400):
            file = rng.choice(files)
            data = file.read_bytes()
            if not data:
                continue
            file.write_bytes(flipped(data, rng.randrange(len(data)), rng.randrange(1, 256)))
            found = use_everything(copy, dataset)
            if found["predictions"] is not None:
                np.testing.assert_array_equal(found["predictions"], whole["predictions"], f"{file} {number}")
            if number % 4 == 0:
                words = rng.choice(commands)
                for made in ("e", "v"):
                    shutil.rmtree(tmp_path / made, ignore_errors=True)
                server.run(*words).require_no_traceback(file, words)
            shutil.rmtree(copy)  # a resumed run may have changed more
            shutil.copytree(inputs.run, copy)
