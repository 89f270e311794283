"""Datasets that were changed and sealed again, all digests recomputed: refused, or the pixels are the ones written."""

from __future__ import annotations

import copy as copies
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.schema import TABLES, shard_path
from ich_prep.errors import CorruptionError, IchError
from ich_prep.progress import NoProgress
from ich_prep.summary import summary_of
from ich_prep.verify import verify
from ich_train.loader import SliceLoader
from tests.support.sealing import replace_table, reseal, rewrite_root, with_column

KEPT = Path(__file__).parents[1] / "contract"
ORIGINALS = {name: open_dataset(KEPT / f"{name}.zarr") for name in ("windows", "hu")}
PIXELS = {
    name: dict(zip(rows.tolist(), dataset.read(rows), strict=True))
    for name, dataset in ORIGINALS.items()
    for rows in [np.flatnonzero(dataset.is_ok)]
}
SOME = 80  # edits; many are behind the mark slow

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from(
        [2**31, 2**63, 10**30, -(2**63), 4096, 1e308, 0.5, "", "..", "/etc/passwd", "labels/../x", "ok", "é"]
    ),
    st.text(max_size=5),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))


@pytest.fixture
def copy(dataset_path: Path, tmp_path: Path) -> Path:
    """A copy of a dataset of windows, without its working folder."""
    return Path(shutil.copytree(dataset_path, tmp_path / "data.zarr"))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in list(items) for place in [(value, key), *places(inner)]]


def refused(use: Callable[[], object]) -> bool:
    """Whether ``use`` raises an error of ours, in one short message; any other exception fails the test."""
    try:
        use()
    except IchError as error:
        assert len(str(error)) < 2000
        return True
    return False


def check_data(path: Path, name: str) -> None:
    """What can be read is what was written; the rest is refused."""
    refused(lambda: verify(path, progress=NoProgress()))
    refused(lambda: summary_of(open_dataset(path)))

    def read() -> None:
        dataset = open_dataset(path)
        assert set(np.unique(dataset.labels)) <= {-1, 0, 1}
        for row in np.flatnonzero(dataset.is_ok).tolist():
            np.testing.assert_array_equal(dataset.read([row])[0], PIXELS[name][row])
        for line in dataset.series["series_row"].to_pylist():
            dataset.volume(series_row=line)

    def read_batches() -> None:
        with open_dataset(path) as dataset:
            labels = dataset.labels
            for batch in SliceLoader(dataset, batch_size=8, order="sequential"):
                for image, label, row in zip(batch.images, batch.labels, batch.rows.tolist(), strict=True):
                    np.testing.assert_array_equal(image.numpy(), PIXELS[name][row])
                    np.testing.assert_array_equal(label.numpy(), labels[row])

    refused(read)
    refused(read_batches)


def try_edits(number: int, try_one: Callable[..., None], **drawn: st.SearchStrategy[Any]) -> None:
    """Call ``try_one`` with that many edits, drawn by the profile's seed, or where there are many by a new one."""
    run = given(data=st.data(), **drawn)(try_one)
    if number == SOME:
        settings(max_examples=number, deadline=None)(run)()
        return
    chosen = random.SystemRandom().randrange(1 << 32)
    print(f"seed {chosen}")
    many = settings(max_examples=number, deadline=None, derandomize=False, database=None, phases=[Phase.generate])
    seed(chosen)(many(run))()


EDITS = pytest.mark.parametrize("edits", [SOME, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])


@EDITS
def test_a_root_edited_and_sealed_again(edits: int) -> None:
    try_edits(edits, edit_root, name=st.sampled_from(["windows", "hu"]))


@EDITS
def test_a_table_edited_and_sealed_again(edits: int) -> None:
    try_edits(edits, edit_table, name=st.sampled_from(["windows", "hu"]), table=st.sampled_from(TABLES))


