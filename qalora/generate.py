"""`qalora generate`: answer a prompt or an instruction, or chat, with a base, a base and an adapter, or a merged
model."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora.cli import Parser, make_callable, say
from qalora.errors import InputError
from qalora.flags import add

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

GREEDY_BELOW = 1e-5  # a temperature; scores divided by less are no longer numbers


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora generate",
        description="Answers one prompt (--prompt, --prompt-file) or instruction (--instruction), or chats over the "
        "lines of standard input (--chat).",
    )
    add(parser, "--model", required=True)
    add(parser, "--adapter", "--no-quantize")
    add(parser, "--dtype", default="auto", otherwise="by device")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one prompt; through the chat template when the model has one")
    what.add_argument(
        "--prompt-file",
        metavar="FILE|-",
        help="the same from a file, or from standard input (-), without the line break at its end",
    )
    what.add_argument("--instruction", help="one instruction, in the words that the alpaca recipes put around it")
    what.add_argument("--chat", action="store_true", help="a conversation: one user message a line, until end of file")
    parser.add_argument("--input", default="", help="what --instruction is about")
    parser.add_argument("--system", help="the system message, for the chat template")
    parser.add_argument("--raw", action="store_true", help="the prompt as it stands, without the chat template")
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="also end the answer before this text; can be given several times",
    )
    parser.add_argument(
        "--keep-special-tokens", action="store_true", help="print special tokens too, but not what ends the answer"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument(
        "--do-sample",
        action="store_true",
        help="sample instead of taking the likeliest token; --temperature, --top-p and --top-k imply it",
    )
    parser.add_argument("--temperature", type=float, help="of the sampling (default: 1.0); 0: the likeliest token")
    parser.add_argument(
        "--top-p",
        type=float,
        help="sample from the likeliest tokens of this total probability (default: 1.0)",
    )
    parser.add_argument("--top-k", type=int, help="sample from this many likeliest tokens (default: 0, all)")
    parser.add_argument(
        "--repetition-penalty", type=float, help="divides the scores of tokens that were said (default: 1.0)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the sampling (default: %(default)s)")
    return parser


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    options = generation_options(args)
    check_texts(args)
    prompt = read_prompt(args.prompt_file, raw=args.raw) if args.prompt_file else args.prompt

    from transformers import set_seed

    from qalora.adapter.its_base import how_to_load
    from qalora.adapter.model import load_adapter
    from qalora.answers import generation_config, prepare_tokenizer, room
    from qalora.base.loading import load_base, load_tokenizer
    from qalora.base.registry import resolve, shape_of

    source = resolve(args.model)
    loading: dict[str, Any] = {"load_in_4bit": not args.no_quantize, "dtype": args.dtype}
    loading, notes = how_to_load(source, args.adapter, loading, ["load_in_4bit"] if args.no_quantize else [])
    for note in notes:
        say(note)
    tokenizer = load_tokenizer(source)
    taught = prepare_tokenizer(tokenizer, args.adapter)
    ids = first_ids(args, prompt, tokenizer)
    room(len(ids), args.max_new_tokens, shape_of(source).positions)  # refused before the weights load
    base = load_base(source, tokenizer=tokenizer, **loading).model
    model: Any = load_adapter(base, args.adapter) if args.adapter else base
    config = generation_config(model, tokenizer, [*args.stop, *taught], **options)
    set_seed(args.seed)
    if args.chat:
        chat(model, tokenizer, lines(), config, system=args.system, keep_special_tokens=args.keep_special_tokens)
    else:
        answer(model, tokenizer, ids, config, keep_special_tokens=args.keep_special_tokens)
    return 0


# ------------------------------------------------------------------------------------------------ what the flags say


def generation_options(args: argparse.Namespace) -> dict[str, object]:
    """The flags as arguments of GenerationConfig: a sampling setting asks for sampling, and a temperature of 0 for
    none.

    Raises:
        InputError: a value out of its range.
    """
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: must be 0 or more, and below 2^32.")
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens}: must be 1 or more.")
    for name, fits, rule in (
        ("temperature", lambda value: value >= 0, "must be 0 (the likeliest token) or more"),
        ("top_p", lambda value: 0 < value <= 1, "must be above 0 and at most 1"),
        ("top_k", lambda value: value >= 0, "must be 0 (all tokens) or more"),
        ("repetition_penalty", lambda value: value > 0, "must be above 0"),
    ):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and fits(value)):
            raise InputError(f"--{name.replace('_', '-')} {value}: {rule}.")
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    if args.repetition_penalty is not None:
        options["repetition_penalty"] = args.repetition_penalty
    asked = {name: value for name in ("temperature", "top_p", "top_k") if (value := getattr(args, name)) is not None}
    if (args.do_sample or asked) and asked.get("temperature", 1.0) >= GREEDY_BELOW:
        options |= {"do_sample": True, **asked}
    return options


def check_texts(args: argparse.Namespace) -> None:
    """
    Raises:
        InputError: a text that is empty or no UTF-8, or flags that do not go together.
    """
    from_prompt = args.prompt is not None or args.prompt_file is not None
    if args.raw and not from_prompt:
        raise InputError("--raw: only a --prompt or a --prompt-file is taken as it stands; leave it out.")
    if args.input and args.instruction is None:
        raise InputError("--input: goes with --instruction.")
    if args.system is not None and (args.raw or args.instruction is not None):
        raise InputError("--system: goes with the chat template (--prompt, --prompt-file or --chat, without --raw).")
    for flag in ("prompt", "instruction", "input", "system"):
        text = getattr(args, flag)
        if text is None:
            continue
        check_utf8(text, f"--{flag}")
        if flag == "system" and not text.strip():
            raise InputError("--system: empty; write a system message or leave it out.")
        if flag not in ("input", "system"):
            check_not_empty(text, f"--{flag}", raw=args.raw)
    for text in args.stop:
        check_utf8(text, "--stop")
        if not text:
            raise InputError("--stop: empty, and would end every answer at once; write a text or leave it out.")


def check_utf8(text: str, what: str) -> None:
    """
    Raises:
        InputError: a byte of the command line was no UTF-8, which Python hands on as half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        named = f"byte 0x{byte:02X}" if 0x80 <= byte <= 0xFF else "half of a surrogate pair"
        raise InputError(f"{what}: {named} at character {error.start} is no UTF-8; pass UTF-8 text.") from None


