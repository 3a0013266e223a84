"""From a recipe's file and the words of a command to a Recipe. Torch-free.

A recipe is a YAML file, shipped by name or anywhere; a profile lies over it, and the settings of the command over both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qalora.errors import InputError
from qalora.recipe.rules import disagreements
from qalora.recipe.settings import Recipe, options, setting_types
from qalora.recipe.spellings import ONE_OF, advice_on, is_list, nearest, our_spelling
from qalora.yaml_file import TwiceError, read_yaml

# allocation.preset → what it stands for.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "lora.init": "kaiming",
        "allocation.start": "even",
        "allocation.rounds": 8,
        "allocation.prune_per_round": None,
        "allocation.warmup": "1 epoch",
        "allocation.interval": "0.25 epochs",
        "allocation.val_batch_size": 32,
        "allocation.importance": None,
        "allocation.budget": "ranks",
    }
}


def recipes_dir() -> Path:
    """The folder of shipped recipes: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent.parent
    return next(p for p in (package / "recipes", package.parent / "recipes") if p.is_dir())


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def profile_names() -> list[str]:
    """The shipped profiles: settings for a kind of machine, on top of any recipe."""
    return sorted(path.stem for path in (recipes_dir() / "profiles").glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe given by name or by path.

    Raises:
        InputError: neither a shipped recipe nor a file.
    """
    if name in recipe_names():
        return recipes_dir() / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    raise InputError(
        f"--recipe {name}: no such recipe and no such file{nearest(name, recipe_names())}; "
        f"`qalora recipes` lists them: {', '.join(recipe_names())}."
    )


def load_recipe(
    name: str | Path, overrides: Sequence[tuple[str, Any]] | Mapping[str, Any] = (), profile: str | None = None
) -> Recipe:
    """Reads a recipe, lays a profile over it, and then settings.

    Args:
        name: of a shipped recipe (alpaca, gsm8k …), or the path of a YAML file.
        overrides: dotted name of a setting → value (`{"training.max_steps": 200}`), or pairs of them.
        profile: settings for a kind of machine: 24gb, t4, cpu.

    Raises:
        InputError: every problem of the file and of the overrides, in one message.
    """
    path = recipe_path(str(name))
    overrides = list(overrides.items()) if isinstance(overrides, Mapping) else overrides
    check_once(overrides)
    settings = with_preset(read_settings(path))
    if profile is not None:
        if profile not in profile_names():
            raise InputError(f"--profile {profile}: no such profile; there are {', '.join(profile_names())}.")
        settings = _laid_over(settings, read_settings(recipes_dir() / "profiles" / f"{profile}.yaml"))
    origin = f"{path} and the command line" if overrides else str(path)
    return make_recipe(_laid_over(settings, with_preset(overrides)), origin=origin)


def asked_recipe(name: str | None, settings: Sequence[tuple[str, Any]], command: str) -> Recipe:
    """The recipe that a command's settings change, or, without a name, the one that they make.

    Args:
        command: which they are of, for errors.
    """
    if name:
        return load_recipe(name, settings)
    check_once(settings)
    return make_recipe(settings, origin=command)


def _laid_over(below: Sequence[tuple[str, Any]], above: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Both, without what a setting above says by another name below."""
    known = dict(setting_types())

    def name(key: str) -> str | None:
        return our_spelling(key, None, known)[0]

    given = {name(key) for key, value in above if value is not None}
    gone = {one if one not in given else other for one, other in ONE_OF if (one in given) != (other in given)}
    return [*((key, value) for key, value in below if name(key) not in gone), *above]


def with_preset(settings: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """What allocation.preset stands for, and then the settings that were given beside it, which win."""
    preset = PRESETS.get(str(dict(settings).get("allocation.preset")), {})
    return [*preset.items(), *settings]


def read_settings(path: Path) -> list[tuple[str, Any]]:
    """A YAML tree of settings → (dotted key, value).

    Raises:
        InputError: not a YAML mapping, or two values for one setting, also under names of other tools.
    """
    try:
        tree, lines = read_yaml(path.read_text(encoding="utf-8-sig"))
    except TwiceError as error:
        raise InputError(f"{path}: {error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a recipe is a mapping of settings, this file holds {type(tree).__name__}.")
    settings = list(_flatten(tree))
    check_once(settings, str(path), lines)
    return settings


def check_once(
    settings: Sequence[tuple[str, Any]], where: str = "command line", lines: Mapping[str, list[int]] | None = None
) -> None:
    """
    Args:
        settings: (dotted key, value), of one place.
        lines: dotted key → the lines where it stands, of a file.

    Raises:
        InputError: one setting has two values, under whichever names.
    """
    known, lines = dict(setting_types()), lines or {}
    first: dict[str, tuple[str, Any, Any]] = {}
    for key, given in settings:
        canonical, value = our_spelling(key, given, known)
        if canonical is None:
            continue
        other, other_given, other_value = first.setdefault(canonical, (key, given, value))
        if value != other_value and value == value:  # not a number is no other than itself
            earlier = f"{other}={other_given}" + (f" (line {lines[other][0]})" if other in lines else "")
            later = f"{key}={given}" + (f" (line {lines[key][-1]})" if key in lines else "")
            raise InputError(f"{where}: two values for {canonical}, {earlier} and {later}; keep one.")


def make_recipe(settings: Sequence[tuple[str, Any]], *, origin: str) -> Recipe:
    """Builds a Recipe from (dotted key, value) settings, later ones winning; `origin` names them in errors."""
    known = dict(setting_types())
    problems: list[str] = []
    tree: dict[str, Any] = {}
    for key, value in settings:
        canonical, value = our_spelling(key, value, known)
        if canonical is None:
            first = next((name for name in known if name.startswith(f"{key}.")), None)
            told = f"{key}={value!r}: a section; write its settings by their own names, such as {first}"
            problems.append(told if first else f"{key}: unknown setting{advice_on(key, known)}")
            continue
        *parents, leaf = canonical.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    try:
        recipe = Recipe.model_validate(tree)
        problems += disagreements(recipe)
    except ValidationError as error:
        problems += _described(error, known)
    if problems:
        raise InputError(f"{origin}: " + "; ".join(problems) + ("" if problems[-1].endswith("?") else "."))
    return recipe


def checked(recipe: Recipe) -> Recipe:
    """A recipe that a script made or changed, held to what one of a file is held to.

    Raises:
        InputError: every problem of it, in one message.
    """
    settings = recipe.model_dump(exclude_unset=True, warnings=False)
    return make_recipe(list(_flatten(settings)), origin="recipe")


def parse_overrides(
    arguments: Sequence[str], sections: Sequence[str] = tuple(Recipe.model_fields)
) -> list[tuple[str, Any]]:
    """`--key value`, `--key=value`, `--flag` and `key=value` → (key, value), values parsed as YAML.

    Args:
        sections: of the recipe, those that the command reads.

    Raises:
        InputError: a word that is none of these, a value that is not YAML, or a setting of another section.
    """
    overrides, rest, known = [], list(arguments), dict(setting_types())
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not equals:
            if not word.startswith("--"):
                raise InputError(f"{word}: not an option; write key=value or --key value.")
            text = rest.pop(0) if rest and not _starts_setting(rest[0]) else "true"
        canonical, _ = our_spelling(key, None, known)
        if canonical and canonical.split(".")[0] not in sections:
            raise InputError(f"{key}: has no effect here; settings of {', '.join(sections)} can follow.")
        overrides.append((key, _parsed(key, text, known.get(canonical or ""))))
    return overrides


def _parsed(key: str, text: str, annotation: Any) -> Any:
    """The value of an override: YAML, but a text, a path above all, as it stands where it is neither null nor in
    quotes."""
    a_text = annotation in (str, str | None, str | list[str], str | list[str] | None)
    a_list = is_list(annotation) and text.startswith("[") and text.endswith("]")
    if a_text and not a_list and text not in ("", "null") and text[:1] not in "\"'":
        return text
    try:
        return read_yaml(text)[0]
    except TwiceError as error:
        raise InputError(f"{key}: {error}.") from None
    except yaml.YAMLError:
        if str in options(annotation):  # such as a pattern, [ab].jsonl
            return text
        raise InputError(f"{key}: the value {text!r} is not valid YAML; quote it.") from None


def _starts_setting(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return word.startswith("--") or bool(equals and our_spelling(key, None, dict(setting_types()))[0])


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    known = dict(setting_types())
    sections = {name.rpartition(".")[0] for name in known}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if dotted in sections and value is None:  # all its lines are comments
            continue
        if isinstance(value, Mapping) and dotted not in known:
            yield from _flatten(value, f"{dotted}.")
        else:
            yield dotted, value


def _described(error: ValidationError, known: Mapping[str, Any]) -> list[str]:
    """One problem a setting, though a setting of several types fails once for each of them."""
    problems: dict[str, list[str]] = {}
    for e in error.errors():
        message = e["msg"].removeprefix("Value error, ")
        dotted = [".".join(map(str, e["loc"][:end])) for end in range(1, len(e["loc"]) + 1)]
        if not dotted:
            problems[message] = []
            continue
        where = next((name for name in dotted if name in known), dotted[-1])
        problems.setdefault(f"{where}={e['input']!r}: ", []).append(f"{message[0].lower()}{message[1:]}")
    return [where + ", or ".join(messages) for where, messages in problems.items()]
