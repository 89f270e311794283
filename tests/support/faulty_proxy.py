"""A proxy before an HTTP server that adds latency and makes requests fail, in a process of its own.

``python -m tests.support.faulty_proxy PORT UPSTREAM_PORT`` reads its orders, a line of JSON each, from standard input:
``{"latency": seconds, "faults": {kind: share}, "limit": n, "seed": n, "only": "PUT"}``, and answers the last ones with
how many faults there were of each kind. It ends when its standard input does.

Kinds: ``500`` and ``503`` are answered in place of the server; ``cut`` closes the connection in place of an answer, after
the server has done what it was asked; ``half`` does so in the middle of the answer; ``refuse`` before the server hears of
it; ``slow`` keeps the answer back for a while; ``silent`` keeps it back until the client gives up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.s3_servers import free_ports

KINDS = ("500", "503", "cut", "half", "refuse", "slow", "silent")
SLOW, SILENT = 0.5, 600.0  # seconds
_PIECE = 1 << 18
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)


@dataclass
class Proxy:
    """A running proxy at ``endpoint``."""

    endpoint: str
    _process: subprocess.Popen[str]

    def set(
        self, *, latency: float = 0.0, limit: int | None = None, seed: int = 0, only: str = "", **faults: float
    ) -> None:
        """Delay each request by ``latency`` seconds; of those with the method ``only``, or all, shares fail.

        ``faults`` are shares by kind, as ``cut=0.1`` or ``**{"503": 0.1}``; after ``limit`` faults there are none.
        """
        assert set(faults) <= set(KINDS)
        self._ask({"latency": latency, "limit": limit, "seed": seed, "only": only, "faults": faults})

    def faults(self) -> dict[str, int]:
        """Return how many faults of each kind there were since the last ``set``."""
        return dict(self._ask({}))

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[Proxy]:
    """Run a proxy before the server at ``upstream``, http://127.0.0.1:port."""
    port = free_ports(1)[0]
    words = [sys.executable, "-m", "tests.support.faulty_proxy", str(port), upstream.rpartition(":")[2]]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    try:
        proxy = Proxy(f"http://127.0.0.1:{port}", process)
        proxy.faults()  # it listens
        yield proxy
    finally:
        process.communicate()
        assert process.returncode == 0


class _Server:
    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.order: dict[str, Any] = {"latency": 0.0, "limit": None, "only": "", "faults": {}}
        self.done: Counter[str] = Counter()
        self.random = random.Random(0)

    def take(self, order: dict[str, Any]) -> dict[str, int]:
        if order:
            self.order, self.done, self.random = order, Counter(), random.Random(order["seed"])
        return dict(self.done)

    def fault(self, method: str) -> str:
        """Return the kind of fault that a request gets, "" for none."""
        limit = self.order["limit"]
        if (self.order["only"] and method != self.order["only"]) or (limit is not None and self.done.total() >= limit):
            return ""
        drawn = self.random.random()
        for kind, share in self.order["faults"].items():
            drawn -= share
            if drawn < 0:
                self.done[kind] += 1
                return str(kind)
        return ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        # Cancelled when the proxy ends, which asyncio would report.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            upstream = await asyncio.open_connection("127.0.0.1", self.upstream, limit=_PIECE)
            while await self.one(reader, writer, *upstream):
                pass
        for each in (writer, upstream and upstream[1]):
            if each is not None:
                each.close()
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await each.wait_closed()

    async def one(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> bool:
        """Pass one request and its answer on; return whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        method = head.split(b" ", 1)[0].decode()
        fault = self.fault(method)
        await asyncio.sleep(self.order["latency"])
        if fault in ("500", "503"):
            await _copy_body(head, reader, None)
            code = {"500": "InternalError", "503": "SlowDown"}[fault]
            body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>" if method != "HEAD" else ""
            writer.write(f"HTTP/1.1 {fault} {code}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            await writer.drain()
            return True
        if fault == "refuse":
            return False
        to_server.write(head)
        await _copy_body(head, reader, to_server)
        answer = await from_server.readuntil(b"\r\n\r\n")
        while answer.startswith(b"HTTP/1.1 100"):
            answer = await from_server.readuntil(b"\r\n\r\n")
        if fault == "cut":
            return False
        if fault in ("slow", "silent"):
            await asyncio.sleep(SLOW if fault == "slow" else SILENT)
        writer.write(answer)
        if method == "HEAD" or answer[9:12] in (b"204", b"304"):
            await writer.drain()
        else:
            await _copy_body(answer, from_server, writer, half=fault == "half")
        return fault != "half"


async def _copy_body(
    head: bytes, source: asyncio.StreamReader, target: asyncio.StreamWriter | None, *, half: bool = False
) -> None:
    """Pass on the body that ``head`` announces, or half of it."""
    if _CHUNKED.search(head):
        while True:
            size = await source.readuntil(b"\r\n")
            rest = await source.readexactly(int(size.split(b";")[0], 16) + 2)
            if target is not None:
                target.write(size + rest)
                await target.drain()
            if half or size.strip() == b"0":
                return
    length = _LENGTH.search(head)
    left = int(length[1]) if length else 0
    if half:
        left //= 2
    while left:
        piece = await source.read(min(left, _PIECE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        if target is not None:
            target.write(piece)
            await target.drain()


async def _main(port: int, upstream: int) -> None:
    server = _Server(upstream)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", port, limit=_PIECE)
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    async with listening:
        while line := await orders.readline():
            print(json.dumps(server.take(json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2])))
