"""Object stores that the tests start: one that keeps its promises, one that does not, and a line that fails."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ich_prep.dataset.stores import Store
from tests.support.faulty_proxy import Proxy, faulty_proxy
from tests.support.s3_servers import ENVIRONMENT, S3Server, rclone, seaweedfs


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder: ``make test-s3`` runs them, ``make test`` does not."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.s3)


@pytest.fixture(scope="session", autouse=True)
def credentials() -> Iterator[None]:
    """The environment of the tests has the credentials of their servers, and no others."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
            patch.delenv(name)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A SeaweedFS that all tests share, with an empty bucket at first."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        Store(server.url, endpoint=server.endpoint).put("first", b"")  # makes the bucket
        yield server


@pytest.fixture(scope="session")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An rclone that all tests share: it replaces objects whatever the conditions of a write are."""
    with rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture
def url(s3: S3Server) -> str:
    """A place in the bucket of ``s3`` that no other test uses."""
    return f"{s3.url}/{uuid.uuid4().hex}"


@pytest.fixture
def store(s3: S3Server, url: str) -> Store:
    """The store at ``url``, empty."""
    return Store(url, endpoint=s3.endpoint)


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[Proxy]:
    """A line to ``s3`` that fails when it is told to."""
    with faulty_proxy(s3.endpoint) as running:
        yield running
