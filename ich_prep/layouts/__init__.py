"""Where a dataset keeps its slices and labels: one module a layout, each with the functions of ``Layout``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ich_prep.layouts import cq500, folder, rsna
from ich_prep.layouts.placement import Placement

if TYPE_CHECKING:
    import pyarrow as pa

    from ich_prep.labels import Labels
    from ich_prep.sources import Listing, TableFile


class Layout(Protocol):
    """What a layout knows. Its functions take values and open nothing but label files."""

    def recognise(self, listing: Listing) -> str | None:
        """Return why the tree is of this layout, or None."""

    def read_labels(self, listing: Listing, given: TableFile | None, *, allow_contradictions: bool) -> Labels:
        """Return the labels found in the tree, or in the file ``given``; raises ``SourceError``."""

    def place(self, slices: pa.Table, root: str) -> Placement:
        """Return what the layout says of each file (a line of ``scan.SCHEMA``, most of it null where no header was read).

        ``root`` is the name of the source, to which the paths are relative.
        """


LAYOUTS: Mapping[str, Layout] = {"rsna": rsna, "cq500": cq500, "folder": folder}


@dataclass(frozen=True)
class Recognised:
    """A layout's name, and why it was taken."""

    name: str
    why: str


def recognise(listing: Listing) -> Recognised:
    """Return the first layout that recognises the tree; ``folder`` recognises any."""
    for name, layout in LAYOUTS.items():
        why = layout.recognise(listing)
        if why is not None:
            return Recognised(name, why)
    raise AssertionError("the layout 'folder' recognises any tree")
