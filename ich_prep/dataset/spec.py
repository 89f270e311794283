"""Build options, and the part of them that readers need. Light to import: the command line is declared from it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ich_prep.dataset.classes import RSNA_CLASSES, class_name_problem
from ich_prep.dataset.windows import PRESETS, Window, parse_windows
from ich_prep.recipe import refuse_unknown

LINKS = ("patient", "study", "series", "image")


class Stored(BaseModel):
    """What a reader needs to know about the pixels. Other keys of a root's spec are ignored.

    ``windows`` are the channels of a "windows" store, and the default of a reader that windows an "hu" store.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    size: int = Field(default=512, ge=16, le=4096, description="Rows and columns of a stored slice.")
    store: Literal["windows", "hu"] = Field(default="windows", description="windows (uint8 codes) or hu (int16).")
    windows: tuple[Window, ...] = Field(
        default=(PRESETS["brain"], PRESETS["subdural"], PRESETS["bone"]),
        min_length=1,
        description="Of brain, subdural, bone, soft_tissue, stroke, or name=center/width in HU.",
    )
    slices_per_shard: int = Field(default=256, ge=1, le=65536, description="Slices in one file.")
    codec: Literal["lz4", "zstd", "none"] = Field(default="lz4", description="lz4, zstd or none.")
    orientation: Literal["patient", "as-stored"] = Field(
        default="patient", description="patient (slices turned upright, foot to head) or as-stored (as in the files)."
    )

    @field_validator("windows", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        value = _words(value)
        if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
            return parse_windows(value)
        return value

    @property
    def channels(self) -> int:
        """The number of channels of a stored slice."""
        return len(self.windows) if self.store == "windows" else 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a stored pixel: uint8 window codes, or int16 HU."""
        return np.dtype(np.uint8 if self.store == "windows" else np.int16)


class Spec(Stored):
    """All options of a build that change the bytes or rows of a dataset, and nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: str = Field(default="auto", description="auto, rsna, cq500 or folder.")
    classes: tuple[str, ...] = Field(default=RSNA_CLASSES, description="Label columns of the folder layout, as a,b,c.")
    image_types: Literal["all", "original"] = Field(
        default="all", description="all, or original: without derived and reformatted slices."
    )
    rescale_types: tuple[str, ...] = Field(
        default=(), description="RescaleTypes to take as HU, as a,b, besides those that say so."
    )
    allow_burned_in: bool = Field(default=False, description="Keep slices with burned-in text.")
    folds: int = Field(default=5, ge=2, le=127, description="Number of folds, by groups of linked patients.")
    patients: Literal["header", "study", "column"] = Field(
        default="header",
        description="What identifies a patient: PatientID, the study, or the column patient_id of the label table.",
    )
    link: tuple[str, ...] = Field(
        default=LINKS, description="What keeps slices in one fold: of patient, study, series, image."
    )
    split_groups: bool = Field(
        default=False, description="Let the columns subset and fold of the label table split linked patients."
    )

    include: tuple[str, ...] = Field(
        default=(), description="Keep only files that match, such as BodyPartExamined=HEAD,BRAIN. May be repeated."
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="Leave out files that match, such as 'SeriesDescription~bone|angio'. May be repeated."
    )
    min_slices: int = Field(default=1, ge=1, description="Leave out series of fewer slices.")
    one_series_per_study: Literal["off", "thickest"] = Field(
        default="off", description="Keep one series of each study: plain before others, then the thickest slices."
    )
    identifiers: Literal["keep", "pseudonymise"] = Field(
        default="keep",
        description="keep, or pseudonymise: UIDs, patients and paths replaced by means of a key, header texts removed.",
    )

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        # Not split at commas: a filter may contain some.
        return [value] if isinstance(value, str) else value

    @field_validator("link")
    @classmethod
    def _known_links(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        refuse_unknown(value, LINKS, where="--link")
        return tuple(name for name in LINKS if name in value)

    @field_validator("classes", "link", "rescale_types", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _words(value)

    @field_validator("classes")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        problem = class_name_problem(value)
        if problem:
            raise ValueError(problem)
        return value


def _words(value: Any) -> Any:
    """Split a text at its commas, also each text of a list: an option may be repeated. Return anything else unchanged."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ",".join(value) if value else value
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value
