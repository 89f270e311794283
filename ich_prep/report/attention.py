"""What the reader of a report must know first: what was lost, what may be wrong, and what is in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ich_prep.errors import Reason, count
from ich_prep.html import Point
from ich_prep.report.advice import FLAGS, REASONS, UNKNOWN, Advice

if TYPE_CHECKING:
    from ich_prep.dataset.schema import LostLabels
    from ich_prep.report.equal_images import EqualImages
    from ich_prep.report.labels import ClassCounts, Part
    from ich_prep.report.tables import ReportTables

LEVELS = ("act", "check", "fine")
MAX_FLAGS = 6  # named one by one; the table below has them all
# A fold whose share of positive slices differs from that of all folds by this factor is named.
UNEVEN = 2.0
MIN_POSITIVE = 50  # slices of a class that a fold must be expected to have before it is called uneven


def advice_of_reason(reason: str) -> Advice:
    """Return the advice for a reason, also for a word of a later version."""
    return REASONS[Reason(reason)] if reason in set(Reason) else UNKNOWN


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
    if not any(point.level == "act" for point in found):
        found.insert(0, Point("fine", "Nothing was lost to damage, and no label to a rule of the build."))
    return found


def _lost(lost: Mapping[str, LostLabels]) -> Iterator[Point]:
    for reason, loss in lost.items():
        filtered = reason in set(Reason) and Reason(reason).is_filter
        level = "fine" if filtered else "act" if loss.positive else "check"
        yield Point(
            level,
            f"{count(loss.labels, 'label')} lost with {reason}, {loss.positive:,} positive",
            advice_of_reason(reason).todo,
            "quarantine",
        )


def _damage(reasons: Mapping[str, int]) -> Iterator[Point]:
    for level in ("act", "check"):
        chosen = {reason: number for reason, number in reasons.items() if advice_of_reason(reason).level == level}
        if chosen:
            words = ", ".join(f"{number:,} {reason}" for reason, number in chosen.items())
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
        yield Point("check", f"No positive slice of {', '.join(never[:8])}", "These classes cannot be learned.", "labels")
    coarse = {"series", "study", "patient"}.intersection(tables.slices["label_level"].unique().to_pylist())
    if coarse:
        yield Point(
            "check",
            f"Labels of a whole {' or '.join(sorted(coarse))} were copied to its slices",
            "Read results by series: a slice of a positive series need not show the bleed.",
            "labels",
        )


def _uneven(classes: Sequence[ClassCounts], folds: Sequence[Part]) -> Iterator[Point]:
    """Yield the classes that a fold lacks, or has far more or less often than the others."""
    parts = [part for part in folds if part.labelled]
    total = sum(part.labelled for part in parts)
    for k, entry in enumerate(classes):
        positive = sum(part.positives[k] for part in parts)
        lacking = [part.name for part in parts if not part.positives[k]]
        uneven = [
            part.name
            for part in parts
            if (expected := positive * part.labelled / max(total, 1)) >= MIN_POSITIVE
            and not expected / UNEVEN <= part.positives[k] <= expected * UNEVEN
        ]
        if positive and lacking:
            yield Point(
                "check",
                f"No positive slice of {entry.name} in {', '.join(lacking[:5])}",
                "Nothing can be measured of it there: use fewer --folds, or evaluate on other folds.",
                "labels",
            )
        elif uneven:
            yield Point(
                "check",
                f"Uneven share of {entry.name} in {', '.join(uneven[:5])}",
                "Few patients, or one large fold group, hold most of them: compare results across folds with care.",
                "labels",
            )


def _flagged(tables: ReportTables) -> Iterator[Point]:
    rows = {name: len(found) for name, found in tables.rows_by_flag.items()}
    for level in ("act", "check"):
        chosen = [name for name in rows if FLAGS.get(name, UNKNOWN).level == level]
        for name in chosen[:MAX_FLAGS]:
            advice = FLAGS.get(name, UNKNOWN)
            yield Point(
                level, f"{count(rows[name], 'slice')} flagged {name}", f"{advice.what} {advice.todo}", "flags"
            )
        if more := chosen[MAX_FLAGS:]:
            yield Point(level, f"{count(len(more), 'more flag')}", f"{', '.join(more)}.", "flags")
