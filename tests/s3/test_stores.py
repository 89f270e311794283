"""Objects in real stores: reading, writing, conditions, and lines that fail."""

from __future__ import annotations

import pickle
import random
import threading
import time
from pathlib import Path

import pytest

from ich_prep.dataset import stores
from ich_prep.dataset.store_answers import ConditionError
from ich_prep.dataset.stores import MAX_GAP, MAX_REQUEST, Meta, Store, coalesced
from ich_prep.errors import StoreError, UsageError
from ich_prep.files import is_url
from tests.support.faulty_proxy import Proxy, faulty_proxy
from tests.support.s3_servers import S3Server, seaweedfs


def test_objects_are_written_read_listed_and_deleted(store: Store) -> None:
    written = store.put("a/one", b"first")
    store.put("a/two", memoryview(b"second"))
    store.put("b", b"")
    assert (store.get("a/one"), store.get_objects(["a/two", "b"])) == (b"first", [b"second", b""])
    assert store.head("a/one") == Meta(5, written.etag, written.version)
    assert [(key, meta.size) for key, meta in store.listed()] == [("a/one", 5), ("a/two", 6), ("b", 0)]
    assert [key for key, _ in store.listed("a")] == ["a/one", "a/two"]
    store.delete("b")
    store.delete("b")
    store.delete_many(["a/one", "never", "a/two"])
    assert store.listed() == []
    for read in (store.get, store.head, lambda key: store.get_ranges(key, [0], [1])):
        with pytest.raises(FileNotFoundError, match="a/one"):
            read("a/one")


def test_ranges_come_in_their_order_whatever_requests_fetch_them(store: Store) -> None:
    size = 3 * MAX_REQUEST + 1234
    data = random.Random(1).randbytes(size)
    store.put("x", data)
    draw = random.Random(2)
    starts = [draw.randrange(size) for _ in range(200)] + [0, 5, size - 10, 77]
    ends = [min(size, start + draw.choice([1, 100, MAX_GAP, 90_000])) for start in starts[:200]]
    ends += [size, 5, size + 100, 2 * MAX_REQUEST]
    for (start, end), found in zip(zip(starts, ends, strict=True), store.get_ranges("x", starts, ends), strict=True):
        assert found == data[start:end], (start, end)
    assert store.get_many([]) == []


def test_neighbouring_ranges_share_a_request_and_long_ones_are_split() -> None:
    assert coalesced([("a", 100, 200), ("a", 0, 50), ("b", 0, 9)]) == [("a", 0, 200, [1, 0]), ("b", 0, 9, [2])]
    far = MAX_GAP + 1
    assert coalesced([("a", 0, 1), ("a", 1 + far, 2 + far)]) == [("a", 0, 1, [0]), ("a", 1 + far, 2 + far, [1])]
    parts = coalesced([("a", 0, 2 * MAX_REQUEST + 1)])
    assert [part[1:3] for part in parts] == [
        (0, MAX_REQUEST),
        (MAX_REQUEST, 2 * MAX_REQUEST),
        (2 * MAX_REQUEST, 2 * MAX_REQUEST + 1),
    ]


def test_conditions_hold(store: Store) -> None:
    first = store.put("x", b"one", if_absent=True)
    with pytest.raises(ConditionError):
        store.put("x", b"two", if_absent=True)
    second = store.put("x", b"two", if_match=first)
    with pytest.raises(ConditionError):
        store.put("x", b"three", if_match=first)
    assert store.get("x") == b"two"
    assert store.put("x", b"two", if_absent=True).etag == second.etag, "written already, with these bytes"
    assert store.honours_conditions("probe")
    assert [key for key, _ in store.listed()] == ["x"], "the trial leaves nothing"


def test_a_store_that_ignores_conditions_is_recognised(careless: S3Server) -> None:
    store = Store(f"{careless.url}/x", endpoint=careless.endpoint)
    assert not store.honours_conditions("probe")
    assert store.listed() == []


def test_of_many_writers_of_one_object_one_wins(store: Store) -> None:
    won, lost = [], []

    def write(number: int) -> None:
        try:
            store.put("root", b"writer %d" % number, if_absent=True)
            won.append(number)
        except ConditionError:
            lost.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 11
    assert store.get("root") == b"writer %d" % won[0]


def test_a_store_travels_as_its_address(store: Store) -> None:
    store.put("x", b"here")
    again = pickle.loads(pickle.dumps(store))
    assert again == store and again.get("x") == b"here"


