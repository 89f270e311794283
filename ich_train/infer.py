"""Probabilities for the slices and scans of a source, by one network or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.dataset import Dataset
from ich_prep.dataset.tables import with_columns
from ich_prep.errors import Reason, UsageError, count
from ich_train.infer_source import Block, blocks, first_quarantine, has_subsets, metas_of
from ich_train.predict import Mirrored, Predictor, load_predictor
from ich_train.scan_predict import predict_scans, predict_slices, series_rows
from ich_train.temperature import Temperature, scaled, temperature_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_train.config import PredictConfig
    from ich_train.infer_source import Source

    Probabilities = NDArray[np.float32]

LEAST_SHARE = 0.5  # of a scan's slices, that a call needs
# It says that nobody is named, and nothing about the images: without it, no scan of anonymous files would get a call.
HARMLESS_FLAGS = frozenset({"patient_is_study"})
SLICE_COLUMNS = (
    "sop_instance_uid", "series_instance_uid", "study_instance_uid", "patient_id", "subset", "label_line", "series_row",
    "slice_index", "position_mm", "status", "flags",
)  # fmt: skip
SCAN_COLUMNS = (
    "series_row", "series_instance_uid", "volume_in_series", "study_instance_uid", "patient_id", "scan_type",
    "slice_spacing_mm", "flags", "n_slices",
)  # fmt: skip
NO_CALL = "no_call"
DAMAGE = frozenset(str(reason) for reason in Reason if reason.is_damage)

AGGREGATES: Mapping[str, Callable[[Any], Any]] = {
    "max": lambda values: values.max(axis=0),
    "top3": lambda values: np.sort(values, axis=0)[-3:].mean(axis=0, dtype=np.float64),
    "mean": lambda values: values.mean(axis=0, dtype=np.float64),
}


@dataclass(frozen=True)
class Predictions:
    """The probabilities of ``classes``, null where there are none.

    ``slices``: a line a slice, with ``SLICE_COLUMNS``. ``scans``: a line a volume, with ``SCAN_COLUMNS``, ``n_damaged``
    (files of its series that were slices and could not be used), ``n_predicted`` and ``no_call``, why it has no
    probabilities. ``quarantine``: the files that were left out, with ``QUARANTINE_COLUMNS``. ``temperatures`` are those that
    the slices' logits of each network were divided by.
    """

    classes: tuple[str, ...]
    slices: pa.Table
    scans: pa.Table
    quarantine: pa.Table
    predictors: tuple[Predictor, ...]
    temperatures: tuple[Temperature, ...]

    def matrix(self) -> Probabilities:
        """Return the probabilities by slice, float32 (slices, classes), NaN where there are none."""
        return _matrix(self.slices, self.classes)


def predict(
    runs: Sequence[Path],
    source: Source,
    settings: PredictConfig,
    *,
    kaggle: bool = False,
    mirror: bool = False,
    batch_size: int = 64,
    threads: int = 2,
    device: Any = "cpu",
) -> Predictions:
    """Return the mean probabilities of the networks of ``runs`` for the slices and scans of ``source``.

    Only slices that ``settings.where`` selects are predicted, or without it for ``kaggle`` those of the subset test. A
    scan of which fewer than half of the slices were predicted has no probabilities, nor has a flagged one with
    ``settings.skip_flagged``. With ``mirror``, logits are averaged with those of the mirrored slices. With
    ``settings.calibrate``, each network's logits of slices are divided by the temperature of its run's evaluation; what a
    head says of whole scans is not, because the temperature was not fitted to it. Raises
    ``UsageError`` if no slice is selected, or as ``load_predictor``.
    """
    metas = metas_of(runs)
    temperatures = tuple(
        temperature_of(run, meta, wanted=settings.calibrate) for run, meta in zip(runs, metas, strict=True)
    )
    subset = "test" if kaggle and settings.where is None and has_subsets(source) else None
    predictors: tuple[Predictor, ...] = ()
    slices, scans, quarantine = list[pa.Table](), list[pa.Table](), [first_quarantine(source)]
    # A dataset does not know whose the files were that never got a row.
    damaged = np.zeros(len(source.series), np.int64) if isinstance(source, Dataset) else source.damaged
    for block in blocks(source, metas, threads):
        predictors = predictors or tuple(
            _load(run, block.of(meta), device, mirror=mirror) for run, meta in zip(runs, metas, strict=True)
        )
        selected = block.selected(settings.where, subset)
        if len(selected):
            found = _predict_block(
                predictors, temperatures, block, selected, settings, damaged, batch_size=batch_size, threads=threads
            )
            slices.append(found[0])
            scans.append(found[1])
        quarantine += block.quarantine
    if not slices:
        if settings.where is not None:
            raise UsageError(f"--where {settings.where!r} selects no slice of {source.path}. Choose others.")
        raise UsageError(
            f"No slices of the subset test in {source.path}. Build from a tree that holds the competition's test files, or "
            "choose slices with --where."
        )
    of_scans = pa.concat_tables(scans)
    if settings.where is None and subset is None and not isinstance(source, Dataset):
        of_scans = _with_lost_scans(of_scans, source.lost)
    left_out = pa.concat_tables(quarantine).sort_by("path")
    return Predictions(metas[0].classes, pa.concat_tables(slices), of_scans, left_out, predictors, temperatures)


def _load(run: Path, dataset: Dataset, device: Any, *, mirror: bool) -> Predictor:
    predictor = load_predictor(run, dataset, device=device)
    return replace(predictor, model=Mirrored(predictor.model)) if mirror else predictor


def _with_lost_scans(scans: pa.Table, lost: pa.Table) -> pa.Table:
    """Return ``scans`` and a line, without a ``series_row``, for each of the ``lost``, of which every slice is damaged."""
    lines = [
        {**line, "n_slices": 0, "n_predicted": 0, NO_CALL: _no_call("", 0, line["n_damaged"], 0)}
        for line in lost.to_pylist()
    ]
    return pa.concat_tables([scans, pa.Table.from_pylist(lines, scans.schema)])


# --- the probabilities of a block -------------------------------------------------------------------------------------


def _predict_block(
    predictors: Sequence[Predictor],
    temperatures: Sequence[Temperature],
    block: Block,
    selected: NDArray[np.int64],
    settings: PredictConfig,
    damaged: NDArray[np.int64],
    *,
    batch_size: int,
    threads: int,
) -> tuple[pa.Table, pa.Table]:
    """Return the tables of the slices ``selected`` and of their scans; ``damaged`` is by the source's ``series_row``."""
    dataset, classes = block.first, predictors[0].meta.classes
    series_row = dataset.slices["series_row"].take(pa.array(selected)).to_numpy().astype(np.int64)
    scans, scan_of = np.unique(series_row, return_inverse=True)
    lines = _columns(dataset.series.take(pa.array(scans)), SCAN_COLUMNS)
    flagged = _flagged(lines) if settings.skip_flagged else [""] * len(scans)
    wanted = dataset.is_ok[selected] & np.array([not flags for flags in flagged])[scan_of]
    by_run = [
        _calibrated(
            _probabilities(one, block.of(one.meta), selected[wanted], batch_size=batch_size, threads=threads),
            temperature,
        )
        for one, temperature in zip(predictors, temperatures, strict=True)
    ]
    of_slices = np.full((len(selected), len(classes)), np.nan, np.float32)
    of_slices[wanted] = _mean([answer.slices for answer in by_run])
    predicted = np.bincount(scan_of[wanted], minlength=len(scans))
    of_scans = np.full((len(scans), len(classes)), np.nan, np.float32)
    of_scans[predicted > 0] = scan_probabilities(by_run, of_slices[wanted], scan_of[wanted], settings.aggregate)

    n_ok = np.bincount(
        dataset.slices["series_row"].to_numpy(zero_copy_only=False)[dataset.is_ok].astype(np.int64),
        minlength=int(scans.max()) + 1,
    )[scans]
    early = damaged[block.first_series + scans]
    planned = lines["n_slices"].to_numpy().astype(np.int64)
    no_call = [
        _no_call(*values)
        for values in zip(
            flagged,
            predicted.tolist(),
            (planned + early).tolist(),
            (planned - np.bincount(scan_of)).tolist(),
            strict=True,
        )
    ]
    of_scans[[reason is not None for reason in no_call]] = np.nan
    lines = _shifted(lines, block.first_series)
    for name, values in (("n_damaged", planned - n_ok + early), ("n_predicted", predicted)):
        lines = lines.append_column(name, pa.array(values, pa.int32()))
    lines = lines.append_column(NO_CALL, pa.array(no_call, pa.string()))
    slices = _shifted(_columns(dataset.slices.take(pa.array(selected)), SLICE_COLUMNS), block.first_series)
    return _with_probabilities(slices, classes, of_slices), _with_probabilities(lines, classes, of_scans)


