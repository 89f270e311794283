"""Every command and snippet of the documentation is run, in the order of the page.

Each page runs in its own folder, beside small sources (``rsna``, ``cq500``, ``scans``, some of them as archives too)
and the project's recipes, which are cut down to a size that a test can build and train: what is checked is that every
command and option, key and name exists and does what the page says, not how well a network learns. Fences and their
markers:

* ``sh``: each line is a command of ``ich-prep``, ``ich-train`` or ``python -m`` of these; ``python``: run in one
  namespace a page; ``toml``: a recipe, which is checked.
* ``<!-- file: FILE -->`` before a fence of ``toml`` or ``python``: written to FILE; such Python is not run.
* ``<!-- output -->`` before a fence: what the block above it prints; ``...`` stands for any text.
* ``<!-- no-run: REASON -->`` before a fence: not run, and why.
* ``<!-- needs: PACKAGE -->`` before a fence of ``python``: run where PACKAGE is installed, else the test is reported as
  skipped, once the rest of the page ran.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import pkgutil
import re
import shlex
import shutil
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask.system
import pytest
from matplotlib.figure import Figure

from ich_prep import cli as prep_cli
from ich_prep.events import EVENTS
from ich_prep.options import BuildOptions
from ich_prep.phantom import synthesize
from ich_prep.recipe import SECTIONS, validate
from ich_train import cli as train_cli
from ich_train.config import EvalConfig, TrainConfig, recipe_text

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "pipelines").glob("*.md")])
PROGRAMS = {"ich-prep": prep_cli.main, "ich-train": train_cli.main}
RUN = ("sh", "python", "toml")

FENCE = re.compile(
    r"(?:^<!-- (?P<marker>[^\n]*) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
MARKER = re.compile(r"output|no-run: \S.*|file: [\w.]+|needs: \w+")
SMALL_BUILD = {"size": 32, "slices_per_shard": 32}
SMALL_TRAIN = {"model": "baseline", "epochs": 1, "device": "cpu", "compile": False}
PNG = (ROOT / "docs" / "phantom.png").read_bytes()


@dataclass(frozen=True)
class Block:
    """A fence of a page: its language, its text, and the comment before it."""

    page: str
    line: int
    language: str
    text: str
    marker: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """Return the fences of a page, from top to bottom."""
    document = path.read_text(encoding="utf-8")
    return [
        Block(
            page=str(path.relative_to(ROOT)),
            line=document.count("\n", 0, fence.start("language")) + 1,
            language=fence["language"],
            text=fence["text"],
            marker=fence["marker"] or "",
        )
        for fence in FENCE.finditer(document)
    ]


ALL = {str(path.relative_to(ROOT)): blocks_of(path) for path in PAGES}
TO_RUN = {page: blocks for page, blocks in ALL.items() if any(block.language in RUN for block in blocks)}


@pytest.mark.parametrize("page", ALL)
def test_every_fence_is_found_and_every_marker_is_known(page: str) -> None:
    document = (ROOT / page).read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*```", document, re.MULTILINE)) == 2 * len(ALL[page])
    comments = re.findall(r"^<!-- (.*?) -->$", document, re.MULTILINE)
    assert all(MARKER.fullmatch(comment) for comment in comments), comments
    assert len(comments) == sum(bool(block.marker) for block in ALL[page]), "a marker stands alone"


@pytest.mark.parametrize("page", ALL)
def test_every_fence_with_a_command_is_run(page: str) -> None:
    for block in ALL[page]:
        if block.language in RUN or block.marker:
            continue
        commands = [
            line for line in block.text.splitlines() if re.match(r"\$? ?(ich-|make |pip |python |import )", line)
        ]
        assert not commands, f"{block}: mark this fence as sh or python, or say why it is not run"


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small cohort in each layout and small recipes under the names of the project's; read only."""
    folder = tmp_path_factory.mktemp("docs")
    synthesize(folder / "rsna", series=10, size=32, seed=10, layout="rsna")  # bleeds in each fold
    synthesize(folder / "cq500", series=3, size=32, seed=2, layout="cq500")
    synthesize(folder / "scans", series=3, size=32, seed=3, layout="folder")
    archive(folder / "rsna-intracranial-hemorrhage-detection", folder / "rsna")
    downloads = folder / "cq500-downloads"  # one archive per patient
    downloads.mkdir()
    shutil.copy(folder / "cq500" / "reads.csv", downloads)
    for patient in sorted((folder / "cq500").glob("CQ500CT*")):
        archive(downloads / patient.name.split()[0].replace("CQ500CT", "CQ500-CT-"), folder / "cq500", patient.name)
    synthesize(folder / "more", series=1, size=32, seed=4, layout="folder")
    archive(folder / "more-scans", folder / "more")
    (folder / "pipelines").mkdir()
    for recipe in (ROOT / "pipelines").glob("*.toml"):
        sections = tomllib.loads(recipe.read_text(encoding="utf-8"))
        small = {
            "build": sections.get("build", {}) | SMALL_BUILD,
            "train": sections.get("train", {}) | SMALL_TRAIN,
            "eval": sections.get("eval", {}) | {"bootstrap": 20},
        }
        (folder / "pipelines" / recipe.name).write_text(recipe_text(small), encoding="utf-8")
    return folder


