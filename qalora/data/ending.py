"""What ends a turn: the tokens, and the texts of several tokens, after which a model has answered.

A tokenizer's eos need not be among them: ChatML over a base model ends with <|im_end|>, and a template in plain words
with "### End". One that is missing makes a model that learned its answers perfectly talk on after them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from qalora.data.instruct import template_ends, unsplit
from qalora.data.rows import IGNORE, Tokenized
from qalora.data.tokenization import TokenizedDataset

T = TypeVar("T")


@dataclass(frozen=True)
class Ending:
    """
    Attributes:
        tokens: ids that each end an answer, the base's own first.
        texts: what ends an answer likewise and is no single token.
        turns: those of the tokens that end a turn by what was taught or by the template, the likeliest first.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...] = ()
    turns: tuple[int, ...] = ()


def ending_of(
    tokenizer: PreTrainedTokenizerBase, own: int | Sequence[int] | None, taught: Sequence[str] = ()
) -> Ending:
    """Everything that ends an answer: of the base, of what was taught, of the tokenizer and of its chat template.

    Args:
        own: eos_token_id of the base's generation config.
        taught: texts, as `taught_ends` finds them and an adapter's Provenance has them.
    """
    known = unsplit(tokenizer)
    ends = [*taught, *(end for end in template_ends(tokenizer) if end.strip())]
    turns = [known[end] for end in ends if end in known]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Ending(
        tokens=_distinct([own] if isinstance(own, int) else own or (), eos, turns),
        texts=_distinct(end for end in ends if end not in known),
        turns=_distinct(turns),
    )


def taught_ends(dataset: TokenizedDataset, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts of what ends the turns that these rows teach, the likeliest first.

    A token ends turns where it is the last of a learned stretch, and is learned nowhere else: stopping there cuts no
    answer of the rows short. What a template writes in plain words is taken from the template.
    """
    last: Counter[int] = Counter()
    inside: set[int] = set()
    for item in dataset.items:
        for stretch, whole in _learned(item):
            last.update(stretch[-1:] if whole else ())
            inside.update(stretch[:-1])
    names = {token: text for text, token in unsplit(tokenizer).items()}
    ends = [names[token] for token, _ in last.most_common() if token in names and token not in inside]
    if any(example.chat for example in dataset.examples):
        answers = [turn.text for example in dataset.examples for turn in example.turns if turn.role == "assistant"]
        for end in template_ends(tokenizer):
            if end in names.values() or not any(end in answer for answer in answers):
                ends.append(end)
    return _distinct(ends)


def _distinct(*values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(itertools.chain(*values)))


def _learned(item: Tokenized) -> Iterator[tuple[list[int], bool]]:
    """(token ids, whether its end was seen) of each stretch of learned tokens; the last one of a row may have been
    cut."""
    stretch: list[int] = []
    for token, label in zip(item["input_ids"], item["labels"], strict=True):
        if label != IGNORE:
            stretch.append(token)
        elif stretch:
            yield stretch, True
            stretch = []
    if stretch:
        yield stretch, not item["truncated"]
