"""``python -m ich_train``: what torchrun starts."""

from ich_train.cli import main

main()
