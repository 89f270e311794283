"""Affines: against the equation of PS3.3 pixel by pixel, against the resize of the build, and against dcm2niix."""

from __future__ import annotations

import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.affine import TURNS, AffineError, NoAffine, to_ras, upright_turns, volume_affine
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.volumes import affine_of_slices, find_series
from ich_prep.dataset.windows import MAX_HU, MIN_HU
from ich_prep.errors import UsageError
from ich_prep.pixels.resize import resize_hu
from tests.support.turned import TURNED, UNDONE, directions, stored_as

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def stacked(
    count: int, step: tuple[float, float, float] = (0, 0, 5), first: tuple[float, float, float] = (-120, -90, 40)
) -> NDArray[np.float64]:
    return np.array(first) + np.arange(count)[:, np.newaxis] * np.array(step, float)


def resized(hu: NDArray[np.int16], size: int) -> NDArray[np.int16]:
    out = np.empty((size, size), np.int16)
    resize_hu(np.ascontiguousarray(hu), out=out)
    return out


@st.composite
def orientations(draw: st.DrawFn) -> NDArray[np.float64]:
    """Two orthonormal vectors, (2, 3)."""
    numbers = draw(st.lists(st.floats(-1, 1), min_size=9, max_size=9))
    basis, _ = np.linalg.qr(np.array(numbers).reshape(3, 3) + 3 * np.eye(3))
    return basis.T[:2]


@given(
    orientation=orientations(),
    spacing=st.tuples(st.floats(0.2, 2), st.floats(0.2, 2)),
    rows=st.integers(1, 13),
    columns=st.integers(1, 13),
    turn=st.sampled_from(sorted(TURNS)),
    shear=st.tuples(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5)),
    count=st.integers(2, 5),
)
@settings(max_examples=300, deadline=None)
def test_every_stored_pixel_maps_to_its_source_pixel(
    orientation: NDArray[np.float64],
    spacing: tuple[float, float],
    rows: int,
    columns: int,
    turn: str,
    shear: tuple[float, float],
    count: int,
) -> None:
    """Each source pixel has a unique value, by which it is located in the turned and padded slice."""
    across, down = orientation
    step = 3.0 * (np.cross(across, down) + shear[0] * across + shear[1] * down)
    positions = np.array([10.5, -20, 30]) + np.arange(count)[:, np.newaxis] * step
    side = max(rows, columns)
    affine = volume_affine(
        positions, orientation.reshape(6).tolist(), spacing, (rows, columns), turn=turn, stored_size=side
    )
    source = np.arange(rows * columns, dtype=np.int16).reshape(rows, columns)
    stored = resized(TURNED[turn](source), side)
    seen = 0
    for (y, x), value in np.ndenumerate(stored):
        if value != MIN_HU:
            j, i = divmod(int(value), columns)
            for z in range(count):
                expected = positions[z] + across * spacing[1] * i + down * spacing[0] * j
                np.testing.assert_allclose((affine @ [x, y, z, 1])[:3], expected, atol=1e-9)
            seen += 1
    assert seen == rows * columns
    assert affine.shape == (4, 4) and affine.dtype == np.float64 and affine[3].tolist() == [0, 0, 0, 1]


@given(
    turn=st.sampled_from(sorted(TURNS)),
    rotation=st.floats(-44, 44),
    tilt=st.floats(-30, 30),
    scale=st.sampled_from([1.0, 2.0, 0.5]),
)
@settings(max_examples=300, deadline=None)
def test_the_turn_of_an_orientation_brings_it_upright(turn: str, rotation: float, tilt: float, scale: float) -> None:
    header = stored_as(turn, (3, 4), directions(rotation, tilt), (0.5, 0.7))
    orientation = np.round(header["orientation"] * scale, 6)
    assert upright_turns(orientation[np.newaxis]).tolist() == [UNDONE[turn]]


def test_a_slice_half_way_between_two_turns_stays_as_it_is() -> None:
    for rotation in (45, -45):
        orientation = directions(rotation).reshape(1, 6)
        for noise in (0, 1e-7, -1e-7):
            assert upright_turns(orientation + noise).tolist() == [""]


