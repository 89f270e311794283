"""The phantom: trees, headers, labels and defects, checked with pydicom and by the pixels."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import config
from pydicom.dataset import Dataset

from ich_prep.dataset.classes import RSNA_CLASSES, SUBTYPES
from ich_prep.errors import UsageError
from ich_prep.phantom import DEFECTS, LAYOUTS, PhantomSummary, synthesize
from ich_prep.phantom.bleeds import MIN_AREA_MM2
from ich_prep.phantom.series import BLOCK, Slice, draw_patient, draw_scan, draw_slices, place
from ich_prep.phantom.trees import READER_FINDINGS, SECOND_SERIES

SIZE = 64
SERIES = 10

RSNA_KEYWORDS = {
    "SOPInstanceUID",
    "Modality",
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "StudyID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
    "PixelSpacing",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "WindowCenter",
    "WindowWidth",
    "RescaleIntercept",
    "RescaleSlope",
    "PixelData",
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A clean tree of each layout."""
    made = {}
    for layout in LAYOUTS:
        made[layout] = tmp_path_factory.mktemp("phantom") / layout
        synthesize(made[layout], series=SERIES, size=SIZE, layout=layout)
    return made


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PhantomSummary]]:
    """A small tree of each layout with all its defects."""
    made = {}
    for layout in LAYOUTS:
        out = tmp_path_factory.mktemp("damaged") / layout
        made[layout] = out, synthesize(out, series=1, size=SIZE, layout=layout, defects=True)
    return made


def read(path: Path) -> Dataset:
    # The UIDs of anonymised archives are not valid UIDs: pydicom warns about each.
    with config.disable_value_validation():
        dataset = pydicom.dcmread(path)
        dataset.decode()
    return dataset


def hu(dataset: Dataset) -> NDArray[np.float64]:
    return dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)


def lines(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()
    }


@cache
def drawn(seed: int, index: int, *, size: int = 128) -> tuple[tuple[Slice, ...], tuple[str, ...]]:
    where = place(seed, index, second_series=3)
    head, bleeds = draw_patient(seed, where)
    slices = tuple(draw_slices(seed, where, draw_scan(seed, where, size=size), head, bleeds))
    return slices, where.kinds


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_arguments_write_equal_bytes(layout: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        synthesize(tmp_path / name, series=1, seed=3, size=32, layout=layout, defects=True)
    synthesize(tmp_path / "third", series=1, seed=4, size=32, layout=layout)
    assert digests(tmp_path / "one") == digests(tmp_path / "other")
    slices = [set(digests(next((tmp_path / tree).glob("**/*.dcm")).parent).values()) for tree in ("one", "third")]
    assert not (slices[0] & slices[1]) - {sha256(b"").hexdigest()}


def test_workers_change_no_byte(tmp_path: Path) -> None:
    for workers in (0, 2):
        synthesize(tmp_path / str(workers), series=3, size=32, workers=workers)
    assert digests(tmp_path / "0") == digests(tmp_path / "2")


def test_a_series_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    synthesize(tmp_path / "two", series=2, size=32)
    synthesize(tmp_path / "three", series=3, size=32)
    few, many = digests(tmp_path / "two"), digests(tmp_path / "three")
    assert all(many[name] == digest for name, digest in few.items() if name.endswith(".dcm"))


@given(seed=st.integers(0, 2**32), block=st.integers(0, 50), second_series=st.integers(1, 9))
def test_a_block_of_series_has_every_trait_evenly(seed: int, block: int, second_series: int) -> None:
    places = [place(seed, block * BLOCK + k, second_series=second_series) for k in range(BLOCK)]
    planted = Counter(kind for where in places for kind in where.kinds)
    assert planted == dict.fromkeys(SUBTYPES, 5)
    assert sum(not where.kinds for where in places) == 5
    assert sum(where.follows for where in places) == second_series
    patients = [where.patient for where in places]
    assert patients == sorted(patients)
    assert len(set(patients)) == BLOCK - second_series
    assert max(patients) < place(seed, (block + 1) * BLOCK, second_series=second_series).patient
    assert len({where.patient for where in places if where.test}) == 2
    assert not places[0].test
    for where in places:
        assert where.patient == place(seed, where.first_index, second_series=second_series).patient


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 3), index=st.integers(0, 19))
def test_labels_follow_from_the_paint(seed: int, index: int) -> None:
    slices, kinds = drawn(seed, index)
    for one in slices:
        assert one.labels == (*(int(kind in one.painted_mm2) for kind in SUBTYPES), int(bool(one.painted_mm2)))
        assert set(one.painted_mm2) <= set(kinds)
        assert all(area >= MIN_AREA_MM2 for area in one.painted_mm2.values())
    for kind in kinds:
        positive = sum(kind in one.painted_mm2 for one in slices)
        assert 0 < positive < len(slices), f"{kind} in {positive} of {len(slices)} slices"


