"""The settings of a training run and of an evaluation: each knob once, with its default, its range and its help text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    field_serializer,
    field_validator,
)

from ich_prep.files import is_url, whole_url

MODELS = ("baseline", "resnet18", "resnet34", "resnet50", "densenet121", "densenet169", "seresnext50")


_BYTES = TypeAdapter(ByteSize)


def _one_or_more(value: Any) -> Any:
    """Return a number as the only one of several."""
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


Fold = Annotated[int, Field(ge=0)] | Literal["none"]


class TrainConfig(BaseModel):
    """The section [train] of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Data.
    data: tuple[Path, ...] = Field(
        default=(Path("data.zarr"),),
        min_length=1,
        description="The dataset, a path or URL; several are read as one, if they store equal pixels.",
    )
    endpoint: str | None = Field(default=None, description="Server of s3:// or gs:// URLs, such as http://host:port.")
    cache: Path | None = Field(default=None, description="Folder of a local disk that keeps the shards of URLs.")
    cache_size: str = Field(default="100GB", description="The most that cache takes, such as 200GB or 1.5TB.")
    shared_patients: Literal["join", "apart"] = Field(
        default="join",
        description="Equal patients of several datasets: join them, or keep them apart as different ones.",
    )
    where: str | None = Field(
        default=None, description="Train on, and choose the best epoch by, the slices of this filter only."
    )
    context: int = Field(default=0, ge=0, description="Neighbouring slices on each side, as further channels.")
    windows: tuple[str, ...] = Field(
        default=(), description="Windows of an HU dataset, made on the device; none: the dataset's."
    )
    val_fold: Fold = Field(
        default=0, description="The fold that chooses the best epoch; none: train on it too, and keep the last epoch."
    )
    test_fold: Fold = Field(
        default=1, description="The fold held out, unless the dataset's test subset has labels; none: train on it too."
    )
    allow_series_labels: bool = Field(default=False, description="Use the labels of a series for each of its slices.")
    order: Literal["shuffled", "windowed"] = Field(
        default="shuffled",
        description="windowed: shuffled among 16 shards at a time, for storage with slow random reads.",
    )
    sampling: Literal["uniform", "balanced"] = Field(
        default="uniform", description="balanced: slices with rare labels are drawn more often."
    )

    # Network and optimization.
    model: str = Field(
        default="baseline",
        description=f"The network: {', '.join(MODELS)}, timm:NAME, or package.module:NAME for one of your own.",
    )
    weights: Path | None = Field(
        default=None,
        description="Initial weights: a file, a run's or with torchvision's names; imagenet: downloaded once.",
    )
    dropout: float = Field(
        default=0.25, ge=0, le=1, description="Dropout before the fully connected layers of baseline."
    )
    loss: str = Field(
        default="bce",
        description="bce; rsna: any counts twice, for RSNA's six classes only; or package.module:NAME for one of your own.",
    )
    # The competition's metric is the plain cross-entropy: both of these trade it for recall of rare labels.
    focal_gamma: float = Field(default=0.0, ge=0, description="Focal loss: how much easy labels count less; 0: not.")
    pos_weight: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_one_or_more)] = Field(
        default=(), description="Weight of positive labels in the loss: one number, or one for each class; none: 1."
    )
    epochs: int = Field(default=10, ge=1, description="Passes over the training slices.")
    # Small, because few patients need many steps.
    batch_size: int = Field(default=16, ge=1, description="Slices in a batch of each process.")
    learning_rate: float = Field(default=2e-3, gt=0, description="Peak learning rate; half a cosine to 0 follows.")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay of kernels.")
    warmup_epochs: float = Field(default=0.5, ge=0, description="Epochs in which the learning rate rises.")
    accumulate: int = Field(default=1, ge=1, description="Batches whose gradients are averaged for one update.")
    # 0.999 needs some thousand steps: with the few of a small set the average would still hold the start.
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="Validate and keep an exponential average of the weights; 0: the weights."
    )
    average_epochs: int = Field(
        default=0, ge=0, description="Validate and keep the mean of the weights after each of the last epochs; 0: not."
    )
    choose_best: Literal["loss", "auc"] = Field(
        default="loss",
        description="What chooses the best epoch in validation: the lowest loss or the highest mean ROC AUC.",
    )
    patience: int = Field(default=0, ge=0, description="Stop after so many epochs without a better one; 0: never.")
    clip_norm: float = Field(default=1.0, gt=0, description="Largest norm of the gradient.")
    seed: int = Field(default=0, ge=0, le=(1 << 63) - 1, description="The seed of everything random.")

    # Whole scans, read as a sequence of slices or as a volume.
    head: Literal["none", "gru", "lstm", "transformer", "attention", "volume"] = Field(
        default="none",
        description="What reads the slices of a scan after the network: gru, lstm, transformer, or attention alone; volume: "
        "the network itself takes volumes.",
    )
    # 128 in each direction, one layer: two layers of a few hundred scans overfit.
    head_size: int = Field(default=128, ge=4, description="Hidden units of the head.")
    head_layers: int = Field(default=1, ge=1, description="Layers of the head.")
    scans_per_batch: int = Field(default=2, ge=1, description="Scans in a batch of each process, with a head.")
    # A scan has about 35 slices: its label then counts for as much as a third of theirs.
    scan_weight: float = Field(
        default=10.0, ge=0, description="How many slices the label of a scan counts for in the loss, with a head."
    )
    slab: int = Field(
        default=0,
        ge=0,
        description="Train on slabs of this many slices, which need labels of slices; 0: on whole scans.",
    )
    spacing_mm: float = Field(
        default=0.0, ge=0, description="With head volume: resample to planes this far apart; 0: the slices as they are."
    )
    depth_mm: float = Field(
        default=0.0,
        ge=0,
        description="With spacing_mm: what the planes span, cut or padded; 0: what each scan spans.",
    )
    isotropic: bool = Field(default=False, description="With spacing_mm: resample the planes to that distance too.")
    features: Path | None = Field(
        default=None, description="Train the head alone, on the features that ich-train embed wrote."
    )

    # Augmentation of the training batches; 0 or false turns a part off.
    flip: bool = Field(default=True, description="Mirror every second slice, left to right.")
    rotation_degrees: float = Field(default=20.0, ge=0, le=180, description="Largest rotation.")
    zoom: float = Field(default=0.2, ge=0, le=1, description="Largest change of scale.")
    shift: float = Field(default=0.08, ge=0, le=1, description="Largest shift, as a share of the image's side.")
    # The next two are for long runs: in ten epochs on few patients they hurt thin bleeds more than they help.
    window_jitter: float = Field(
        default=0.0, ge=0, le=1, description="Change of center and width, as a share of the width."
    )
    noise: float = Field(default=0.0, ge=0, le=1, description="Standard deviation of noise; a window maps to 0..1.")

    augmentation: str = Field(
        default="", description="package.module:NAME of a further augmentation of your own, of windows in 0..1."
    )

    # Where and how it runs.
    device: str = Field(default="auto", description="cpu, cuda, cuda:1 ...; auto: a GPU if there is one.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: float32 on a CPU, mixed precision on a GPU."
    )
    compile: bool = Field(default=False, description="Use torch.compile.")
    cuda_graph: bool = Field(
        default=True, description="On one GPU, except in float16: record the step as a CUDA graph."
    )
    threads: int = Field(default=2, ge=1, description="Threads that read data.")
    logger: str = Field(default="", description="package.module:NAME of a function that is told of every epoch.")

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("cache_size")
    @classmethod
    def _size(cls, value: str) -> str:
        if _BYTES.validate_python(value) < 1:
            raise ValueError("expected a size such as 200GB")
        return value

    @property
    def cache_bytes(self) -> int:
        """``cache_size`` in bytes."""
        return _BYTES.validate_python(self.cache_size)

    @field_serializer("data")
    def _as_written(self, value: tuple[Path, ...]) -> Any:
        written = tuple(whole_url(path) if is_url(path) else path for path in value)
        return written[0] if len(written) == 1 else written


