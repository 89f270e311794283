"""The output folder of a build: may it be used, and does it contain this dataset, another one, or an unfinished build?

Anything that is neither a dataset nor a build of this project is left untouched.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import IMAGES, LABELS, ROOT
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.storage import remove_tree, sync_folder
from ich_prep.dataset.tables import read_parquet
from ich_prep.errors import BuildError, UsageError, describe_os_error
from ich_prep.sources import Listing, shown
from ich_prep.stages.state import BuildFolder, State, read_state


def check_output_folder(out: Path, folder: BuildFolder, sources: Sequence[Path]) -> None:
    """Raise ``UsageError`` unless a build may write to ``out`` and to its working ``folder``.

    They must lie outside of the ``sources``, and each must be new, empty, or made by a build.
    """
    for path, option in ((out, "--out"), (folder.path, "--build-dir")):
        for source in sources:
            if source.resolve() in (path.resolve(), *path.resolve().parents):
                raise UsageError(
                    f"{option} {path} lies inside the source {source}: its files would become sources of the next "
                    "build. Give another folder."
                )
    if out == folder.path:
        raise UsageError(f"--build-dir must not be the dataset itself: {out}. Give another folder.")
    unknown = folder.unknown_files()
    if unknown or (folder.path.exists() and not folder.path.is_dir()):
        reason = f"it contains {unknown[0].name}" if unknown else "it is a file"
        raise UsageError(
            f"The working folder {folder.path} was not made by ich-prep ({reason}), and was left untouched. Name another "
            "one with --build-dir."
        )
    if not out.exists() or (out.is_dir() and all(path.is_dir() for path in out.rglob("*"))):
        return
    if (out / ROOT).exists():
        open_dataset(out)  # raises for another Zarr store
        return
    started = folder.state.exists() or folder.lock.exists()
    if started and out.is_dir() and all(p.name in (IMAGES, LABELS) or p.name.startswith(".") for p in out.iterdir()):
        return
    raise UsageError(
        f"--out must be a new folder, a dataset or an unfinished build (with its working folder {folder.path}); {out} "
        "is something else and was left untouched. Give another folder, or remove it."
    )


def check_existing(out: Path, folder: BuildFolder, state: State, listing: Listing) -> bool:
    """Return whether ``out`` already is the dataset that this build would make.

    Raises ``BuildError`` if it is another dataset, or an unfinished build of another one. A build without a plan can
    continue with any spec: the next run reuses the headers that it read, as far as they are still valid.
    """
    finished = (out / ROOT).exists()
    before = read_state(folder) if folder.state.exists() else None
    if finished:
        differences = _dataset_differences(out, folder, before, state, listing)
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
    out: Path, folder: BuildFolder, before: State | None, state: State, listing: Listing
) -> list[str]:
    """Return how the finished dataset at ``out`` differs from the one that a build with ``state`` would make."""
    dataset = open_dataset(out)
    if before is not None and before.published != dataset.digest:
        raise BuildError(
            f"The working folder {folder.path} belongs to another dataset than {out}. Name the right one with "
            "--build-dir, remove this one, or replace the dataset with --overwrite."
        )
    recorded = {**dataset.attributes["spec"], "classes": list(dataset.classes)}
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
    if not folder.files.exists():
        return f"the source files have changed (which ones is known only with the working folder {folder.path})"
    table = read_parquet(folder.files)
    before, now = _sizes_and_reasons(table), _sizes_and_reasons(listing.files)
    both = sorted(now.keys() & before.keys())
    added, removed = sorted(now.keys() - before.keys()), sorted(before.keys() - now.keys())
    resized = [path for path in both if now[path][0] != before[path][0]]
    others = [path for path in both if now[path][1] != before[path][1]]
    damaged = f", {len(others)} are damaged in one of the archives only" if others else ""
    example = shown((added or removed or resized or others)[0])
    return (
        f"of the {len(before)} source files {len(removed)} are gone, {len(resized)} have another size and {len(added)} "
        f"are new{damaged} (for example {example})"
    )


def _sizes_and_reasons(files: pa.Table) -> dict[bytes, tuple[int, str | None]]:
    columns = (files[name].to_pylist() for name in ("path", "size", "reason"))
    return {path: (size, reason) for path, size, reason in zip(*columns, strict=True)}


def invalidate(out: Path, folder: BuildFolder) -> None:
    """Invalidate the dataset: remove the files that make it readable, so that a crash cannot leave a half-replaced one."""
    for path in (out / ROOT, folder.state):
        if path.parent.is_dir():
            path.unlink(missing_ok=True)
            sync_folder(path.parent)


def reset(out: Path, folder: BuildFolder) -> None:
    """Remove what an earlier build left, except the lock, which this build holds; make the folders of a new build."""
    for path in (out / IMAGES, out / LABELS):
        remove_tree(path)
    for path in folder.path.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != folder.lock:
            path.unlink(missing_ok=True)
    for path in (folder.scan, folder.done, out / IMAGES / "c"):
        path.mkdir(parents=True)


def clean(out: Path, folder: BuildFolder) -> int:
    """Remove the working folder of the finished dataset ``out``; return how many bytes that freed.

    Raises ``DatasetError`` if the dataset is not finished, ``UsageError`` if the folder contains other files,
    ``BuildError`` if it belongs to another dataset or a process is building.
    """
    dataset = open_dataset(out)
    if not folder.path.is_dir():
        return 0
    unknown = folder.unknown_files()
    if unknown or not folder.state.exists():
        reason = f"found {unknown[0].name}" if unknown else "found no state.json"
        raise UsageError(f"{folder.path} is not the working folder of a build ({reason}); nothing was removed.")
    if read_state(folder).published != dataset.digest:
        raise BuildError(
            f"The working folder {folder.path} belongs to another dataset than {out}, or to a build that is not "
            "finished; nothing was removed."
        )
    with build_lock(folder):
        freed = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
        folder.state.unlink()  # first: a half-removed folder must not look complete
        shutil.rmtree(folder.path)
    return freed


@contextmanager
def build_lock(folder: BuildFolder) -> Iterator[None]:
    """Hold the build's lock; raises ``BuildError`` if another process does."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(
                f"Another process is building with the working folder {folder.path}. Wait for it, or stop it, then run "
                "this command again."
            ) from None
        yield


@contextmanager
def os_errors_explained(out: Path) -> Iterator[None]:
    """Turn an error of the operating system during a build of ``out`` into a ``BuildError`` that says what to do."""
    try:
        yield
    except OSError as error:
        raise BuildError(
            f"Building {out} failed: {describe_os_error(error)}. Finished work is kept: free space or fix the cause, "
            "then run the same command again without --overwrite."
        ) from error