def check_not_empty(text: str, what: str, *, raw: bool = False) -> None:
    """
    Raises:
        InputError: nothing to answer; blanks alone can be continued, as they stand.
    """
    if not (text if raw else text.strip()):
        raise InputError(f"{what}: empty, and there is nothing to answer; write something.")


def read_prompt(name: str, *, raw: bool = False) -> str:
    """The text of a file, or of standard input (-), without the line break at its end.

    Raises:
        InputError: it cannot be read, is no UTF-8, or has nothing in it.
    """
    where = "standard input" if name == "-" else name
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"--prompt-file {name}: cannot be read ({error.strerror}); name a text file, or - .") from None
    text = decoded(data, f"--prompt-file {where}")
    text = text.removesuffix("\n").removesuffix("\r")
    check_not_empty(text, f"--prompt-file {where}", raw=raw)
    return text


def decoded(data: bytes, what: str) -> str:
    """
    Raises:
        InputError: no UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what}: byte 0x{data[error.start]:02X} at offset {error.start} is no UTF-8; save it as UTF-8."
        ) from None


def lines() -> Iterable[str]:
    """The non-empty lines of standard input; a terminal gets a prompt sign.

    Raises:
        InputError: a line that is no UTF-8.
    """
    number = 0
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        number += 1
        if text := decoded(line, f"standard input, line {number}").strip():
            yield text


# ---------------------------------------------------------------------------------------------- prompts and answers


def prompt_ids(
    messages: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    raw: bool = False,
    chat: bool | None = None,
    system: str | None = None,
) -> list[int]:
    """Token ids up to where the assistant's next answer starts, rendered as in training.

    Args:
        messages: user and assistant messages in turn, the last one the user's.
        raw: the one message as it stands.
        chat: through the chat template; None: when the tokenizer has one.
        system: the system message before them.

    Raises:
        InputError: a system message without a chat template, or one that the template leaves out; a prompt without a
            token.
    """
    from qalora.data.formats import Example, Turn
    from qalora.data.tokenization import tokenize_prompt

    if chat is None:
        chat = tokenizer.chat_template is not None and not raw
    if system is not None and not chat:
        raise InputError(
            "--system: the model has no chat template to put it into; write it into the prompt, or use --chat."
        )
    turns = [Turn("assistant" if i % 2 else "user", text, False) for i, text in enumerate(messages)]

    def ids(*before: Turn) -> list[int]:
        example = Example(row=0, turns=(*before, *turns, Turn("assistant", "", True)), chat=bool(chat))
        return list(tokenize_prompt(example, tokenizer))

    found = ids() if system is None else ids(Turn("system", system, False))
    if system is not None and found == ids(Turn("system", f"not {system}", False)):
        raise InputError("--system: the model's chat template leaves it out; write it into the prompt.")
    if not found:
        raise InputError("the prompt: the tokenizer makes no token of it; write something else.")
    return found


def first_ids(args: argparse.Namespace, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what the flags ask; none of a chat, whose questions come later.

    Raises:
        InputError: a system message that the template leaves out, or a prompt without a token.
    """
    if args.instruction is not None:
        return instruction_ids(args.instruction, args.input, tokenizer)
    if not args.chat:
        return prompt_ids([prompt], tokenizer, raw=args.raw, system=args.system)
    if args.system is not None:
        prompt_ids(["a question"], tokenizer, chat=True, system=args.system)  # refused before the weights load
    return []


