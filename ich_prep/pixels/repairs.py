"""Known defects of published data: how each is detected in the headers, and how it is undone in the stored values.

A layout says which repairs its slices may need; the plan lists by name those that each slice needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.pixels.hounsfield import Rescale

SIGN_12BIT = "sign_12bit"
SIGN_12BIT_SHIFT = (
    1000  # what was added to the values before they wrapped; its negative is the intercept they belong to
)
SIGN_12BIT_WRAP = 1 << 12


@dataclass(frozen=True)
class HeaderColumns:
    """The header values by which defects are detected: one per slice in each array, (n,).

    ``bits_stored``: integers, 0 where unknown. ``signed``: bool, True where unknown. ``rescale_intercept``: float64, NaN
    where unknown.
    """

    bits_stored: NDArray[np.integer]
    signed: NDArray[np.bool_]
    rescale_intercept: NDArray[np.float64]


@dataclass(frozen=True)
class Repair:
    """``detect`` returns which slices have the defect, bool (n,); ``undo`` the stored values and rescale without it."""

    detect: Callable[[HeaderColumns], NDArray[np.bool_]]
    undo: Callable[[NDArray[np.uint16], Rescale], tuple[NDArray[np.uint16], Rescale]]


def _has_sign_12bit(headers: HeaderColumns) -> NDArray[np.bool_]:
    """12 bits stored, unsigned, with an intercept above -100 HU: air would be brighter than tissue can be."""
    defective: NDArray[np.bool_] = (headers.bits_stored == 12) & ~headers.signed & (headers.rescale_intercept > -100)
    return defective


def _undo_sign_12bit(stored: NDArray[np.uint16], rescale: Rescale) -> tuple[NDArray[np.uint16], Rescale]:
    """Values below zero were stored modulo 4096: add 1000, wrap at 4096, and rescale with an intercept of -1000."""
    shifted = (stored + np.uint16(SIGN_12BIT_SHIFT)) & np.uint16(SIGN_12BIT_WRAP - 1)
    return shifted, replace(rescale, intercept=-float(SIGN_12BIT_SHIFT))


REPAIRS: dict[str, Repair] = {SIGN_12BIT: Repair(_has_sign_12bit, _undo_sign_12bit)}


def detect(names: Sequence[str], headers: HeaderColumns) -> list[tuple[str, ...]]:
    """Return which of the repairs in ``names`` each slice needs, in the order of ``names``."""
    needed: list[tuple[str, ...]] = [()] * len(headers.signed)
    for name in names:
        for index in np.flatnonzero(REPAIRS[name].detect(headers)).tolist():
            needed[index] += (name,)
    return needed


def apply(stored: NDArray[np.uint16], rescale: Rescale, names: Iterable[str]) -> tuple[NDArray[np.uint16], Rescale]:
    """Return the ``stored`` values (rows, columns) and the ``rescale`` of a slice after the repairs in ``names``.

    ``stored`` itself is not changed; without repairs it is returned. Raises ``KeyError`` for an unknown name.
    """
    for name in names:
        stored, rescale = REPAIRS[name].undo(stored, rescale)
    return stored, rescale
