"""The numbers of a training run and of an evaluation: each knob once, with its default and its range."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MODELS = ("baseline", "resnet18", "resnet34", "resnet50", "densenet121", "densenet169", "seresnext50")
Share = Annotated[float, Field(ge=0, le=1)]


class TrainConfig(BaseModel):
    """The section [train] of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # What is learned from.
    data: Path = Path("data.zarr")
    context: Annotated[int, Field(ge=0)] = 0  # neighbouring slices on each side, as further channels
    windows: tuple[str, ...] = ()  # of an HU dataset, as in [build]; () = those of the build
    val_fold: Annotated[int, Field(ge=0)] = 0
    test_fold: Annotated[int, Field(ge=0)] = 1  # held out, unless the dataset's own test subset has labels
    allow_series_labels: bool = False
    order: Literal["shuffled", "windowed"] = "shuffled"
    sampling: Literal["uniform", "balanced"] = "uniform"  # balanced: rows with rare labels come more often

    # What learns.
    model: str = "baseline"  # one of MODELS, or timm:NAME
    weights: Path | None = None  # ImageNet weights to start from, or those of an earlier run
    dropout: Share = 0.25  # of what goes into the fully connected layers of baseline
    loss: Literal["bce", "rsna"] = "bce"
    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=1)] = 16  # of each rank; small, for few patients want many steps
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.5
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0

    # Augmentation of the training batches; 0 or false turns a part off.
    flip: bool = True  # left and right, of every second slice
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 20.0
    zoom: Share = 0.2
    shift: Share = 0.08  # of the image's side
    # These two are for long runs: in ten epochs on few patients they cost the thin bleeds more than they give.
    window_jitter: Share = 0.0  # of the window's width, for its center and its width
    noise: Share = 0.0  # standard deviation, in units of the 0..1 that a window maps to

    # Where and how it runs.
    device: str = "auto"  # auto: the GPU where there is one
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on a CPU, else mixed
    compile: bool = False  # torch.compile
    cuda_graph: bool = True  # on one GPU, not in float16: the step is recorded once and played back
    threads: Annotated[int, Field(ge=1)] = 2  # that read data


# These may differ between a run and its resumption: they say where it runs, not what it learns.
FREE_ON_RESUME = frozenset({"data", "device", "threads", "cuda_graph"})


class EvalConfig(BaseModel):
    """The section [eval] of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    subset: Literal["train", "val", "test", "all"] = "test"
    limit: Annotated[int, Field(ge=1)] | None = None  # slices, drawn by seed; None = all
    seed: Annotated[int, Field(ge=0)] = 0
    bootstrap: Annotated[int, Field(ge=0)] = 1000  # resamples of the patients
    batch_size: Annotated[int, Field(ge=1)] = 64


def recipe_text(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Return ``sections`` as the text of a TOML recipe.

    Values may be booleans, numbers, strings, paths and sequences of those. A key whose value is None is left out, for
    TOML has no such value: so None may only be a default.
    """
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines.extend(f"{key} = {_toml_value(value)}" for key, value in values.items() if value is not None)
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml_value, value))}]"
    # A JSON boolean, number or string is a TOML one too, but for DEL, which TOML wants escaped.
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False).replace("\x7f", "\\u007f")
