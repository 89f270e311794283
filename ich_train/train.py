"""The training loop: rows of a dataset in, a folder with the best network and its report out.

All that is random is a function of (seed, epoch, step, rank), and the learning rate one of the step: so a run that was
stopped goes on exactly with no more than its weights, its optimizer's state and the loader's place.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ich_prep.errors import TrainError
from ich_train.checkpoint import has_checkpoint, load_parameters, load_state, save_checkpoint
from ich_train.config import TrainConfig
from ich_train.data import on_device
from ich_train.loss import loss_sums
from ich_train.progress import Meter, Reporter, tensorboard
from ich_train.ranks import Ranks, Stop, join_ranks, own_stream
from ich_train.runs import BEST, LAST, METRICS, Epoch, check_same, settings_of, start, write_history
from ich_train.setup import Training, prepare

if TYPE_CHECKING:
    from rich.console import Console

    from ich_prep.dataset.dataset import Dataset
    from ich_train.config import EvalConfig


@dataclass(frozen=True)
class Result:
    """What a run came to. ``finished`` is false where it was told to stop; ``metrics`` are those of the evaluation."""

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
) -> Result:
    """Train as ``settings`` say on ``dataset``, evaluate the best epoch if ``evaluation`` says how, return the result.

    Writes the folder ``out``, from rank 0 only where torchrun started several processes. ``resume`` goes on with the
    run in ``out``. SIGINT and SIGTERM end the step at hand, write ``last/`` and return. Raises `UsageError` for
    settings that cannot be meant, `TrainError` where the loss is no longer a number, a checkpoint is damaged, or a step
    cannot be recorded as a CUDA graph.
    """
    with join_ranks(settings.device) as ranks, own_stream(ranks.device), Stop(ranks) as stop:
        saved = _saved_state(out, settings, ranks) if resume else None
        training = prepare(dataset, settings, ranks, weights=settings.weights if saved is None else None)
        reporter = Reporter(console, epochs=settings.epochs, silent=not ranks.first)
        if saved is not None:
            load_parameters(out / LAST, training.model)
            training.resume(saved)
            del saved  # an optimizer's state is twice as large as its network
        elif ranks.first and not resume:
            start(out, settings, evaluation)
        reporter.say(_outline(training, ranks))
        if resume:
            reporter.say(
                f"Going on with {out} in epoch {len(training.history) + 1}, after {training.step} steps of it."
            )
        events = tensorboard(out, len(training.history) + 1) if ranks.first else nullcontext()

        with reporter, events as board:
            while len(training.history) < settings.epochs:
                ended = _train_epoch(training, ranks, stop, reporter)
                if not ended:
                    training.meter.sums = ranks.total(training.meter.sums)
                    _save(training, out / LAST, ranks, with_state=True)
                    return Result(out, tuple(training.history), finished=False)
                line = _close_epoch(training, ranks)

                # Best before last: a run that dies between the two does this epoch again and finds the same best.
                if line is training.best:
                    _save(training, out / BEST, ranks)
                if ranks.first:
                    (out / METRICS).unlink(missing_ok=True)  # of an earlier epoch, where the run was judged on its way
                    write_history(out, training.history)
                _save(training, out / LAST, ranks, with_state=True)
                reporter.epoch(line, best=line is training.best)
                if board is not None:
                    for name, value in asdict(line).items():
                        board.add_scalar(name, value, line.epoch)
                work_left = line.epoch < settings.epochs or evaluation is not None
                if work_left and stop.agreed():
                    return Result(out, tuple(training.history), finished=False)

        reporter.summary(training.history)

    result = Result(out, tuple(training.history), finished=True)
    del training  # a recorded step keeps its memory as long as it lives
    if evaluation is None or not ranks.first or (resume and _is_judged(out, dataset, evaluation)):
        return result
    from ich_train.evaluate import evaluate_run

    metrics = evaluate_run(out, dataset, **evaluation.model_dump(), device=str(ranks.device), threads=settings.threads)
    return replace(result, metrics=metrics)


def _train_epoch(training: Training, ranks: Ranks, stop: Stop, reporter: Reporter) -> bool:
    """Take the steps that the epoch at hand still has; return False where the run was told to stop before its end."""
    settings, loader, meter = training.settings, training.loader, training.meter
    epoch, steps = len(training.history) + 1, len(loader)
    training.model.train()
    began, wait_began = time.perf_counter() - meter.seconds, loader.wait_seconds - meter.wait_s
    for batch in on_device(loader, ranks.device):
        rate = _rate(training, training.step)
        seed = step_seed(settings.seed, epoch=epoch, step=training.step, rank=ranks.rank)
        sums = training.learn(batch.images, batch.labels, rate=rate, seed=seed)

        training.step += 1
        meter.sums += sums
        meter.slices += len(batch.rows) * ranks.world_size
        meter.seconds = time.perf_counter() - began
        meter.wait_s = loader.wait_seconds - wait_began
        reporter.step(epoch, training.step, steps, meter)
        if training.step < steps and stop.agreed_at(training.step):
            return False
    meter.seconds = time.perf_counter() - began  # a GPU may have had some steps in its queue
    return True


def _rate(training: Training, step: int) -> float:
    """Return the learning rate of ``step`` of the epoch at hand."""
    settings, steps = training.settings, len(training.loader)
    return learning_rate(
        len(training.history) * steps + step,
        peak=settings.learning_rate,
        warmup_steps=round(settings.warmup_epochs * steps),
        all_steps=settings.epochs * steps,
    )


def _close_epoch(training: Training, ranks: Ranks) -> Epoch:
    """Validate, add the epoch's line to the history and return it; the training then stands at the next one's start."""
    meter, epoch = training.meter, len(training.history) + 1
    train_loss, train_accuracy = meter.means(ranks)
    began = time.perf_counter()
    val_loss, val_accuracy = _validate(training, ranks)
    if not math.isfinite(train_loss + val_loss):
        raise TrainError(
            f"Expected losses that are numbers; found {train_loss} in training and {val_loss} in validation in epoch "
            f"{epoch}. Start another run with a lower learning_rate than {training.settings.learning_rate:g}, or in "
            "float32."
        )
    line = Epoch(
        epoch=epoch,
        seconds=meter.seconds + time.perf_counter() - began,
        train_loss=train_loss,
        train_accuracy=train_accuracy,
        val_loss=val_loss,
        val_accuracy=val_accuracy,
        learning_rate=_rate(training, len(training.loader) - 1),
        slices_per_s=meter.slices / meter.seconds,
        wait_share=min(meter.wait_s / meter.seconds, 1.0),
    )
    training.history.append(line)
    training.step = 0
    training.meter = Meter.new(ranks.device)
    return line


def _validate(training: Training, ranks: Ranks) -> tuple[float, float]:
    """Return the mean loss and the accuracy over the validation rows of all ranks."""
    ranks.share_buffers(training.model)
    training.model.eval()
    meter = Meter.new(ranks.device)
    with torch.inference_mode(), training.mixed():
        for batch in on_device(training.val_loader, ranks.device):
            logits = training.model(training.preprocess(batch.images))
            meter.sums += torch.stack(loss_sums(logits, batch.labels, training.label_weights))
    return meter.means(ranks)


def _save(training: Training, folder: Path, ranks: Ranks, *, with_state: bool = False) -> None:
    if ranks.first:
        save_checkpoint(folder, training.model, training.meta(), training.state() if with_state else None)


def _saved_state(out: Path, settings: TrainConfig, ranks: Ranks) -> dict[str, Any] | None:
    """Return the state of the run in ``out``, which must have begun with the same ``settings``; None if it has none."""
    before, _ = settings_of(out)
    # A replacement that was cut short is put right by one rank before the others look.
    if ranks.first:
        has_checkpoint(out / LAST)
    ranks.wait()
    state = load_state(out / LAST) if has_checkpoint(out / LAST) else None
    # The recipe may have been edited since; but earlier versions saved no settings.
    if state is not None and "settings" in state:
        before = TrainConfig.model_validate(state["settings"])
    check_same(out, before, settings)
    return state


def _is_judged(out: Path, dataset: Dataset, evaluation: EvalConfig) -> bool:
    """Return whether the run in ``out`` was last evaluated on ``dataset``, as ``evaluation`` says."""
    if not (out / METRICS).exists():
        return False
    metrics = json.loads((out / METRICS).read_text(encoding="utf-8"))
    judged = metrics["evaluated"]
    return metrics["dataset"]["digest"] == dataset.digest and all(
        judged[name] == value for name, value in evaluation.model_dump(exclude={"batch_size"}).items()
    )


def _outline(training: Training, ranks: Ranks) -> str:
    """Say in a line what is trained on what."""
    device = ranks.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return (
        f"Training {training.settings.model} in {str(training.precision).removeprefix('torch.')} on "
        f"{where if ranks.world_size == 1 else f'{ranks.world_size} x {where}'}: {len(training.loader.rows):,} slices, "
        f"{len(training.loader):,} steps an epoch, of {training.settings.batch_size} slices each; "
        f"{len(training.val_loader.rows) * ranks.world_size:,} slices to validate."
    )


def learning_rate(step: int, *, peak: float, warmup_steps: int, all_steps: int) -> float:
    """Return the learning rate of ``step``, counted from 0: a straight rise to ``peak``, then half a cosine to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    return peak * (1 + math.cos(math.pi * (step - warmup_steps) / max(all_steps - warmup_steps, 1))) / 2


def step_seed(seed: int, *, epoch: int, step: int, rank: int) -> int:
    """Return the seed, 0 .. 2**64 - 1, of all that chance decides in one step of one rank."""
    return int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0])
