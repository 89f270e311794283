"""What the columns of a user's label table are, and their values: keys, classes, subset and fold, columns to keep.

No message quotes a cell: a label table holds patient data. Messages name the file, the column and the line.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Final, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.classes import UNKNOWN
from ich_prep.errors import SourceError, UsageError, count, did_you_mean
from ich_prep.layouts.labels import UIDS, Key, LabelLines, LabelRules

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ich_prep.layouts.user_tables import UserTable

KEYS: Final[tuple[Key, ...]] = get_args(Key)[:5]  # from the finest to the coarsest
# Other names of the keys, without blanks and punctuation; the last of each is the attribute's tag (PS3.6).
_SPELLINGS: Final[Mapping[str, Key]] = {
    spelling: key
    for key, spellings in zip(
        KEYS,
        (
            ("sopinstanceuid", "sopuid", "instanceuid", "imageuid", "00080018"),
            ("seriesinstanceuid", "seriesuid", "0020000e"),
            ("studyinstanceuid", "studyuid", "0020000d"),
            ("accessionnumber", "accession", "accessionno", "accessionnr", "accno", "00080050"),
            ("patientid", "patid", "00100020"),
        ),
        strict=True,
    )
    for spelling in spellings
}
SUBSET, FOLD = "subset", "fold"
SUBSETS: Final = ("train", "test")
LARGEST_FOLD: Final = 126  # of int8, as a dataset has at most 127 folds
KEPT_PREFIX: Final = "x_"
# A name this similar to that of a class, 0 to 1, is taken for a misspelling of it.
SIMILAR: Final = 0.8
MOST_NAMED = 10

YES: Final = frozenset(("1", "true", "t", "yes", "y", "ja", "wahr", "vrai"))
NO: Final = frozenset(("0", "false", "f", "no", "n", "nein", "falsch", "faux"))
MISSING: Final = frozenset(("", "na", "n/a", "#n/a", "nan", "null", "none", "<na>"))
_ZEROS: Final = re.compile(r"[.,]0*$")  # 1.0, 1., and 1,0 of a program that writes decimal commas
_QUOTED: Final = r"""^=?["'](.*?)["']?$"""
_ENDING: Final = r"(?i)\.(?:dcm|dicom)$"
_INTEGER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
_DECIMAL: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,17})?(?:\.[0-9]{1,40})?(?:[eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Columns:
    """The numbers of the columns of a table: ``keys`` from the finest, ``candidates`` of which one may be used to join.

    ``classes`` by class, ``kept`` by the name that they have in the dataset; ``ignored`` are names.
    """

    keys: Mapping[Key, int]
    candidates: tuple[Key, ...]
    classes: Mapping[str, int]
    subset: int | None
    fold: int | None
    kept: Mapping[str, int]
    ignored: tuple[str, ...]

    def numbers(self) -> list[int]:
        """Return the columns to read."""
        single = [number for number in (self.subset, self.fold) if number is not None]
        return list(dict.fromkeys([*self.keys.values(), *self.classes.values(), *single, *self.kept.values()]))


def key_of(name: str) -> Key | None:
    """Return the key that a column name stands for, in any spelling: "SOP Instance UID", "StudyUID", "PatientID"."""
    bare = plain(re.sub(r"\(?[0-9a-fA-F]{4},\s?[0-9a-fA-F]{4}\)?", "", name)) or plain(name)
    return _SPELLINGS.get(bare)


def plain(name: str) -> str:
    """Return a name without blanks and punctuation, in lower case: names that are equal so are the same."""
    return "".join(character for character in name.casefold() if character.isalnum())


def is_known(name: str, rules: LabelRules) -> bool:
    """Return whether a column of this name means something under ``rules``."""
    named = [part.partition("=") for part in (*rules.options.key, *rules.options.column)]
    wanted = {plain(name) for left, _, right in named for name in (left, right)}
    return key_of(name) is not None or plain(name) in {*map(plain, rules.classes), SUBSET, FOLD, *(wanted - {""})}


def names_labels(names: Sequence[str], rules: LabelRules) -> bool:
    """Return whether one of the column ``names`` is a class, is stated to be one, or looks like a misspelled one."""
    stated = {plain(text.partition("=")[2]) for text in rules.options.column}
    return any(
        plain(name) in stated or any(_is_close(name, one, has_column=True) for one in rules.classes)
        for name in names
        if plain(name)
    )


def find_columns(path: str, names: Sequence[str], rules: LabelRules) -> Columns:
    """Return what the columns ``names`` of the table at ``path`` are.

    Raises ``SourceError`` for a column that is there twice, a missing key, no label column, and a name that is close to
    that of a class; ``UsageError`` for an option that names an unknown column, key or class.
    """
    options = rules.options
    everything = [text.strip().casefold() for text in options.ignore] == ["all"]
    ignored = set() if everything else set(_listed(names, options.ignore, "--ignore-columns", path))
    kept = _kept(names, options.keep, path)
    stated_keys = _stated_keys(names, options.key, path)
    stated_classes = _stated_classes(names, options.column, rules.classes, path)
    stated = {number for number in stated_keys.values() if number is not None} | {*stated_classes.values()}
    free = [number for number in range(len(names)) if number not in ignored | stated and names[number]]

    by_key = _single(path, names, ((key_of(names[number]), number) for number in free), "--label-key KEY=COLUMN")
    keys = {key: number for key in KEYS if (number := stated_keys.get(key) or by_key.get(key)) is not None}
    keys |= {key: number for key, number in stated_keys.items() if number is not None}
    keys = {key: keys[key] for key in KEYS if key in keys}
    plain_classes = {plain(name): name for name in rules.classes}
    unnamed = ((plain_classes.get(plain(names[number])), number) for number in free)
    by_class = _single(path, names, ((name, n) for name, n in unnamed if name not in stated_classes), "--label-column")
    classes = {name: (stated_classes | by_class)[name] for name in rules.classes if name in stated_classes | by_class}
    special = _single(
        path, names, ((plain(names[n]) if plain(names[n]) in (SUBSET, FOLD) else None, n) for n in free), ""
    )
    used = {*keys.values(), *classes.values(), *special.values(), *kept.values(), *ignored}
    rest = [names[number] for number in range(len(names)) if names[number] and number not in used]
    if not everything:
        _refuse_close(path, rest, rules.classes, classes)
    for key in stated_keys:
        if key not in keys:
            raise UsageError(f"--label-key {key}: {path} has no such column. Name it: --label-key {key}=COLUMN.")
    if not keys:
        raise SourceError(
            f"Expected a column {', '.join(KEYS[:-1])} or {KEYS[-1]} in {path}; found {named(names)}. Name the column that "
            "says what a line is about: --label-key KEY=COLUMN."
        )
    if not classes:
        raise SourceError(
            f"Expected label columns in {path}, some of {named(rules.classes)}; found none among {named(names)}. Say which "
            "column has the labels of a class with --label-column CLASS=COLUMN, or name other classes with --classes."
        )
    candidates = tuple(stated_keys) or tuple(keys)
    candidates = tuple(key for key in KEYS if key in candidates)
    return Columns(keys, candidates, classes, special.get(SUBSET), special.get(FOLD), kept, tuple(rest))


def read_lines(table: UserTable, columns: Columns, rules: LabelRules) -> LabelLines:
    """Return the lines of ``table`` with their values checked; raises ``SourceError`` that names column and line."""
    texts = table.read(columns.numbers())
    keys = {key: _clean_key(texts[number], key) for key, number in columns.keys.items()}
    lines = len(next(iter(texts.values())))
    if not lines:
        raise SourceError(f"Expected lines of labels below the header of {table.path}; found none.")
    values = np.full((lines, len(rules.classes)), UNKNOWN, np.int8)
    for name, number in columns.classes.items():
        expected = "0, 1 or nothing (or true and false, yes and no, NA)"
        values[:, rules.classes.index(name)] = _parsed(table, number, texts[number], _label, expected)
    subset = fold = None
    if columns.subset is not None:
        codes = _parsed(table, columns.subset, texts[columns.subset], _subset, "train, test or nothing")
        subset = pa.array(SUBSETS, pa.string()).take(pa.array(codes, pa.int8(), mask=codes < 0))
    if columns.fold is not None:
        fold = _parsed(
            table, columns.fold, texts[columns.fold], _fold, f"an integer of 0 to {LARGEST_FOLD}, or nothing"
        )
    extra = pa.table({name: _typed(texts[number]) for name, number in columns.kept.items()}) if columns.kept else None
    return LabelLines(
        table.path, columns.candidates, keys, values, extra, subset, fold, table.line_of, rules.allow_contradictions
    )


# --- columns ---------------------------------------------------------------------------------------------------------


def _find(names: Sequence[str], wanted: str, option: str, path: str) -> int:
    """Return the number of the column that an option names: as written, else in any case and spacing."""
    wanted = " ".join(wanted.split())
    exact = [number for number, name in enumerate(names) if name == wanted]
    found = exact or [number for number, name in enumerate(names) if plain(name) == plain(wanted) and plain(name)]
    if len(found) > 1:
        raise SourceError(f"The column {names[found[0]]!r} is {len(found)} times in {path}. Keep one.")
    if not found:
        raise UsageError(
            f"{option}: {path} has no column {wanted[:100]!r}; it has {named(names)}.{did_you_mean(wanted[:100], names)}"
        )
    return found[0]


def _listed(names: Sequence[str], texts: Iterable[str], option: str, path: str) -> list[int]:
    """Return the columns that an option lists: each text is one name, or several with commas between them."""
    whole = {*names}
    parts = [part for text in texts for part in ([text] if text.strip() in whole else text.split(","))]
    return [_find(names, part, option, path) for part in parts if part.strip()]


def _kept(names: Sequence[str], texts: Iterable[str], path: str) -> dict[str, int]:
    kept: dict[str, int] = {}
    for number in _listed(names, texts, "--keep-columns", path):
        ascii_name = unicodedata.normalize("NFKD", names[number]).encode("ascii", "ignore").decode().casefold()
        name = KEPT_PREFIX + re.sub(r"[^a-z0-9]+", "_", ascii_name).strip("_")
        if name == KEPT_PREFIX or kept.setdefault(name, number) != number:
            raise UsageError(
                f"--keep-columns: the column {names[number]!r} would be {name!r}, which is "
                f"{'empty' if name == KEPT_PREFIX else 'also the name of another'}. Rename it in {path}."
            )
    return kept


def _stated_keys(names: Sequence[str], texts: Iterable[str], path: str) -> dict[Key, int | None]:
    """Return the keys that ``--label-key`` names, with the column if it says one: KEY, KEY=COLUMN or COLUMN=KEY."""
    stated: dict[Key, int | None] = {}
    for text in texts:
        key, column = key_of(text), None
        for at in (text.find("="), text.rfind("=")) if "=" in text else ():
            left, right = text[:at], text[at + 1 :]
            if key_of(left) or key_of(right):
                key, column = (key_of(left), right) if key_of(left) else (key_of(right), left)
                break
        if key is None:
            raise UsageError(
                f"--label-key {text[:100]!r} names no key. Expected KEY or KEY=COLUMN, where KEY is one of "
                f"{', '.join(KEYS)}."
            )
        if key in stated:
            raise UsageError(f"--label-key names {key} twice.")
        stated[key] = None if column is None else _find(names, column, "--label-key", path)
    return stated


def _stated_classes(names: Sequence[str], texts: Iterable[str], classes: Sequence[str], path: str) -> dict[str, int]:
    stated: dict[str, int] = {}
    for text in texts:
        name, equals, column = text.partition("=")
        name = name.strip()
        if not equals or not column.strip():
            raise UsageError(f"--label-column {text[:100]!r}: expected CLASS=COLUMN, such as any=Hemorrhage.")
        if name not in classes:
            raise UsageError(
                f"--label-column: {name[:100]!r} is no class of this build; expected one of {named(classes)}."
                f"{did_you_mean(name[:100], classes)}"
            )
        if name in stated:
            raise UsageError(f"--label-column names the class {name} twice.")
        stated[name] = _find(names, column, "--label-column", path)
    return stated


def _single(path: str, names: Sequence[str], found: Iterable[tuple[str | None, int]], option: str) -> dict[str, int]:
    """Return the column of each meaning; raises ``SourceError`` if two have the same."""
    columns: dict[str, int] = {}
    for meaning, number in found:
        if meaning is None:
            continue
        other = columns.setdefault(meaning, number)
        if other == number:
            continue
        if names[other] == names[number]:
            times = Counter(names)[names[number]]
            raise SourceError(f"The column {names[number]} is {times} times in {path}. Keep one.")
        choose = f", or name the one to use with {option}" if option else ""
        raise SourceError(
            f"The columns {names[other]!r} and {names[number]!r} of {path} are both {meaning}. Keep one{choose}, or leave "
            "the other out with --ignore-columns."
        )
    return columns


def _refuse_close(path: str, rest: Sequence[str], classes: Sequence[str], found: Mapping[str, int]) -> None:
    """Raise ``SourceError`` for a column without a meaning whose name is close to that of a class."""
    for name in rest:
        close = next((one for one in classes if _is_close(name, one, has_column=one in found)), None)
        if close is not None:
            raise SourceError(
                f"{path}: label column {name[:100]!r} is unknown. Did you mean {close!r}? If so, give --label-column "
                f"'{close}={name[:100]}'; if it is something else, --ignore-columns '{name[:100]}'."
            )


def _is_close(name: str, known: str, *, has_column: bool) -> bool:
    """Return whether ``name`` looks like a misspelling of the class ``known``, or has it as a word."""
    one, other = plain(name), plain(known)
    if len(one) > 2 * len(other) + 40:  # the comparison below takes quadratic time
        return False
    if sorted(one) == sorted(other) or SequenceMatcher(None, one, other).ratio() >= SIMILAR:
        return True
    words = "_".join(re.findall(r"[^\W_]+", name.casefold()))
    return not has_column and f"_{known}_" in f"_{words}_"


def named(names: Sequence[str]) -> str:
    """Return up to ten names for a message, and how many there are more."""
    shown = [name[:60] for name in names if name][:MOST_NAMED]
    more = len([name for name in names if name]) - len(shown)
    return (", ".join(shown) or "no column with a name") + (f" and {more:,} more" if more > 0 else "")


def ignored_note(path: str, columns: Columns) -> str | None:
    """Return the note that names the columns of ``path`` without a meaning."""
    if not columns.ignored:
        return None
    return f"{count(len(columns.ignored), 'other column')} of {path} not read: {named(columns.ignored)}"


# --- values ----------------------------------------------------------------------------------------------------------


def _clean_key(texts: pa.Array, key: Key) -> pa.Array:
    """Return keys without the quotes and formula signs of spreadsheets; UIDs without ``.dcm``. Null where there is none."""
    for pattern, replacement in ((_QUOTED, r"\1"), (_ENDING, "")):
        if pattern == _ENDING and key not in UIDS:
            continue
        if pc.any(pc.match_substring_regex(texts, pattern)).as_py():
            texts = pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, pattern, replacement))
    missing = pc.equal(texts, "")
    if key in UIDS:
        missing = pc.is_in(pc.utf8_lower(texts), value_set=pa.array(sorted(MISSING), pa.string()))
    return pc.if_else(missing, pa.scalar(None, pa.string()), texts)


