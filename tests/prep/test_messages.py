"""What leaves the programs: control characters of file names, keys and values are escaped, and messages are short."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_prep.html import render
from ich_prep.messages import LONGEST_MESSAGE, escaped, escaped_line, message
from ich_prep.progress import TerminalProgress
from tests.support.cli import prep

NASTY = "\x1b[2J\x1b]0;owned\x07\r\x08\x9b31m\u202egnp.exe\u2066\u200b"


@given(st.text())
def test_nothing_that_acts_is_left(text: str) -> None:
    shown = escaped_line(text)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")
    shown.encode()
    assert escaped(text).replace("\n", "").replace("\t", "") == escaped_line(text.replace("\n", "").replace("\t", ""))


@given(st.text(st.characters(categories=("L", "N", "P", "S", "Zs"))))
def test_letters_of_any_script_stay(text: str) -> None:
    assert escaped(text) == text


@given(st.text(max_size=50), st.integers(0, 3000))
def test_a_message_is_never_longer_than_a_screen(text: str, times: int) -> None:
    assert len(message(text * times)) <= LONGEST_MESSAGE


def test_a_long_message_keeps_what_is_wrong_and_what_to_do() -> None:
    shown = message(f"Wrong: {'x' * 9000}. Do this.")
    assert shown.startswith("Wrong: xxx") and shown.endswith("x. Do this.") and "[...]" in shown


def test_a_file_name_that_steers_the_terminal_is_escaped(phantom_tree: Path, tmp_path: Path) -> None:
    nasty = tmp_path / NASTY.replace("/", "")
    nasty.mkdir()
    for words in (
        ["info", nasty],
        ["build", "--src", nasty, "--out", tmp_path / "x.zarr"],
        ["build", "--src", phantom_tree, "--out", nasty / "x", f"--{NASTY}"],
        ["build", "--src", phantom_tree, "--out", nasty / "x", "--size", NASTY],
        ["build", "--src", phantom_tree, "--out", nasty / "x", "--layout", NASTY * 400],
        [NASTY],
    ):
        done = prep(*words)
        assert done.returncode in (1, 2), done.stderr
        assert "\\x1b" in done.stderr or "--size" in done.stderr, done.stderr  # whose message does not quote the value
        for character in "\x1b\x07\r\x9b\u202e\u2066":
            assert character not in done.stdout + done.stderr
        assert len(done.stderr) <= LONGEST_MESSAGE + 1
        assert "Traceback" not in done.stderr


def test_progress_and_pages_escape_too(capsys: pytest.CaptureFixture[str]) -> None:
    TerminalProgress().say(f"Labels: {NASTY} [bold]x[/bold]")
    printed = capsys.readouterr().err
    assert "\\x1b[2J" in printed and "[bold]x[/bold]" in printed and "\x1b" not in printed and "\u202e" not in printed
    page = render("<p>{{ name }}</p>{{ number }}", name=f"<b>{NASTY}", number=3)
    assert "&lt;b&gt;\\x1b[2J" in page and page.endswith("3") and "\u202e" not in page


def test_the_terminal_of_training_escapes_too() -> None:
    code = "from ich_train.cli import _console; import sys; _console().print(sys.argv[1], markup=False)"
    done = subprocess.run([sys.executable, "-c", code, NASTY], capture_output=True, text=True, check=True, timeout=60)
    assert "\\x1b[2J" in done.stderr and "\x1b" not in done.stderr
