"""`qalora generate`: answer a prompt or an instruction, or chat, with a base, a base and an adapter, or a merged model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qalora.cli import Parser
from qalora.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora generate",
        description="Answers one prompt (--prompt) or instruction (--instruction), or chats over the lines of standard input (--chat).",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="registry name, Hub id, folder (a merged one: with --no-quantize) or .gguf file",
    )
    parser.add_argument("--adapter", metavar="DIR", help="any plain PEFT LoRA")
    parser.add_argument("--no-quantize", action="store_true", help="keep the base in 16 or 32 bit")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="to compute in (default: by device)",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one prompt; through the chat template when the model has one")
    what.add_argument("--instruction", help="one instruction, in the words that the alpaca recipes put around it")
    what.add_argument("--chat", action="store_true", help="a conversation: one user message a line, until end of file")
    parser.add_argument("--input", default="", help="what --instruction is about")
    parser.add_argument("--raw", action="store_true", help="--prompt as it stands, without the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--do-sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--temperature", type=float, help="of the sampling (default: 1.0)")
    parser.add_argument(
        "--top-p",
        type=float,
        help="sample from the likeliest tokens of this total probability (default: 1.0)",
    )
    parser.add_argument("--top-k", type=int, help="sample from this many likeliest tokens (default: all)")
    parser.add_argument(
        "--repetition-penalty", type=float, help="divides the scores of tokens that were said (default: 1.0)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the sampling (default: %(default)s)")
    return parser


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    options = generation_options(args)

    from transformers import set_seed

    from qalora.adapter.model import load_adapter
    from qalora.adapter.saved import check_adapter
    from qalora.base.loading import load_base
    from qalora.base.registry import resolve
    from qalora.metrics import generation_config

    source = resolve(args.model)
    if args.adapter:
        check_adapter(args.adapter, source)
    loaded = load_base(source, load_in_4bit=not args.no_quantize, dtype=args.dtype)
    model: Any = load_adapter(loaded.model, args.adapter) if args.adapter else loaded.model
    config = generation_config(model, loaded.tokenizer, **options)
    set_seed(args.seed)
    if args.chat:
        chat(model, loaded.tokenizer, lines(), config)
    elif args.instruction is not None:
        answer(model, loaded.tokenizer, instruction_ids(args.instruction, args.input, loaded.tokenizer), config)
    else:
        answer(model, loaded.tokenizer, prompt_ids([args.prompt], loaded.tokenizer, raw=args.raw), config)
    return 0


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as arguments of GenerationConfig.

    Raises:
        InputError: a value out of its range, or a sampling setting without --do-sample.
    """
    if args.raw and args.prompt is None:
        raise InputError("--raw: only a --prompt is taken as it stands.")
    if args.input and args.instruction is None:
        raise InputError("--input: goes with --instruction.")
    if args.prompt == "" and args.raw:
        raise InputError("--prompt: empty, and with --raw there is nothing to go on from; write something.")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: must be 0 or more, and below 2^32.")
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens}: must be 1 or more.")
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    given = {name: value for name, value in sampling.items() if value is not None}
    for name, value in given.items():
        if not args.do_sample:
            raise InputError(f"--{name.replace('_', '-')} {value}: has no effect without --do-sample; add it.")
    if args.repetition_penalty is not None:
        given["repetition_penalty"] = args.repetition_penalty
    for name, value in given.items():
        if not (value > 0 and (name != "top_p" or value <= 1)):
            raise InputError(
                f"--{name.replace('_', '-')} {value}: must be above 0" + (" and at most 1." if name == "top_p" else ".")
            )
    return {"max_new_tokens": args.max_new_tokens, "do_sample": args.do_sample, **given}


def prompt_ids(
    messages: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    raw: bool = False,
    chat: bool | None = None,
) -> list[int]:
    """Token ids up to where the assistant's next answer starts, rendered as in training.

    Args:
        messages: user and assistant messages in turn, the last one the user's.
        raw: the one message as it stands.
        chat: through the chat template; None: when the tokenizer has one.
    """
    from qalora.data.formats import Example, Turn
    from qalora.data.tokenization import tokenize_prompt

    if chat is None:
        chat = tokenizer.chat_template is not None and not raw
    turns = [Turn("assistant" if i % 2 else "user", text, False) for i, text in enumerate(messages)]
    example = Example(row=0, turns=(*turns, Turn("assistant", "", True)), chat=chat)
    return list(tokenize_prompt(example, tokenizer))


def instruction_ids(instruction: str, input: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids up to the response, in Stanford's Alpaca prompt as in training."""
    from qalora.data.formats import to_example
    from qalora.data.tokenization import tokenize_prompt

    row = {"instruction": instruction, "input": input, "output": ""}
    return list(tokenize_prompt(to_example(row, 0, format="alpaca"), tokenizer))


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], config: GenerationConfig) -> str:
    """Streams the continuation of the token ids to standard output as it grows, and returns its text.

    Raises:
        InputError: no room for `max_new_tokens` after the prompt in the model's context.
    """
    import torch
    from transformers import TextStreamer

    from qalora.metrics import inference

    limit = model.config.max_position_embeddings
    if len(ids) + config.max_new_tokens > limit:
        raise InputError(
            f"the prompt has {len(ids)} tokens and the model's context {limit}: "
            f"--max-new-tokens {config.max_new_tokens} does not fit; shorten the prompt or lower it."
        )
    input_ids = torch.tensor([list(ids)], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with inference(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            streamer=streamer,
        )
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def chat(
    model: Any, tokenizer: PreTrainedTokenizerBase, messages: Iterable[str], config: GenerationConfig
) -> list[str]:
    """Answers each message in the light of the conversation so far, and returns the conversation.

    The oldest exchanges are forgotten, with a note, when the conversation no longer fits into the model's
    context.
    """
    history: list[str] = []
    room = model.config.max_position_embeddings - config.max_new_tokens
    for message in messages:
        history.append(message)
        while len(ids := prompt_ids(history, tokenizer, chat=True)) > room and len(history) > 1:
            print("(the oldest exchange no longer fits into the context and is forgotten)", file=sys.stderr)
            del history[:2]
        history.append(answer(model, tokenizer, ids, config))
    return history


def lines() -> Iterable[str]:
    """The non-empty lines of standard input; a terminal gets a prompt sign."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))
