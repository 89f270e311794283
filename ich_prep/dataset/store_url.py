"""URLs of object stores, and obstore's client for each; obstore is imported when a URL is first used."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ich_prep.errors import UsageError
from ich_prep.files import whole_url

if TYPE_CHECKING:
    from types import ModuleType

SCHEMES = ("s3", "gs", "http", "https")
# The variables that name an endpoint, by scheme; the first of them wins.
_ENDPOINT_VARIABLES = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("STORAGE_EMULATOR_HOST",),
}
# obstore waits in Rust, where Ctrl-C does not reach: it tries again at once only, ``Store`` does the waiting.
_TRIES_AT_ONCE = 2
_READ_TIMEOUT = 20.0  # seconds without a byte
_WHOLE_TIMEOUT = 3600.0  # seconds: one PUT of a shard over a slow line

_ENDPOINT = re.compile(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?(?:/[A-Za-z0-9._~/-]*)?")


@cache
def obstore() -> ModuleType:
    """Return the library; raises ``UsageError`` where it is not installed."""
    try:
        import obstore as library
    except ImportError:
        raise UsageError("URLs of object stores need the package obstore: `pip install 'ich[s3]'`.") from None
    return library


def normal_url(url: str) -> str:
    """Return ``url`` without a slash at its end; raises ``UsageError`` for one that names no place of a store."""
    parts = urlsplit(whole_url(url))
    if parts.scheme not in SCHEMES:
        raise UsageError(
            f"{parts.scheme}:// is not supported. Expected a URL that begins with {', '.join(f'{s}://' for s in SCHEMES)}."
        )
    if "@" in parts.netloc:
        raise UsageError(
            f"A URL of {parts.hostname} contains a user name or password. Give credentials in the environment."
        )
    if not parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"{url} is not the place of a dataset in a store. Expected a URL such as s3://bucket/data.zarr."
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def endpoint_of(url: str) -> str | None:
    """Return the endpoint that the environment names for a URL; None for the one of the scheme."""
    names = _ENDPOINT_VARIABLES.get(url.partition(":")[0], ())
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def use_endpoint(endpoint: str | None) -> None:
    """Let URLs of this process, and of those that it starts, be served by ``endpoint``; None changes nothing."""
    if endpoint is not None:
        _check_endpoint(endpoint)
        for names in _ENDPOINT_VARIABLES.values():
            os.environ[names[0]] = endpoint


def _check_endpoint(endpoint: str) -> None:
    if not _ENDPOINT.fullmatch(endpoint):
        raise UsageError(
            f"The endpoint {endpoint.rpartition('@')[2]} is not one. Expected http://host:port or https://host."
        )


def client(url: str, endpoint: str | None) -> Any:
    """Return obstore's store of the objects below ``url``; raises ``UsageError`` for settings that cannot be used."""
    obstore()
    from obstore import store as stores

    if endpoint is not None:
        _check_endpoint(endpoint)
    plain = (endpoint or url).startswith("http://")
    options: Any = {
        "allow_http": plain,
        "connect_timeout": timedelta(seconds=5),
        "read_timeout": timedelta(seconds=_READ_TIMEOUT),
        "timeout": timedelta(seconds=_WHOLE_TIMEOUT),
    }
    retries: Any = {
        "max_retries": _TRIES_AT_ONCE,
        "retry_timeout": timedelta(seconds=10),
        "backoff": {"init_backoff": timedelta(milliseconds=20), "max_backoff": timedelta(milliseconds=200), "base": 2},
    }
    both: Any = {"client_options": options, "retry_config": retries}
    parts = urlsplit(url)
    prefix = parts.path.strip("/") or None
    try:
        if parts.scheme == "s3":
            named: Any = {"endpoint": endpoint} if endpoint else {}
            if not any(os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION")):
                named["region"] = "us-east-1"
            return stores.S3Store(parts.netloc, prefix=prefix, **named, **both)
        if parts.scheme == "gs":
            config: Any = {"base_url": endpoint} if endpoint else {}
            return stores.GCSStore(parts.netloc, prefix=prefix, **config, **both)
        return stores.HTTPStore.from_url(url, **both)
    except Exception as error:  # obstore has no common class for settings that it does not understand
        raise UsageError(
            f"{url} cannot be opened: {type(error).__name__} in the settings of the environment or the endpoint "
            f"{endpoint or ''}. Expected an endpoint such as https://host:port."
        ) from None
