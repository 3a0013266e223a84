"""The prompt that rows were trained with, as one that a server can put around what a user says. Torch-free."""

from __future__ import annotations

import string
from collections.abc import Sequence

from qalora.data.formats import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, Example

PROMPT = "{prompt}"


def served_prompt(examples: Sequence[Example], prompt_template: str | None = None) -> str | None:
    """The text around what a user says, with {prompt} in its place.

    Args:
        prompt_template: the recipe's own, in place of the format's.

    Returns:
        None where rows are chats, or plain text, or where a prompt is made of several columns.
    """
    prompts = [example.prompt[0].text for example in examples if not example.chat and len(example.prompt) == 1]
    if 2 * len(prompts) <= len(examples):
        return None
    if prompt_template is not None:
        return _of_template(prompt_template)
    alpaca = ALPACA_WITHOUT_INPUT.format(instruction=PROMPT)
    heads = (alpaca.partition(PROMPT)[0], ALPACA_WITH_INPUT.partition("{")[0])
    return alpaca if all(prompt.startswith(heads) for prompt in prompts) else PROMPT


def _of_template(template: str) -> str | None:
    """With its one field named prompt, and braces of the text as they are read; None where it has several fields, or
    none."""
    parts = list(string.Formatter().parse(template))
    if sum(name is not None for _, name, _, _ in parts) != 1:
        return None
    return "".join(text + (PROMPT if name is not None else "") for text, name, _, _ in parts)
