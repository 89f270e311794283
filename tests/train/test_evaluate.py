from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.errors import TrainError, UsageError
from ich_prep.phantom import synthesize
from ich_train.checkpoint import load_model
from ich_train.config import EvalConfig
from ich_train.evaluation.evaluate import evaluate_run
from ich_train.evaluation.metrics import log_loss
from ich_train.evaluation.report import CAPTIONS
from ich_train.predict import predict_rows
from ich_train.preprocess import Preprocess
from ich_train.rows import draw_rows
from ich_train.runs import Epoch, write_history
from ich_train.split import split_rows
from tests.support.sealing import replace_table
from tests.support.training_runs import save_untrained

SPLIT = {"val_fold": 0, "test_fold": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    synthesize(folder / "rsna", series=24, seed=3, size=64)
    return folder / "rsna"


@pytest.fixture(scope="module")
def dataset(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "data.zarr"
    build(source, out, Spec(size=64, slices_per_shard=64, folds=3), workers=0)
    return open_dataset(out)


@pytest.fixture(scope="module")
def hu_dataset(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "hu.zarr"
    build(source, out, Spec(size=64, store="hu", slices_per_shard=64, folds=3), workers=0)
    return open_dataset(out)


def make_run(folder, dataset, *, context=0):
    """A run whose network has its first weights."""
    folder.mkdir()
    save_untrained(folder, dataset, context=context)
    line = {"seconds": 1.0, "learning_rate": 1e-3, "slices_per_s": 100.0, "wait_share": 0.01}
    lines = [(1, 0.6, 0.7, 0.6, 0.7), (2, 0.5, 0.8, 0.4, 0.9)]
    names = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
    write_history(folder, [Epoch(**line, **dict(zip(names, values, strict=True))) for values in lines])
    return folder


@pytest.fixture(scope="module")
def evaluated(dataset, tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "baseline", dataset)
    return run, evaluate_run(run, dataset, EvalConfig(bootstrap=20))


def test_folder_holds_all_that_is_promised(evaluated):
    run, metrics = evaluated
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert {path.stem for path in (run / "pictures").iterdir()} == {
        *CAPTIONS,
        *(f"sheet_{name}" for name in RSNA_CLASSES),
    }
    assert (run / "report.html").read_text().count("data:image/png;base64,") == len(CAPTIONS) + len(RSNA_CLASSES)
    assert {path.name for path in (run / "curves").iterdir()} == {"roc.csv", "precision_recall.csv"}


def test_predictions_have_the_promised_columns_and_rows(evaluated, dataset):
    run, _ = evaluated
    table = pq.read_table(run / "predictions.parquet")
    assert table.column_names == [
        *("row", "sop_instance_uid", "series_instance_uid", "series_row", "patient_id", "subset", "fold"),
        *("fold_group", "series_slices"),
        *RSNA_CLASSES,
        *(f"p_{name}" for name in RSNA_CLASSES),
    ]
    types = {str(table.schema.field(name).type) for name in RSNA_CLASSES}
    assert (types, str(table.schema.field("p_any").type)) == ({"int8"}, "float")
    rows = split_rows(dataset, **SPLIT, allow_series_labels=False).test
    assert table["row"].to_pylist() == rows.tolist()
    assert set(table["fold"].to_pylist()) == {1}
    assert table["sop_instance_uid"].to_pylist() == dataset.slices["sop_instance_uid"].take(rows).to_pylist()


def test_metrics_are_those_of_the_predictions(evaluated):
    run, metrics = evaluated
    table = pq.read_table(run / "predictions.parquet")
    labels = np.stack([table[name].to_numpy() for name in RSNA_CLASSES], axis=1)
    probabilities = np.stack([table[f"p_{name}"].to_numpy() for name in RSNA_CLASSES], axis=1)
    assert metrics["by_slice"]["log_loss"] == log_loss(labels, probabilities, RSNA_CLASSES)
    frame = table.to_pandas()
    by_series = frame.groupby("series_instance_uid").max(numeric_only=True)
    mean = frame.groupby("series_instance_uid")[[f"p_{name}" for name in RSNA_CLASSES]].mean()
    two_classes = [name for name in RSNA_CLASSES if frame[name].nunique() == 2]
    assert {"any"} <= set(two_classes)
    for name in two_classes:
        entry = metrics["by_slice"]["labels"][name]
        truth, score = frame[name], frame[f"p_{name}"]
        assert entry["roc_auc"] == pytest.approx(roc_auc_score(truth, score))
        assert entry["average_precision"] == pytest.approx(average_precision_score(truth, score))
        threshold = entry["at_best_f1"]["threshold"]
        if threshold is not None:
            assert entry["at_best_f1"]["f1"] == pytest.approx(f1_score(truth, score >= np.float32(threshold)))
        if by_series[name].nunique() == 2:
            found = metrics["by_series_max"]["labels"][name]["roc_auc"]
            assert found == pytest.approx(roc_auc_score(by_series[name], by_series[f"p_{name}"]))
            found = metrics["by_series_mean"]["labels"][name]["roc_auc"]
            assert found == pytest.approx(roc_auc_score(by_series[name], mean[f"p_{name}"]), abs=1e-6)
    assert metrics["by_series_max"]["cases"] == frame["series_instance_uid"].nunique()
    assert metrics["by_slice"]["patients"] == frame["patient_id"].nunique()


def test_thresholds_are_found_on_validation_alone(evaluated, dataset):
    run, metrics = evaluated
    loaded = load_model(run / "best", "cpu")
    preprocess = Preprocess(pixels="windows", windows=dataset.spec.windows)
    rows = split_rows(dataset, **SPLIT, allow_series_labels=False).val
    probabilities = predict_rows(loaded.model, preprocess, dataset, rows, context=0)
    labels = dataset.labels[rows]
    for j, name in enumerate(RSNA_CLASSES):
        threshold = metrics["by_slice"]["labels"][name]["at_best_f1"]["threshold"]
        assert (threshold is None) == (len(set(labels[:, j])) == 1)
        if threshold is None:
            continue
        best = max(
            f1_score(labels[:, j], probabilities[:, j] >= other) for other in np.unique(probabilities[:, j])[::9]
        )
        assert f1_score(labels[:, j], probabilities[:, j] >= np.float32(threshold)) >= best - 1e-12


def test_position_only_baseline_never_sees_a_pixel(evaluated, dataset):
    _, metrics = evaluated
    split = split_rows(dataset, **SPLIT, allow_series_labels=False)
    frame = dataset.slices.select(["row", "series_row", "slice_index", "any"]).to_pandas()
    counts = dataset.series["n_slices"].to_numpy()[frame["series_row"]]
    frame["bin"] = np.minimum(frame["slice_index"] / (counts - 1) * 20, 19).astype(int)
    shares = frame.loc[split.train].groupby("bin")["any"].mean()
    test = frame.loc[split.test]
    expected = roc_auc_score(test["any"].astype(int), test["bin"].map(shares))
    assert metrics["by_slice"]["position_only"]["any"] == pytest.approx(expected)


def test_the_dataset_is_described_by_part(evaluated, dataset):
    _, metrics = evaluated
    described = metrics["dataset"]
    assert (described["name"], described["digest"], described["trained_on"]) == ("data.zarr", dataset.digest, True)
    rows = split_rows(dataset, **SPLIT, allow_series_labels=False).train
    part = described["parts"]["train"]
    assert part["slices"] == len(rows)
    assert part["patients"] == len(set(dataset.slices["patient_id"].take(rows).to_pylist()))
    assert part["positives"]["any"] == sum(dataset.slices["any"].take(rows).to_pylist())


def test_curve_files_are_those_of_the_predictions(evaluated):
    run, metrics = evaluated
    with (run / "curves" / "roc.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["label"] == "any"]
    x, y = (np.array([float(line[name]) for line in lines]) for name in ("false_positive_rate", "true_positive_rate"))
    assert np.trapezoid(y, x) == pytest.approx(metrics["by_slice"]["labels"]["any"]["roc_auc"])
    with (run / "curves" / "precision_recall.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["label", "recall", "precision", "threshold"]


def test_an_evaluation_repeats_to_the_byte(evaluated, dataset, tmp_path):
    run, _ = evaluated
    again = make_run(tmp_path / "again", dataset)
    evaluate_run(again, dataset, EvalConfig(bootstrap=20), threads=1)
    written = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())
    assert [name for name in written if (run / name).read_bytes() != (again / name).read_bytes()] == []


@pytest.fixture
def relabelled(dataset, tmp_path):
    """A function: columns of the slices table by name, each a list of values -> the dataset with those."""

    def change(**columns):
        copy = tmp_path / "changed.zarr"
        shutil.copytree(dataset.path, copy)
        table = dataset.slices
        for name, values in columns.items():
            field = table.schema.field(name)
            table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
        replace_table(copy, "slices", table)
        return open_dataset(copy)

    return change


def test_a_series_of_which_a_slice_has_no_label_is_not_known_to_be_negative(evaluated, dataset, relabelled, tmp_path):
    run, before = evaluated
    frame = dataset.slices.to_pandas().loc[split_rows(dataset, **SPLIT, allow_series_labels=False).test]
    positive = frame.groupby("series_row")["any"].max()
    row = frame.index[frame["series_row"] == positive.index[positive == 0][0]][3]
    columns = {name: dataset.slices[name].to_pylist() for name in ("label_level", *RSNA_CLASSES)}
    columns["label_level"][row] = "none"
    for name in RSNA_CLASSES:
        columns[name][row] = None
    after = evaluate_run(run, relabelled(**columns), EvalConfig(bootstrap=0), out=tmp_path / "evaluated")
    for view in ("by_series_max", "by_series_mean"):
        for name in RSNA_CLASSES:
            entry, was = after[view]["labels"][name], before[view]["labels"][name]
            assert (entry["positives"], entry["negatives"]) == (was["positives"], was["negatives"] - 1)


def test_intervals_resample_fold_groups(evaluated, dataset, relabelled, tmp_path):
    """Two patients that are one person: the measures stay, one case fewer is drawn, so the intervals change."""
    run, before = evaluated
    test = split_rows(dataset, **SPLIT, allow_series_labels=False).test
    patients = dataset.slices["patient_id"].to_pylist()
    one, other = sorted({patients[row] for row in test.tolist()})[:2]
    linked = relabelled(fold_group=[one if patient == other else patient for patient in patients])
    after = evaluate_run(run, linked, EvalConfig(bootstrap=20), out=tmp_path / "evaluated")
    assert after["by_slice"]["patients"] == before["by_slice"]["patients"]
    assert after["by_slice"]["log_loss"] == before["by_slice"]["log_loss"]
    assert after["by_slice"]["log_loss_interval"] != before["by_slice"]["log_loss_interval"]


def test_a_limit_draws_unseen_slices_by_seed_without_repeats(dataset):
    unseen = split_rows(dataset, **SPLIT, allow_series_labels=False).test
    drawn = draw_rows(unseen, limit=20, seed=5)
    assert len(set(drawn.tolist())) == 20
    assert set(drawn.tolist()) <= set(unseen.tolist())
    assert drawn.tolist() == sorted(drawn.tolist()) == draw_rows(unseen, limit=20, seed=5).tolist()
    assert drawn.tolist() != draw_rows(unseen, limit=20, seed=6).tolist()
    for limit in (None, len(unseen), 10**6):
        assert draw_rows(unseen, limit=limit, seed=5).tolist() == unseen.tolist()


def test_a_draw_of_all_from_hu_with_neighbours(hu_dataset, dataset, tmp_path):
    run = make_run(tmp_path / "run", hu_dataset, context=1)
    metrics = evaluate_run(run, hu_dataset, EvalConfig(subset="all", limit=20, bootstrap=3))
    assert metrics["model"]["channels"] == 9
    assert metrics["evaluated"]["slices"] == 20
    assert metrics["by_series_max"] is metrics["by_series_mean"] is None
    assert "The slices evaluated are those of all parts" in (run / "report.html").read_text()
    # The same network on the windows that the other build stored: the same probabilities.
    loaded = load_model(run / "best", "cpu")
    preprocess = Preprocess(pixels="windows", windows=dataset.spec.windows)
    table = pq.read_table(run / "predictions.parquet")
    expected = predict_rows(loaded.model, preprocess, dataset, table["row"].to_numpy(), context=1)
    assert table["p_any"].to_numpy() == pytest.approx(expected[:, 5], abs=1e-6)
    assert len(set(table["fold"].to_pylist())) == 3


def test_a_network_is_evaluated_on_another_dataset_with_labels_of_whole_series(evaluated, tmp_path):
    synthesize(tmp_path / "cq500", series=12, seed=1, size=64, layout="cq500")
    allow = Allowances(missing_images=True)
    build(tmp_path / "cq500", tmp_path / "cq500.zarr", Spec(size=64, folds=3), workers=0, allow=allow)
    run, before = evaluated
    other = open_dataset(tmp_path / "cq500.zarr")
    metrics = evaluate_run(run, other, EvalConfig(subset="all", bootstrap=3), out=tmp_path / "evaluated" / "cq500")
    assert metrics["evaluated"]["series_labels"]
    assert not metrics["dataset"]["trained_on"]
    assert metrics["by_series_max"]["cases"] == len(other.series)
    assert json.loads((tmp_path / "evaluated" / "cq500" / "metrics.json").read_text()) == metrics
    assert (tmp_path / "evaluated" / "cq500" / "report.html").is_file()
    assert json.loads((run / "metrics.json").read_text()) == before


def test_all_of_a_dataset_is_evaluated_when_parts_of_the_split_are_empty(evaluated, dataset, relabelled, tmp_path):
    run, _ = evaluated
    folds = [None if fold is None else SPLIT["test_fold"] for fold in dataset.slices["fold"].to_pylist()]
    other = relabelled(fold=folds)
    metrics = evaluate_run(run, other, EvalConfig(subset="all", bootstrap=3), out=tmp_path / "evaluated")
    assert metrics["evaluated"]["slices"] == metrics["dataset"]["parts"]["test"]["slices"] > 0
    for view in ("by_slice", "by_series_max", "by_series_mean"):
        assert metrics[view]["labels"]["any"]["roc_auc"] is not None
        assert metrics[view]["labels"]["any"]["at_best_f1"]["threshold"] is None
        assert metrics[view]["position_only"] == dict.fromkeys(RSNA_CLASSES)
    with pytest.raises(UsageError, match="No slices for val"):
        evaluate_run(run, other, EvalConfig(subset="val"), out=tmp_path / "val")


def test_slices_whose_study_stands_for_the_patient_are_counted(evaluated, dataset, relabelled, tmp_path):
    run, before = evaluated
    assert before["dataset"]["patient_is_study"] == 0
    split = split_rows(dataset, **SPLIT, allow_series_labels=False)
    flags = [["gap_before"] if row % 2 else [] for row in range(len(dataset))]
    for row in (*split.train[:5], *split.test[-3:], *split.val[:2]):
        flags[row] = [*flags[row], "patient_is_study"]
    metrics = evaluate_run(run, relabelled(flags=flags), EvalConfig(bootstrap=0), out=tmp_path / "evaluated")
    assert metrics["dataset"]["patient_is_study"] == 8
    assert (
        "Without PatientID, among the slices evaluated or to train on: 8 slices."
        in (tmp_path / "evaluated" / "report.html").read_text()
    )


def test_another_kind_of_dataset_is_refused(dataset, hu_dataset, tmp_path):
    run = make_run(tmp_path / "run", dataset)
    with pytest.raises(UsageError, match=r"other images .*: windows brain 40/80, .* not HU at 64 x 64"):
        evaluate_run(run, hu_dataset, EvalConfig())


def test_a_folder_without_a_trained_network_is_refused(dataset, tmp_path):
    with pytest.raises(TrainError, match="No checkpoint"):
        evaluate_run(tmp_path, dataset, EvalConfig())
    run = make_run(tmp_path / "run", dataset)
    shutil.rmtree(run / "best")
    with pytest.raises(TrainError, match="No checkpoint"):
        evaluate_run(run, dataset, EvalConfig())


def test_each_value_of_a_column_is_measured_by_itself(evaluated, dataset, relabelled, tmp_path):
    run, whole = evaluated
    table = pq.read_table(dataset.path / "labels/slices.parquet")
    patients = sorted({*table["patient_id"].to_pylist()})
    sex = [(None, "F", "M")[patients.index(patient) % 3] for patient in table["patient_id"].to_pylist()]
    copy = relabelled()
    replace_table(copy.path, "slices", table.append_column("x_sex", pa.array(sex)))
    carried = open_dataset(copy.path)
    out = tmp_path / "by"
    metrics = evaluate_run(run, carried, EvalConfig(bootstrap=20, by="x_sex"), out=out)
    assert metrics["by_slice"] == whole["by_slice"]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    frame = pq.read_table(out / "predictions.parquet").to_pandas()
    frame["sex"] = [sex[row] or "none" for row in frame["row"]]
    assert metrics["by_value"].keys() == {*frame["sex"]}
    for value, part in frame.groupby("sex"):
        entry = metrics["by_value"][value]["by_slice"]
        assert (entry["cases"], entry["patients"]) == (len(part), part["patient_id"].nunique())
        expected = roc_auc_score(part["any"], part["p_any"]) if part["any"].nunique() == 2 else None
        assert entry["labels"]["any"]["roc_auc"] == (None if expected is None else pytest.approx(expected))
    assert "ROC AUC for each value of x_sex" in (out / "report.html").read_text()
    for name, message in (
        ("x_sx", "Did you mean 'x_sex'"),
        ("sop_instance_uid", "at most 20"),
        ("flags", "of type list"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate_run(run, carried, EvalConfig(bootstrap=0, by=name), out=tmp_path / "never")
    assert not (tmp_path / "never").exists()
