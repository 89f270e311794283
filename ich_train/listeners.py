"""Who is told of every epoch of a run: TensorBoard, and a function of the user's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from ich_prep.errors import TrainError
from ich_train.own_code import described, imported
from ich_train.runs import Epoch

Listener = Callable[[Epoch], None]


@contextmanager
def listening(out: Path, *, logger: str, first_epoch: int) -> Iterator[tuple[Listener, ...]]:
    """Yield the functions to call with every epoch from ``first_epoch`` on.

    TensorBoard, if it is installed, gets events below ``out``. ``logger`` is the ``package.module:NAME`` of a function
    that gets what `history.csv` has of the epoch as a dict; empty: none. Raises `UsageError` if that cannot be imported;
    the function then raises `TrainError` for whatever the user's raises.
    """
    with ExitStack() as stack:
        found: list[Listener] = []
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            board = stack.enter_context(SummaryWriter(str(out / "tensorboard"), purge_step=first_epoch))
            found.append(lambda line: _draw(board, line))
        if logger:
            tell = imported(logger, "a logger")
            found.append(lambda line: _tell(tell, line, logger))
        yield tuple(found)


def _draw(board: object, line: Epoch) -> None:
    for name, value in asdict(line).items():
        board.add_scalar(name, value, line.epoch)  # type: ignore[attr-defined]


def _tell(logger: Callable[..., object], line: Epoch, name: str) -> None:
    try:
        logger(asdict(line))
    except Exception as error:
        raise TrainError(
            f"The logger {name} raised {described(error)} Epoch {line.epoch} is saved: correct the logger, or leave it out, "
            "and resume the run."
        ) from error
