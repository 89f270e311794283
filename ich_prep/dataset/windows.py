"""CT windows: presets, their spelling on a command line, and the code of every HU value.

A window maps HU to an 8-bit code by the function LINEAR_EXACT of PS3.3 C.11.2.1.3.2, rounded half to even. It is not
LINEAR (C.11.2.1.2.1), which subtracts 0.5 from the center and 1 from the width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ich_prep.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray


# HU are clipped to this range first: from air to the highest value of a 12-bit scanner.
MIN_HU = -1024
MAX_HU = 3071


@dataclass(frozen=True)
class Window:
    """A named window: ``center`` and ``width`` in HU, both finite, ``width`` greater than 0."""

    name: str
    center: float
    width: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.center) and 0 < self.width < math.inf):
            raise UsageError(
                f"Expected a window with a finite center and a width greater than 0 HU; {self.name!r} has center "
                f"{self.center:g} and width {self.width:g}."
            )


PRESETS: dict[str, Window] = {
    window.name: window
    for window in (
        Window("brain", center=40, width=80),
        Window("subdural", center=80, width=200),
        Window("bone", center=600, width=2800),
        Window("soft_tissue", center=40, width=380),
        Window("stroke", center=40, width=40),
    )
}

_CUSTOM = re.compile(r"^([a-z][a-z0-9_]*)=(-?[0-9.]+)/([0-9.]+)$")


def parse_window(text: str) -> Window:
    """Return the window named by ``text``: a preset (``brain``) or ``name=center/width`` in HU (``blood=75/215``)."""
    if text in PRESETS:
        return PRESETS[text]
    match = _CUSTOM.match(text)
    if match:
        try:
            return Window(match[1], center=float(match[2]), width=float(match[3]))
        except ValueError:
            pass
    raise UsageError(
        f"Expected a preset ({', '.join(PRESETS)}) or name=center/width such as blood=75/215; got {text!r}."
        f"{did_you_mean(text, PRESETS)}"
    )


def parse_windows(texts: Sequence[str]) -> tuple[Window, ...]:
    """Return the windows named by ``texts``, in that order. Raises ``UsageError`` for none, or a name given twice."""
    windows = tuple(parse_window(text) for text in texts)
    names = [window.name for window in windows]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"Expected one or more windows with different names; got {', '.join(names) or 'none'}.")
    return windows


def window_codes(hu: NDArray[np.int16], window: Window) -> NDArray[np.uint8]:
    """Return the code (0..255) of every element of ``hu``, computed in float64: the reference for all faster code.

    LINEAR_EXACT of PS3.3 C.11.2.1.3.2 with an output range of 0..255, that is
    ``(hu - (center - width / 2)) / width * 255``, rounded half to even and clipped.
    """
    lower = window.center - window.width / 2
    exact = (hu.astype(np.float64) - lower) / window.width * 255
    codes: NDArray[np.uint8] = np.clip(np.rint(exact), 0, 255).astype(np.uint8)
    return codes


@cache
def window_table(window: Window) -> NDArray[np.uint8]:
    """Return the codes of all HU values: read-only uint8 (65536,), indexed by int16 HU reinterpreted as uint16."""
    table = window_codes(np.arange(65536, dtype=np.uint16).view(np.int16), window)
    table.flags.writeable = False
    return table
