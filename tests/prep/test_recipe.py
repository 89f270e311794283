"""Recipes: sections and keys that are unknown name the nearest known one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from ich_prep.errors import UsageError
from ich_prep.recipe import load_section, read_section, refuse_unknown


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int = 512
    windows: list[str] = []


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "recipe.toml"


def test_a_section_overrides_the_defaults(recipe: Path) -> None:
    recipe.write_text('[build]\nsize = 256\n[train]\nanything = "goes"\n', encoding="utf-8")
    assert load_section(recipe, "build", Model) == Model(size=256)
    assert load_section(recipe, "eval", Model) == Model()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[build]\nsiez = 256\n", r"\[build\]: key 'siez' is unknown. Known: size, windows. Did you mean 'size'\?"),
        ("[buidl]\nsize = 256\n", r"section 'buidl' is unknown. Known: build, train, eval. Did you mean 'build'\?"),
        ("size = 256\n", "section 'size' is unknown"),
        ("build = 3\n", r"Expected a table \[build\].*found the value 3"),
        ("[build]\nsize = 'large'\n", r"size: .*found 'large'"),
        ("[build]\nsize = \n", "does not parse"),
    ],
)
def test_invalid_options_are_refused(text: str, message: str, recipe: Path) -> None:
    recipe.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        load_section(recipe, "build", Model)


def test_every_value_that_is_wrong_is_named_at_once(recipe: Path) -> None:
    recipe.write_text("[build]\nsize = 'large'\nwindows = 3\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"size: .*windows: "):
        load_section(recipe, "build", Model)


def test_a_missing_recipe_is_refused(recipe: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe\.toml; there is no such file"):
        read_section(recipe, "build")


def test_a_binary_recipe_is_refused(recipe: Path) -> None:
    recipe.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="does not parse"):
        read_section(recipe, "build")


def test_a_dissimilar_name_gets_no_hint() -> None:
    with pytest.raises(UsageError) as raised:
        refuse_unknown(["zzz"], ["size", "codec"], where="here: key")
    assert str(raised.value) == "here: key 'zzz' is unknown. Known: size, codec."


@pytest.mark.parametrize(
    "text",
    [
        f"[train]\nseed = {'9' * 5000}\n",
        f"[train]\nseed = 0x{'9' * 5000}\n",
        f"[train]\nmodel = {'[' * 3000}{']' * 3000}\n",
        f"[train]\nmodel = '{'x' * (1 << 21)}'\n",
        f"[train]\n{'k' * 100_000} = 1\n",
        f"[train]\nmodel = {[{'a': 1}] * 5000}\n".replace(":", "=").replace("'", ""),
    ],
    ids=["decimal", "hexadecimal", "nested", "long", "long key", "wrong type"],
)
def test_a_huge_recipe_is_one_short_message(text: str, tmp_path: Path) -> None:
    from ich_train.config import TrainConfig

    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_section(path, "train", TrainConfig)
    assert len(str(caught.value)) < 2000
