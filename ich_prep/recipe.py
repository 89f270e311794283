"""Recipes: TOML files with the settings of a build, a training run and an evaluation. Unknown keys are refused."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ich_prep.errors import UsageError, did_you_mean
from ich_prep.files import read_regular

MAX_RECIPE_BYTES = 1 << 20
LONGEST = 200  # characters of a value, or of a parser's error, in a message
MOST_PROBLEMS = 5  # in a message

SECTIONS = ("build", "train", "eval")

Model = TypeVar("Model", bound=BaseModel)


def load_section(path: Path, section: str, model: type[Model]) -> Model:
    """Return the section of the recipe at ``path`` as a ``model``; a missing section gives the defaults.

    Raises ``UsageError`` for a file that is not TOML, a section or key that is unknown (with the nearest known one), or
    a value of the wrong kind.
    """
    return validate(model, read_section(path, section), where=f"{path} [{section}]")


def read_section(path: Path, section: str) -> dict[str, Any]:
    """Return the section of the recipe at ``path`` as written, its keys not checked."""
    return read_recipe(path)[section]


def read_recipe(path: Path) -> dict[str, dict[str, Any]]:
    """Return all sections of the recipe at ``path``, their keys not checked; a missing section is empty."""
    try:
        document = tomllib.loads(read_regular(path, limit=MAX_RECIPE_BYTES).decode())
    except FileNotFoundError:
        raise UsageError(f"Expected a recipe at {path}; there is no such file.") from None
    except OSError as error:
        raise UsageError(f"Expected a recipe at {path}; it cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:  # ValueError: not TOML, not UTF-8, an integer of thousands of digits
        raise UsageError(f"Expected a TOML recipe at {path}; it does not parse: {str(error)[:LONGEST]}.") from None
    refuse_unknown(document, SECTIONS, where=f"{path}: section")
    for section, values in document.items():
        if not isinstance(values, dict):
            raise UsageError(f"Expected a table [{section}] in {path}; found the value {_shown(values)}.")
    return {section: document.get(section, {}) for section in SECTIONS}


def validate(model: type[Model], values: Mapping[str, Any], *, where: str) -> Model:
    """Return ``values`` as a ``model``, or raise a ``UsageError`` that names what is unknown or wrong."""
    refuse_unknown(values, model.model_fields, where=f"{where}: key")
    try:
        return model.model_validate(dict(values))
    except (OverflowError, RecursionError) as error:
        raise UsageError(f"{where}: a value is too large or too deeply nested ({str(error)[:LONGEST]}).") from None
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')} "
            f"(found {_shown(problem['input'])})"
            for problem in error.errors()[:MOST_PROBLEMS]
        )
        raise UsageError(f"{where}: {problems}.") from None


def _shown(value: object) -> str:
    """Return a value as a message shows it, its end left out if it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deeply nested, or an integer of thousands of digits
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def refuse_unknown(given: Iterable[str], known: Iterable[str], *, where: str, listed: bool = True) -> None:
    """Raise a ``UsageError`` for the first of ``given`` that is not ``known``, naming the most similar known one.

    ``listed``: whether the message lists all that are known.
    """
    known = list(known)
    for name in given:
        if name not in known:
            choices = f" Known: {', '.join(known)}." if listed else ""
            short = name[:LONGEST]
            raise UsageError(f"{where} {short!r} is unknown.{choices}{did_you_mean(short, known)}")
