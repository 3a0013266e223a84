"""Examples → texts: what a model reads, and which of it is learned. Whatever a row says is in it, or is an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from qalora.data.chat_template import OPENED, SENTINEL, chat_template
from qalora.data.conversation import REASONING, Turn
from qalora.data.formats import Example
from qalora.errors import InputError

# Text, and whether it is learned; None: never, whatever data.train_on_inputs says.
Segment = tuple[str, bool | None]
Span = tuple[int, int]


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The example's text, in (text, supervised) segments.

    What is learned of a chat is what the model has to write after the generation prompt, the turn's end with it:

        <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n   Hello.<|im_end|>   \\n<|im_start|>user\\n …
        ───────────────────── prompt ──────────────────────   ─── learned ────   ──── prompt again ───

    Raises:
        InputError: the chat template refuses the turns, leaves one out, cuts what is to be learned, or writes another
            prompt once the answer follows.
    """
    if not example.chat:
        return _plain(example.turns, example, tokenizer)
    chat = _Chat(example, tokenizer)
    spans = chat.spans
    chat.check()
    segments: list[Segment] = []
    position = 0
    for i, (start, end) in spans.items():
        segments += [(chat.whole[position:start], False), (chat.whole[start:end], example.turns[i].supervised or None)]
        position = end
    segments.append((chat.whole[position:], False))
    return [segment for segment in segments if segment[0]]


def render_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything before the reference, up to where a model has to answer: where the learned text of `render` begins.

    Raises:
        InputError: the chat template refuses the turns.
    """
    if example.chat:
        return _Chat(example, tokenizer).prompt(len(example.prompt))
    return "".join(text for text, _ in _plain(example.prompt, example, tokenizer))


def _plain(turns: Sequence[Turn], example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The texts as they stand. An answer before others ends with EOS, as the last one does; which `tokenize` adds."""
    segments: list[Segment] = []
    for i, turn in enumerate(turns):
        if turn.thought or "tool_calls" in turn.fields:
            raise InputError(
                f"{example.where}: turn {i} ({turn.role}) has a thought or a tool call in a field of its own, which a "
                "chat template alone can write; leave data.chat=false out."
            )
        learned = turn.supervised or (None if turn.role == "assistant" else False)
        segments.append((turn.text, learned))
        if turn.role == "assistant" and i < len(example.turns) - 1:
            end = tokenizer.eos_token or ""
            segments.append(("" if end and turn.text.rstrip().endswith(end) else end, learned))
    return [segment for segment in segments if segment[0]]


