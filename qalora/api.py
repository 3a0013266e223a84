"""What a script can do with one call: the parts of the commands, with parameters in the place of flags.

`qalora` itself names everything that is supported; import from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from qalora.arguments import whole
from qalora.errors import AnswerNo, InputError, check_choice
from qalora.flags import DTYPES

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from qalora.adapter.scores import Importance, Method, RankScores
    from qalora.data.rows import Row
    from qalora.data.tokenization import TokenizedDataset
    from qalora.memory import MemoryPlan
    from qalora.recipe import Recipe
    from qalora.text_scores import Normalize

Source = str | Path | Iterable[str | Path] | Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]


def load_rows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    limit: int | None = None,
    max_seq_len: int = 2048,
    **reading: Any,
) -> list[Row]:
    """Rows of text, rendered and tokenized as `qalora finetune` does it, for `AllocationCallback`, `start`,
    `score_ranks`, `evaluate` and any trainer.

    Args:
        source: a file, a folder, a pattern, a Hub id, "qalora:quickstart", a list of these, or rows in memory, in any
            format of docs/data.md: a list of dictionaries, a Dataset or DatasetDict of `datasets`, a DataFrame of
            pandas.
        tokenizer: of the base.
        split: of a set that has splits.
        limit: rows at most.
        max_seq_len: tokens per row; longer rows are cut, and a line says so.
        reading: further settings of a recipe's `data` section: format, columns, prompt_template, completion_template,
            labels, chat, chat_template, chat_template_kwargs, mask_history, train_on_inputs, name.

    Returns:
        A dictionary per row: `input_ids` and `labels` (−100 where no loss), lists of integers; `row`, its number; and
        `truncated`, whether it was cut. Rows in which nothing is learned are left out, and a line says so.

    Raises:
        InputError: a source or a row that cannot be read, nothing in it to learn, or a setting that does not exist.
    """
    whole("max_seq_len", max_seq_len)
    return list(_read(source, tokenizer, split, limit, {"max_seq_len": max_seq_len, **reading}).items)


def _read(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    limit: int | None,
    reading: Mapping[str, Any],
) -> TokenizedDataset:
    """Rows of text, tokenized; a line names what was cut, left out, or not used."""
    from inspect import signature

    from qalora.data.tokenization import load_dataset
    from qalora.progress import console

    known = [name for name in signature(load_dataset).parameters if name not in ("source", "tokenizer")]
    if unknown := sorted(set(reading) - set(known)):
        raise InputError(f"{unknown[0]}: no setting of how rows are read; there are {', '.join(known)}.")
    whole("limit", limit, optional=True)
    found = load_dataset(_given(source, split), tokenizer, split=split, limit=limit, **reading)
    if found.report.truncated or found.report.dropped or found.report.unused:
        console.print(f"rows: {found.report}")
    return found


def _given(source: Source, split: str) -> Any:
    """A source as it is read: a text, or a list of texts or of rows.

    Raises:
        InputError: a mapping that is neither, or a slice of rows in memory.
    """
    if isinstance(source, (str, Path)):
        return str(source)
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a DataFrame of pandas
        source = source.to_dict("records")
    if isinstance(source, Mapping):
        if any(isinstance(value, str) or not isinstance(value, Iterable) for value in source.values()) or not all(
            isinstance(next(iter(value), None), Mapping) for value in source.values()
        ):
            raise InputError("rows: one row, or columns; pass a list of rows, each a dictionary.")
        if split not in source:
            raise InputError(f"rows: no split {split!r}; there are {', '.join(source)}.")
        source = source[split]
    items: Any = source
    found = [str(item) if isinstance(item, Path) else item for item in items]
    if not found:
        raise InputError("rows: there is none.")
    if "[" in split and isinstance(found[0], Mapping):
        raise InputError(f"split={split!r}: rows in memory have no splits; pass those that are meant.")
    return found


def score_ranks(
    model: PeftModel,
    rows: Iterable[Mapping[str, Any]],
    method: Method = "first-order",
    *,
    importance: Importance | None = None,
    prune: int | None = None,
    min_rank: int = 0,
    batch_size: int = 4,
    memory: int | None = None,
    seed: int = 0,
) -> RankScores:
    """AB-LoRA: the importance of every rank of an adapter on some rows (ALoRA, arXiv 2403.16187, §3.3, eq. 6). The
    model is left as it was.

    Args:
        model: from `attach` or `load_adapter`.
        rows: `input_ids` and `labels` (−100 where no loss), lists of integers; also micro-batches, whose values are
            (rows, tokens) tensors.
        method: first-order: two forward-backward passes for all ranks; exact: two forwards per rank; certified: exact
            where first order leaves the pruned set in doubt; path: integrated from base to adapter.
        importance: which score decides: sum (eq. 6), drop, alone, or path with the method path; None: path or sum.
        prune: ranks that will go, whose threshold `certified` settles; None: one per module.
        min_rank: ranks that every module keeps.
        batch_size: rows per forward.
        memory: bytes that stacked variants may hold; None: four fifths of what the GPU has free.
        seed: of the sample of `certified`.

    Returns:
        Scores in nats per supervised token: `.importance`, which decides, `.drop` and `.alone`, each module → a value
        per rank, in the order of the rows of A. Also `.loss` with the adapter and `.base_loss` without, `.exact` (the
        ranks that were ablated), and `.certified`, whether the pruned set is settled.

    Raises:
        InputError: no adapter, rows that are not tokenized, or an importance that the method does not give.
        AnswerNo: a loss or a score is not finite.
    """
    from torch import Tensor

    from qalora.adapter.callback import tokenized
    from qalora.adapter.model import check_adapted
    from qalora.adapter.scores import Importance, Method
    from qalora.adapter.scoring import score_ranks as score
    from qalora.adapter.start.begin import device_of
    from qalora.base.device import memory_to_score
    from qalora.data.batching import Collator, micro_batches, on_device

    check_choice("method", method, get_args(Method))
    check_choice("importance", importance, (None, *get_args(Importance)))
    whole("prune", prune, optional=True)
    whole("min_rank", min_rank, 0)
    whole("batch_size", batch_size)
    check_adapted(model, "score_ranks")
    found: list[Any] = [rows] if isinstance(rows, Mapping) else list(rows)
    importance = importance or ("path" if method == "path" else "sum")
    if (importance == "path") != (method == "path"):
        raise InputError(f"importance={importance!r}: method={method!r} does not give it; path goes with path alone.")
    if not found or not isinstance(found[0].get("input_ids"), Tensor) or found[0]["input_ids"].ndim != 2:
        found = micro_batches(tokenized(found, "rows"), batch_size, Collator(0))
    return score(
        model,
        on_device(found, device_of(model)),
        method,
        importance=importance,
        prune=prune,
        min_rank=min_rank,
        memory=memory_to_score() if memory is None else memory,
        seed=seed,
    )


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Source,
    *,
    metrics: str | Sequence[str] = ("loss",),
    batch_size: int = 8,
    max_new_tokens: int = 128,
    split: str = "validation",
    limit: int | None = None,
    choices: Sequence[str] | None = None,
    answer_pattern: str | None = None,
    normalize: Normalize | None = None,
    **reading: Any,
) -> dict[str, float]:
    """Figures of a causal LM, with or without an adapter, on rows of text.

    Args:
        model: from `load_base(…).model`, `attach` or `load_adapter`; its train and eval modes stay.
        tokenizer: of the base.
        data: rows of text, as `load_rows` takes them; for the loss alone, also what it gives.
        metrics: loss, exact_match, accuracy, rougeL; one, or several.
        batch_size: rows per forward; it changes no result beyond rounding.
        max_new_tokens: length of the greedy answers that exact_match and rougeL read.
        split: of a set that has splits.
        limit: rows at most.
        choices: completions that accuracy chooses from; None: the distinct references of the rows.
        answer_pattern: regular expression; the first group of its first match is what exact_match compares.
        normalize: numbers: exact_match sets commas, blanks, $ and a full stop at the end aside.
        reading: as `load_rows` takes it.

    Returns:
        `rows`, `supervised_tokens`, and per metric: `loss` (nats per supervised token) and `perplexity`; `exact_match`,
        `accuracy`, `rougeL` in percent.

    Raises:
        InputError: rows that cannot be read, or a metric that they cannot answer.
    """
    from qalora.kernels.install import install
    from qalora.metrics import evaluate as figures

    whole("batch_size", batch_size)
    whole("max_new_tokens", max_new_tokens)
    check_choice("normalize", normalize, (None, "numbers"))
    metrics = [metrics] if isinstance(metrics, str) else metrics
    install(model)
    if not isinstance(data, (str, Path)):
        given = data = _given(data, split)
        if isinstance(given[0], Mapping) and "input_ids" in given[0]:
            if texts := [metric for metric in metrics if metric != "loss"]:
                raise InputError(f"metrics={texts[0]}: reads texts, and the rows are tokenized; pass rows of text.")
            whole("limit", limit, optional=True)
            return _loss(model, tokenizer, given[:limit], batch_size)
    dataset = _read(data, tokenizer, split, limit, reading)
    return figures(
        model,
        tokenizer,
        dataset,
        metrics=[metrics] if isinstance(metrics, str) else metrics,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        choices=choices,
        answer_pattern=answer_pattern,
        normalize=normalize,
    )


def _loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], batch_size: int
) -> dict[str, float]:
    """The figures of rows that are tokenized already."""
    from math import exp, fsum

    from qalora.adapter.callback import tokenized
    from qalora.data.rows import supervised_tokens
    from qalora.metrics import item_losses

    found = tokenized(rows, "data")
    tokens = supervised_tokens(row["labels"] for row in found)
    if not tokens:
        raise InputError("data: nothing in these rows has a loss (every label is −100).")
    loss = fsum(item_losses(model, tokenizer, found, batch_size)) / tokens
    return {"rows": len(found), "supervised_tokens": tokens, "loss": loss, "perplexity": exp(min(loss, 700.0))}


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    *,
    system: str | None = None,
    chat: bool | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    stop: str | Sequence[str] = (),
) -> str | list[str]:
    """Greedy answers, rendered as in training and ended as the model was taught to end.

    Args:
        model: from `load_base(…).model`, `attach` or `load_adapter`.
        tokenizer: of the base.
        prompts: one question, or several.
        system: a system message before each.
        chat: through the chat template; None: where the tokenizer has one.
        max_new_tokens: per answer.
        batch_size: prompts per forward.
        stop: one text, or several, that end an answer, besides what ends a turn of this model.

    Returns:
        The answer, or one per prompt.

    Raises:
        InputError: a system message that the template leaves out, an empty prompt, or one that leaves no position for
            an answer.
    """
    from qalora.answers import generate_answers
    from qalora.generate import prompt_ids

    whole("max_new_tokens", max_new_tokens)
    whole("batch_size", batch_size)
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = [prompt_ids([prompt], tokenizer, chat=chat, system=system) for prompt in several]
    taught = (stop,) if isinstance(stop, str) else tuple(stop)
    answers = generate_answers(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, batch_size=batch_size, taught=taught
    )
    return answers[0] if isinstance(prompts, str) else answers


def plan_memory(model: str | Path, **settings: Any) -> MemoryPlan:
    """The memory of one training step, by term, without loading the model.

    Args:
        model: a registered name, a folder, a GGUF file, or a Hub id.
        settings: ranks (8, or module → rank), micro_batch_size (1), gradient_accumulation_steps (1), seq_len (512,
            tokens per row), load_in_4bit (True), double_quant (True), compute_dtype ("bfloat16"), optim
            ("adamw_torch"), gradient_checkpointing (True), mlp_tile, dropout, directions (0; as many as ranks for
            init="gradient"),
            packed (False), device ("cuda"), processes (1; GPUs that share a step).

    Returns:
        `.terms`, bytes by name, and `.total`, bytes.

    Raises:
        InputError: no such model, or a setting or a value of one that does not exist.
    """
    from inspect import signature

    from qalora.base.registry import resolve, shape_of
    from qalora.memory import plan_memory as plan
    from qalora.recipe.settings import Optimizer

    known = list(signature(plan).parameters)[1:]
    if unknown := sorted(set(settings) - set(known)):
        raise InputError(f"{unknown[0]}: no setting of a memory plan; there are {', '.join(known)}.")
    settings = {
        name: str(value).removeprefix("torch.") if name.endswith("dtype") else value for name, value in settings.items()
    }
    choices = {
        "compute_dtype": DTYPES,
        "optim": get_args(Optimizer),
        "gradient_checkpointing": (True, False, "selective", "offload"),
        "device": ("cuda", "cpu"),
    }
    counts = ("ranks", "micro_batch_size", "gradient_accumulation_steps", "seq_len", "mlp_tile")
    for name, value in settings.items():
        if name in choices:
            check_choice(name, value, choices[name])
        elif name in counts and not isinstance(value, Mapping):
            whole(name, value, optional=name == "mlp_tile")
    return plan(shape_of(resolve(str(model))), **settings)


def merge(
    model: str | Path,
    adapter: str | Path,
    output_dir: str | Path,
    *,
    base: Literal["dequantized", "original"] | None = None,
    format: Literal["hf", "gguf"] = "hf",
    dtype: str | torch.dtype | None = None,
    gguf_type: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> dict[str, Any]:
    """Merges a plain PEFT LoRA into the weights that it was trained on, a tensor at a time, and compares the result
    with base + adapter.

    Args:
        model: the base: a registered name, a folder, a GGUF file, or a Hub id.
        adapter: folder of the adapter.
        output_dir: of the merged model.
        base: dequantized or original weights; None: what the adapter's qalora.json says.
        format: a transformers folder, or a folder with a GGUF file.
        dtype: bfloat16, float16 or float32, or torch's own, of format="hf"; None: bfloat16.
        gguf_type: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0, of format="gguf"; None: f16.
        max_shard_size: bytes per file of format="hf", or a text such as "4GB", which is the default.
        overwrite: replace what `output_dir` holds; a merge of the same model and adapter is replaced anyway.
        verify: compare, in fp32, on a few texts.

    Returns:
        What merge.json in the folder holds.

    Raises:
        InputError: an adapter that is no plain LoRA, says nothing of its base, or is for another; a value that does
            not exist, or that `format` does not use; too little disk or memory.
        AnswerNo: the result is further from base + adapter than rounding explains. Nothing is left of the merge then.
    """
    import torch

    from qalora.adapter.its_base import refuse_other_base
    from qalora.adapter.saved import read_config
    from qalora.base.registry import resolve
    from qalora.deploy.gguf import GGUF_TYPES
    from qalora.deploy.merging import merge as merged
    from qalora.merge import trained_quantization
    from qalora.progress import console
    from qalora.sizes import parse_size

    dtype = None if dtype is None else str(dtype).removeprefix("torch.")
    check_choice("format", format, ("hf", "gguf"))
    check_choice("base", base, (None, "dequantized", "original"))
    check_choice("dtype", dtype, (None, *DTYPES))
    check_choice("gguf_type", gguf_type, (None, *GGUF_TYPES))
    for name, value, of in (
        ("dtype", dtype, "hf"),
        ("max_shard_size", max_shard_size, "hf"),
        ("gguf_type", gguf_type, "gguf"),
    ):
        if value is not None and format != of:
            raise InputError(f"{name}={value!r}: goes with format={of!r}; leave it out.")
    if isinstance(max_shard_size, str):
        max_shard_size = parse_size(max_shard_size, "--max-shard-size")
    whole("max_shard_size", max_shard_size, optional=True)
    source = resolve(str(model))
    adapter, output_dir = Path(adapter).expanduser(), Path(output_dir).expanduser()
    read_config(adapter)
    if line := refuse_other_base(str(adapter), source):
        console.print(line)
    stored = {"dtype": dtype and getattr(torch, dtype), "gguf_type": gguf_type, "max_shard_size": max_shard_size}
    return merged(
        source,
        adapter,
        output_dir,
        quantization=trained_quantization(str(adapter), source, base, {}),
        format=format,
        overwrite=overwrite,
        verify=verify,
        **{name: value for name, value in stored.items() if value is not None},  # type: ignore[arg-type]
    )


def export_adapter(
    model: str | Path,
    adapter: str | Path,
    output_dir: str | Path,
    format: Literal["peft", "peft-uniform", "gguf-lora"] = "peft-uniform",
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes an adapter in a form that other tools read, and compares every module's s · B A.

    Args:
        model: its base, see `merge`.
        adapter: folder of the adapter.
        output_dir: of the result.
        format: peft: ranks per module; peft-uniform: one rank, for vLLM; gguf-lora: for llama.cpp and Ollama.
        overwrite: replace what `output_dir` holds; an export of the same model and adapter is replaced anyway.

    Returns:
        What merge.json in the folder holds.

    Raises:
        InputError: no plain LoRA, for another model, no such format, or a folder that holds something else.
    """
    from qalora.adapter.its_base import said_of_base
    from qalora.adapter.saved import read_config
    from qalora.base.registry import resolve
    from qalora.deploy.export import AdapterFormat
    from qalora.deploy.export import export_adapter as export
    from qalora.progress import console

    check_choice("format", format, get_args(AdapterFormat))
    adapter, output_dir, source = Path(adapter).expanduser(), Path(output_dir).expanduser(), resolve(str(model))
    read_config(adapter)
    if line := said_of_base(str(adapter), source):
        console.print(line)
    return export(adapter, output_dir, format, source=source, overwrite=overwrite)


