"""What `ich-prep view` does: serves the page until Ctrl-C, or writes it as files."""

from __future__ import annotations

import contextlib
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ich_prep.dataset.corrections import default_file
from ich_prep.dataset.explanations import read_explanations
from ich_prep.dataset.predictions import read_predictions
from ich_prep.dataset.selection import choose_volumes
from ich_prep.dataset.storage import local_path
from ich_prep.dataset.volumes import find_series
from ich_prep.errors import UsageError
from ich_prep.signals import settle
from ich_prep.stages.identifier_key import key_of_dataset
from ich_prep.stages.state import build_folder
from ich_prep.view.data import ViewData
from ich_prep.view.pages import write_pages

if TYPE_CHECKING:
    from ich_prep.dataset.dataset import Dataset


def view_data(dataset: Dataset, run: Path | None) -> ViewData:
    """Return what the page shows of ``dataset``, with the predictions and explanations of a ``run``.

    Raises ``UsageError`` for a run without predictions, or whose predictions are of another dataset.
    """
    if run is None:
        return ViewData(dataset)
    return ViewData(
        dataset,
        predictions=read_predictions(run, dataset),
        explanations=read_explanations(run, dataset),
        run_name=run.absolute().name,
    )


def write_html(dataset: Dataset, out: Path, *, run: Path | None, series: Sequence[int], where: str | None) -> int:
    """Write the page with some volumes, or all of them, as files to ``out``; return how many."""
    lines = None
    if series or where is not None:
        chosen = choose_volumes(dataset, series=series, where=where)
        lines = [find_series(dataset.series, series_row=number) for number in chosen]
    return write_pages(view_data(dataset, run), out, lines)


def serve(
    dataset: Dataset,
    *,
    run: Path | None,
    src: Sequence[Path],
    build_dir: Path | None,
    key: Path | None,
    corrections: Path | None,
    port: int,
    browser: bool,
    say: Callable[[str], object],
) -> None:
    """Serve the page of ``dataset`` on this machine until Ctrl-C; ``say`` is told its address.

    ``src`` are the sources of quarantined files, ``build_dir`` and ``key`` where the key of their pseudonyms is.
    Raises ``UsageError`` if Starlette or uvicorn is missing, the port is taken, or the corrections cannot be read or are
    inside the dataset.
    """
    try:
        from ich_prep.view.server import Corrections, Server, make_app
    except ImportError as error:
        raise UsageError(f"The viewer needs {error.name}: pip install 'ich[view]'.") from None
    from ich_prep.view.pictures import Pictures

    file = default_file(dataset.folder) if corrections is None else local_path(corrections, "--corrections")
    if dataset.folder.resolve() in file.resolve().parents:
        raise UsageError(f"{file} is inside the dataset, which the viewer never writes to. Name another file.")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UsageError(f"{file} cannot be a file: it is a folder, or its folder does not exist.")
    data = view_data(dataset, run)
    marks, pictures = Corrections(file, data), None
    if src:
        folder = build_folder(dataset.folder.absolute(), build_dir)
        pictures = Pictures(src, key_of_dataset(dataset.root, folder, key, needed=True))

    server = Server(
        lambda bound, token: make_app(data, port=bound, token=token, corrections=marks, pictures=pictures), port=port
    )
    say(f"{dataset.path}: {server.url}\nMarks go to {file}. Stop with Ctrl-C.")
    if browser:
        webbrowser.open(server.url)
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        server.run()
    settle()