class _Chat:
    """An example's turns through the chat template."""

    def __init__(self, example: Example, tokenizer: PreTrainedTokenizerBase):
        self.example = example
        self.turns = example.turns
        self.template = chat_template(tokenizer)
        self.messages = self.template.messages(example.turns)
        self.tools = self.template.tools(example.tools) if example.tools else []

    def text(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """
        Raises:
            InputError: the template refuses them.
        """
        try:
            return self.template.apply(messages, self.tools, **options)
        except Exception as error:  # jinja's own errors, raise_exception() of the template, or of the tokenizer
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"{self.example.where}: the tokenizer's chat template refuses its turns ({roles}): "
                f"{' '.join(str(error).split())[:200]}; change the row's turns, or take another template with "
                "data.chat_template=FILE."
            ) from None

    def prompt(self, i: int) -> str:
        """All before turn `i`, an assistant's, as a model is asked for it."""
        if i:
            return self.text(self.messages[:i], add_generation_prompt=True)
        # No template can render no turns at all.
        before, _, _ = self.text([{"role": "assistant", "content": SENTINEL}]).partition(SENTINEL)
        return before[: _after_header(before, self.template.header)]

    @cached_property
    def whole(self) -> str:
        """The rendered chat."""
        return self._written(self.messages)

    def _written(self, messages: Sequence[Mapping[str, object]]) -> str:
        """The rendered messages; a last answer follows the generation prompt, whatever thought that opens."""
        text = self.text(messages)
        if self.turns[-1].role != "assistant" or len(messages) == 1:
            return text
        prompt = self.text(messages[:-1], add_generation_prompt=True)
        following = _following(prompt, text)
        return following if following.startswith(prompt) else self._asked(prompt, messages, text)

    def _asked(self, prompt: str, messages: Sequence[Mapping[str, object]], text: str) -> str:
        """The last answer after the prompt that a server makes, of a template that writes what stands before it in
        another way once the answer is there: Mistral's puts a system text before the last question, if that is the last
        turn."""
        mark = f"{SENTINEL}last"
        before, found, after = self.text([*messages[:-1], {"role": "assistant", "content": mark}]).partition(mark)
        border, asked = before.rstrip(), prompt.rstrip()
        same = text.startswith(before) and text.endswith(after)
        if not (found and border and same and asked.endswith(border[-8:])):
            return text
        gap = before[len(border) :].removeprefix(prompt[len(asked) :])
        return prompt + gap + text[len(before) :]

    @cached_property
    def spans(self) -> dict[int, Span]:
        """(start, end) in `whole` of what the model has to write for each assistant turn."""
        return {i: self._span(i) for i, turn in enumerate(self.turns) if turn.role == "assistant"}

    def _span(self, i: int) -> Span:
        last = i == len(self.turns) - 1
        prompt = self.prompt(i)
        written = self._ended(self.whole if last else self.text(self.messages[: i + 1]), self.turns[i])
        if written.startswith(prompt) and self.whole.startswith(written):
            return len(prompt), len(written)
        asked = i == 0 or self.turns[i - 1].role != "assistant"  # nobody is asked to answer an answer
        if last and asked and self.turns[i].supervised:
            same = next((k for k, pair in enumerate(zip(prompt, self.whole, strict=False)) if len(set(pair)) > 1), 0)
            raise InputError(
                f"{self.example.where}: the tokenizer's chat template rewrites earlier turns as the chat grows, so "
                f"they cannot be trained on together: it asks {_short(prompt[same:])} where it later has "
                f"{_short(self.whole[same:])}; data.chat_template=FILE takes another template."
            )
        return self._found(i)

    def _found(self, i: int) -> Span:
        """Where a template that writes earlier turns differently has this one: where another text would stand."""
        other = [*self.messages[:i], {"role": "assistant", "content": SENTINEL}, *self.messages[i + 1 :]]
        before, found, after = self._written(other).partition(SENTINEL)
        start, end = len(before), len(self.whole) - len(after)
        if not found or start > end or not (self.whole.startswith(before) and self.whole.endswith(after)):
            raise InputError(
                f"{self.example.where}: the tokenizer's chat template rewrites earlier turns as the chat grows, so "
                f"they cannot be trained on together: turn {i} is not found in {_short(self.whole)}; split the "
                "conversation into rows that end with one answer each, or take another template with "
                "data.chat_template=FILE."
            )
        prompt = self.prompt(i)
        if self.template.header.strip():
            start = _after_header(before, self.template.header)
        else:  # a blank before the answer is written with it where the prompt ends without
            start = min(start, len(before.rstrip()) + len(prompt) - len(prompt.rstrip()))
        return start, end + len(self.template.closing(after))

    def _ended(self, text: str, turn: Turn) -> str:
        """The rendered chat up to the end of its last turn: without the line break that follows an end token."""
        stripped = text.rstrip()
        open_ended = not self.template.end and "tool_calls" not in turn.fields
        return text if open_ended and stripped.endswith(turn.text.rstrip()) else stripped

    # ------------------------------------------------------------------------------------- nothing vanishes

    def check(self) -> None:
        """
        Raises:
            InputError: a turn, a tool, a call or a learned thought is not in the rendered chat.
        """
        self._check_roles()
        whole = _dense(self.whole)
        for tool in self.example.tools:
            name = tool.get("function", tool).get("name") if isinstance(tool, Mapping) else None
            if not any(self.template.writes_tools) or (isinstance(name, str) and _dense(name) not in whole):
                raise InputError(
                    f"{self.example.where}: the chat template has no place for tools ({name}); data.chat_template=FILE "
                    "takes "
                    "one that has, data.columns={tools: other_tools} leaves them out."
                )
        position = 0
        for i, turn in enumerate(self.turns):
            if i in self.spans:
                start, end = (len(_dense(self.whole[:edge])) for edge in self.spans[i])
                if _found_in(whole[start:end], turn) is None:
                    raise self._cut(i, self.whole[slice(*self.spans[i])])
                position = end
                continue
            anywhere = turn.role in ("system", "developer")  # some templates put it before the last question
            length = _found_in(whole if anywhere else whole[position:], turn)
            if length is None:
                raise self._cut(i, self.whole)
            position += 0 if anywhere else length

    def _check_roles(self) -> None:
        """A short text may be found by chance, so every sequence of roles is tried once with texts that are not."""
        turns = tuple(
            (turn.role, turn.supervised, bool(turn.text.strip()), "</think>" in turn.text, tuple(turn.fields))
            for turn in self.turns
        )
        shape = (turns, bool(self.example.tools))
        if shape not in self.template.shapes:
            self.template.shapes[shape] = self._left_out()
        for i in self.template.shapes[shape]:
            raise self._cut(i, self.whole)

    def _left_out(self) -> list[int]:
        """Turns of which something would not be written: their text, or their thought where that is learned."""
        stand_ins = [_stand_in(turn, f"{SENTINEL}{'x' * i}") for i, turn in enumerate(self.turns)]
        try:
            text = self._written(self.template.messages([turn for turn, _ in stand_ins]))
        except Exception:  # a template that looks into its texts; these say nothing about the row's then
            return []
        return [i for i, (_, names) in enumerate(stand_ins) if any(name not in text for name in names)]

    def _cut(self, i: int, written: str) -> InputError:
        turn = self.turns[i]
        what = f"turn {i} ({turn.role}), {_short(turn.thought or turn.text or json.dumps(turn.fields, default=str))}"
        return InputError(
            f"{self.example.where}: the chat template does not write all of {what}; it becomes {_short(written)}. "
            f"{' '.join(self._advice(i))}"
        )

    def _advice(self, i: int) -> Iterator[str]:
        turn = self.turns[i]
        for name in self.template.switches:
            for value in (True, False):
                try:
                    text = self.template.apply(self.messages, self.tools, **{name: value})
                except Exception:  # as in `text`
                    continue
                if _found_in(_dense(text), turn) is not None:
                    yield f"data.chat_template_kwargs={{{name}: {str(value).lower()}}} keeps it."
        masked = replace(turn, supervised=False)
        learned = [k for k, other in enumerate(self.turns) if other.supervised]
        if turn.supervised and i != learned[-1] and _found_in(_dense(self.whole), masked) is not None:
            yield "data.mask_history=true learns the last answer of each row alone, as this template has it."
        yield "data.chat_template=FILE takes a template that keeps it."


