"""Object stores: S3 and what speaks its language, Google Cloud Storage, and plain HTTP servers to read from.

The requests are those of obstore, which is imported when a URL is first used: the extra ``s3``. Credentials and region
come from the usual environment (``AWS_...``, ``GOOGLE_...``), and never appear in a message. All requests of a process
run in one thread with an event loop, at most ``IN_FLIGHT`` at a time, so callers may wait in any thread.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from ich_prep.dataset.store_answers import (
    ConditionError,
    ignores_ranges,
    is_missing_bucket,
    is_transient,
    refusal,
    status_of,
)
from ich_prep.dataset.store_loop import gathered, run, slots, start_work
from ich_prep.dataset.store_url import client, endpoint_of, normal_url, obstore

PATIENCE = 120.0  # seconds that a store which has answered before may be out of order
FIRST_PATIENCE = 3.0  # seconds for the first answer: an address that is wrong is reported soon
MAX_GAP = 32 << 10  # bytes between two ranges that one request fetches with them: less time than a request of its own
MAX_REQUEST = 4 << 20  # bytes of one ranged request: longer ones are split, and fetched at the same time


_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Meta:
    """What a store says of an object: its size in bytes, and which one it is, for conditional writes.

    ``modified``: when it was written, in seconds by the store's clock; 0 after a write.
    """

    size: int
    etag: str | None = None
    version: str | None = None
    modified: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class StorePath:
    """The place of an object, or of all below a name, in a ``store``: ``key`` is its name there, "" for all.

    What messages show of it is its URL.
    """

    store: Store
    key: str = ""

    def __truediv__(self, name: object) -> StorePath:
        return StorePath(self.store, f"{self.key}/{name}" if self.key else str(name))

    def __str__(self) -> str:
        return self.store.url_of(self.key)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return str(self).rpartition("/")[2]


class Store:
    """The objects below a URL, named by keys relative to it. Safe to share between threads; pickled as URL and endpoint.

    Requests that fail for a moment (429, 500, 503, a cut connection, no answer) are made again, with growing pauses, for
    up to two minutes. ``FileNotFoundError`` is raised for an object that is not there, ``StoreError`` for everything else
    that a store refuses.
    """

    def __init__(self, url: str, *, endpoint: str | None = None, answered: bool = False) -> None:
        self.url = normal_url(url)
        self.endpoint = endpoint or endpoint_of(self.url)
        self._answered = answered
        self._gives_ranges = True
        self.client = client(self.url, self.endpoint)  # obstore's, for zarr-python

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.url, self.endpoint, self._answered)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and (self.url, self.endpoint) == (other.url, other.endpoint)

    def __hash__(self) -> int:
        return hash((self.url, self.endpoint))

    @property
    def is_writeable(self) -> bool:
        """Whether objects can be written: not over plain HTTP."""
        return not self.url.startswith("http")

    def url_of(self, key: str) -> str:
        """Return the URL of an object."""
        return f"{self.url}/{key}" if key else self.url

    def get(self, key: str) -> bytes:
        """Return the bytes of an object."""
        return run(self._get(key))

    def get_objects(self, keys: Sequence[str]) -> list[bytes]:
        """Return the bytes of several objects, fetched at the same time."""
        return run(gathered(self._get(key) for key in keys))

    def get_ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[memoryview]:
        """Return bytes ``starts[i]`` to ``ends[i]`` of one object for each i; see ``get_many``."""
        return self.get_many([(key, start, end) for start, end in zip(starts, ends, strict=True)])

    def get_many(self, ranges: Sequence[tuple[str, int, int]]) -> list[memoryview]:
        """Return the bytes of each (key, start, end), end exclusive, fetched at the same time.

        Ranges that are close together are fetched by one request, long ones by several. A range that reaches past the
        end of its object is returned as far as it goes.
        """
        parts = coalesced(ranges)
        fetched = run(gathered(self._get_range(key, start, end) for key, start, end, _ in parts))
        out: list[list[memoryview]] = [[] for _ in ranges]
        for (_, start, _, members), data in zip(parts, fetched, strict=True):
            for member in members:
                _, first, last = ranges[member]
                out[member].append(data[max(0, first - start) : max(0, last - start)])
        return [pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces)) for pieces in out]

    def head(self, key: str) -> Meta:
        """Return the size of an object, and which one it is."""
        return run(self._head(key))

    def put(self, key: str, data: bytes | memoryview, *, if_absent: bool = False, if_match: Meta | None = None) -> Meta:
        """Write an object in one request: readers see all of it or nothing.

        ``if_absent``: only where there is none; ``if_match``: only in place of that one; else ``ConditionError`` is
        raised, unless the object there has the same bytes: a write that was repeated after its answer was lost.
        """
        mode: Any = "create" if if_absent else "overwrite"
        if if_match is not None:
            mode = {name: value for name, value in (("e_tag", if_match.etag), ("version", if_match.version)) if value}
        try:
            return run(self._put(key, data, mode))
        except ConditionError:
            try:
                meta = self.head(key)
                if meta.size == len(data) and self.get(key) == data:
                    return meta
            except FileNotFoundError:
                pass
            raise

    def listed(self, prefix: str = "") -> list[tuple[str, Meta]]:
        """Return the objects whose key is below ``prefix``, a folder as it were, sorted by key."""
        return run(self._list(prefix))

    def has_any(self, prefix: str) -> bool:
        """Return whether there is an object whose key is below ``prefix``."""
        return run(self._has_any(prefix))

    def fetch(self, key: str, start: int, end: int, *, etag: str | None = None) -> Future[memoryview]:
        """Start to fetch bytes ``start`` to ``end`` of an object, and return what will have them.

        It raises ``ConditionError`` if the object's entity tag is not ``etag``, and what other requests raise.
        """
        return start_work(self._get_range(key, start, end, etag))

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        self.delete_many([key])

    def delete_many(self, keys: Sequence[str]) -> None:
        """Delete several objects, those that are there."""
        if keys:
            run(gathered(self._delete(list(keys[i : i + 1000])) for i in range(0, len(keys), 1000)))

    def honours_conditions(self, key: str) -> bool:
        """Return whether the store refuses to replace an object by one that must be the first: tried with a new ``key``."""
        try:
            self.put(key, b"first", if_absent=True)
            self.put(key, b"second", if_absent=True)
        except ConditionError:
            return True
        finally:
            self.delete(key)
        return False

    # --- requests, in the thread with the event loop ---

    async def _get(self, key: str) -> bytes:
        async def request() -> bytes:
            answer = await obstore().get_async(self.client, key)
            return bytes(await answer.bytes_async())

        return await self._tried(key, "read", request)

    async def _get_range(self, key: str, start: int, end: int, etag: str | None = None) -> memoryview:
        if end <= start:
            return memoryview(b"")
        options: Any = {"if_match": etag} if etag else {}

        async def request() -> memoryview:
            if self._gives_ranges:
                try:
                    answer = await obstore().get_async(self.client, key, options={**options, "range": (start, end)})
                    return memoryview(await answer.bytes_async())
                except Exception as error:
                    if status_of(error) == 416:  # the object ends before the range begins
                        return memoryview(b"")
                    if not ignores_ranges(error):
                        raise
                    self._gives_ranges = False
            answer = await obstore().get_async(self.client, key, options=options)
            return memoryview(await answer.bytes_async())[start:end]

        return await self._tried(key, "read", request)

    async def _has_any(self, prefix: str) -> bool:
        async def request() -> bool:
            async for found in obstore().list(self.client, prefix or None, chunk_size=1):
                if found:
                    return True
            return False

        return await self._tried(prefix, "list", request)

    async def _head(self, key: str) -> Meta:
        async def request() -> Meta:
            return _meta(await obstore().head_async(self.client, key))

        return await self._tried(key, "read", request)

    async def _put(self, key: str, data: bytes | memoryview, mode: Any) -> Meta:
        async def request() -> Meta:
            done = await obstore().put_async(self.client, key, data, mode=mode, use_multipart=False)
            return Meta(len(data), done["e_tag"], done["version"])

        return await self._tried(key, "write", request)

    async def _list(self, prefix: str) -> list[tuple[str, Meta]]:
        async def request() -> list[tuple[str, Meta]]:
            found = await obstore().list(self.client, prefix or None, chunk_size=1000).collect_async()
            return sorted((each["path"], _meta(each)) for each in found)

        return await self._tried(prefix, "list", request)

    async def _delete(self, keys: Sequence[str]) -> None:
        async def request() -> None:
            await obstore().delete_async(self.client, keys)

        try:
            await self._tried(keys[0], "delete", request)
        except FileNotFoundError:
            for key in keys if len(keys) > 1 else ():  # a store without deletion of many ends at the first missing one
                await self._delete([key])

    async def _tried(self, key: str, action: str, request: Callable[[], Awaitable[_Result]]) -> _Result:
        """Return what ``request`` returns, made again while its failures are those of a moment."""
        began, pause = asyncio.get_running_loop().time(), 0.1
        while True:
            try:
                async with slots():
                    result = await request()
                self._answered = True
            except FileNotFoundError as error:
                self._answered = True
                if is_missing_bucket(error):
                    raise refusal(error, action, self.url_of(key), self.endpoint) from None
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url_of(key)) from None
            except Exception as error:
                if type(error).__name__ in ("AlreadyExistsError", "PreconditionError"):
                    raise ConditionError(self.url_of(key)) from None
                self._answered |= status_of(error) is not None
                waited = asyncio.get_running_loop().time() - began
                over = waited + pause > (PATIENCE if self._answered else FIRST_PATIENCE)
                if over or not is_transient(error):
                    raise refusal(error, action, self.url_of(key), self.endpoint) from None
            else:
                return result
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 5.0)


def coalesced(ranges: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int, list[int]]]:
    """Return the requests that fetch ``ranges``: (key, start, end, indices of the ranges that need some of its bytes).

    Ranges at most ``MAX_GAP`` apart share a request of at most ``MAX_REQUEST`` bytes; longer ranges are split. The
    requests of a range are in the order of its bytes.
    """
    out: list[tuple[str, int, int, list[int]]] = []
    for i in sorted(range(len(ranges)), key=ranges.__getitem__):
        key, start, end = ranges[i]
        if out:
            last_key, first, last, members = out[-1]
            if key == last_key and start <= last + MAX_GAP and max(end, last) - first <= MAX_REQUEST and start >= first:
                out[-1] = (key, first, max(last, end), [*members, i])
                continue
        pieces = range(start, max(end, start + 1), MAX_REQUEST)
        out += [(key, at, min(end, at + MAX_REQUEST), [i]) for at in pieces]
    return out


@cache  # a process has one client of a store, with its connections, however many tasks bring a path
def _reopened(url: str, endpoint: str | None, answered: bool) -> Store:
    return Store(url, endpoint=endpoint, answered=answered)


def _meta(found: Any) -> Meta:
    return Meta(int(found["size"]), found["e_tag"], found["version"], found["last_modified"].timestamp())
