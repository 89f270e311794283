"""Comparisons of runs: pairs of resamples, what is shown, and what cannot be compared."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from ich_prep.build_dataset import build
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.errors import IchError, TrainError, UsageError
from ich_prep.phantom import synthesize
from ich_train.config import EvalConfig, TrainConfig
from ich_train.cross_validation import cross_validate
from ich_train.evaluation.compare import compare
from ich_train.evaluation.evaluated import read_evaluation, require_same_cases
from ich_train.evaluation.paired import Network, compare_networks
from ich_train.train import train

CLASSES = ("one", "two", "any")
RESAMPLES = 40
pytestmark = pytest.mark.usefixtures("one_thread")


# --- pairs of resamples ------------------------------------------------------------------------------------------------


def some_cases(seed: int) -> tuple[Any, list[Network], Any]:
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(25), rng.integers(1, 9, 25))
    labels = (rng.random((len(patients), 3)) < 0.4).astype(np.int8)
    labels[rng.random(labels.shape) < 0.1] = -1
    networks = [
        Network(np.clip(rng.random(labels.shape) * 0.7 + 0.3 * (labels > 0) * skill, 0, 1), (0.4, 0.5, None))
        for skill in (0.4, 1.0, 0.7)
    ]
    return labels, networks, patients


def test_differences_are_those_of_the_same_patients_in_every_resample() -> None:
    """Against a bootstrap that copies the cases of the patients drawn and asks scikit-learn."""
    labels, networks, patients = some_cases(3)
    found = compare_networks(labels, networks, patients, classes=CLASSES, resamples=RESAMPLES, seed=7)

    def measured(network: Network, index: Any) -> Any:
        values = []
        for j in range(3):
            known = index[labels[index, j] >= 0]
            truth, score = labels[known, j], network.probabilities[known, j]
            threshold = network.thresholds[j]
            f1 = np.nan if threshold is None else f1_score(truth, score >= threshold)
            values.append([roc_auc_score(truth, score), average_precision_score(truth, score), f1])
        return np.array(values)

    rng = np.random.default_rng(7)
    drawn = []
    for _ in range(RESAMPLES):
        chosen = np.concatenate([np.flatnonzero(patients == one) for one in rng.integers(25, size=25)])
        drawn.append([measured(network, chosen) for network in networks])
    resampled = np.array(drawn)
    everyone = np.arange(len(labels))
    for k, network in enumerate(networks):
        values = measured(network, everyone)
        differences = values - measured(networks[0], everyone)
        for i, measure in enumerate(("roc_auc", "average_precision", "at_best_f1.f1")):
            # The third class has no threshold of best F1: the mean is over the other two.
            kept = [0, 1] if measure == "at_best_f1.f1" else [0, 1, 2]
            for name, place in (*zip(CLASSES, range(3), strict=True), ("mean", kept)):
                entry = (found[k]["mean"] if name == "mean" else found[k]["labels"][name])[measure]
                if np.isnan(np.mean(values[place, i])):
                    assert entry["value"] is entry["interval"] is entry["difference"] is None
                    continue
                own = resampled[:, k][:, place, i].reshape(RESAMPLES, -1).mean(axis=1)
                pairs = (resampled[:, k] - resampled[:, 0])[:, place, i].reshape(RESAMPLES, -1).mean(axis=1)
                assert entry["value"] == pytest.approx(np.mean(values[place, i]))
                assert entry["interval"] == pytest.approx(np.percentile(own, [2.5, 97.5]))
                if k == 0:
                    assert entry["difference"] is entry["difference_interval"] is None
                else:
                    assert entry["difference"] == pytest.approx(np.mean(differences[place, i]))
                    assert entry["difference_interval"] == pytest.approx(np.percentile(pairs, [2.5, 97.5]))


def test_the_interval_of_a_pair_is_narrower_than_two_intervals_leave_open() -> None:
    labels, networks, patients = some_cases(5)
    noisy = Network(np.clip(networks[0].probabilities + 1e-3, 0, 1), networks[0].thresholds)
    first, other = compare_networks(
        labels, [networks[0], noisy], patients, classes=CLASSES, resamples=RESAMPLES, seed=0
    )
    low, high = first["mean"]["roc_auc"]["interval"]
    of_pair = other["mean"]["roc_auc"]["difference_interval"]
    assert of_pair[1] - of_pair[0] < 0.1 * (high - low)


def test_one_patient_gives_no_intervals() -> None:
    labels, networks, patients = some_cases(1)
    _, other = compare_networks(labels, networks[:2], 0 * patients, classes=CLASSES, resamples=9, seed=0)
    assert other["mean"]["roc_auc"]["difference_interval"] is None
    assert other["mean"]["log_loss"]["difference"] is not None


# --- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, two runs and two cross-validations of it. Tests must not change it."""
    folder = tmp_path_factory.mktemp("compared")
    synthesize(folder / "rsna", series=12, size=32, workers=0)
    build(folder / "rsna", folder / "data.zarr", Spec(size=32, slices_per_shard=16, folds=3), workers=0)
    dataset = open_dataset(folder / "data.zarr")
    evaluation = EvalConfig(bootstrap=RESAMPLES)
    console = Console(file=io.StringIO())
    for seed, name in enumerate(("first", "second")):
        settings = TrainConfig(
            epochs=1 + seed, batch_size=8, device="cpu", threads=1, data=(folder / "data.zarr",), seed=seed
        )
        train(dataset, folder / name, settings, evaluation, console=console)
        cross_validate(dataset, folder / f"{name}-cv", settings, evaluation, folds="0,2", console=console)
    return folder


