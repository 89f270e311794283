"""Make a further generation of a finished dataset visible: new tables under new names, then the root, in one write.

The files of the previous generation are not touched, so readers that have it open are not affected.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import IMAGES, LABELS, ROOT, TABLES, digest_of, table_name
from ich_prep.dataset.storage import clear_leftovers, files_below, local_path, sync_folder, whole_name, write_whole
from ich_prep.dataset.tables import write_table
from ich_prep.errors import BuildError, describe_os_error
from ich_prep.stages.output import build_lock, output_lock
from ich_prep.stages.publish import images_document, root_document, sha256
from ich_prep.stages.state import BuildFolder, build_folder, has_append, readable_state, write_state
from ich_prep.versions import PACKAGE, all_versions

if TYPE_CHECKING:
    import pyarrow as pa

    from ich_prep.dataset.dataset import Dataset

_TABLE = re.compile(rf"({'|'.join(TABLES)})(?:\.([1-9][0-9]*))?\.parquet")


@dataclass(frozen=True)
class Change:
    """What a command changes in a dataset; what it does not name stays as it is.

    ``tables``: by name, whole. ``counts``: those of the root that change; ``done``: what the history says besides them,
    such as the number of slices that were withdrawn. ``digests``: of the command's inputs, for the history. ``keys``:
    others of the root.
    """

    command: str
    tables: Mapping[str, pa.Table]
    done: Mapping[str, int]
    counts: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str | None] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def changing(path: str | Path, build_dir: str | Path | None = None) -> Iterator[tuple[Dataset, BuildFolder]]:
    """Yield the dataset at ``path`` and the place of its working folder, which no other process changes meanwhile.

    The folder need not exist, or may be that of another dataset. Raises ``BuildError`` if another process builds or
    changes the dataset, and for an error of the operating system.
    """
    out = local_path(path, "The dataset").absolute()
    open_dataset(out)  # before its folder is locked, and made where there is none
    folder = build_folder(out, build_dir)
    try:
        with ExitStack() as stack:
            stack.enter_context(output_lock(out))
            dataset = open_dataset(out)
            state = readable_state(folder)
            if state is not None and state.belongs_to(dataset.digest):
                stack.enter_context(build_lock(folder))
            yield dataset, folder
    except OSError as error:
        raise BuildError(
            f"Changing {out} failed: {describe_os_error(error)}. The dataset is as it was, or as the command leaves it: "
            "fix the cause, then run the same command again."
        ) from error


def publish_generation(dataset: Dataset, folder: BuildFolder, change: Change) -> int:
    """Write the next generation of ``dataset``, the root last; return its number.

    The working ``folder``, if it belongs to the dataset, records the digest of the new generation just before that.
    """
    out, number = dataset.folder, dataset.root.generation + 1
    names = dict(dataset.attributes["tables"])
    digests = dict(dataset.attributes["digests"])
    for table, lines in change.tables.items():
        digests.pop(names[table], None)
        names[table] = table_name(table, number)
        clear_leftovers(out / names[table])
        write_table(out / names[table], lines)
        digests[names[table]] = sha256((out / names[table]).read_bytes())
    sync_folder(out / LABELS)
    counts = {**dataset.attributes["counts"], **change.counts}
    if counts["rows"] != len(dataset):
        digests[f"{IMAGES}/{ROOT}"] = _grow_images(out, counts["rows"])
    clear_leftovers(out / ROOT)
    key = dataset.root.pseudonym_key
    event = {
        "command": change.command,
        "generation": number,
        "counts": {**counts, **change.done},
        "digests": {"before": dataset.digest, **change.digests, **({} if key is None else {"key": key})},
    }
    ich = {
        **dataset.attributes,
        **change.keys,
        "counts": counts,
        "tables": names,
        "digests": digests,
        "generation": number,
        "history": [*dataset.attributes.get("history", ()), event],
        "created_by": f"ich-prep {all_versions()[PACKAGE]}",
    }
    ich["digest"] = digest_of(ich)
    state = readable_state(folder)
    if state is not None and state.belongs_to(dataset.digest):
        write_state(folder, state.model_copy(update={"published": ich["digest"], "before": dataset.digest}))
        sync_folder(folder.path)
    write_whole(out / ROOT, root_document(out, ich))
    sync_folder(out)
    return number


def _grow_images(out: Path, rows: int) -> str:
    """Make the array of images that long, before any root says so; return the digest of its metadata."""
    path = out / IMAGES / ROOT
    clear_leftovers(path)
    data = images_document(path.read_bytes(), rows)
    write_whole(path, data)
    sync_folder(path.parent)
    return sha256(data)


def joined_digest(*digests: str) -> str:
    """Return one digest of several, in their order."""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def generation_of(path: PurePath) -> int | None:
    """Return the generation of the table at ``path``, also of one that was not written whole; None for another file."""
    match = _TABLE.fullmatch(whole_name(path.name))
    return None if match is None else int(match[2] or 1)


def old_tables(dataset: Dataset) -> list[Path]:
    """Return the tables in the dataset's folder that are not those of its generation.

    They are of earlier generations, or of one that was never published.
    """
    named = {dataset.table_path(table) for table in TABLES}
    found = sorted((dataset.folder / LABELS).iterdir())
    return [path for path in found if path not in named and generation_of(path) is not None]


def is_new_shard(dataset: Dataset, name: PurePath) -> bool:
    """Return whether ``name``, relative to the dataset, is where an append writes a shard: behind those of ``dataset``."""
    parts = name.with_name(whole_name(name.name)).parts
    inside = len(parts) == 6 and parts[:2] == (IMAGES, "c") and parts[3:] == ("0", "0", "0")
    return inside and parts[2].isdigit() and int(parts[2]) >= dataset.counts.shards


def clean_generations(path: str | Path, build_dir: str | Path | None = None) -> tuple[int, int]:
    """Remove the tables of earlier generations, and what commands that did not finish left; return files and bytes.

    What a later run of an unfinished append can use stays. Raises as ``changing``.
    """
    with changing(path, build_dir) as (dataset, folder):
        out, images = dataset.folder, dataset.folder / IMAGES / ROOT
        unused = old_tables(dataset)
        if not has_append(folder, dataset.digest):
            unused += [file for file in files_below(out / IMAGES / "c") if is_new_shard(dataset, file.relative_to(out))]
            if json.loads(images.read_bytes())["shape"][0] > len(dataset):
                write_whole(images, images_document(images.read_bytes(), len(dataset)))
        freed = sum(file.stat().st_size for file in unused)
        for file in unused:
            file.unlink()
            for parent in file.parents[:3]:
                with contextlib.suppress(OSError):  # it holds something else
                    parent.rmdir()
        return len(unused), freed
