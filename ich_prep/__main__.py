"""``python -m ich_prep``: the same as ``ich-prep``."""

from ich_prep.cli import main

main()
