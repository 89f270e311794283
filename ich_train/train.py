"""The training loop: rows of a dataset in, a folder with the best network and its report out.

Everything random is a function of (seed, epoch, step, rank), and the learning rate one of the step: so a run that was
stopped resumes exactly with no more than its weights, its optimizer's state and the loader's position.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError

from ich_prep.errors import TrainError, UsageError, count
from ich_prep.files import read_regular
from ich_train.checkpoint import WEIGHTS, has_checkpoint, load_parameters, load_state, read_meta, save_checkpoint
from ich_train.config import TrainConfig
from ich_train.imagenet import IMAGENET, imagenet_weights
from ich_train.listeners import listening
from ich_train.meters import Meter, Reporter
from ich_train.own_code import imported
from ich_train.ranks import Ranks, Stop, join_ranks, own_stream
from ich_train.resume import meta_of, restore, state_of
from ich_train.runs import (
    BEST,
    HISTORY,
    LAST,
    METRICS,
    Epoch,
    check_same,
    chosen_by,
    is_finished,
    lengthen,
    os_errors_explained,
    read_history,
    require_run,
    run_lock,
    settings_of,
    start,
    write_history,
)
from ich_train.scan_network import SequenceNetwork
from ich_train.session import Session, prepare
from ich_train.split import split_rows
from ich_train.to_device import to_device
from ich_train.volume_loader import VolumeLoader

if TYPE_CHECKING:
    from rich.console import Console

    from ich_prep.dataset.dataset import Dataset
    from ich_train.config import EvalConfig


@dataclass(frozen=True)
class Result:
    """The outcome of a run. ``finished`` is false if it was stopped; ``metrics`` are those of the evaluation."""

    out: Path
    history: tuple[Epoch, ...]
    finished: bool
    metrics: dict[str, Any] | None = None


def train(
    dataset: Dataset,
    out: Path,
    settings: TrainConfig,
    evaluation: EvalConfig | None,
    *,
    console: Console,
    resume: bool = False,
    resume_with: str | None = None,
) -> Result:
    """Train with ``settings`` on ``dataset``, evaluate the best epoch unless ``evaluation`` is None, return the result.

    Writes the folder ``out``, from rank 0 only if torchrun started several processes. ``resume`` continues the run in
    ``out``; messages name the command ``resume_with`` for that (default: that of the run alone). SIGINT and SIGTERM
    finish the current step, write ``last/`` and return. Raises `UsageError` for invalid settings, `TrainError` if the
    loss is no longer finite, a checkpoint is damaged, or a step cannot be recorded as a CUDA graph.
    """
    resume_with = resume_with or f"ich-train run --resume --out {out}"
    with ExitStack() as stack:
        ranks = stack.enter_context(join_ranks(settings.device))
        stack.enter_context(own_stream(ranks.device))
        stop = stack.enter_context(Stop(ranks))
        if resume and ranks.first:
            require_run(out)
            stack.enter_context(run_lock(out))
        with os_errors_explained(out, resume_with):
            result, evaluated = _train(
                dataset, out, settings, evaluation, ranks, stop, held=stack, console=console, resume=resume
            )
    if evaluation is None or evaluated or not result.finished or not ranks.first:
        return result
    from ich_train.evaluation.evaluate import evaluate_run

    with os_errors_explained(out, resume_with):
        metrics = evaluate_run(out, dataset, evaluation, device=str(ranks.device), threads=settings.threads)
    return replace(result, metrics=metrics)


def _train(
    dataset: Dataset,
    out: Path,
    settings: TrainConfig,
    evaluation: EvalConfig | None,
    ranks: Ranks,
    stop: Stop,
    *,
    held: ExitStack,
    console: Console,
    resume: bool,
) -> tuple[Result, bool]:
    """Train; return the result, and whether its evaluation is there already. The lock of a new run goes to ``held``.

    A function of its own: what it makes is gone when it returns, the memory of a recorded step too.
    """
    if settings.logger:
        imported(settings.logger, "a logger")  # a wrong name ends the run before it starts
    session = _start_or_resume(dataset, out, settings, evaluation, ranks, resume=resume)
    if ranks.first and not resume:
        held.enter_context(run_lock(out))
    reporter = Reporter(console, epochs=settings.epochs, silent=not ranks.first, chosen_by=chosen_by(settings))
    if evaluation is not None and not _can_be_tested(dataset, settings, evaluation):
        if settings.where is not None:
            reporter.say("The filter leaves no slices to test on: the run will not be evaluated.")
        evaluation = None
    finished = is_finished(session.history, settings)
    # The metrics of a run that is not finished are those of an earlier best epoch.
    evaluated = evaluation is None or (finished and _is_evaluated(out, dataset, evaluation))
    if finished:
        reporter.say(f"{out} is already finished: {'nothing to do' if evaluated else 'only its evaluation is left'}.")
    else:
        reporter.say(_outline(session))
        if resume:
            epoch, steps = len(session.history) + 1, session.steps_done
            reporter.say(f"Resuming {out} in epoch {epoch}, after {steps:,} of its steps.")
        finished = _train_epochs(session, out, stop, reporter, evaluation_follows=evaluation is not None)
    return Result(out, tuple(session.history), finished=finished), evaluated


def _train_epochs(session: Session, out: Path, stop: Stop, reporter: Reporter, *, evaluation_follows: bool) -> bool:
    """Take the remaining epochs, with a checkpoint after each; return False if the run was stopped before its end."""
    settings, ranks = session.settings, session.ranks
    told = (
        listening(out, logger=settings.logger, first_epoch=len(session.history) + 1) if ranks.first else nullcontext(())
    )
    with reporter, told as listeners:
        while not is_finished(session.history, settings):
            complete = _train_epoch(session, stop, reporter)
            if not complete:
                session.meter.sums = ranks.total(session.meter.sums)
                _save(session, out / LAST, with_state=True)
                return False
            line = _close_epoch(session)

            # Best before last: a run that dies between the two repeats this epoch and finds the same best.
            if line is session.best:
                _save(session, out / BEST)
            if ranks.first:
                (out / METRICS).unlink(missing_ok=True)  # of an evaluation of an earlier epoch
                write_history(out, session.history)
            _save(session, out / LAST, with_state=True)
            reporter.epoch(line, best=line is session.best)
            for tell in listeners:
                tell(line)
            work_left = not is_finished(session.history, settings) or evaluation_follows
            if work_left and stop.agreed():
                return False

    reporter.summary(session.history)
    return True


def _start_or_resume(
    dataset: Dataset, out: Path, settings: TrainConfig, evaluation: EvalConfig | None, ranks: Ranks, *, resume: bool
) -> Session:
    """Return a new run, its folder started, or with ``resume`` that in ``out`` at the place where it was stopped."""
    saved = _saved_state(out, settings, ranks) if resume else None
    session = prepare(dataset, settings, ranks, weights=_weights_file(settings) if saved is None else None)
    if saved is not None:
        encoder = _encoder_of_features(session)
        load_parameters(out / LAST, session.model)
        restore(session, saved)
        changed = any(not torch.equal(value, encoder[key]) for key, value in _encoder_of_features(session).items())
        if changed and not is_finished(session.history, settings):
            raise UsageError(
                f"The features in {settings.features} were not made by the encoder that {out} began with. Make them again "
                "with `ich-train embed` of the run that it came from, or start another run."
            )
        if ranks.first and settings.epochs > settings_of(out)[0].epochs:
            lengthen(out, settings.epochs)
    elif ranks.first and not resume:
        start(out, settings, evaluation)
    return session


def _encoder_of_features(session: Session) -> dict[str, torch.Tensor]:
    """Return a copy of the weights of the encoder if the run learns from the features that it made, else nothing."""
    if session.settings.features is None or not isinstance(session.model, SequenceNetwork):
        return {}
    return {key: value.clone() for key, value in session.model.encoder.state_dict().items()}


def _weights_file(settings: TrainConfig) -> Path | None:
    """Return the file of the initial weights, downloaded if need be."""
    if settings.weights == Path(IMAGENET):
        return imagenet_weights(settings.model)
    return settings.weights


def _train_epoch(session: Session, stop: Stop, reporter: Reporter) -> bool:
    """Take the remaining steps of the current epoch; return False if the run was stopped before its end."""
    settings, ranks = session.settings, session.ranks
    loader, step, meter = session.loader, session.step, session.meter
    epoch, steps = len(session.history) + 1, len(loader)
    session.model.train()
    began, wait_began = time.perf_counter() - meter.seconds, loader.wait_seconds - meter.wait_s
    for batch in to_device(session.batches(loader), ranks.device):
        rate = _rate(session, session.steps_done)
        seed = step_seed(settings.seed, epoch=epoch, step=session.steps_done, rank=ranks.rank)
        sums = step(*batch.inputs, rate=rate, seed=seed, last=session.steps_done + 1 == steps)

        session.steps_done += 1
        between = session.steps_done % settings.accumulate > 0  # two updates
        if session.average is not None and not between:
            session.average.after_step()
        meter.sums += sums
        meter.slices += batch.slices * ranks.world_size
        meter.seconds = time.perf_counter() - began
        meter.wait_s = loader.wait_seconds - wait_began
        reporter.step(epoch, session.steps_done, steps, meter)
        if session.steps_done < steps and not between and stop.agreed_at(session.steps_done):
            return False
    meter.seconds = time.perf_counter() - began  # a GPU may have had some steps in its queue
    return True


def _rate(session: Session, step: int) -> float:
    """Return the learning rate of ``step`` of the current epoch."""
    settings, steps = session.settings, len(session.loader)
    return learning_rate(
        len(session.history) * steps + step,
        peak=settings.learning_rate,
        warmup_steps=round(settings.warmup_epochs * steps),
        all_steps=settings.epochs * steps,
    )


def _close_epoch(session: Session) -> Epoch:
    """Validate, add the epoch to the history and return its line; the session is then at the start of the next one."""
    meter, epoch = session.meter, len(session.history) + 1
    train_loss, train_accuracy = meter.means(session.ranks)
    began = time.perf_counter()
    if session.average is not None:
        session.average.after_epoch(epoch, session.settings.epochs)
    val_loss, val_accuracy, val_auc = _validate(session)
    if not math.isfinite(train_loss + (0.0 if session.val_loader is None else val_loss)):
        other = "" if session.step.precision == torch.float32 else ", or in float32"
        raise TrainError(
            f"The loss is not finite in epoch {epoch}: {train_loss} in training, {val_loss} in validation. Start another "
            f"run with a lower learning_rate than {session.settings.learning_rate:g}{other}."
        )
    line = Epoch(
        epoch=epoch,
        seconds=meter.seconds + time.perf_counter() - began,
        train_loss=train_loss,
        train_accuracy=train_accuracy,
        val_loss=val_loss,
        val_accuracy=val_accuracy,
        learning_rate=_rate(session, len(session.loader) - 1),
        slices_per_s=meter.slices / meter.seconds,
        wait_share=min(meter.wait_s / meter.seconds, 1.0),
        val_auc=val_auc,
    )
    session.history.append(line)
    session.steps_done = 0
    session.meter = Meter.new(session.ranks.device)
    return line


def _validate(session: Session) -> tuple[float, float, float]:
    """Return the mean loss, accuracy and mean ROC AUC over the validation rows of all ranks; NaN if there are none."""
    ranks, step, network = session.ranks, session.step, session.kept
    if session.val_loader is None:
        return math.nan, math.nan, math.nan
    ranks.share_buffers(network)
    network.eval()
    meter, logits, labels = Meter.new(ranks.device), [], []
    for batch in to_device(session.batches(session.val_loader), ranks.device):
        judged = step.validate(network, *batch.inputs)
        meter.sums += torch.stack(judged.sums)
        logits.append(judged.logits.float())
        labels.append(judged.labels.clone())  # a buffer of the loader
    loss, accuracy = meter.means(ranks)
    return loss, accuracy, _mean_area(ranks.gathered(torch.cat(logits)), ranks.gathered(torch.cat(labels)))


def _mean_area(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the mean ROC AUC of the classes for which it is defined, NaN if there are none; both (n, classes)."""
    from ich_train.evaluation.metrics import roc_aucs

    names = [str(k) for k in range(logits.shape[1])]
    areas = roc_aucs(labels.cpu().numpy(), logits.cpu().numpy(), names)
    defined = [area for area in areas.values() if area is not None]
    return sum(defined) / len(defined) if defined else math.nan


