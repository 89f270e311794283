"""The knobs of ``ich-prep build``: those of the spec, and those that do not change the bytes. Each is declared once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from ich_prep.dataset.schema import Spec
from ich_prep.recipe import read_section, validate


class BuildOptions(Spec):
    """What a recipe's ``[build]`` may say, and the command line too."""

    labels: Path | None = None
    build_dir: Path | None = None
    workers: int | None = Field(default=None, ge=0, le=4096)
    scheduler: str | None = None
    max_quarantined: float = Field(default=0.01, ge=0, le=1)
    allow_unlabelled: bool = False
    allow_missing_images: bool = False
    allow_contradictions: bool = False

    def spec(self) -> Spec:
        """Return the part that changes the bytes."""
        return Spec(**{name: getattr(self, name) for name in Spec.model_fields})


def resolve(recipe: Path | None, given: Mapping[str, Any]) -> BuildOptions:
    """Return the options of a ``recipe``, if there is one, overruled by those ``given`` that are not None."""
    written = {} if recipe is None else read_section(recipe, "build")
    validate(BuildOptions, written, where=f"{recipe} [build]")
    stated = {name: value for name, value in given.items() if value is not None}
    return validate(BuildOptions, {**written, **stated}, where="ich-prep build")