@pytest.mark.parametrize(
    "orientation",
    [
        (np.nan,) * 6,
        (1, 0, 0, np.nan, 1, 0),
        (0,) * 6,
        (1, 0, 0, 1, 0, 0),
        (0, 1, 0, 0, 0, -1),  # sagittal
        (1, 0, 0, 0, 0, -1),  # coronal
        (-1, 0, 0, 0, -np.cos(np.radians(50)), np.sin(np.radians(50))),
    ],
)
def test_what_is_not_axial_is_not_turned(orientation: tuple[float, ...]) -> None:
    assert upright_turns(np.array([orientation], float)).tolist() == [""]
    assert upright_turns(np.empty((0, 6))).tolist() == []


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """The longer side of a source, and the side of the stored slice: an integer number of times smaller, or any."""
    if draw(st.booleans()):
        size = draw(st.integers(16, 30))
        return size * draw(st.integers(1, 4)), size
    return draw(st.integers(20, 60)), draw(st.integers(16, 120))


@given(
    sides=sizes(),
    shorter=st.floats(0.5, 1),
    wide=st.booleans(),
    turn=st.sampled_from(sorted(TURNS)),
    along=st.integers(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_a_resized_pixel_maps_to_where_its_value_comes_from(
    sides: tuple[int, int], shorter: float, wide: bool, turn: str, along: int
) -> None:
    """A ramp of 20 HU per pixel: the value of a stored pixel is 20 times the source index that the affine gives."""
    side, size = sides
    rows, columns = (int(side * shorter), side) if wide else (side, int(side * shorter))
    affine = volume_affine(stacked(2, first=(0, 0, 0)), AXIAL, (1, 1), (rows, columns), turn=turn, stored_size=size)
    ramp = 20 * np.indices((rows, columns), dtype=np.int16)[1 - along]
    stored = resized(TURNED[turn](ramp), size)
    y, x = np.indices((size, size)).reshape(2, -1)
    source = (affine @ np.stack([x, y, np.zeros_like(x), np.ones_like(x)]))[:2]  # x, y in pixels of the source
    # Only pixels away from the edge: at the edge, air is averaged in or the edge is repeated.
    reach = side / size + 1
    limits = np.array([columns, rows])[:, np.newaxis] - 1
    within = ((source >= reach) & (source <= limits - reach)).all(axis=0)
    errors = stored[y[within], x[within]] - 20 * source[along, within]
    # The mean of whole and partial pixels is up to an eighth of a pixel off its middle.
    cut = side > size and side % size != 0
    assert np.abs(errors).max(initial=0) <= 0.51 + cut * 20 / 8


def test_two_pixels_become_one_in_their_middle() -> None:
    affine = volume_affine(stacked(2), AXIAL, (0.5, 0.5), (512, 512), stored_size=256)
    np.testing.assert_allclose(affine, [[1, 0, 0, -119.75], [0, 1, 0, -89.75], [0, 0, 5, 40], [0, 0, 0, 1]])


def test_odd_padding_is_that_of_the_build() -> None:
    # (5, 8): one line of air above and two below; (8, 5): one column on the left and two on the right.
    for shape, expected in (((5, 8), (0, -1)), ((8, 5), (-1, 0))):
        affine = volume_affine(stacked(2, first=(0, 0, 0)), AXIAL, (1, 1), shape, stored_size=8)
        assert tuple(affine[:2, 3]) == expected


def test_a_tilted_gantry_is_a_shear() -> None:
    affine = volume_affine(stacked(28, step=(0, -1.5, 4.5)), AXIAL, (0.5, 0.5), (512, 512), stored_size=512)
    np.testing.assert_allclose(affine[:3, 2], [0, -1.5, 4.5])
    np.testing.assert_allclose(affine[:3, :2], [[0.5, 0], [0, 0.5], [0, 0]])


def test_rounded_cosines_are_unit_vectors_again() -> None:
    tilted = (1, 0, 0, 0, 0.9659, 0.2588)
    affine = volume_affine(stacked(3), tilted, (0.5, 0.5), (512, 512), stored_size=512)
    assert np.linalg.norm(affine[:3, 1]) == pytest.approx(0.5, abs=1e-12)


def test_ras_is_lps_with_x_and_y_reversed() -> None:
    affine = volume_affine(stacked(3), AXIAL, (0.5, 0.5), (512, 512), stored_size=512)
    ras = to_ras(affine)
    np.testing.assert_array_equal(ras, affine * np.array([-1, -1, 1, 1])[:, np.newaxis])
    np.testing.assert_array_equal(to_ras(ras), affine)


def test_a_single_slice_has_its_thickness_along_the_normal() -> None:
    affine = volume_affine(stacked(1), AXIAL, (0.5, 0.5), (64, 64), stored_size=64, thickness_mm=2.5)
    assert affine[:3, 2].tolist() == [0, 0, 2.5]


BENT = stacked(9) + np.array([[0, 2.0, 0]]) * (np.arange(9) == 4)[:, np.newaxis]
LATE = np.array([[0.0, 0, z] for z in (0, 5, 10, 15.2, 20)])
HALVES = np.array([[0.0, 0, z] for z in (*np.arange(0, 100, 4), *np.arange(100, 280, 7))])
GAP_OF_MANY = np.delete(stacked(1001, step=(0, 0, 0.15)), 1, axis=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"orientation": None}, NoAffine.NO_ORIENTATION),
        ({"orientation": (1, 0, 0, 0, 1)}, NoAffine.NO_ORIENTATION),
        ({"orientation": (1, 0, 0, 0, np.nan, 0)}, NoAffine.NO_ORIENTATION),
        ({"orientation": (1, 0, 0, 1, 0, 0)}, NoAffine.NO_ORIENTATION),
        ({"orientation": (0,) * 6}, NoAffine.NO_ORIENTATION),
        ({"positions_mm": np.empty((0, 3))}, NoAffine.NO_SLICES),
        ({"positions_mm": [[0, 0, 0], [0, 0, np.nan]]}, NoAffine.NO_POSITION),
        ({"positions_mm": stacked(1)}, NoAffine.NO_THICKNESS),
        ({"positions_mm": stacked(1), "thickness_mm": 0}, NoAffine.NO_THICKNESS),
        ({"positions_mm": np.zeros((2, 3))}, NoAffine.NO_ADVANCE),
        ({"positions_mm": stacked(4, step=(5, 0, 0))}, NoAffine.NO_ADVANCE),
        ({"positions_mm": BENT}, NoAffine.NOT_ON_A_LINE),
        ({"positions_mm": LATE}, NoAffine.SPACING_VARIES),
        ({"positions_mm": HALVES}, NoAffine.SPACING_VARIES),
        ({"positions_mm": np.delete(stacked(28), 13, axis=0)}, NoAffine.SPACING_VARIES),
        ({"positions_mm": GAP_OF_MANY}, NoAffine.SPACING_VARIES),
        ({"positions_mm": np.repeat(stacked(5), 2, axis=0)}, NoAffine.SPACING_VARIES),
        ({"pixel_spacing_mm": (0.5, 0)}, NoAffine.NO_PIXEL_SPACING),
        ({"pixel_spacing_mm": (np.nan, 0.5)}, NoAffine.NO_PIXEL_SPACING),
        ({"turn": "upside_down"}, NoAffine.UNKNOWN_TURN),
    ],
)
def test_a_volume_without_an_affine_says_why(changes: dict[str, Any], reason: NoAffine) -> None:
    volume = {
        "positions_mm": stacked(5),
        "orientation": AXIAL,
        "pixel_spacing_mm": (0.5, 0.5),
        "source_shape": (512, 512),
        "stored_size": 512,
    }
    volume_affine(**volume)
    with pytest.raises(AffineError) as raised:
        volume_affine(**volume | changes)
    assert raised.value.reason is reason
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (copy.reason, copy.detail, str(copy)) == (reason, raised.value.detail, str(raised.value))


