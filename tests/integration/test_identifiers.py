"""Pseudonymised datasets: nothing that identifies is published, and all else is as in a dataset that keeps identifiers."""

from __future__ import annotations

import stat
from collections import Counter
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import UID
from rich.console import Console

from ich_prep.build_dataset import build
from ich_prep.dataset import Dataset
from ich_prep.dataset.classes import RSNA_CLASSES
from ich_prep.dataset.schema import series_schema, slice_schema
from ich_prep.dataset.tables import read_parquet
from ich_prep.errors import BuildError, UsageError
from ich_prep.layouts.labels import LabelOptions
from ich_prep.progress import NoProgress
from ich_prep.stages.checks import Allowances
from ich_prep.stages.identifier_key import KEY_BYTES
from ich_prep.stages.output import clean
from ich_prep.stages.pseudonyms import (
    AS_THEY_ARE,
    DERIVED,
    OLDEST,
    PSEUDONYMS,
    UID_LEVELS,
    WITHHELD,
    WITHOUT_VALUES,
    Level,
    pseudonym,
    published_rows,
    safe_detail,
)
from ich_prep.stages.state import build_folder
from ich_prep.verify import verify
from ich_train.config import TrainConfig
from ich_train.train import train
from tests.support.canaries import Canaries, canary_file, found_canaries, write_raw
from tests.support.cli import prep, published
from tests.support.hospital import TINY, built, ct_bytes, write_files

KEY = bytes(range(KEY_BYTES))
HIDDEN = TINY.model_copy(update={"identifiers": "pseudonymise"})
NO_LIMITS = Allowances(unlabelled=True, missing_images=True, lost_labels=True, max_quarantined=1.0)
SLOPE = "1.2345678901"  # in whose place a file has a text
IDENTITY = ("SOPInstanceUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID")


# --- canaries ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cohort:
    """A folder of files full of ``canaries``, its label table, and the canary in one description, for a filter."""

    src: Path
    labels: Path
    canaries: Canaries
    filtered: str