def _save(session: Session, folder: Path, *, with_state: bool = False) -> None:
    if session.ranks.first:
        network = session.model if with_state else session.kept  # a run resumes from the weights, not their average
        save_checkpoint(folder, network, meta_of(session), state_of(session) if with_state else None)


def _saved_state(out: Path, settings: TrainConfig, ranks: Ranks) -> dict[str, Any] | None:
    """Return the state of the run in ``out``, which must have started with the same ``settings``; None if it has none."""
    before, _ = settings_of(out)
    # An interrupted replacement is recovered by one rank before the others look.
    if ranks.first:
        has_checkpoint(out / LAST)
    ranks.wait()
    state = load_state(out / LAST) if has_checkpoint(out / LAST) else None
    if state is None:
        _check_untrained(out)
    else:  # the recipe may have been edited since
        try:
            before = TrainConfig.model_validate(state["settings"])
        except (KeyError, ValidationError):
            raise TrainError(
                f"The state of a training run in {out / LAST} is damaged: it has no valid settings. The run cannot be "
                "resumed: start another one, optionally from its best weights."
            ) from None
    check_same(out, before, settings)
    return state


def _check_untrained(out: Path) -> None:
    """Raise `UsageError` if the run in ``out``, which has no ``last/``, has trained for more than one epoch.

    A run that was killed in its first epoch has nothing to resume from, and repeats that epoch. To start any other again
    would overwrite its best network.
    """
    epochs = len(read_history(out)) if (out / HISTORY).exists() else 0
    if has_checkpoint(out / BEST):
        epochs = max(epochs, read_meta(out / BEST).epoch)
    if epochs > 1:
        raise UsageError(
            f"Cannot resume {out}: it has trained {count(epochs, 'epoch')}, but {out / LAST} is missing. Restore that "
            f"folder, or start another run (--weights {out / BEST / WEIGHTS} starts it from this run's best weights)."
        )


