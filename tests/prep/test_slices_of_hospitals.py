"""Which images are slices in HU: image types, planes, rescale types, burned-in text, and a look at the middle slice."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pyarrow as pa
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.errors import Reason
from ich_prep.scans import render_file
from ich_prep.sources import FolderSource
from ich_prep.stages.rules import apply_rules
from ich_prep.stages.scan import SCHEMA, scan_file
from ich_prep.stages.units import looks_like_hu

SliceBytes = Callable[..., bytes]

ANYTHING = Allowances(unlabelled=True, missing_images=True, max_quarantined=1.0)


def line_of(data: bytes, folder: Path) -> dict[str, Any]:
    (folder / "slice").write_bytes(data)
    return scan_file(FolderSource(folder), b"slice", b"slice")


def head(offset: float = 0.0, slope: float = 1.0) -> NDArray[np.int16]:
    """The stored values of a disc of brain in a skull, in air: HU if intercept is 0 and slope 1."""
    y, x = np.mgrid[-32:32, -32:32]
    radius = np.hypot(y, x)
    hu = np.interp(radius, [0, 22, 23, 25, 26, 27, 29, 64], [25, 40, 900, 900, 45, 40, -1000, -1000])
    hu += np.random.default_rng(1).normal(0, 4, hu.shape)
    return np.rint(hu * slope + offset).astype(np.int16)


# --- image types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [[*pair, "AXIAL"] for pair in product(("ORIGINAL", "DERIVED"), ("PRIMARY", "SECONDARY"))], ids="-".join
)
@pytest.mark.parametrize("lossy", [None, "00", "01"])
def test_every_axial_image_is_a_slice(
    kind: list[str], lossy: str | None, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    line = line_of(slice_bytes(ImageType=kind, LossyImageCompression=lossy), tmp_path)
    assert (line.get("reason"), line.get("flags")) == (None, None)


@pytest.mark.parametrize(
    "words", [["MPR"], ["REFORMATTED"], ["CT_SOM5 MPR"], ["AXIAL", "MPR"], ["AXIAL", "CSA MPR", "THICK"]], ids="-".join
)
def test_an_axial_reformat_is_kept_and_flagged(words: list[str], slice_bytes: SliceBytes, tmp_path: Path) -> None:
    line = line_of(slice_bytes(ImageType=["DERIVED", "SECONDARY", *words]), tmp_path)
    assert (line.get("reason"), line["flags"]) == (None, ["reformatted"])


@pytest.mark.parametrize(
    "words",
    [["MIP"], ["AXIAL", "MIP"], ["CT_SOM5 MIP"], ["MINIP"], ["MIN_IP"], ["PROJECTION IMAGE"], ["VRT"], ["SSD"], ["3D"],
     ["AXIAL", "VOLUME RENDERING"], ["SCREEN SAVE"], ["DOSE_INFO"], ["AXIAL", "SCREEN_SAVE"]],
    ids="-".join,
)  # fmt: skip
def test_a_projection_rendering_or_screen_is_derived(words: list[str], slice_bytes: SliceBytes, tmp_path: Path) -> None:
    for first in ("ORIGINAL", "DERIVED"):
        line = line_of(slice_bytes(ImageType=[first, "SECONDARY", *words]), tmp_path)
        assert line["reason"] == Reason.DERIVED
    assert Reason.DERIVED.is_rule and not Reason.DERIVED.is_damage


def scanned(folder: Path, *files: bytes) -> pa.Table:
    return pa.Table.from_pylist([line_of(data, folder) for data in files], SCHEMA)


def test_original_narrows(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    kinds: list[tuple[Any, Any]] = [
        (None, None), (["ORIGINAL", "PRIMARY", "AXIAL"], None), (["DERIVED", "PRIMARY", "AXIAL"], "01"),
        (["ORIGINAL", "SECONDARY", "AXIAL"], None), (["DERIVED", "PRIMARY", "AXIAL"], None),
        (["DERIVED", "SECONDARY", "AXIAL"], "01"), (["ORIGINAL", "PRIMARY", "AXIAL", "MPR"], None),
    ]  # fmt: skip
    files = [slice_bytes(ImageType=kind, LossyImageCompression=lossy) for kind, lossy in kinds]
    table = scanned(tmp_path, *files)
    assert apply_rules(table, Spec()).equals(table)
    reasons = apply_rules(table, Spec(image_types="original"))["reason"].to_pylist()
    assert reasons == [None] * 4 + ["filtered"] * 3
    assert not Reason.FILTERED.is_damage and not Reason.FILTERED.is_rule


def test_burned_in_text_needs_an_option(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    table = scanned(tmp_path, *(slice_bytes(BurnedInAnnotation=text) for text in ("YES", "NO", None)))
    assert apply_rules(table, Spec())["reason"].to_pylist() == ["burned_in", None, None]
    allowed = apply_rules(table, Spec(allow_burned_in=True))
    assert allowed["reason"].null_count == 3
    assert allowed["flags"].to_pylist() == [["burned_in"], None, None]


# --- planes, excess bytes, frames ------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0, 20, 44.9, 45.1, 90, 135.1, 180, -44.9, -60])
def test_a_steep_slice_is_not_axial(degrees: float, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    angle = math.radians(degrees)
    cosines = ["1", "0", "0", "0", f"{math.cos(angle):.8f}", f"{math.sin(angle):.8f}"]
    line = line_of(slice_bytes(ImageOrientationPatient=cosines), tmp_path)
    is_steep = 45 < abs(degrees) < 135 or degrees == -60
    assert line.get("reason") == (Reason.NOT_AXIAL if is_steep else None)


@pytest.mark.parametrize("orientation", [None, ["1", "0"], ["0"] * 6, ["1", "0", "0", "1", "0", "0"]])
def test_without_an_orientation_a_slice_is_taken_as_axial(
    orientation: list[str] | None, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    line = line_of(slice_bytes(ImageOrientationPatient=orientation), tmp_path)
    assert (line.get("reason"), line["flags"]) == (None, ["no_orientation"])
    assert line["orientation"] == [1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("excess", [2, 6, 22])
def test_bytes_behind_the_last_row_are_ignored(excess: int, slice_bytes: SliceBytes, tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.int16).reshape(3, 4)
    line = line_of(slice_bytes(pixels, PixelData=pixels.tobytes() + bytes(excess)), tmp_path)
    assert (line.get("reason"), line["flags"]) == (None, ["excess_bytes"])
    line = line_of(slice_bytes(pixels, PixelData=pixels.tobytes() + bytes(24)), tmp_path)
    assert line["reason"] == Reason.SIZE_MISMATCH


def test_an_enhanced_object_names_the_way_out(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    line = line_of(slice_bytes(SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1", NumberOfFrames="30"), tmp_path)
    assert line["reason"] == Reason.MULTI_FRAME
    assert "30 frames" in line["detail"] and "emf2sf" in line["detail"]


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_head_looks_like_hu_and_other_units_do_not(seed: int) -> None:
    hu = head().astype(float) + np.random.default_rng(seed).normal(0, 3, (64, 64))
    padding = np.hypot(*np.mgrid[-32:32, -32:32]) > 31.5
    assert looks_like_hu(hu)
    assert looks_like_hu(np.where(padding, -2000, hu), padding)
    for other in (hu + 1024, hu - 300, hu * 0.05, hu * 0, np.abs(hu), np.full_like(hu, 30.0), hu + 1000):
        assert not looks_like_hu(other)
        assert not looks_like_hu(np.where(padding, -2000, other), padding)
    assert not looks_like_hu(np.where(padding, -2000, hu + 1024))


def tree_of(folder: Path, make: SliceBytes, kinds: dict[str, tuple[NDArray[np.int16], dict[str, Any]]]) -> Path:
    for number, (name, (pixels, attributes)) in enumerate(kinds.items()):
        (folder / name).mkdir(parents=True)
        for index in range(5):
            (folder / name / f"{index}.dcm").write_bytes(
                make(
                    pixels,
                    SOPInstanceUID=f"2.25.{number}.{index}",
                    SeriesInstanceUID=f"2.25.{number}",
                    StudyInstanceUID=f"2.26.{number}",
                    PatientID=f"p{number}",
                    RescaleIntercept="0",
                    ImagePositionPatient=["0", "0", str(5 * index)],
                    **attributes,
                )
            )
    return folder


def test_series_of_other_units_leave_whole(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    src = tree_of(
        tmp_path / "src",
        slice_bytes,
        {
            "stated": (head(), {"RescaleType": "HU"}),
            "spelt": (head(), {"RescaleType": "Hounsfield Units"}),
            "iodine": (head(slope=0.05), {"RescaleType": "MGML"}),
            "iodine2": (head(), {"RescaleType": "mg/ml"}),
            "number": (head(), {"RescaleType": "Z_EFF"}),
            "right": (head(), {"RescaleType": "US"}),
            "wrong": (head(offset=1024), {"RescaleType": "US"}),
            "modified": (head(), {"RescaleType": "HU_MOD"}),
            "words": (head(slope=0.1), {"RescaleType": "iodine map"}),
        },
    )
    out = tmp_path / "data.zarr"
    build(src, out, Spec(size=64, layout="folder"), workers=0, allow=ANYTHING)
    dataset = open_dataset(out)
    flags = {line["series_instance_uid"]: line["flags"] for line in dataset.slices.to_pylist()}
    unknown = ["other_rescale_type"]
    assert {uid: [flag for flag in found if flag in unknown] for uid, found in flags.items()} == {
        "2.25.0": [], "2.25.1": [], "2.25.5": unknown, "2.25.7": unknown,
    }  # fmt: skip
    quarantine = dataset.read_table("quarantine").to_pylist()
    assert {(line["path"].split("/")[0], line["reason"]) for line in quarantine} == {
        (name, "not_hu") for name in ("iodine", "iodine2", "number", "wrong", "words")
    }
    assert len(quarantine) == 25
    assert Reason.NOT_HU.is_rule and not Reason.NOT_HU.is_damage

    widened = tmp_path / "wide.zarr"
    build(src, widened, Spec(size=64, layout="folder", rescale_types=("us", "MG/ML")), workers=0, allow=ANYTHING)
    kept = set(open_dataset(widened).slices["series_instance_uid"].to_pylist())
    assert kept == {"2.25.0", "2.25.1", "2.25.2", "2.25.3", "2.25.5", "2.25.6", "2.25.7"}


def test_a_series_without_positions_is_ordered_by_slice_location(slice_bytes: SliceBytes, tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for index, location in enumerate((3.5, -2, 10)):
        (src / f"{index}.dcm").write_bytes(
            slice_bytes(SOPInstanceUID=f"2.25.{index}", ImagePositionPatient=None, SliceLocation=f"{location:g}")
        )
    out = tmp_path / "data.zarr"
    build(src, out, Spec(size=16, layout="folder"), workers=0, allow=ANYTHING)
    slices = open_dataset(out).slices
    assert slices["sop_instance_uid"].to_pylist() == ["2.25.1", "2.25.0", "2.25.2"]
    assert slices["position_mm"].to_pylist() == [None] * 3
    assert slices["slice_spacing_mm"].to_pylist() == [5.5, 6.5, 6.5]
    assert all({"direction_unknown", "no_position"} <= set(flags) for flags in slices["flags"].to_pylist())


def test_instance_numbers_that_differ_in_the_last_of_many_digits_order_a_series(
    slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for index, number in enumerate((20191104123456003, 20191104123456001, 20191104123456002)):
        data = slice_bytes(SOPInstanceUID=f"2.25.{index}", ImagePositionPatient=None, InstanceNumber="1" * 12)
        at = data.index(b"\x20\0\x13\0IS\x0c\0") + 6
        text = f"{number} ".encode()
        (src / f"{index}.dcm").write_bytes(data[:at] + len(text).to_bytes(2, "little") + text + data[at + 14 :])
    out = tmp_path / "data.zarr"
    build(src, out, Spec(size=16, layout="folder"), workers=0, allow=ANYTHING)
    assert open_dataset(out).slices["sop_instance_uid"].to_pylist() == ["2.25.1", "2.25.2", "2.25.0"]


@pytest.mark.parametrize("ending", [b"\xff\xd9\xff", b"\xff\xff\xd9", b"\xff\xd9\0", b"\xff\xd9\xff\xff"])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80"])
def test_frames_that_end_in_fill_bytes_are_decoded(
    syntax: str, ending: bytes, slice_bytes: SliceBytes, tmp_path: Path
) -> None:
    pixels = head().view(np.uint16)
    is_ls = syntax.endswith("80")
    frame = (
        imagecodecs.jpegls_encode(pixels)
        if is_ls
        else imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=16)
    )
    assert frame.endswith(b"\xff\xd9")
    dataset = pydicom.dcmread(io.BytesIO(slice_bytes(head(), RescaleIntercept="0")))
    dataset.PixelData = encapsulate([frame[:-2] + ending])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.save_as(tmp_path / "slice.dcm")
    hu = render_file(tmp_path / "slice.dcm", Spec(size=64, store="hu", layout="folder"))
    np.testing.assert_array_equal(hu[0], head())