def volume(canaries: Canaries, slices: int, *, first: int, utf8: bool = False, **attributes: Any) -> list[bytes]:
    """The files of one series, one image after another from number ``first`` on."""
    shared = {name: canaries.of("UI") for name in ("StudyInstanceUID", "SeriesInstanceUID")}
    shared |= {"PatientID": canaries.text(), "RescaleType": "HU", "AcquisitionTime": canaries.of("TM")}
    shared |= {"PatientAge": "093Y", "PatientSex": "F", "BurnedInAnnotation": "NO"}
    files = []
    for image in range(first, first + slices):
        usual = {element.keyword: element.value for element in dcmread(BytesIO(ct_bytes(image)))}
        usual = {name: value for name, value in usual.items() if name not in IDENTITY}
        files.append(canary_file(canaries, usual | shared | attributes, utf8=utf8))
    return files


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Two volumes that are kept, one of them divided by acquisition, and files that leave for many reasons."""
    src, canaries = tmp_path_factory.mktemp("cohort") / "src", Canaries()
    patient = [canaries.text("Käthe Müller {:05d}") for _ in range(3)]

    def write(folder: str, *files: bytes, suffix: str = ".dcm") -> list[Path]:
        paths = [src / folder / f"{canaries.text('Bild Größe{:05d}')}{suffix}" for _ in files]
        for path, data in zip(paths, files, strict=True):
            write_raw(path, data)
        return paths

    plain = volume(canaries, 5, first=0, Manufacturer=f"GE MEDICAL SYSTEMS {canaries.text()}")
    write(f"{patient[0]}/{canaries.text()}", *plain, plain[2])  # the last one is a copy
    series = {name: canaries.of("UI") for name in ("StudyInstanceUID", "SeriesInstanceUID")}
    series |= {"PatientID": canaries.text(), "BodyPartExamined": "HEAD"}
    for _ in range(2):
        write(patient[1], *volume(canaries, 4, first=0, utf8=True, AcquisitionTime=canaries.of("TM"), **series))

    wrong: dict[str, dict[str, Any]] = {
        "bad_header": {"RescaleSlope": SLOPE, "Rows": None},
        "not_ct": {"Modality": canaries.of("CS")},
        "derived": {"ImageType": ["DERIVED", "SECONDARY", "MIP", canaries.of("CS")]},
        "burned_in": {"BurnedInAnnotation": "YES"},
        "multi_frame": {"NumberOfFrames": 7},
        "not_hu": {"RescaleType": canaries.text()},
        "unsupported_syntax": {"TransferSyntax": canaries.of("UI")},
        "filtered": {"SeriesDescription": canaries.text()},
        "decode_failed": {"TransferSyntax": "1.2.840.10008.1.2.4.90", "PixelData": encapsulate([canaries.of("OB")])},
    }
    for number, attributes in enumerate(wrong.values()):
        (data,) = volume(canaries, 1, first=40 + number, **attributes)
        write(patient[2], data.replace(SLOPE.encode(), canaries.text().encode("latin-1")))
    write(patient[2], volume(canaries, 1, first=60)[0][:-200])  # truncated
    shared_uid = canaries.of("UI")
    for image in (70, 71):
        write(patient[2], *volume(canaries, 1, first=image, SOPInstanceUID=shared_uid))
    write(patient[2], b"\0" * 128 + b"DICM" + canaries.text().encode())  # not_dicom
    write(patient[2], canaries.text().encode(), suffix=".txt")  # not_an_image
    write(patient[2], b"", suffix=".dcm")

    slices = [dcmread(BytesIO(data), stop_before_pixels=True) for data in plain[:4]]
    uids = [*(str(one.SOPInstanceUID) for one in slices), shared_uid, canaries.of("UI")]
    lines = [",".join(("sop_instance_uid", *RSNA_CLASSES, "Notiz", "Name"))]
    lines += [f"{uid},0,0,0,0,1,1,{canaries.text()},{canaries.text('Renate Süß{:05d}')}" for uid in uids]
    labels = src.parent / f"{canaries.text()}.csv"
    labels.write_text("\n".join(lines), encoding="utf-8")
    return Cohort(src, labels, canaries, wrong["filtered"]["SeriesDescription"])


def build_cohort(cohort: Cohort, folder: Path, identifiers: str) -> Dataset:
    """Build the cohort with a filter that quotes a canary; the key is fixed, so that chance cannot make a canary."""
    spec = TINY.model_copy(update={"identifiers": identifiers, "exclude": (f"SeriesDescription~{cohort.filtered}",)})
    key = folder / "secret.key"
    key.write_bytes(KEY)
    key.chmod(0o600)
    return built(
        cohort.src,
        folder / f"{identifiers}.zarr",
        spec=spec,
        allow=NO_LIMITS,
        labels=cohort.labels,
        key=key if identifiers == "pseudonymise" else None,
    )


REASONS = {
    "duplicate", "bad_header", "not_ct", "derived", "burned_in", "multi_frame", "not_hu", "unsupported_syntax", "filtered",
    "decode_failed", "truncated", "sop_conflict", "not_dicom", "not_an_image", "empty_file",
}  # fmt: skip


def test_no_canary_is_published_and_without_pseudonyms_many_are(cohort: Cohort, tmp_path: Path) -> None:
    kept = build_cohort(cohort, tmp_path, "keep")
    found = found_canaries(kept, cohort.canaries)
    assert len(set().union(*found.values())) > 60  # the search works
    assert {name.rsplit(" ", 1)[-1] for name in found} >= {
        "sop_instance_uid", "study_instance_uid", "series_instance_uid", "patient_id", "fold_group", "acquisition", "path",
        "detail", "accession_number", "series_description", "protocol_name", "manufacturer", "convolution_kernel",
        "body_part", "contrast_agent", "zarr.json",
    }  # fmt: skip
    assert set(kept.read_table("quarantine")["reason"].to_pylist()) >= REASONS

    hidden = build_cohort(cohort, tmp_path, "pseudonymise")
    assert found_canaries(hidden, cohort.canaries) == {}
    same_but_for_identifiers(kept, hidden)
    series = hidden.series
    assert set(series["manufacturer"].to_pylist()) == {"GE MEDICAL", None}
    assert set(series["body_part"].to_pylist()) == {"HEAD", None}
    assert set(series["acquisition"].to_pylist()) == {"AcquisitionTime", None}
    assert set(series["patient_age"].to_pylist()) == {OLDEST}
    assert not pc.any(pc.is_valid(series["study_year"])).as_py()
    details = hidden.read_table("quarantine").filter(pc.field("reason") == "bad_header")["detail"].to_pylist()
    assert details == [f"{WITHHELD}; it names Rows, RescaleSlope"]


def same_but_for_identifiers(kept: Dataset, hidden: Dataset) -> None:
    """Assert that two datasets differ in identifiers only, and that each has one pseudonym, and each pseudonym one."""
    assert kept.counts == hidden.counts
    before, after = published(kept.path), published(hidden.path)
    assert {name: digest for name, digest in before.items() if name.startswith("images/")} == {
        name: digest for name, digest in after.items() if name.startswith("images/")
    }
    assert kept.read_table("shards").equals(hidden.read_table("shards"))
    for old, new in ((kept.slices, hidden.slices), (kept.series, hidden.series)):
        assert old.schema.equals(new.schema)
        for name in old.column_names:
            if name in PSEUDONYMS:
                pairs = set(zip(old[name].to_pylist(), new[name].to_pylist(), strict=True))
                assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}), name
                assert all((one is None or one == "") == (other is None) for one, other in pairs), name
            elif name in AS_THEY_ARE or name in kept.classes:
                assert old[name].equals(new[name]), name
    old, new = (
        Counter(
            tuple(line[name] for name in ("stage", "row", "reason"))
            for line in dataset.read_table("quarantine").to_pylist()
        )
        for dataset in (kept, hidden)
    )
    assert old == new
    paths = hidden.read_table("quarantine")["path"].to_pylist()
    assert paths == sorted(paths)
    assert len(set(paths)) == len(set(kept.read_table("quarantine")["path"].to_pylist()))


def test_a_pseudonymised_dataset_verifies_also_against_its_sources(cohort: Cohort, tmp_path: Path) -> None:
    dataset = build_cohort(cohort, tmp_path, "pseudonymise")
    result = verify(dataset.path, src=cohort.src, sample=1.0, progress=NoProgress())
    assert not result.problems
    assert result.compared == dataset.counts.ok
    assert read_parquet(build_folder(dataset.path).plan)["patient_id"][0].as_py() in cohort.canaries.values


# --- what stays --------------------------------------------------------------------------------------------------------


def scans(count: int) -> dict[str, bytes]:
    """Scans of three slices, two of each patient."""
    return {
        f"{scan:02d}/{n}.dcm": ct_bytes(
            100 * scan + n, PatientID=f"P{scan // 2}", StudyInstanceUID=f"1.5.{scan}", SeriesInstanceUID=f"1.6.{scan}"
        )
        for scan in range(count)
        for n in range(3)
    }


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_files(tmp_path / "src", scans(12))


def test_rows_and_folds_come_from_the_originals(src: Path, tmp_path: Path) -> None:
    shared = ct_bytes(1100, SOPInstanceUID="1.9", PatientID="P5", StudyInstanceUID="1.5.10", SeriesInstanceUID="1.6.99")
    write_files(src, {"copies/0.dcm": (src / "00" / "0.dcm").read_bytes(), "copies/1.dcm": shared})
    kept = built(src, tmp_path / "kept.zarr")
    hidden = built(src, tmp_path / "hidden.zarr", spec=HIDDEN)
    same_but_for_identifiers(kept, hidden)
    assert Counter(pc.list_flatten(hidden.slices["flags"]).to_pylist())["same_image"] == 1 + 1
    assert len(set(hidden.slices["fold"].to_pylist())) > 1
    (copy,) = hidden.read_table("quarantine").to_pylist()
    assert (copy["reason"], copy["detail"]) == ("duplicate", WITHHELD)


def labelled(src: Path, **columns: str) -> Path:
    """Label every slice of ``scans``; further ``columns`` have one value."""
    uids = [str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in sorted(src.rglob("*.dcm"))]
    lines = [",".join(("sop_instance_uid", *RSNA_CLASSES, *columns))]
    lines += [",".join((uid, "0,0,0,0,1,1" if int(uid[-1]) % 2 else "0,0,0,0,0,0", *columns.values())) for uid in uids]
    path = src.parent / "labels.csv"
    path.write_text("\n".join(lines))
    return path


def test_a_network_trains_on_it(src: Path, tmp_path: Path) -> None:
    dataset = built(src, tmp_path / "data.zarr", spec=HIDDEN, labels=labelled(src), allow=Allowances())
    folds = Counter(dataset.slices["fold"].to_pylist()).most_common(2)
    settings = {"epochs": 1, "batch_size": 4, "device": "cpu", "compile": False, "model": "baseline"}
    config = TrainConfig.model_validate(settings | {"val_fold": folds[0][0], "test_fold": folds[1][0]})
    assert train(dataset, tmp_path / "run", config, None, console=Console(file=StringIO())).finished


def test_a_column_of_the_label_table_is_published_only_if_allowed(src: Path, tmp_path: Path) -> None:
    options = {"labels": labelled(src, site="A"), "label_options": LabelOptions(keep=("site",)), "spec": HIDDEN}
    with pytest.raises(UsageError, match=r"--keep-columns would publish site .* --allow-kept-columns"):
        built(src, tmp_path / "data.zarr", **options)
    dataset = built(src, tmp_path / "data.zarr", allow=Allowances(kept_columns=True), **options)
    assert set(dataset.slices["x_site"].to_pylist()) == {"A"}


def test_the_user_is_told_what_is_inside(src: Path, tmp_path: Path) -> None:
    for identifiers, line in (("keep", "Identifiers: as in the source"), ("pseudonymise", "Identifiers: pseudonyms")):
        out = tmp_path / f"{identifiers}.zarr"
        words = ("--size", 16, "--layout", "folder", "--allow-unlabelled", "--identifiers", identifiers, "--workers", 0)
        done = prep("build", "--src", src, "--out", out, *words)
        assert done.returncode == 0, done.stderr
        assert line in done.stdout
        assert line in prep("info", out).stdout


# --- the key -----------------------------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_reused(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    digest = built(src, out, spec=HIDDEN).digest
    key = build_folder(out).key
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) == KEY_BYTES
    assert built(src, out, spec=HIDDEN, overwrite=True).digest == digest
    again = built(src, tmp_path / "again.zarr", spec=HIDDEN, key=key)
    assert again.digest == digest  # the same key anywhere
    assert not build_folder(again.path).key.exists()
    other = built(src, tmp_path / "other.zarr", spec=HIDDEN)
    assert not set(other.slices["patient_id"].to_pylist()) & set(again.slices["patient_id"].to_pylist())


def test_a_build_that_stopped_resumes_with_its_key(src: Path, tmp_path: Path) -> None:
    write_files(src, {"bad.dcm": ct_bytes(999, Rows=None)})
    out = tmp_path / "data.zarr"
    with pytest.raises(BuildError, match="damaged"):
        built(src, out, spec=HIDDEN, allow=Allowances(unlabelled=True, max_quarantined=0.0))
    key = build_folder(out).key.read_bytes()
    dataset = built(src, out, spec=HIDDEN, allow=NO_LIMITS)
    assert build_folder(out).key.read_bytes() == key
    assert dataset.slices["patient_id"][0].as_py() == pseudonym(key, Level.PATIENT, "P0")


def test_a_finished_dataset_is_recognised_also_without_its_working_folder(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    dataset = built(src, out, spec=HIDDEN)
    assert build(src, out, HIDDEN, workers=0, allow=NO_LIMITS).already_finished
    clean(out, build_folder(out))
    assert [path.name for path in build_folder(out).path.iterdir()] == ["identifiers.key"]
    assert clean(out, build_folder(out)) == 0
    assert build(src, out, HIDDEN, workers=0, allow=NO_LIMITS).already_finished
    with pytest.raises(BuildError, match="identifiers was pseudonymise, now keep"):
        built(src, out)
    assert built(src, out, spec=HIDDEN, overwrite=True).digest == dataset.digest
    assert "Removed all but the key" in prep("clean", out).stdout
    build_folder(out).key.rename(tmp_path / "kept.key")
    build_folder(out).key.write_bytes(KEY)
    with pytest.raises(BuildError, match="is not the key of the pseudonyms"):
        clean(out, build_folder(out), forget_key=True)
    (tmp_path / "kept.key").rename(build_folder(out).key)
    clean(out, build_folder(out), forget_key=True)
    assert not build_folder(out).path.exists()
    with pytest.raises(BuildError, match="key of the pseudonyms is missing: there is no"):
        built(src, out, spec=HIDDEN)


def test_a_forgotten_key_file_or_another_one_is_refused(src: Path, tmp_path: Path) -> None:
    write_files(src, {"bad.dcm": ct_bytes(999, Rows=None)})
    out, key, other = tmp_path / "data.zarr", tmp_path / "one.key", tmp_path / "other.key"
    key.write_bytes(KEY)
    other.write_bytes(KEY[::-1])
    with pytest.raises(BuildError, match="damaged"):
        built(src, out, spec=HIDDEN, key=key, allow=Allowances(unlabelled=True, max_quarantined=0.0))
    with pytest.raises(BuildError, match=r"missing: there is no .*identifiers\.key"):
        built(src, out, spec=HIDDEN, allow=NO_LIMITS)
    with pytest.raises(BuildError, match=r"missing: .*other\.key is another key"):
        built(src, out, spec=HIDDEN, key=other, allow=NO_LIMITS)
    built(src, out, spec=HIDDEN, key=key, allow=NO_LIMITS)
    with pytest.raises(BuildError, match=r"missing: .*other\.key is another key"):
        built(src, out, spec=HIDDEN, key=other, allow=NO_LIMITS)


@pytest.mark.parametrize("size", [0, KEY_BYTES - 1, 5000])
def test_what_cannot_be_a_key_is_refused(size: int, src: Path, tmp_path: Path) -> None:
    key = tmp_path / "short.key"
    key.write_bytes(bytes(size))
    with pytest.raises(UsageError, match="Expected a key of 32 to 4096 random bytes"):
        built(src, tmp_path / "data.zarr", spec=HIDDEN, key=key)
    with pytest.raises(UsageError, match="Cannot read the key"):
        built(src, tmp_path / "data.zarr", spec=HIDDEN, key=tmp_path / "none.key")
    with pytest.raises(UsageError, match="--key is for pseudonyms"):
        built(src, tmp_path / "data.zarr", key=key)


def test_the_user_is_told_of_a_key_that_others_can_read_and_of_new_pseudonyms(src: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Told(NoProgress):
        def say(self, text: str) -> None:
            told.append(text)

    key = tmp_path / "open.key"
    key.write_bytes(KEY)
    key.chmod(0o644)
    built(src, tmp_path / "data.zarr", spec=HIDDEN, key=key, progress=Told())
    assert told[:1] == [f"Others can read the key of the pseudonyms: `chmod 600 {key}`."]
    told.clear()
    built(src, tmp_path / "data.zarr", spec=HIDDEN, overwrite=True, progress=Told())
    assert "will not be those of the dataset that is replaced" in told[0]


# --- pseudonyms --------------------------------------------------------------------------------------------------------


@given(st.text(), st.text(), st.sampled_from(Level), st.sampled_from(Level), st.binary(min_size=32, max_size=80))
def test_a_pseudonym_depends_on_key_level_and_value(one: str, two: str, level: Level, other: Level, key: bytes) -> None:
    made = pseudonym(key, level, one)
    assert made == pseudonym(key, level, one)
    assert (made == pseudonym(key, level, two)) == (one == two)
    assert (made == pseudonym(key, other, one)) == (level == other)
    assert made != pseudonym(KEY[::-1] + key, level, one)
    if level in UID_LEVELS:
        assert UID(made).is_valid
    else:
        assert len(made) == 32
        assert int(made, 16) < 2**128


def test_pseudonyms_never_change() -> None:
    """A dataset may be appended to years later: these are HMACs that `openssl dgst -sha256 -mac HMAC` gives too."""
    assert pseudonym(KEY, Level.PATIENT, "Käthe") == "5f83578e7a79ac7148fe873148aa1238"
    assert pseudonym(KEY, Level.STUDY, "1.2.3") == f"2.25.{0x1AAE6E50E63819A4006EFA4A2187E382}"


def test_the_treatment_of_every_column_is_decided() -> None:
    columns = {*slice_schema(()).names, *series_schema(()).names}
    decided = [*PSEUDONYMS, *AS_THEY_ARE, *DERIVED, *WITHOUT_VALUES]
    assert sorted(decided) == sorted(columns)


def test_a_column_that_nobody_decided_about_is_null() -> None:
    table = pa.table({"row": [1], "referring_physician": ["Käthe"], "any": pa.array([1], pa.int8())})
    assert published_rows(table, KEY, classes=["any"]).to_pylist() == [
        {"row": 1, "referring_physician": None, "any": 1}
    ]


def test_words_are_derived_by_closed_lists() -> None:
    table = pa.table(
        {
            "patient_age": pa.array([0.3, 41.9, 89.0, 90.0, 104.0, None], pa.float32()),
            "patient_sex": ["F", "M", "O", "FRAU", "", None],
            "scan_type": ["plain", "bone", "unknown", "Meyer", None, "contrast"],
            "manufacturer": ["SIEMENS Healthineers", "Philips", "Dr. Meyer", None, "", "GE MEDICAL SYSTEMS"],
            "body_part": ["HEAD", "head", "MEYER", "BRAIN", "", None],
            "acquisition": [
                "AcquisitionTime 101112",
                "no AcquisitionNumber",
                "AcquisitionNumber 3",
                None,
                "Meyer 3",
                "",
            ],
        }
    )
    assert published_rows(table, KEY, classes=()).to_pydict() == {
        "patient_age": [0.0, 41.0, 89.0, 90.0, 90.0, None],
        "patient_sex": ["F", "M", "O", None, None, None],
        "scan_type": ["plain", "bone", "unknown", None, None, "contrast"],
        "manufacturer": ["SIEMENS", "PHILIPS", None, None, None, "GE MEDICAL"],
        "body_part": ["HEAD", None, None, "BRAIN", None, None],
        "acquisition": ["AcquisitionTime", "no AcquisitionNumber", "AcquisitionNumber", None, None, None],
    }


@given(st.text())
def test_of_a_detail_only_known_words_are_left(text: str) -> None:
    assert safe_detail(text, ("Rows", "Columns")).removeprefix(WITHHELD).strip("; ") in {
        "", "it names Rows", "it names Columns", "it names Rows, Columns", "it names Columns, Rows",
    }  # fmt: skip
