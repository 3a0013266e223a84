"""Imports run one way: recipe, memory, adapter.allocation (no torch) ← base, data ← kernels ← adapter ← metrics ←
training, deploy, results, pictures ← commands. Only commands and training/ see a Recipe."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qalora

ROOT = Path(qalora.__file__).parent
MODULES = {
    ".".join(("qalora", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
FOUNDATION = {
    "errors": 0,
    "arguments": 0,
    "environment": 0,
    "paths": 0,
    "files": 0,
    "locking": 0,
    "quiet": 0,
    "progress": 0,
    "watch": 0,
    "processes": 0,
    "card_files": 1,
    "rank_grid": 0,
    "yaml_file": 0,
    "text_scores": 0,
    "recipe": 1,
    "recipe.advice": 0,
    "recipe.rules": 1,
    "recipe.settings": 1,
    "recipe.spellings": 1,
    "recipe.reading": 1,
    "adapter.allocation": 0,
    "adapter.targets": 0,
    "adapter.provenance": 0,
    "sizes": 1,
    "flags": 0,
    "memory": 1,
    "block_memory": 1,
    "fitting": 1,
    "terminal": 0,
    "base.precision": 1,
    "base.families": 0,
    "base.blocks": 0,
    "base.published": 0,
    "base.measured": 0,
    "base.layout": 0,
    "base.registry": 0,
    "base.structure": 0,
    "base.weight_files": 0,
    "base.gguf_reader": 0,
    "base.gguf_fields": 0,
}
LAYERS = {
    "base": 2,
    "data": 2,
    "kernels": 3,
    "adapter": 4,
    "answers": 5,
    "metrics": 5,
    "training": 6,
    "deploy": 6,
    "pictures": 6,
    "results": 6,
}
COMMANDS = 7
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "pyarrow", "safetensors"}
TORCH_FREE = [
    "errors",
    "arguments",
    "recipe",
    "yaml_file",
    "base.families",
    "base.blocks",
    "base.published",
    "base.layout",
    "base.gguf_fields",
    "base.registry",
    "base.weight_files",
    "memory",
    "block_memory",
    "sizes",
    "flags",
    "fitting",
    "base.precision",
    "adapter.allocation",
    "adapter.compression",
    "adapter.provenance",
    "data.file_types",
    "data.cells",
    "data.conversation",
    "data.formats",
    "data.prompts",
    "data.reading",
    "data.references",
    "data.rows",
    "text_scores",
    "environment",
    "paths",
    "processes",
    "progress",
    "quiet",
    "watch",
    "recipe.advice",
    "recipe.reading",
    "adapter.targets",
    "adapter.given",
    "base.fingerprint",
    "training.planning",
    "training.settling",
    "training.run_folder",
    "training.resume",
    "card_files",
    "rank_grid",
    "results.facts",
    "results.compression",
    "results.card",
    "results.card_sections",
    "results.hub",
    "results.page",
    "results.finish",
]
COMMAND_NAMES = [
    "finetune",
    "plan",
    "preview",
    "score",
    "compress",
    "merge",
    "evaluate",
    "generate",
    "report",
    "push",
    "models",
    "doctor",
    "cli",
    "__main__",
]


def short(module: str) -> str:
    return module.removeprefix("qalora").removeprefix(".")


def level(module: str) -> int:
    name = short(module)
    if name in FOUNDATION:
        return FOUNDATION[name]
    return LAYERS.get(name.split(".")[0], COMMANDS)


def imports(path: Path, *, at_import_only: bool) -> set[str]:
    """Modules that a file imports: all of them, or those that run with its import (not in functions or
    TYPE_CHECKING)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        deferred = typing_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if not (at_import_only and deferred):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def run_imports(path: Path) -> set[str]:
    """Modules that a file imports when it runs, in functions too, but not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
    return found


def packages(module: str) -> set[str]:
    """The module and every package above it: all of them run when it is imported."""
    parts = module.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)} & MODULES.keys()


def reached(module: str) -> dict[str, str]:
    """Outside module → the module of ours that imports it, for all that runs when `module` is imported."""
    seen: set[str] = set()
    outside: dict[str, str] = {}
    waiting = packages(module)
    while waiting:
        current = waiting.pop()
        seen.add(current)
        for name in imports(MODULES[current], at_import_only=True):
            if name.split(".")[0] == "qalora":
                waiting |= packages(name) - seen
            else:
                outside.setdefault(name.split(".")[0], current)
    return outside


@pytest.mark.parametrize("module", [name for name in MODULES if short(name)])
def test_no_arrow_points_back(module):
    ours = {name for name in imports(MODULES[module], at_import_only=False) if name.startswith("qalora.")}
    back = {name for name in ours if level(name) > level(module)}
    assert not back, f"{module} imports {sorted(back)}, which stand above it"


def test_no_module_reaches_itself_not_even_by_imports_in_functions():
    reach = {
        module: {name for name in run_imports(path) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    waiting = True
    while waiting:  # a module that imports none of what is left is in no circle
        leaves = [module for module, others in reach.items() if not others & reach.keys()]
        waiting = bool(leaves)
        for leaf in leaves:
            del reach[leaf]
    assert not reach, f"a circle runs through some of {sorted(reach)}"


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name != "__init__.py"])
def test_every_module_has_its_file_of_tests(module):
    *folders, name = short(module).split(".")
    file = Path(__file__).parent.joinpath(*folders, f"test_{name}.py")
    assert file.is_file(), f"{module}: there is no {file.relative_to(Path(__file__).parents[1])}"


@pytest.mark.parametrize("module", [name for name in MODULES if short(name)])
def test_only_commands_and_runs_see_a_recipe(module):
    if level(module) == COMMANDS or short(module).split(".")[0] in ("recipe", "training"):
        return
    assert not {name for name in imports(MODULES[module], at_import_only=False) if name.startswith("qalora.recipe")}


@pytest.mark.parametrize("name", ["", *TORCH_FREE, *COMMAND_NAMES])
def test_importing_it_brings_no_torch(name):
    module = f"qalora.{name}".rstrip(".")
    if module not in MODULES:
        pytest.fail(f"{module} does not exist")
    heavy = {outside: by for outside, by in reached(module).items() if outside in HEAVY}
    assert not heavy


def test_help_of_every_command_brings_no_torch(run_python):
    code = (
        "import sys, contextlib, io, importlib\n"
        "for name in sys.argv[1:]:\n"
        "    command = importlib.import_module('qalora.' + name)\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        command.parser().parse_args(['--help'])\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & sys.modules.keys()))"
    )
    assert run_python(code, *[name for name in COMMAND_NAMES if name not in ("cli", "__main__")]).strip() == "[]"