@pytest.mark.parametrize(
    ("offset", "step", "passes"),
    [(0.09, 1, True), (0.11, 1, False), (0.19, 10, True), (0.21, 10, False), (0.06, 0.2, False)],
)
@pytest.mark.parametrize("axis", [0, 2])
def test_the_tolerance_of_positions(offset: float, step: float, passes: bool, axis: int) -> None:
    positions = stacked(5, step=(0, 0, step))
    positions[2, axis] += offset
    try:
        volume_affine(positions, AXIAL, (0.5, 0.5), (512, 512), stored_size=512)
    except AffineError as error:
        assert error.reason is (NoAffine.SPACING_VARIES if axis == 2 else NoAffine.NOT_ON_A_LINE)
        assert not passes
    else:
        assert passes


def lines_of(count: int = 4, **changes: list[Any]) -> pa.Table:
    positions = stacked(count)
    columns: dict[str, Any] = {
        "flags": pa.array([[]] * count, pa.list_(pa.string())),
        "turn": pa.array(["flip_y"] * count, pa.string()),
        "source_rows": pa.array([64] * count, pa.int32()),
        "source_columns": pa.array([48] * count, pa.int32()),
        "pixel_spacing_y_mm": [0.5] * count,
        "pixel_spacing_x_mm": [0.25] * count,
        "position_x_mm": positions[:, 0],
        "position_y_mm": positions[:, 1],
        "position_z_mm": positions[:, 2],
    }
    return pa.table({name: changes.get(name, column) for name, column in columns.items()})


