"""Datasets in real stores, read as those in folders: pixels, tables, checks, commands."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ich_prep.dataset import open_dataset
from ich_prep.dataset.schema import shard_path
from ich_prep.dataset.stores import Store
from ich_prep.dataset.union import open_union
from ich_prep.errors import CorruptionError, DatasetError, StoreError, UsageError
from ich_prep.export import export
from tests.support.buckets import upload
from tests.support.cli import prep
from tests.support.faulty_proxy import Proxy
from tests.support.s3_servers import S3Server


@pytest.fixture(autouse=True)
def endpoint(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names the server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)


@pytest.fixture(scope="module")
def remote(s3: S3Server, dataset_path: Path) -> str:
    """The URL of a copy of the phantom's dataset that no test changes."""
    return upload(dataset_path, f"{s3.url}/read/data.zarr", s3.endpoint)


@pytest.fixture
def copy(dataset_path: Path, url: str, s3: S3Server) -> str:
    """A copy that a test may damage."""
    return upload(dataset_path, url, s3.endpoint)


def shard_key(number: int) -> str:
    return str(shard_path(Path(), number))


def test_a_dataset_in_a_store_is_the_same_dataset(remote: str, dataset_path: Path) -> None:
    with open_dataset(remote) as far, open_dataset(dataset_path) as near:
        assert (far.digest, far.shape, far.dtype, str(far.path)) == (near.digest, near.shape, near.dtype, remote)
        for table in ("slices", "series", "shards", "quarantine"):
            assert far.read_table(table).equals(near.read_table(table))
        rows = np.random.default_rng(0).permutation(np.flatnonzero(near.is_ok))
        for threads in (1, 3):
            np.testing.assert_array_equal(far.read(rows, threads=threads), near.read(rows))
        np.testing.assert_array_equal(far.read([3, 3, 0]), near.read([3, 3, 0]))
        np.testing.assert_array_equal(far.volume(series_row=1), near.volume(series_row=1))
        again = pickle.loads(pickle.dumps(far))
        np.testing.assert_array_equal(again.read(rows[:3]), near.read(rows[:3]))
        again.close()
        with pytest.raises(ValueError, match="closed"):
            again.read(rows[:3])


@pytest.mark.parametrize("name", ["windows.zarr", "hu.zarr"])
def test_every_codec_and_missing_chunk_is_read(name: str, url: str, s3: S3Server) -> None:
    golden = Path(__file__).parents[1] / "contract" / name
    with open_dataset(upload(golden, url, s3.endpoint)) as far, open_dataset(golden) as near:
        rows = np.flatnonzero(near.is_ok)
        np.testing.assert_array_equal(far.read(rows), near.read(rows))
        absent = np.flatnonzero(~near.is_ok)
        assert len(absent)
        with pytest.raises(DatasetError, match=rf"Row {absent[0]} has the status .* no pixels"):
            far.read(absent[:1])


def test_a_union_of_both_kinds(remote: str) -> None:
    golden = Path(__file__).parents[1] / "contract" / "windows.zarr"
    with pytest.raises(UsageError, match=r"cannot be read as one: size is"):
        open_union([remote, golden])
    with pytest.raises(UsageError, match="twice"):
        open_union([remote, remote])


def test_a_missing_or_unfinished_dataset_is_named(url: str, store: Store) -> None:
    with pytest.raises(DatasetError, match=rf"Expected a dataset at {url}; found nothing"):
        open_dataset(url)
    Store(f"{url}.build", endpoint=store.endpoint).put("state.json", b"{}")
    with pytest.raises(DatasetError, match=rf"The build of {url} is not finished"):
        open_dataset(url)


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("zarr.json", lambda data: data.replace(b'"ok": ', b'"ok": 1'), "zarr.json is damaged"),
        ("labels/slices.parquet", flip, "SHA-256 mismatch"),
        ("labels/shards.parquet", flip, "SHA-256 mismatch"),
        (shard_key(1), flip, "checksum mismatch"),
        (shard_key(1), lambda data: data[:-1] + bytes([data[-1] ^ 1]), "index checksum mismatch"),
        (shard_key(1), lambda data: data[:-40], "truncated"),
        (shard_key(1), None, "file not found"),
    ],
)
def test_damage_is_found(
    key: str, change: Callable[[bytes], bytes] | None, words: str, copy: str, store: Store
) -> None:
    if change is None:
        store.delete(key)
    else:
        store.put(key, change(store.get(key)))
    with pytest.raises(CorruptionError, match=words) as found, open_dataset(copy) as dataset:
        dataset.read(np.flatnonzero(dataset.is_ok))
    assert copy in str(found.value)


