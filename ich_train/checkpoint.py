"""Checkpoints: a folder with weights in safetensors and the rest of a run's state, complete or absent.

::

    best/  last/
        model.safetensors   weights and buffers
        meta.json           how to rebuild the network and what it was trained on
        state.pt            last/ only: what a run needs to resume (tensors and plain values, no pickled objects)

``meta.json`` also has the SHA-256 of the other files, and of itself; checkpoints of earlier versions have none.

A folder is written under another name, flushed to disk, and renamed. A process that dies between the two renames of a
replacement leaves the earlier folder under the name ``*.old``, from where it is recovered.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load

from ich_prep.dataset.schema import digest_of
from ich_prep.dataset.storage import sync_folder, write_whole
from ich_prep.dataset.windows import Window
from ich_prep.errors import TrainError, count, describe_os_error
from ich_prep.files import read_regular
from ich_train.config import Fold
from ich_train.model import build_model
from ich_train.preprocess import Scaling
from ich_train.scan_network import HeadShape, build_scan_network
from ich_train.weights import tensor_bytes, weight_differences

if TYPE_CHECKING:
    from ich_prep.dataset.dataset import Dataset

WEIGHTS, META, STATE = "model.safetensors", "meta.json", "state.pt"
MAX_META_BYTES = 1 << 24  # some kilobytes


class Images(BaseModel):
    """The stored image of each slice: ``size`` x ``size`` pixels, as ``windows`` or as HU."""

    model_config = ConfigDict(frozen=True)

    size: int
    pixels: Literal["windows", "hu"]
    windows: tuple[Window, ...]  # stored; of HU, those that the dataset names as its default
    orientation: Literal["patient", "as-stored"] = "as-stored"  # of the first runs, which did not record it

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        """Return what ``dataset`` stores."""
        spec = dataset.spec
        return cls(size=spec.size, pixels=spec.store, windows=tuple(spec.windows), orientation=spec.orientation)

    def describe(self) -> str:
        """Describe its pixels; equal text means equal pixels, because any windows can be computed from HU."""
        if self.pixels == "hu":
            return f"HU at {self.size} x {self.size}"
        names = ", ".join(f"{window.name} {window.center:g}/{window.width:g}" for window in self.windows)
        return f"windows {names} at {self.size} x {self.size}"


class TrainedOn(BaseModel):
    """A dataset that a network was trained on."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    digest: str
    generation: int

    @classmethod
    def parts_of(cls, dataset: Dataset) -> tuple[Self, ...]:
        """Return the datasets that ``dataset`` consists of."""
        return tuple(
            cls(name=part.path.name, digest=part.digest, generation=part.root.generation) for part in dataset.parts
        )