def _can_be_tested(dataset: Dataset, settings: TrainConfig, evaluation: EvalConfig) -> bool:
    """Return whether there are slices to evaluate: without a held-out fold, or with a filter, there may be none."""
    filtered = settings.where is not None and evaluation.where is None and evaluation.subset == "test"
    if settings.test_fold != "none" and not filtered:
        return True
    split = split_rows(
        dataset,
        val_fold=settings.val_fold,
        test_fold=settings.test_fold,
        allow_series_labels=True,
        where=settings.where if filtered else None,
        needed=("train",),
    )
    return len(split.test) > 0


def _is_evaluated(out: Path, dataset: Dataset, evaluation: EvalConfig) -> bool:
    """Return whether the last evaluation of the run in ``out`` was on ``dataset``, as ``evaluation`` says."""
    if not (out / METRICS).exists():
        return False
    try:
        metrics = json.loads(read_regular(out / METRICS))
        evaluated = metrics["evaluated"]
        return bool(metrics["dataset"]["digest"] == dataset.digest) and all(
            evaluated.get(name) == value for name, value in evaluation.model_dump(exclude={"batch_size"}).items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # damaged: evaluate again
        return False


def _outline(session: Session) -> str:
    """Describe in a line what is trained on what."""
    ranks, settings = session.ranks, session.settings
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else str(ranks.device)
    where = name if ranks.world_size == 1 else f"{ranks.world_size} x {name}"
    precision = str(session.step.precision).removeprefix("torch.")
    noun, batch = ("slice", settings.batch_size) if settings.head == "none" else ("scan", settings.scans_per_batch)
    loader = session.loader
    to_train, to_validate = loader.items, 0 if session.val_loader is None else session.val_loader.items
    head = "" if settings.head == "none" else f" with head {settings.head}"
    part, parts_of = noun, ""
    if isinstance(loader, VolumeLoader) and loader.slab:
        part, parts_of = "slab", f" of {count(len(loader.scans), 'scan')}"
    unread = (
        f" Not read, because they have no position in their scan: {count(session.unread, 'labelled slice')}."
        if session.unread
        else ""
    )
    return (
        f"Training {settings.model}{head} in {precision} on {where}: {count(to_train, part)}{parts_of}, "
        f"{count(len(loader), 'step')} an epoch, of {count(batch, part)} each; "
        f"{count(to_validate * ranks.world_size, noun)} to validate.{unread}"
    )


def learning_rate(step: int, *, peak: float, warmup_steps: int, all_steps: int) -> float:
    """Return the learning rate of ``step``, counted from 0: a linear rise to ``peak``, then half a cosine to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    return peak * (1 + math.cos(math.pi * (step - warmup_steps) / max(all_steps - warmup_steps, 1))) / 2


def step_seed(seed: int, *, epoch: int, step: int, rank: int) -> int:
    """Return the seed, 0 .. 2**64 - 1, of everything random in one step of one rank."""
    return int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0])