def test_the_affine_of_lines_of_the_slice_table() -> None:
    affine = affine_of_slices(lines_of(), AXIAL, stored_size=32)
    expected = volume_affine(stacked(4), AXIAL, (0.5, 0.25), (64, 48), turn="flip_y", stored_size=32)
    np.testing.assert_array_equal(affine, expected)
    unturned = affine_of_slices(lines_of(turn=pa.array([None] * 4, pa.string())), AXIAL, stored_size=32)
    np.testing.assert_array_equal(unturned, affine_of_slices(lines_of().drop_columns("turn"), AXIAL, stored_size=32))
    almost = affine_of_slices(lines_of(pixel_spacing_y_mm=[0.5, 0.50001, 0.5, 0.5]), AXIAL, stored_size=32)
    np.testing.assert_array_equal(almost, expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"flags": [["other_orientation"], [], [], []]}, NoAffine.SLICES_DIFFER),
        ({"flags": [[], None, [], ["no_position"]]}, NoAffine.NO_POSITION),
        ({"turn": ["flip_y", None, "flip_y", "flip_y"]}, NoAffine.SLICES_DIFFER),
        ({"source_rows": [64, 64, 63, 64]}, NoAffine.SLICES_DIFFER),
        ({"pixel_spacing_x_mm": [0.25, 0.25, 0.251, 0.25]}, NoAffine.SLICES_DIFFER),
        ({"pixel_spacing_x_mm": [0.25, 0.25, None, 0.25]}, NoAffine.NO_PIXEL_SPACING),
        ({"pixel_spacing_y_mm": pa.array([None] * 4, pa.float64())}, NoAffine.NO_PIXEL_SPACING),
        ({"position_y_mm": [-90, None, -90, -90]}, NoAffine.NO_POSITION),
    ],
)
def test_slices_that_differ_have_no_affine(changes: dict[str, list[Any]], reason: NoAffine) -> None:
    with pytest.raises(AffineError) as raised:
        affine_of_slices(lines_of(**changes), AXIAL, stored_size=32)
    assert raised.value.reason is reason


def test_no_slices_have_no_affine() -> None:
    with pytest.raises(AffineError, match="no_slices"):
        affine_of_slices(lines_of().slice(0, 0), AXIAL, stored_size=32)


SERIES = pa.table({"series_row": pa.array([0, 1, 2], pa.int64()), "series_instance_uid": ["1.2", "1.3", "1.3"]})


def test_a_series_is_found_by_its_row_or_an_unambiguous_uid() -> None:
    assert [find_series(SERIES, series_row=row) for row in (0, 2, np.int64(1))] == [0, 2, 1]
    assert find_series(SERIES, "1.2") == 0
    assert find_series(SERIES.slice(1), series_row=2) == 1


