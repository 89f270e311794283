"""Checkpoints: a folder with the weights in safetensors and what else is needed beside them, whole or not there.

::

    best/  last/
        model.safetensors   weights and buffers
        meta.json           how to build the network and what it was trained on
        state.pt            last/ only: what a run needs to go on (tensors and plain values, no pickled objects)

A folder is written under another name, flushed to the disk, and renamed. A process that dies between the two renames
of a replacement leaves the earlier folder under the name ``*.old``, where it is found again.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ich_prep.errors import TrainError
from ich_train.model import build_model

WEIGHTS, META, STATE = "model.safetensors", "meta.json", "state.pt"


@dataclass(frozen=True)
class LoadedModel:
    """A network on its device, in evaluation mode, and the ``meta.json`` that was saved with it."""

    model: torch.nn.Module
    meta: dict[str, Any]


def save_checkpoint(
    folder: Path, model: torch.nn.Module, meta: Mapping[str, Any], state: Mapping[str, Any] | None = None
) -> None:
    """Write ``model`` and ``meta`` (and ``state``) to ``folder``, in place of what was there, whole or not at all.

    ``state`` may hold tensors, numbers, strings, and lists, tuples and dicts of those.
    """
    new = folder.with_name(f"{folder.name}.tmp")
    old = folder.with_name(f"{folder.name}.old")
    _recover(folder)
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    new.mkdir(parents=True)
    # safetensors wants each tensor dense in its own memory; channels_last ones are not.
    save_file({key: value.cpu().contiguous() for key, value in model.state_dict().items()}, new / WEIGHTS)
    (new / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    if state is not None:
        torch.save(dict(state), new / STATE)
    for path in (*new.iterdir(), new):
        _flush(path)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def has_checkpoint(folder: Path) -> bool:
    """Return whether there is a checkpoint at ``folder``."""
    _recover(folder)
    return folder.is_dir()


def load_model(folder: Path, device: torch.device | str) -> LoadedModel:
    """Return the network saved at ``folder`` (``runs/NAME/best``) on ``device``, ready to predict.

    Raises `TrainError` where there is none, or its files are damaged.
    """
    meta = _read_meta(folder)
    model = build_model(meta["name"], channels=meta["channels"], size=meta["size"], classes=len(meta["classes"]))
    load_parameters(folder, model)
    return LoadedModel(model.to(device).eval(), meta)


def load_parameters(folder: Path, model: torch.nn.Module) -> None:
    """Fill ``model`` with the weights saved at ``folder``; raises `TrainError` where they are damaged or do not fit."""
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainError(f"Expected the weights of a run in {folder / WEIGHTS}; found: {error}.") from error


def load_state(folder: Path) -> dict[str, Any]:
    """Return the ``state`` saved at ``folder``, tensors on the CPU; raises `TrainError` where it is damaged."""
    try:
        state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise TrainError(
            f"Expected the state of a training run in {folder / STATE}; found: {error}. "
            "The run cannot go on: start another, with its best weights if they will do."
        ) from error
    return state


def _read_meta(folder: Path) -> dict[str, Any]:
    if not has_checkpoint(folder):
        raise TrainError(f"Expected a checkpoint in {folder}; there is none. Name a run that has trained.")
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"Expected what describes a network in {folder / META}; found: {error}.") from error
    return meta


def _recover(folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