def edit_root(data: st.DataObject, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(ORIGINALS[name].path, Path(folder) / "data.zarr"))

        def edit(ich: dict[str, Any]) -> None:
            known = [place for place in places(ich) if place[1] not in ("history", "versions")]
            container, key = known[data.draw(st.integers(0, len(known) - 1))]
            if isinstance(container, dict) and data.draw(st.booleans()):
                del container[key]
            else:
                container[key] = data.draw(VALUES)

        rewrite_root(path, edit)
        check_data(path, name)


def edited(table: pa.Table, data: st.DataObject) -> pa.Table:
    """The table with one change: a cell, a column, the order or number of its lines."""
    column = data.draw(st.sampled_from(table.column_names))
    kind = data.draw(st.sampled_from(["cell", "reverse", "drop", "cast", "cut", "repeat"]))
    if kind == "reverse":
        return with_column(table, column, table[column].to_pylist()[::-1])
    if kind == "drop":
        return table.drop_columns([column])
    if kind == "cut":
        return table.slice(0, data.draw(st.integers(0, max(0, len(table) - 1))))
    if kind == "repeat":
        return pa.concat_tables([table, table])
    if kind == "cast":
        place = table.schema.get_field_index(column)
        return (
            table.set_column(place, column, pa.array(table[column].to_pylist()).cast(pa.string(), safe=False))
            if (not pa.types.is_list(table.schema.field(column).type))
            else table.set_column(place, column, pa.nulls(len(table)))
        )
    values = copies.deepcopy(table[column].to_pylist())
    if values:
        values[data.draw(st.integers(0, len(values) - 1))] = data.draw(VALUES)
    try:
        return with_column(table, column, values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):  # not a value of this column's type
        return with_column(table, column, [None] * len(table))


def edit_table(data: st.DataObject, name: str, table: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(ORIGINALS[name].path, Path(folder) / "data.zarr"))
        replace_table(path, table, edited(pq.read_table(path / f"labels/{table}.parquet"), data))
        check_data(path, name)


# --- kinds of change, one by one -------------------------------------------------------------------------------------


def loaded(path: Path) -> None:
    """Read every labelled slice of a dataset as a training does."""
    for _ in SliceLoader(path, batch_size=8, order="sequential"):
        pass


def everyone_refuses(path: Path, message: str) -> None:
    """Info, the loader and verify find the change."""
    with pytest.raises(CorruptionError, match=message):
        summary_of(open_dataset(path))
    with pytest.raises(CorruptionError, match=message):
        loaded(path)
    assert refused(lambda: verify(path, progress=NoProgress())) or verify(path, progress=NoProgress()).problems


@pytest.mark.parametrize("value", [7, -1, 2])
def test_a_label_is_0_or_1_or_null(value: int, copy: Path) -> None:
    slices = open_dataset(copy).slices
    replace_table(copy, "slices", with_column(slices, "subdural", [value, *slices["subdural"].to_pylist()[1:]]))
    everyone_refuses(copy, "subdural is within .* not 0..1")


def test_a_label_that_does_not_fit_its_type_is_refused(copy: Path) -> None:
    slices = open_dataset(copy).slices
    place = slices.schema.get_field_index("any")
    replace_table(copy, "slices", slices.set_column(place, "any", pa.array([300] * len(slices))))
    everyone_refuses(copy, "any is 'int64', not int8")


def test_a_table_that_was_changed_is_refused_though_it_is_valid(copy: Path) -> None:
    from ich_prep.dataset.tables import write_table

    slices = open_dataset(copy).slices
    inverted = [None if value is None else 1 - value for value in slices["any"].to_pylist()]
    write_table(copy / "labels/slices.parquet", with_column(slices, "any", inverted))
    everyone_refuses(copy, "SHA-256 mismatch: not the file that was published")


def test_exchanged_shards_are_refused(copy: Path) -> None:
    one, other = shard_path(copy, 5), shard_path(copy, 6)  # of labelled slices
    one.rename(copy / "aside")
    other.rename(one)
    (copy / "aside").rename(other)
    with pytest.raises(CorruptionError, match=r"Shard 5 .*row 80: this is not the chunk that was written here"):
        open_dataset(copy).read([80])
    with pytest.raises(CorruptionError, match="this is not the chunk that was written here"):
        loaded(copy)


