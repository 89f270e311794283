"""A dataset as the viewer's page needs it: JSON values and raw pixels, for volumes and slices named by numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.advice import advice_of_reason
from ich_prep.dataset.affine import AffineError, volume_affine
from ich_prep.dataset.placement import place_slices
from ich_prep.dataset.volumes import affine_of_slices
from ich_prep.dataset.windows import PRESETS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.dataset.dataset import Dataset
    from ich_prep.dataset.explanations import Explanations

THRESHOLD = 0.5  # at or above which a class counts as predicted
SLICES_PER_READ = 8
# Columns that the page shows of a slice and of a volume, if the dataset has them.
SLICE_COLUMNS = (
    *("row", "sop_instance_uid", "status", "label_level", "slice_index", "position_mm", "slice_spacing_mm", "turn"),
    *("source_rows", "source_columns", "repairs", "flags", "hu_min", "hu_max", "hu_mean"),
)
VOLUME_COLUMNS = (
    *("series_row", "series_instance_uid", "study_instance_uid", "patient_id", "subset", "fold", "scan_type"),
    *("acquisition", "volume_in_series", "n_slices", "n_ok", "label_level", "flags", "tilt_degrees"),
    *("slice_spacing_mm", "pixel_spacing_y_mm", "pixel_spacing_x_mm", "study_year", "patient_age", "patient_sex"),
    *("manufacturer", "convolution_kernel", "kvp", "slice_thickness_mm", "series_description", "protocol_name"),
    *("body_part", "contrast_agent"),
)
LIST_COLUMNS = ("series_row", "series_instance_uid", "patient_id", "subset", "fold", "scan_type", "n_slices", "n_ok")


class ViewData:
    """What the page asks for. Volumes are named by their line in the series table; the page gets no paths.

    ``predictions`` (rows, classes) are a run's probabilities, NaN where there are none; ``explanations`` its maps.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        predictions: NDArray[np.float32] | None = None,
        explanations: Explanations | None = None,
        run_name: str = "",
    ) -> None:
        self.dataset, self.predictions, self.explanations, self.run_name = dataset, predictions, explanations, run_name
        self._first = dataset.series["first_row"].to_numpy()
        self._count = dataset.series["n_slices"].to_numpy()

    def __len__(self) -> int:
        return len(self._first)

    def about(self) -> dict[str, Any]:
        """Return what the page needs to know about the dataset before anything else."""
        spec = self.dataset.spec
        quarantined = len(self.dataset.read_table("quarantine", ["reason"]))
        return {
            "name": self.dataset.path.name,
            "digest": self.dataset.digest,
            "store": spec.store,
            "size": spec.size,
            "channels": spec.channels,
            "windows": [_window(window) for window in spec.windows],
            "presets": [_window(window) for window in PRESETS.values()],
            "classes": list(self.dataset.classes),
            "volumes": len(self),
            "slices": len(self.dataset),
            "quarantined": quarantined,
            "slices_per_read": SLICES_PER_READ,
            "run": self.run_name if self.predictions is not None else None,
            "threshold": THRESHOLD,
            "explained": self.explanations is not None,
        }

    @cached_property
    def volumes(self) -> dict[str, Any]:
        """The list of volumes by column: identity, labels, statuses, flags, and the errors of a run.

        ``statuses`` and ``flags`` name the words of any slice of a volume by their index in ``words``. ``false_positive``
        and ``false_negative`` count answers at ``THRESHOLD``; ``worst`` is the largest difference of label and probability.
        """
        series, slices = self.dataset.series, self.dataset.slices
        columns: dict[str, Any] = {name: json_values(column_of(series, name)) for name in LIST_COLUMNS}
        columns["labels"] = {name: series[name].to_pylist() for name in self.dataset.classes}
        words: dict[str, list[str]] = {}
        status = slices["status"].fill_null("")
        line = pa.array(self._line_of_rows)
        words["status"], columns["statuses"] = self._words(line, status)
        flags = slices["flags"].combine_chunks()
        words["flag"], columns["flags"] = self._words(line.take(pc.list_parent_indices(flags)), pc.list_flatten(flags))
        columns |= self._errors()
        return {"columns": columns, "words": words}

    def _words(self, lines: pa.Array, values: pa.Array | pa.ChunkedArray) -> tuple[list[str], list[list[int]]]:
        """Return the distinct words, and for each volume the indices of those that occur in it."""
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        encoded = values.fill_null("").dictionary_encode()
        words = encoded.dictionary.to_pylist()
        kinds = max(len(words), 1)
        pairs = np.unique(lines.to_numpy().astype(np.int64) * kinds + encoded.indices.to_numpy())
        found: list[list[int]] = [[] for _ in range(len(self))]
        for line, word in zip((pairs // kinds).tolist(), (pairs % kinds).tolist(), strict=True):
            if line >= 0 and words[word]:
                found[line].append(word)
        return words, found

    @cached_property
    def _line_of_rows(self) -> NDArray[np.int64]:
        """The line of the series table of each row, -1 for a row of no volume."""
        lines = np.full(len(self.dataset), -1, np.int64)
        for line, (first, count) in enumerate(zip(self._first.tolist(), self._count.tolist(), strict=True)):
            lines[first : first + count] = line
        return lines

    def _errors(self) -> dict[str, Any]:
        if self.predictions is None:
            return {}
        labels = self.dataset.labels
        known = np.asarray(np.logical_and(labels >= 0, np.isfinite(self.predictions)))
        apart = np.where(known, np.abs(labels - np.nan_to_num(self.predictions)), 0).max(axis=1, initial=0)
        predicted = np.nan_to_num(self.predictions) >= THRESHOLD
        lines = self._line_of_rows
        inside = lines >= 0
        worst = np.zeros(len(self))
        np.maximum.at(worst, lines[inside], apart[inside])
        counts = {}
        for name, wrong in (
            ("false_positive", known & predicted & (labels == 0)),
            ("false_negative", known & ~predicted & (labels == 1)),
        ):
            counts[name] = np.bincount(lines[inside], wrong.sum(axis=1)[inside], len(self)).astype(int).tolist()
        answered: NDArray[np.bool_] = np.asarray(known.any(axis=1))
        predicted_rows = np.bincount(lines[inside], answered[inside], len(self)).astype(int).tolist()
        return {"worst": np.round(worst, 4).tolist(), "predicted": predicted_rows, **counts}

    def lines_where(self, text: str) -> dict[str, Any]:
        """Return the volumes with slices that a filter selects: their lines, and how many slices of each.

        Raises ``UsageError`` for a filter that is not valid.
        """
        rows = self.dataset.where(text)
        lines, counts = np.unique(self._line_of_rows[rows], return_counts=True)
        inside = lines >= 0
        return {"lines": lines[inside].tolist(), "counts": counts[inside].tolist(), "rows": len(rows)}

    def volume(self, line: int) -> dict[str, Any]:
        """Return one volume: what is known about it and its slices, where they lie, labels and probabilities.

        Raises ``IndexError`` for a line that is not one of the series table.
        """
        rows = self._rows(line)
        first, count = int(rows[0]) if len(rows) else 0, len(rows)
        lines = self.dataset.slices.slice(first, count)
        volume = self.dataset.series.slice(line, 1)
        known = {name: json_values(column_of(volume, name))[0] for name in VOLUME_COLUMNS}
        ok = self.dataset.is_ok[rows]
        answer: dict[str, Any] = {
            "line": line,
            "known": {name: value for name, value in known.items() if value not in (None, [], "")},
            "slices": {name: json_values(column_of(lines, name)) for name in SLICE_COLUMNS},
            "ok": ok.tolist(),
            "labels": {name: json_values(lines[name]) for name in self.dataset.classes},
            "geometry": self._geometry(volume.to_pylist()[0], lines, rows),
        }
        if self.predictions is not None:
            answer["probabilities"] = {
                name: json_values(self.predictions[rows, j]) for j, name in enumerate(self.dataset.classes)
            }
        if self.explanations is not None:
            answer["explained"] = self.explanations.has(rows).tolist()
        return answer

    def _geometry(self, volume: Mapping[str, Any], lines: pa.Table, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Return where the slices lie, as far as it is known; ``problem`` says why there is no exact grid.

        ``grid``: LPS mm of (column, row, mm along the normal, 1) from the first slice with a position; ``offsets``: of each
        slice with a position from it, in columns, rows and mm. ``axes``: LPS directions of columns, rows and normal.
        """
        size = self.dataset.spec.size
        answer: dict[str, Any] = {"problem": self._problem(volume, lines.filter(pa.array(self.dataset.is_ok[rows])))}
        placed = [k for k, place in enumerate(lines["position_x_mm"].to_pylist()) if place is not None]
        flags = lines["flags"].to_pylist()
        usual = [k for k in placed if "other_orientation" not in (flags[k] or ())] or placed
        try:
            placement = place_slices(lines.take(pa.array(usual, pa.int64())), volume["orientation"], stored_size=size)
            offsets: list[list[float] | None] = [None] * len(rows)
            for k, offset in zip(usual, placement.offsets.tolist(), strict=True):
                offsets[k] = offset
            answer |= {"grid": placement.grid.tolist(), "offsets": offsets}
            grid = placement.grid
        except AffineError:
            try:
                grid = self._grid_without_position(volume, lines)
            except AffineError:
                return answer
        lengths = np.linalg.norm(grid[:3, :3], axis=0)
        return answer | {"axes": (grid[:3, :3] / lengths).T.tolist(), "pixel_mm": lengths[:2].tolist()}

    def _problem(self, volume: Mapping[str, Any], lines: pa.Table) -> str | None:
        """Return why a volume has no affine, as ``Dataset.affine_problem`` does, but of ``lines`` at hand: faster."""
        thickness = volume.get("slice_thickness_mm")
        try:
            affine_of_slices(lines, volume["orientation"], stored_size=self.dataset.spec.size, thickness_mm=thickness)
        except AffineError as error:
            return str(error)
        return None

    def _grid_without_position(self, volume: Mapping[str, Any], lines: pa.Table) -> NDArray[np.float64]:
        first = lines.slice(0, 1).to_pylist()[0] if len(lines) else {}
        spacing = tuple(float(first.get(name) or 0) for name in ("pixel_spacing_y_mm", "pixel_spacing_x_mm"))
        return volume_affine(
            [[0.0, 0.0, 0.0]],
            volume["orientation"],
            (spacing[0], spacing[1]),
            (int(first.get("source_rows") or 1), int(first.get("source_columns") or 1)),
            turn=first.get("turn"),
            stored_size=self.dataset.spec.size,
            thickness_mm=1.0,
        )

    def pixels(self, line: int, first: int, count: int) -> bytes:
        """Return the stored pixels of slices ``first`` to ``first + count - 1`` of a volume, of those with pixels.

        Little-endian, (slice, channel, y, x), uint8 window codes or int16 HU. Raises ``IndexError`` for slices that the
        volume does not have, or more than ``SLICES_PER_READ``.
        """
        ok = self._ok_rows(line)
        if not (0 <= first < first + count <= len(ok) and count <= SLICES_PER_READ):
            raise IndexError(f"volume {line} has {len(ok)} slices with pixels")
        pixels = self.dataset.read(ok[first : first + count])
        return pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes()

    def maps(self, line: int, index: int) -> tuple[bytes, dict[str, int]] | None:
        """Return the maps of slice ``index`` of a volume, uint8 (class, y, x), and their shape; None if there are none."""
        rows = self._rows(line)
        if not 0 <= index < len(rows):
            raise IndexError(f"volume {line} has {len(rows)} slices")
        if self.explanations is None:
            return None
        return self.explanations.maps(int(rows[index]))

    def _rows(self, line: int) -> NDArray[np.int64]:
        if not 0 <= line < len(self):
            raise IndexError(f"there are {len(self)} volumes")
        return np.arange(self._first[line], self._first[line] + self._count[line], dtype=np.int64)

    def _ok_rows(self, line: int) -> NDArray[np.int64]:
        rows = self._rows(line)
        return rows[self.dataset.is_ok[rows]]

    # --- quarantine --------------------------------------------------------------------------------------------------

    @cached_property
    def quarantine_table(self) -> pa.Table:
        """The quarantine table."""
        return self.dataset.read_table("quarantine")

    def reasons(self) -> list[dict[str, Any]]:
        """Return each quarantine reason with its number of files, what it means and what to do."""
        counted = pc.value_counts(self.quarantine_table["reason"]).to_pylist()
        counted.sort(key=lambda entry: (-entry["counts"], entry["values"]))
        return [
            {
                "reason": entry["values"],
                "files": entry["counts"],
                "meaning": advice_of_reason(entry["values"]).what,
                "action": advice_of_reason(entry["values"]).todo,
            }
            for entry in counted
        ]

    def quarantine(self, *, reason: str, first: int, count: int) -> dict[str, Any]:
        """Return a page of the quarantine table: ``count`` lines from ``first``, only of ``reason`` unless it is empty."""
        table = self.quarantine_table
        table = table.append_column("number", pa.array(np.arange(len(table))))
        if reason:
            table = table.filter(pc.equal(table["reason"], reason))
        page = table.slice(min(max(first, 0), len(table)), count)
        columns = ("number", "path", "stage", "row", "reason", "detail")
        lines = [dict(zip(columns, line, strict=True)) for line in zip(*(page[name].to_pylist() for name in columns))]
        for line in lines:
            row = line["row"]
            inside = row is not None and 0 <= row < len(self.dataset)
            line["line"] = int(self._line_of_rows[row]) if inside else None
        return {"total": len(table), "lines": lines}


def column_of(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return a column of a table, nulls if the version that wrote it did not have it."""
    if name in table.column_names:
        return table[name]
    return pa.chunked_array([pa.nulls(len(table), pa.string())])


def json_values(values: pa.ChunkedArray | NDArray[np.float32] | Iterable[Any]) -> list[Any]:
    """Return values for JSON: numbers that are not finite become null, float32 is rounded to its own precision."""
    if isinstance(values, np.ndarray):
        values = [round(value, 6) for value in values.astype(float).tolist()]
    elif isinstance(values, pa.ChunkedArray):
        values = values.to_pylist()
    return [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]


def _window(window: Any) -> dict[str, Any]:
    return {"name": window.name, "center": window.center, "width": window.width}
