from __future__ import annotations

import base64
from html.parser import HTMLParser

import numpy as np
import pytest

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.html import NOTICE
from ich_train.evaluation.calibration import calibration
from ich_train.evaluation.metrics import best_f1_thresholds, measure, roc_aucs
from ich_train.evaluation.report import CAPTIONS, report_html
from ich_train.runs import Epoch

VOID = {"meta", "img"}
PICTURES = {name: name.encode() for name in (*CAPTIONS, *(f"sheet_{name}" for name in RSNA_CLASSES))}


class Page(HTMLParser):
    """Collects the text and the sources of a page, and fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.sources, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name == "src"]
        self.links += [value for name, value in attrs if name == "href"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    parser = Page()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


def epoch(k, train_accuracy, val_accuracy):
    return Epoch(k, 1.0, 0.5 / k, train_accuracy, 0.6 + abs(k - 2), val_accuracy, 1e-3, 500.0, 0.01)


HISTORY = [epoch(1, 0.7, 0.7), epoch(2, 0.8, 0.8)]


@pytest.fixture
def metrics():
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 6)) < [0, 0.2, 0.2, 0.2, 0.3, 0.5]).astype(np.int8)
    probabilities = rng.random((60, 6))
    view = measure(
        labels,
        probabilities,
        np.arange(60) // 6,
        best_f1_thresholds(labels, probabilities),
        classes=RSNA_CLASSES,
        resamples=9,
        seed=0,
    ) | {"position_only": roc_aucs(labels, rng.random((60, 6)), RSNA_CLASSES)}
    part = {"slices": 60, "series": 10, "patients": 10, "positives": dict.fromkeys(RSNA_CLASSES, 3)}
    return {
        "model": {
            "network": "baseline",
            "images": {"size": 64},
            "context": 1,
            "epoch": 2,
            "windows": [{"name": "brain", "center": 40.0, "width": 80.0}],
        },
        "dataset": {
            "name": "<b>data & more</b>.zarr",
            "digest": "0f" * 32,
            "trained_on": True,
            "patient_is_study": 0,
            "slices": 180,
            "series": 30,
            "patients": 30,
            "parts": {"train": part, "val": part, "test": part},
        },
        "evaluated": {
            "subset": "test",
            "limit": None,
            "seed": 3,
            "bootstrap": 9,
            "slices": 60,
            "series_labels": False,
        },
        "calibration": calibration(labels, probabilities, labels, probabilities, RSNA_CLASSES),
        "operating_point": None,
        "by_slice": view,
        "by_series_max": view,
        "by_series_mean": view,
    }


def test_page_is_whole_and_holds_every_picture(metrics):
    page = parse(report_html(metrics, HISTORY, PICTURES))
    assert [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources] == [
        *(PICTURES[name] for name in CAPTIONS if name != "feature_maps"),
        PICTURES["sheet_any"],
        *(PICTURES[f"sheet_{name}"] for name in RSNA_CLASSES if name != "any"),
        PICTURES["feature_maps"],
    ]
    text = "".join(page.text)
    assert text.count(NOTICE) == 2
    assert "brain 40/80" in text
    assert "neighbouring slices on each side: 1" in text
    assert "2 (kept)" in text
    assert "By series, mean over slices" in text


def test_nothing_is_fetched_and_names_are_escaped(metrics):
    html = report_html(metrics, HISTORY, PICTURES)
    assert "://" not in html
    assert "<script" not in html
    assert all(link.startswith("#") for link in parse(html).links)
    assert "<b>data" not in html
    assert "<b>data & more</b>.zarr" in "".join(parse(html).text)


def test_what_is_undefined_is_called_so(metrics):
    labels = metrics["by_slice"]["labels"]
    assert labels["epidural"]["roc_auc"] is None
    html = report_html(metrics, HISTORY, PICTURES)
    assert "undefined</span>" in html
    assert "None" not in html
    assert "nan" not in "".join(parse(html).text)
    assert "5 of 6 labels" in html


def notes(metrics, history=HISTORY):
    html = report_html(metrics, history, PICTURES)
    return [part.split("</p>")[0] for part in html.split('<p class="note">')[1:]]


def test_a_plain_run_has_no_notes(metrics):
    assert notes(metrics) == []


def test_overfitting_is_noted_with_its_epoch(metrics):
    history = [epoch(1, 0.7, 0.7), epoch(2, 0.8, 0.8), epoch(3, 0.9, 0.7), epoch(4, 0.95, 0.6)]
    (note,) = notes(metrics, history)
    assert note.startswith("Overfitting since epoch 3: epoch 2 has the lowest validation loss, 0.6000;")


def test_a_draw_has_no_series_and_says_so(metrics):
    metrics["evaluated"] |= {"limit": 60}
    metrics |= {"by_series_max": None, "by_series_mean": None}
    (note,) = notes(metrics)
    assert "drawn with seed 3" in note
    assert "By series" not in report_html(metrics, HISTORY, PICTURES)


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        (
            "evaluated",
            {"subset": "val"},
            "chosen on some of them. Only the part test is unseen.",
        ),
        ("evaluated", {"series_labels": True}, "read the results by series"),
        (
            "dataset",
            {"patient_is_study": 1200},
            "Without PatientID, among the slices evaluated or to train on: 1,200 slices.",
        ),
        ("dataset", {"trained_on": False}, "not the dataset that the network was trained on"),
    ],
)
def test_what_weakens_the_numbers_is_noted(metrics, part, values, words):
    metrics[part] |= values
    (note,) = notes(metrics)
    assert words in note


@pytest.mark.parametrize(
    ("subset", "slices", "words"),
    [
        ("test", 60, "were found on its part val."),
        ("val", 60, "were found on its part val, which is evaluated too"),
        ("all", 60, "were found on its part val, which is evaluated too"),
        ("all", 0, "no thresholds of best F1"),
    ],
)
def test_of_another_dataset_it_is_said_where_thresholds_come_from(metrics, subset, slices, words):
    data = metrics["dataset"]
    data |= {"trained_on": False, "parts": data["parts"] | {"val": data["parts"]["val"] | {"slices": slices}}}
    metrics["evaluated"] |= {"subset": subset}
    (note,) = notes(metrics)
    assert words in note


def test_without_any_there_is_no_number_of_it(metrics):
    """Classes are those of the metrics: a dataset of others than RSNA's has a plain log loss."""
    for name in ("by_slice", "by_series_max", "by_series_mean"):
        metrics[name] = {**metrics[name], "labels": {"mass": metrics[name]["labels"]["any"]}}
        metrics[name]["position_only"] = {"mass": 0.5}
    for part in metrics["dataset"]["parts"].values():
        part["positives"] = {"mass": 3}
    page = parse(report_html(metrics, HISTORY, {**PICTURES, "sheet_mass": b"mass"}))
    text = "".join(page.text)
    assert "of any" not in text
    assert "weighted" not in text
    assert "of 1 label" in text
    assert "of 1 labels" not in text
    assert base64.b64encode(b"mass").decode() in page.sources[-2]