def _following(prompt: str, text: str) -> str:
    """The rendered chat, where the generation prompt opens a thought that it lacks: the thought is empty then, for that
    is what a model that is asked so has to write before the answer."""
    opened = OPENED.search(prompt)
    if text.startswith(prompt) or opened is None or not text.startswith(prompt[: opened.start()]):
        return text
    tag, close = opened[1], f"</{opened[2]}>"
    answer = text[opened.start() :]
    if answer.lstrip().startswith(tag):
        return prompt + answer.lstrip().removeprefix(tag).lstrip()
    return prompt + (answer.lstrip() if close in answer else f"\n{close}\n\n{answer}")


def _after_header(text: str, header: str) -> int:
    """Where an answer begins in what stands before its own text: after the last header."""
    at = text.rfind(header) if header.strip() else -1
    return len(text) if at < 0 else at + len(header)


def _stand_in(turn: Turn, name: str) -> tuple[Turn, list[str]]:
    """The turn in other words, which no other text has by chance, and those of them that have to be written."""
    text, thought, fields = f"{name}y", f"{name}z", dict(turn.fields)
    fields |= {field: thought for field in REASONING if field in fields}
    inside = "</think>" in turn.text
    said = f"<think>\n{thought}\n</think>\n\n{text}" if inside else text if turn.text.strip() else ""
    names = [text] if said and "tool_calls" not in fields else []  # its text is looked for by itself
    if turn.supervised and (inside or turn.thought):
        names.append(thought)
    return replace(turn, text=said, fields=fields), names


def _found_in(written: str, turn: Turn) -> int | None:
    """Where all that the turn says, in its order, ends in a text without white space; None: something of it is missing.

    Templates cut the thoughts of earlier turns by intent, so those are asked for only where they are to be learned.
    """
    parts = re.split(r"</?think>", turn.text)
    said = [turn.thought, *parts] if turn.supervised or turn.role != "assistant" else parts[-1:]
    said += [str(call.get("function", call).get("name")) for call in turn.fields.get("tool_calls", ())]
    position = 0
    for text in filter(None, map(_dense, said)):
        forms = (text, json.dumps(text, ensure_ascii=False)[1:-1])
        ends = [at + len(form) for form in forms if (at := written.find(form, position)) >= 0]
        if not ends:
            return None
        position = min(ends)
    return position


def _dense(text: str) -> str:
    """Without white space, which templates trim and lay anew."""
    return "".join(text.split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 160 else f"{text[:80]} … {text[-72:]}")