def test_reversed_rows_sealed_again_are_refused(copy: Path) -> None:
    slices = open_dataset(copy).slices
    reversed_rows = slices.take(pa.array(np.arange(len(slices))[::-1]))
    replace_table(copy, "slices", with_column(reversed_rows, "row", slices["row"].to_pylist()))
    with pytest.raises(CorruptionError, match="this is not the chunk that was written here"):
        loaded(copy)
    assert verify(copy, progress=NoProgress()).problems


@pytest.mark.parametrize("name", ["/etc/passwd", "../other.zarr/labels/slices.parquet", "labels/../../x", "", "a//b"])
def test_a_name_that_leads_out_of_the_dataset_is_refused(name: str, copy: Path) -> None:
    rewrite_root(copy, lambda ich: ich["tables"].update(slices=name))
    with pytest.raises(CorruptionError, match=r"tables\.slices: .* is not the name of a file in a dataset"):
        open_dataset(copy)
    rewrite_root(copy, lambda ich: ich["tables"].update(slices="labels/slices.parquet"))
    rewrite_root(copy, lambda ich: ich["digests"].update({name: "0" * 64}))
    with pytest.raises(CorruptionError, match="is not the name of a file in a dataset"):
        open_dataset(copy)


@pytest.mark.parametrize(
    "change", [{"size": 4096}, {"store": "hu"}, {"windows": [{"name": "a", "center": 1, "width": 2}]}]
)
def test_a_spec_of_other_slices_is_refused_before_memory_is_allocated(change: dict[str, Any], copy: Path) -> None:
    rewrite_root(copy, lambda ich: ich["spec"].update(change))
    everyone_refuses(copy, "is damaged, or .* is of another dataset: a slice of")


def test_counts_are_compared_with_the_tables_before_memory_is_allocated(copy: Path) -> None:
    rewrite_root(copy, lambda ich: ich["counts"].update(rows=1 << 40, shards=(1 << 40) // 16))
    everyone_refuses(copy, rf"expected {1 << 40} lines, found")


def test_emptied_digests_are_refused(copy: Path) -> None:
    rewrite_root(copy, lambda ich: ich.update(digests={}))
    with pytest.raises(CorruptionError, match=r"digests: that of labels/quarantine\.parquet is missing"):
        open_dataset(copy)
    with pytest.raises(CorruptionError, match="digests"):
        verify(copy, progress=NoProgress())


def test_a_short_table_of_shards_fails_verification(copy: Path) -> None:
    replace_table(copy, "shards", open_dataset(copy).read_table("shards").slice(0, 2))
    assert any("expected" in problem.what for problem in verify(copy, progress=NoProgress()).problems)


def test_a_wrong_fold_fails_verification(copy: Path) -> None:
    """All slices and the series of one patient in another fold, sealed again."""
    dataset = open_dataset(copy)
    patient = next(line["patient_id"] for line in dataset.series.to_pylist() if line["fold"] is not None)
    for name in ("slices", "series"):
        table = dataset.read_table(name)
        lines = zip(table["patient_id"].to_pylist(), table["fold"].to_pylist(), strict=True)
        replace_table(copy, name, with_column(table, "fold", [(f + 1) % 5 if p == patient else f for p, f in lines]))
    assert any(f"{patient!r} is in fold" in problem.what for problem in verify(copy, progress=NoProgress()).problems)


def test_a_dataset_from_before_the_checksums_is_read(copy: Path) -> None:
    before = open_dataset(copy)
    expected = before.read([0, 20])
    replace_table(copy, "slices", before.slices.drop_columns(["chunk_crc32c", "fold_group"]))
    found: Dataset = open_dataset(copy)
    np.testing.assert_array_equal(found.read([0, 20]), expected)
    assert found.fold_groups.to_pylist() == before.slices["patient_id"].to_pylist()
    loaded(copy)
    reseal(copy)