def archive(name: Path, folder: Path, below: str = ".") -> None:
    """Write ``name``.zip with the files of ``folder``, or of a folder ``below`` it, by paths relative to ``folder``."""
    shutil.make_archive(str(name), "zip", folder, below)


@pytest.fixture
def place(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a page runs: the sources are links, everything else belongs to the page."""
    for path in sources.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dask.system, "cpu_count", lambda: 0)  # builds run in this process: no workers to start
    # Drawing a report's pictures takes longer than all else here; tests of the plots draw them.
    monkeypatch.setattr(Figure, "savefig", lambda _, file, **__: file.write(PNG))
    return tmp_path


@pytest.mark.parametrize("page", TO_RUN)
@pytest.mark.usefixtures("one_thread")
def test_a_page_runs_from_top_to_bottom(page: str, place: Path) -> None:
    namespace: dict[str, Any] = {}
    printed = ""
    absent = []
    for block in TO_RUN[page]:
        if block.marker == "output":
            assert_prints(block, printed)
        elif block.marker.startswith("needs: ") and find_spec(needed := block.marker.removeprefix("needs: ")) is None:
            absent.append(f"{block} needs {needed}")
        elif not block.marker.startswith("no-run"):
            printed = run_block(block, namespace, place)
    if absent:
        pytest.skip(f"the rest of the page ran; not run: {'; '.join(absent)} (make test-tools)")


def run_block(block: Block, namespace: dict[str, Any], place: Path) -> str:
    """Run a block; return what it printed."""
    if block.language == "toml":
        check_recipe(block)
    if block.marker.startswith("file: "):
        (place / block.marker.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
    if block.marker.startswith("file: ") or block.language == "toml":
        return ""
    with captured() as stream:
        if block.language == "sh":
            for command in commands_of(block):
                run_command(block, command, stream)
        elif block.marker.startswith("needs: "):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what other packages warn of is theirs
                exec(compile(block.text, str(block), "exec"), namespace)
        elif block.language == "python":
            exec(compile(block.text, str(block), "exec"), namespace)
    return stream.getvalue()


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """Collect both standard streams, as a reader sees them in a terminal."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield stream


def commands_of(block: Block) -> list[list[str]]:
    """Return the commands of a block as words; a backslash at the end of a line continues it."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(block: Block, words: list[str], stream: io.StringIO) -> None:
    """Run one command in this process; it must end with exit code 0."""
    if words[:2] == ["python", "-m"]:
        words = [words[2].replace("_", "-"), *words[3:]]
    program = words[0].removeprefix(".venv/bin/")
    assert program in PROGRAMS, f"{block}: {program} is not run here: mark the fence `no-run: REASON`"
    before = sys.argv
    sys.argv = [program, *words[1:]]
    try:
        PROGRAMS[program]()
    except SystemExit as end:
        assert not end.code, f"{block}: {shlex.join(words)} ended with {end.code}:\n{stream.getvalue()[-2000:]}"
    finally:
        sys.argv = before


def check_recipe(block: Block) -> None:
    """Raise if a recipe has an unknown section or key, or a value out of range."""
    recipe = tomllib.loads(block.text)
    assert set(recipe) <= set(SECTIONS), block
    validate(BuildOptions, recipe.get("build", {}), where=f"{block} [build]")
    validate(TrainConfig, recipe.get("train", {}), where=f"{block} [train]")
    validate(EvalConfig, recipe.get("eval", {}), where=f"{block} [eval]")


def assert_prints(block: Block, printed: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    matches = doctest.OutputChecker().check_output(block.text, printed, flags)
    assert matches, f"{block}: expected\n{block.text}\nfound\n{printed}"


@pytest.mark.parametrize("page", ALL)
def test_every_link_between_pages_has_a_target(page: str) -> None:
    document = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", document):
        if not re.match(r"https?://|#|mailto:", target):
            assert ((ROOT / page).parent / target.split("#")[0]).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", ALL)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    document = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:ich_prep|ich_train|tests|docs|pipelines|\.ci)/[\w./-]*)`", document)
    missing = {name for name in named if not (ROOT / name).exists() and "NAME" not in name}
    assert not missing


@pytest.mark.parametrize("name", re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
def test_every_name_of_the_python_api_is_importable(name: str) -> None:
    assert pkgutil.resolve_name(name).__doc__


def test_the_events_of_a_build_are_those_of_the_code() -> None:
    section = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split("## Lines of JSON", 1)[1].split("\n## ")[0]
    lines = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    documented = {line[1].strip(" `"): set(re.findall(r"`(\w+)`", line[3])) for line in lines}
    assert documented == {name: set(keys) for name, keys in EVENTS.items()}