def finetune(
    recipe: Recipe | str | Path,
    overrides: Mapping[str, object] | None = None,
    *,
    profile: str | None = None,
    overwrite: bool = False,
    resume_from_checkpoint: bool | str | Path | None = None,
) -> dict[str, Any]:
    """What `qalora finetune` does: loads the base, trains, evaluates before and after, saves.

    Args:
        recipe: from `load_recipe`, or a recipe's name or file.
        overrides: settings by their dotted names, over the recipe's, where that is a name or a file.
        profile: settings for a kind of machine: 24gb, t4, cpu.
        overwrite: replace the run that the output folder holds.
        resume_from_checkpoint: a checkpoint to continue exactly; True or "auto": the newest; None or False: none.

    Returns:
        What metrics.json of the run's folder holds, and `output_dir`.

    Raises:
        InputError: bad input, before any weights load.
        AnswerNo: the loss was not finite, or a run that was to allocate never did.
        KeyboardInterrupt: interrupted, after a checkpoint.
    """
    from qalora.cli import DONE
    from qalora.finetune import run_recipe
    from qalora.quiet import noise_hidden
    from qalora.recipe import Recipe, checked, load_recipe, recipe_path
    from qalora.training.run_folder import run_name

    reads = [] if isinstance(recipe, Recipe) else [recipe_path(str(recipe))]
    if isinstance(recipe, Recipe):
        if overrides or profile:
            raise InputError("overrides, profile: the recipe is made already; give them to load_recipe.")
        recipe = checked(recipe)
    else:
        name = str(recipe)
        recipe = load_recipe(name, overrides or {}, profile)
        own = recipe.output_dir or f"outputs/{run_name(name, recipe.model)}"
        recipe = recipe.with_settings({"output_dir": own})
    if recipe.output_dir is None:
        raise InputError("output_dir is missing: say where the run's files go.")
    resume = "auto" if resume_from_checkpoint is True else str(resume_from_checkpoint or "") or None
    with noise_hidden():
        code = run_recipe(recipe, reads, overwrite=overwrite, resume_from_checkpoint=resume)
    if code != DONE:
        raise KeyboardInterrupt
    output_dir = Path(recipe.output_dir).expanduser()
    try:
        metrics: dict[str, Any] = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise AnswerNo(f"{output_dir}: the run ended without metrics.json ({error}).") from None
    return {**metrics, "output_dir": str(output_dir)}
