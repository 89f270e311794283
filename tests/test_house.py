"""The rules of the project: allowed imports, what a cold import loads, and no local paths in files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest

import ich_prep

ROOT = Path(__file__).parents[1]
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")

TOP_LEVEL = {
    *("pyproject.toml", "setup.py", "constraints.txt", "requirements.lock", "Makefile"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
    *("ich_prep", "ich_train", "pipelines", "tests", "benchmarks", "docs"),
}

# Paths of a developer's machine.
MACHINE_PATHS = re.compile(rb"(?<![\w.])/(?:work|root|home/\w+|Users/\w+|mnt|tmp/\w+)/\w")


def loaded_by(module: str) -> set[str]:
    """Return the top-level names of all modules that a fresh interpreter has after importing ``module``."""
    script = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_imports_follow_the_contracts() -> None:
    done = subprocess.run([LINT_IMPORTS], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "spared"),
    [
        ("ich_prep", {"numpy", "pandas", "pyarrow", "pydantic", "pydicom", "dask", "zarr", "cv2"}),
        (
            "ich_prep.cli",
            {"pandas", "pyarrow", "pydicom", "dask", "distributed", "zarr", "cv2", "starlette", "uvicorn"},
        ),
        ("ich_prep.dataset", {"pydicom", "dask", "distributed", "cv2", "zarr", "torch"}),
        *(
            (f"ich_prep.dataset.{name}", {"pandas", "pydicom", "dask", "distributed", "cv2", "zarr", "torch", "xarray"})
            for name in (
                "where",
                "affine",
                "volumes",
                "placement",
                "selection",
                "corrections",
                "predictions",
                "xarray_view",
            )
        ),
        ("ich_prep.build_dataset", {"dask", "distributed", "zarr", "torch", "matplotlib"}),
        ("ich_train.cli", {"torch", "matplotlib", "sklearn", "jinja2"}),
        ("ich_train.infer_files", {"pydicom", "dask", "distributed", "cv2", "zarr", "matplotlib", "sklearn"}),
        ("ich_train.train", {"pydicom", "dask", "distributed", "cv2", "zarr"}),
        ("ich_train.loader", {"pydicom", "dask", "distributed", "cv2", "zarr", "matplotlib", "sklearn", "jinja2"}),
    ],
)
def test_a_cold_import_loads_no_more_than_it_needs(module: str, spared: set[str]) -> None:
    assert not loaded_by(module) & spared


@pytest.fixture(scope="module")
def project_files() -> list[str]:
    """The files under version control, relative to the root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the project's files cannot be distinguished from others")
    return [name for name in listed.stdout.decode().split("\0") if name]


def test_the_top_level_has_no_new_entries(project_files: list[str]) -> None:
    tops = {name.split("/")[0] for name in project_files if (ROOT / name).exists()}
    assert {name for name in tops if not name.startswith(".")} == TOP_LEVEL


@pytest.mark.parametrize("package", ["ich_prep", "ich_train"])
def test_both_packages_are_typed_and_run_as_modules(package: str) -> None:
    assert (ROOT / package / "py.typed").read_bytes() == b""
    done = subprocess.run(
        [sys.executable, "-m", package, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith(f"Usage: python -m {package}")


def test_the_version_is_that_of_the_installed_package() -> None:
    done = subprocess.run([sys.executable, "-m", "ich_prep", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ich-prep {version('ich')}\n"
    assert ich_prep.__version__ == version("ich")


def test_hooks_before_a_commit_are_local() -> None:
    """They run the installed tools, in the pinned versions, and clone nothing."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"repo: (\S+)", hooks) == ["local"]


def test_training_imports_the_light_wing_of_the_preparation_only() -> None:
    allowed = re.compile(
        r"ich_prep\.(dataset|recipe|errors|html|command_options|files|messages|signals|terminal|progress)\b"
    )
    imported = {}
    for path in (ROOT / "ich_train").rglob("*.py"):
        for line in path.read_text().splitlines():
            if found := re.match(r"\s*(?:from|import) (ich_prep[\w.]*)", line):
                imported.setdefault(found[1], set()).add((path.name, line[0] == " "))
    others = {name: places for name, places in imported.items() if not allowed.match(name)}
    # Predicting from DICOM files reads them as a build does, and loads what that takes then only.
    assert others == {"ich_prep.scans": {("infer_source.py", True)}}


def test_no_file_names_a_local_path(project_files: list[str]) -> None:
    found = {}
    for name in project_files:
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            places = MACHINE_PATHS.findall(data)
            if places:
                found[name] = places
    assert not found


@pytest.mark.parametrize("name", ["README.md", "pipelines/README.md", "docs/how-to.md"])
def test_a_dataset_is_built_and_trained_on_with_one_recipe(name: str) -> None:
    """A reader types the commands of a page one after the other."""
    recipes: dict[str, set[str | None]] = {}
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    for words in [line.split() for language, block in fences if language == "sh" for line in block.splitlines()]:
        following = dict(pairwise(words))
        dataset = following.get("--out" if "build" in words else "--data")
        if dataset and {"build", "run"} & set(words):
            recipes.setdefault(dataset, set()).add(following.get("--recipe"))
        if dataset and "eval" in words:  # by a network trained with the recipe named like its run
            recipes[dataset].add(f"pipelines/{Path(words[words.index('eval') + 1]).name}.toml")
    assert recipes
    assert all(len(named) == 1 for named in recipes.values()), recipes


@pytest.mark.parametrize("package", ["ich_prep", "ich_train"])
def test_no_thread_of_arrow_gets_memory_of_numpy(package: str) -> None:
    # A thread of an execution plan that gives it up while the interpreter shuts down aborts the process.
    for path in sorted((ROOT / package).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "group_by":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert given.get("use_threads") == "False", f"{path}:{call.lineno}"
