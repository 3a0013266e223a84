"""Writes settings.md and python-api.md from the recipe's field descriptions and the docstrings of the public API.

python docs/generate.py
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import qalora
from qalora import recipe
from qalora.base.families import FAMILIES, GGUF_OF_TRANSFORMERS, REFUSED

DOCS = Path(__file__).parent
HEAD = "<!-- Written by docs/generate.py; edit the sources. -->\n\n"
BOUNDS = (
    (annotated_types.Ge, "ge", "≥"),
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Le, "le", "≤"),
    (annotated_types.Lt, "lt", "<"),
)


def main() -> None:
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """File name → text of every page that is written by this script."""
    return {"settings.md": settings_page(), "python-api.md": api_page(), "model-families.md": families_page()}


# -------------------------------------------------------------------------------------------------- model-families.md


def families_page() -> str:
    """What holds for each family, by its record."""
    lines = [
        "| `model_type` | our kernels | attention | packing, shared prefixes | GGUF |",
        "|---|---|---|---|---|",
    ]
    for model_type, family in FAMILIES.items():
        parts = {"norms": family.norm, "MLP": family.mlp}
        kernels = ", ".join(name for name, held in parts.items() if held) or "none (plain)"
        shared = f"no: {family.across_rows}" if family.across_rows else "packing" if family.eager else "both"
        normed = ", norms on q and k" if family.norms[1] else ""
        attention = "fused q, k, v" if family.attention else f"transformers'{normed}"
        gguf = f"`{family.gguf.architecture}`" if family.gguf else "refused"
        lines.append(f"| `{model_type}` | {kernels} | {attention} | {shared} | {gguf} |")
    refused = ["| it is | `model_type` |", "|---|---|"]
    for what in dict.fromkeys(what for what, _ in REFUSED.values()):
        names = ", ".join(f"`{name}`" for name, (kind, _) in REFUSED.items() if kind == what)
        refused.append(f"| {what} | {names} |")
    return (
        f"{HEAD}# Which model families can be trained\n\n"
        "Every row trains, scores, allocates, plans, merges (`--format hf`, from dequantized and from original\n"
        "weights) and exports (`peft`, `peft-uniform`). Where our kernels do not hold, transformers' own forward\n"
        "runs, with our low-rank layers, loss, checkpointing and tiles. `tests/test_families.py` tries each row\n"
        "on tiny random models against transformers with PEFT: loss and gradients at each level of checkpointing,\n"
        "in tiles, packed, with shared prefixes and in bf16; exact scores, surgery, resuming, exports, merges,\n"
        "and the plan of a step. That is within 5 % of the tensors alive, in tiles and in bf16 too.\n"
        "No row was tried on real weights there.\n\n"
        "q, k and v are one node of ours where heads are rotated whole and nothing is between the layers and the\n"
        "rotation. Where q and k have norms, the norms are ours, and the layers run one by one.\n\n"
        "The plans of `qwen3_5_text` and `lfm2` are for torch's own delta nets and convolutions. With\n"
        "`flash-linear-attention` and `causal-conv1d` installed a step takes less.\n\n"
        + "\n".join(lines)
        + "\n\nAny other decoder of transformers whose blocks are linear layers goes the plain path; a line says so. "
        "On a CPU a linear\n"
        "layer in 4 bits needs rows of a multiple of 64 inputs; `--no-quantize` trains others.\n"
        "\nThe GGUF column is the architecture of the files that `--format gguf` and `gguf-lora` write, and that\n"
        "`--model FILE.gguf` reads. llama.cpp (llama-cpp-python 0.3.36) reads those of the tests' tiny models. Its\n"
        "logits are those of transformers within 2e-4, from the merge and from the base with the adapter beside it.\n"
        "Those of Gemma are within 1e-2, for it looks GELU up in a table of half precision. transformers itself\n"
        f"reads the architectures {', '.join(f'`{name}`' for name in GGUF_OF_TRANSFORMERS)} so. Some of a model\n"
        "llama.cpp has no key for, such as windows in a `llama` or an attention scale of one's own in a `gemma3`.\n"
        "That is refused or said by name.\n\n"
        "## What is refused, by name\n\n" + "\n".join(refused) + "\n"
    )


# -------------------------------------------------------------------------------------------------------- settings.md


def settings_page() -> str:
    """Every setting of a recipe, a table per section."""
    sections = [(name, model) for name, model in nested(recipe.Recipe)]
    own = rows(recipe.Recipe, "")
    tables = [f"## The run\n\n{table(own)}"]
    tables += [f"## {name}\n\n{flowing(model.__doc__)}{table(rows(model, f'{name}.'))}" for name, model in sections]
    return (
        f"{HEAD}# Which settings a recipe has\n\n"
        "A recipe is a YAML file of the settings below. On the command line each can follow as `key=value` or `--key "
        "value`.\n"
        "Many names of other tools (`lora_r`, `cutoff_len`, `epochs` …) are taken too; an unknown name is refused with "
        "advice.\n"
        "`qalora recipes show NAME` prints a shipped recipe, and `--dry-run` prints the settings of a run.\n\n"
        + "\n".join(tables)
    )


def nested(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections of a recipe: name, class."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def rows(model: type[BaseModel], prefix: str) -> list[tuple[str, str, str]]:
    """(setting, default, values and meaning) of the settings that are no sections."""
    sections = dict(nested(model))
    return [
        (f"`{prefix}{name}`", f"`{shown(field.get_default(call_default_factory=True))}`", meaning(field))
        for name, field in model.model_fields.items()
        if name not in sections
    ]


def meaning(field: FieldInfo) -> str:
    """The description, after the words and the bounds that a value may have."""
    words = "; ".join(filter(None, (choices(field.annotation), bounds(field))))
    return cell(". ".join(filter(None, (words, field.description or ""))))


def choices(annotation: Any) -> str:
    """The values of a Literal, wherever it stands in the type; else nothing."""
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{shown(value)}`" for value in typing.get_args(annotation))
    return ", ".join(filter(None, (choices(part) for part in typing.get_args(annotation))))


def bounds(field: FieldInfo) -> str:
    return ", ".join(
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for kind, name, sign in BOUNDS
        if isinstance(limit, kind)
    )


def shown(value: Any) -> str:
    """As YAML has it on one line."""
    if isinstance(value, float) and value and abs(value) < 1e-3:
        return f"{value:g}"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def table(lines: list[tuple[str, str, str]]) -> str:
    head = "| setting | default | values, and what it does |\n|---|---|---|\n"
    return head + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def flowing(doc: str | None) -> str:
    return f"{' '.join(doc.split())}\n\n" if doc else ""


# ------------------------------------------------------------------------------------------------------ python-api.md


def api_page() -> str:
    """Every public name: signature and docstring."""
    names = "".join(f"- [`{name}`](#{name.lower()})\n" for name in qalora.__all__)
    return (
        f"{HEAD}# What the Python API offers\n\n"
        "The names below are the supported API; `import qalora` loads nothing heavy before one is used.\n"
        "[TRL and the Trainer](trl-and-trainer.md) shows them at work.\n\n"
        f"{names}\n" + "\n".join(entry(name, public(name)) for name in qalora.__all__)
    )


def public(name: str) -> Any:
    """What stands behind a public name, also where a command's module of that name has been imported since."""
    return getattr(import_module(qalora._HOMES[name]), name)


