"""How long each stage of a build took, from the log of its working folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ich_prep.events import read_events
from ich_prep.stages.state import readable_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ich_prep.dataset import Dataset
    from ich_prep.stages.state import BuildFolder

STAGES = ("list", "start workers", "scan", "plan", "keys", "estimate", "shards", "publish")


@dataclass(frozen=True)
class Timing:
    """The seconds of each stage in the last run of a build, and how many runs it took."""

    seconds: Mapping[str, float]
    runs: int


def build_timing(dataset: Dataset, folder: BuildFolder) -> Timing | None:
    """Return the timing of the build of ``dataset``; None if ``folder`` is not its own, or recorded none."""
    state = readable_state(folder)
    if state is None or state.published != dataset.digest:
        return None
    runs, found = 0, None
    for event in read_events(folder.log):
        runs += event.get("event") == "start"
        if event.get("event") == "published":
            found, runs = (event.get("seconds"), runs), 0
    if found is None or not isinstance(found[0], dict):
        return None
    seconds = {name: float(found[0][name]) for name in STAGES if isinstance(found[0].get(name), int | float)}
    return Timing(seconds, max(found[1], 1))
