"""A Modelfile, with which Ollama asks a model as it was trained: https://docs.ollama.com/modelfile

Ollama reads no Jinja. What a chat template writes around the turns is found by rendering a few, and written as a Go
template, of which Ollama renders one exchange after the other:

    {{ if .System }}head{{ .System }}tail{{ end }}before{{ .Prompt }}opening{{ .Response }}end
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qalora.deploy.settings import Served

SYSTEM, USER, ANSWER = "what is always so", "what is asked", "what is answered"


@dataclass(frozen=True)
class Exchange:
    """The texts around the turns of one exchange.

    Attributes:
        before: the user's text, where no system text is before it.
        opening: between the user's text and the answer.
        end: after the answer.
        system: (before the system text, between it and the user's); None: the template has no place for one.
        default: the system text that the template writes where none is given.
    """

    before: str
    opening: str
    end: str
    system: tuple[str, str] | None = None
    default: str | None = None

    def go(self) -> str:
        """As a Go template."""
        before, opening, end = map(_literal, (self.before, self.opening, self.end))
        if self.system is not None:
            head, tail = map(_literal, self.system)
            if tail.endswith(before):  # the system text is a turn of its own
                before = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{tail.removesuffix(before)}{{{{ end }}}}{before}"
            else:
                before = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{tail}{{{{ else }}}}{before}{{{{ end }}}}"
        return f"{before}{{{{ .Prompt }}}}{opening}{{{{ .Response }}}}{end}"

    def text(self, *turns: str, system: str | None = None) -> str:
        """User's and assistant's texts in turn, the last one a user's: what a model goes on from."""
        system = system or self.default
        text = ""
        for i, turn in enumerate(turns):
            if i % 2:
                text += turn + self.end
            elif i == 0 and system and self.system:
                text += self.system[0] + system + self.system[1] + turn + self.opening
            else:
                text += self.before + turn + self.opening
        return text


def write_modelfile(folder: Path, served: Served, *, adapter_of: str | None = None) -> None:
    """`ollama create NAME -f Modelfile` in the folder.

    Args:
        adapter_of: the base of an adapter: a name, or a file, whose relative path Ollama would look for beside the
            Modelfile.
    """
    if adapter_of is None:
        text = "FROM ./model.gguf\n"
    else:
        if Path(adapter_of).expanduser().exists():
            adapter_of = str(Path(adapter_of).expanduser().resolve())
        text = f"# The base that the adapter was trained on, as Ollama names it or as a GGUF file.\nFROM {adapter_of}\n"
        text += "ADAPTER ./adapter.gguf\n"
    exchange = trained_exchange(served)
    if exchange is not None:
        text += f"TEMPLATE {quoted(exchange.go(), whole=True)}\n"
        if exchange.default:
            text += f"SYSTEM {quoted(exchange.default, whole=True)}\n"
    elif served.tokenizer.chat_template:
        text += "# The chat template has no form as a Go template here; llama.cpp reads it from the GGUF file.\n"
    stops = [*(served.tokenizer.decode([token]) for token in served.ending.tokens), *served.ending.texts]
    text += "".join(f"PARAMETER stop {quoted(str(stop))}\n" for stop in stops if stop)
    (folder / "Modelfile").write_text(text, encoding="utf-8")


def trained_exchange(served: Served) -> Exchange | None:
    """By the prompt that was trained, or by the chat template; None: there is neither, or none that can be written
    so."""
    if served.prompt is None:
        return chat_exchange(served.tokenizer)
    before, _, opening = served.prompt.partition("{prompt}")
    return Exchange(before, opening, served.tokenizer.eos_token or "")


def chat_exchange(tokenizer: PreTrainedTokenizerBase) -> Exchange | None:
    """What the chat template writes around turns, without the token that llama.cpp puts in front itself; None: there is
    no template, or one that writes more than an exchange after the other, such as the system text into the last
    turn."""

    def rendered(*turns: tuple[str, str], start: bool = False) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=start, tokenize=False))
        return text.removeprefix(bos)

    bos = str(tokenizer.bos_token or "") if _puts_bos(tokenizer) else ""
    system, user, answer = ("system", SYSTEM), ("user", USER), ("assistant", ANSWER)
    try:
        first, opening = rendered(user, start=True).split(USER)
        end = rendered(user, answer).split(ANSWER)[1]
        later = rendered(user, answer, user, start=True).split(ANSWER)[1].removeprefix(end).split(USER)[0]
    except (
        Exception
    ):  # no template, jinja's own errors, raise_exception() of the template, or a turn that is not there once
        return None
    around = default = None
    try:
        head, tail = rendered(system, user, start=True).split(SYSTEM)
        around = (head, tail.split(USER)[0])
    except Exception:  # as above: a template without system texts
        pass
    if around and first != later and first.startswith(around[0]) and first.endswith(around[1]):
        default = first[len(around[0]) : len(first) - len(around[1])]
    exchange = Exchange(later, opening, end, around, default)
    # The check: what was found, put together, is what the template writes.
    chats = [([user, answer, user], None), *([([user, answer, user], SYSTEM)] if around else [])]
    for turns, said in chats:
        whole = rendered(*([system] if said else []), *turns, start=True)
        if exchange.text(*(content for _, content in turns), system=said) != whole:
            return None
    return exchange


def _puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def quoted(text: str, *, whole: bool = False) -> str:
    """A value of a Modelfile, which knows no escapes: https://docs.ollama.com/modelfile#format

    Args:
        whole: with three marks, which keep blanks and line breaks at its ends.
    """
    marks = '"""' if whole or '"' in text or "\n" in text else '"'
    return f"{marks}{text}{marks}"


def _literal(text: str) -> str:
    """Text of a Go template: two braces begin an action, one may be the first of two, and three quotes end a
    Modelfile's value."""
    return re.sub(r'\{{2,}|\{\Z|"{3,}', lambda found: "{{ " + json.dumps(found[0]) + " }}", text)
