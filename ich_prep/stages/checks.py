"""Whether a build may go on: how much is damaged, whether labels and slices match, and which labels were lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ich_prep.dataset.tables import write_table
from ich_prep.errors import CONVERT_FRAMES, BuildError, Reason, SourceError, count
from ich_prep.stages.losses import describe, losses_by_reason

if TYPE_CHECKING:
    from ich_prep.layouts.labels import LabelTable
    from ich_prep.progress import Progress
    from ich_prep.stages.plan import Plan
    from ich_prep.stages.state import BuildFolder


@dataclass(frozen=True)
class Allowances:
    """Problems that do not stop the build, and the largest share of damaged slices."""

    unlabelled: bool = False
    missing_images: bool = False
    contradictions: bool = False
    lost_labels: bool = False
    kept_columns: bool = False
    full_disk: bool = False
    max_quarantined: float = 0.01


def check_damage(quarantine: pa.Table, ok: int, allow: Allowances, hint: str) -> None:
    """Raise ``BuildError`` if more slices are damaged than allowed.

    The share is that of damaged files among all that are slices: the damaged, the ``ok`` rows, and what the user's
    filters removed. ``hint`` says where they are listed and how to continue.
    """
    reasons = Counter(Reason(reason) for reason in quarantine["reason"].to_pylist())
    damaged = Counter({reason: number for reason, number in reasons.items() if reason.is_damage})
    slices = damaged.total() + ok + sum(number for reason, number in reasons.items() if reason.is_filter)
    share = damaged.total() / max(1, slices)
    if share <= allow.max_quarantined:
        return
    reasons_text = ", ".join(f"{number} {reason}" for reason, number in damaged.most_common())
    lines = zip(*(quarantine[name].to_pylist() for name in ("reason", "path", "detail")), strict=True)
    path, detail = next((path, detail) for reason, path, detail in lines if reason == damaged.most_common(1)[0][0])
    raise BuildError(
        f"{damaged.total():,} of {count(slices, 'slice')} damaged ({share:.2%}; at most {allow.max_quarantined:.2%} are "
        f"allowed): {reasons_text}; for example {path}: {detail}. {hint}; or raise --max-quarantined if the source "
        "really is like that."
    )


def check_labels(
    plan: Plan, labels: LabelTable, folder: BuildFolder | None, allow: Allowances, progress: Progress
) -> None:
    """Raise ``SourceError`` if labels and slices do not match; list all in ``label_problems.parquet`` of a ``folder``."""
    problems = {
        "unlabelled": (plan.unlabelled, allow.unlabelled),
        "missing_image": (plan.without_image, allow.missing_images),
        "contradictory": (labels.contradicted, allow.contradictions),
    }
    if folder is not None:
        names = pa.array(np.repeat(list(problems), [len(keys) for keys, _ in problems.values()]), pa.string())
        keys = pa.concat_arrays([keys for keys, _ in problems.values()])
        write_table(folder.label_problems, pa.table({"problem": names, "key": keys}))
    messages = {
        "unlabelled": ("slice", "without a label", "give them labels, or keep them with --allow-unlabelled"),
        "missing_image": ("label", "without an image", "fetch the files, or continue with --allow-missing-images"),
        "contradictory": (
            "key",
            "with contradictory labels",
            "correct the label file, or take them as unknown with --allow-contradictions",
        ),
    }
    for problem, (keys, allowed) in problems.items():
        if not len(keys):
            continue
        noun, what, remedy = messages[problem]
        example = keys[0].as_py() if problem == "unlabelled" else labels.examples(keys[:1])
        hints = [
            f"for example {example}" if example else "",
            "" if folder is None else f"all are listed in {folder.label_problems}",
        ]
        text = f"{count(len(keys), noun)} {what} ({'; '.join(filter(None, hints))})".removesuffix(" ()")
        if not allowed:
            raise SourceError(f"Labels and images do not match: {text}. Either {remedy}.")
        progress.say(f"Labels: {text}; allowed.")


def check_lost(lost: pa.Table, allow: Allowances, progress: Progress) -> None:
    """Raise ``BuildError`` if labels are lost through a rule that nobody asked for, unless that is allowed.

    ``lost`` has the columns of ``losses.LOST_SCHEMA``.
    """
    losses = losses_by_reason(lost)
    by_rule = {reason: loss for reason, loss in losses.items() if Reason(reason).is_rule}
    if not by_rule:
        return
    text = f"Labels whose images are not in the dataset: {'; '.join(describe(by_rule))}"
    if not allow.lost_labels:
        widen = ", take their units as HU with --rescale-types" if Reason.NOT_HU in by_rule else ""
        raise BuildError(
            f"{text}. `ich-prep quarantine` lists the files. Fix the source{widen}, or continue without these labels with "
            "--allow-lost-labels."
        )
    progress.say(f"{text}; allowed.")


def check_any_slice(plan: Plan) -> None:
    """Raise ``SourceError`` if there is no slice to build from."""
    if not len(plan.slices):
        counts = Counter(plan.quarantine["reason"].to_pylist())
        if counts.most_common(1)[0][0] == Reason.MULTI_FRAME:
            remedy = CONVERT_FRAMES.capitalize()
        elif all(Reason(reason).is_damage for reason in counts):
            remedy = "Copy or export these files again, or point --src at axial CT"
        else:
            remedy = "Point --src at axial CT"
        raise SourceError(
            f"No CT slices: {count(len(plan.quarantine), 'file')} quarantined: "
            f"{', '.join(f'{count} {reason}' for reason, count in counts.most_common())}. {remedy}."
        )
