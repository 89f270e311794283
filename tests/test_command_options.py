"""Options made from a model: types, ranges, choices, help texts and defaults are the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from ich_prep.command_options import options_from


class Settings(BaseModel):
    size: int = Field(default=512, ge=16, le=4096, description="Rows and columns.")
    share: float | None = Field(default=None, ge=0, description="A share.")
    codec: Literal["lz4", "zstd"] = Field(default="lz4", description="How to compress.")
    windows: tuple[str, ...] = Field(default=("brain", "bone"), description="The windows.")
    keep: bool = Field(default=False, description="Keep it.")
    flip: bool = Field(default=True, description="Flip it.")
    labels: Path | None = Field(default=None, description="A file.")


def app_of(*names: str, **named: Any) -> tuple[typer.Typer, list[dict[str, Any]]]:
    app, calls = typer.Typer(rich_markup_mode=None), []

    @app.command()
    @options_from(Settings, *names, **named)
    def command(
        target: Annotated[Path, typer.Argument()],
        *,
        given: dict[str, Any],
        loud: Annotated[bool, typer.Option()] = False,
    ) -> None:
        calls.append({"target": target, "given": given, "loud": loud})

    return app, calls


def run(app: typer.Typer, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*words], env={"COLUMNS": "200", "NO_COLOR": "1"})
    return done.exit_code, " ".join(done.output.split())


def test_only_options_on_the_command_line_are_given() -> None:
    app, calls = app_of()
    assert run(app, "here", "--loud", "--size", "64", "--codec", "zstd", "--no-flip", "--windows", "a,b")[0] == 0
    assert run(app, "here")[0] == 0
    given = {"size": 64, "codec": "zstd", "flip": False, "windows": "a,b"}
    assert calls == [
        {"target": Path("here"), "given": given, "loud": True},
        {"target": Path("here"), "given": {}, "loud": False},
    ]
    assert type(calls[0]["given"]["codec"]) is str


def test_help_has_the_texts_ranges_choices_and_defaults_of_the_model() -> None:
    code, output = run(app_of()[0], "--help")
    assert code == 0
    for part in (
        "--size <int> Rows and columns. [default: 512] [16<=x<=4096]",
        "--share <float> A share. [x>=0]",
        "--codec <lz4|zstd> How to compress. [default: lz4]",
        "--windows <str> The windows. [default: brain,bone]",
        "--keep / --no-keep Keep it.",
        "--flip / --no-flip Flip it. [default: on]",
        "--labels <path> A file.",
    ):
        assert part in output, output


def test_some_fields_and_another_default() -> None:
    app, calls = app_of("size", "codec", default="as before")
    code, output = run(app, "--help")
    assert code == 0
    assert output.count("[default: as before]") == 2
    assert "--windows" not in output
    assert run(app, "here", "--size", "32")[0] == 0
    assert calls[0]["given"] == {"size": 32}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "8"], "greater than or equal to 16"),
        (["--codec", "gzip"], "'gzip' is not one of 'lz4', 'zstd'"),
        (["--labels", "a", "--labels", "b"], "--labels was given 2 times (a, b): give one."),
        (["--size", "64", "--size", "64"], "--size was given 2 times"),
    ],
)
def test_invalid_and_repeated_options_are_refused(words: list[str], message: str) -> None:
    app, calls = app_of()
    code, output = run(app, "here", *words)
    assert code == 2
    assert message in output
    assert not calls


def test_an_option_of_a_tuple_may_be_repeated() -> None:
    app, calls = app_of()
    assert run(app, "here", "--windows", "a,b", "--windows", "c")[0] == 0
    assert calls[0]["given"] == {"windows": ["a,b", "c"]}


def test_several_models_fill_several_parameters() -> None:
    app, calls = typer.Typer(), []

    class Place(BaseModel):
        device: str = Field(default="cpu", description="Where.")

    @app.command()
    @options_from(Settings, "size")
    @options_from(Place, into="place")
    def command(*, given: dict[str, Any], place: dict[str, Any]) -> None:
        """What the command is for."""
        calls.append((given, place))

    assert run(app, "--device", "cuda", "--size", "32")[0] == 0
    assert calls == [({"size": 32}, {"device": "cuda"})]
    assert "What the command is for." in run(app, "--help")[1]
