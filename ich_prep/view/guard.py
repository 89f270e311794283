"""Who may ask: a request must come from a page of this server, on this machine, with its token.

A page of another site can make the browser send requests to 127.0.0.1, or have its own name resolve to 127.0.0.1 (DNS
rebinding). So the Host and the Origin must be this server's, and data needs a random token that only the printed address
has. A Content Security Policy keeps the page from loading or sending anything elsewhere.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = b"x-ich-token"
MAX_BODY = 64 * 1024
MAX_QUERY = 8 * 1024
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
    (b"cache-control", b"no-store"),  # patients' data must not stay in the browser's cache
)


class Guard:
    """Passes requests on to ``app`` that may be answered, and refuses the others; adds the security headers to all.

    ``/api/`` needs the token in a header, the page itself in its query; the static files hold no data and need none.
    """

    def __init__(self, app: ASGIApp, *, port: int, token: str) -> None:
        self._app, self._token = app, token.encode()
        self._hosts = {f"{name}:{port}".encode() for name in ("127.0.0.1", "localhost")}
        if port == 80:
            self._hosts |= {b"127.0.0.1", b"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        refused = self._refuse(scope)
        if refused is not None:
            await refused(scope, receive, _with_headers(send))
            return
        body = await _body(receive)
        if body is None:
            await PlainTextResponse("The request is too large.", 413)(scope, receive, _with_headers(send))
            return
        await self._app(scope, _replayed(body, receive), _with_headers(send))

    def _refuse(self, scope: Scope) -> PlainTextResponse | None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts, origins = headers.get(b"host", []), headers.get(b"origin", [])
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return PlainTextResponse("This server answers to its own address only, on this machine.", 403)
        own = b"http://" + hosts[0].lower()
        if any(origin.lower() != own for origin in origins):
            return PlainTextResponse("Requests from pages of other origins are refused.", 403)
        if headers.get(b"sec-fetch-site", [b"none"])[0] not in (b"same-origin", b"none"):
            return PlainTextResponse("Requests from pages of other sites are refused.", 403)
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return PlainTextResponse("Only GET and POST are answered.", 405)
        if scope["method"] == "POST" and len(origins) != 1:
            return PlainTextResponse("A POST needs the header Origin.", 403)
        if len(scope["query_string"]) > MAX_QUERY or len(scope["path"]) > MAX_QUERY:
            return PlainTextResponse("The address is too long.", 414)
        if scope["path"].startswith("/static/"):
            return None
        given = headers.get(TOKEN_HEADER, [])
        if scope["path"] == "/":
            pairs = [pair.split(b"=", 1) for pair in scope["query_string"].split(b"&")]
            given = [pair[1] for pair in pairs if len(pair) == 2 and pair[0] == b"token"]
        if len(given) != 1 or not secrets.compare_digest(given[0], self._token):
            return PlainTextResponse("Open the address that `ich-prep view` printed: it has the token.", 403)
        return None


async def _body(receive: Receive) -> bytes | None:
    """Return the whole body of a request, None if it is larger than ``MAX_BODY``."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
        await send(message)

    return with_headers
