from __future__ import annotations

import csv
from dataclasses import asdict

import numpy as np
import pytest
import torch

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import Spec
from ich_prep.errors import UsageError
from ich_prep.phantom import synthesize
from ich_train.checkpoint import save_checkpoint
from ich_train.data import SliceLoader
from ich_train.model import build_model
from ich_train.predict import load_predictor, predict_rows, write_submission
from ich_train.split import split_rows

SPLIT = {"val_fold": 0, "test_fold": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    synthesize(folder / "rsna", series=18, seed=3, size=64)
    # One test slice that the sample submission lists and no image answers to.
    sorted((folder / "rsna" / "stage_2_test").iterdir())[5].unlink()
    return folder / "rsna"


@pytest.fixture(scope="module")
def dataset(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "data.zarr"
    build(source, out, Spec(size=64, slices_per_shard=64, folds=3), workers=0, allow=Allowances(missing_images=True))
    return open_dataset(out)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "baseline"
    torch.manual_seed(0)
    meta = {
        "name": "baseline",
        "channels": 9,
        "size": 64,
        "context": 1,
        "store": "windows",
        "windows": [asdict(window) for window in dataset.spec.windows],
        "classes": list(RSNA_CLASSES),
        "split": SPLIT,
    }
    save_checkpoint(folder / "best", build_model("baseline", channels=9, size=64), meta)
    return folder


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["ID", "Label"]
    return lines


def test_probabilities_come_in_the_order_of_the_rows(dataset, run):
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


def test_sample_decides_lines_and_order(source, dataset, run, tmp_path, caplog):
    sample = source / "stage_2_sample_submission.csv"
    out = tmp_path / "submissions" / "first.csv"
    lines = write_submission(run, dataset, out, sample=sample)
    wanted, found = read(sample), read(out)
    assert lines == len(found) == len(wanted)
    assert [line[0] for line in found] == [line[0] for line in wanted]

    slices = dataset.slices.to_pandas()
    test = slices[(slices["subset"] == "test") & (slices["status"] == "ok")]
    predictor = load_predictor(run, dataset, device="cpu")
    probabilities = predict_rows(predictor.model, predictor.preprocess, dataset, test["row"].to_numpy(), context=1)
    expected = {
        f"{uid}_{name}": probabilities[k, j]
        for k, uid in enumerate(test["sop_instance_uid"])
        for j, name in enumerate(RSNA_CLASSES)
    }
    missing = [line for line in found if line[0] not in expected]
    assert len(missing) == 6
    train = split_rows(dataset, **SPLIT, allow_series_labels=False).train
    for name, value in missing:
        share = slices.loc[train, name.rsplit("_", 1)[1]].mean()
        assert float(value) == pytest.approx(share, rel=1e-6)
    for name, value in found:
        if name in expected:
            assert np.float32(value) == pytest.approx(expected[name], abs=1e-6)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"1 of {len(wanted) // 6} slices have no usable image")


def test_any_lines_of_a_sample_will_do(source, dataset, run, tmp_path):
    wanted = read(source / "stage_2_sample_submission.csv")
    chosen = [wanted[k][0] for k in (17, 3, 3, 200)]
    sample = tmp_path / "sample.csv"
    sample.write_text("ID,Label\n" + "".join(f"{name},0.5\n" for name in chosen))
    assert write_submission(run, dataset, tmp_path / "out.csv", sample=sample) == 4
    assert [line[0] for line in read(tmp_path / "out.csv")] == chosen


def test_without_a_sample_the_label_file_decides_the_order(source, dataset, run, tmp_path, caplog):
    out = tmp_path / "submission.csv"
    lines = write_submission(run, dataset, out)
    present = set(dataset.slices["sop_instance_uid"].to_pylist())
    wanted = [line[0] for line in read(source / "stage_2_sample_submission.csv")]
    order = dict.fromkeys(name.rsplit("_", 1)[0] for name in wanted)
    expected = [f"{uid}_{name}" for uid in order if uid in present for name in RSNA_CLASSES]
    assert [line[0] for line in read(out)] == expected
    assert lines == len(expected)
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not read"),
        ("ID,Label\n", "has 0 lines of ID, Label"),
        ("name,value\nID_1_any,0.5\n", "lines of name, value"),
        ("ID,Label\nID_1_any,0.5\nID_1_all,0.5\n", "1 lines of other names, the first ID_1_all"),
        (None, "does not read"),
    ],
)
def test_a_file_that_is_no_sample_is_refused(dataset, run, tmp_path, text, words):
    sample = tmp_path / "sample.csv"
    if text is not None:
        sample.write_text(text)
    with pytest.raises(UsageError, match=words):
        write_submission(run, dataset, tmp_path / "out.csv", sample=sample)
    assert not (tmp_path / "out.csv").exists()


def test_a_dataset_without_test_slices_is_refused(run, tmp_path):
    synthesize(tmp_path / "folder", series=3, seed=0, size=64, layout="folder")
    build(tmp_path / "folder", tmp_path / "data.zarr", Spec(size=64), workers=0)
    with pytest.raises(UsageError, match="slices of the subset test"):
        write_submission(run, open_dataset(tmp_path / "data.zarr"), tmp_path / "out.csv")
