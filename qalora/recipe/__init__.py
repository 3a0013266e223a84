"""Recipes: what a run is made of (settings.py), what must agree (rules.py), how it is read and spelled (reading.py,
spellings.py).

Torch-free.
"""

from qalora.recipe.reading import (
    check_once,
    checked,
    load_recipe,
    make_recipe,
    parse_overrides,
    profile_names,
    recipe_names,
    recipe_path,
    recipes_dir,
)
from qalora.recipe.settings import QuantizationConfig, Recipe, setting_types

__all__ = [
    "QuantizationConfig",
    "Recipe",
    "check_once",
    "checked",
    "load_recipe",
    "make_recipe",
    "parse_overrides",
    "profile_names",
    "recipe_names",
    "recipe_path",
    "recipes_dir",
    "setting_types",
]