class Meta(BaseModel):
    """The content of ``meta.json``; unknown keys, of a later version, are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    # How to rebuild the network.
    network: str  # as `ich_train.model.build_model` takes it
    channels: int  # of its input
    classes: tuple[str, ...]  # of its logits, in their order
    # How to make its input.
    images: Images
    context: int
    windows: tuple[Window, ...]  # that it sees
    scaling: Scaling = Scaling()
    # Over the slices of a scan; None: it sees slices.
    head: HeadShape | None = None
    # What it was trained on.
    dataset_digest: str
    datasets: tuple[TrainedOn, ...] = ()  # one, unless several were read as one; none in runs of earlier versions
    where: str | None = None  # the filter that selected its slices
    val_fold: Fold
    test_fold: Fold
    epoch: int
    val_loss: float | None


@dataclass(frozen=True)
class LoadedModel:
    """A network on its device, in evaluation mode, and the ``meta.json`` that was saved with it."""

    model: torch.nn.Module
    meta: Meta


def save_checkpoint(folder: Path, model: torch.nn.Module, meta: Meta, state: Mapping[str, Any] | None = None) -> None:
    """Write ``model`` and ``meta`` (and ``state``) to ``folder``, replacing what was there, completely or not at all.

    ``state`` may hold tensors, numbers, strings, and lists, tuples and dicts of those.
    """
    new = folder.with_name(f"{folder.name}.tmp")
    old = folder.with_name(f"{folder.name}.old")
    _recover(folder)
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        _write_checkpoint(new, model, meta, state)
    except BaseException:  # a full disk: what was there stays, and its space is free again
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_checkpoint(new: Path, model: torch.nn.Module, meta: Meta, state: Mapping[str, Any] | None) -> None:
    digests = {WEIGHTS: _write(new / WEIGHTS, tensor_bytes(model.state_dict()))}
    if state is not None:
        saved = io.BytesIO()
        torch.save(dict(state), saved)
        digests[STATE] = _write(new / STATE, saved.getvalue())
    document = meta.model_dump(mode="json") | {"digests": digests}
    document["digest"] = digest_of(document)
    write_whole(new / META, json.dumps(document, indent=1).encode())
    sync_folder(new)


def _write(path: Path, data: bytes) -> str:
    """Write ``data`` and return its SHA-256."""
    write_whole(path, data)
    return hashlib.sha256(data).hexdigest()


def has_checkpoint(folder: Path) -> bool:
    """Return whether there is a checkpoint at ``folder``."""
    _recover(folder)
    return folder.is_dir()


def load_model(folder: Path, device: torch.device | str) -> LoadedModel:
    """Return the network saved at ``folder`` (``runs/NAME/best``) on ``device``, ready to predict.

    Raises `TrainError` if there is none or its files are damaged, `UsageError` if its code cannot be imported.
    """
    meta = read_meta(folder)
    model = build_network(meta)
    load_parameters(folder, model)
    return LoadedModel(model.to(device).eval(), meta)


def build_network(meta: Meta) -> torch.nn.Module:
    """Return the network that ``meta`` describes, with random weights."""
    given: dict[str, Any] = {"channels": meta.channels, "size": meta.images.size, "classes": len(meta.classes)}
    if meta.head is None:
        return build_model(meta.network, **given)
    return build_scan_network(meta.network, meta.head, **given)


def read_meta(folder: Path) -> Meta:
    """Return the ``meta.json`` of the checkpoint at ``folder``; raises `TrainError` if it cannot be read."""
    if not has_checkpoint(folder):
        runs = sorted(path.parent for path in folder.parent.glob(f"fold-*/{folder.name}") if has_checkpoint(path))
        if runs:
            raise TrainError(
                f"{folder.parent} is a cross-validation: it has no network of its own, but those of its "
                f"{count(len(runs), 'run')}. Name one or several of them: {' '.join(map(str, runs))}"
            )
        raise TrainError(f"No checkpoint in {folder}. Name a run that has trained.")
    file = folder / META
    try:
        return Meta.model_validate(_document(folder))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        reason = f"{place}: {problem['msg']}" if place else problem["msg"]
        raise TrainError(f"The description of a network in {file} is damaged: {reason}.") from error


def _document(folder: Path) -> dict[str, Any]:
    """Return what ``meta.json`` of the checkpoint at ``folder`` says; raises `TrainError` if it is not what was written."""
    file = folder / META
    try:
        document = json.loads(read_regular(file, limit=MAX_META_BYTES))
        if not isinstance(document, dict):
            raise TypeError(f"it is a {type(document).__name__}")
        if "digest" in document and document["digest"] != digest_of(document):
            raise ValueError("digest mismatch")
    except OSError as error:
        raise TrainError(f"Cannot read the description of a network: {describe_os_error(error)}.") from error
    except (ValueError, TypeError, RecursionError) as error:  # ValueError: not JSON, not UTF-8
        raise TrainError(f"The description of a network in {file} is damaged: {error}.") from error
    return document


def _verified(file: Path) -> bytes:
    """Return the bytes of a ``file`` of a checkpoint; raises `OSError`, and `ValueError` if they are others."""
    data = read_regular(file)
    digests = _document(file.parent).get("digests") if (file.parent / META).exists() else None
    if isinstance(digests, dict) and digests.get(file.name) not in (None, hashlib.sha256(data).hexdigest()):
        raise ValueError("SHA-256 mismatch")
    return data


def load_parameters(folder: Path, model: torch.nn.Module) -> None:
    """Fill ``model`` with the weights saved at ``folder``; raises `TrainError` if they are damaged or do not fit."""
    file = folder / WEIGHTS
    try:
        tensors = load(_verified(file))
    except OSError as error:
        raise TrainError(f"Cannot read the weights of a run in {file}: {describe_os_error(error)}.") from error
    except (SafetensorError, KeyError, TypeError) as error:  # KeyError: an unknown kind of number
        raise TrainError(f"The weights of a run in {file} are damaged: not a whole safetensors file.") from error
    except ValueError as error:
        raise TrainError(f"The weights of a run in {file} are damaged: {error}.") from error
    differences = weight_differences(tensors, model.state_dict())
    if differences:
        raise TrainError(
            f"The weights in {file} do not fit the network that {META} describes: {differences}. Was its code changed?"
        )
    not_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise TrainError(
            f"The weights in {file} are damaged: {not_finite[0]} has a value that is not finite. Use another checkpoint of "
            "the run, or train again with a lower learning_rate."
        )
    model.load_state_dict(tensors)


def load_state(folder: Path) -> dict[str, Any]:
    """Return the ``state`` saved at ``folder``, tensors on the CPU; raises `TrainError` if it is damaged."""
    file = folder / STATE
    try:
        saved = io.BytesIO(_verified(file))
        state: dict[str, Any] = torch.load(saved, map_location="cpu", weights_only=True)
    except TrainError:
        raise
    except Exception as error:  # an unpickler may raise anything on bytes that it does not expect
        reason = describe_os_error(error) if isinstance(error, OSError) else "the file is damaged"
        raise TrainError(
            f"Cannot read the state of a training run in {file}: {reason}. The run cannot be resumed: start another one, "
            "optionally from its best weights."
        ) from error
    if not isinstance(state, dict):
        raise TrainError(f"The state of a training run in {file} is damaged: it is a {type(state).__name__}.")
    return state


def _recover(folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)
