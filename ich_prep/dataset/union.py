"""Several datasets read as one, without a copy: their rows one after the other, their patients joined or kept apart."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ich_prep.dataset.components import codes_of, connect, one_array
from ich_prep.dataset.dataset import Dataset, open_dataset, row_numbers
from ich_prep.dataset.shard_reader import output_array
from ich_prep.dataset.tables import stacked, with_columns
from ich_prep.errors import DatasetError, UsageError, count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ich_prep.dataset.shard_cache import ShardCache

SharedPatients = Literal["join", "apart"]
# What has to be equal: how chunks are packed does not change a pixel.
_SAME = ("size", "store", "windows", "orientation")
_LINKS = ("patient_id", "study_instance_uid", "series_instance_uid")


def open_union(
    paths: Sequence[str | Path], *, shared_patients: SharedPatients = "join", cache: ShardCache | None = None
) -> Dataset:
    """Return the finished datasets at ``paths`` as one; a single one is returned as it is. See ``UnionDataset``."""
    datasets = [open_dataset(path, cache=cache) for path in paths]
    return datasets[0] if len(datasets) == 1 else UnionDataset(datasets, shared_patients)


class UnionDataset(Dataset):
    """Several datasets with the same stored pixels and classes as one, to read from.

    Its rows are those of the first, then those of the second, and so on; so are the lines of ``series``. The column
    ``dataset`` of both tables names the dataset of a line. Values that link patients (patient, study and series) join
    their fold groups across datasets with ``shared_patients`` "join"; with "apart", equal patient ids of two datasets
    are two patients, and both ids and groups get the dataset's name. ``digest`` is that of all of them and of this choice.

    Raises ``UsageError`` for datasets that store other pixels or have other classes, one that is named twice, slices that
    are in two of them while their patients are kept apart, and, to join patients, for pseudonyms of different keys.
    """

    def __init__(self, datasets: Sequence[Dataset], shared_patients: SharedPatients = "join") -> None:
        first = datasets[0]
        for other in datasets[1:]:
            _require_same(first, other)
        if len({dataset.digest for dataset in datasets}) < len(datasets):
            raise UsageError(f"{_named(datasets)}: one of them is there twice. Name each dataset once.")
        counts = Counter[str]()
        for dataset in datasets:
            counts.update(dataset.counts.model_dump())
        digests = " ".join([shared_patients, *(dataset.digest for dataset in datasets)])
        hidden = any(dataset.has_pseudonyms for dataset in datasets)
        root = first.root.model_copy(
            update={
                "counts": first.counts.model_copy(update=dict(counts)),
                "digest": hashlib.sha256(digests.encode()).hexdigest(),
                "history": (),
            }
        )
        super().__init__(Path(_named(datasets)), root, {"spec": {"identifiers": "pseudonymise" if hidden else "keep"}})
        self._parts, self.shared_patients = tuple(datasets), shared_patients
        self._starts = np.cumsum([0, *(len(dataset) for dataset in datasets)])
        if shared_patients == "apart":
            _refuse_shared_slices(datasets)
        else:
            _require_one_key(datasets)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._parts, self.shared_patients)

    def close(self) -> None:
        """Close all datasets; further reads of pixels raise ``ValueError``."""
        for dataset in self._parts:
            dataset.close()

    @property
    def parts(self) -> tuple[Dataset, ...]:
        """The datasets, in their order."""
        return self._parts

    @cached_property
    def slices(self) -> pa.Table:
        """The slice tables of all datasets, one after the other; line i is row i."""
        slices = self._joined([dataset.slices for dataset in self._parts], "row")
        groups = [dataset.fold_groups for dataset in self._parts]
        return with_columns(slices, {"fold_group": self._group_names(groups)})

    @cached_property
    def series(self) -> pa.Table:
        """The series tables of all datasets, one after the other."""
        series = self._joined([dataset.series for dataset in self._parts], "first_row")
        return with_columns(series, {"fold_group": self._group_names([_groups_of(dataset) for dataset in self._parts])})

    def read_table(self, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a table of all, but for the shards, or some of its columns; raises ``DatasetError`` for the shards."""
        if table == "shards":
            raise DatasetError(f"{self.path} is several datasets: read the table {table} of each, in `parts`.")
        found = getattr(self, table) if table in ("slices", "series") else self._quarantine()
        return found if columns is None else found.select([name for name in columns if name in found.column_names])

    def read(
        self, rows: Sequence[int] | NDArray[np.integer[Any]], out: NDArray[Any] | None = None, *, threads: int = 1
    ) -> NDArray[Any]:
        """Return the pixels of ``rows``, in their order, as ``Dataset.read`` does; messages number rows in their dataset."""
        wanted = row_numbers(rows)
        if wanted.size and (int(wanted.min()) < 0 or int(wanted.max()) >= len(self)):
            raise IndexError(f"Expected rows within 0..{len(self) - 1}; got {int(wanted.min())}..{int(wanted.max())}.")
        out = output_array(out, (len(wanted), *self.shape[1:]), self.dtype)
        part = np.searchsorted(self._starts, wanted, side="right") - 1
        for number in np.unique(part).tolist():
            at, dataset = np.flatnonzero(part == number), self._parts[number]
            own = wanted[at] - self._starts[number]
            if len(at) == len(wanted):
                dataset.read(own, out, threads=threads)
            else:
                out[at] = dataset.read(own, threads=threads)
        return out

    # --- tables ----------------------------------------------------------------------------------------------------------

    def _quarantine(self) -> pa.Table:
        tables = [dataset.read_table("quarantine") for dataset in self._parts]
        shifted = [
            with_columns(table, {"row": pc.add(table["row"], int(start))})
            for table, start in zip(tables, self._starts[:-1], strict=True)
        ]
        return stacked(*shifted)

    def _joined(self, tables: list[pa.Table], rows: str) -> pa.Table:
        """Return the lines of all ``tables``, in which series and the row numbers in the column ``rows`` count on."""
        series_starts = np.cumsum([0, *(dataset.counts.series for dataset in self._parts)])
        shifted = []
        for number, (name, table) in enumerate(zip(self._names, tables, strict=True)):
            start_of = {"series_row": int(series_starts[number]), rows: int(self._starts[number])}
            columns = {column: pc.add(table[column], start) for column, start in start_of.items()}
            if self.shared_patients == "apart":
                columns["patient_id"] = _prefixed(name, table["patient_id"])
            columns["dataset"] = pa.repeat(name, len(table))
            shifted.append(with_columns(table, columns))
        return stacked(*shifted)

    @cached_property
    def _names(self) -> list[str]:
        """The name of each dataset: that of its folder, if no other has it, else its number too."""
        names = [dataset.path.name for dataset in self._parts]
        return [name if names.count(name) == 1 else f"{number}:{name}" for number, name in enumerate(names)]

    @cached_property
    def _group_of(self) -> dict[str, str]:
        """The name of each dataset's fold group, with the dataset's before it -> the group that it is part of here."""
        own = [_prefixed(name, _groups_of(dataset)) for name, dataset in zip(self._names, self._parts, strict=True)]
        encoded = pa.chunked_array(own).combine_chunks().dictionary_encode()
        groups = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        names, known = encoded.dictionary.to_pylist(), np.flatnonzero(groups >= 0)
        label = np.arange(len(names))
        if self.shared_patients == "join":
            links = [self._linking(name)[known] for name in _LINKS]
            label[groups[known]] = connect(groups[known], links)
        return {name: names[number] for name, number in zip(names, label.tolist(), strict=True)}

    def _linking(self, name: str) -> NDArray[np.int64]:
        """Return the codes of a column of the series tables, one table after the other; -1 for null or empty."""
        whole = one_array(
            pa.chunked_array([chunk for part in self._parts for chunk in part.series[name].chunks], pa.string())
        )
        return codes_of(pc.if_else(pc.equal(whole, ""), pa.scalar(None, pa.string()), whole))

    def _group_names(self, groups: list[pa.ChunkedArray]) -> pa.Array:
        named = [_prefixed(name, values) for name, values in zip(self._names, groups, strict=True)]
        encoded = pa.chunked_array(named).combine_chunks().dictionary_encode()
        joined = pa.array([self._group_of.get(name, name) for name in encoded.dictionary.to_pylist()], pa.string())
        return joined.take(encoded.indices)