def instruction_ids(instruction: str, input: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids up to the response, in Stanford's Alpaca prompt as in training."""
    from qalora.data.formats import to_example
    from qalora.data.tokenization import tokenize_prompt

    row = {"instruction": instruction, "input": input, "output": ""}
    return list(tokenize_prompt(to_example(row, 0, format="alpaca"), tokenizer))


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    config: GenerationConfig,
    *,
    keep_special_tokens: bool = False,
) -> str:
    """Streams the continuation of the token ids to standard output as it grows, up to the model's last position, and
    returns its text.

    Raises:
        InputError: the prompt leaves no position for an answer.
    """
    import torch

    from qalora.answers import AnswerStreamer, inference, read, room, special_tokens

    if (longest := room(len(ids), config.max_new_tokens, positions(model))) < config.max_new_tokens:
        say(f"the prompt has {len(ids)} tokens and leaves the model positions for {longest} more: no answer is longer")
        config = copy(config)
        config.max_new_tokens = longest
    hidden = () if keep_special_tokens else special_tokens(tokenizer).keys()

    def text_of(tokens: Sequence[int]) -> str:
        return read(tokens, tokenizer, config, hidden)

    input_ids = torch.tensor([list(ids)], device=model.device)
    with inference(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            tokenizer=tokenizer,
            streamer=AnswerStreamer(text_of, config.stop_strings or ()),
        )
    return text_of(output[0, len(ids) :].tolist())


def chat(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Iterable[str],
    config: GenerationConfig,
    *,
    system: str | None = None,
    keep_special_tokens: bool = False,
) -> list[str]:
    """Answers each message in the light of the conversation so far, and returns the conversation.

    The oldest exchanges are forgotten, with a note, when the conversation no longer fits into the model's
    context; the system message is not.
    """
    history: list[str] = []
    limit = positions(model) or sys.maxsize
    room = limit - config.max_new_tokens if config.max_new_tokens < limit else limit // 2
    for message in messages:
        history.append(message)
        while len(ids := prompt_ids(history, tokenizer, chat=True, system=system)) > room and len(history) > 1:
            print("(the oldest exchange no longer fits into the context and is forgotten)", file=sys.stderr)
            del history[:2]
        history.append(answer(model, tokenizer, ids, config, keep_special_tokens=keep_special_tokens))
    return history


def positions(model: PreTrainedModel | PeftModel) -> int | None:
    """Tokens of a prompt and its answer at most; None where it is not known."""
    from qalora.base.registry import positions_of

    return positions_of(model.config.to_dict())


make_callable(__name__)
if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))
