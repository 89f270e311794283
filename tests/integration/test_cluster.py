"""A cluster of two hosts, each a process group with workers of its own, over TLS; one of them is cut off."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from ich_prep.build_dataset import build
from ich_prep.dataset.spec import Spec
from ich_prep.errors import BuildError, UsageError
from ich_prep.execute import Pool, Tls
from ich_prep.options import resolve
from tests.support.cli import PREP, prep, published, working

SHARDS = Spec(size=64, slices_per_shard=1)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """A certificate that signs itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl: a cluster with TLS is NOT tested")
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=cluster"
    names = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([openssl, *words.split(), *names], check=True, capture_output=True)
    return Tls(folder / "cert.pem", folder / "cert.pem", folder / "key.pem")


def options_of(tls: Tls) -> list[str]:
    return ["--tls-ca-file", str(tls.ca), "--tls-cert", str(tls.cert), "--tls-key", str(tls.key)]


@contextmanager
def started(program: str, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program of Dask, with all that it starts, until the end of the block."""
    command = [sys.executable, "-m", f"distributed.cli.{program}", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@dataclass(frozen=True)
class Cluster:
    file: Path
    hosts: tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]


@pytest.fixture
def cluster(tls: Tls, tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler and two hosts with one worker each; each host has a working directory of its own."""
    file = tmp_path / "scheduler.json"
    address = ["--protocol", "tls", "--host", "127.0.0.1", *options_of(tls)]
    with started(
        "dask_scheduler", *address, "--port", 0, "--scheduler-file", file, "--dashboard-address", "127.0.0.1:0"
    ):
        wait_until(file.exists)
        common = ["--scheduler-file", file, *address, "--nthreads", 1, "--no-dashboard", "--local-directory"]
        with (
            started("dask_worker", *common, tmp_path / "first") as first,
            started("dask_worker", *common, tmp_path / "second") as second,
            Pool(workers=0, scheduler=str(file), tls=tls) as pool,
        ):
            wait_until(lambda: pool.wait_until_started() == 2)
            yield Cluster(file, (first, second))


def test_two_hosts_over_tls_equal_a_local_build_although_one_is_cut_off(
    cluster: Cluster, tls: Tls, phantom_tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data.zarr"
    words = [PREP, "build", "--src", phantom_tree, "--out", out, "--size", 64, "--slices-per-shard", 1]
    words += ["--scheduler", cluster.file, "--tls-ca", tls.ca, "--tls-cert", tls.cert, "--tls-key", tls.key]
    building = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    done = working(out) / "shards"
    wait_until(lambda: building.poll() is not None or len(list(done.glob("*.json"))) > 3)
    kill(cluster.hosts[0])
    _, printed = building.communicate(timeout=200)
    assert building.returncode == 0, printed
    assert "Dashboard: http" in printed
    build(phantom_tree, tmp_path / "local.zarr", SHARDS, workers=0)
    assert published(out) == published(tmp_path / "local.zarr")


def test_files_for_tls_belong_together_and_to_an_encrypted_scheduler(tls: Tls, tmp_path: Path) -> None:
    given = {"tls_ca": str(tls.ca), "tls_cert": str(tls.cert), "tls_key": str(tls.key)}
    with pytest.raises(UsageError, match="belong together"):
        resolve(None, {"scheduler": "tls://127.0.0.1:1", **dict(list(given.items())[:2])}).arguments()
    with pytest.raises(UsageError, match="there is none"):
        resolve(None, given).arguments()
    with Pool(workers=0, scheduler="tcp://127.0.0.1:1", tls=tls) as pool, pytest.raises(UsageError, match="at tcp://"):
        pool.wait_until_started()
    missing = Tls(tls.ca, tmp_path / "none.pem", tls.key)
    with (
        Pool(workers=0, scheduler="tls://127.0.0.1:1", tls=missing) as pool,
        pytest.raises(BuildError, match=r"Cannot read a file for TLS: .*none\.pem"),
    ):
        pool.wait_until_started()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"address": 7', b"\xff"])
def test_a_file_that_no_scheduler_wrote_is_named(content: bytes, phantom_tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    file.write_bytes(content)
    done = prep("build", "--src", phantom_tree, "--out", tmp_path / "data.zarr", "--scheduler", file)
    assert done.returncode == 1
    assert (
        f"Expected the scheduler file of a Dask scheduler (`dask scheduler --scheduler-file FILE`) at {file}"
        in done.stderr
    )
