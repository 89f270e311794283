"""The viewer's page and data over HTTP, on 127.0.0.1 only.

::

    GET  /?token=T                         the page
    GET  /static/NAME                      its scripts and style
    GET  /api/about /api/volumes           the dataset; the list of volumes
    GET  /api/volumes/LINE                 one volume
    GET  /api/volumes/LINE/pixels/FIRST/COUNT   stored pixels, raw
    GET  /api/volumes/LINE/maps/INDEX      class activation maps, raw
    GET  /api/where?filter=TEXT            volumes with slices that a filter selects
    GET  /api/quarantine?reason=&first=    a page of the quarantine; /api/quarantine/NUMBER.png a file as a picture
    GET  /api/corrections                  marks so far
    POST /api/corrections                  one more

LINE, INDEX and so on are integers. No path from a request is ever used as the path of a file: static files are looked up
in a table that is read when the server starts.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from ich_prep.dataset.corrections import (
    MAX_NOTE,
    MAX_READER,
    Correction,
    append_correction,
    read_corrections,
    text_problem,
)
from ich_prep.errors import CorruptionError, DatasetError, IchError, SliceError, UsageError, describe_os_error
from ich_prep.view.assets import page, static_files
from ich_prep.view.guard import Guard

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from ich_prep.view.data import ViewData
    from ich_prep.view.pictures import Pictures

ADDRESS = "127.0.0.1"
LINES_PER_PAGE = 100
MAX_FILTER = 2000  # characters
MAX_DIGITS = 18


class RequestError(Exception):
    """A request that cannot be answered: ``status`` of HTTP and a sentence for the page."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Corrections:
    """The marks in a file: read when the server starts, appended to by it; for one dataset, safe between threads."""

    def __init__(self, file: Path, data: ViewData) -> None:
        self.file, self._data = file, data
        digest = data.dataset.digest
        self._lock = threading.Lock()
        self._marks = [mark for mark in read_corrections(file) if mark.dataset_digest == digest]

    def all(self) -> list[dict[str, Any]]:
        """Return the marks of this dataset, oldest first, as JSON values."""
        with self._lock:
            return [_shown_mark(mark) for mark in self._marks]

    def add(self, given: Any) -> dict[str, Any]:
        """Check a mark from the page, append it to the file and return it; raises ``RequestError`` for an invalid one."""
        mark = self._checked(given)
        with self._lock:
            append_correction(self.file, mark)
            self._marks.append(mark)
        return _shown_mark(mark)

    def _checked(self, given: Any) -> Correction:
        dataset = self._data.dataset
        names = {"row", "class", "value", "note", "reader"}
        if not isinstance(given, dict) or set(given) != names:
            raise RequestError(422, f"Expected a mark with {', '.join(sorted(names))}.")
        row, value = given["row"], given["value"]
        if not (isinstance(row, int) and not isinstance(row, bool) and 0 <= row < len(dataset)):
            raise RequestError(422, f"Expected a row of 0 to {len(dataset) - 1}.")
        if given["class"] not in dataset.classes:
            raise RequestError(422, f"Expected a class of {', '.join(dataset.classes)}.")
        if isinstance(value, bool) or value not in (0, 1, None):
            raise RequestError(422, "Expected a value of 0, 1 or null.")
        for name, limit in (("note", MAX_NOTE), ("reader", MAX_READER)):
            text = given[name]
            problem = text_problem(text, limit=limit) if isinstance(text, str) else "it is not text"
            if problem:
                raise RequestError(422, f"The {name} cannot be saved: {problem}.")
        return Correction(
            row=row,
            sop_instance_uid=dataset.slices["sop_instance_uid"][row].as_py() or "",
            class_name=given["class"],
            value=None if value is None else int(value),
            note=given["note"].strip(),
            reader=given["reader"].strip(),
            dataset_digest=dataset.digest,
        )


