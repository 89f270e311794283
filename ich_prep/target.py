"""What lies where a dataset is to be built: whether it may be taken, is this dataset already, or is being built.

What is no dataset or build of ours is not touched.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from ich_prep import ledger, store
from ich_prep.errors import BuildError, UsageError, words_of
from ich_prep.sources import Listing, shown
from ich_prep.store import Spec, State


def refuse_foreign(target: Path, source: Path) -> None:
    """Raise where ``target`` lies in the source tree, or is neither a dataset, nor a build in progress, nor empty."""
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise UsageError(
            f"Expected --out outside of the source tree {source}, whose files it would join; found {target}. Give "
            "another folder."
        )
    if not target.exists() or (target.is_dir() and all(path.is_dir() for path in target.rglob("*"))):
        return
    begun = any((target / store.BUILD / name).exists() for name in (store.STATE, store.LOCK))
    names = (store.ROOT, store.BUILD, store.IMAGES, store.LABELS)
    if begun and all(path.name in names or path.name.startswith(".") for path in target.iterdir()):
        return
    if (target / store.ROOT).exists():
        store.open_dataset(target)  # raises for a store that is not ours
        return
    raise UsageError(
        f"Expected --out to be new, a dataset, or a build to go on with; {target} is none of them. Nothing in it was "
        "touched: give another folder, or remove it yourself."
    )


def is_finished(target: Path, state: State, listing: Listing) -> bool:
    """Return whether the dataset that this build would make is there; raises where another one, or another's build is.

    A build without a plan is anyone's: of what it has made so far, headers, the next run keeps what it can use.
    """
    folder = target / store.BUILD
    finished = (target / store.ROOT).exists()
    if not (folder / store.STATE).exists():
        if not finished:
            return False
        there = store.open_dataset(target)  # its build folder was removed: of the sources only the number is known
        differences = _spec_differences(there.spec, state.spec)
        found = int(there.ich["counts"]["found"])
        if found != len(listing.files):
            differences.append(f"it was made of {found} files and there are {len(listing.files)} now")
    else:
        before = store.read_state(folder)
        if before.plan is None:
            return False
        differences = _spec_differences(before.spec, state.spec)
        if before.sources != state.sources:
            differences.append(_listing_difference(folder, listing))
        if before.labels != state.labels:
            differences.append("the labels are not the same")
        if not finished:
            differences += _differences(before.releases, state.releases)
    if differences:
        raise BuildError(
            f"{target} {'is a dataset' if finished else 'is the build'} of something else: {'; '.join(differences)}. "
            "Build into another folder, or replace this one with --overwrite."
        )
    return finished


def _spec_differences(there: Spec, here: Spec) -> list[str]:
    before, now = (spec.model_dump(mode="json").items() for spec in (there, here))
    return _differences({name: repr(value) for name, value in before}, {name: repr(value) for name, value in now})


def _differences(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    names = {**now, **before}
    return [
        f"{name} was {before.get(name)} and is now {now.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _listing_difference(folder: Path, listing: Listing) -> str:
    table = store.read_parquet(folder / store.FILES)
    before, now = _sizes_and_reasons(table), _sizes_and_reasons(listing.files)
    both = sorted(now.keys() & before.keys())
    added, removed = sorted(now.keys() - before.keys()), sorted(before.keys() - now.keys())
    resized = [path for path in both if now[path][0] != before[path][0]]
    others = [path for path in both if now[path][1] != before[path][1]]
    damaged = f", {len(others)} are damaged in one of the archives only" if others else ""
    example = shown((added or removed or resized or others)[0])
    return (
        f"of the {len(before)} source files {len(removed)} are gone, {len(resized)} have another size and {len(added)} "
        f"are new{damaged} (for one, {example})"
    )


def _sizes_and_reasons(files: pa.Table) -> dict[bytes, tuple[int, str | None]]:
    columns = (files[name].to_pylist() for name in ("path", "size", "reason"))
    return {path: (size, reason) for path, size, reason in zip(*columns, strict=True)}


def disown(target: Path) -> None:
    """Make a dataset or build of ours one that nobody can take for a dataset, and that the next step clears away."""
    for path in (target / store.ROOT, target / store.BUILD / store.STATE):
        path.unlink(missing_ok=True)
        ledger.sync_folder(path.parent)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the build's lock; raises ``BuildError`` where another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / store.LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(
                f"Another process is building {folder.parent} at this moment. Wait for it, or stop it, then run this "
                "command again."
            ) from None
        yield


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn what the operating system refuses into a message that says what to do."""
    try:
        yield
    except OSError as error:
        raise BuildError(
            f"Writing {target} failed: {words_of(error)}. What is finished is kept: make room or mend the "
            "cause, then run the same command again, without --overwrite."
        ) from error
