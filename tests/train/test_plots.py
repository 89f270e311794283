from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from ich_prep.dataset.classes import RSNA_CLASSES
from ich_train.evaluation import plots
from ich_train.evaluation.metrics import best_f1_thresholds, measure, precision_recall_curves, roc_curves

RNG = np.random.default_rng(0)
LABELS = (RNG.random((120, 6)) < [0, 0.2, 0.2, 0.2, 0.3, 0.5]).astype(np.int8)  # never an epidural bleed
PROBABILITIES = np.clip(RNG.random((120, 6)) * 0.6 + LABELS * 0.3, 0, 1)


@pytest.fixture(scope="module")
def measures():
    thresholds = best_f1_thresholds(LABELS, PROBABILITIES)
    return measure(LABELS, PROBABILITIES, np.arange(120) // 6, thresholds, classes=RSNA_CLASSES, resamples=20, seed=0)


def pixels(figure):
    file = plots.png(figure)
    assert file.startswith(b"\x89PNG")
    return imread(io.BytesIO(file))


def texts(figure):
    return [text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))]


def inked(image):
    """Share of pixels that are not white."""
    return (image[..., :3] < 0.99).any(axis=-1).mean()


def history(kept):
    return plots.history_curve([1, 2, 3], [0.5, 0.4, 0.3], [0.6, 0.5, 0.55], quantity="loss", kept=kept)


def test_equal_figures_are_equal_files():
    assert plots.png(history(2)) == plots.png(history(2))
    assert plots.png(history(2)) != plots.png(history(3))


def test_history_of_one_epoch_is_drawn():
    figure = plots.history_curve([1], [0.5], [0.6], quantity="accuracy", kept=1)
    assert inked(pixels(figure)) > 0.005
    assert {"epoch", "accuracy", "training", "validation", "kept: epoch 1"} <= set(texts(figure))


@pytest.mark.parametrize(
    ("draw", "curves", "word"),
    [
        (plots.roc_panels, roc_curves, "AUC"),
        (plots.precision_recall_panels, precision_recall_curves, "AP"),
    ],
)
def test_panels_name_every_label_and_say_what_is_undefined(measures, draw, curves, word):
    figure = draw(curves(LABELS, PROBABILITIES, RSNA_CLASSES), measures)
    found = texts(figure)
    assert set(RSNA_CLASSES) <= set(found)
    assert found.count(f"{word} undefined") == 1
    name = {"AUC": "roc_auc", "AP": "average_precision"}[word]
    assert any(text.startswith(f"{word} {measures['labels']['any'][name]:.3f} (") for text in found)
    assert inked(pixels(figure)) > 0.02


def test_confusion_shows_counts_and_what_is_undefined(measures):
    figure = plots.confusion_panels(measures, "at_best_f1")
    found = texts(figure)
    assert found.count("undefined") == 1
    assert {str(measures["labels"]["any"]["at_best_f1"][count]) for count in ("tn", "fp", "fn", "tp")} <= set(found)
    assert inked(pixels(figure)) > 0.2
    assert "undefined" not in texts(plots.confusion_panels(measures, "at_half"))


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_has_room_for_groups_without_slices(channels):
    example = plots.Example(np.zeros((channels, 32, 32), np.uint8), "p 0.900 · row 7")
    figure = plots.example_sheet({"hits": [example] * 3, "errors": []}, columns=4)
    assert texts(figure).count("p 0.900 · row 7") == 3
    assert {"hits", "errors"} <= set(texts(figure))
    assert inked(pixels(figure)) > 0.3
    assert inked(pixels(plots.example_sheet({"hits": [], "errors": []}, columns=4))) < 0.2


def test_feature_maps_show_the_strongest_maps_first():
    maps = np.zeros((40, 8, 8), np.float32)
    maps[17, :4] = 5.0
    layers = [plots.LayerMaps("conv1", maps), plots.LayerMaps("conv2", np.ones((3, 2, 2), np.float32))]
    figure = plots.feature_maps(np.full((3, 16, 16), 255, np.uint8), layers)
    titles = texts(figure)
    assert "conv1: 32 of 40 maps of 8 × 8" in titles
    assert "conv2: 3 of 3 maps of 2 × 2" in titles
    slice_seen, first, second = (axes.images[0].get_array() for axes in figure.axes)
    assert np.ma.count(slice_seen[:16, :16]) == 256
    assert (first[:4, :8] == 1).all()
    assert not first[4:8, :8].any()
    assert not np.ma.filled(second, 0).any()  # constant maps stay dark
    assert inked(pixels(figure)) > 0.3


def test_many_layers_get_a_line_each():
    layers = [plots.LayerMaps(f"conv{k}", RNG.random((16, 4, 4)).astype(np.float32)) for k in range(9)]
    figure = plots.feature_maps(np.zeros((1, 16, 16), np.uint8), layers)
    assert "conv8: 8 of 16 maps of 4 × 4" in texts(figure)


def test_no_picture_is_longer_than_a_browser_draws():
    file = plots.png(Figure(figsize=(0.1, 400)))
    assert imread(io.BytesIO(file)).shape[0] == 30_000


def test_pyplot_is_never_imported():
    code = "import sys, ich_train.evaluation.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7])
def test_any_number_of_labels_has_a_panel_each(count):
    classes = [f"label_{k}" for k in range(count)]
    labels = (RNG.random((80, count)) < 0.4).astype(np.int8)
    probabilities = RNG.random((80, count))
    thresholds = best_f1_thresholds(labels, probabilities)
    view = measure(labels, probabilities, np.arange(80) // 4, thresholds, classes=classes, resamples=3, seed=0)
    for figure in (
        plots.roc_panels(roc_curves(labels, probabilities, classes), view),
        plots.precision_recall_panels(precision_recall_curves(labels, probabilities, classes), view),
        plots.confusion_panels(view, "at_half"),
    ):
        assert set(classes) <= set(texts(figure))
        assert sum(axes.axison for axes in figure.axes) == count
        assert inked(pixels(figure)) > 0.005
