"""DICOM files rendered in memory, as a build renders them, without a dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ich_prep.dataset.affine import upright_turns
from ich_prep.dataset.schema import AS_STORED
from ich_prep.dicom.decode import Decoder
from ich_prep.errors import Reason, SliceError
from ich_prep.layouts import LAYOUTS
from ich_prep.sources import FolderSource
from ich_prep.stages.scan import SCHEMA, scan_file
from ich_prep.stages.shard import SliceRenderer, pixel_source

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.spec import Spec


def render_file(path: str | os.PathLike[str], spec: Spec) -> NDArray[Any]:
    """Return the pixels of one DICOM file, (channel, y, x), as a build with ``spec`` stores them.

    uint8 window codes, or int16 HU if ``spec.store`` is "hu". Known defects are repaired as ``spec.layout`` says; with
    the layout "auto" none are, because one file does not show which data set it is from. The slice is turned upright by its
    own orientation, unless ``spec.orientation`` is "as-stored"; a build turns the slices of a volume alike. Raises
    ``SliceError``, with the reason, for a file that is not a CT slice or that cannot be decoded.
    """
    file = Path(path)
    folder, key = FolderSource(file.parent), os.fsencode(file.name)
    line = dict.fromkeys(SCHEMA.names) | scan_file(folder, key, key)
    if line["reason"] is not None:
        raise SliceError(Reason(line["reason"]), line["detail"])
    line["repairs"] = _repairs(line, spec, file)
    line["turn"] = _turn(line, spec)
    decoder = Decoder()
    try:
        stored = decoder.read(pixel_source(folder, key, line))
        slices = SliceRenderer(spec)
        slices.render(stored, line)
    finally:
        decoder.close()
    return slices.out


def _turn(line: dict[str, Any], spec: Spec) -> str:
    if spec.orientation == AS_STORED or line["orientation"] is None:
        return ""
    return str(upright_turns(np.array([line["orientation"]], np.float64))[0])


def _repairs(line: dict[str, Any], spec: Spec, file: Path) -> list[str]:
    if spec.layout == "auto":
        return []
    assignment = LAYOUTS[spec.layout].assign(pa.Table.from_pylist([line], SCHEMA), file.absolute().parent.name)
    names: list[str] = assignment.repairs[0].as_py()
    return names