@pytest.fixture
def pair(runs: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of both runs, without their networks."""
    for name in ("first", "second"):
        shutil.copytree(runs / name, tmp_path / name, ignore=shutil.ignore_patterns("best", "last", "pictures"))
    return tmp_path / "first", tmp_path / "second"


def rewrite(run: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = run / "predictions.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def set_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        return table.set_column(
            place, table.schema.field(place), pa.array(change(table[name].to_pylist()), table.schema.field(place).type)
        )

    return changed


def rewrite_metrics(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    metrics = json.loads((run / "metrics.json").read_bytes())
    change(metrics)
    (run / "metrics.json").write_text(json.dumps(metrics))


def entries(metrics: Any) -> Any:
    return {
        (view, name, measure): (entry["labels"][name][measure], entry["labels"][name]["intervals"][measure])
        for view, entry in metrics.items()
        if view in ("by_slice", "by_series_max", "by_series_mean")
        for name in entry["labels"]
        for measure in ("roc_auc", "average_precision")
    }


@pytest.mark.parametrize("kind", ["", "-cv"])
def test_values_are_those_of_the_reports_and_every_file_has_them(runs: Path, tmp_path: Path, kind: str) -> None:
    """A cross-validation is one run: its out-of-fold predictions."""
    folders = [runs / f"{name}{kind}" for name in ("first", "second")]
    found = compare(folders, tmp_path / "c.html", resamples=RESAMPLES, seed=0)
    assert json.loads((tmp_path / "c.json").read_bytes()) == found
    for k, folder in enumerate(folders):
        reported = entries(json.loads((folder / "metrics.json").read_bytes()))
        for (view, name, measure), (value, interval) in reported.items():
            entry = found[view]["runs"][k]["labels"][name][measure]
            assert entry["value"] == (None if value is None else pytest.approx(value))
            assert entry["interval"] == (None if interval is None else pytest.approx(interval))
    with (tmp_path / "c.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    any_auc = next(line for line in lines if (line["run"], line["class"], line["measure"]) == ("B", "any", "roc_auc"))
    expected = found["by_slice"]["runs"][1]["labels"]["any"]["roc_auc"]
    assert float(any_auc["value"]) == expected["value"]
    assert float(any_auc["difference_high"]) == expected["difference_interval"][1]
    assert {line["class"] for line in lines} >= {"(mean)", "any"}
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "://" not in page and "<script" not in page
    assert page.count("data:image/png") == 5
    assert ("2 networks" in page) == bool(kind)


def test_a_run_and_its_copy_do_not_differ(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs / "first-cv", tmp_path / "copy"))
    found = compare([runs / "first-cv", copy], tmp_path / "c.html", resamples=RESAMPLES, seed=0)
    for entry in found["by_slice"]["runs"][1]["labels"].values():
        for of in entry.values():
            assert of["difference"] in (None, 0.0)
            assert of["difference_interval"] in (None, [0.0, 0.0])
    assert "no clear difference" in (tmp_path / "c.html").read_text(encoding="utf-8")


def test_slices_of_another_dataset_are_found_by_their_uids(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The same slices of a dataset that has grown, or was built with other windows: rows and digest differ."""
    before = compare(pair, tmp_path / "c.html", resamples=RESAMPLES, seed=0)
    rng = np.random.default_rng(0)

    def moved(table: pa.Table) -> pa.Table:
        shuffled = table.take(pa.array(rng.permutation(len(table))))
        return set_column("row", lambda rows: [row + 1000 for row in rows])(shuffled)

    rewrite(pair[1], moved)
    rewrite_metrics(pair[1], lambda metrics: metrics["dataset"].update(digest="e" * 64, trained_on=False))
    after = compare(pair, tmp_path / "c.html", resamples=RESAMPLES, seed=0)
    for view in ("by_slice", "by_series_max", "by_series_mean"):
        assert after[view] == before[view]
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "different datasets" in page and "B was trained on another dataset" in page


def test_names_are_text(pair: tuple[Path, Path], tmp_path: Path) -> None:
    odd = pair[0].rename(tmp_path / "_<b>$x^$\u202e</b>".replace("/", ""))
    compare([odd, pair[1]], tmp_path / "c.html", resamples=3, seed=0)
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "<b>$x" not in page and "\u202e" not in page and "\\u202e" in page


def without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


REFUSED: dict[str, tuple[Callable[[Path], object], type[IchError], str]] = {
    "not evaluated": (without("metrics.json"), UsageError, r"has not been evaluated.*ich-train eval .*second`"),
    "no predictions": (without("predictions.parquet"), TrainError, r"There is no predictions\.parquet"),
    "not JSON": (lambda run: (run / "metrics.json").write_text("{"), TrainError, r"is damaged.*ich-train eval"),
    "too deep": (lambda run: (run / "metrics.json").write_text("[" * 100_000), TrainError, "is damaged"),
    "a list": (lambda run: (run / "metrics.json").write_text("[1]"), TrainError, "is damaged"),
    "another version": (
        lambda run: rewrite_metrics(run, lambda metrics: metrics.update(version=9)),
        TrainError,
        "Expected metrics.json of version 1.*found 9",
    ),
    "not Parquet": (lambda run: (run / "predictions.parquet").write_bytes(b"PAR1"), TrainError, "cannot be read"),
    "an earlier version": (
        lambda run: rewrite(run, lambda table: table.drop_columns(["fold_group"])),
        TrainError,
        "lacks the columns fold_group",
    ),
    "half": (lambda run: rewrite(run, lambda table: table.slice(3)), TrainError, "are of two evaluations"),
    "no number": (
        lambda run: rewrite(run, set_column("p_any", lambda values: [None, *values[1:]])),
        TrainError,
        "no numbers",
    ),
    "fewer slices": (
        lambda run: (
            rewrite(run, lambda table: table.slice(3)),
            rewrite_metrics(run, lambda m: m["evaluated"].update(slices=m["evaluated"]["slices"] - 3)),
        ),
        UsageError,
        r"evaluated on other slices\. Only [\d,]+ slices are in both.*--subset PART --out",
    ),
    "other labels": (
        lambda run: rewrite(run, set_column("any", lambda values: [1 - values[0], *values[1:]])),
        UsageError,
        "the labels of 1 slice differ",
    ),
    "other patients": (
        lambda run: rewrite(run, set_column("fold_group", lambda values: ["somebody", *values[1:]])),
        UsageError,
        "belong to other patients",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused(pair: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    change, kind, message = REFUSED[case]
    change(pair[1])
    with pytest.raises(kind, match=f"(?s){message}"):
        compare(pair, tmp_path / "c.html", resamples=3, seed=0)
    assert not list(tmp_path.glob("c.*"))


def test_other_classes_are_refused(runs: Path) -> None:
    first = read_evaluation(runs / "first")
    fewer = first.summary.by_slice.model_copy(update={"labels": {"any": first.summary.by_slice.labels["any"]}})
    other = replace(first, folder=runs / "second", summary=first.summary.model_copy(update={"by_slice": fewer}))
    with pytest.raises(UsageError, match="their classes differ: any, and epidural"):
        require_same_cases(first, other)


def test_slices_that_share_a_uid_are_not_matched_across_datasets(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for run in pair:
        rewrite(run, set_column("sop_instance_uid", lambda values: [values[1], *values[1:]]))
    compare(pair, tmp_path / "c.html", resamples=3, seed=0)  # of one dataset, by row
    rewrite_metrics(pair[1], lambda metrics: metrics["dataset"].update(digest="e" * 64))
    with pytest.raises(UsageError, match="share one SOP Instance UID"):
        compare(pair, tmp_path / "c.html", resamples=3, seed=0)


def test_the_command(runs: Path, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    folders = [runs / name for name in ("first", "second")]
    assert call("compare", *folders, "--bootstrap", 20) == 0
    printed = capsys.readouterr().err
    assert "B − A" in printed and "Mean ROC AUC by slice" in printed and "Comparison: compare.html" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"compare.html", "compare.json", "compare.csv"}
    for words, message in (
        ((folders[0],), "at least two runs"),
        ((folders[0], folders[0] / ".." / "first"), "is the same folder as"),
        ((*folders, "--out", "c.txt"), "must end with .html"),
        ((folders[0], tmp_path / "none"), "there is no such folder"),
        ((folders[0], runs), "has not been evaluated"),
        ((folders[0], runs / "first-cv"), "evaluated on other slices"),
        ((*folders, "--bootstrap", -1), "bootstrap"),
    ):
        assert call("compare", *words) == 2
        assert message in capsys.readouterr().err


def test_a_cross_validation_names_its_runs(
    runs: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = runs / "first-cv"
    assert call("predict", out, "--src", runs / "data.zarr", "--out", "p.csv") == 1
    printed = " ".join(capsys.readouterr().err.split())
    assert "is a cross-validation: it has no network of its own, but those of its 2 runs" in printed
    assert f"{out / 'fold-0'} {out / 'fold-2'}" in printed
    assert call("predict", out / "fold-0", out / "fold-2", "--src", runs / "data.zarr", "--out", "p.csv") == 0


def test_eval_says_what_it_replaces(
    runs: Path, tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(runs / "first", tmp_path / "run"))
    assert call("eval", run) == 0
    assert "replaced" not in capsys.readouterr().err
    rewrite_metrics(run, lambda metrics: metrics["dataset"].update(digest="ab" * 32))  # before the dataset grew
    assert call("eval", run) == 0
    assert "This replaced the evaluation of the part test of data.zarr, digest abababababab" in capsys.readouterr().err
    assert call("eval", run, "--subset", "val") == 0
    assert "This replaced the evaluation of the part test" in capsys.readouterr().err