@dataclass(frozen=True)
class Answer:
    """One network's probabilities of n slices, (n, classes), and of the scans that these belong to, ascending, (m, classes).

    ``scans`` is None for a network that sees slices only.
    """

    slices: Probabilities
    scans: Probabilities | None


def _probabilities(
    predictor: Predictor, dataset: Dataset, rows: NDArray[np.int64], *, batch_size: int, threads: int
) -> Answer:
    """Return the network's answer for ``rows``; one with a head reads the whole scans that these belong to."""
    if predictor.meta.head is not None and len(rows):
        found = predict_scans(predictor, dataset, series_rows(dataset, rows), threads=threads)
        return Answer(found.of_rows(rows), found.scans)
    return Answer(predict_slices(predictor, dataset, rows, batch_size=batch_size, threads=threads), None)


def _calibrated(answer: Answer, temperature: Temperature) -> Answer:
    if temperature.value is None:
        return answer
    return replace(answer, slices=scaled(answer.slices, temperature.value).astype(np.float32))


def _mean(answers: Sequence[Probabilities]) -> Probabilities:
    return np.asarray(np.mean(np.stack(answers), axis=0, dtype=np.float64), np.float32)


def scan_probabilities(
    answers: Sequence[Answer], slices: Probabilities, scan_of: NDArray[np.int64], aggregate: str
) -> Probabilities:
    """Return the probabilities of the scans with slices, (m, classes).

    Those of networks that see scans are averaged with the aggregate of the mean ``slices`` (n, classes) of the others, which
    counts once for each of them. ``scan_of`` (n,) says which scan a slice is of.
    """
    by_slice = [answer.slices for answer in answers if answer.scans is None]
    by_scan = [answer.scans for answer in answers if answer.scans is not None]
    if by_slice:
        order = np.argsort(scan_of, kind="stable")
        values, sorted_scans = (_mean(by_slice) if by_scan else slices)[order], scan_of[order]
        starts = np.flatnonzero(np.diff(sorted_scans, prepend=-1))
        found = [AGGREGATES[aggregate](one) for one in np.split(values, starts[1:])] if len(starts) else []
        aggregated = np.array(found, np.float32).reshape(len(starts), values.shape[1])
        by_scan += [aggregated] * len(by_slice)
    return _mean(by_scan)


