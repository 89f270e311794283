"""What a checkpoint records of a session, and how to restore it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from ich_prep.errors import TrainError, count
from ich_train.checkpoint import Images, Meta, TrainedOn
from ich_train.meters import Meter
from ich_train.runs import Epoch
from ich_train.scan_session import head_shape
from ich_train.session import Session

if TYPE_CHECKING:
    from ich_prep.dataset.dataset import Dataset


def meta_of(session: Session) -> Meta:
    """Return what ``meta.json`` says of the network as it is now."""
    settings = session.settings
    return Meta(
        network=settings.model,
        channels=session.channels,
        classes=session.dataset.classes,
        images=Images.of(session.dataset),
        context=settings.context,
        windows=session.windows,
        scaling=session.preprocess.scaling,
        head=head_shape(settings),
        dataset_digest=session.dataset.digest,
        datasets=TrainedOn.parts_of(session.dataset),
        where=settings.where,
        val_fold=settings.val_fold,
        test_fold=settings.test_fold,
        epoch=len(session.history),
        val_loss=session.history[-1].val_loss if session.history and session.val_loader is not None else None,
    )


def state_of(session: Session) -> dict[str, Any]:
    """Return what `restore` needs, beside the weights, to resume from here."""
    return {
        "dataset_digest": session.dataset.digest,
        "datasets": [part.digest for part in session.dataset.parts],
        "settings": session.settings.model_dump(mode="json"),
        "optimizer": session.step.optimizer.state_dict(),
        "scaler": session.step.scaler.state_dict(),
        "loader": session.loader.state_dict(),
        "history": [asdict(line) for line in session.history],
        "step": session.steps_done,
        "meter": asdict(session.meter),
        "average": None if session.average is None else session.average.state_dict(),
    }


def restore(session: Session, state: Mapping[str, Any]) -> None:
    """Bring ``session`` to where ``state`` was taken; raises `TrainError` if that was on another dataset, or is damaged."""
    try:
        _restore(session, state)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise TrainError(
            f"The state of the run is damaged ({type(error).__name__}: {str(error)[:200]}). It cannot be resumed: start "
            "another run, optionally from its best weights."
        ) from error


def _restore(session: Session, state: Mapping[str, Any]) -> None:
    dataset, step, ranks = session.dataset, session.step, session.ranks
    if state["dataset_digest"] != dataset.digest:
        raise _another_dataset(state, dataset)
    step.optimizer.load_state_dict(state["optimizer"])
    for group in step.optimizer.param_groups:
        group["capturable"] = False  # until a step is recorded
    if state["scaler"]:  # empty if the run started in another precision, on another device
        step.scaler.load_state_dict(state["scaler"])
    # Only the first rank's position was saved: the others were at the same batch, of their own shares.
    session.loader.load_state_dict(state["loader"] | {"rank": ranks.rank})
    session.history = [Epoch(**line) for line in state["history"]]
    session.steps_done = state["step"]
    if session.average is not None:
        session.average.load_state_dict(state["average"])
    session.meter = Meter(**state["meter"])
    # The sums of all ranks were added up before they were saved: the first rank continues from the totals.
    sums = session.meter.sums if ranks.first else torch.zeros_like(session.meter.sums)
    session.meter.sums = sums.to(ranks.device)


def _another_dataset(state: Mapping[str, Any], dataset: Dataset) -> TrainError:
    """Return the error that says which of the datasets is not the one that the run of ``state`` started with."""
    recorded = state.get("datasets", [state["dataset_digest"]])
    if len(recorded) != len(dataset.parts):
        return TrainError(
            f"The run started with {count(len(recorded), 'dataset')}, and --data names {len(dataset.parts)}. Name the same "
            "ones, in the same order."
        )
    differing = [(digest, part) for digest, part in zip(recorded, dataset.parts, strict=True) if digest != part.digest]
    if not differing:
        return TrainError("The run started with another --shared-patients. Resume it with the same one.")
    digest, part = differing[0]
    for generation, event in enumerate(part.root.history):
        if event.digests.get("before") == digest:
            return TrainError(
                f"The run started with generation {generation} of {part.path}, which is now generation "
                f"{part.root.generation}: a run is resumed with what it began with. Name a copy of that generation with "
                "--data, or start another run (--weights can start it from this run's weights)."
            )
    return TrainError(
        f"The run started with another dataset: its digest was {digest}, that of {part.path} is {part.digest}. Name the "
        "right one with --data."
    )
