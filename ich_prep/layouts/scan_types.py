"""What kind of scan a series is, from the words that technicians and scanners write into its header and folder name."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, Literal

ScanType = Literal["plain", "contrast", "bone", "unknown"]

# Largest side of the field of view of a head, in mm.
LARGEST_HEAD_MM: Final = 350.0

_AGENT: Final = r"(?:contrast\w*|kontrast\w*|contr|km|iv|inj\w*|gad\w*|dye|c)"
_PLAIN: Final = re.compile(
    rf"""\b(?:pre|no|non|not|wo|without|with\s?out|w/o|ohne|sans|sin|senza|zonder|s/)
      [\s./-]*(?:(?:iv|i\.v\.)\s*)?{_AGENT}\b
    | \b(?:without|wo|w/o)(?!\w) | \b(?:non|un|not)[\s-]*enhanced\b | \bnon?[\s-]*con\b | \bs/c(?!\w)
    | \bnativ[eo]?\b | \bplain\b | \bn[ce]ct\b
    | \bc-(?!\s*spine)(?!\w) | (?<![\w-])-\s?c\b(?![\s-]*spine)""",
    re.VERBOSE,
)
# One series before and one after, or both in one.
_BOTH: Final = re.compile(
    r"\b(?:with|w/?|mit|avec)\s*(?:and|und|et|&|\+|/|,)?\s*(?:wo|w/o|without|ohne|sans)(?!\w)"
    r"|\b(?:without|wo|w/o|ohne|sans)\s*(?:and|und|et|&|\+|/|,)\s*(?:with|w|mit|avec)(?!\w)"
)
_CONTRAST: Final = re.compile(
    rf"""\b(?:contrast\w*|kontrast\w*|cect|ce|km|enhanced|oral|iv|cta|ctv|ctp|angio\w*|venous|arterial|portal|perf\w*)\b
    | \b(?:post|with|mit|avec|con|w/|after|nach)[\s./-]*{_AGENT}\b | \bc/c\b | \bw/\s?c
    | \bc\+ | \+\s?c\b | (?:\b|[0-9])mm\s?c\b
    | (?<![\w-])c\b(?!\s*-?\s*(?:spine|arm\b|t\b)|/|-(?![0-9]))""",
    re.VERBOSE,
)
_BONE: Final = re.compile(r"\b(?:bone\w*|osse\w*|oss?|os[eé]\w*|knochen\w*|bot|hrct|sharp)\b")
# Kernels for bone and lung: words, Siemens B, H and Hr of 60 and more, Toshiba FC30..39 and FC80..89, Philips C, D, YC, YD.
_SHARP_KERNEL: Final = re.compile(
    r"bone|edge|lung|sharp|detail|hrct|^(?:b|h|u|v)[6-9][0-9][a-z]*$|^[hbju][rfnlp](?:6[0-9]|7[0-9]|8[0-9])[a-z]*\b"
    r"|^fc(?:3[0-9]|8[0-9])$|^(?:c|d|e|yc|yd|ye)$"
)
_NO_AGENT: Final = re.compile(
    r"^(?:no(?:ne|n|t)?\b.*|n|0+|-+|without.*|ohne.*|sans.*|sin.*|nil|na|n/a|plain|false|unknown)$"
)

_HEAD: Final = re.compile(
    r"head|brain|skull|crani|cran[eo]|crane|kopf|sch(?:a|ae|ä)del|gehirn|hirn|cereb|cerv(?:eau|ello)|cabez|testa|t[eê]te|"
    r"encef|enceph|neuro|orbit|\beyes?\b|\biac\b|\biams?\b|\bears?\b|temporal|petrous|mastoid|sinus|nasal|\bnose\b|fac(?:e|ial)"
    r"|maxill|mandib|\bjaw|\btmj|dental|sella|pituit|fossa|mening|felsenbein|hoofd"
)
_OTHER_PART: Final = re.compile(
    r"femor|femur|humer|radial|chest|thora|torac|torax|lung|pulmo|heart|card|coron|aort|abd|pelvi|becken|bassin|liver|hepat|"
    r"leber|kidney|renal|niere|bladder|prostat|pancrea|colon|bowel|breast|mamma|spine|spinal|wirbel|rachis|column|vertebr|"
    r"\b[hbl]ws\b|lumb|sacr|neck|hals|\bcou\b|cuello|collo|carotis|extrem|\bleg|\barm\b|\barms\b|foot|feet|fuss|\bpied|knee|knie|"
    r"genou|ankle|hand|wrist|finger|elbow|shoulder|schulter|clavic|scapul|\bhip\b|\bhips\b|h(?:ü|ue)fte|tibia|fibula|heel|"
    r"whole ?body|ganzk|uterus|ovar|spleen|stomach"
)


def scan_type_of(
    series_description: str | None, folder: str | None, convolution_kernel: str | None, contrast_agent: str | None
) -> tuple[ScanType, bool]:
    """Return the type of a series, and whether its header states a contrast agent.

    The words of the description decide, then those of the ``folder``'s name, then a sharp kernel. The agent alone decides
    nothing: scanners keep it from one series to the next.
    """
    stated = bool(contrast_agent) and not _NO_AGENT.match((contrast_agent or "").strip().lower())
    for text in (series_description, folder):
        found = _type_by_words(text or "")
        if found != "unknown":
            return found, stated
    is_sharp = any(_SHARP_KERNEL.search(part.strip()) for part in (convolution_kernel or "").lower().split("\\"))
    return ("bone" if is_sharp else "unknown"), stated


@lru_cache(maxsize=4096)
def _type_by_words(text: str) -> ScanType:
    words = text.lower().replace("_", " ")
    without, negations = _PLAIN.subn(" ", words)
    if _CONTRAST.search(without) or _BOTH.search(words):
        return "contrast"
    if _BONE.search(without):
        return "bone"
    return "plain" if negations else "unknown"


def is_not_head(body_part: str | None, field_of_view_mm: float | None) -> bool:
    """Return whether a series is known not to show a head.

    By its ``body_part``, in the words of many vendors and languages, or by the longer side of its field of view. Unknown
    words say nothing, and a part named beside the head, such as HEAD_NECK, does not count against it.
    """
    if field_of_view_mm is not None and field_of_view_mm > LARGEST_HEAD_MM:
        return True
    words = re.sub(r"[^a-zà-ÿ0-9]+", " ", (body_part or "").lower())
    is_joint = re.search(r"(?:femor|humer|radial)\w* head", words) is not None
    return (is_joint or not _HEAD.search(words)) and _OTHER_PART.search(words) is not None