def _require_same(first: Dataset, other: Dataset) -> None:
    for name in _SAME:
        one, two = getattr(first.spec, name), getattr(other.spec, name)
        if one != two:
            raise UsageError(
                f"{first.path} and {other.path} cannot be read as one: {name} is {_shown(one)} and {_shown(two)}. Build one "
                "of them again with the spec of the other."
            )
    if first.classes != other.classes:
        raise UsageError(
            f"{first.path} and {other.path} cannot be read as one: their classes are {', '.join(first.classes)} and "
            f"{', '.join(other.classes)}."
        )


def _require_one_key(datasets: Sequence[Dataset]) -> None:
    """Raise ``UsageError`` if the identifiers cannot be compared: pseudonyms of several keys, or of some datasets only."""
    keys = [dataset.root.pseudonym_key for dataset in datasets]
    other = next((one for one, key in zip(datasets, keys, strict=True) if key != keys[0]), None)
    if other is None:
        return
    kinds = "only one of them has pseudonyms" if None in keys else "their pseudonyms are of different keys"
    raise UsageError(
        f"Whether a patient is in both {datasets[0].path} and {other.path} cannot be known: {kinds}. Build one of them "
        "again with the --identifiers and --key of the other; or, if nobody is in both, add --shared-patients apart."
    )


def _refuse_shared_slices(datasets: Sequence[Dataset]) -> None:
    """Raise ``UsageError`` if a slice is in two of the datasets: its patient would be in two parts of a split."""
    known = datasets[0].slices["sop_instance_uid"].drop_null()
    for dataset in datasets[1:]:
        uids = dataset.slices["sop_instance_uid"].drop_null()
        shared = uids.filter(pc.is_in(uids, value_set=known))
        if len(shared):
            raise UsageError(
                f"{count(len(shared), 'slice')} of {dataset.path} {'is' if len(shared) == 1 else 'are'} in another of the "
                "datasets too, by SOP Instance UID. Join the patients, or withdraw these slices from one of the datasets."
            )
        known = pa.chunked_array([*known.chunks, *uids.chunks], pa.string())


def _named(datasets: Sequence[Dataset]) -> str:
    return " + ".join(dataset.path.name for dataset in datasets)


def _shown(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ", ".join(f"{window.name} {window.center:g}/{window.width:g}" for window in value)


def _groups_of(dataset: Dataset) -> pa.ChunkedArray:
    """Return the fold group of each line of a series table; in one of an earlier version, the patient."""
    series = dataset.series
    if "fold_group" not in series.column_names:
        return series["patient_id"]
    return pc.coalesce(series["fold_group"], series["patient_id"])


def _prefixed(name: str, values: pa.ChunkedArray) -> pa.Array:
    joined = pc.binary_join_element_wise(f"{name}:", values, "")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined
