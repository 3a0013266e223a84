"""Recipes out of a few settings, what refuses them, and a file to write one to."""

from __future__ import annotations

import pytest

from qalora.errors import InputError
from qalora.recipe import make_recipe
from qalora.recipe.reading import with_preset

MINIMAL = [("model", "tiny"), ("data.train", "rows.jsonl")]


@pytest.fixture(scope="session")
def build():
    """make(*pairs, **settings) → a recipe that has what every recipe needs, and these."""

    def make(*settings, **more):
        return make_recipe([*MINIMAL, *with_preset([*settings, *more.items()])], origin="test")

    return make


@pytest.fixture(scope="session")
def refusal(build):
    """of(*pairs) → the message with which they are refused."""

    def of(*settings):
        with pytest.raises(InputError) as error:
            build(*settings)
        return str(error.value)

    return of


@pytest.fixture(scope="session")
def get():
    """of(recipe, dotted name) → the setting."""

    def of(recipe, key):
        for part in key.split("."):
            recipe = getattr(recipe, part)
        return recipe

    return of


@pytest.fixture
def write(tmp_path):
    """make(text) → the path of a recipe's file that holds it."""

    def make(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return make