@pytest.mark.parametrize("kind", ["500", "503", "cut", "half", "refuse", "slow"])
def test_failures_of_a_moment_are_no_failures(kind: str, store: Store, proxy: Proxy) -> None:
    through = Store(store.url, endpoint=proxy.endpoint)
    data = random.Random(3).randbytes(200_000)
    proxy.set(**{kind: 0.3})
    for i in range(8):
        through.put(f"k{i}", data[i:])
    assert through.get_objects([f"k{i}" for i in range(8)]) == [data[i:] for i in range(8)]
    starts = list(range(0, 190_000, 50_000))
    found = through.get_many([(f"k{i}", start, start + 100) for i in range(8) for start in starts])
    assert found == [data[i + start :][:100] for i in range(8) for start in starts]
    assert [(key, meta.size) for key, meta in through.listed()] == [(f"k{i}", len(data) - i) for i in range(8)]
    assert through.honours_conditions("probe")
    through.delete_many([f"k{i}" for i in range(8)])
    assert proxy.faults()[kind] > 5
    assert store.listed() == []


def test_a_conditional_write_whose_answer_is_lost_is_done_once(store: Store, proxy: Proxy) -> None:
    proxy.set(cut=1.0, only="PUT", limit=4)
    meta = Store(store.url, endpoint=proxy.endpoint).put("root", b"whole", if_absent=True)
    assert proxy.faults() == {"cut": 4}
    assert store.get("root") == b"whole" and store.head("root") == meta


def test_a_server_that_is_killed_and_started_again_is_waited_for(tmp_path: Path) -> None:
    with seaweedfs(tmp_path) as server:
        store = Store(f"{server.url}/x", endpoint=server.endpoint)
        store.put("a", b"kept")
        server.kill()
        found: list[bytes] = []
        waiting = threading.Thread(target=lambda: found.append(store.get("a")))
        waiting.start()
        time.sleep(0.5)
        assert not found
        server.start()
        waiting.join(90)
        assert found == [b"kept"]


def test_a_store_that_stays_out_of_order_is_reported(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PATIENCE", 1.0)
    proxy.set(**{"503": 1.0})
    with pytest.raises(StoreError, match=r"Cannot read s3://.*/x: the store at http://.* answered 503 .* later"):
        Store(store.url, endpoint=proxy.endpoint).get("x")


def test_what_is_refused_is_explained_without_secrets(s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"s3://missing-bucket/x/k: .* answered 404 NoSuchBucket .*name of the bucket"):
        Store("s3://missing-bucket/x", endpoint=s3.endpoint).get("k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    with pytest.raises(StoreError, match=r"answered 403 SignatureDoesNotMatch .*AWS_ACCESS_KEY_ID") as refused:
        Store(url, endpoint=s3.endpoint).get("k")
    assert "a-wrong-secret" not in str(refused.value) and "test-key" not in str(refused.value)
    with faulty_proxy(s3.endpoint) as gone:
        pass
    with pytest.raises(StoreError, match=rf"Cannot read {url}/k: there is no answer at {gone.endpoint}.*--endpoint"):
        Store(url, endpoint=gone.endpoint).get("k")


@pytest.mark.parametrize(
    ("given", "endpoint", "words"),
    [
        ("ftp://host/data", None, "ftp:// is not supported"),
        ("s3://me:password@bucket/data", None, "credentials in the environment"),
        ("s3:///data", None, "not the place"),
        ("s3://bucket/data?versionId=1", None, "not the place"),
        ("s3://bucket/data", "host:9000", "Expected http://host:port"),
        ("s3://bucket/data", "http://me:password@host", "endpoint"),
    ],
)
def test_a_url_that_names_no_place_is_refused(given: str, endpoint: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        Store(given, endpoint=endpoint)
    assert "password" not in str(refused.value).replace("user name or password", "")


def test_urls_are_told_from_paths() -> None:
    assert all(map(is_url, ("s3://bucket/x", "s3:/bucket/x", "GS://b", "https://host/x")))
    assert not any(map(is_url, ("data.zarr", "/a/b", "./s3:/x", "a:b", "C:x")))


def test_a_range_behind_the_end_is_empty(store: Store) -> None:
    store.put("x", b"0123456789")
    assert store.get_ranges("x", [10, 5_000_000, 8], [12, 5_000_001, 30]) == [b"", b"", b"89"]
