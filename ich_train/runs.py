"""The folder of a run: its name, its recipe, its history.

::

    runs/NAME/
        recipe.toml          the settings, all of them
        history.csv          a line for each epoch
        best/  last/         checkpoints: the lowest validation loss, and the state to resume from
        metrics.json  predictions.parquet  report.html  pictures/  curves/    the evaluation
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import fcntl
import io
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from ich_prep.dataset.storage import sync_folder, write_whole
from ich_prep.errors import TrainError, UsageError, describe_os_error
from ich_prep.files import read_regular
from ich_prep.recipe import load_section
from ich_train.config import FREE_ON_RESUME, EvalConfig, TrainConfig, recipe_text

RECIPE, HISTORY, BEST, LAST, METRICS = "recipe.toml", "history.csv", "best", "last", "metrics.json"
METRICS_VERSION = 1

_NO_LOCKS = frozenset((errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL))

# Differences below these, of a loss as a share of it, are noise and no sign of overfitting.
LOSS_MARGIN, ACCURACY_MARGIN = 0.01, 0.002


@dataclass(frozen=True)
class Epoch:
    """A line of ``history.csv``."""

    epoch: int  # from 1
    seconds: float  # training and validation
    train_loss: float  # mean over the epoch, while the weights change, with augmentation
    train_accuracy: float  # share of correct answers at 0.5 over all known labels
    val_loss: float
    val_accuracy: float
    learning_rate: float  # at the epoch's end
    slices_per_s: float  # of training, all ranks together
    wait_share: float  # share of the training time spent waiting for data
    val_auc: float = math.nan  # mean ROC AUC of the classes in validation, NaN where undefined

    def cells(self) -> tuple[str, ...]:
        """Return the losses, accuracies, speed and waiting as a table shows them."""
        measures = (self.train_loss, self.train_accuracy, self.val_loss, self.val_accuracy)
        return (*(f"{value:.4f}" for value in measures), f"{self.slices_per_s:,.0f}", f"{self.wait_share:.1%}")


def best_of(history: Sequence[Epoch], by: str = "loss") -> Epoch:
    """Return the epoch of the lowest validation loss or, ``by`` "auc", the highest mean area, the first of equals.

    ``by`` "last" returns the last epoch. An epoch whose area is undefined is no better than one with an area of 0.
    """
    if by == "last":
        return history[-1]
    if by == "auc":
        return max(history, key=lambda line: 0.0 if math.isnan(line.val_auc) else line.val_auc)
    return min(history, key=lambda line: line.val_loss)


def chosen_by(settings: TrainConfig) -> str:
    """Return what chooses the best epoch of a run: "loss", "auc", or "last" if nothing is validated."""
    return "last" if settings.val_fold == "none" else settings.choose_best


def is_finished(history: Sequence[Epoch], settings: TrainConfig) -> bool:
    """Return whether a run with this ``history`` has no epoch left, or none that is worth its time by ``patience``."""
    if len(history) >= settings.epochs:
        return True
    if not settings.patience or not history:
        return False
    return len(history) - best_of(history, chosen_by(settings)).epoch >= settings.patience


def new_folder(root: Path, name: str) -> Path:
    """Return ``root/name``, or if it is taken ``root/name-k``: k is one more than the highest, from 2 on."""
    return _numbered(root, name, max(_numbers(root, name), default=0) + 1)


def latest_folder(root: Path, name: str) -> Path:
    """Return the one of ``root/name``, ``root/name-2`` ... with the highest number; raises `UsageError` if there is none."""
    numbers = _numbers(root, name)
    if not numbers:
        raise UsageError(f"No run to resume at {root / name}. Name its folder with --out.")
    return _numbered(root, name, max(numbers))


def start(out: Path, settings: TrainConfig, evaluation: EvalConfig | None) -> None:
    """Make the folder ``out`` of a new run and write its recipe; raises `UsageError` if it is not empty."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; a run needs a folder. Name another with --out.")
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty. Continue its run with --resume, or name another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    sync_folder(out.parent)  # its name: checkpoints are of no use without it
    sections = {"train": settings} if evaluation is None else {"train": settings, "eval": evaluation}
    write_whole(out / RECIPE, recipe_text({name: values.model_dump() for name, values in sections.items()}).encode())


