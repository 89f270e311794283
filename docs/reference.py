"""Hooks of the documentation site: make a reference of the output of ``--help``, and add pages from outside docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer import Typer
from typer.testing import CliRunner

from ich_prep.cli import app as prep
from ich_train.cli import app as train

PROGRAMS = {"ICH-PREP-REFERENCE": ("ich-prep", prep), "ICH-TRAIN-REFERENCE": ("ich-train", train)}
ROOT = Path(__file__).parents[1]
OUTSIDE = {"recipes.md": "pipelines/README.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for name, path in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the reference of each program, and point links to pages of the site."""
    for name, path in OUTSIDE.items():
        markdown = markdown.replace(f"(../{path})", f"({name})")
    markdown = markdown.replace("(../docs/", "(").replace("(docs/", "(")
    for place, (program, app) in PROGRAMS.items():
        if place in markdown:
            markdown = markdown.replace(place, reference(program, app))
    return markdown


def reference(program: str, app: Typer) -> str:
    """Return the help of ``app``, then a section with the help of each of its commands, as Markdown."""
    parts = [_help(program, app)]
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        parts += [f"### {program} {name}", _help(program, app, name)]
    return "\n\n".join(parts)


def _help(program: str, app: Typer, *command: str) -> str:
    done = CliRunner().invoke(app, [*command, "--help"], prog_name=program, terminal_width=100, catch_exceptions=False)
    return f"```text\n{done.output.strip()}\n```"
