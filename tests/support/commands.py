"""Every command of both programs that writes, with where it writes, how it goes on after a failure, and what to compare."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from tests.support.faults import Programs

BUILD = ("--size", 32, "--slices-per-shard", 16, "--folds", 3, "--workers", 0)
RECIPE = "[train]\nepochs = 1\nbatch_size = 64\ndevice = 'cpu'\nthreads = 1\n[eval]\nbootstrap = 5\n"
# They say how long something took, or hold it.
_TIMED = ("history.csv", "state.pt", "metrics.json", "report.html", "d.zarr.report.html", "log.jsonl", "meta.json")


@dataclass(frozen=True)
class Inputs:
    """What the commands work on; none of them changes it."""

    src: Path
    data: Path
    run: Path
    recipe: Path

    @classmethod
    def make(cls, folder: Path, programs: Programs) -> Inputs:
        """Make twelve small series, a dataset of them, and a run on it."""
        inputs = cls(folder / "rsna", folder / "data.zarr", folder / "run", folder / "recipe.toml")
        inputs.recipe.write_text(RECIPE)
        for words in (
            ("ich-prep", "synth", "--out", inputs.src, "--series", 12, "--size", 32, "--workers", 0),
            ("ich-prep", "build", "--src", inputs.src, "--out", inputs.data, *BUILD, "--store", "hu"),
            ("ich-train", "run", "--data", inputs.data, "--out", inputs.run, "--recipe", inputs.recipe),
        ):
            done = programs.run(*words)
            assert done.status == 0, done.output
        return inputs


@dataclass(frozen=True)
class Command:
    """A command line; ``copies`` are inputs that it changes, by the name of their copy; ``again`` is what resumes it."""

    words: tuple[object, ...]
    copies: Mapping[str, Path] = field(default_factory=dict)
    again: Callable[[], tuple[object, ...]] | None = None

    def prepare(self, out: Path) -> None:
        """Make the folder ``out`` as the command expects it."""
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name, source in self.copies.items():
            shutil.copytree(source, out / name)

    @property
    def resumed(self) -> tuple[object, ...]:
        """What the user runs after a failure."""
        return self.words if self.again is None else self.again()


def commands(inputs: Inputs, out: Path) -> dict[str, Command]:
    """Return the commands by name; they write to the folder ``out`` and below."""
    src, data, run = inputs.src, inputs.data, inputs.run
    built = ("ich-prep", "build", "--src", src, "--out", out / "d.zarr", *BUILD, "--store", "hu")
    trained = ("--data", data, "--recipe", inputs.recipe, "--out")
    dataset = {"d.zarr": data, "d.zarr.build": data.with_name("data.zarr.build")}

    def resume(name: str) -> Callable[[], tuple[object, ...]]:
        words = ("ich-train", "cv" if name == "cv" else "run", *trained, out / name)
        return lambda: (*words, "--resume") if (out / name / "recipe.toml").exists() else words

    def overwrite_again() -> tuple[object, ...]:
        """As the messages say: without --overwrite, unless the old dataset is still there."""
        old = (out / "d.zarr" / "zarr.json").exists()
        return (*built[:-1], "windows", *(["--overwrite"] if old else []))

    return {
        "synth": Command(("ich-prep", "synth", "--out", out / "s", "--series", 2, "--size", 32, "--workers", 0)),
        "build": Command((*built, "--report")),
        "overwrite": Command((*built[:-1], "windows", "--overwrite"), dataset, overwrite_again),
        "scan": Command(
            ("ich-prep", "scan", src, "--layout", "folder", "--csv", out / "v.csv", "--label-template", out / "l.csv")
            + ("--workers", 0)
        ),
        "report": Command(("ich-prep", "report", data, "--out", out / "r.html")),
        "quarantine": Command(
            ("ich-prep", "quarantine", data, "--csv", out / "q.csv", "--copy-to", out / "q", "--src", src)
        ),
        **{
            f"export {form}": Command(
                ("ich-prep", "export", data, "--out", out / form, "--as", form, "--run", run, "--series", 1)
                + (("--resample",) if form == "nifti" else ())
            )
            for form in ("nifti", "png", "npy")
        },
        "view": Command(("ich-prep", "view", data, "--html", out / "v", "--run", run, "--series", 1)),
        "clean": Command(("ich-prep", "clean", out / "d.zarr"), dataset),
        "run": Command(("ich-train", "run", *trained, out / "run"), again=resume("run")),
        "resume": Command(
            ("ich-train", "run", *trained, out / "run", "--epochs", 2, "--resume"),
            {"run": run},
        ),
        "cv": Command(("ich-train", "cv", *trained, out / "cv"), again=resume("cv")),
        "eval": Command(("ich-train", "eval", run, "--data", data, "--out", out / "e")),
        "eval again": Command(("ich-train", "eval", out / "run", "--data", data), {"run": run}),
        "compare": Command(
            ("ich-train", "compare", run, out / "run", "--out", out / "c" / "c.html", "--bootstrap", 5), {"run": run}
        ),
        "predict": Command(("ich-train", "predict", run, "--data", data, "--out", out / "p" / "p.csv")),
        "embed": Command(("ich-train", "embed", run, "--data", data, "--out", out / "f")),
        "explain": Command(("ich-train", "explain", out / "run", "--data", data, "--limit", 8), {"run": run}),
    }


def readers(inputs: Inputs) -> dict[str, tuple[object, ...]]:
    """Return the commands that only read."""
    return {
        "info": ("ich-prep", "info", inputs.data),
        "verify": ("ich-prep", "verify", inputs.data, "--src", inputs.src),
        "find": ("ich-prep", "find", inputs.data, "--row", 0),
        "quarantine": ("ich-prep", "quarantine", inputs.data),
    }


def files_of(out: Path) -> dict[str, str]:
    """Return the digest of each file below ``out`` whose bytes follow from the command alone."""
    return {
        str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in _TIMED and "d.zarr.build" not in path.parts
    }
