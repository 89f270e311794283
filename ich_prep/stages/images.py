"""What only the pixels show: equal images under different identifiers. Tables in, tables out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ich_prep.dataset.components import codes_of, connect
from ich_prep.dataset.tables import with_columns
from ich_prep.stages import identity
from ich_prep.stages.patients import agreed
from ich_prep.stages.plan_tables import planned_folds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.spec import Spec

# An image without anything denser than this shows no patient: equal ones do not make two patients one.
BLANK_HU = -500.0


def equal_images(slices: pa.Table) -> NDArray[np.int64]:
    """Return a code for each image that several rows of ``slices`` have, (n,), -1 for an image of one row only."""
    codes = codes_of(slices["content_hash"])
    numbers = np.bincount(codes + 1, minlength=1)
    return np.where((codes >= 0) & (numbers[codes + 1] > 1), codes, -1)


def link_images(slices: pa.Table, given_fold: pa.ChunkedArray, image: NDArray[np.int64], spec: Spec) -> pa.Table:
    """Return ``slices`` with fold groups, and so folds, that also join rows of one ``image`` (codes, (n,)).

    Blank images link nobody. ``given_fold``: int8 (n,), -1 where the label table gives none. Raises ``BuildError`` if one
    group then has too many of the studies, or folds of the table that differ.
    """
    image = np.where(_is_blank(slices), -1, image)
    if "image" not in spec.link or not (image >= 0).any():
        return slices
    before = codes_of(slices["fold_group"])
    group = connect(before, [image])
    if np.array_equal(group, before):
        return slices
    study = codes_of(slices["study_instance_uid"])
    unit = identity.study_units(slices["series_row"].to_numpy(), study, codes_of(slices["patient_id"]))
    links = {"patient": (before, slices["fold_group"]), "image": (image, slices["content_hash"])}
    identity.check_group_sizes(group, unit, links, folds=spec.folds)
    names = identity.group_names(group, slices["fold_group"])
    given = agreed(given_fold.to_numpy().astype(np.int64), group, names, "folds", spec).astype(np.int8)
    planned = slices.append_column("given_fold", pa.array(given))
    fold = planned_folds(planned, names, slices["patient_id"], folds=spec.folds)
    return with_columns(slices, {"fold_group": names, "fold": fold})


def _is_blank(slices: pa.Table) -> NDArray[np.bool_]:
    highest, lowest = (slices[name].fill_null(np.nan).to_numpy() for name in ("hu_max", "hu_min"))
    blank: NDArray[np.bool_] = (highest < BLANK_HU) | (highest == lowest)
    return blank
