"""The options of a build: flags override the recipe, each is checked, and the spec is separate from the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ich_prep.dataset.spec import Spec
from ich_prep.dataset.windows import PRESETS, Window
from ich_prep.errors import UsageError
from ich_prep.options import BuildOptions, resolve


def test_nothing_given_gives_the_defaults() -> None:
    assert resolve(None, {}) == BuildOptions()
    assert BuildOptions().spec() == Spec()


def test_flags_win_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[build]\nsize = 256\ncodec = "zstd"\nwindows = ["brain", "blood=75/215"]\n', encoding="utf-8")
    options = resolve(recipe, {"size": 128})
    assert (options.size, options.codec) == (128, "zstd")
    assert options.windows == (PRESETS["brain"], Window("blood", center=75, width=215))
    assert resolve(recipe, {"windows": "stroke, bone"}).windows == (PRESETS["stroke"], PRESETS["bone"])


def test_a_recipe_may_set_every_option(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[build]\n"
        'layout = "folder"\nclasses = ["any", "mass"]\nlabels = "labels.csv"\n'
        'build_dir = "work"\nsize = 256\nstore = "hu"\nwindows = "brain"\n'
        'slices_per_shard = 64\ncodec = "none"\norientation = "as-stored"\n'
        'image_types = "original"\nrescale_types = "US"\nallow_burned_in = true\n'
        'patients = "study"\nlink = "patient,study"\nsplit_groups = true\nallow_lost_labels = true\n'
        'include = ["BodyPartExamined=HEAD"]\nexclude = ["KVP=80"]\nmin_slices = 3\none_series_per_study = "thickest"\n'
        'folds = 3\nworkers = 0\nscheduler = "tls://127.0.0.1:8786"\n'
        "max_quarantined = 0.5\nallow_unlabelled = true\nallow_missing_images = true\nallow_contradictions = true\n"
        'label_key = ["patient_id=Fall, Nr."]\nlabel_column = ["any=Blutung"]\n'
        'ignore_columns = "all"\nkeep_columns = ["age"]\n'
        'identifiers = "pseudonymise"\nkey = "one.key"\nallow_kept_columns = true\nreport = true\n'
        'tls_ca = "ca.pem"\ntls_cert = "cert.pem"\ntls_key = "key.pem"\n'
        'allow_full_disk = true\nlog_json = true\nendpoint = "http://127.0.0.1:9000"\natomic = false\n',
        encoding="utf-8",
    )
    options = resolve(recipe, {})
    assert options.model_dump(exclude_defaults=True).keys() == BuildOptions.model_fields.keys()
    assert options.label_key == ("patient_id=Fall, Nr.",)  # a column's name may have a comma
    assert options.spec().model_dump().keys() == Spec.model_fields.keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"codek": "lz4"}, "'codek' is unknown.*Did you mean 'codec'"),
        ({"codec": "gzip"}, "codec: .*'gzip'"),
        ({"size": 8}, "size: .*8"),
        ({"workers": -1}, "workers: .*-1"),
        ({"max_quarantined": 1.5}, "max_quarantined: .*1.5"),
        ({"folds": 1}, "folds: .*1"),
        ({"windows": "brian"}, "Did you mean 'brain'"),
        ({"windows": "brain,brain"}, "different names"),
        ({"windows": ""}, "Expected"),
        ({"windows": "x=40/0"}, "greater than 0"),
    ],
)
def test_invalid_values_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(None, given)


def test_an_unknown_key_of_a_recipe_is_reported_with_its_path(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[build]\nworkres = 2\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"recipe\.toml \[build\]: key 'workres'.*Did you mean 'workers'"):
        resolve(recipe, {})


def test_options_that_do_not_change_bytes_are_not_in_the_spec() -> None:
    assert resolve(None, {"workers": 0, "max_quarantined": 1.0}).spec() == resolve(None, {"workers": 7}).spec()


@pytest.mark.parametrize("name", ["include", "exclude", "label_key", "keep_columns"])
def test_one_text_is_a_list_of_one(name: str, tmp_path: Path) -> None:
    """On the command line, in a recipe and from Python alike; it is not split at its commas."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[build]\n{name} = "BodyPartExamined=HEAD,BRAIN"\n', encoding="utf-8")
    expected = ("BodyPartExamined=HEAD,BRAIN",)
    assert getattr(resolve(recipe, {}), name) == expected
    assert getattr(resolve(None, {name: expected[0]}), name) == expected
    if name in Spec.model_fields:
        assert getattr(resolve(recipe, {}).spec(), name) == getattr(Spec(**{name: expected[0]}), name) == expected
