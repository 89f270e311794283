from __future__ import annotations

import csv
import errno

import numpy as np
import pytest

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.errors import UsageError
from ich_prep.phantom import synthesize
from ich_train.config import PredictConfig
from ich_train.infer import predict
from ich_train.infer_files import Outputs, check_outputs, check_source, write_outputs
from ich_train.predict import load_predictor, predict_rows
from ich_train.split import split_rows
from ich_train.submission import Submission
from tests.support.training_runs import save_untrained, with_classes


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
    return save_untrained(folder, dataset, context=1)


def write_submission(run, dataset, out, sample=None):
    outputs = Outputs(out, kaggle=True, sample=sample)
    check_outputs(outputs, dataset.classes)
    check_source(outputs, dataset)
    return write_outputs(outputs, predict([run], dataset, PredictConfig(), kaggle=True), dataset)


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["ID", "Label"]
    return lines


def test_sample_decides_lines_and_order(source, dataset, run, tmp_path):
    sample = source / "stage_2_sample_submission.csv"
    out = tmp_path / "submissions" / "first.csv"
    written = write_submission(run, dataset, out, sample=sample)
    wanted, found = read(sample), read(out)
    assert written == Submission(lines=len(wanted), slices=len(wanted) // 6, without_image=1)
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
    train = split_rows(dataset, val_fold=0, test_fold=1, allow_series_labels=False).train
    for name, value in missing:
        share = slices.loc[train, name.rsplit("_", 1)[1]].mean()
        assert float(value) == pytest.approx(share, rel=1e-6)
    for name, value in found:
        if name in expected:
            assert np.float32(value) == pytest.approx(expected[name], abs=1e-6)


def test_any_lines_of_a_sample_will_do(source, dataset, run, tmp_path):
    wanted = read(source / "stage_2_sample_submission.csv")
    chosen = [wanted[k][0] for k in (17, 3, 3, 200)]
    sample = tmp_path / "sample.csv"
    sample.write_text("ID,Label\n" + "".join(f"{name},0.5\n" for name in chosen))
    assert write_submission(run, dataset, tmp_path / "out.csv", sample=sample).lines == 4
    assert [line[0] for line in read(tmp_path / "out.csv")] == chosen


def test_without_a_sample_the_label_file_decides_the_order(source, dataset, run, tmp_path):
    out = tmp_path / "submission.csv"
    written = write_submission(run, dataset, out)
    present = set(dataset.slices["sop_instance_uid"].to_pylist())
    wanted = [line[0] for line in read(source / "stage_2_sample_submission.csv")]
    order = dict.fromkeys(name.rsplit("_", 1)[0] for name in wanted)
    expected = [f"{uid}_{name}" for uid in order if uid in present for name in RSNA_CLASSES]
    assert [line[0] for line in read(out)] == expected
    assert written == Submission(lines=len(expected), slices=len(expected) // 6, without_image=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Cannot read"),
        ("ID,Label\n", "has 0 lines of ID, Label"),
        ("name,value\nID_1_any,0.5\n", "has 1 line of name, value"),
        ("ID,Label\nID_1_any,0.5\nID_1_all,0.5\n", "1 line of other names, the first ID_1_all"),
        (None, "Cannot read"),
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
    with pytest.raises(UsageError, match="No slices of the subset test"):
        write_submission(run, open_dataset(tmp_path / "data.zarr"), tmp_path / "out.csv")


def test_other_classes_than_those_of_the_competition_are_refused(dataset, run, tmp_path):
    other = with_classes(dataset.path, tmp_path / "other.zarr", ("fracture", "any"))
    with pytest.raises(UsageError, match=r"A submission needs the six classes .* this dataset has fracture, any"):
        write_submission(run, other, tmp_path / "out.csv")


def test_a_submission_is_replaced_at_once_or_not_at_all(source, dataset, run, tmp_path, monkeypatch):
    out = tmp_path / "out.csv"
    out.write_text("before")
    with monkeypatch.context() as patched, pytest.raises(OSError, match=r"out\.csv'$"):
        patched.setattr(
            "os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device", ".out.csv.1"))
        )
        write_submission(run, dataset, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
    assert out.read_text() == "before"


def test_a_submission_needs_the_original_names(source, tmp_path):
    spec = Spec(size=64, slices_per_shard=64, folds=3, identifiers="pseudonymise")
    build(source, tmp_path / "data.zarr", spec, workers=0, allow=Allowances(missing_images=True))
    with pytest.raises(UsageError, match="has pseudonyms"):
        write_submission(tmp_path / "run", open_dataset(tmp_path / "data.zarr"), tmp_path / "out.csv")
