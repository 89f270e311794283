"""What both command lines share: options made from the fields of a model, and how an error ends a program."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import sys
import types
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ich_prep.errors import IchError, InterruptError, UsageError, describe_os_error
from ich_prep.messages import escaped, message
from ich_prep.signals import exit_status, interrupting, is_interrupted

EXIT_CODES = (
    "Exit codes: 0 done; 1 failed, or verify found problems; 2 an invalid command, option or recipe; 128 + n ended by "
    "signal n (130: Ctrl-C)."
)
# Options that several commands have.
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Endpoint = Annotated[str | None, typer.Option(help="Server of s3:// or gs:// URLs, such as http://host:port.")]
BuildDir = Annotated[Path | None, typer.Option(help="Working folder. [DATASET.build]")]

_COMMAND_LINE_ERROR: Any = typer.BadParameter.__mro__[2]  # ClickException, which Typer does not export


def options_from(
    model: type[BaseModel], *names: str, into: str = "given", default: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a Typer command an option for each field ``names`` of ``model`` (none: for all).

    The command gets those given on the command line as the dict of its parameter ``into``, to be validated by the
    model, with values from elsewhere beside them. Several decorators may fill several parameters. ``default`` is what
    the help texts say instead of the model's defaults. A Typer option is declared with a number's range and a literal's
    choices; fields of other types than those, text, paths and booleans are passed as text, which the model must parse.
    An option that is given twice is refused, because the last one would win silently; but that of a tuple is then given
    as the list of its texts.
    """
    fields = {name: model.model_fields[name] for name in names or model.model_fields}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints.get(parameter.name, parameter.annotation))
            for parameter in inspect.signature(command).parameters.values()
        ]
        added = [_option(name, field, default) for name, field in fields.items()]

        @functools.wraps(command)
        def call(**values: Any) -> None:
            given = dict(_once(fields, {name: values.pop(name) for name in fields}))
            command(**values, **{into: given})

        kept = [parameter for parameter in own if parameter.name != into]
        keywords = [*(p for p in kept if p.kind is p.KEYWORD_ONLY), *added]
        positional = [p for p in kept if p.kind is not p.KEYWORD_ONLY]
        # Typer reads both, and of a wrapped function it would read the original's.
        call.__signature__ = inspect.Signature([*positional, *keywords])  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *added)}
        del call.__wrapped__
        return call

    return decorate


def _option(name: str, field: FieldInfo, default: str | None) -> inspect.Parameter:
    kind = _kind(name, field.annotation)
    shown = default if default is not None else _shown(field.default)
    text = (field.description or "") + (f" [default: {shown}]" if shown else "")
    flag = f"--{name.replace('_', '-')}"
    declaration = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    limits = {"min": _limit(field, "ge"), "max": _limit(field, "le")} if kind in (int, float) else {}
    metavar = None if kind is bool else f"<{'|'.join(kind) if issubclass(kind, StrEnum) else kind.__name__.lower()}>"
    option = typer.Option(declaration, help=text.strip(), show_default=False, metavar=metavar, **limits)
    # Each is declared as a list, to see it when it is given twice; of a flag, the last one wins, as for any flag.
    annotation = kind | None if kind is bool else Union[list[kind], None]  # type: ignore[valid-type]  # noqa: UP007
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def _once(fields: dict[str, FieldInfo], values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each option that was given, which must be once."""
    for name, field in fields.items():
        value = values[name]
        if isinstance(value, list):
            if len(value) > 1 and get_origin(field.annotation) is not tuple:
                flag = f"--{name.replace('_', '-')}"
                raise typer.BadParameter(
                    f"{flag} was given {len(value)} times ({', '.join(map(str, value))}): give one."
                )
            value = value[0] if len(value) == 1 else value or None
        if value is not None:
            yield name, value.value if isinstance(value, StrEnum) else value


def _kind(name: str, annotation: Any) -> Any:
    """Return the type of the option for the field ``name``: str for whatever the model has to parse itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(one for one in get_args(annotation) if one is not type(None))
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:  # of which Typer takes no lists
        return StrEnum(name, {choice: choice for choice in get_args(annotation)})
    return annotation if annotation in (bool, int, float, str, Path) else str


def _limit(field: FieldInfo, name: str) -> Any:
    return next((getattr(limit, name) for limit in field.metadata if hasattr(limit, name)), None)


def _shown(value: Any) -> str:
    """Return a default as a user would write it; none for what is off or missing."""
    if value is None or value is False or value == ():
        return ""
    if value is True:
        return "on"
    if isinstance(value, tuple | list):
        return ",".join(str(getattr(one, "name", one)) for one in value)
    return str(value)


def say(text: str, *, err: bool = False) -> None:
    """Print the lines of ``text``, escaped; see ``messages``."""
    typer.echo(escaped(text), err=err)


def run_program(app: typer.Typer) -> NoReturn:
    """Run a program's command line and exit. A known error, or one of the operating system, is one message, no traceback.

    Exit codes: 0 success, 1 an error, 2 an invalid command or recipe, 128 + n ended by signal n (130: Ctrl-C); others as
    a command sets them.
    """
    with interrupting():
        _run(app)


def _run(app: typer.Typer) -> NoReturn:
    try:
        status = app(standalone_mode=False)
    except InterruptError as error:
        _end(exit_status(), f"Interrupted. {error}")
    except IchError as error:
        _end(exit_code_of(error), f"Error: {error}")
    except _COMMAND_LINE_ERROR as error:
        shown = io.StringIO()
        error.show(file=shown)
        _end(error.exit_code, shown.getvalue().rstrip("\n"))
    except (OSError, KeyboardInterrupt, typer.Abort) as error:
        # A signal may also show as an error, such as that of a terminal that was closed, to which the clean-up wrote.
        if is_interrupted() or not isinstance(error, OSError):
            _end(exit_status(), "Interrupted.")
        _end(1, f"Error: {describe_os_error(error)}. Fix this, then run the same command again.")
    if is_interrupted():
        _end(exit_status(), "Interrupted.")
    sys.exit(status)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a program that ``error`` ends: 2 for an invalid command or recipe, 1 for all else."""
    return 2 if isinstance(error, UsageError) else 1


def _end(status: int, text: str) -> NoReturn:
    """Exit with ``status`` and a last message, if standard error still takes it."""
    if text:
        with contextlib.suppress(OSError):
            typer.echo(message(text), err=True)
    sys.exit(status)