def _parsed(
    table: UserTable, number: int, texts: pa.Array, parse: Callable[[str], int | None], expected: str
) -> NDArray[np.int8]:
    """Return the values of column ``number``, int8 (n,); each distinct text is parsed once, None is an invalid one."""
    encoded = texts.dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    parsed = np.full(len(encoded.dictionary), UNKNOWN, np.int8)
    for index, text in enumerate(encoded.dictionary.to_pylist()):
        value = parse(text)
        if value is None:
            wrong = codes == index
            raise SourceError(
                f"Expected {expected} in column {table.columns[number]} of {table.path}; found another value in "
                f"{table.line_of(int(np.argmax(wrong)))}. Correct the table."
            )
        parsed[index] = value
    values: NDArray[np.int8] = parsed[codes]
    return values


def _label(text: str) -> int | None:
    word = text.casefold()
    if word in MISSING:
        return UNKNOWN
    bare = _ZEROS.sub("", word)
    return 1 if word in YES or bare == "1" else 0 if word in NO or bare == "0" else None


def _subset(text: str) -> int | None:
    word = text.casefold()
    return UNKNOWN if word in MISSING else SUBSETS.index(word) if word in SUBSETS else None


def _fold(text: str) -> int | None:
    if text.casefold() in MISSING:
        return UNKNOWN
    bare = _ZEROS.sub("", text)
    return int(bare) if re.fullmatch(r"[0-9]{1,3}", bare) and int(bare) <= LARGEST_FOLD else None


def _typed(texts: pa.Array) -> pa.Array:
    """Return a column to keep: int64 if all its values are integers, float64 if all are numbers, else string.

    A number with a leading zero or a plus sign is text, for it may be an identifier. NA and the like are null in all three.
    """
    missing = pc.is_in(pc.utf8_lower(texts), value_set=pa.array(sorted(MISSING), pa.string()))
    values = pc.if_else(missing, pa.scalar(None, pa.string()), texts)
    stated = values.drop_null()
    for pattern, kind in ((_INTEGER, pa.int64()), (_DECIMAL, pa.float64())):
        if len(stated) and pc.all(pc.match_substring_regex(stated, f"^(?:{pattern.pattern})$")).as_py():
            try:
                numbers = values.cast(kind)
            except pa.ArrowInvalid:  # beyond the range of the type
                continue
            if pc.all(pc.is_finite(numbers)).as_py():
                return numbers
    return values