# These may differ between a run and its resumption: they say where it runs, not what it learns.
FREE_ON_RESUME = frozenset({"data", "endpoint", "cache", "cache_size", "device", "threads", "cuda_graph", "logger"})


class EvalConfig(BaseModel):
    """The section [eval] of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    subset: Literal["train", "val", "test", "all"] = Field(
        default="test", description="The part of the split to evaluate, or all; not the dataset's own subsets."
    )
    where: str | None = Field(
        default=None,
        description="Evaluate the slices of this filter only; none: those of the run's own, if it has one.",
    )
    limit: int | None = Field(default=None, ge=1, description="Evaluate this many slices, drawn by the seed.")
    seed: int = Field(default=0, ge=0, le=(1 << 63) - 1, description="The seed of the draw and of the bootstrap.")
    bootstrap: int = Field(default=1000, ge=0, description="Resamples of the patients, for the intervals.")
    batch_size: int = Field(default=64, ge=1, description="Slices in a batch.")
    by: str | None = Field(
        default=None, description="A column of the dataset, such as x_sex: measure the slices of each value, too."
    )
    mirror: bool = Field(
        default=False, description="Average the logits with those of the slices mirrored left to right."
    )
    sensitivity: float | None = Field(
        default=None, gt=0, le=1, description="Add an operating point: the threshold of this sensitivity on validation."
    )


class PredictConfig(BaseModel):
    """What ``ich-train predict`` reads and how it sums up scans; no section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    src: tuple[Path, ...] = Field(
        default=(), description="A dataset; or folders and zip archives of DICOM files, may be repeated."
    )
    where: str | None = Field(default=None, description="Predict only slices that this filter selects.")
    # Of DICOM files. These are fields of a build's Spec, which is not imported here for NumPy's sake: a test compares them.
    layout: str = Field(default="auto", description="auto, rsna, cq500 or folder.")
    include: tuple[str, ...] = Field(
        default=(), description="Keep only files that match, such as BodyPartExamined=HEAD,BRAIN. May be repeated."
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="Leave out files that match, such as 'SeriesDescription~bone|angio'. May be repeated."
    )
    one_series_per_study: Literal["off", "thickest"] = Field(
        default="off", description="Keep one series of each study: plain before others, then the thickest slices."
    )
    rescale_types: tuple[str, ...] = Field(
        default=(), description="RescaleTypes to take as HU, as a,b, besides those that say so."
    )
    allow_burned_in: bool = Field(default=False, description="Keep slices with burned-in text.")
    skip_flagged: bool = Field(default=False, description="Give no call to scans with flags.")
    # The evaluation's first view by series is that of the maximum: one slice with a bleed makes a scan positive.
    aggregate: Literal["max", "top3", "mean"] = Field(
        default="max",
        description="A scan's probability: of its slices the highest, the mean of the 3 highest, or of all.",
    )
    # Who reads a probability means its value: eval has fitted it already, and rankings do not change.
    calibrate: bool = Field(
        default=True, description="Divide the logits of slices by the temperature of the run's own evaluation, if any."
    )
    format: Literal["table", "kaggle"] | None = Field(
        default=None, description="table, or kaggle (RSNA's submission). [default: table with --src, else kaggle]"
    )

    @field_validator("src", "include", "exclude", "rescale_types", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value


# The fields of PredictConfig that are a build's.
SOURCE_OPTIONS = ("layout", "include", "exclude", "one_series_per_study", "rescale_types", "allow_burned_in")


def recipe_text(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Return ``sections`` as the text of a TOML recipe.

    Values may be booleans, numbers, strings, paths and sequences of those. A key whose value is None is omitted, because
    TOML has no null: None may only be a default.
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
    # A JSON boolean, number or string is also a TOML one, except for DEL, which TOML wants escaped.
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False).replace("\x7f", "\\u007f")