def test_a_swapped_shard_is_found(copy: str, store: Store) -> None:
    first, second = store.get_objects([shard_key(0), shard_key(1)])
    store.put(shard_key(0), second)
    store.put(shard_key(1), first)
    with open_dataset(copy) as dataset, pytest.raises(CorruptionError):
        dataset.read(np.flatnonzero(dataset.is_ok))
    done = prep("verify", copy)
    assert done.returncode == 1 and "2 problems" in done.stderr and f"{copy}/{shard_key(0)}: shard 0" in done.stderr


def test_reading_goes_on_over_a_line_that_fails(
    copy: str, dataset_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    kinds = ("500", "503", "cut", "half", "refuse", "slow")
    proxy.set(**dict.fromkeys(kinds, 0.04))
    with open_dataset(copy) as far, open_dataset(dataset_path) as near:
        rows = np.flatnonzero(near.is_ok)
        for seed in range(12):
            some = np.random.default_rng(seed).choice(rows, 40)
            np.testing.assert_array_equal(far.read(some), near.read(some))
    faults = proxy.faults()
    assert set(faults) == set(kinds) and sum(faults.values()) > 30


def test_info_and_verify_of_a_url(
    remote: str, dataset_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    shown, near = prep("info", remote, "--endpoint", s3.endpoint), prep("info", dataset_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == near.stdout.replace(str(dataset_path), remote)
    checked = prep("verify", remote, "--endpoint", s3.endpoint)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == prep("verify", dataset_path).stdout.replace(str(dataset_path), remote)


def test_verify_compares_with_the_sources_of_a_named_working_folder(
    remote: str, dataset_path: Path, phantom_tree: Path
) -> None:
    folder = dataset_path.with_name(f"{dataset_path.name}.build")
    done = prep("verify", remote, "--src", phantom_tree, "--build-dir", folder, "--sample", 0.05)
    assert done.returncode == 0 and "compared with the sources" in done.stdout, done.stderr


def test_verify_finds_strays_and_missing_objects(copy: str, store: Store) -> None:
    store.put("images/c/9/0/0/1", b"x")
    store.delete("labels/quarantine.parquet")
    store.delete(shard_key(2))
    done = prep("verify", copy)
    assert done.returncode == 1
    for line in (
        f"{copy}/images/c/9/0/0/1: is not part of this dataset",
        f"{copy}/labels/quarantine.parquet: cannot be read: No such file or directory",
        f"{copy}/{shard_key(2)}: shard 2 is missing",
    ):
        assert line in done.stderr


def test_export_from_a_url(remote: str, dataset_path: Path, tmp_path: Path) -> None:
    for name, place in (("far", remote), ("near", str(dataset_path))):
        with open_dataset(place) as dataset:
            export(dataset, [0], tmp_path / name, form="npy")
    far, near = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.npy")}
        for name in ("far", "near")
    )
    assert far == near and far


@pytest.mark.parametrize(
    "words",
    [
        ("relabel", "URL", "--labels", "LABELS"),
        ("drop", "URL", "--where", "row == 0"),
        ("append", "--src", ".", "--out", "URL"),
        ("view", "URL"),
        ("view", "URL", "--html", "page"),
        ("report", "URL"),
        ("clean", "URL", "--generations"),
    ],
    ids=" ".join,
)
def test_commands_that_need_a_folder_say_so(words: tuple[str, ...], remote: str, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("SOPInstanceUID,any\n1,0\n")
    done = prep(*({"URL": remote, "LABELS": labels}.get(word, word) for word in words))
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and remote in done.stderr
    assert "object store" in done.stderr or "only paths of a file system" in done.stderr


def test_a_wrong_secret_is_one_message(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID"):
        open_dataset(remote)
    done = prep("info", remote)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "answered 403" in done.stderr and "a-wrong-secret" not in done.stderr
