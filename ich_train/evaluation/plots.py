"""Pictures of a run: how training went, how good the probabilities are, the network's feature maps.

Every function takes numbers and returns a new figure; no function here reads folders or datasets. The figures are
drawn without pyplot: no state is shared, and no display is needed.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ich_prep.html import BLUE, FAINT, GREY, INK, MUTED, ORANGE
from ich_prep.messages import escaped_line
from ich_train.evaluation.metrics import POLICY_WORDS, Curve
from ich_train.runs import Epoch

SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", BLUE])
DPI = 140
LONGEST_SIDE = 30_000  # pixels; browsers draw no image of more than 32,767


@dataclass(frozen=True)
class Example:
    """One slice of a sheet."""

    windows: npt.NDArray[np.uint8]  # (channel, y, x)
    caption: str


@dataclass(frozen=True)
class LayerMaps:
    """The output of one convolution layer for one slice."""

    name: str
    maps: npt.NDArray[np.float32]  # (channel, y, x)


def png(figure: Figure) -> bytes:
    """Return ``figure`` as a PNG file; equal figures give equal bytes."""
    file = io.BytesIO()
    dpi = min(DPI, LONGEST_SIDE / max(figure.get_size_inches()))
    figure.savefig(file, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def history_curve(
    epochs: Sequence[int], training: Sequence[float], validation: Sequence[float], *, quantity: str, kept: int | None
) -> Figure:
    """Return the ``quantity`` in training and validation over the epochs, the epoch whose weights were kept marked."""
    figure = _figure(5.6, 3.6)
    axes = figure.add_subplot()
    _style(axes, x="epoch", y=quantity)
    if kept is not None:
        axes.axvline(kept, color=FAINT, linewidth=5, alpha=0.6, zorder=0)
        mark: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "color": MUTED, "size": 8, "ha": "center"}
        axes.text(kept, 1.02, f"kept: epoch {kept}", **mark)
    for values, colour, name in ((training, GREY, "training"), (validation, BLUE, "validation")):
        axes.plot(epochs, values, color=colour, linewidth=1.8, marker="o", markersize=4, label=name, clip_on=False)
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def reliability_diagram(curves: Mapping[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]) -> Figure:
    """Return the share of positives over the mean probability of each bin, a line for each of ``curves`` by name."""
    figure = _figure(4.6, 4.6)
    axes = figure.add_subplot()
    _style(axes, x="predicted probability", y="share of positives", unit_square=True)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    for (name, (predicted, observed)), colour in zip(curves.items(), (GREY, BLUE), strict=False):
        axes.plot(predicted, observed, color=colour, linewidth=1.8, marker="o", markersize=4, label=name, clip_on=False)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def history_curves(names: Sequence[str], histories: Mapping[str, Sequence[Epoch]], quantity: str) -> Figure:
    """Return the ``quantity``, loss or accuracy, of several runs over their epochs: validation, and dotted training.

    ``names`` are those of all runs, some of which may have no history: a run has one colour in all figures.
    """
    figure = _figure(5.6, 3.6)
    axes = figure.add_subplot()
    _style(axes, x="epoch", y=quantity)
    for name, line in zip(names, _run_lines(), strict=False):
        history = histories.get(name, ())
        epochs = [of.epoch for of in history]
        axes.plot(epochs, [getattr(of, f"val_{quantity}") for of in history], **line, marker="o", markersize=3.5)
        dotted = line | {"linestyle": (0, (1, 2)), "linewidth": 1.2}
        axes.plot(epochs, [getattr(of, f"train_{quantity}") for of in history], **dotted)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _run_legend(figure, names)
    return figure


def run_curves(labels: Sequence[str], curves: Mapping[str, Mapping[str, Curve]], x: str, y: str) -> Figure:
    """Return a panel for each of ``labels`` with the curve of each run; ``curves`` are by run, then by label."""
    figure = _figure(*_grid_size(labels, panel=(3.2, 3.3), beside=0.4))
    for label, axes in _label_panels(figure, labels):
        _style(axes, x=x, y=y, unit_square=True)
        axes.set_title(label, loc="left", color=INK, size=10, weight="bold")
        for of_run, line in zip(curves.values(), _run_lines(), strict=False):
            if label in of_run:
                axes.plot(of_run[label].x, of_run[label].y, **line)
        if not any(label in of_run for of_run in curves.values()):
            axes.text(0.5, 0.5, "undefined", ha="center", va="center", color=MUTED, size=10)
    _run_legend(figure, [*curves])
    return figure


def difference_bars(differences: Mapping[str, Mapping[str, tuple[float | None, Sequence[float] | None]]]) -> Figure:
    """Return a panel for each pair of runs: a dot for each class at its difference, and a line over its interval.

    ``differences`` are by pair, then by class: the difference and its interval, None if undefined.
    """
    lines = max(*map(len, differences.values()), 1)
    figure = _figure(max(3.4 * len(differences), 8.6), 0.9 + 0.3 * lines)
    for pair, axes in zip(
        differences, figure.subplots(1, len(differences), squeeze=False, sharey=True).flat, strict=True
    ):
        _style(axes, x=pair, y="")
        axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        entries = differences[pair]
        for place, (value, bounds) in enumerate(entries.values()):
            if value is None:
                continue
            colour = GREY if bounds is None or bounds[0] <= 0 <= bounds[1] else BLUE
            if bounds is not None:
                axes.plot(bounds, [place, place], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot([value], [place], color=colour, marker="o", markersize=6, linestyle="")
        axes.set_yticks(range(len(entries)), [*entries])
        axes.set_ylim(len(entries) - 0.5, -0.5)
    return figure


def _run_lines() -> Iterator[dict[str, Any]]:
    """Yield how the line of each run is drawn: as many as are asked for, all different."""
    for style in ((0, ()), (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (9, 2))):
        for colour in (BLUE, ORANGE, "#2f7d4f", "#7a4b9e", "#b7860b", GREY):
            yield {"color": colour, "linestyle": style, "linewidth": 1.8}


def _run_legend(figure: Figure, names: Sequence[str]) -> None:
    handles = [Line2D([], [], **line) for _, line in zip(names, _run_lines(), strict=False)]
    shown = [escaped_line(name[:40]) for name in names]
    legend = figure.legend(
        handles, shown, loc="outside lower center", ncols=2, frameon=False, fontsize=8, labelcolor=MUTED
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def roc_panels(curves: Mapping[str, Curve], measures: Mapping[str, Any]) -> Figure:
    """Return the ROC curve of each label in its own panel, the other labels in grey.

    ``measures`` is the by-slice result of `ich_train.evaluation.metrics.measure`: it gives the areas, and the points of
    the two thresholds.
    """
    figure = _figure(*_grid_size(measures["labels"], panel=(3.2, 3.45), beside=0.4))
    for name, axes in _label_panels(figure, measures["labels"]):
        _style(axes, x="false positive rate", y="true positive rate", unit_square=True)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        entry = measures["labels"][name]
        points = {}
        for policy in POLICY_WORDS:
            at = entry[policy]
            if at["recall"] is not None:
                points[policy] = (at["fp"] / (at["fp"] + at["tn"]), at["recall"])
        _curve_panel(axes, curves, name, points, note=_with_interval("AUC", entry, "roc_auc"))
    _policy_legend(figure)
    return figure


def precision_recall_panels(curves: Mapping[str, Curve], measures: Mapping[str, Any]) -> Figure:
    """Return precision over recall of each label in its own panel, dotted at the share of positives."""
    figure = _figure(*_grid_size(measures["labels"], panel=(3.2, 3.45), beside=0.4))
    for name, axes in _label_panels(figure, measures["labels"]):
        _style(axes, x="recall", y="precision", unit_square=True)
        entry = measures["labels"][name]
        cases = entry["positives"] + entry["negatives"]
        if cases:
            axes.axhline(entry["positives"] / cases, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        points = {}
        for policy in POLICY_WORDS:
            at = entry[policy]
            if at["recall"] is not None and at["precision"] is not None:
                points[policy] = (at["recall"], at["precision"])
        _curve_panel(axes, curves, name, points, note=_with_interval("AP", entry, "average_precision"))
    _policy_legend(figure)
    return figure


def confusion_panels(measures: Mapping[str, Any], policy: str) -> Figure:
    """Return the confusion matrix of each label at the threshold of ``policy``, shaded by the share of its row."""
    figure = _figure(*_grid_size(measures["labels"], panel=(8.6 / 3, 3.1), beside=0.0))
    for name, axes in _label_panels(figure, measures["labels"]):
        at = measures["labels"][name][policy]
        axes.set_title(name, loc="left", color=INK, size=10, weight="bold")
        axes.set_xticks([0, 1], ["no", "yes"], color=MUTED, size=8)
        axes.set_yticks([0, 1], ["no", "yes"], color=MUTED, size=8)
        axes.set_xlabel("predicted", color=MUTED, size=8)
        axes.set_ylabel("label", color=MUTED, size=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_color(FAINT)
        if at["tp"] is None:
            axes.imshow(np.zeros((2, 2)), cmap=SHADES, vmin=0, vmax=1)
            axes.text(0.5, 0.5, "undefined", ha="center", va="center", color=MUTED, size=10)
            continue
        matrix = np.array([[at["tn"], at["fp"]], [at["fn"], at["tp"]]])
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axes.imshow(share, cmap=SHADES, vmin=0, vmax=1)
        axes.set_title(f"p ≥ {at['threshold']:.3g}", loc="right", color=MUTED, size=8)
        for y in range(2):
            for x in range(2):
                colour = "white" if share[y, x] > 0.55 else INK
                axes.text(x, y - 0.06, f"{matrix[y, x]:,}", ha="center", va="center", color=colour, size=13)
                axes.text(x, y + 0.2, f"{share[y, x]:.1%}", ha="center", va="center", color=colour, size=8)
    return figure


def example_sheet(groups: Mapping[str, Sequence[Example]], *, columns: int) -> Figure:
    """Return a sheet with a line of slices for each group, each slice with its windows side by side.

    ``columns`` is how many slices a line has room for. All slices have the same number of windows.
    """
    windows = max((len(example.windows) for examples in groups.values() for example in examples), default=1)
    width, gap, title, caption = 10.0, 0.12, 0.34, 0.2  # inches
    tile = (width - gap * (columns - 1)) / columns  # of one slice, all its windows
    heights = [title + (caption + tile / windows if group else 0) for group in groups.values()]
    figure = _figure(width, sum(heights), constrained=False)
    total, top = figure.get_figheight(), 0.0
    for (name, group), height in zip(groups.items(), heights, strict=True):
        figure.text(0.0, 1 - (top + title - 0.1) / total, name, color=INK, size=9, weight="bold")
        for k, example in enumerate(group):
            place = (k * (tile + gap) + tile / 2) / width, 1 - (top + title + caption - 0.06) / total
            figure.text(*place, example.caption, color=MUTED, size=7, ha="center")
        top += height
        if group:
            # One image a line: axes cost more than what they show.
            thin = max(1, group[0].windows.shape[2] // 128)
            slices = [_beside(example.windows, gap=thin) for example in group]
            line = _beside(slices, gap=round(slices[0].shape[1] * gap / tile))
            share = line.shape[1] / slices[0].shape[1] * tile / width
            axes = figure.add_axes((0.0, 1 - top / total, share, tile / windows / total))
            axes.set_axis_off()
            axes.imshow(line, cmap="gray", vmin=0, vmax=255, aspect="auto")
    return figure


def feature_maps(windows: npt.NDArray[np.uint8], layers: Sequence[LayerMaps], *, columns: int = 8) -> Figure:
    """Return the feature maps of each convolution layer for one slice: the slice first, then a block for each layer.

    ``windows`` (channel, y, x) are what the network saw. Of each layer the maps with the largest spread are shown, the
    strongest first, each from its own 1st to its 99th percentile: up to 32 in networks of few layers, else one line.
    """
    lines = 4 if len(layers) <= 8 else 1
    count, y, x = windows.shape
    seen = _mosaic((windows / 255).astype(np.float32), columns)
    blocks = [(f"the slice as the network sees it: {count} channels of {y} × {x}", seen, "gray")]
    for layer in layers:
        count, y, x = layer.maps.shape
        strongest = np.argsort(-layer.maps.std(axis=(1, 2)), kind="stable")[: columns * lines]
        shown = _mosaic(np.stack([_stretched(layer.maps[k]) for k in strongest]), columns)
        blocks.append((f"{layer.name}: {len(strongest)} of {count} maps of {y} × {x}", shown, "magma"))
    width, room = 9.6, 0.32  # inches; the room is the title's
    heights = [width * shown.shape[0] / shown.shape[1] for _, shown, _ in blocks]
    figure = _figure(width, sum(heights) + room * len(heights), constrained=False)
    total, top = figure.get_figheight(), 0.0
    for (title, shown, colours), height in zip(blocks, heights, strict=True):
        top += room + height
        axes = figure.add_axes((0.0, 1 - top / total, 1.0, height / total))
        axes.set_axis_off()
        axes.imshow(shown, cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_title(title, loc="left", color=INK, size=9, pad=4, x=0.006)
    return figure


def _figure(width: float, height: float, *, constrained: bool = True) -> Figure:
    figure = Figure(
        figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08) if constrained else None
    )
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes, *, x: str, y: str, unit_square: bool = False) -> None:
    axes.set_xlabel(x, color=MUTED, size=9)
    axes.set_ylabel(y, color=MUTED, size=9)
    axes.tick_params(color=FAINT, labelcolor=MUTED, labelsize=8)
    axes.grid(color=FAINT, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_color(FAINT)
        spine.set_visible(side in ("left", "bottom"))
    if unit_square:
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])


def _grid(labels: Collection[str]) -> tuple[int, int]:
    """Return the rows and columns of panels for ``labels``: six of them stand in two rows of three."""
    columns = {1: 1, 2: 2, 4: 2}.get(len(labels), 3)
    return -(-len(labels) // columns), columns


def _grid_size(labels: Collection[str], *, panel: tuple[float, float], beside: float) -> tuple[float, float]:
    """Return the width and height in inches of a figure with a panel for each of ``labels``, and ``beside`` for a legend."""
    rows, columns = _grid(labels)
    return max(panel[0] * columns, 4.8), panel[1] * rows + beside


def _label_panels(figure: Figure, labels: Collection[str]) -> Iterator[tuple[str, Axes]]:
    panels = figure.subplots(*_grid(labels), squeeze=False).flat
    for name, axes in zip_longest(labels, panels):
        if name is None:
            axes.set_axis_off()
        else:
            yield name, axes


def _curve_panel(
    axes: Axes, curves: Mapping[str, Curve], name: str, points: Mapping[str, tuple[float, float]], *, note: str
) -> None:
    axes.set_title(name, loc="left", color=INK, size=10, weight="bold", pad=20)
    axes.text(0, 1.025, note, transform=axes.transAxes, color=MUTED, size=8.5)
    for other, curve in curves.items():
        if other != name:
            axes.plot(curve.x, curve.y, color=FAINT, linewidth=0.8)
    if name in curves:
        axes.plot(curves[name].x, curves[name].y, color=BLUE, linewidth=1.8)
    for policy, (x, y) in points.items():
        axes.plot([x], [y], **_marker(policy))


def _marker(policy: str) -> dict[str, Any]:
    fill = "white" if policy == "at_half" else ORANGE
    return {"marker": "o", "markersize": 6, "color": ORANGE, "markerfacecolor": fill, "clip_on": False, "linestyle": ""}


def _policy_legend(figure: Figure) -> None:
    handles = [Line2D([], [], **_marker(policy), label=words) for policy, words in POLICY_WORDS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8, labelcolor=MUTED)


def _with_interval(word: str, entry: Mapping[str, Any], name: str) -> str:
    if entry[name] is None:
        return f"{word} undefined"
    interval = entry["intervals"][name]
    return f"{word} {entry[name]:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _stretched(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    low, high = np.percentile(values, [1, 99])
    # A constant map has nothing to show and stays dark.
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)


def _beside(images: Iterable[npt.NDArray[np.uint8]], *, gap: int) -> npt.NDArray[np.uint8]:
    """Return images (y, x) as one, from left to right, with ``gap`` white columns between them."""
    pieces = [piece for image in images for piece in (np.full((len(image), gap), 255, np.uint8), image)]
    return np.concatenate(pieces[1:], axis=1)


def _mosaic(tiles: npt.NDArray[np.float32], columns: int) -> npt.NDArray[np.float32]:
    """Return tiles (n, y, x) in lines of ``columns``, NaN between them and where there is none."""
    n, y, x = tiles.shape
    gap = max(1, x // 32)
    lines = -(-n // columns)
    mosaic = np.full((lines * (y + gap) - gap, columns * (x + gap) - gap), np.nan, np.float32)
    for k, tile in enumerate(tiles):
        top, left = k // columns * (y + gap), k % columns * (x + gap)
        mosaic[top : top + y, left : left + x] = tile
    return mosaic
