"""Shards of a store on a local disk: read from there, shared by processes, never too many, never trusted unseen."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ich_prep.dataset import open_dataset
from ich_prep.dataset.shard_cache import LOCK, PART, WHOLE, Kept, ShardCache
from ich_prep.errors import CorruptionError, UsageError
from tests.support.buckets import upload
from tests.support.faulty_proxy import Proxy
from tests.support.s3_servers import S3Server


@pytest.fixture(scope="module")
def remote(s3: S3Server, dataset_path: Path) -> str:
    """The URL of a copy of the phantom's dataset that no test changes."""
    return upload(dataset_path, f"{s3.url}/cached/data.zarr", s3.endpoint)


@pytest.fixture(autouse=True)
def line(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """The environment names the proxy, which can be told to refuse all."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    return proxy


@pytest.fixture(scope="module")
def pixels(dataset_path: Path) -> np.ndarray:
    with open_dataset(dataset_path) as near:
        return near.read(np.arange(len(near)))


def sizes_of(dataset_path: Path) -> list[int]:
    with open_dataset(dataset_path) as near:
        return near.read_table("shards")["bytes"].to_pylist()


def kept_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {LOCK}


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != LOCK)


def test_a_second_epoch_needs_no_store(remote: str, pixels: np.ndarray, line: Proxy, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    rows = np.random.default_rng(0).permutation(len(pixels))
    with open_dataset(remote, cache=ShardCache(folder, 1 << 30)) as far:
        np.testing.assert_array_equal(far.read(rows, threads=2), pixels[rows])
        assert len(kept_in(folder)) == far.counts.shards
        line.set(refuse=1.0)
        np.testing.assert_array_equal(far.read(rows[::-1]), pixels[rows[::-1]])
        assert line.faults() == {}, "no request was made"
        line.set()
    with open_dataset(remote, cache=ShardCache(folder, 1 << 30)) as again:
        _ = again.slices
        reader = again._open_reader()  # the tables come from the store, the pixels need nothing of it
        line.set(refuse=1.0)
        np.testing.assert_array_equal(again.read(rows), pixels[rows])
        assert reader is again._open_reader() and line.faults() == {}
        copy = pickle.loads(pickle.dumps(again))
        line.set()
        np.testing.assert_array_equal(copy.read(rows[:5]), pixels[rows[:5]])
        copy.close()


def test_a_small_cache_keeps_what_fits_and_reads_the_rest(
    remote: str, pixels: np.ndarray, dataset_path: Path, tmp_path: Path
) -> None:
    limit, told = sum(sizes_of(dataset_path)) // 2, list[str]()
    rows = np.random.default_rng(1).permutation(len(pixels))
    with open_dataset(remote, cache=ShardCache(tmp_path, limit, say=told.append)) as far:
        for _ in range(3):
            np.testing.assert_array_equal(far.read(rows), pixels[rows])
            assert 0 < used(tmp_path) <= limit
        first = kept_in(tmp_path)
        assert len(first) < far.counts.shards and len(told) == 1 and "does not keep all shards" in told[0]
        np.testing.assert_array_equal(far.read(rows), pixels[rows])
        assert kept_in(tmp_path) == first, "what this run uses stays"


def test_a_later_run_replaces_what_was_used_longest_ago(
    remote: str, pixels: np.ndarray, dataset_path: Path, tmp_path: Path
) -> None:
    sizes = sizes_of(dataset_path)
    limit = max(sizes[0] + sizes[1], sizes[1] + sizes[2], sizes[0] + sizes[2])
    with open_dataset(remote, cache=ShardCache(tmp_path, limit)) as far:
        far.read([0])
        first = kept_in(tmp_path)
        far.read([16])
        second = kept_in(tmp_path) - first
        assert len(first) == len(second) == 1
    for name, age in ((*first, 100), (*second, 200)):
        path = tmp_path / str(name)
        os.utime(path, (path.stat().st_mtime - int(age),) * 2)
    with open_dataset(remote, cache=ShardCache(tmp_path, limit)) as far:
        np.testing.assert_array_equal(far.read([32]), pixels[[32]])
        assert len(kept_in(tmp_path)) == 2 and first < kept_in(tmp_path), "the older one went"
        assert used(tmp_path) <= limit


def damage_payload(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def damage_index(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_payload, damage_index, lambda path: path.write_bytes(b"x")])
def test_a_damaged_file_of_the_cache_costs_a_request(
    damage: object, remote: str, pixels: np.ndarray, tmp_path: Path
) -> None:
    rows = np.arange(len(pixels))
    with open_dataset(remote, cache=ShardCache(tmp_path, 1 << 30)) as far:
        far.read(rows)
    for path in tmp_path.glob(f"*{WHOLE}"):
        damage(path)  # type: ignore[operator]
    with open_dataset(remote, cache=ShardCache(tmp_path, 1 << 30)) as far:
        np.testing.assert_array_equal(far.read(rows), pixels)


def test_a_damaged_store_is_found_through_the_cache(url: str, dataset_path: Path, s3: S3Server, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset_path, tmp_path / "data.zarr"))
    damage_payload(copy / "images/c/1/0/0/0")
    upload(copy, url, s3.endpoint)
    found = pytest.raises(CorruptionError, match=rf"{url}/images/c/1/0/0/0.*checksum mismatch")
    with open_dataset(url, cache=ShardCache(tmp_path / "cache", 1 << 30)) as far, found:
        far.read(np.arange(16, 32))


def test_a_part_that_a_killed_process_left_is_removed(remote: str, pixels: np.ndarray, tmp_path: Path) -> None:
    orphan = tmp_path / f"{'0123456789abcdef'}-5000{PART}"
    orphan.write_bytes(bytes(5000))
    with open_dataset(remote, cache=ShardCache(tmp_path, 1 << 30)) as far:
        np.testing.assert_array_equal(far.read([0]), pixels[[0]])
    assert not orphan.exists()


def test_a_full_disk_is_no_failure(remote: str, pixels: np.ndarray, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: reserving the room of a shard fails in the same place."""
    told = list[str]()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = np.arange(len(pixels))
    with open_dataset(remote, cache=ShardCache(tmp_path, 1 << 30, say=told.append)) as far:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # Python ignores SIGXFSZ
        try:
            found = far.read(rows)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    np.testing.assert_array_equal(found, pixels)
    assert len(told) == 1 and "file too large" in told[0]
    assert kept_in(tmp_path) == set()


def read_all(remote: str, folder: str, seed: int, total: int, answers: object) -> None:
    rows = np.random.default_rng(seed).permutation(total)
    with open_dataset(remote, cache=ShardCache(folder, 1 << 30)) as far:
        found = far.read(rows)
        whole = np.empty_like(found)
        whole[rows] = found
    answers.put(whole.tobytes())  # type: ignore[attr-defined]


def test_processes_share_it(remote: str, pixels: np.ndarray, tmp_path: Path) -> None:
    start = multiprocessing.get_context("spawn")
    answers = start.Queue()
    processes = [
        start.Process(target=read_all, args=(remote, str(tmp_path), seed, len(pixels), answers)) for seed in range(3)
    ]
    for process in processes:
        process.start()
    try:
        found = [answers.get(timeout=120) for _ in processes]
    finally:
        for process in processes:
            process.join(60)
            process.kill()
    assert all(one == pixels.tobytes() for one in found)
    assert all(name.endswith(WHOLE) for name in kept_in(tmp_path))


def test_one_fetches_and_the_others_wait(tmp_path: Path, dataset_path: Path) -> None:
    with open_dataset(dataset_path) as near:
        line = near.read_table("shards").slice(0, 1).to_pylist()[0]
    data = (dataset_path / "images/c/0/0/0/0").read_bytes()
    shard = Kept(line["fingerprint"], line["bytes"], 16)
    fetched, going = list[int](), threading.Event()

    def fetch(ranges: object) -> Iterator[memoryview]:
        fetched.append(1)
        going.wait(30)
        return [memoryview(data)[start:end] for start, end in ranges]  # type: ignore[attr-defined, return-value]

    caches = [ShardCache(tmp_path, 1 << 30) for _ in range(2)]
    found = list[bytes]()

    def read(cache: ShardCache) -> None:
        descriptor = cache.open_shard(shard, fetch)  # type: ignore[arg-type]
        assert descriptor is not None
        found.append(os.pread(descriptor, len(data), 0))
        os.close(descriptor)

    threads = [threading.Thread(target=read, args=(cache,)) for cache in caches * 2]
    for thread in threads:
        thread.start()
    going.set()
    for thread in threads:
        thread.join(30)
    assert found == [data] * 4 and len(fetched) == 1


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"--cache .*/file cannot be used: .* Name a folder"):
        ShardCache(tmp_path / "file", 1)
