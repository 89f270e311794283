"""A viewer that runs in a thread, and requests to it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ich_prep.view.data import ViewData
from ich_prep.view.pictures import Pictures
from ich_prep.view.server import Corrections, Server, make_app


@dataclass(frozen=True)
class Answer:
    """Status, headers by lower-case name, and body of an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Viewer:
    """A running viewer."""

    port: int
    token: str
    url: str
    corrections: Path
    own: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "own", f"http://127.0.0.1:{self.port}")

    def ask(self, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str | None) -> Answer:
        """Ask as the page does; headers given as None are left out, others replace the page's."""
        sent = {"Host": f"127.0.0.1:{self.port}", "X-Ich-Token": self.token}
        if method == "POST":
            sent |= {"Origin": self.own, "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}  # type: ignore[dict-item]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            given = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, given, answer.read())
        finally:
            connection.close()

    def mark(self, **values: Any) -> Answer:
        """Mark a slice."""
        mark = {"row": 0, "class": "subdural", "value": 1, "note": "", "reader": "AB"} | values
        return self.ask("/api/corrections", method="POST", body=json.dumps(mark).encode())


@contextmanager
def viewing(data: ViewData, corrections: Path, *, src: Path | None = None) -> Iterator[Viewer]:
    """Run the viewer of ``data`` on a free port."""
    marks = Corrections(corrections, data)
    pictures = None if src is None else Pictures([src])
    server = Server(lambda port, token: make_app(data, port=port, token=token, corrections=marks, pictures=pictures))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield Viewer(server.port, server.token, server.url, corrections)
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
