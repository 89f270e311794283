"""A lease that is an object of a bucket: written and broken on conditions that the store checks.

Ages are differences between two times of the store, so clocks of hosts need not agree.
"""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from dataclasses import dataclass

from ich_prep.dataset.bucket_path import BucketPath
from ich_prep.dataset.lease_owner import STALE_SECONDS, Owner, owner_in
from ich_prep.dataset.store_answers import ConditionError
from ich_prep.dataset.stores import Meta
from ich_prep.errors import BuildError

_PAUSE = 0.05  # seconds: another process breaks the lease at the same moment


@dataclass(frozen=True)
class BucketLease:
    """The lease at ``place``; see ``lease_owner.Lease``.

    In a store without conditions it is written as well, and keeps others away only if they do not begin at one moment.
    """

    place: BucketPath

    def __str__(self) -> str:
        return str(self.place)

    def create(self, owner: Owner) -> None:
        """Write the object where there is none; raises ``FileExistsError``."""
        if not self.place.atomic and self.place.is_file():
            raise FileExistsError(f"{self.place} exists")
        self.place.create(owner.text())

    def owner(self) -> Owner | None:
        """Return the owner that the object names, None where there is no object or it is not whole."""
        try:
            return owner_in(self.place.read_bytes())
        except FileNotFoundError:
            return None

    def may_be_broken(self) -> bool:
        """Return whether the owner is certainly gone, or has released the lease."""
        return self._breakable() is not None

    def break_for(self, owner: Owner) -> None:
        """Make the lease that of ``owner`` if it still may be broken: of two that try, the store lets one."""
        meta = self._breakable()
        with suppress(ConditionError):
            if meta is not None:
                self._replace(owner, meta)
        time.sleep(_PAUSE)

    def refresh(self, owner: Owner) -> bool:
        """Write the object again, so that its time is that of now; return false where another owner has it."""
        meta = self.place.meta()
        if meta is None or self.owner() != owner:
            return False
        with suppress(ConditionError):  # the next refresh sees who was faster
            self._replace(owner, meta)
        return True

    def remove(self) -> None:
        """Remove the object."""
        self.place.unlink(missing_ok=True)

    def _replace(self, owner: Owner, meta: Meta) -> None:
        self.place.store.put(self.place.key, owner.text(), if_match=meta if self.place.atomic else None)

    def _breakable(self) -> Meta | None:
        """Return which object the lease is if its owner is gone, else None."""
        meta = self.place.meta()
        if meta is None:
            return None
        owner = self.owner()
        if owner is not None and owner.is_gone():
            return meta
        return meta if self._now() - meta.modified > STALE_SECONDS else None

    def _now(self) -> float:
        """Return the time of the store: that of an object which it has just written."""
        probe = _beside(self.place)
        try:
            probe.write_bytes(b"\n")
            return probe.store.head(probe.key).modified
        finally:
            probe.unlink(missing_ok=True)


def require_conditions(place: BucketPath) -> None:
    """Raise ``BuildError`` where the store of ``place`` ignores conditions on writes, unless the user knows that."""
    if not place.atomic or place.store.honours_conditions(_beside(place).key):
        return
    raise BuildError(
        f"The store of {place.parent} ignores conditions on writes, so two builds of one dataset could overwrite each "
        "other. If you are certain that only one runs, add --no-atomic; else use another store."
    )


def _beside(place: BucketPath) -> BucketPath:
    return place.with_name(f".{place.name}.{uuid.uuid4().hex}")  # named like the temporary files of a folder
