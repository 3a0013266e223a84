"""Whether a model was taught to chat, and what its chat template ends a turn with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from qalora.data.chat_template import chat_template
from qalora.data.formats import Example

ANSWER = "an answer of a few words"


def taught_to_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's model stops where its own chat template ends a turn.

    Tokenizers of pretrained models may bring a template as well, but nothing stops these models at its end of turn.
    """
    if not tokenizer.chat_template:
        return False
    known, ends = unsplit(tokenizer), template_ends(tokenizer)
    return bool(ends) and known.get(ends[-1]) in {tokenizer.eos_token_id, *_stops(tokenizer.name_or_path)}


def is_chat(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a row is a chat already: it has lists of messages, or texts with the special tokens of a template."""
    marks = [*map(str, tokenizer.all_special_tokens), *(end for end in template_ends(tokenizer) if end.strip())]
    texts = [value for value in row.values() if isinstance(value, str)]
    messages = [value for value in row.values() if isinstance(value, (list, tuple)) and value]
    return any(isinstance(value[0], Mapping) for value in messages) or any(m in text for text in texts for m in marks)


def without_joints(example: Example) -> Example:
    """The example without the blanks around its texts: they joined prompt and completion, as a template does in a
    chat."""
    turns = tuple(replace(turn, text=turn.text.strip()) for turn in example.turns)
    return replace(example, turns=turns, others=tuple(text.strip() for text in example.others))


def _stops(model: str) -> list[int]:
    """The tokens at which a generation of the model ends, by its generation_config.json; none where there is none."""
    try:
        stops = GenerationConfig.from_pretrained(model).eos_token_id if model else None
    except (OSError, ValueError):
        return []
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def template_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What the chat template writes after an assistant's text, up to its first token: a text, a token, both, or
    nothing."""
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = chat_template(tokenizer).apply(turns)
    except Exception:  # jinja's own errors, or raise_exception() of the template
        return ()
    _, found, after = text.rpartition(ANSWER)
    if not found:
        return ()
    there = [(after.find(token), -len(token), token) for token in unsplit(tokenizer) if token in after]
    if not there:
        return (after.rstrip() or after,) if after else ()
    position, _, token = min(there)
    words = after[:position].rstrip()
    return (words, token) if words else (token,)


def unsplit(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """Text → id of the tokens that are read as one wherever their text stands: the added ones, special or not."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {text: token for text, token in (added | special).items() if text.strip()}
