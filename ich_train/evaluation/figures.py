"""The pictures of an evaluation: which slices, layers and curves are drawn; `ich_train.evaluation.plots` draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ich_prep.dataset.classes import ANY
from ich_train.evaluation.calibration import reliability
from ich_train.evaluation.metrics import POLICIES, precision_recall_curves, roc_curves
from ich_train.evaluation.plots import (
    Example,
    LayerMaps,
    confusion_panels,
    example_sheet,
    feature_maps,
    history_curve,
    precision_recall_panels,
    reliability_diagram,
    roc_panels,
)
from ich_train.loader import SliceLoader
from ich_train.model import conv_layers
from ich_train.temperature import scaled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset
    from ich_train.evaluation.cases import Cases
    from ich_train.evaluation.metrics import Curve
    from ich_train.predict import Predictor
    from ich_train.runs import Epoch

SHEET_COLUMNS = 4  # slices in a line of a sheet


def curves_of(cases: Cases) -> dict[str, dict[str, Curve]]:
    """Return the curves of each label: ``roc`` and ``precision_recall``."""
    given = cases.labels, cases.probabilities, cases.classes
    return {"roc": roc_curves(*given), "precision_recall": precision_recall_curves(*given)}


def draw_results(
    dataset: Dataset,
    predictor: Predictor,
    cases: Cases,
    curves: Mapping[str, Mapping[str, Curve]],
    metrics: Mapping[str, Any],
) -> dict[str, Figure]:
    """Return the pictures of what was measured, by name; of ``predictor`` only what its network sees is used."""
    view = metrics["by_slice"]
    figures = {
        "roc": roc_panels(curves["roc"], view),
        "precision_recall": precision_recall_panels(curves["precision_recall"], view),
    }
    if (cases.slice_labels >= 0).any():
        figures["reliability"] = draw_reliability(cases, metrics["calibration"]["temperature"])
    figures |= {f"confusion_{policy}": confusion_panels(view, policy) for policy in POLICIES}
    for name in cases.classes:
        threshold = view["labels"][name]["at_best_f1"]["threshold"]
        figures[f"sheet_{name}"] = draw_sheet(dataset, predictor, cases, name, 0.5 if threshold is None else threshold)
    return figures


def draw_network(dataset: Dataset, predictor: Predictor, cases: Cases) -> dict[str, Figure]:
    """Return the feature maps of one of ``cases`` by name, nothing for a network of volumes."""
    if predictor.slice_network is None:
        return {}
    return {"feature_maps": draw_feature_maps(dataset, predictor, most_certain(cases))}


def draw_history(history: Sequence[Epoch], kept: int | None) -> dict[str, Figure]:
    """Return the curves of loss and accuracy by name; ``kept`` is the epoch whose weights are evaluated, if it is one."""
    epochs = [line.epoch for line in history]
    return {
        quantity: history_curve(
            epochs,
            [getattr(line, f"train_{quantity}") for line in history],
            [getattr(line, f"val_{quantity}") for line in history],
            quantity=quantity,
            kept=kept,
        )
        for quantity in ("loss", "accuracy")
    }


def draw_reliability(cases: Cases, temperature: float | None) -> Figure:
    """Return the reliability diagram of the probabilities and, if there is a ``temperature``, of those scaled by it."""
    curves = {"as predicted": reliability(cases.slice_labels, cases.probabilities)}
    if temperature is not None:
        of_scaled = reliability(cases.slice_labels, scaled(cases.probabilities, temperature))
        curves[f"scaled, T = {temperature:.2f}"] = of_scaled
    return reliability_diagram({name: (bins.predicted, bins.observed) for name, bins in curves.items()})


def draw_sheet(dataset: Dataset, predictor: Predictor, cases: Cases, label: str, threshold: float) -> Figure:
    """Return the slices on which the network was most certain of ``label``, right and wrong, with their windows.

    At most one slice of a series in each of the four groups, so that one bleed does not fill the sheet.
    """
    j = cases.classes.index(label)
    probability, truth = cases.probabilities[:, j], cases.labels[:, j]
    predicted = probability >= threshold
    groups = {}
    for title, end, chosen, certainty in (
        ("True positives", "highest", (truth == 1) & predicted, probability),
        ("False positives", "highest", (truth == 0) & predicted, probability),
        ("False negatives", "lowest", (truth == 1) & ~predicted, -probability),
        ("True negatives", "lowest", (truth == 0) & ~predicted, -probability),
    ):
        best = np.flatnonzero(chosen)
        best = best[np.argsort(-certainty[best], kind="stable")]
        _, first = np.unique(cases.series[best], return_index=True)
        picked = best[np.sort(first)[:SHEET_COLUMNS]]
        groups[f"{title}: {chosen.sum():,}, the {end} probability first"] = [
            Example(_windows(dataset, predictor, cases.rows[k]), f"p {probability[k]:.3f} · row {cases.rows[k]}")
            for k in picked
        ]
    return example_sheet(groups, columns=SHEET_COLUMNS)


def draw_feature_maps(dataset: Dataset, predictor: Predictor, row: int) -> Figure:
    """Return the feature maps of each convolution layer of the network for the slice ``row``."""
    context, network = predictor.meta.context, predictor.slice_network
    assert network is not None
    loader = SliceLoader(dataset, np.array([row]), batch_size=1, order="sequential", context=context, pin=False)
    layers = conv_layers(network)
    maps: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output, name=name: maps.update({name: output}))
        for name, layer in layers
    ]
    (batch,) = loader
    images = batch.images.to(predictor.device)
    with torch.inference_mode():
        network(predictor.preprocess(images))
    for handle in handles:
        handle.remove()
    # In the order of the forward pass.
    reached = [LayerMaps(name, output[0].float().cpu().numpy()) for name, output in maps.items()]
    return feature_maps(predictor.preprocess.codes(images)[0].cpu().numpy(), reached)


def most_certain(cases: Cases) -> int:
    """Return the row of the highest probability of ``any``, or of all classes without it; if possible of a positive."""
    columns = [cases.classes.index(ANY)] if ANY in cases.classes else slice(None)
    probability, truth = cases.probabilities[:, columns], cases.labels[:, columns]
    return int(cases.rows[np.argmax((probability + (truth == 1)).max(axis=1))])


def _windows(dataset: Dataset, predictor: Predictor, row: int) -> NDArray[np.uint8]:
    """Return the windows of one slice as 8-bit codes (channel, y, x), without its neighbours."""
    images = torch.from_numpy(dataset.read([row])).to(predictor.device)
    codes: NDArray[np.uint8] = predictor.preprocess.codes(images)[0].cpu().numpy()
    return codes
