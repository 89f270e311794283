"""Builds that read from and write to buckets: the bytes of a local build, whatever dies or fails meanwhile."""

from __future__ import annotations

import io
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ich_prep.build_dataset import build
from ich_prep.dataset.bucket_path import BucketPath, bucket_path
from ich_prep.dataset.lease_owner import owner_here
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.stores import Store
from ich_prep.dry_run import dry_run
from ich_prep.errors import BuildError, SourceError, UsageError
from tests.support.buckets import names, objects, start_build_signalled, upload
from tests.support.cli import PREP, SMALL, prep, published, wait_for
from tests.support.faulty_proxy import Proxy, faulty_proxy
from tests.support.s3_servers import S3Server, seaweedfs

pytestmark = pytest.mark.timeout(600)
OPTIONS = ("--size", 64, "--slices-per-shard", 16)


@pytest.fixture(scope="module")
def source(s3: S3Server, phantom_tree: Path) -> str:
    """The phantom in the bucket."""
    return upload(phantom_tree, f"{s3.url}/phantom/rsna", s3.endpoint)


@pytest.fixture
def stopped() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to end after the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_a_bucket_from_a_bucket_equals_a_folder_from_a_folder(
    s3: S3Server, source: str, url: str, dataset_path: Path
) -> None:
    out = f"{url}/data.zarr"
    done = prep("build", "--src", f"{source}/", "--out", out, *OPTIONS, "--endpoint", s3.endpoint, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert out in done.stdout
    assert objects(out, s3.endpoint) == published(dataset_path)
    again = prep("build", "--src", source, "--out", out, *OPTIONS, "--endpoint", s3.endpoint, "--workers", 0)
    assert again.returncode == 0, again.stderr
    assert "already finished" in again.stdout
    scanned = prep("scan", source, "--endpoint", s3.endpoint, "--workers", 0)
    assert scanned.returncode == 0, scanned.stderr
    left = {name.partition("/")[0] for name in objects(f"{out}.build", s3.endpoint)}
    assert left >= {"state.json", "files.parquet", "scan", "plan.parquet", "shards", "log.jsonl"}
    assert "lease" not in left
    cleaned = prep("clean", out, "--endpoint", s3.endpoint)
    assert f"Removed {out}.build" in cleaned.stdout, cleaned.stderr
    assert names(f"{out}.build", s3.endpoint) == []


def test_a_bucket_from_a_folder_and_a_folder_from_a_bucket(
    s3: S3Server, source: str, url: str, phantom_tree: Path, dataset_path: Path, tmp_path: Path
) -> None:
    build(phantom_tree, f"{url}/data.zarr", SMALL, endpoint=s3.endpoint, build_dir=tmp_path / "w", workers=0)
    assert objects(f"{url}/data.zarr", s3.endpoint) == published(dataset_path)
    assert objects(f"{url}/data.zarr.build", s3.endpoint) == {}
    build(source, tmp_path / "data.zarr", SMALL, endpoint=s3.endpoint, workers=0)
    assert published(tmp_path / "data.zarr") == published(dataset_path)
    build(source, tmp_path / "b.zarr", SMALL, endpoint=s3.endpoint, build_dir=f"{url}/work", workers=0)
    assert published(tmp_path / "b.zarr") == published(dataset_path)


def test_several_sources_and_a_label_table_in_the_bucket(
    s3: S3Server, source: str, url: str, phantom_tree: Path, tmp_path: Path
) -> None:
    labels = next(path for path in phantom_tree.glob("*.csv") if "sample" not in path.name)
    Store(url, endpoint=s3.endpoint).put("labels.csv", labels.read_bytes())
    for spec, more in ((SMALL, ()), (Spec(size=64, store="hu", codec="zstd"), ("more",))):
        for name in more:
            upload(phantom_tree / "stage_2_test", f"{url}/{name}", s3.endpoint)
        folders = [phantom_tree, *([phantom_tree / "stage_2_test"] if more else [])]
        build(folders[0], tmp_path / f"{spec.store}.zarr", spec, labels=labels, workers=0)
        build(source, f"{url}/{spec.store}", spec, labels=f"{url}/labels.csv", endpoint=s3.endpoint, workers=0)
        assert objects(f"{url}/{spec.store}", s3.endpoint) == published(tmp_path / f"{spec.store}.zarr")
    scanned = dry_run([source, f"{url}/more"], endpoint=s3.endpoint, workers=0)
    assert scanned.files == dry_run([phantom_tree, phantom_tree / "stage_2_test"], workers=0).files


def test_defects_are_quarantined_in_the_same_words(s3: S3Server, url: str, tmp_path: Path) -> None:
    done = prep("synth", "--out", tmp_path / "rsna", "--series", 2, "--size", 32, "--defects", "--workers", 0)
    assert done.returncode == 0, done.stderr
    for path in [path for path in (tmp_path / "rsna").rglob("*") if not path.name.isprintable()]:
        path.unlink()  # a bucket has no such names
    options = ("--size", 32, "--max-quarantined", 1, "--allow-lost-labels", "--allow-missing-images", "--workers", 0)
    local = prep("build", "--src", tmp_path / "rsna", "--out", tmp_path / "d.zarr", *options)
    assert local.returncode == 0, local.stderr
    source = upload(tmp_path / "rsna", f"{url}/rsna", s3.endpoint)
    done = prep("build", "--src", source, "--out", f"{url}/d.zarr", *options, "--endpoint", s3.endpoint)
    assert done.returncode == 0, done.stderr
    assert objects(f"{url}/d.zarr", s3.endpoint) == published(tmp_path / "d.zarr")


def test_an_object_that_changes_meanwhile_is_not_taken_for_the_one_that_was_listed(
    s3: S3Server, url: str, phantom_tree: Path, stopped: list[subprocess.Popen[str]]
) -> None:
    source, out = upload(phantom_tree, f"{url}/rsna", s3.endpoint), f"{url}/data.zarr"
    name = str(next(phantom_tree.rglob("*.dcm")).relative_to(phantom_tree))
    store = Store(source, endpoint=s3.endpoint)
    stopped.append(start_build_signalled("after", "plan.parquet", "SIGSTOP", source, out, s3.endpoint))
    wait_for(lambda: "plan.parquet" in names(f"{out}.build", s3.endpoint), stopped[0])
    before = store.get(name)
    store.put(name, before[:-1] + bytes([before[-1] ^ 1]))  # equal size, equal header
    stopped[0].send_signal(signal.SIGCONT)
    _, errors = stopped[0].communicate(timeout=300)
    assert stopped[0].returncode == 0, errors
    table = Store(out, endpoint=s3.endpoint).get("labels/quarantine.parquet")
    assert pq.read_table(io.BytesIO(table)).select(["path", "reason"]).to_pylist() == [
        {"path": name, "reason": "changed"}
    ]


MOMENTS = (
    ("before", "/lease", 1), ("after", "/lease", 1), ("after", "/.lease", 1), ("after", "files.parquet", 1),
    ("before", "state.json", 1), ("after", "scan/00000.parquet", 1), ("after", "plan.parquet", 1),
    ("before", "state.json", 2), ("after", "keys.parquet", 1), ("before", "/0/0/0", 2), ("after", "/0/0/0", 3),
    ("after", "shards/00002.json", 1), ("after", "slices.parquet", 1), ("before", "data.zarr/zarr.json", 1),
    ("after", "data.zarr/zarr.json", 1),
)  # fmt: skip


@pytest.mark.parametrize(("when", "name", "count"), MOMENTS)
def test_a_build_killed_at_any_moment_resumes(
    when: str, name: str, count: int, s3: S3Server, source: str, url: str, dataset_path: Path
) -> None:
    out = f"{url}/data.zarr"
    killed = start_build_signalled(when, name, "SIGKILL", source, out, s3.endpoint, count=count)
    _, errors = killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL, errors
    is_whole = (when, name) == ("after", "data.zarr/zarr.json")
    assert ("zarr.json" in objects(out, s3.endpoint)) == is_whole
    done = build(source, out, SMALL, endpoint=s3.endpoint, workers=0)
    assert done.already_finished == is_whole
    assert {name: digest for name, digest in objects(out, s3.endpoint).items() if name != ".lease"} == published(
        dataset_path
    )


@pytest.mark.parametrize("milestone", ["files.parquet", "plan.parquet", "shards/00001.json"])
def test_a_build_with_workers_killed_from_outside_resumes(
    milestone: str, s3: S3Server, source: str, url: str, dataset_path: Path
) -> None:
    out = f"{url}/data.zarr"
    words = ("build", "--src", source, "--out", out, *OPTIONS, "--endpoint", s3.endpoint, "--workers", 2)
    killed = subprocess.Popen(
        [PREP, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    store = Store(f"{out}.build", endpoint=s3.endpoint)
    try:
        wait_for(lambda: any(key == milestone for key, _ in store.listed()), killed)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)  # its workers too, as when a machine fails
        killed.communicate()
    done = prep(*words)
    assert done.returncode == 0, done.stderr
    assert objects(out, s3.endpoint) == published(dataset_path)


def test_a_dataset_is_replaced_with_overwrite(s3: S3Server, source: str, url: str, dataset_path: Path) -> None:
    out = f"{url}/data.zarr"
    build(source, out, Spec(size=32), endpoint=s3.endpoint, workers=0)
    with pytest.raises(BuildError, match="size was 32, now 64"):
        build(source, out, SMALL, endpoint=s3.endpoint, workers=0)
    build(source, out, SMALL, endpoint=s3.endpoint, workers=0, overwrite=True)
    assert objects(out, s3.endpoint) == published(dataset_path)


def test_of_two_builders_of_one_target_one_publishes_and_the_other_says_so(
    s3: S3Server, source: str, url: str, dataset_path: Path, stopped: list[subprocess.Popen[str]]
) -> None:
    out = f"{url}/data.zarr"
    words = ("build", "--src", source, "--out", out, *OPTIONS, "--endpoint", s3.endpoint, "--workers", 0)
    stopped.append(start_build_signalled("after", "plan.parquet", "SIGSTOP", source, out, s3.endpoint))
    wait_for(lambda: "plan.parquet" in names(f"{out}.build", s3.endpoint), stopped[0])
    for more in ((), ("--overwrite",)):
        other = prep(*words, *more)
        assert other.returncode == 1
        assert f"Another process (process {stopped[0].pid} on" in other.stderr, other.stderr
    stopped[0].send_signal(signal.SIGCONT)
    _, errors = stopped[0].communicate(timeout=300)
    assert stopped[0].returncode == 0, errors
    assert objects(out, s3.endpoint) == published(dataset_path)


def test_several_builders_at_once(s3: S3Server, source: str, url: str, dataset_path: Path) -> None:
    out = f"{url}/data.zarr"
    words = ("build", "--src", source, "--out", out, *OPTIONS, "--endpoint", s3.endpoint, "--workers", 0)
    started = [subprocess.Popen([PREP, *map(str, words)], stdout=-1, stderr=-1, text=True) for _ in range(3)]
    ended = [(process.communicate(timeout=300), process.returncode) for process in started]
    for (_, errors), status in ended:
        assert status == 0 or (status == 1 and "Another process" in errors), errors
    assert 0 in [status for _, status in ended]
    assert objects(out, s3.endpoint) == published(dataset_path)


def test_who_lost_its_lease_does_not_publish_over_another(
    s3: S3Server, source: str, url: str, stopped: list[subprocess.Popen[str]]
) -> None:
    out, store = f"{url}/data.zarr", Store(url, endpoint=s3.endpoint)
    name = "data.zarr/zarr.json"
    stopped.append(start_build_signalled("before", name, "SIGSTOP", source, out, s3.endpoint))
    wait_for(lambda: b'"published": "' in _state(store), stopped[0])
    store.delete_many(["data.zarr/.lease", "data.zarr.build/lease"])  # as one that nobody refreshed is broken
    build(source, out, Spec(size=32), endpoint=s3.endpoint, workers=0, overwrite=True)
    whole = objects(out, s3.endpoint)
    stopped[0].send_signal(signal.SIGCONT)
    _, errors = stopped[0].communicate(timeout=300)
    assert stopped[0].returncode == 1
    assert f"Another process published {out}" in errors
    assert objects(out, s3.endpoint) == whole


def _state(store: Store) -> bytes:
    try:
        return store.get("data.zarr.build/state.json")
    except FileNotFoundError:
        return b""


def test_a_lease_is_broken_only_if_its_owner_is_gone(s3: S3Server, source: str, url: str) -> None:
    out, store = f"{url}/data.zarr", Store(url, endpoint=s3.endpoint)
    owner = owner_here()
    elsewhere = owner.text().replace(owner.space.encode(), b"another machine")
    store.put("data.zarr.build/lease", elsewhere)
    with pytest.raises(BuildError, match="Another process"):
        build(source, out, SMALL, endpoint=s3.endpoint, workers=0)
    assert store.get("data.zarr.build/lease") == elsewhere
    store.put("data.zarr.build/lease", owner.text().replace(owner.started.encode(), b"1"))
    build(source, out, SMALL, endpoint=s3.endpoint, workers=0)
    assert not [key for key, _ in store.listed() if "lease" in key]


def test_a_server_killed_in_mid_build_and_started_again(
    tmp_path: Path, phantom_tree: Path, dataset_path: Path, stopped: list[subprocess.Popen[str]]
) -> None:
    with seaweedfs(tmp_path / "server") as server, faulty_proxy(server.endpoint) as proxy:
        source, out = upload(phantom_tree, f"{server.url}/rsna", server.endpoint), f"{server.url}/data.zarr"
        proxy.set(latency=0.02)
        words = ("build", "--src", source, "--out", out, *OPTIONS, "--endpoint", proxy.endpoint, "--workers", 2)
        running = subprocess.Popen([PREP, *map(str, words)], stdout=-1, stderr=-1, text=True)
        stopped.append(running)
        store = Store(f"{out}.build", endpoint=server.endpoint)
        for milestone in ("scan/00000.parquet", "shards/00001.json"):
            wait_for(lambda name=milestone: any(key == name for key, _ in store.listed()), running)
            server.kill()
            server.start()
        _, errors = running.communicate(timeout=500)
        assert running.returncode == 0, errors
        assert objects(out, server.endpoint) == published(dataset_path)


def test_a_thousand_failing_requests_lose_nothing(s3: S3Server, url: str, proxy: Proxy, tmp_path: Path) -> None:
    done = prep("synth", "--out", tmp_path / "rsna", "--series", 20, "--size", 32, "--workers", 0)
    assert done.returncode == 0, done.stderr
    spec = Spec(size=32, slices_per_shard=32)
    build(tmp_path / "rsna", tmp_path / "d.zarr", spec, workers=0)
    source = upload(tmp_path / "rsna", f"{url}/rsna", s3.endpoint)
    proxy.set(seed=1, limit=1000, **{"500": 0.2, "503": 0.2, "cut": 0.05, "half": 0.05, "refuse": 0.05, "slow": 0.02})
    build(source, f"{url}/d.zarr", spec, endpoint=proxy.endpoint, workers=0)
    faults = proxy.faults()
    print(faults)
    assert sum(faults.values()) >= 1000
    assert objects(f"{url}/d.zarr", s3.endpoint) == published(tmp_path / "d.zarr")


def test_answers_that_never_come_are_asked_for_again(
    s3: S3Server, source: str, url: str, proxy: Proxy, dataset_path: Path
) -> None:
    proxy.set(seed=2, limit=6, silent=0.02)
    build(source, f"{url}/data.zarr", SMALL, endpoint=proxy.endpoint, workers=0)
    assert proxy.faults() == {"silent": 6}
    assert objects(f"{url}/data.zarr", s3.endpoint) == published(dataset_path)


def test_a_store_that_ignores_conditions_is_refused_unless_the_user_knows(
    careless: S3Server, phantom_tree: Path, dataset_path: Path
) -> None:
    source = upload(phantom_tree, f"{careless.url}/rsna", careless.endpoint)
    out = f"{careless.url}/data.zarr"
    words = ("build", "--src", source, "--out", out, *OPTIONS, "--endpoint", careless.endpoint, "--workers", 0)
    refused = prep(*words)
    assert refused.returncode == 1
    assert "--no-atomic" in refused.stderr
    assert refused.stderr.count("Error:") == 1
    assert objects(out, careless.endpoint) == {}
    done = prep(*words, "--no-atomic")
    assert done.returncode == 0, done.stderr
    assert objects(out, careless.endpoint) == published(dataset_path)


def test_what_cannot_work_is_one_message(s3: S3Server, source: str, url: str, tmp_path: Path) -> None:
    at = ("--endpoint", s3.endpoint, "--workers", 0)
    cases: dict[tuple[object, ...], tuple[int, str]] = {
        ("build", "--src", "s3://no-such-bucket/x", "--out", tmp_path / "d.zarr", *at): (1, "no-such-bucket"),
        ("build", "--src", f"{url}/nothing", "--out", tmp_path / "d.zarr", *at): (1, "Expected DICOM files below"),
        ("build", "--src", source, "--out", f"{url}/d", "--endpoint", "http://127.0.0.1:9", "--workers", 0): (
            1,
            "endpoint",
        ),
        ("build", "--src", "https://127.0.0.1/x", "--out", f"{url}/d", *at): (2, "web servers cannot be listed"),
        ("build", "--src", source, "--out", f"{source}/d.zarr", *at): (2, "lies inside the source"),
        ("build", "--src", source, "--out", f"{url}/d", "--build-dir", f"{url}/d/w", *at): (2, "inside each other"),
        ("build", "--src", source, "--out", f"{url}/d", "--identifiers", "pseudonymise", *at): (2, "--key"),
        ("build", "--src", source, "--out", f"{url}/d", "--labels", f"{url}/none.csv", *at): (1, "none.csv"),
        ("build", "--src", source, "--out", f"{url}/d", "--report", *at): (2, "--report"),
        ("plan", "--src", source, "--out", tmp_path / "d.zarr"): (2, "s3://"),
        ("shards", f"{url}/d"): (2, "s3://"),
        ("publish", f"{url}/d"): (2, "s3://"),
        ("status", f"{url}/d"): (2, "s3://"),
        ("append", "--out", f"{url}/d", "--src", source): (2, "s3://"),
        ("relabel", f"{url}/d", "--labels", f"{url}/x.csv"): (2, "s3://"),
        ("drop", f"{url}/d", "--where", "row = 1"): (2, "s3://"),
    }
    for words, (status, text) in cases.items():
        done = prep(*words)
        assert (done.returncode, done.stderr.count("Error:")) == (status, 1), (words, done.stderr)
        assert text in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert objects(url, s3.endpoint) == {}
    assert not [*tmp_path.iterdir()]


def test_without_credentials_it_says_so(
    s3: S3Server, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    done = prep("build", "--src", source, "--out", tmp_path / "d.zarr", "--endpoint", s3.endpoint, "--workers", 0)
    assert done.returncode == 1
    assert "redentials" in done.stderr
    assert done.stderr.count("Error:") == 1


def test_an_archive_in_a_bucket_is_refused(s3: S3Server, url: str, tmp_path: Path) -> None:
    store = Store(url, endpoint=s3.endpoint)
    store.put("rsna/a.dcm", b"x")
    store.put("rsna/b.zip", b"x")
    with pytest.raises(SourceError, match=r"rsna/b.zip is an archive"):
        build(f"{url}/rsna", tmp_path / "d.zarr", SMALL, endpoint=s3.endpoint, workers=0)


def test_what_others_keep_in_a_bucket_is_left_alone(s3: S3Server, source: str, url: str) -> None:
    store = Store(url, endpoint=s3.endpoint)
    store.put("mine/notes.txt", b"x")
    for options in ({"out": f"{url}/mine"}, {"out": f"{url}/d.zarr", "build_dir": f"{url}/mine"}):
        with pytest.raises(UsageError, match=r"notes\.txt"):
            build(source, spec=SMALL, endpoint=s3.endpoint, workers=0, overwrite=True, **options)  # type: ignore[arg-type]
    assert [key for key, _ in store.listed()] == ["mine/notes.txt"]


def test_places_behave_as_paths_do(s3: S3Server, url: str) -> None:
    place = bucket_path(f"{url}/a/b", "--out", endpoint=s3.endpoint)
    assert (place.name, place.parent.name, place.suffix) == ("b", "a", "")
    assert not place.exists()
    for name in ("c.txt", "d/e.txt", "d.txt"):
        (place / name).write_bytes(name.encode())
    assert place.is_dir() and not place.is_file() and (place / "d.txt").is_file()
    assert sorted(each.name for each in place.glob("*.txt")) == ["c.txt", "d.txt"]
    assert sorted(str(each.relative_to(place)) for each in place.rglob("*")) == ["c.txt", "d.txt", "d/e.txt"]
    with pytest.raises(FileExistsError):
        (place / "c.txt").create(b"other")
    (place / "c.txt").unlink()
    with pytest.raises(FileNotFoundError):
        (place / "c.txt").unlink()
    with (place / "d.txt").reader() as file:
        file.seek(2)
        assert file.read() == b"txt"
    assert isinstance(place.parents[-1], BucketPath) and place.parents[-1].key == ""
