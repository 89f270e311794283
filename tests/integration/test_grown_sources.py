"""Source files of datasets that grew, with pseudonyms or without: copied, found, and counted as damaged as by a build."""

from __future__ import annotations

import shutil
from pathlib import Path

import pydicom
import pytest

from ich_prep import open_dataset
from ich_prep.append import append
from ich_prep.build_dataset import Allowances, build
from ich_prep.dataset.spec import Spec
from ich_prep.errors import BuildError, Reason, SliceError
from ich_prep.phantom import synthesize
from ich_prep.stages.identifier_key import key_of_dataset
from ich_prep.stages.quarantined import read_quarantine
from ich_prep.stages.state import build_folder
from ich_prep.view.pictures import Pictures
from tests.support.cli import prep, working

ALLOW = Allowances(max_quarantined=0.2)
SHARED = "stage_2_train/Thumbs.db"  # a file that both sources have


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two trees of RSNA's layout, each with every known defect."""
    folder = tmp_path_factory.mktemp("sources")
    for seed in (1, 2):
        synthesize(folder / f"part{seed}", series=3, size=32, layout="rsna", seed=seed, defects=True, workers=0)
    return [folder / "part1", folder / "part2"]


@pytest.fixture(scope="module", params=["keep", "pseudonymise"])
def grown(request: pytest.FixtureRequest, sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of a build and an append."""
    out = tmp_path_factory.mktemp("grown") / "data.zarr"
    build(sources[0], out, Spec(size=32, slices_per_shard=16, identifiers=request.param), workers=0, allow=ALLOW)
    append(sources[1], out, workers=0, allow=ALLOW)
    return out


def test_quarantined_files_of_both_sources_are_copied(grown: Path, sources: list[Path], tmp_path: Path) -> None:
    words = [word for source in sources for word in ("--src", source)]
    done = prep("quarantine", grown, "--copy-to", tmp_path / "copies", *words)
    assert done.returncode == 0, done.stderr
    copied = {str(path.relative_to(tmp_path / "copies")): path for path in (tmp_path / "copies").rglob("*.d*")}
    assert len(copied) == open_dataset(grown).counts.quarantined
    # Which of the two was quarantined as what the table cannot say, so both are there.
    for source in sources:
        copy = copied.pop(f"not_an_image/{source.name}/{SHARED}")
        assert copy.read_bytes() == (source / SHARED).read_bytes()
    for name, copy in copied.items():
        path = name.partition("/")[2]
        assert copy.read_bytes() in [(source / path).read_bytes() for source in sources if (source / path).exists()]
    again = prep("quarantine", grown, "--copy-to", tmp_path / "copies", *words)
    assert "Copied 0 files" in again.stdout


def test_a_missing_key_is_asked_for(grown: Path, sources: list[Path], tmp_path: Path) -> None:
    hidden = open_dataset(grown).attributes["spec"]["identifiers"] == "pseudonymise"
    copy = Path(shutil.copytree(grown, tmp_path / "data.zarr"))
    words = ("quarantine", copy, "--copy-to", tmp_path / "copies", "--src", sources[0], "--reason", "localizer")
    done = prep(*words)
    assert "--key" in done.stderr if hidden else "Copied 1 file" in done.stdout
    if hidden:
        key = working(grown) / "identifiers.key"
        assert "Copied 1 file" in prep(*words, "--key", key).stdout


def test_the_viewer_shows_quarantined_files_of_both(grown: Path, sources: list[Path]) -> None:
    with open_dataset(grown) as dataset:
        table = dataset.read_table("quarantine")
        secret = key_of_dataset(dataset.root, build_folder(grown, None), None, needed=True)
    pictures = Pictures(sources, secret)
    shown = [line["path"] for line in table.to_pylist() if line["reason"] == Reason.LOCALIZER]
    assert len(shown) == 2 and all(pictures.png(path)[:4] == b"\x89PNG" for path in shown)
    reasons = table["reason"].to_pylist()
    several = table["path"][reasons.index(str(Reason.NOT_AN_IMAGE))].as_py()
    with pytest.raises(SliceError, match="2 sources have a file of this path"):
        pictures.png(several)


def test_find_takes_original_uids_of_rows_and_of_quarantined_files(grown: Path, sources: list[Path]) -> None:
    scout = next(
        path for path in map(Path, _paths(grown)) if (sources[1] / path).exists() and _is_scout(sources[1] / path)
    )
    found = prep("find", grown, "--sop", _uid(sources[1] / scout))
    assert found.returncode == 0 and str(scout) in found.stdout and "localizer" in found.stdout


def test_the_working_folder_lists_the_files_of_all_sources(grown: Path) -> None:
    listed = read_quarantine(working(grown)).files
    assert len(listed) == open_dataset(grown).counts.quarantined
    assert all("/" in path for path in listed["path"].to_pylist())  # the originals


def test_a_folder_that_grows_is_judged_as_a_whole(sources: list[Path], tmp_path: Path) -> None:
    tree, out = Path(shutil.copytree(sources[0], tmp_path / "tree")), tmp_path / "data.zarr"
    build(tree, out, Spec(size=32, slices_per_shard=16), workers=0, allow=ALLOW)
    again = append(tree, out, workers=0)
    assert again.generation is None and not any(Reason(reason).is_damage for reason in again.reasons)
    assert again.lost == {}  # counted by the build
    new = next(path for path in (sources[1] / "stage_2_test").glob("*.dcm") if path.stat().st_size > 2000)
    (tree / "stage_2_test").mkdir(exist_ok=True)
    (tree / "stage_2_test" / "cut.dcm").write_bytes(new.read_bytes()[:-500])
    again = append(tree, out, workers=0, allow=Allowances(max_quarantined=0.02))  # one of all slices of the folder
    assert again.generation is None and again.reasons[Reason.TRUNCATED] == 1
    with pytest.raises(BuildError, match=r"at most 0\.10% are allowed"):
        append(tree, out, workers=0, allow=Allowances(max_quarantined=0.001))


def test_an_append_tells_what_is_lost(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "data.zarr"
    build(sources[0], out, Spec(size=32, slices_per_shard=16), workers=0, allow=ALLOW)
    before = open_dataset(out).root.lost_labels
    done = prep("append", "--src", sources[1], "--out", out, "--workers", 0, "--max-quarantined", 0.2)
    assert done.returncode == 0, done.stderr
    after = open_dataset(out).root.lost_labels
    for reason, loss in after.items():
        labels = loss.labels - (before[reason].labels if reason in before else 0)
        assert f"Lost with {reason}: {labels} label" in done.stdout
    assert "1 truncated" in done.stdout and len(after) >= 3


def _paths(grown: Path) -> list[str]:
    return read_quarantine(working(grown)).files["path"].to_pylist()


def _is_scout(path: Path) -> bool:
    return b"LOCALIZER" in path.read_bytes()[:4096]


def _uid(path: Path) -> str:
    with pytest.warns(UserWarning, match="Invalid value for VR UI"):
        return str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID)
