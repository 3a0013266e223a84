"""A flag that several commands have means one thing in all of them."""

from __future__ import annotations

import argparse
from importlib import import_module

import pytest

from qalora.flags import FLAGS, add, settings

COMMANDS = ("plan", "models", "preview", "score", "merge", "evaluate", "generate", "push", "doctor")
OWN = {("merge", "--dtype")}  # of the weights that are written, not of a computation


def actions(command: str) -> dict[str, argparse.Action]:
    parser = import_module(f"qalora.{command}").parser()
    return {flag: action for action in parser._actions for flag in action.option_strings}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shared_flag_begins_with_the_shared_words_and_has_the_shared_type(command):
    for flag, action in actions(command).items():
        if flag in FLAGS and (command, flag) not in OWN:
            known = FLAGS[flag]
            assert (action.help or "").startswith(known.get("help", "")), flag
            assert action.type == known.get("type") and action.choices == known.get("choices"), flag
            assert action.metavar == known.get("metavar"), flag


def test_every_shared_flag_is_shared():
    uses = [flag for command in COMMANDS for flag in actions(command)]
    alone = {flag for flag in FLAGS if uses.count(flag) < 2}
    assert alone <= {"--overwrite", "--dry-run", "--quiet"}  # these `qalora finetune` has too, or its settings


def test_more_words_and_what_holds_without_the_flag_follow_the_meaning():
    parser = argparse.ArgumentParser()
    add(parser, "--model", more="of the training", otherwise="the recipe's")
    add(parser, "--batch-size", default=8)
    add(parser, "--json", more="print it as JSON")
    model, batch_size, json = parser._actions[1:]
    assert model.help == "registry name, Hub id, folder or .gguf file, of the training (default: the recipe's)"
    assert (batch_size.help, batch_size.default) == ("rows a forward pass (default: %(default)s)", 8)
    assert (json.help, json.default) == ("print it as JSON", False)


def test_flags_that_were_given_are_settings_and_own_ones_follow():
    parser = argparse.ArgumentParser()
    add(parser, "--model", "--no-quantize", "--dtype", "--max-seq-len", "--data-format")
    args = parser.parse_args(["--model", "m", "--no-quantize", "--max-seq-len", "64"])
    assert settings(args, {"data.train": "rows", "evaluation.rows": None}) == [
        ("model", "m"),
        ("data.max_seq_len", 64),
        ("quantization.load_in_4bit", False),
        ("data.train", "rows"),
    ]
