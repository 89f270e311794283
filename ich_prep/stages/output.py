"""The output folder of a build: may it be used, and does it contain this dataset, another one, or an unfinished build?

Anything that is neither a dataset nor a build of this project is left untouched.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa

from ich_prep.dataset.bucket_path import BucketPath, Place
from ich_prep.dataset.dataset import open_dataset, read_attributes, working_folder
from ich_prep.dataset.lock import HeldError, locked
from ich_prep.dataset.schema import AS_STORED, IMAGES, LABELS, ROOT, TABLES
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.storage import (
    files_below,
    note_on_sync,
    path_below,
    remove_files,
    size_of,
    sync_folder,
    whole_name,
)
from ich_prep.dataset.tables import read_sealed
from ich_prep.errors import BuildError, CorruptionError, DatasetError, UsageError, count, describe_os_error
from ich_prep.files import is_litter
from ich_prep.progress import NoProgress
from ich_prep.sources import Listing, shown
from ich_prep.stages.identifier_key import is_key_of
from ich_prep.stages.parts import refuse_parts
from ich_prep.stages.state import BuildFolder, State, read_state, readable_state

_SILENT = NoProgress().say
LEASE = ".lease"  # of the process that builds a dataset, in it, where the file system has no locks
# What a build puts into a dataset, relative to it.
_OURS = re.compile(
    rf"{ROOT}|\.lease(\.breaking)?|{IMAGES}/{ROOT}|{IMAGES}/c/[0-9]+/0/0/0|{LABELS}/{ROOT}|{LABELS}/({'|'.join(TABLES)})(\.[0-9]+)?\.parquet"
)


def check_output_folder(out: Place, folder: BuildFolder, sources: Sequence[Place], *, overwrite: bool = False) -> None:
    """Raise ``UsageError`` unless a build may write to ``out`` and to its working ``folder``.

    Both must lie outside of the ``sources``, of each other and of other datasets, and each must be new, empty, or what
    a build made, and nothing else. A dataset that cannot be opened may be replaced with ``overwrite``.
    """
    for path, option in ((out, "--out"), (folder.path, "--build-dir")):
        _check_place(path, option, sources)
    places = out.resolve(), folder.path.resolve()
    if places[0] in (places[1], *places[1].parents) or places[1] in places[0].parents:
        raise UsageError(
            f"The working folder {folder.path} and the dataset {out} must not lie inside each other. Give another "
            "--build-dir."
        )
    _check_folder(folder)
    _check_belongs(out, folder)
    if (out / ROOT).exists():
        _check_dataset(out, overwrite=overwrite)
        return
    foreign = foreign_files(out)
    if foreign or (out.exists() and not out.is_dir()):
        found = f"it contains {path_below(foreign[0], out)}" if foreign else "it is a file"
        raise UsageError(
            f"--out must be a new or empty folder, a dataset, or an unfinished build; {out} is something else ({found}) "
            "and was left untouched. Give another folder, or remove it."
        )
    if own_files(out) and not folder.state.exists() and not folder.lock.exists():
        raise UsageError(
            f"{out} is an unfinished build whose working folder is not {folder.path}. Name that folder with --build-dir "
            "to resume, or remove the dataset to start again."
        )


def check_working_folder(folder: BuildFolder, sources: Sequence[Place]) -> None:
    """Raise ``UsageError`` unless a dry run may keep headers in ``folder``: new, empty, or one without a plan."""
    _check_place(folder.path, "--build-dir", sources)
    _check_folder(folder)
    if folder.state.exists() and read_state(folder).plan is not None:
        raise UsageError(
            f"The working folder {folder.path} is that of a build that has a plan. Name another one with --build-dir, or "
            "none; `ich-prep quarantine` shows what that build left out."
        )


def _check_folder(folder: BuildFolder) -> None:
    """Raise ``UsageError`` where the working ``folder`` holds what no build put there."""
    unknown = folder.unknown_files()
    if unknown or (folder.path.exists() and not folder.path.is_dir()):
        reason = f"it contains {path_below(unknown[0], folder.path)}" if unknown else "it is a file"
        raise UsageError(
            f"The working folder {folder.path} was not made by ich-prep ({reason}), and was left untouched. Name another "
            "one with --build-dir."
        )


def _check_place(path: Place, option: str, sources: Sequence[Place]) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{option} {os.fsencode(str(path))!r} is not a path in UTF-8. Give another folder.") from None
    if not path.name:
        raise UsageError(f"{option} {path} is the root of the file system. Give another folder.")
    for source in sources:
        if source.resolve() in (path.resolve(), *path.resolve().parents):
            raise UsageError(
                f"{option} {path} lies inside the source {source}: its files would become sources of the next build. "
                "Give another folder."
            )
    inside = next((parent for parent in path.resolve().parents if (parent / ROOT).is_file()), None)
    if inside is not None:
        raise UsageError(f"{option} {path} lies inside the Zarr store {inside}. Give another folder.")


def _check_belongs(out: Place, folder: BuildFolder) -> None:
    """Raise ``UsageError`` where ``folder``, one that was named, is that of another finished dataset."""
    state = readable_state(folder)
    if state is None or state.published is None or folder.path == working_folder(out):
        return
    try:
        belongs = state.belongs_to(open_dataset(out).digest)
    except DatasetError:
        belongs = bool(own_files(out))  # of a build that was interrupted while it published
    if not belongs:
        raise UsageError(
            f"The working folder {folder.path} belongs to another dataset than {out}. Name another one with --build-dir."
        )


def _check_dataset(out: Place, *, overwrite: bool) -> None:
    """Raise ``DatasetError`` where what is at ``out`` is not a dataset, or one that may only be replaced."""
    try:
        open_dataset(out)
    except DatasetError as error:
        if not overwrite or foreign_files(out) or not own_files(out, shards_only=True):
            raise
        if isinstance(error, CorruptionError) or "ich" in (read_attributes(out) or {}):
            return
        raise


def own_files(out: Place, *, shards_only: bool = False) -> list[Place]:
    """Return the files of ``out`` that a build puts into a dataset, or only its shards; temporary ones too."""
    pattern = re.compile(rf"{IMAGES}/c/[0-9]+/0/0/0") if shards_only else _OURS
    return [path for path in files_below(out) if pattern.fullmatch(_name_in(out, path))]


def foreign_files(out: Place) -> list[Place]:
    """Return the files of ``out`` that no build puts into a dataset; litter of operating systems is none of them."""
    others = (path for path in files_below(out) if not _OURS.fullmatch(_name_in(out, path)))
    return [path for path in others if not is_litter(path_below(path, out))]


def _name_in(out: Place, path: Place) -> str:
    """Return the path of a file relative to ``out``, of a temporary file the one that it would have got."""
    return str(path_below(path, out).with_name(whole_name(path.name)))


def check_existing(out: Place, folder: BuildFolder, state: State, listing: Listing, *, published: State) -> bool:
    """Return whether ``out`` already is the dataset that this build would make.

    ``published`` is what its root would say of the ``state``: see ``pseudonyms.published_state``.

    Raises ``BuildError`` if it is another dataset, or an unfinished build of another one. A build without a plan can
    continue with any spec: the next run reuses the headers that it read, as far as they are still valid.
    """
    finished = (out / ROOT).exists()
    before = readable_state(folder) if finished else read_state(folder) if folder.state.exists() else None
    if finished:
        differences = _dataset_differences(out, folder, before, published, listing)
    elif before is None or before.plan is None:
        return False
    else:
        differences = _spec_differences(before.spec.model_dump(mode="json"), state.spec)
        differences += _input_differences(folder, before.sources, before.labels, state, listing)
        differences += _differences(before.versions, state.versions)
    if differences:
        what = "was built" if finished else "is an unfinished build"
        raise BuildError(
            f"{out} {what} with other settings or sources: {'; '.join(differences)}. Build into another folder, or "
            "replace this one with --overwrite."
        )
    return finished


def _dataset_differences(
    out: Place, folder: BuildFolder, before: State | None, state: State, listing: Listing
) -> list[str]:
    """Return how the finished dataset at ``out`` differs from the one that a build with ``state`` would make."""
    dataset = open_dataset(out)
    if before is not None and not before.belongs_to(dataset.digest):
        raise BuildError(
            f"The working folder {folder.path} belongs to another dataset than {out}. Name the right one with "
            "--build-dir, remove this one, or replace the dataset with --overwrite."
        )
    if dataset.root.generation > 1:
        commands = ", ".join(dict.fromkeys(event.command for event in dataset.root.history[1:]))
        return [f"it is generation {dataset.root.generation}, changed since it was built ({commands})"]
    recorded = {
        "orientation": AS_STORED,
        "identifiers": "keep",
        **dataset.attributes["spec"],
        "classes": list(dataset.classes),
    }
    if recorded["identifiers"] != state.spec.identifiers:  # then nothing else is comparable
        return [f"identifiers was {recorded['identifiers']}, now {state.spec.identifiers}"]
    differences = _spec_differences(recorded, state.spec)
    sources = dataset.root.history[-1].digests.get("sources") if dataset.root.history else None
    return differences + _input_differences(folder, sources, dataset.root.labels_digest, state, listing)


def _input_differences(
    folder: BuildFolder, sources: str | None, labels: str, state: State, listing: Listing
) -> list[str]:
    differences = [] if sources == state.sources else [_listing_difference(folder, listing)]
    return differences if labels == state.labels else [*differences, "the labels have changed"]


def _spec_differences(before: Mapping[str, object], spec: Spec) -> list[str]:
    now = spec.model_dump(mode="json")
    return _differences(before, now)


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    names = {**now, **before}
    return [
        f"{name} was {_shown(before.get(name))}, now {_shown(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _shown(value: object) -> str:
    """Return a value of a spec or a version as a user would write it: windows as name=center/width."""
    if isinstance(value, list):
        return ",".join(map(_shown, value))
    if isinstance(value, dict) and value.keys() == {"name", "center", "width"}:
        return f"{value['name']}={value['center']:g}/{value['width']:g}"
    return str(value)


def _listing_difference(folder: BuildFolder, listing: Listing) -> str:
    """Return in words how the sources differ from those that were listed; less exact if the working folder is gone."""
    try:
        table = read_sealed(folder.files)
    except (OSError, CorruptionError):
        return f"the source files have changed (which ones is known only with the working folder {folder.path})"
    before, now = _sizes_and_reasons(table), _sizes_and_reasons(listing.files)
    both = sorted(now.keys() & before.keys())
    added, removed = sorted(now.keys() - before.keys()), sorted(before.keys() - now.keys())
    resized = [path for path in both if now[path][0] != before[path][0]]
    others = [path for path in both if now[path][1] != before[path][1]]
    damaged = f", {len(others):,} damaged in one of the archives only" if others else ""
    example = shown((added or removed or resized or others)[0])
    return (
        f"of {count(len(before), 'source file')} {len(removed):,} gone, {len(resized):,} of another size, {len(added):,} "
        f"new{damaged} (for example {example})"
    )


def _sizes_and_reasons(files: pa.Table) -> dict[bytes, tuple[int, str | None]]:
    columns = (files[name].to_pylist() for name in ("path", "size", "reason"))
    return {path: (size, reason) for path, size, reason in zip(*columns, strict=True)}


def invalidate(out: Place, folder: BuildFolder) -> None:
    """Invalidate the dataset: remove the files that make it readable, so that a crash cannot leave a half-replaced one."""
    for path in (out / ROOT, folder.state):
        if path.parent.is_dir():
            path.unlink(missing_ok=True)
            sync_folder(path.parent)


def reset(out: Place, folder: BuildFolder) -> None:
    """Remove what an earlier build left, but for the lock that this one holds; make the folders of a new build.

    Only files that a build makes are removed, but not the key of pseudonyms: it cannot be made again.
    """
    remove_files(path for path in own_files(out) if whole_name(path.name) != LEASE)  # held by this process
    for name in (IMAGES, LABELS):
        _remove_empty_folders(out / name)
    reset_folder(folder)
    (out / IMAGES / "c").mkdir(parents=True, exist_ok=True)


def reset_folder(folder: BuildFolder) -> None:
    """Empty the working ``folder`` of what builds put there, but for the lock; make its folders."""
    remove_files(path for path in folder.own_files() if path != folder.key and not folder.is_lock(path))
    for path in (folder.scan, folder.done):
        path.mkdir(parents=True, exist_ok=True)


def _remove_empty_folders(folder: Place) -> None:
    if isinstance(folder, BucketPath):
        return
    for path in sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
        with contextlib.suppress(OSError):  # it holds something else
            path.rmdir()


def clean(out: Place, folder: BuildFolder, *, forget_key: bool = False) -> int:
    """Remove the working folder of the finished dataset ``out``; return how many bytes that freed.

    The key of pseudonyms stays, in the folder, unless ``forget_key``.

    Raises ``DatasetError`` where the dataset is not finished, ``UsageError`` where the folder holds other files,
    ``BuildError`` where it belongs to another dataset or a process is building.
    """
    dataset = open_dataset(out)
    if not folder.path.is_dir():
        return 0
    unknown = folder.unknown_files()
    if folder.own_files() == [folder.key] and not unknown:
        if not forget_key:
            return 0
        if not is_key_of(folder.key, dataset.root):
            raise BuildError(f"{folder.key} is not the key of the pseudonyms in {out}; nothing was removed.")
    elif unknown or not folder.state.exists():
        found = f"it contains {path_below(unknown[0], folder.path)}" if unknown else "it has no state.json"
        raise UsageError(f"{folder.path} is not the working folder of a build ({found}); nothing was removed.")
    elif not read_state(folder).belongs_to(dataset.digest):
        raise BuildError(
            f"The working folder {folder.path} belongs to another dataset than {out}, or to a build that is not "
            "finished; nothing was removed."
        )
    with build_lock(folder):
        files = [*(path for path in folder.own_files() if forget_key or path != folder.key), *folder.litter()]
        freed = sum(size_of(path) or 0 for path in files)
        remove_files(path for path in files if path != folder.state)
        remove_files([folder.state])  # last: until then the command can be repeated
    inside = (folder.append.scan, folder.append.done, folder.append.path)
    for path in (*inside, folder.scan, folder.done, folder.parts, folder.path):
        with contextlib.suppress(OSError):  # a link to a folder stays
            path.rmdir()
    return freed


@contextmanager
def build_lock(folder: BuildFolder) -> Iterator[None]:
    """Hold the build's lock; raises ``BuildError`` if another process does, or writes a part of the shards."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.lock.touch()
    for path in (
        folder.path,
        folder.path.parent,
    ):  # after a power cut, shards without a working folder could not resume
        sync_folder(path)
    with _lock_explained(f"with the working folder {folder.path}", folder.lock, folder.lease):
        refuse_parts(folder)
        yield


@contextmanager
def output_lock(out: Place, *, say: Callable[[str], None] = _SILENT) -> Iterator[None]:
    """Hold a lock on the folder ``out`` itself; raises ``BuildError`` where a build with another working folder does.

    ``say`` tells the user what the file system cannot do.
    """
    out.mkdir(parents=True, exist_ok=True)
    note = note_on_sync(out)
    if note:
        say(note)
    with _lock_explained(f"{out}, with another working folder", out, out / LEASE, say):
        yield


@contextmanager
def _lock_explained(what: str, target: Place, lease: Place, say: Callable[[str], None] = _SILENT) -> Iterator[None]:
    try:
        with locked(target, lease, say=say):
            yield
    except HeldError as error:
        raise BuildError(
            f"Another process {error}is building or changing {what}. Wait for it, or stop it, then run this command again."
        ) from None


@contextmanager
def os_errors_explained(out: Place) -> Iterator[None]:
    """Turn an error of the operating system during a build of ``out`` into a ``BuildError`` that says what to do."""
    try:
        yield
    except OSError as error:
        raise BuildError(
            f"Building {out} failed: {describe_os_error(error)}. Finished work is kept: free space or fix the cause, "
            "then run the same command again without --overwrite."
        ) from error
