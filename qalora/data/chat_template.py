"""A tokenizer's chat template: which one it is, what it can write, and how it wants its messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from qalora.data.conversation import REASONING, Turn
from qalora.errors import InputError

if TYPE_CHECKING:
    from jinja2 import nodes

# For tokenizers without a chat template: ChatML, but an answer ends with the end token, for such a tokenizer has no
# <|im_end|> that could stop a generation; https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '<|im_end|>') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS = "{{ bos_token }}"
# What a template is given besides the switches that are its own.
GIVEN = frozenset(["messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"])
SENTINEL = "qaloraxtextxofxaxturn"  # of letters alone, which no template takes apart, trims or escapes
OPENED = re.compile(r"(<(\w+)>)\s*$")  # a generation prompt that begins the answer's thought: <think>


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None = None, switches: Mapping[str, object] | None = None
) -> None:
    """Gives the tokenizer a chat template, so that it goes wherever the tokenizer goes.

    Args:
        template: a file of Jinja, or its text; None: the tokenizer's own.
        switches: variable of the template → value where a caller sets none; they are written into the template.

    Raises:
        InputError: no such file, or a switch that the template does not have.
    """
    if template is not None:
        tokenizer.chat_template = _template_text(template)
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in (switches or {}).items()
    )
    own = chat_template(tokenizer)
    if not defaults or own.source.startswith(defaults):
        return
    if unknown := [name for name in switches or {} if name not in own.switches]:
        raise InputError(
            f"data.chat_template_kwargs={unknown[0]}: the chat template has no such switch; it has "
            f"{', '.join(own.switches) or 'none'}."
        )
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {name: defaults + text for name, text in tokenizer.chat_template.items()}
    else:
        tokenizer.chat_template = defaults + own.source


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template that chats are rendered by: the tokenizer's own, or ChatML."""
    return _cached(tokenizer, repr(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _cached(tokenizer: PreTrainedTokenizerBase, own: str) -> ChatTemplate:
    return ChatTemplate(tokenizer)


class ChatTemplate:
    """The chat template of a tokenizer. What it can do is found by trying.

    Attributes:
        source: its text; of several templates all texts, one after the other. ChatML where the tokenizer has none, with
            the BOS that the tokenizer puts before a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        self.default = None if own else (BOS if _adds_bos(tokenizer) else "") + CHATML
        self.source = self.default or ("\n".join(own.values()) if isinstance(own, dict) else str(own))
        self.shapes: dict[Any, list[int]] = {}

    def apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        *,
        add_generation_prompt: bool = False,
        **switches: Any,
    ) -> str:
        """The rendered messages; whatever the template raises goes on."""
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) or None,
            chat_template=self.default,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **switches,
        )
        return str(text)

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """The turns as the template wants them: in roles that it writes, with reasoning and arguments as it reads
        them."""
        return [self._message(turn) for turn in turns]

    def names(self, word: str) -> bool:
        """Whether the word stands in the template."""
        return re.search(rf"\b{re.escape(word)}\b", self.source) is not None

    @cached_property
    def roles(self) -> frozenset[str]:
        """Words in quotes, among which are the roles that the template treats by name."""
        return frozenset(re.findall(r"""["'](\w+)["']""", self.source))

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """Variables that a caller may set: `enable_thinking` and the like."""
        from jinja2 import Environment, TemplateError, meta

        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.source)  # a tag of transformers' own
        try:
            tree = environment.parse(plain)
            names = meta.find_undeclared_variables(tree) - _set_anyway(tree)
        except TemplateError:
            return ()
        return tuple(sorted(name for name in names - GIVEN - environment.globals.keys() if not name.endswith("_token")))

    @cached_property
    def header(self) -> str:
        """What the template writes before an assistant's answer, up to a thought that it opens."""
        return OPENED.sub("", self.generation_prompt)

    @cached_property
    def generation_prompt(self) -> str:
        """All that the template adds after the last turn for an answer to follow."""
        with suppress(Exception):
            asked = [{"role": "user", "content": SENTINEL}]
            before, after = self.apply(asked), self.apply(asked, add_generation_prompt=True)
            return after[len(before) :] if after.startswith(before) else ""
        return ""

    @cached_property
    def end(self) -> str:
        """What the template writes after an assistant's text, but for blanks; empty: nothing."""
        with suppress(Exception):
            return self.apply([_said("user", "a"), _said("assistant", SENTINEL)]).rpartition(SENTINEL)[2].rstrip()
        return ""

    def closing(self, after: str) -> str:
        """The end of an answer that other turns follow, given all that stands after its text.

        It may be less than `end`: Phi-3 writes <|end|> after each answer, and EOS besides after the last turn of all.
        """
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        edges = {found.end() for token in tokens for found in re.finditer(re.escape(token), self.end)}
        ends = [self.end[:edge] for edge in sorted({len(self.end), *edges}, reverse=True)]
        return next((end for end in ends if after.startswith(end)), "")

    def _message(self, turn: Turn) -> dict[str, object]:
        role, fields = turn.role, dict(turn.fields)
        if turn.thought:  # templates differ in what they call it
            fields |= dict.fromkeys(REASONING, turn.thought)
        if (role == "tool" and not self._writes_tool) or (role == "developer" and not self._writes_developer):
            role = {"tool": "user", "developer": "system"}[role]
        if "tool_calls" in fields:
            fields["tool_calls"] = [_call(call, as_text=self._arguments_as_text) for call in fields["tool_calls"]]
        return {"role": role, "content": turn.text, **fields}

    @cached_property
    def writes_tools(self) -> tuple[bool, bool]:
        """Whether the rendered chat has signatures of tools that are given by themselves, and as OpenAI's API has
        them."""
        tool = {"name": SENTINEL, "description": "b", "parameters": {"type": "object", "properties": {}}}
        asked = [_said("user", "a")]
        return self._writes(asked, [tool]), self._writes(asked, [{"type": "function", "function": tool}])

    def tools(self, tools: Sequence[Any]) -> list[object]:
        """The signatures in the form that the template reads."""
        flat, nested = self.writes_tools
        if nested and not flat:
            return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        return [tool.get("function", tool) for tool in tools] if flat and not nested else list(tools)

    @cached_property
    def _writes_developer(self) -> bool:
        return self._writes([_said("developer", SENTINEL), _said("user", "a"), _said("assistant", "b")])

    @cached_property
    def _writes_tool(self) -> bool:
        """Some templates refuse the role, some leave the turn out without a word, and some want the call before it."""
        result = {**_said("tool", SENTINEL), "tool_call_id": CALL["id"], "name": "f"}
        return any(
            self._writes([_said("user", "a"), {**_said("assistant", "b"), **called}, result, _said("assistant", "c")])
            for called in ({}, {"tool_calls": [_call(CALL, as_text=self._arguments_as_text)]})
        )

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Whether arguments of a call have to be JSON already. Most templates write JSON of an object, as Hugging Face
        asks."""
        objects, text = (self._called(as_text) for as_text in (False, True))
        return text is not None and (objects is None or "{'key'" in objects)

    def _called(self, as_text: bool) -> str | None:
        call = {**_said("assistant", ""), "tool_calls": [_call(CALL, as_text=as_text)]}
        with suppress(Exception):
            return self.apply([_said("user", "a"), call])
        return None

    def _writes(self, messages: Sequence[Mapping[str, object]], tools: Sequence[object] = ()) -> bool:
        with suppress(Exception):  # jinja's own errors, raise_exception() of the template, or of the tokenizer
            return SENTINEL in self.apply(messages, tools)
        return False


def _set_anyway(tree: nodes.Template) -> set[str]:
    """Variables that the template sets itself, whatever a caller says: in a branch, Jinja counts them as not declared.
    Those that it sets where they are not given ({% if x is not defined %}{% set x = … %}) are a caller's."""
    from jinja2 import nodes

    def names(node: nodes.Node, ctx: str) -> set[str]:
        every = [node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name)
        return {name.name for name in every if name.ctx == ctx}

    defaults = [
        names(node.test, "load") & set().union(*(names(each, "store") for each in node.body))
        for node in tree.find_all(nodes.If)
    ]
    defaults += [names(node.node, "load") & names(node.target, "store") for node in tree.find_all(nodes.Assign)]
    return names(tree, "store") - set().union(*defaults)


CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"key": "value"}}}


def _said(role: str, text: str) -> dict[str, object]:
    return {"role": role, "content": text}


def _call(call: Mapping[str, Any], *, as_text: bool) -> dict[str, object]:
    """The call as OpenAI has it, with its arguments as JSON, or as the object that the JSON says."""
    flat = {key: value for key, value in call.items() if key in ("name", "arguments")}
    rest = {key: value for key, value in call.items() if key not in ("name", "arguments", "function")}
    function = {**call.get("function", flat)}
    arguments = function.get("arguments")
    if as_text and isinstance(arguments, Mapping):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        with suppress(json.JSONDecodeError):
            parsed = json.loads(arguments)
            function["arguments"] = parsed if isinstance(parsed, dict) else arguments
    return {"type": "function", **rest, "function": function}


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _template_text(template: str) -> str:
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(
            f"data.chat_template={template}: cannot be read ({reason}); give a file with a Jinja template, or its text."
        ) from None


def _literal(value: object) -> str:
    """A value as Jinja writes it."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