@pytest.mark.parametrize(
    ("named", "options", "error", "message"),
    [
        ((0,), {}, TypeError, r"0 is not a UID\. Write series_row=0"),
        ((), {}, TypeError, "either series_row=NUMBER or a Series Instance UID"),
        (("1.2",), {"series_row": 0}, TypeError, "either series_row"),
        ((), {"series_row": "0"}, TypeError, "as an integer; got '0'"),
        ((), {"series_row": True}, TypeError, "as an integer; got True"),
        ((1.5,), {}, TypeError, r"as text; got 1\.5"),
        ((), {"series_row": 3}, KeyError, "no series_row 3: the dataset has 3 series"),
        ((), {"series_row": -1}, KeyError, "no series_row -1"),
        (("9.9",), {}, KeyError, "no series '9.9'"),
        (("1.3",), {}, UsageError, r"has 2 volumes\. Choose one by series_row: 1, 2"),
    ],
)
def test_an_invalid_series_is_refused_with_a_reason(
    named: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        find_series(SERIES, *named, **options)


def test_a_real_head_with_tilt_is_sheared_and_one_with_two_spacings_has_no_affine(real_data: Path) -> None:
    files = sorted((real_data / "head_ct" / "ge_hispeed").glob("*.dcm"))
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
    headers = [header for header in headers if header.SeriesInstanceUID == headers[0].SeriesInstanceUID]
    positions = np.array([header.ImagePositionPatient for header in headers], np.float64)
    orientation = [float(cosine) for cosine in headers[0].ImageOrientationPatient]
    normal = np.cross(orientation[:3], orientation[3:])
    positions = positions[np.argsort(positions @ normal)]
    volume: dict[str, Any] = {
        "orientation": orientation,
        "pixel_spacing_mm": tuple(map(float, headers[0].PixelSpacing)),
        "source_shape": (headers[0].Rows, headers[0].Columns),
        "stored_size": 512,
    }
    with pytest.raises(AffineError) as raised:
        volume_affine(positions, **volume)
    assert raised.value.reason is NoAffine.SPACING_VARIES
    affine = volume_affine(positions[-6:], **volume)
    step = affine[:3, 2]
    tilt = np.degrees(np.arccos(step @ normal / np.linalg.norm(step)))
    assert tilt == pytest.approx(abs(float(headers[0].GantryDetectorTilt)), abs=0.05)


@pytest.fixture(scope="module")
def nifti(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The head phantom as dcm2niix converts it."""
    nibabel = pytest.importorskip("nibabel", reason="no nibabel: pip install -e '.[dev]'")
    program = shutil.which("dcm2niix")
    if program is None:
        pytest.skip("no dcm2niix: affines are not compared with it (apt-get install dcm2niix)")
    folder = tmp_path_factory.mktemp("nifti")
    source = real_data / "head_ct" / "philips_ingenuity" / "S2010"
    subprocess.run(
        [program, "-z", "n", "-b", "n", "-f", "head", "-o", folder, source],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return nibabel.load(folder / "head.nii")


@pytest.mark.parametrize("size", [512, 256])
def test_voxels_are_where_dcm2niix_puts_them(nifti: Any, real_data: Path, tmp_path: Path, size: int) -> None:
    """dcm2niix reverses the rows: voxels are compared by their position in the patient, not by their indices."""
    source = real_data / "head_ct" / "philips_ingenuity" / "S2010"
    build(
        source,
        tmp_path / "hu.zarr",
        Spec(size=size, store="hu", layout="folder"),
        allow=Allowances(unlabelled=True),
        workers=0,
    )
    dataset = open_dataset(tmp_path / "hu.zarr")
    assert len(dataset.series) == 1 and len(dataset) == 28
    affine = dataset.affine(0)
    assert affine is not None and dataset.affine_problem(0) is None
    np.testing.assert_array_equal(dataset.affine(0, ras=True), to_ras(affine))
    stored = dataset.volume(series_row=0)[:, 0]  # (z, y, x)
    z, y, x = np.indices(stored.shape).reshape(3, -1)
    in_nifti = np.linalg.solve(nifti.affine, to_ras(affine)) @ np.stack([x, y, z, np.ones_like(x)])
    values = np.asanyarray(nifti.dataobj)
    if size == 512:
        indices = np.rint(in_nifti[:3]).astype(int)
        assert len(np.unique(np.ravel_multi_index(indices, values.shape))) == values.size
        apart = nifti.affine[:3, :3] @ (in_nifti[:3] - indices)
        assert np.abs(apart).max() < 1e-3  # mm
        np.testing.assert_array_equal(np.clip(values[tuple(indices)], MIN_HU, MAX_HU).reshape(stored.shape), stored)
    else:  # each stored voxel is the mean of four, around the corner that they share
        low = np.floor(in_nifti[:3] + 1e-3).astype(int)
        assert np.abs(in_nifti[:2] - low[:2] - 0.5).max() < 1e-3
        four = [values[low[0] + i, low[1] + j, np.rint(in_nifti[2]).astype(int)] for i in (0, 1) for j in (0, 1)]
        mean = np.clip(four, MIN_HU, MAX_HU).mean(axis=0)
        assert np.abs(mean - stored.ravel()).max() <= 0.5


def test_a_dataset_says_why_a_volume_has_no_affine(dataset_path: Path) -> None:
    dataset = open_dataset(dataset_path)
    problems = [dataset.affine_problem(row) for row in range(len(dataset.series))]
    for row, problem in enumerate(problems):
        affine = dataset.affine(row)
        assert (affine is None) == (problem is not None)
        if affine is None:
            assert problem is not None and problem.reason in set(NoAffine)
        else:
            last = np.flatnonzero(dataset.slices["series_row"].to_numpy() == row)[-1]
            place = affine @ [0, 0, len(dataset.volume(series_row=row)) - 1, 1]
            line = dataset.slices.slice(int(last), 1).to_pylist()[0]
            assert abs(place[2] - line["position_z_mm"]) < 0.5
    assert any(problem is None for problem in problems)
    with pytest.raises(KeyError, match="no series_row 99"):
        dataset.affine(99)
