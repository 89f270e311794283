"""Exports: the voxels and affines of NIfTI files, pictures and arrays, the tables beside them, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.dataset import Dataset, open_dataset
from ich_prep.dataset.predictions import read_predictions
from ich_prep.dataset.selection import choose_volumes
from ich_prep.dataset.spec import Spec
from ich_prep.dataset.windows import MAX_HU, MIN_HU, window_codes
from ich_prep.errors import UsageError
from ich_prep.export import export
from tests.support.hospital import built, ct_bytes, write_files
from tests.support.sealing import replace_table

nibabel = pytest.importorskip("nibabel", reason="no nibabel: pip install -e '.[dev]'")
PREP = str(Path(sys.executable).with_name("ich-prep"))


@pytest.fixture(scope="module")
def hu_path(phantom_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hu") / "hu.zarr"
    build(phantom_tree, out, Spec(size=64, store="hu", slices_per_shard=16), workers=0)
    return out


@pytest.fixture(scope="module")
def hu(hu_path: Path) -> Dataset:
    return open_dataset(hu_path)


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def with_affine(dataset: Dataset) -> list[int]:
    rows = range(len(dataset.series))
    return [row for row in rows if dataset.affine(row) is not None]


def test_nifti_holds_the_stored_hu_and_the_affine_of_the_grid(hu: Dataset, tmp_path: Path) -> None:
    chosen = with_affine(hu)
    done = export(hu, chosen, tmp_path / "out", form="nifti")
    assert done.volumes == len(chosen) >= 2 and done.resampled == ()
    for row in chosen:
        image = nibabel.load(tmp_path / "out" / f"series_{row:06d}.nii.gz")
        assert image.get_data_dtype() == np.int16
        np.testing.assert_array_equal(np.asanyarray(image.dataobj).T, hu.volume(series_row=row)[:, 0])
        np.testing.assert_allclose(image.affine, hu.affine(row, ras=True), atol=1e-4)
        assert image.header.get_sform(coded=True)[1] == 1
        tilt = abs(hu.series["tilt_degrees"][row].as_py() or 0)
        assert image.header.get_qform(coded=True)[1] == (0 if tilt > 0.1 else 1)  # a quaternion has no shear


def test_labels_and_affines_are_beside_them(hu: Dataset, tmp_path: Path) -> None:
    chosen = with_affine(hu)[:2]
    export(hu, chosen, tmp_path / "out", form="nifti")
    volumes = lines_of(tmp_path / "out" / "volumes.csv")
    assert [int(line["series_row"]) for line in volumes] == chosen
    written = [float(volumes[0][f"ras_{i}{j}"]) for i in range(3) for j in range(4)]
    affine = hu.affine(chosen[0], ras=True)
    assert affine is not None and written == affine[:3].ravel().tolist()
    slices = hu.slices.to_pylist()
    lines = lines_of(tmp_path / "out" / "labels.csv")
    assert len(lines) == sum(slice_["series_row"] in chosen for slice_ in slices)
    for line in lines:
        slice_ = slices[int(line["row"])]
        assert line["sop_instance_uid"] == slice_["sop_instance_uid"]
        assert line["file"] == f"series_{slice_['series_row']:06d}.nii.gz"
        assert int(line["z"]) == slice_["slice_index"]
        for name in hu.classes:
            assert line[name] == ("" if slice_[name] is None else str(slice_[name]))


def test_pictures_are_the_window_codes_of_either_store(hu: Dataset, dataset_path: Path, tmp_path: Path) -> None:
    for name, dataset in (("hu", hu), ("windows", open_dataset(dataset_path))):
        export(dataset, [0], tmp_path / name, form="png")
    for window in hu.spec.windows:
        expected = window_codes(hu.volume(series_row=0)[:, 0], window)
        for index, codes in enumerate(expected):
            for name in ("hu", "windows"):
                picture = tmp_path / name / "series_000000" / window.name / f"{index:03d}.png"
                np.testing.assert_array_equal(cv2.imread(str(picture), cv2.IMREAD_UNCHANGED), codes)


def test_arrays_are_as_stored(dataset_path: Path, tmp_path: Path) -> None:
    dataset = open_dataset(dataset_path)
    export(dataset, [1, 2], tmp_path / "out", form="npy")
    for row in (1, 2):
        stored = np.load(tmp_path / "out" / f"series_{row:06d}.npy")
        np.testing.assert_array_equal(stored, dataset.volume(series_row=row))


def predictions_of(run: Path, dataset: Dataset, rows: list[int]) -> Path:
    run.mkdir()
    table = dataset.slices.select(["row", "sop_instance_uid"]).take(pa.array(rows))
    for j, name in enumerate(dataset.classes):
        values = np.linspace(0.1, 0.9, len(rows), dtype=np.float32) * (j + 1) / len(dataset.classes)
        table = table.append_column(f"p_{name}", pa.array(values))
    pq.write_table(table, run / "predictions.parquet")
    return run


def test_predictions_of_a_run_are_written_too(hu: Dataset, tmp_path: Path) -> None:
    run = predictions_of(tmp_path / "run", hu, [3, 0, 5])
    predictions = read_predictions(run, hu)
    assert predictions.shape == (len(hu), len(hu.classes)) and np.isfinite(predictions).all(axis=1).sum() == 3
    export(hu, [0], tmp_path / "out", form="npy", predictions=predictions)
    lines = lines_of(tmp_path / "out" / "predictions.csv")
    assert [int(line["row"]) for line in lines] == [0, 3, 5]
    for line in lines:
        values = [np.float32(line[f"p_{name}"]) for name in hu.classes]
        np.testing.assert_array_equal(values, predictions[int(line["row"])])


def test_predictions_of_another_dataset_are_refused(hu: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no predictions\.parquet"):
        read_predictions(tmp_path, hu)
    run = predictions_of(tmp_path / "run", hu, [0, 1])
    table = pq.read_table(run / "predictions.parquet")
    swapped = table.set_column(0, "row", pa.array([1, 0], pa.int64()))
    pq.write_table(swapped, run / "predictions.parquet")
    with pytest.raises(UsageError, match="other slices"):
        read_predictions(run, hu)
    pq.write_table(table.drop_columns(["p_any"]), run / "predictions.parquet")
    with pytest.raises(UsageError, match="lacks the columns p_any"):
        read_predictions(run, hu)


def without_position_of(source: Path, copy: Path, moved: dict[int, float | None]) -> Dataset:
    """A copy of a dataset in which the z of some rows is moved by mm, or missing."""
    shutil.copytree(source, copy)
    path = copy / "labels" / "slices.parquet"
    table = pq.read_table(path)
    z = table["position_z_mm"].to_pylist()
    for row, by in moved.items():
        z[row] = None if by is None else z[row] + by
    place = table.schema.get_field_index("position_z_mm")
    replace_table(copy, "slices", table.set_column(place, "position_z_mm", pa.array(z, pa.float64())))
    return open_dataset(copy)


def test_a_volume_without_an_affine_is_refused_or_resampled(hu: Dataset, hu_path: Path, tmp_path: Path) -> None:
    good = next(row for row in with_affine(hu) if abs(hu.series["tilt_degrees"][row].as_py()) < 0.1)
    first, slices = hu.series["first_row"][good].as_py(), hu.series["n_slices"][good].as_py()
    spacing = hu.series["slice_spacing_mm"][good].as_py()
    uneven = without_position_of(hu_path, tmp_path / "uneven.zarr", {first + slices - 1: 2 * spacing})
    with pytest.raises(UsageError, match=rf"series_row {good}: spacing_varies.*[\s\S]*--resample") as refused:
        export(uneven, [good], tmp_path / "out", form="nifti")
    assert len(str(refused.value)) < 2000 and not (tmp_path / "out").exists()
    done = export(uneven, [good], tmp_path / "out", form="nifti", resample=True)
    assert done.resampled == (good,)
    image = nibabel.load(tmp_path / "out" / f"series_{good:06d}.nii.gz")
    assert image.shape[2] == slices + 2
    np.testing.assert_array_equal(np.asanyarray(image.dataobj).T[:2], hu.volume(series_row=good)[:2, 0])
    (last,) = [line for line in lines_of(tmp_path / "out" / "labels.csv") if int(line["row"]) == first + slices - 1]
    assert float(last["z"]) == pytest.approx(slices + 1, abs=0.01)

    lost = without_position_of(hu_path, tmp_path / "lost.zarr", {first + 1: None})
    with pytest.raises(UsageError, match="no_position") as refused:
        export(lost, [good], tmp_path / "lost", form="nifti", resample=True)
    assert "--resample" not in str(refused.value)


def test_windows_are_not_nifti(dataset_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stores windows, from which HU cannot be recovered"):
        export(open_dataset(dataset_path), [0], tmp_path / "out", form="nifti", resample=True)


def test_a_folder_with_files_is_left_alone(hu: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a new or empty folder"):
        export(hu, [0], tmp_path, form="npy")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_dataset_is_not_written_to(hu: Dataset) -> None:
    for inside in (hu.path / "export", hu.path / "labels" / ".." / "export"):
        with pytest.raises(UsageError, match="inside the dataset"):
            export(hu, [0], inside, form="npy")
        assert not inside.exists()


def test_names_from_elsewhere_lead_nowhere_and_are_no_formulas(hu_path: Path, tmp_path: Path) -> None:
    """A dataset may come from someone else: its window's name as a path, its UIDs as formulas."""
    copy = Path(shutil.copytree(hu_path, tmp_path / "copy.zarr"))
    root = json.loads((copy / "zarr.json").read_bytes())
    root["attributes"]["ich"]["spec"]["windows"][0]["name"] = "../../../evil"
    (copy / "zarr.json").write_text(json.dumps(root))
    path = copy / "labels" / "slices.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index("sop_instance_uid")
    replace_table(copy, "slices", table.set_column(place, "sop_instance_uid", pa.array(["=1+1"] * len(table))))
    export(open_dataset(copy), [0], tmp_path / "a" / "b" / "out", form="png")
    assert {p.name for p in (tmp_path / "a" / "b" / "out" / "series_000000").iterdir()} == {
        "window_0",
        "subdural",
        "bone",
    }
    assert not list(tmp_path.rglob("evil"))
    assert {line["sop_instance_uid"] for line in lines_of(tmp_path / "a" / "b" / "out" / "labels.csv")} == {"'=1+1"}


