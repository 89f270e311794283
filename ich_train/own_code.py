"""Functions and classes of the user's own, by name: networks, losses, augmentations and loggers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ich_prep.errors import UsageError
from ich_prep.recipe import refuse_unknown

_USES = {
    "a network": "a class or function that makes a network",
    "a loss": "a function of logits and targets",
    "an augmentation": "a function of images and a generator",
    "a logger": "a function of an epoch's record",
}


def imported(name: str, what: str) -> Callable[..., Any]:
    """Return the class or function that ``package.module:NAME`` names; the current folder is searched first.

    ``what``, such as "a network", is what errors call it. Raises `UsageError` if it cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise UsageError(f"Expected package.module:NAME for {what} of your own; found {name!r}.")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)  # as `python -m` does: a console script has its own folder there
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(_import_failure(f"the {what.rsplit(maxsplit=1)[-1]} {name}", module_name, error)) from error
    finally:
        sys.path.remove(folder)
    refuse_unknown([attribute], dir(module), where=f"In {module_name}, the name", listed=False)
    make = getattr(module, attribute)
    if not callable(make):
        raise UsageError(f"{name} is of the type {type(make).__name__}; it must be {_USES[what]}.")
    return make  # type: ignore[no-any-return]


def _import_failure(name: str, module_name: str, error: Exception) -> str:
    """Return why the module of ``name`` cannot be imported: it is missing, or its own code fails."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{module_name}.".startswith(f"{missing}."):
        return (
            f"Cannot import {module_name}, for {name}: there is no module {missing}. Run in the folder that "
            "holds it, or install it."
        )
    if missing is not None:
        return f"Cannot import {module_name}, for {name}: it imports {missing}, which is not installed."
    return f"Cannot import {module_name}, for {name}: it raised {described(error)}"


def described(error: Exception) -> str:
    """Return the type and first line of an exception of someone else's code, as the end of a sentence."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}".rstrip(": .") + "."
