"""How published data sets arrange slices and labels: one module per layout, each with the functions of ``Layout``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from ich_prep.dataset.classes import is_rsna
from ich_prep.dataset.schema import RESERVED_COLUMNS
from ich_prep.errors import UsageError
from ich_prep.layouts import cq500, folder, rsna
from ich_prep.layouts.assignment import Assignment
from ich_prep.layouts.labels import DEFAULT_RULES, LabelRules
from ich_prep.recipe import refuse_unknown

if TYPE_CHECKING:
    import pyarrow as pa

    from ich_prep.dataset.spec import Spec
    from ich_prep.layouts.labels import LabelTable
    from ich_prep.progress import Progress
    from ich_prep.sources import Listing, TableFile


class Layout(Protocol):
    """The interface of a layout. Its functions open no files but label files."""

    def recognise(self, listing: Listing) -> str | None:
        """Return why the tree has this layout, or None."""

    def read_labels(self, listing: Listing, given: TableFile | None, rules: LabelRules = DEFAULT_RULES) -> LabelTable:
        """Return the labels found in the tree, or in the file ``given``; raises ``SourceError``.

        A tree without a label file has no labels if the rules allow it; otherwise it is an error in layouts that need one.
        """

    def assign(self, slices: pa.Table, root: str) -> Assignment:
        """Return the assignment of each file (a line of ``scan.SCHEMA``, mostly null if no header was read).

        ``root`` is the name of the source; paths are relative to it.
        """


LAYOUTS: Mapping[str, Layout] = {"rsna": rsna, "cq500": cq500, "folder": folder}
AUTO = "auto"


def check_layout(spec: Spec) -> None:
    """Raise ``UsageError`` for an unknown layout, a class that is the name of a column, or other classes than RSNA's in a
    layout that has those.
    """
    refuse_unknown([spec.layout], [AUTO, *LAYOUTS], where="layout")
    for name in RESERVED_COLUMNS.intersection(spec.classes):
        raise UsageError(f"--classes: {name!r} is the name of another column. Choose another name for the class.")
    if spec.layout not in (AUTO, "folder") and not is_rsna(spec.classes):
        raise UsageError(
            f"The layout {spec.layout} has RSNA's six classes; --classes {','.join(spec.classes)} needs --layout folder."
        )


def choose_layout(spec: Spec, listing: Listing, progress: Progress) -> tuple[Layout, Spec]:
    """Return the layout of ``spec`` and the spec that names it; for ``auto`` the first that recognises the tree.

    Raises ``UsageError`` as ``check_layout`` does.
    """
    if spec.layout == AUTO:
        name, why = recognise(listing)
        progress.say(f"Layout: {name}, because {why}.")
        spec = spec.model_copy(update={"layout": name})
        check_layout(spec)
    return LAYOUTS[spec.layout], spec


def recognise(listing: Listing) -> tuple[str, str]:
    """Return the first layout that recognises the tree, and why; ``folder`` recognises any."""
    for name, layout in LAYOUTS.items():
        why = layout.recognise(listing)
        if why is not None:
            return name, why
    raise AssertionError("the layout 'folder' recognises any tree")
