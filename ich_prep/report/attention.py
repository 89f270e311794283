"""What the reader of a report must know first: what was lost, what may be wrong, and what is in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ich_prep.advice import FLAGS, UNKNOWN, advice_of_reason
from ich_prep.errors import Reason, count
from ich_prep.html import Point

if TYPE_CHECKING:
    from ich_prep.dataset.schema import LostLabels
    from ich_prep.report.equal_images import EqualImages
    from ich_prep.report.labels import ClassCounts, Part
    from ich_prep.report.tables import ReportTables

LEVELS = ("act", "check", "fine")
MAX_FLAGS = 6  # named one by one; the table below has them all
MAX_NAMES = 5
# A fold whose share of positive slices differs from that of all folds by this factor is named.
UNEVEN = 2.0
MIN_POSITIVE = 50  # slices of a class that a fold must be expected to have before it is called uneven


def points(
    tables: ReportTables,
    *,
    lost: Mapping[str, LostLabels],
    reasons: Mapping[str, int],
    equal: EqualImages,
    classes: Sequence[ClassCounts],
    folds: Sequence[Part],
) -> list[Point]:
    """Return the points, the most urgent first; ``reasons`` are the quarantined files by reason."""
    found = [
        *_lost(lost),
        *_damage(reasons),
        *_equal(equal),
        *_unlabelled(tables, classes, folds),
        *_uneven(classes, folds),
        *_flagged(tables),
    ]
    found.sort(key=lambda point: LEVELS.index(point.level))
    return found or [Point("fine", "Nothing", "Nothing was lost, and no slice has a flag that asks for a look.")]


def verdict(found: Sequence[Point]) -> str:
    """Return one sentence about the points: how many ask for action, how many for a look."""
    act, check = (sum(point.level == level for point in found) for level in ("act", "check"))
    parts = [f"{number} to {words}" for number, words in ((act, "act on"), (check, "look at")) if number]
    return f"{' and '.join(parts).capitalize()}." if parts else "No reason to worry was found."


def _lost(lost: Mapping[str, LostLabels]) -> Iterator[Point]:
    by_level: dict[str, dict[str, LostLabels]] = {}
    for reason, loss in lost.items():
        filtered = reason in set(Reason) and Reason(reason).is_filter
        level = "fine" if filtered else "act" if loss.positive else "check"
        by_level.setdefault(level, {})[reason] = loss
    for level, losses in by_level.items():
        labels, positive = (sum(getattr(loss, name) for loss in losses.values()) for name in ("labels", "positive"))
        said = f"{positive:,} of them positive" if positive else "none of them positive"
        reasons = _few([f"{loss.labels:,} {reason}" for reason, loss in losses.items()])
        ending = " by an option of the build" if level == "fine" else ""
        yield Point(level, f"{count(labels, 'label')} lost{ending}, {said}", f"{reasons}.", "quarantine")


def _damage(reasons: Mapping[str, int]) -> Iterator[Point]:
    for level in ("act", "check"):
        chosen = {reason: number for reason, number in reasons.items() if advice_of_reason(reason).level == level}
        if chosen:
            words = _few([f"{number:,} {reason}" for reason, number in chosen.items()])
            what = "quarantined and may be missed" if level == "act" else "quarantined by a rule that may be wrong here"
            yield Point(level, f"{count(sum(chosen.values()), 'file')} {what}", f"{words}.", "quarantine")


def _equal(equal: EqualImages) -> Iterator[Point]:
    if equal.conflicts:
        yield Point(
            "act",
            f"{count(len(equal.conflicts), 'image')} under different patients with conflicting labels",
            "Decide which label is right, or leave these rows out of evaluation.",
            "identity",
        )
    elif equal.under_patients:
        yield Point(
            "check",
            f"{count(equal.under_patients, 'image')} under several patients, with labels that agree",
            "Patients are counted twice. They share a fold unless the build said otherwise.",
            "identity",
        )


def _unlabelled(tables: ReportTables, classes: Sequence[ClassCounts], folds: Sequence[Part]) -> Iterator[Point]:
    train = [part for part in folds if part.name.startswith("train")]
    slices, labelled = (sum(getattr(part, name) for part in train) for name in ("slices", "labelled"))
    if slices and not labelled:
        yield Point("act", "No slice to train on has a label", "Give build a label table with --labels.", "labels")
    elif labelled < slices:
        yield Point(
            "check",
            f"{slices - labelled:,} of {count(slices, 'slice')} of the subset train have no label",
            "They are not trained on. Compare the label table with the files.",
            "labels",
        )
    never = [entry.name for entry in classes if not entry.positive]
    if labelled and never:
        yield Point("check", f"No positive slice of {_few(never)}", "These classes cannot be learned.", "labels")
    coarse = {"series", "study", "patient"}.intersection(tables.slices["label_level"].unique().to_pylist())
    if coarse:
        yield Point(
            "check",
            f"Labels of a whole {' or '.join(sorted(coarse))} were copied to its slices",
            "Read results by series: a slice of a positive series need not show the bleed.",
            "labels",
        )


def _uneven(classes: Sequence[ClassCounts], folds: Sequence[Part]) -> Iterator[Point]:
    """Yield the classes that a fold lacks, and those that it has far more or less often than the others."""
    parts = [part for part in folds if part.labelled]
    total = max(sum(part.labelled for part in parts), 1)
    lacking, uneven = [], []
    for k, entry in enumerate(classes):
        positive = sum(part.positives[k] for part in parts)
        for part in parts if positive else []:
            expected = positive * part.labelled / total
            if not part.positives[k]:
                lacking.append(f"{entry.name} in {part.name}")
            elif expected >= MIN_POSITIVE and not expected / UNEVEN <= part.positives[k] <= expected * UNEVEN:
                uneven.append(f"{entry.name} in {part.name}")
    if lacking:
        todo = "Nothing can be measured of it there: use fewer --folds, or evaluate on other folds."
        yield Point("check", f"No positive slice of {_few(lacking)}", todo, "labels")
    if uneven:
        todo = "Few patients, or one large fold group, hold most of them: compare results across folds with care."
        yield Point("check", f"Uneven share of {_few(uneven)}", todo, "labels")


def _few(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _flagged(tables: ReportTables) -> Iterator[Point]:
    rows = {name: len(found) for name, found in tables.rows_by_flag.items()}
    for level in ("act", "check"):
        chosen = [name for name in rows if FLAGS.get(name, UNKNOWN).level == level]
        for name in chosen[:MAX_FLAGS]:
            advice = FLAGS.get(name, UNKNOWN)
            yield Point(level, f"{count(rows[name], 'slice')} flagged {name}", f"{advice.what} {advice.todo}", "flags")
        if more := chosen[MAX_FLAGS:]:
            yield Point(level, f"{count(len(more), 'more flag')}", f"{', '.join(more)}.", "flags")
