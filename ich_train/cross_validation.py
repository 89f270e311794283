"""Cross-validation: a run for each fold, which it is tested on, and one evaluation of all of them together.

::

    runs/NAME/
        recipe.toml            the settings; val_fold and test_fold are those of each run
        folds.txt              the folds that are tested on: all, or numbers such as 0,2
        fold-0/  fold-1/ ...   the runs; fold-k is tested on fold k and validated on the next one
        metrics.json  predictions.parquet  report.html  pictures/  curves/    the evaluation
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_prep.dataset.storage import write_whole
from ich_prep.errors import TrainError, UsageError, count, describe_os_error
from ich_prep.files import read_regular
from ich_train.ranks import choose_device
from ich_train.rows import column, labelled_rows
from ich_train.runs import METRICS, RECIPE, check_same, require_run, run_lock, settings_of, start
from ich_train.split import split_rows
from ich_train.train import train

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from ich_prep.dataset.dataset import Dataset
    from ich_train.config import EvalConfig, Fold, TrainConfig

ALL, FOLDS = "all", "folds.txt"


def cross_validate(
    dataset: Dataset,
    out: Path,
    settings: TrainConfig,
    evaluation: EvalConfig,
    *,
    folds: str | None = None,
    console: Console,
    resume: bool = False,
) -> dict[str, Any] | None:
    """Train a network for each of ``folds``, evaluate them together, return the metrics; None if it was stopped.

    ``folds`` is "all", or numbers such as "0,2" (default: those that it was started with, else all); ``val_fold`` and
    ``test_fold`` of ``settings`` are replaced, unless ``val_fold`` is "none": then nothing is validated. Writes the folder
    ``out``; ``resume`` continues what is there.
    Raises `UsageError` for settings that do not fit the dataset or cross-validation, and as `ich_train.train.train`.
    """
    if resume:
        require_run(out)
    if folds is None:
        folds = _folds_of(out) if resume else ALL
    of_runs = _settings_of_runs(dataset, settings, evaluation, folds)
    if resume:
        check_same(out, settings_of(out)[0], settings)
    else:
        start(out, settings, evaluation)
    with run_lock(out):
        write_whole(out / FOLDS, f"{folds}\n".encode())
        (out / METRICS).unlink(missing_ok=True)  # of fewer folds or epochs
        for fold, of_run in of_runs.items():
            run = out / f"fold-{fold}"
            console.print(f"Fold {fold}, validated on fold {of_run.val_fold}:", soft_wrap=True)
            try:
                result = train(
                    dataset,
                    run,
                    of_run,
                    None,
                    console=console,
                    resume=(run / RECIPE).is_file(),
                    resume_with=resuming(out),
                )
            except UsageError:
                if not resume and not any(out.glob("fold-*")):  # nothing was started
                    (out / FOLDS).unlink()
                    (out / RECIPE).unlink()
                raise
            if not result.finished:
                return None

        from ich_train.evaluation.pooled import evaluate_folds

        return evaluate_folds(
            {fold: out / f"fold-{fold}" for fold in of_runs},
            dataset,
            evaluation,
            out=out,
            device=str(choose_device(settings.device)),
            threads=settings.threads,
        )


def resuming(out: Path) -> str:
    """Return the command that resumes the cross-validation in the folder ``out``."""
    return f"ich-train cv --resume --out {out}"


def _folds_of(out: Path) -> str:
    """Return the folds that the cross-validation in the folder ``out`` was started with."""
    try:
        return read_regular(out / FOLDS).decode().strip()
    except (OSError, ValueError) as error:
        why = describe_os_error(error) if isinstance(error, OSError) else "it is damaged"
        raise TrainError(
            f"Cannot read which folds {out} was started with from {out / FOLDS}: {why}. Name them with --folds."
        ) from error


def _settings_of_runs(
    dataset: Dataset, settings: TrainConfig, evaluation: EvalConfig, folds: str
) -> dict[int, TrainConfig]:
    """Return the settings of the run for each fold; raises `UsageError` if there cannot be one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("Cross-validation trains in one process. Start it without torchrun.")
    if settings.features is not None:
        raise UsageError(
            "Cross-validation takes no features: those of the network of one fold have seen the slices of the others. "
            "Leave out features, to train encoder and head together."
        )
    if evaluation.subset != "test" or evaluation.limit is not None:
        raise UsageError(
            "Cross-validation evaluates all slices of each test fold. Leave subset and limit out of the section [eval]."
        )
    rows = labelled_rows(dataset, allow_series_labels=True)
    tested = column(dataset, "subset", rows) == "test"
    if tested.any():
        raise UsageError(
            f"{dataset.path} has a test subset of its own, of {count(int(tested.sum()), 'labelled slice')}: every run would "
            "be tested on it, and none on a fold. Use `ich-train run`."
        )
    of_rows = column(dataset, "fold", rows).astype(np.int64)
    present = np.unique(of_rows[of_rows >= 0]).tolist()
    of_runs = {}
    for fold in _chosen(folds, present):
        following = present[(present.index(fold) + 1) % len(present)]
        val_fold: Fold = "none" if settings.val_fold == "none" else following
        of_runs[fold] = settings.model_copy(update={"val_fold": val_fold, "test_fold": fold})
        needed = ("train", "test") if val_fold == "none" else ("train", "val", "test")
        split_rows(dataset, val_fold=val_fold, test_fold=fold, allow_series_labels=True, needed=needed)
    return of_runs


def _chosen(folds: str, present: Sequence[int]) -> list[int]:
    if folds == ALL:
        return [*present]
    try:
        numbers = sorted({int(text) for text in folds.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not {*numbers} <= {*present}:
        known = ", ".join(map(str, present))
        raise UsageError(f'Expected --folds "all" or numbers such as 0,2, of the folds {known}; found {folds[:100]!r}.')
    return numbers
