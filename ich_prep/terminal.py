"""Rich's console, which escapes what it is given: see ``messages``."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from ich_prep.messages import escaped


class Terminal(Console):
    """Standard error; text and the cells of tables are printed without acting on the terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(stderr=True, highlight=False, quiet=quiet)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return ``text`` as Rich renders it, once escaped."""
        return super().render_str(escaped(text), **options)
