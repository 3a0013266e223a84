"""Answers of a model: how they are decoded, where they end, and what of their tokens is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qalora.adapter.provenance import read_provenance
from qalora.base.registry import positions_of
from qalora.data.ending import ending_of
from qalora.errors import InputError
from qalora.kernels.prefixes import causal_lm
from qalora.progress import Track

BROKEN = "\ufffd"  # the last bytes of a character that is not whole yet


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, adapter: str | Path | None) -> tuple[str, ...]:
    """Gives the tokenizer the chat template that the adapter was trained with, and returns what it was taught to end
    with."""
    provenance = read_provenance(adapter) if adapter else None
    if provenance is None:
        return ()
    if provenance.chat_template is not None:
        tokenizer.chat_template = provenance.chat_template
    return provenance.stop_tokens


def generation_config(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, taught: Sequence[str] = (), **options: Any
) -> GenerationConfig:
    """What `options` ask for, plain decoding in everything else, ended by whatever ends a turn of this model.

    The model's own sampling settings and penalties are set aside: a default of the checkpoint is not a
    choice of the user.

    Args:
        taught: further texts that end an answer.
    """
    own = getattr(causal_lm(model), "generation_config", None)
    ending = ending_of(tokenizer, None if own is None else own.eos_token_id, taught)
    plain: dict[str, Any] = dict(num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, use_cache=True)
    if options.get("do_sample"):
        plain |= dict(temperature=1.0, top_p=1.0, top_k=0)
    return GenerationConfig(
        **(plain | options),
        eos_token_id=list(ending.tokens) or None,
        stop_strings=list(ending.texts) or None,
        pad_token_id=tokenizer.pad_token_id,
    )


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    taught: Sequence[str] = (),
    kept: Sequence[str] | None = None,
    track: Track | None = None,
) -> list[str]:
    """Greedy continuations of tokenized prompts, left-padded in batches of like length; none goes beyond the model's
    positions.

    Args:
        taught: texts that end an answer, besides what ends a turn of the model and its chat template.
        kept: a text for each prompt, whose special tokens are read in the answer too; None: no special tokens are.

    Raises:
        InputError: a prompt that leaves no position for an answer.
    """
    config = generation_config(model, tokenizer, taught, do_sample=False, max_new_tokens=max_new_tokens)
    special = special_tokens(tokenizer)
    positions = positions_of(causal_lm(model).config.to_dict())
    longest = [room(len(prompt), max_new_tokens, positions) for prompt in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    alike = [list(group) for _, group in groupby(by_length, lambda i: longest[i])]
    batches = [group[i : i + batch_size] for group in alike for i in range(0, len(group), batch_size)]
    answers = [""] * len(prompts)
    with inference(model):
        for batch in (track or (lambda batches, what: batches))(batches, "generation"):
            input_ids, attention_mask = left_pad([prompts[i] for i in batch], config.pad_token_id)
            device = causal_lm(model).device
            config.max_new_tokens = longest[batch[0]]
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=config,
                tokenizer=tokenizer,
            )
            for i, ids in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                text = kept[i] if kept else ""
                answers[i] = read(ids, tokenizer, config, {id for id, name in special.items() if name not in text})
    return answers


def room(prompt: int, max_new_tokens: int, positions: int | None) -> int:
    """Tokens that an answer can have, of those that are asked for.

    Args:
        prompt: its tokens.
        positions: of the model; None: not known.

    Raises:
        InputError: no position is left for an answer.
    """
    if positions is not None and prompt >= positions:
        raise InputError(
            f"the prompt has {prompt} tokens, and the model {positions} positions, which leaves none for an answer; "
            "shorten the prompt."
        )
    return max_new_tokens if positions is None else min(max_new_tokens, positions - prompt)


def read(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, hidden: Collection[int]
) -> str:
    """The text of an answer up to its end.

    Args:
        ids: generated tokens; what follows the end is padding.
        hidden: special tokens that are left out of the text.
    """
    ends = config.eos_token_id or []
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    shown = [token for token in ids[:end] if token not in hidden]
    text = str(tokenizer.decode(shown, skip_special_tokens=False))
    return text[: min((at for stop in config.stop_strings or [] if (at := text.find(stop)) >= 0), default=len(text))]


def ends_of(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of all that ends an answer."""
    tokens = tokenizer.convert_ids_to_tokens(config.eos_token_id or [])
    return [end for end in [*tokens, *(config.stop_strings or [])] if end]


def without_end(text: str, ends: Sequence[str]) -> str:
    """A reference that spells out what ends it, as an answer is read."""
    bare = text.rstrip()
    end = next((end for end in ends if bare.endswith(end.rstrip()) and end.strip()), None)
    return text if end is None else bare.removesuffix(end.rstrip())


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, str]:
    """Id → text of the tokens that are no part of a text."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


class AnswerStreamer(BaseStreamer):
    """Prints an answer as it grows, up to its end; what may be the beginning of a stop text waits until it is known not
    to be."""

    def __init__(self, read: Callable[[list[int]], str], stops: Sequence[str]):
        self.read, self.stops = read, stops
        self.ids: list[int] = []
        self.printed = 0
        self.in_prompt = True

    def put(self, value: Tensor) -> None:
        if self.in_prompt:  # generate() shows the prompt first
            self.in_prompt = False
            return
        self.ids += value.flatten().tolist()
        self._print(self._settled(self.read(self.ids)))

    def end(self) -> None:
        self._print(self.read(self.ids))
        print(flush=True)

    def _print(self, text: str) -> None:
        print(text[self.printed :], end="", flush=True)
        self.printed = max(self.printed, len(text))

    def _settled(self, text: str) -> str:
        text = text.rstrip(BROKEN)
        beginnings = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(beginnings, default=0)]


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids of different lengths → input_ids and attention_mask, both (rows, longest), padded on the
    left."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    attention_mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(input_ids), torch.tensor(attention_mask)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients, and every module's own mode again at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
