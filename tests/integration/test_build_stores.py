"""What a build stores, for synthetic and real heads: pixels, labels, hashes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import pytest

from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.dataset import open_dataset
from ich_prep.dataset.spec import Spec
from ich_prep.progress import NoProgress
from ich_prep.verify import verify
from tests.support.cli import SMALL, prep

Codec = Literal["lz4", "zstd", "none"]
ANYTHING = Allowances(max_quarantined=1.0)


@pytest.mark.parametrize(("codec", "size"), [("lz4", 64), ("zstd", 32), ("none", 100)])
def test_every_store_follows_the_definitions(codec: Codec, size: int, phantom_tree: Path, tmp_path: Path) -> None:
    """Smaller, the same, larger; the windowed store has the windows of the HU store."""
    stores = {}
    kinds: tuple[Literal["windows", "hu"], ...] = ("windows", "hu")
    for kind in kinds:
        spec = Spec(size=size, store=kind, codec=codec, slices_per_shard=32)
        build(phantom_tree, tmp_path / kind, spec, workers=0)
        stores[kind] = open_dataset(tmp_path / kind)
        assert not verify(tmp_path / kind, src=phantom_tree, sample=0.1, progress=NoProgress()).problems
    windows, hu = stores["windows"], stores["hu"]
    rows = range(len(hu))
    codes, values = windows.read(rows), hu.read(rows)
    assert codes.dtype == np.uint8
    assert codes.shape == (len(hu), 3, size, size)
    assert values.dtype == np.int16
    assert values.shape == (len(hu), 1, size, size)
    for channel, window in enumerate(windows.spec.windows):
        np.testing.assert_array_equal(codes[:, channel], window_of(values[:, 0], window.center, window.width))
    assert windows.slices.drop_columns("chunk_crc32c").equals(hu.slices.drop_columns("chunk_crc32c"))


def window_of(hu: np.ndarray, center: float, width: float) -> np.ndarray:
    """LINEAR_EXACT of PS3.3 C.11.2.1.3.2, implemented independently."""
    return np.rint(np.clip((hu - (center - width / 2)) / width, 0, 1) * 255).astype(np.uint8)


def test_the_slice_table_has_the_labels_of_the_csv(phantom_tree: Path, dataset_path: Path) -> None:
    lines = (phantom_tree / "stage_2_train.csv").read_text().splitlines()[1:]
    expected = {tuple(line.split(",")[0].rsplit("_", 1)): int(line[-1]) for line in lines}
    listed = (phantom_tree / "stage_2_sample_submission.csv").read_text().splitlines()[1:]
    order = list(dict.fromkeys(line.rsplit("_", 1)[0] for line in listed))
    for line in open_dataset(dataset_path).slices.to_pylist():
        sop = line["sop_instance_uid"]
        if line["subset"] == "train":
            assert {name: line[name] for name in RSNA_CLASSES} == {name: expected[sop, name] for name in RSNA_CLASSES}
            assert line["fold"] is not None
        else:
            assert [line[name] for name in RSNA_CLASSES] == [None] * 6
            assert order[line["label_line"]] == sop
            assert line["fold"] is None


def test_equal_pixels_under_two_patients_have_equal_hashes(damaged_tree: Path, tmp_path: Path) -> None:
    build(damaged_tree, tmp_path / "data.zarr", SMALL, workers=0, allow=ANYTHING)
    slices = open_dataset(tmp_path / "data.zarr").slices
    groups = slices.group_by("content_hash").aggregate([("patient_id", "count_distinct"), ("row", "count")])
    twice = groups.filter(pc.greater(groups["row_count"], 1))
    assert twice["row_count"].to_pylist() == [2]
    assert twice["patient_id_count_distinct"].to_pylist() == [2]


def test_unused_bits_change_only_a_flag(slice_bytes: Callable[..., bytes], tmp_path: Path) -> None:
    values = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    (tmp_path / "src").mkdir()
    for name, words in {"2.25.11": values, "2.25.12": values | np.uint16(0x7000)}.items():
        data = slice_bytes(words, BitsStored=12, HighBit=11, SOPInstanceUID=name, SeriesInstanceUID=name)
        (tmp_path / "src" / name).write_bytes(data)
    spec = SMALL.model_copy(update={"layout": "folder"})
    build(tmp_path / "src", tmp_path / "data.zarr", spec, workers=0, allow=Allowances(unlabelled=True))
    dataset = open_dataset(tmp_path / "data.zarr")
    lines = dataset.slices.to_pylist()
    assert [line["flags"] for line in lines] == [[], ["unused_bits"]]
    assert [(line["hu_min"], line["hu_max"]) for line in lines] == [(-1024.0, 3071.0)] * 2
    np.testing.assert_array_equal(*dataset.read([0, 1]))


# --- real files ------------------------------------------------------------------------------------------------------


def test_real_heads(real_data: Path, tmp_path: Path) -> None:
    src, out = real_data / "head_ct", tmp_path / "data.zarr"
    words = ["--layout", "folder", "--allow-unlabelled", "--slices-per-shard", 16, "--workers", 0]
    built = prep("build", "--src", src, "--out", out, *words)
    assert built.returncode == 0, built.stderr
    dataset = open_dataset(out)
    assert len(dataset) == 56
    assert dataset.series["n_ok"].to_pylist() == [28, 28]
    quarantine = dataset.read_table("quarantine").to_pylist()
    reasons = {(line["path"].split("/")[1].split("_")[0], line["reason"]) for line in quarantine}
    assert {reason for _, reason in reasons} == {"localizer", "derived", "not_ct"}
    assert all(line["stage"] == "scan" for line in quarantine)
    checked = prep("verify", out, "--src", src, "--sample", 1)
    assert checked.returncode == 0, checked.stderr
    assert "56 slices compared" in checked.stdout


def test_the_brain_of_a_real_head_has_the_hu_of_brain(real_data: Path, tmp_path: Path) -> None:
    """GE's files have a rescale intercept of 0 and a padding of -1500; the brain still has 20 to 40 HU."""
    out = tmp_path / "data.zarr"
    build(
        real_data / "head_ct" / "ge_hispeed",
        out,
        Spec(store="hu", layout="folder"),
        workers=0,
        allow=Allowances(unlabelled=True),
    )
    dataset = open_dataset(out)
    slices, series = dataset.slices, dataset.series
    assert set(slices["rescale_intercept"].to_pylist()) == {0.0}
    assert series["tilt_degrees"].to_pylist() == pytest.approx([18.5], abs=0.2)
    volume = dataset.volume(series["series_instance_uid"][0].as_py())[:, 0]
    middle = volume[14:24, 200:312, 200:312]
    brain = middle[(middle > 0) & (middle < 80)]
    assert len(brain) > 0.8 * middle.size
    assert 20 <= np.median(brain) <= 40
    assert volume.min() == -1024