def entry(name: str, thing: Any) -> str:
    """A heading, the signature, and the docstring as it stands."""
    parts = [f"## {name}", f"```python\n{signature(name, thing)}\n```"]
    if doc := inspect.getdoc(thing):
        parts.append(f"```text\n{without_pydantic(doc)}\n```")
    return "\n\n".join(parts) + "\n"


def signature(name: str, thing: Any) -> str:
    """One parameter per line where they are many."""
    kind = "class " if inspect.isclass(thing) else ""
    if inspect.isclass(thing) and issubclass(thing, BaseModel):
        return f"class {name}: see settings.md for its fields"
    if not callable(thing):
        return f"{name}: {type(thing).__name__}"
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):  # of classes in C, and exceptions
        return f"{kind}{name}"
    parameters = [address_free(str(parameter)) for parameter in _marked(found)]
    returns = (
        ""
        if kind or found.return_annotation is inspect.Signature.empty
        else f" -> {_annotation(found.return_annotation)}"
    )
    line = f"{kind}{name}({', '.join(parameters)}){returns}"
    if len(line) <= 100:
        return line
    return f"{kind}{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returns}"


def _marked(found: inspect.Signature) -> Iterator[Any]:
    """The parameters, with / and * where they stand in a signature."""
    kinds = [parameter.kind for parameter in found.parameters.values()]
    starred = inspect.Parameter.VAR_POSITIONAL in kinds
    for position, parameter in enumerate(found.parameters.values()):
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            yield "*"
            starred = True
        annotation = parameter.annotation
        yield parameter.replace(annotation=Unquoted(annotation)) if isinstance(annotation, str) else parameter
        after = kinds[position + 1 : position + 2]
        if parameter.kind is parameter.POSITIONAL_ONLY and after != [parameter.POSITIONAL_ONLY]:
            yield "/"


class Unquoted:
    """An annotation that is a text, shown without quotes."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def address_free(text: str) -> str:
    """A default such as a function is shown by its name, for its address changes with every process."""
    return re.sub(r"<(?:function|bound method|class) '?([\w.]+)'?(?: at 0x[0-9a-f]+)?>", r"\1", text)


def without_pydantic(doc: str) -> str:
    return "" if doc.startswith("!!! abstract") else doc


if __name__ == "__main__":
    main()
