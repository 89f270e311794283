from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ich_prep.errors import UsageError
from ich_prep.options import BuildOptions
from ich_prep.recipe import load_section
from ich_train.config import EvalConfig, TrainConfig, recipe_text

PIPELINES = Path(__file__).parents[2] / "pipelines"

# A file system's names, as far as UTF-8 has them.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
SETTINGS = st.builds(
    TrainConfig,
    data=TEXT.map(Path),
    weights=st.none() | TEXT.map(Path),
    windows=st.lists(TEXT).map(tuple),
    epochs=st.integers(1, 2**40),
    learning_rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    flip=st.booleans(),
    order=st.sampled_from(["shuffled", "windowed"]),
)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe") / "recipe.toml"


@given(settings=SETTINGS, limit=st.none() | st.integers(1, 1000))
def test_a_recipe_reads_back_as_what_was_written(recipe_file: Path, settings: TrainConfig, limit: int | None) -> None:
    evaluation = EvalConfig(limit=limit)
    text = recipe_text({"train": settings.model_dump(), "eval": evaluation.model_dump()})
    recipe_file.write_text(text, encoding="utf-8", newline="")
    assert load_section(recipe_file, "train", TrainConfig) == settings
    assert load_section(recipe_file, "eval", EvalConfig) == evaluation


def test_none_is_only_ever_a_default() -> None:
    for model in (TrainConfig, EvalConfig):
        for name, field in model.model_fields.items():
            if type(None) in getattr(field.annotation, "__args__", ()):
                assert field.default is None, name


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0},
        {"learning_rate": float("inf")},
        {"zoom": 1.5},
        {"order": "sequential"},
        {"precision": "half"},
        {"seed": -1},
        {"val_fold": -1},
    ],
)
def test_impossible_values_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TrainConfig.model_validate(values)


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[train]\nlearning_rat = 0.1\n", encoding="utf-8")
    with pytest.raises(UsageError, match="learning_rate"):
        load_section(recipe, "train", TrainConfig)


@pytest.mark.parametrize("recipe", sorted(PIPELINES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_that_come_along_are_valid(recipe: Path) -> None:
    load_section(recipe, "build", BuildOptions)
    load_section(recipe, "train", TrainConfig)
    load_section(recipe, "eval", EvalConfig)


def test_the_readme_tells_every_recipe_key_and_default() -> None:
    readme = (PIPELINES / "README.md").read_text(encoding="utf-8")
    recipes = {path.stem for path in PIPELINES.glob("*.toml")}
    assert recipes >= {"lecture_baseline", "rsna_resnet50", "rsna_densenet121", "smoke"}
    assert all(f"| `{name}` |" in readme for name in recipes)
    printed = tomllib.loads(readme.split("```toml")[1].split("```")[0])
    assert printed == {
        "train": TrainConfig().model_dump(mode="json", exclude_none=True),
        "eval": EvalConfig().model_dump(mode="json", exclude_none=True),
    }
    build_keys = re.findall(r"`([a-z_]+)`", readme.split("The keys of `[build]`")[1])
    assert set(build_keys) == set(BuildOptions.model_fields)


def test_some_knobs_have_no_default() -> None:
    optional = [name for model in (TrainConfig, EvalConfig) for name, value in model() if value is None]
    assert optional == ["endpoint", "cache", "where", "weights", "features", "where", "limit", "by", "sensitivity"]


def test_every_knob_has_a_help_text() -> None:
    for model in (TrainConfig, EvalConfig):
        for name, field in model.model_fields.items():
            assert field.description, name
            assert field.description.endswith("."), name