def _flagged(scans: pa.Table) -> list[str]:
    """Return the flags of each scan that count, in words; empty if it has none."""
    return [
        ", ".join(flag for flag in flags or () if flag not in HARMLESS_FLAGS) for flags in scans["flags"].to_pylist()
    ]


def _no_call(flags: str, predicted: int, slices: int, not_selected: int) -> str | None:
    """Return why a scan of ``slices`` gets no call; None if it gets one."""
    if flags:
        return f"flagged: {flags}"
    if not predicted:
        return "no slice could be predicted"
    if predicted < LEAST_SHARE * slices:
        filtered = f"; the filter leaves out {not_selected}" if not_selected else ""
        return f"only {predicted} of {count(slices, 'slice')} could be predicted{filtered}"
    return None


# --- tables ----------------------------------------------------------------------------------------------------------


def _columns(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Return these columns of a dataset's ``table``; one of a later version than the dataset's is null."""
    columns = [
        table[name] if name in table.column_names else pa.nulls(len(table), _TYPES.get(name, pa.string()))
        for name in names
    ]
    return pa.table(columns, names=list(names))


_TYPES = {"volume_in_series": pa.int32(), "label_line": pa.int64(), "flags": pa.list_(pa.string())}


def _shifted(table: pa.Table, first_series: int) -> pa.Table:
    return with_columns(table, {"series_row": pc.add(table["series_row"], first_series)})


def _with_probabilities(table: pa.Table, classes: Sequence[str], values: Probabilities) -> pa.Table:
    for name, column in zip(classes, values.T, strict=True):
        table = table.append_column(name, pa.array(column, pa.float32(), from_pandas=True))
    return table


def _matrix(table: pa.Table, classes: Sequence[str]) -> Probabilities:
    columns = [table[name].fill_null(np.nan).to_numpy() for name in classes]
    return np.stack(columns, axis=1).astype(np.float32, copy=False)