def test_volumes_are_chosen_by_number_or_filter(hu: Dataset) -> None:
    assert choose_volumes(hu, series=[2, 0, 2]) == [0, 2]
    rows = hu.where("any == 1")
    assert choose_volumes(hu, where="any == 1") == sorted({hu.slices["series_row"][int(row)].as_py() for row in rows})
    for wrong in ({}, {"series": [0], "where": "any == 1"}, {"series": [999]}, {"where": "fold == 99"}):
        with pytest.raises(UsageError):
            choose_volumes(hu, **wrong)  # type: ignore[arg-type]


def test_the_command_says_what_it_wrote(hu_path: Path, tmp_path: Path) -> None:
    words = [PREP, "export", hu_path, "--where", "any == 1", "--out", tmp_path / "out", "--as"]
    done = subprocess.run([*words, "npy"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{len(choose_volumes(open_dataset(hu_path), where='any == 1'))} volumes with ")
    refused = subprocess.run([*words, "jpeg"], capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 2 and "Expected --as nifti, png, npy" in refused.stderr


def real(source: Path, out: Path) -> Dataset:
    spec = Spec(size=512, store="hu", layout="folder")
    build(source, out, spec, allow=Allowances(unlabelled=True, max_quarantined=1.0), workers=0)
    return open_dataset(out)


def test_nifti_agrees_with_dcm2niix(real_data: Path, tmp_path: Path) -> None:
    program = shutil.which("dcm2niix")
    if program is None:
        pytest.skip("no dcm2niix (apt-get install dcm2niix)")
    source = real_data / "head_ct" / "philips_ingenuity" / "S2010"
    words = [program, "-z", "n", "-b", "n", "-f", "head", "-o", str(tmp_path), str(source)]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    theirs: Any = nibabel.load(tmp_path / "head.nii")
    export(real(source, tmp_path / "hu.zarr"), [0], tmp_path / "out", form="nifti")
    ours: Any = nibabel.as_closest_canonical(nibabel.load(tmp_path / "out" / "series_000000.nii.gz"))
    theirs = nibabel.as_closest_canonical(theirs)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-3)
    np.testing.assert_array_equal(np.asanyarray(ours.dataobj), np.clip(np.asanyarray(theirs.dataobj), MIN_HU, MAX_HU))


def test_a_sphere_is_round_in_all_three_planes(tmp_path: Path) -> None:
    """Painted into files whose pixels are not square and whose slices are thick, by the equation of PS3.3 C.7.6.2.1.1."""
    rows, columns, count, spacing, apart = 48, 40, 25, (1.5, 2.0), 3.0
    center, radius = np.array([4.0, -7.0, 30.0]), 24.0
    along_row, along_column = np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
    y, x = np.indices((rows, columns))
    files = {}
    for k in range(count):
        origin = np.array([-38.0, -40.0, apart * k - 6])
        place = origin + x[..., None] * spacing[1] * along_row + y[..., None] * spacing[0] * along_column
        inside = np.linalg.norm(place - center, axis=-1) < radius
        pixels = np.where(inside, 1024 + 60, 0).astype("<i2")
        pixels[0, :4] = 100, 200, 300, k  # no two slices alike
        files[f"{k:02d}.dcm"] = ct_bytes(
            k + 1, Rows=rows, Columns=columns, PixelSpacing=list(spacing), ImagePositionPatient=origin.tolist(),
            PixelData=pixels.tobytes(),
        )  # fmt: skip
    dataset = built(
        write_files(tmp_path / "src", files), tmp_path / "d.zarr", spec=Spec(size=96, store="hu", layout="folder")
    )
    export(dataset, [0], tmp_path / "out", form="nifti")
    image: Any = nibabel.load(tmp_path / "out" / "series_000000.nii.gz")
    inside = np.argwhere(np.asanyarray(image.dataobj) > (60 - 1024) / 2)
    millimetres = nibabel.affines.apply_affine(image.affine, inside)
    expected = center * [-1, -1, 1]  # LPS to RAS
    np.testing.assert_allclose(millimetres.mean(axis=0), expected, atol=0.3)
    voxel = np.abs(image.affine[:3, :3]).sum(axis=1)
    np.testing.assert_allclose(np.ptp(millimetres, axis=0) + voxel, 2 * radius, atol=apart + 0.5)
    distances = np.linalg.norm(millimetres - expected, axis=1)
    assert distances.max() < radius + np.linalg.norm(voxel) / 2
    assert len(inside) * abs(np.linalg.det(image.affine[:3, :3])) == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.03)


def test_a_real_tilted_volume_with_mixed_spacing_is_resampled(real_data: Path, tmp_path: Path) -> None:
    dataset = real(real_data / "head_ct" / "ge_hispeed", tmp_path / "hu.zarr")
    (row,) = [row for row in range(len(dataset.series)) if dataset.affine(row) is None]
    export(dataset, [row], tmp_path / "out", form="nifti", resample=True)
    image: Any = nibabel.load(tmp_path / "out" / f"series_{row:06d}.nii.gz")
    axes = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-5)  # the tilt is undone: a rotation, no shear
    values = np.asanyarray(image.dataobj)
    first = dataset.volume(series_row=row)[0, 0]
    assert values.min() >= MIN_HU and values.max() <= MAX_HU
    assert (values[..., 0] > -500).sum() == pytest.approx((first > -500).sum(), rel=0.02)