def test_paint_is_blood_and_nothing_else_changes() -> None:
    where = next(w for w in (place(0, k, second_series=3) for k in range(BLOCK)) if w.kinds == ("epidural",))
    scan = draw_scan(0, where, size=128)
    head, bleeds = draw_patient(0, where)
    with_bleed = draw_slices(0, where, scan, head, bleeds)
    without = draw_slices(0, where, scan, head, ())
    for painted, clean in zip(with_bleed, without, strict=True):
        changed = painted.hu != clean.hu
        assert changed.any() == bool(painted.painted_mm2)
        if changed.any():
            blood = np.median(painted.hu[changed & (clean.hu < 100)])  # where the lens meets bone, both mix
            assert 50 < blood < 85


def test_a_head_has_the_densities_of_a_head() -> None:
    slices, _ = drawn(0, next(k for k in range(BLOCK) if not place(0, k, second_series=3).kinds), size=256)
    middle = slices[len(slices) // 2].hu
    centre = middle[108:148, 100:156]
    assert 5 < np.percentile(centre, 2) + 10 < np.median(centre) < 45
    assert np.percentile(middle[:, 128], 99) > 500  # the skull, front and back
    assert abs(np.median(middle[:20, :20]) + 1000) < 2
    bone = (middle > 500).mean()
    assert 0.02 < bone < 0.15
    assert (slices[-1].hu > 0).mean() < 0.6 * (middle > 0).mean()  # the vertex is smaller


def test_rsna_headers_are_those_of_the_archive(trees: dict[str, Path]) -> None:
    seen: dict[str, Counter[object]] = defaultdict(Counter)
    for path in sorted(trees["rsna"].glob("stage_2_*/*.dcm")):
        dataset = read(path)
        assert {element.keyword for element in dataset} == RSNA_KEYWORDS
        assert path.stem == dataset.SOPInstanceUID
        assert len(dataset.SOPInstanceUID) == 12
        assert dataset.PatientID.startswith("ID_") and len(dataset.PatientID) == 11
        assert dataset.file_meta.MediaStorageSOPInstanceUID != dataset.SOPInstanceUID
        assert dataset.file_meta.MediaStorageSOPInstanceUID.is_valid
        assert dataset.StudyID == ""
        assert len(dataset.PixelData) == 2 * SIZE * SIZE
        outside = dataset.pixel_array[0, 0]
        if dataset.PixelRepresentation:
            assert (dataset.BitsStored, outside) == (16, -2000)
        else:
            assert (dataset.BitsStored, outside) == (12, 0)
        seen["bits"][dataset.BitsStored] += 1
        seen["syntax"][dataset.file_meta.TransferSyntaxUID.name] += 1
        seen["slope"][dataset["RescaleSlope"].value.original_string] += 1
        seen["window"][dataset["WindowCenter"].VM] += 1
        seen["tilted"][dataset.ImageOrientationPatient[5] != 0] += 1
        if dataset["WindowCenter"].VM == 2:
            assert b"00036\\00036" in path.read_bytes()
    assert set(seen["slope"]) == {"1", "1.0", "1.000000"}
    for values in (seen["bits"], seen["syntax"], seen["window"], seen["tilted"]):
        assert len(values) == 2
        assert min(values.values()) > 0.15 * values.total()


def test_rsna_series_have_tilt_mixed_spacing_and_repeated_positions(trees: dict[str, Path]) -> None:
    series: dict[str, list[Dataset]] = defaultdict(list)
    for path in trees["rsna"].glob("stage_2_*/*.dcm"):
        dataset = read(path)
        series[dataset.SeriesInstanceUID].append(dataset)
    mixed = repeated = 0
    for members in series.values():
        orientation = np.array(members[0].ImageOrientationPatient, float)
        normal = np.cross(orientation[:3], orientation[3:])
        positions = np.array([member.ImagePositionPatient for member in members], float)
        heights = positions @ normal
        order = np.argsort(heights)
        steps = np.diff(heights[order])
        again = np.flatnonzero(steps < 0.01)
        repeated += len(again) > 0
        for k in again:
            assert members[order[k]].PixelData != members[order[k + 1]].PixelData
        steps = steps[steps >= 0.01]
        mixed += np.ptp(steps) > 0.1
        assert 2.5 < steps.min() <= steps.max() < 5.6
        # The table moves along z: x and y stay, and the step in z is the step along the normal over cos(tilt).
        assert np.ptp(positions[:, :2], axis=0).max() < 1e-6
        np.testing.assert_allclose(np.diff(positions[order][:, 2]) * normal[2], np.diff(heights[order]), atol=1e-4)
    assert len(series) == SERIES
    assert mixed
    assert repeated


def test_rsna_labels_list_every_train_slice_and_no_test_slice(trees: dict[str, Path]) -> None:
    table = lines(trees["rsna"] / "stage_2_train.csv")
    assert table[0] == ["ID", "Label"]
    names = [line[0].rsplit("_", 1) for line in table[1:]]
    assert [name for _, name in names] == list(RSNA_CLASSES) * (len(names) // 6)
    slices = [key for key, _ in names[::6]]
    files = {path.stem for path in (trees["rsna"] / "stage_2_train").iterdir()}
    assert set(slices) == files
    assert 1 <= len(slices) - len(files) <= 4
    assert slices != sorted(slices)
    values = np.array([int(line[1]) for line in table[1:]]).reshape(-1, 6)
    assert (values[:, :5].any(axis=1) == values[:, 5]).all()
    assert values.any(axis=0).all()
    twice: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for key, value in zip(slices, values.tolist(), strict=True):
        twice[key].add(tuple(value))
    assert all(len(found) == 1 for found in twice.values())

    asked = lines(trees["rsna"] / "stage_2_sample_submission.csv")
    test = {path.stem for path in (trees["rsna"] / "stage_2_test").iterdir()}
    assert test
    assert {line[0].rsplit("_", 1)[0] for line in asked[1:]} == test
    assert {line[1] for line in asked[1:]} == {"0.5"}
    patients = [
        {read(path).PatientID for path in (trees["rsna"] / folder).iterdir()}
        for folder in ("stage_2_train", "stage_2_test")
    ]
    assert not patients[0] & patients[1]


def test_tissue_after_the_rescale(trees: dict[str, Path]) -> None:
    for layout in LAYOUTS:
        path = sorted(trees[layout].rglob("*.dcm"))[7]
        values = hu(read(path))
        assert values.max() > 500
        inside = values[SIZE // 2 - 6 : SIZE // 2 + 6, SIZE // 2 - 4 : SIZE // 2 + 4]
        assert -10 < np.median(inside) < 90
        assert abs(np.median(values[SIZE // 2, 1:4]) + 1000) < 12


def test_folder_tree(trees: dict[str, Path]) -> None:
    table = lines(trees["folder"] / "labels.csv")
    assert table[0] == ["sop_instance_uid", *RSNA_CLASSES]
    listed = {line[0] for line in table[1:]}
    padded = Counter()
    for path in sorted(trees["folder"].rglob("*.dcm")):
        dataset = read(path)
        patient, series, name = path.relative_to(trees["folder"]).parts
        assert patient.startswith("patient_") and series in ("series_1", "series_2")
        assert int(name.removesuffix(".dcm")) == dataset.InstanceNumber
        assert dataset.SOPInstanceUID.is_valid and dataset.SOPInstanceUID.startswith("2.25.")
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert dataset.SOPClassUID.name == "CT Image Storage"
        assert list(dataset.ImageType) == ["ORIGINAL", "PRIMARY", "AXIAL"]
        assert dataset.SOPInstanceUID in listed
        padded["PixelPaddingValue" in dataset] += 1
        if "PixelPaddingValue" in dataset:
            assert dataset.PixelPaddingValue == dataset.pixel_array[0, 0] == -2000
    assert padded.total() == len(listed)
    assert min(padded[True], padded[False]) > 0.3 * padded.total()


def test_cq500_tree_and_reads(trees: dict[str, Path]) -> None:
    root = trees["cq500"]
    table = lines(root / "reads.csv")
    assert table[0] == ["name", "Category", *(f"R{k}:{name}" for k in (1, 2, 3) for name in READER_FINDINGS)]
    subjects = [line[0] for line in table[1:]]
    folders = [path for path in root.iterdir() if path.is_dir()]
    assert sorted(subjects) == sorted(path.name.split()[0].replace("CQ500CT", "CQ500-CT-") for path in folders)
    spellings, uids = set(), set()
    types = Counter()
    for folder in folders:
        short = folder.name.split()[0]
        assert folder.name == f"{short} {short}"
        number = short.removeprefix("CQ500CT")
        for series in (folder / "Unknown Study").iterdir():
            types[series.name] += 1
            first = read(series / "CT000000.dcm")
            assert first.PatientID in (short, f"CQ500-CT-{number}")
            spellings.add(first.PatientID == short)
            assert first.SeriesDescription and first.SliceThickness and first.ConvolutionKernel
            assert first.BitsStored in (14, 16) and first.PixelRepresentation == 1
            uids |= {read(path).SeriesInstanceUID for path in series.iterdir()}
    assert spellings == {True, False}
    assert len(uids) == types.total() == SERIES
    assert sum(len(list((folder / "Unknown Study").iterdir())) == 2 for folder in folders) > 1

    values = np.array([line[2:] for line in table[1:]], int).reshape(len(subjects), 3, len(READER_FINDINGS))
    assert (values[:, :, 0] >= values[:, :, 1:6].max(axis=2)).all()
    readable = dict(zip(("IPH", "IVH", "SDH", "EDH", "SAH"), (1, 2, 3, 4, 5), strict=True))
    short_names = dict(zip(("EDH", "IPH", "IVH", "SAH", "SDH"), SUBTYPES, strict=True))
    agree = []
    for index in range(SERIES):
        where = place(0, index, second_series=SECOND_SERIES["cq500"])
        if not where.follows:
            votes = values[subjects.index(f"CQ500-CT-{where.patient}")].sum(axis=0) >= 2
            agree += [votes[at] == (short_names[name] in where.kinds) for name, at in readable.items()]
    assert np.mean(agree) > 0.95


def test_every_defect_occurs(damaged: dict[str, tuple[Path, PhantomSummary]]) -> None:
    assert damaged["rsna"][1].defects == tuple(DEFECTS)
    for root, summary in damaged.values():
        assert set(summary.defects) <= set(DEFECTS)
        assert summary.files == sum(path.is_file() for path in root.rglob("*"))
        assert summary.slices < summary.files


def test_rsna_defects_match_their_names(damaged: dict[str, tuple[Path, PhantomSummary]]) -> None:
    root = damaged["rsna"][0] / "stage_2_train"
    whole, found = [], Counter()
    for path in root.iterdir():
        content = path.read_bytes()
        found["newline_name"] += "\n" in path.name
        if not content:
            found["zero_length"] += 1
        elif content[128:132] != b"DICM":
            found["not_dicom"] += 1
        else:
            dataset = read(path)
            if len(dataset.get("PixelData", b"")) < 2 * dataset.Rows * dataset.Columns:
                found["size_lie" if len(content) > 2 * SIZE * SIZE else "truncated"] += 1
                continue
            whole.append(dataset)
            found["multi_frame"] += "NumberOfFrames" in dataset
            found["localizer"] += "LOCALIZER" in dataset.get("ImageType", [])
            found["dose_page"] += "SECONDARY" in dataset.get("ImageType", [])
            values = dataset.pixel_array
            found["constant"] += int(values.min() == values.max())
            found["metal"] += int(31_000 < values.max() < 32_000)
            found["noise_tail"] += int(values.min() < -30_000)
            found["odd_size"] += values.shape[-2:] != (SIZE, SIZE)
            found["sign_12bit"] += float(dataset.RescaleIntercept) > -100 if "RescaleIntercept" in dataset else 0
    expected = {"not_dicom": 2, "odd_size": 2, "sign_12bit": 3}
    others = set(DEFECTS) - {"duplicate_file", "identical_patients", "duplicate_labels"}
    assert {name: found[name] for name in others} == {name: expected.get(name, 1) for name in others}
    assert {(image.Rows, image.Columns) for image in whole if (image.Rows, image.Columns) != (SIZE, SIZE)} == {
        (436 * SIZE // 512, 436 * SIZE // 512),
        (638 * SIZE // 512, 490 * SIZE // 512),
    }

    instances = Counter(image.SOPInstanceUID for image in whole)
    assert sorted(instances.values())[-2:] == [1, 2]
    same: dict[bytes, set[tuple[str, str]]] = defaultdict(set)
    for image in whole:
        same[image.PixelData].add((image.PatientID, image.SOPInstanceUID))
    twins = [pair for pair in same.values() if len(pair) > 1]
    assert len(twins) == 1
    table = lines(root.parent / "stage_2_train.csv")[1:]
    labels = {line[0]: line[1] for line in table}
    assert sorted(labels[f"{sop}_any"] for _, sop in twins[0]) == ["0", "1"]
    assert all(len({value for key, value in table if key == name}) == 1 for name in list(labels)[:12])


def test_the_sign_defect_is_undone_by_the_known_formula(damaged: dict[str, tuple[Path, PhantomSummary]]) -> None:
    wrong = []
    for path in (damaged["rsna"][0] / "stage_2_train").glob("*.dcm"):
        if path.stat().st_size > 2 * SIZE * SIZE and path.read_bytes()[128:132] == b"DICM":
            dataset = read(path)
            if float(dataset.get("RescaleIntercept", -1024)) > -100:
                wrong.append(dataset)
    assert {str(dataset["RescaleIntercept"].value) for dataset in wrong} == {"0", "1"}
    for dataset in wrong:
        assert (dataset.BitsStored, dataset.PixelRepresentation) == (12, 0)
        values = dataset.pixel_array.astype(int) + 1000
        values[values >= 4096] -= 4096
        true = values - 1000
        assert abs(np.median(true[SIZE // 2, 1:4]) + 1000) < 12
        assert true.max() > 500
        assert 15 < np.median(true[SIZE // 2 - 8 : SIZE // 2 + 8, SIZE // 2 - 8 : SIZE // 2 + 8]) < 45


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_defect_takes_no_label_from_a_good_slice(
    layout: str, damaged: dict[str, tuple[Path, PhantomSummary]], tmp_path: Path
) -> None:
    root, _ = damaged[layout]
    clean = tmp_path / "clean"
    synthesize(clean, series=1, size=SIZE, layout=layout)
    files, more = digests(clean), digests(root)
    assert all(more[name] == digest for name, digest in files.items() if name.endswith(".dcm"))
    label_file = {"rsna": "stage_2_train.csv", "folder": "labels.csv", "cq500": "reads.csv"}[layout]
    before, after = ({tuple(line) for line in lines(tree / label_file)} for tree in (clean, root))
    if layout == "cq500":  # readers differ by chance: only the subjects are the same
        before, after = {line[0] for line in before}, {line[0] for line in after}
    assert before <= after


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"series": 0}, "at least 1"),
        ({"seed": -1}, "0 or more"),
        ({"size": 31}, "32 to 1024"),
        ({"size": 1025}, "32 to 1024"),
        ({"layout": "nifti"}, "rsna, cq500, folder"),
    ],
)
def test_invalid_numbers_are_refused(wrong: dict[str, int | str], message: str, tmp_path: Path) -> None:
    meant: dict[str, int | str] = {"series": 1, "size": 32, "layout": "rsna"}
    with pytest.raises(UsageError, match=message):
        synthesize(tmp_path / "out", **(meant | wrong))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="empty folder"):
        synthesize(tmp_path, series=1, size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
