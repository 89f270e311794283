"""The key of a dataset's pseudonyms: a file that the user keeps, or one in the working folder that is made once."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ich_prep.dataset.bucket_path import BucketPath, Place
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.schema import ROOT
from ich_prep.dataset.storage import clear_leftovers, renamed_when_whole, sync_folder
from ich_prep.errors import BuildError, UsageError, describe_os_error
from ich_prep.stages.pseudonyms import key_id
from ich_prep.stages.state import readable_state

if TYPE_CHECKING:
    from ich_prep.dataset.schema import Root
    from ich_prep.dataset.spec import Spec
    from ich_prep.stages.state import BuildFolder

KEY_BYTES: Final = 32  # as many as SHA-256 returns (RFC 2104, section 3)
LARGEST_KEY: Final = 4096


def key_of_build(
    out: Place, folder: BuildFolder, given: Path | None, spec: Spec, *, overwrite: bool, say: Callable[[str], None]
) -> bytes | None:
    """Return the key of a build's pseudonyms; None if it publishes identifiers, or if its key is not made yet.

    Raises what ``find_key`` does, and ``UsageError`` for a key without use, or one that would lie in a bucket. ``say`` tells
    the user what is doubtful.
    """
    if spec.identifiers == "keep":
        if given is not None:
            raise UsageError("--key is for pseudonyms: add --identifiers pseudonymise, or leave it out.")
        return None
    if given is None and isinstance(folder.key, BucketPath):
        raise UsageError(
            f"The key of the pseudonyms would lie in the bucket, in {folder.path}. Make one on a disk with "
            f"`openssl rand -out FILE {KEY_BYTES}` and give it with --key."
        )
    before = readable_state(folder)
    recorded = None if before is None else before.key
    if (out / ROOT).exists() and not overwrite:
        recorded = open_dataset(out).root.pseudonym_key
    key = find_key(folder, given, recorded=None if overwrite else recorded)
    if recorded is not None and (key is None or key_id(key) != recorded):
        say("The pseudonyms will not be those of the dataset that is replaced: its key is another one.")
    path = given or folder.key
    if key is not None and isinstance(path, Path) and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        say(f"Others can read the key of the pseudonyms: `chmod 600 {path}`.")
    return key


def refuse_kept_columns(spec: Spec, names: Sequence[str], *, allowed: bool) -> None:
    """Raise ``UsageError`` if columns of the label table would be published beside pseudonyms and are not ``allowed``."""
    if spec.identifiers == "pseudonymise" and names and not allowed:
        raise UsageError(
            f"--keep-columns would publish {', '.join(names)} of the label table as they are, beside pseudonyms. Leave out "
            "what identifies anybody, then add --allow-kept-columns."
        )


def find_key(folder: BuildFolder, given: Path | None, *, recorded: str | None) -> bytes | None:
    """Return the key in the file ``given``, else the one in the working ``folder``; None if there is none yet.

    ``recorded`` is the ``key_id`` of the key that a dataset or an unfinished build has. Raises ``UsageError`` for a file
    that cannot be a key, ``BuildError`` if the key is not the recorded one: one patient would have two pseudonyms.
    """
    path: Place = given or folder.key
    key = _read(path) if given is not None or path.exists() else None
    if recorded is None or (key is not None and key_id(key) == recorded):
        return key
    found = f"there is no {folder.key}" if key is None else f"{path} is another key"
    raise BuildError(
        f"The key of the pseudonyms is missing: {found}. Name its file with --key; or build again with --overwrite, which "
        "gives other pseudonyms."
    )


def key_of_dataset(root: Root, folder: BuildFolder, given: Path | None, *, needed: bool) -> bytes | None:
    """Return the key of the pseudonyms of a finished dataset; None in one without pseudonyms.

    It is in the file ``given``, or in the working ``folder``. None too if it is in neither and not ``needed``. Raises what
    ``find_key`` does, and ``UsageError`` for a key without use.
    """
    recorded = root.pseudonym_key
    if recorded is None:
        if given is not None:
            raise UsageError("--key is for pseudonyms, which this dataset does not have: leave it out.")
        return None
    if not needed and given is None and not folder.key.exists():
        return None
    return find_key(folder, given, recorded=recorded)


def make_key(folder: BuildFolder) -> bytes:
    """Make a random key in the working ``folder``, readable by its owner only, and return it."""
    assert isinstance(folder.key, Path)  # ``key_of_build`` has refused buckets
    clear_leftovers(folder.key)
    key = os.urandom(KEY_BYTES)
    with renamed_when_whole(folder.key) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(descriptor)
    sync_folder(folder.path)
    return key


def is_key_of(path: Place, root: Root) -> bool:
    """Return whether the key at ``path`` made the pseudonyms of the dataset with this ``root``."""
    return key_id(_read(path)) == root.pseudonym_key


def _read(path: Place) -> bytes:
    try:
        with path.reader() if isinstance(path, BucketPath) else path.open("rb") as file:
            key = file.read(LARGEST_KEY + 1)
    except OSError as error:
        raise UsageError(f"Cannot read the key of the pseudonyms: {describe_os_error(error)}.") from None
    if not KEY_BYTES <= len(key) <= LARGEST_KEY:
        raise UsageError(
            f"Expected a key of {KEY_BYTES} to {LARGEST_KEY} random bytes in {path}, found "
            f"{len(key) if len(key) <= LARGEST_KEY else 'more'}. Make one with `openssl rand -out FILE {KEY_BYTES}`, or "
            "leave out --key: then a key is made in the working folder."
        )
    return key
