"""Charts as inline SVG, in the colours of the page: counts in, markup out, never an element per slice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from ich_prep.html import escape

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 12, 34  # margins, for the labels of the axes
MAX_TICKS = 6


@dataclass(frozen=True)
class Band:
    """A range of the horizontal axis to draw in, with its name."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Histogram:
    """Counts of the values within each of the bins between ``edges``; ``below`` and ``above`` lie outside of all.

    ``whole``: the values are whole numbers.
    """

    counts: NDArray[np.int64]
    edges: NDArray[np.float64]
    below: int = 0
    above: int = 0
    whole: bool = False

    @property
    def total(self) -> int:
        """The number of values."""
        return int(self.counts.sum()) + self.below + self.above


def histogram_of(values: NDArray[np.float64], *, bins: int = 40, whole: bool = False) -> Histogram:
    """Return the histogram of the finite ``values`` between their 0.1% and 99.9% quantiles.

    ``whole``: the values are whole numbers, and so are the widths of bins.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return Histogram(np.zeros(1, np.int64), np.array([0.0, 1.0]))
    low, high = np.quantile(values, [0.001, 0.999], method="nearest").tolist()
    if whole:
        step = max(1, math.ceil((high - low + 1) / bins))
        edges = low - 0.5 + step * np.arange(math.ceil((high - low + 1) / step) + 1)
    else:
        step = tick_step(high - low, bins) if high > low else max(abs(low), 1) / 20
        first = math.floor(low / step)
        edges = step * (first + np.arange(math.floor(high / step) - first + 2))
    counts = np.histogram(values, edges)[0].astype(np.int64)
    return Histogram(counts, edges, int((values < edges[0]).sum()), int((values > edges[-1]).sum()), whole)


def histogram_chart(
    histogram: Histogram, *, name: str, unit: str, noun: str, log: bool = False, bands: Sequence[Band] = ()
) -> Markup:
    """Return a histogram as SVG; ``name`` says to a screen reader what it shows.

    ``unit`` names the horizontal axis, ``noun`` what is counted. ``log``: the heights are logarithms. The ``bands`` are
    drawn behind the bars.
    """
    counts, edges = histogram.counts, histogram.edges
    across = _Scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    top = int(max(counts.max(), 1))
    room = 1.3 if bands else 1.0  # for their names, above the bars
    up = _Scale(0, room * (math.log10(top + 1) if log else top), HEIGHT - BOTTOM, TOP)
    parts = [
        _band(band, across, line) for line, band in enumerate(bands) if band.high > edges[0] and band.low < edges[-1]
    ]
    for value in _heights(top, log=log):
        y = up(math.log10(value + 1) if log else value)
        parts.append(Markup('<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y))
        parts.append(_text(LEFT - 5, y + 4, short(value), "end"))
    for low, high, number in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist()):
        if number:
            y = up(math.log10(number + 1) if log else number)
            title = escape(f"{low:g} to {high:g} {unit}: {number:,} {noun}")
            parts.append(_bar(across(low), across(high), y, title))
    places = [v for v in ticks(edges[0], edges[-1]) if v == int(v) or not histogram.whole]
    parts += [_text(across(v), HEIGHT - BOTTOM + 14, f"{v:g}", "middle") for v in places]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, unit, "middle"))
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, escape(name), Markup("\n").join(parts)
    )


def ticks(low: float, high: float, most: int = MAX_TICKS) -> list[float]:
    """Return round numbers within ``low`` to ``high``, at most ``most`` and one more."""
    step = tick_step(high - low, most)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def tick_step(span: float, most: int) -> float:
    """Return the smallest of 1, 2, 5, 10, ... times a power of ten that is not above ``span`` over ``most``."""
    least = max(span, 1e-9) / most
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def short(value: float) -> str:
    """Return a count in few characters: 12k, 3.5M."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:g}"


@dataclass(frozen=True)
class _Scale:
    """A linear map from ``low`` to ``high`` onto ``start`` to ``end``, in the units of the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0), 1) * (self.end - self.start)


def _heights(top: int, *, log: bool) -> list[float]:
    if not log:
        return [value for value in ticks(0, top, 4) if value == int(value)]
    powers = range(0, math.floor(math.log10(top)) + 1)
    return [10.0**power for power in powers[:: math.ceil(len(powers) / 5)]]


def _band(band: Band, across: _Scale, line: int) -> Markup:
    left, right = across(band.low), across(band.high)
    y = TOP + 10 + 13 * line
    bounds = Markup("").join(
        Markup('<line class="bound" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(x, x, TOP, HEIGHT - BOTTOM)
        for x in (left, right)
    )
    inside = right > WIDTH * 0.7
    name = _text(right - 4 if inside else right + 4, y, band.name, "end" if inside else "start", "name")
    return Markup('<rect class="band" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>{}{}').format(
        left, TOP, max(right - left, 1), HEIGHT - BOTTOM - TOP, bounds, name
    )


def _bar(left: float, right: float, y: float, title: Markup) -> Markup:
    shape = '<rect class="fill" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
    return Markup(shape).format(left, y, max(right - left - 0.6, 0.6), HEIGHT - BOTTOM - y, title)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(
        x, y, anchor, kind, escape(text)
    )
