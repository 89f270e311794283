"""Files rendered without a build: the same pixels as in a dataset, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ich_prep
from ich_prep import Spec, open_dataset, render_file
from ich_prep.dataset.tables import read_parquet
from ich_prep.errors import Reason, SliceError
from tests.support.cli import SMALL, working

SliceBytes = Callable[..., bytes]


def test_a_file_is_rendered_as_in_a_dataset(dataset_path: Path, phantom_tree: Path) -> None:
    dataset = open_dataset(dataset_path)
    paths = read_parquet(working(dataset_path) / "plan.parquet", ["path"])["path"].to_pylist()
    for row in range(0, len(dataset), 17):
        found = render_file(phantom_tree / paths[row], SMALL)
        assert found.dtype == dataset.dtype
        np.testing.assert_array_equal(found, dataset.read([row])[0])


def test_the_function_is_not_shadowed_by_its_module() -> None:
    """A module of the same name would replace it once imported."""
    assert ich_prep.render_file is render_file
    assert callable(ich_prep.render_file)


@pytest.mark.parametrize(("layout", "lowest"), [("rsna", -1000), ("folder", 40), ("auto", 40)])
def test_known_defects_are_repaired_as_the_layout_says(
    layout: str, lowest: int, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    hu = np.array([[-1000, -900], [40, 1000]], np.int16)
    path = tmp_path / "slice.dcm"
    wrapped = (hu.astype(np.int64) % 4096).astype(np.uint16)
    path.write_bytes(slice_bytes(wrapped, BitsStored=12, HighBit=11, RescaleIntercept="0"))
    found = render_file(path, Spec(layout=layout, store="hu", size=16))  # type: ignore[arg-type]
    assert found.shape == (1, 16, 16)
    assert found.dtype == np.int16
    assert found.min() == lowest


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("empty.dcm", b"", Reason.EMPTY_FILE),
        ("text.dcm", b"no DICOM" * 100, Reason.NOT_DICOM),
        ("gone.dcm", None, Reason.UNREADABLE),
    ],
)
def test_a_file_that_is_not_a_slice_has_a_reason(name: str, data: bytes | None, reason: Reason, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SliceError) as caught:
        render_file(tmp_path / name, Spec())
    assert caught.value.reason == reason


def test_a_slice_without_pixels_has_a_reason(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    path = tmp_path / "slice.dcm"
    path.write_bytes(slice_bytes(PixelData=None))
    with pytest.raises(SliceError, match="no_pixels"):
        render_file(path, Spec())