def lengthen(out: Path, epochs: int) -> None:
    """Write to the recipe of the run in ``out`` that it now has so many ``epochs``."""
    settings, evaluation = settings_of(out)
    sections = {"train": settings.model_copy(update={"epochs": epochs}), "eval": evaluation}
    write_whole(out / RECIPE, recipe_text({name: values.model_dump() for name, values in sections.items()}).encode())


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold the lock of the run in the folder ``out``, which exists; raises `TrainError` if another process trains it.

    It is a lock on the folder itself, and leaves no file. On a file system without locks there is none.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainError(
                f"Another process trains the run in {out}. Wait for it, or stop it, then run this command again."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def check_same(out: Path, before: TrainConfig, settings: TrainConfig) -> None:
    """Raise `UsageError` if ``settings`` would make another run than ``before``, those of the run in ``out``.

    More epochs make the same run longer.
    """
    free = FREE_ON_RESUME | ({"epochs"} if settings.epochs > before.epochs else frozenset())
    differing = [
        f"{key} (was {was}, now {getattr(settings, key)})"
        for key, was in before
        if getattr(settings, key) != was and key not in free
    ]
    if differing:
        raise UsageError(
            f"Cannot resume {out} with different settings: {', '.join(differing)}. Restore them, or start another run "
            "(--weights can start it from this run's weights)."
        )


@contextmanager
def os_errors_explained(out: Path, resume_with: str) -> Iterator[None]:
    """Raise `TrainError`, with how to go on, for an error of the operating system in the run in the folder ``out``."""
    try:
        yield
    except OSError as error:
        remedy = "Fix this, then run the same command again."
        if (out / RECIPE).is_file():
            kept = "Its last checkpoint is kept: fix" if (out / LAST).is_dir() else "Fix"
            remedy = f"{kept} this, then continue with `{resume_with}`."
        raise TrainError(f"The run in {out} stopped: {describe_os_error(error)}. {remedy}") from error


def require_run(out: Path) -> None:
    """Raise `UsageError` if ``out`` is not the folder of a run."""
    if not (out / RECIPE).is_file():
        raise UsageError(f"{out} is not the folder of a run: there is no {RECIPE} in it.")


def require_writable(folder: Path, *, hint: str) -> None:
    """Raise an error that ends with ``hint`` if no file can be written to ``folder``, which need not exist yet.

    `UsageError` where a file is in its place, `TrainError` where the file system takes none.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise UsageError(f"{nearest} is a file, not a folder. {hint}")
    try:
        # Permissions alone do not tell: the file system may be read-only.
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise TrainError(f"Cannot write to {nearest}: {error.strerror}. {hint}") from error


def settings_of(out: Path) -> tuple[TrainConfig, EvalConfig]:
    """Return the settings of the run in the folder ``out``; raises `UsageError` if it is not the folder of a run."""
    require_run(out)
    return load_section(out / RECIPE, "train", TrainConfig), load_section(out / RECIPE, "eval", EvalConfig)


def write_history(out: Path, history: Sequence[Epoch]) -> None:
    """Write ``history`` to ``history.csv`` of the run in the folder ``out``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Epoch))
    # repr, and so csv, writes the shortest decimal that reads back as the same number.
    writer.writerows(dataclasses.astuple(epoch) for epoch in history)
    write_whole(out / HISTORY, text.getvalue().encode())


def read_history(out: Path) -> list[Epoch]:
    """Return the epochs in ``history.csv`` of the run in the folder ``out``; raises `TrainError` for another table."""
    file = out / HISTORY
    try:
        text = read_regular(file).decode()
    except OSError as error:
        raise TrainError(f"Cannot read the history of a run: {describe_os_error(error)}.") from error
    except UnicodeDecodeError as error:
        raise TrainError(f"The history of a run in {file} is not text.") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    expected = [field.name for field in dataclasses.fields(Epoch)]
    columns = list(reader.fieldnames or ())
    if columns != expected and columns != expected[:-1]:  # an earlier version had no areas
        raise TrainError(
            f"Expected the history of a run, with the columns {', '.join(expected)}, in {file}; found "
            f"{', '.join(reader.fieldnames or ()) or 'none'}."
        )
    try:
        return [
            Epoch(**{key: int(value) if key == "epoch" else float(value) for key, value in line.items()})  # type: ignore[arg-type]
            for line in reader
        ]
    except (TypeError, ValueError) as error:  # a line too short, or a cell that is not a number
        raise TrainError(
            f"The history of a run in {file} is damaged: line {reader.line_num} is not numbers."
        ) from error


def mean_history(histories: Sequence[Sequence[Epoch]]) -> list[Epoch]:
    """Return the means of ``histories``, epoch by epoch, as far as all of them go."""
    names = [field.name for field in dataclasses.fields(Epoch) if field.name != "epoch"]
    return [
        Epoch(lines[0].epoch, **{name: fmean(getattr(line, name) for line in lines) for name in names})
        for lines in zip(*histories, strict=False)
    ]


def overfitting_text(history: Sequence[Epoch]) -> str:
    """Return where training only overfitted, in a sentence that gives the numbers compared, or "" if it did not.

    It did if at least two epochs follow the one of the lowest validation loss and, averaged over those, training accuracy
    is higher and validation loss and accuracy are worse than in it, the latter two by a margin. Epochs with a NaN are
    ignored.
    """
    lines = [line for line in history if all(map(math.isfinite, dataclasses.astuple(line)[:-1]))]  # without the area
    lowest = min(range(len(lines)), key=lambda k: lines[k].val_loss, default=0)
    after = lines[lowest + 1 :]
    if len(after) < 2:
        return ""
    best = lines[lowest]
    train_accuracy = fmean(line.train_accuracy for line in after)
    val_loss = fmean(line.val_loss for line in after)
    val_accuracy = fmean(line.val_accuracy for line in after)
    learned = train_accuracy > best.train_accuracy
    worse = val_loss >= best.val_loss * (1 + LOSS_MARGIN) and val_accuracy <= best.val_accuracy - ACCURACY_MARGIN
    if not learned or not worse:
        return ""
    return (
        f"Overfitting since epoch {after[0].epoch}: epoch {best.epoch} has the lowest validation loss, {best.val_loss:.4f}; "
        f"the later epochs have on average {val_loss:.4f}, a validation accuracy of {val_accuracy:.4f} (epoch {best.epoch}: "
        f"{best.val_accuracy:.4f}) and a training accuracy of {train_accuracy:.4f} ({best.train_accuracy:.4f})."
    )


def _numbered(root: Path, name: str, number: int) -> Path:
    return root / (name if number == 1 else f"{name}-{number}")


def _numbers(root: Path, name: str) -> list[int]:
    """Return the numbers of the folders of that name, 1 for the one without; a year, as in "rsna-2019", is none."""
    found = [re.fullmatch(rf"{re.escape(name)}(?:-([2-9]|[1-9]\d\d?))?", path.name) for path in root.glob("*")]
    return [int(match[1] or 1) for match in found if match]