def make_app(
    data: ViewData, *, port: int, token: str, corrections: Corrections, pictures: Pictures | None = None
) -> ASGIApp:
    """Return the application that answers on ``port`` to who has the ``token``."""
    files, shown = static_files(), page()
    listed = json.dumps(data.volumes, allow_nan=False).encode()  # also computes it before the first request

    def front(_: Request) -> Response:
        return Response(shown.content, media_type=shown.media_type)

    def static(request: Request) -> Response:
        file = files.get(request.path_params["name"])
        if file is None:
            raise RequestError(404, "There is no such file.")
        return Response(file.content, media_type=file.media_type)

    def about(_: Request) -> Response:
        more = {"corrections": str(corrections.file.name), "pictures": pictures is not None, "marking": True}
        return _json(data.about() | more)

    def volumes(_: Request) -> Response:
        return Response(listed, media_type="application/json")

    def volume(request: Request) -> Response:
        return _json(data.volume(_number(request, "line")))

    def pixels(request: Request) -> Response:
        raw = data.pixels(*(_number(request, name) for name in ("line", "first", "count")))
        return Response(raw, media_type="application/octet-stream")

    def maps(request: Request) -> Response:
        found = data.maps(_number(request, "line"), _number(request, "index"))
        if found is None:
            raise RequestError(404, "There are no class activation maps of this slice.")
        raw, shape = found
        headers = {f"x-{name}": str(size) for name, size in shape.items()}
        return Response(raw, media_type="application/octet-stream", headers=headers)

    def where(request: Request) -> Response:
        text = request.query_params.get("filter", "")
        if len(text) > MAX_FILTER:
            raise RequestError(422, f"The filter has more than {MAX_FILTER:,} characters.")
        return _json(data.lines_where(text))

    def quarantine(request: Request) -> Response:
        first = _integer(request.query_params.get("first", "0"))
        shown = data.quarantine(reason=request.query_params.get("reason", ""), first=first, count=LINES_PER_PAGE)
        return _json({"reasons": data.reasons(), **shown})

    def picture(request: Request) -> Response:
        number = _number(request, "number")
        if pictures is None or number >= len(data.quarantine_table):
            raise RequestError(404, "There is no picture of this file.")
        return Response(pictures.png(data.quarantine_table["path"][number].as_py()), media_type="image/png")

    def marks(_: Request) -> Response:
        return _json(corrections.all())

    async def mark(request: Request) -> Response:
        try:
            given = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise RequestError(400, "Expected JSON.") from None
        return _json(corrections.add(given), status=201)

    get: list[tuple[str, Callable[..., Any]]] = [
        ("/", front),
        ("/static/{name}", static),
        ("/api/about", about),
        ("/api/volumes", volumes),
        ("/api/volumes/{line}", volume),
        ("/api/volumes/{line}/pixels/{first}/{count}", pixels),
        ("/api/volumes/{line}/maps/{index}", maps),
        ("/api/where", where),
        ("/api/quarantine", quarantine),
        ("/api/quarantine/{number}.png", picture),
        ("/api/corrections", marks),
    ]
    routes = [Route(path, endpoint, methods=["GET"]) for path, endpoint in get]
    routes.append(Route("/api/corrections", mark, methods=["POST"]))
    handlers: Any = {RequestError: _refused, IchError: _failed, IndexError: _out_of_range, OSError: _unreadable}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), port=port, token=token)


class Server:
    """A server on this machine: ``url`` is its address with the token; ``run`` answers until Ctrl-C or ``stop``."""

    def __init__(self, make: Callable[[int, str], ASGIApp], *, port: int = 0) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((ADDRESS, port))
        except (OSError, OverflowError) as error:
            self._socket.close()
            raise UsageError(
                f"Cannot listen on port {port}: {error}. Name another with --port, or leave it out."
            ) from None
        self._socket.listen(128)
        self.port: int = self._socket.getsockname()[1]
        self.token = secrets.token_urlsafe(32)
        self.url = f"http://{ADDRESS}:{self.port}/?token={self.token}"
        config = uvicorn.Config(
            make(self.port, self.token),
            log_level="error",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Answer requests until Ctrl-C, which raises ``KeyboardInterrupt``, or ``stop``."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def stop(self) -> None:
        """End ``run``, from another thread."""
        self._server.should_exit = True


def _json(value: Any, *, status: int = 200) -> Response:
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")


def _number(request: Request, name: str) -> int:
    return _integer(request.path_params[name])


def _integer(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
        raise RequestError(404, "Expected a number.")
    return int(text)


def _shown_mark(mark: Correction) -> dict[str, Any]:
    return {
        "row": mark.row,
        "class": mark.class_name,
        "value": mark.value,
        "note": mark.note,
        "reader": mark.reader,
    }


def _refused(_: Request, error: RequestError) -> Response:
    return _json({"error": error.message}, status=error.status)


def _failed(_: Request, error: IchError) -> Response:
    status = 422 if isinstance(error, UsageError) else 404 if isinstance(error, SliceError) else 500
    known = isinstance(error, UsageError | SliceError | CorruptionError | DatasetError)
    return _json({"error": str(error)[:2000] if known else "The request failed."}, status=status)


def _out_of_range(_: Request, error: IndexError) -> Response:
    return _json({"error": f"Out of range: {error}."}, status=404)


def _unreadable(_: Request, error: OSError) -> Response:
    return _json({"error": f"{describe_os_error(error)}."}, status=500)
