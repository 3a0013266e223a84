"""`qalora COMMAND` and `python -m qalora COMMAND`: one table drives both."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from qalora import __version__
from qalora.cli import DONE, run
from qalora.errors import InputError

COMMANDS = {
    "finetune": "train an adapter on a frozen 4-bit base",
    "plan": "memory of a run by term, and whether it fits a card",
    "preview": "rows as they are trained on, with what is learned marked",
    "score": "AB-LoRA importance of every rank of an adapter",
    "compress": "any LoRA in, a smaller one out that costs no more than asked",
    "merge": "adapter + base → a model folder, a GGUF file, or the adapter in another form",
    "evaluate": "loss, accuracy, exact match, ROUGE-L on a file",
    "generate": "one prompt, one instruction, or a chat",
    "models": "the models that have a name, and the memory of a run on each",
    "doctor": "this machine: versions, devices, what would fail or be slow, and what to do",
    "report": "one page of a run: losses, ranks round by round, speed, memory, answers",
    "push": "an adapter or a merged folder, with its card, to the Hub",
    "recipes": "list the recipes; `recipes show NAME` prints one",
}
USAGE = (
    "usage: qalora COMMAND …   (each has --help)\n\n"
    + "\n".join(f"  {name:<10}{does}" for name, does in COMMANDS.items())
    + "\n\nqalora --version"
)


def main() -> int:
    return run(_dispatch)


def _dispatch(argv: list[str]) -> int:
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return DONE
    if command == "--version":
        print(__version__)
        return DONE
    if command == "recipes":
        return recipes(rest)
    if command not in COMMANDS:
        raise InputError(f"{command}: unknown command\n\n{USAGE}")
    command_main: Callable[[list[str]], int] = import_module(f"qalora.{command}").main
    return command_main(rest)


def recipes(argv: list[str]) -> int:
    from qalora.recipe import recipe_names, recipe_path

    if argv in (["-h"], ["--help"]):
        print("usage: qalora recipes [show NAME]\n\nlists the shipped recipes, or prints one to copy and change")
    elif not argv:
        for name in recipe_names():
            first_line = recipe_path(name).read_text(encoding="utf-8").splitlines()[0]
            print(f"{name:<14}{first_line.lstrip('# ')}")
    elif len(argv) == 2 and argv[0] == "show":
        print(recipe_path(argv[1]).read_text(encoding="utf-8"), end="")
    else:
        raise InputError("usage: qalora recipes [show NAME].")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
