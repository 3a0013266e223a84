"""The sections of a model card, each as Markdown, and empty where nothing is known. Torch-free."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qalora.adapter.provenance import Provenance
from qalora.base.families import GGUF_OF_TRANSFORMERS
from qalora.base.registry import MODELS
from qalora.rank_grid import grid
from qalora.results.facts import RunFacts, is_hub_id, without_paths

OF_ONE_ATTEMPT = ("output_dir", "push_to_hub", "hub_model_id", "hub_private_repo")
HERE = "path/to/this/folder"  # stands for the folder, or the repository once it is pushed
PATH_SETTINGS = ("model", "train", "validation", "adapter", "chat_template")
FIGURES = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity",
    "exact_match": "exact match (%)",
    "accuracy": "accuracy (%)",
    "rougeL": "ROUGE-L (%)",
}


@dataclass(frozen=True)
class Base:
    """
    Attributes:
        name: a Hub id, or the last name of a path.
        hub: whether it is a Hub id.
        command: what `--model` calls it.
    """

    name: str
    hub: bool
    command: str


def base_called(*names: str | None) -> Base | None:
    """The base by what files call it, the surest first."""
    for name in names:
        if not name:
            continue
        if name in MODELS:
            return Base(MODELS[name][0], True, name)
        if is_hub_id(name):
            registered = next((short for short, (hub_id, _) in MODELS.items() if hub_id == name), name)
            return Base(name, True, registered)
    last = next((name for name in names if name), None)
    return None if last is None else Base(Path(last).name, False, Path(last).name)


def made_by(run: RunFacts | None, provenance: Provenance | None) -> str:
    if provenance is None and run is None:
        return ""
    if provenance is None:
        return "trained with qalora"
    bits = "4-bit" if provenance.quant_type else "16-bit" if provenance.compute_dtype != "float32" else "32-bit"
    return f"trained with qalora on the frozen {bits} base"


def figures(run: RunFacts | None) -> str:
    if run is None:
        return ""
    before, after = run.metrics.get("before"), run.metrics.get("after")
    moments = {name: figures for name, figures in (("before", before), ("after", after)) if figures}
    if not moments:
        return ""
    names = [name for name in FIGURES if any(name in figures for figures in moments.values())]
    rows = [
        [FIGURES[name], *(_number(figures[name]) if name in figures else "–" for figures in moments.values())]
        for name in names
    ]
    measured = next(iter(moments.values()))
    of = f"On {measured['rows']:,} validation rows, {measured['supervised_tokens']:,} tokens of them measured.\n\n"
    return f"## {' and '.join(moments).capitalize()} training\n\n{of}{_table(['metric', *moments], rows)}"


def training(base: Base | None, run: RunFacts | None, provenance: Provenance | None, config: Mapping[str, Any]) -> str:
    facts: list[tuple[str, str]] = []
    if base:
        facts.append(("base", link(base)))
    if provenance:
        facts.append(("base while training", _precision(provenance)))
    if run:
        facts += _run_facts(run)
    elif config:
        facts.append(("rank, alpha", f"{config.get('r')}, {config.get('lora_alpha')}"))
    if provenance and provenance.stop_tokens:
        facts.append(("an answer ends with", ", ".join(f"`{token}`" for token in provenance.stop_tokens)))
    if provenance and provenance.chat_template:
        facts.append(("chat template", "`chat_template.jinja`, with which the rows were rendered"))
    asked = ""
    if provenance and provenance.prompt not in (None, "{prompt}"):
        asked = f"\n\nThe prompt of each row stood in this text:\n\n```\n{provenance.prompt}\n```"
    return f"## Training\n\n{_table(['', ''], [list(fact) for fact in facts])}{asked}" if facts else ""


def _run_facts(run: RunFacts) -> list[tuple[str, str]]:
    data, training, lora = (run.recipe.get(name) or {} for name in ("data", "training", "lora"))
    train, allocation = run.metrics.get("train") or {}, run.metrics.get("allocation") or {}
    sources = data.get("train")
    sources = [sources] if isinstance(sources, str) else list(sources or ())
    rows = [f"{run.train_rows:,} trained on"] if run.train_rows is not None else []
    rows += [f"{run.held_back_rows:,} held back"] if run.held_back_rows is not None else []
    facts = [
        ("recipe", run.recipe_name and f"`{run.recipe_name}`"),
        ("data", ", ".join(f"`{without_paths(source)}`" for source in sources)),
        ("rows", ", ".join(rows)),
    ]
    if "steps" in train:
        size = training.get("micro_batch_size", 0) * training.get("gradient_accumulation_steps", 0)
        facts.append(("optimizer steps", f"{train['steps']:,}" + (f" of {size} rows" if size else "")))
    if "learning_rate" in training:
        facts.append(("learning rate", f"{training['learning_rate']:g}, {training.get('lr_scheduler_type')}"))
    if "seed" in training:
        facts.append(("seed", str(training["seed"])))
    if lora:
        facts.append(("ranks per linear layer at the start", f"{lora.get('r')}, alpha {lora.get('alpha')}"))
    if allocation:
        facts.append(("rank budget", f"{allocation['budget']:,}"))
        left = f"{allocation['total_rank']:,} after {_rounds(allocation['rounds'])}"
        kept = run.metrics.get("compression", {}).get("kept")
        facts.append(("ranks in the adapter", f"{kept['ranks']:,} after compression, {left}" if kept else left))
    if "seconds" in train:
        facts.append(("training time", _duration(train["seconds"])))
        facts.append(("tokens per second", f"{train['tokens_per_second']:,.0f}"))
        facts.append(("peak memory", f"{train['peak_memory_bytes'] / 2**30:.2f} GiB"))
    return [(name, value) for name, value in facts if value]


def rank_map(ranks: Mapping[str, int], run: RunFacts | None) -> str:
    """The rank map: a table of blocks and kinds, or a sentence where all are alike."""
    names = dict.fromkeys([*(run.start if run else ()), *ranks])
    if not ranks:
        return ""
    of = {name: ranks.get(name, 0) for name in names}
    head = "## Ranks\n\n"
    if len(set(of.values())) == 1:
        return f"{head}Each of the {len(of)} adapted linear layers has rank {next(iter(of.values()))}."
    rows, columns, place = grid(list(of))
    cells = [["" for _ in columns] for _ in rows]
    for name, (row, column) in place.items():
        cells[row][column] = str(of[name])
    total = f"{sum(of.values()):,} ranks in {sum(rank > 0 for rank in of.values())} linear layers"
    none = sum(rank == 0 for rank in of.values())
    without = f"; {none} {'has' if none == 1 else 'have'} none" if none else ""
    table = _table(["block", *columns], [[row, *line] for row, line in zip(rows, cells, strict=True)], right=True)
    return f"{head}{total}{without}.\n\n{table}"


def merge_figures(report: Mapping[str, Any]) -> str:
    if not report:
        return ""
    facts = [("linear layers", f"{report['modules']:,}")] if "modules" in report else []
    if "dtype" in report:
        into = "dequantized 4-bit weights" if report.get("base") == "dequantized" else "the base's stored weights"
        facts = [("merged into", into), ("saved as", f"{report['format']}, {report['dtype']}"), *facts]
    if "bytes" in report:
        facts.append(("size of the weights", f"{report['bytes'] / 1e9:.2f} GB"))
    if "max_logit_difference" in report:
        facts += [
            ("largest logit difference", f"{report['max_logit_difference']:.3g}"),
            ("mean logit difference", f"{report['mean_logit_difference']:.3g}"),
            ("mean effect of the adapter on a logit", f"{report['mean_adapter_effect']:.3g}"),
            ("KL divergence (nats)", f"{report['kl']:.2g}"),
            ("same likeliest token", f"{report['greedy_agreement']:.1%} of positions"),
        ]
    if "rank" in report:
        facts.append(("largest rank", str(report["rank"])))
        facts.append(("largest relative difference of s · B A", f"{report['relative_difference']:.1e}"))
    verified = "max_logit_difference" in report
    compared = "Read back and compared with base + adapter, in fp32.\n\n" if verified else ""
    if not verified and "dtype" in report:
        compared = "The result was not compared with base + adapter.\n\n"
    title = "Merge" if "dtype" in report else "Export"
    caveat = f"\n\n{report['caveat']}" if report.get("caveat") else ""
    return f"## {title}\n\n{compared}{_table(['', ''], [list(fact) for fact in facts])}{caveat}"


def loading_adapter(base: Base | None, provenance: Provenance | None) -> str:
    name = base.name if base else "BASE"
    dtype = provenance.compute_dtype if provenance else "bfloat16"
    four_bit = provenance is not None and provenance.quant_type is not None
    config = ""
    if four_bit and provenance is not None:
        config = (
            "\nfour_bit = BitsAndBytesConfig(\n    load_in_4bit=True,\n"
            f'    bnb_4bit_quant_type="{provenance.quant_type}",\n'
            f"    bnb_4bit_use_double_quant={provenance.double_quant},\n"
            f"    bnb_4bit_compute_dtype=torch.{dtype},\n)"
        )
    quantization = ", quantization_config=four_bit" if four_bit else ""
    imports = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if four_bit else "")
    gguf = f', gguf_file="{name}"' if name.endswith(".gguf") else ""
    folder = "FOLDER-OF-THE-BASE" if gguf else name
    code = f"""import torch
from peft import PeftModel
from transformers import {imports}
{config}
base = AutoModelForCausalLM.from_pretrained("{folder}"{gguf}, dtype=torch.{dtype}{quantization})
tokenizer = AutoTokenizer.from_pretrained("{folder}"{gguf})
model = PeftModel.from_pretrained(base, "{HERE}")"""
    code = code.replace("\n\nbase", "\nbase") if not config else code
    command = f'qalora generate --model {shlex.quote(base.command if base else name)} --adapter {HERE} --prompt "…"'
    read = ", ".join(GGUF_OF_TRANSFORMERS)
    limits = (
        f"\n\ntransformers reads GGUF files of the architectures {read}. With a file of another one use the command "
        "below, or llama.cpp with the adapter as `qalora merge --format gguf-lora` writes it."
    )
    return f"## Load\n\n```python\n{code}\n```{limits if gguf else ''}\n\n```bash\n{command}\n```"


def loading_merged(report: Mapping[str, object]) -> str:
    dtype = report.get("dtype", "auto")
    asked = '"auto"' if dtype == "auto" else f"torch.{dtype}"
    code = f"""import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{HERE}", dtype={asked})
tokenizer = AutoTokenizer.from_pretrained("{HERE}")"""
    return f'## Load\n\n```python\n{code}\n```\n\n```bash\nqalora generate --model {HERE} --prompt "…"\n```'


def loading_gguf(folder: Path) -> str:
    file = next(iter(sorted(folder.glob("*.gguf")))).name
    ollama = f"\nollama create NAME -f {HERE}/Modelfile" if (folder / "Modelfile").is_file() else ""
    return f"## Load\n\n```bash\nllama-cli -m {HERE}/{file}{ollama}\n```"


def again(run: RunFacts | None) -> str:
    """The command that repeats the run, and the settings that it resolves to."""
    if run is None or not run.recipe:
        return ""
    settings = {name: value for name, value in run.recipe.items() if name not in OF_ONE_ATTEMPT}
    text = yaml.safe_dump(_named(settings), sort_keys=False, allow_unicode=True).rstrip()
    if run.command is None:
        words, note = ["qalora", "finetune", "--recipe", "recipe.yaml"], "With the settings below as `recipe.yaml`:\n\n"
    else:
        words, note = ["qalora", "finetune", *map(without_paths, run.command)], ""
        if (own := _own_recipe(run.command)) is not None:
            note = f"`{own}` is a file of its author; the settings below are the same in its place.\n\n"
    return (
        f"## Repeat\n\n{note}```bash\n{shlex.join(words)}\n```\n\n<details>\n<summary>All settings</summary>\n\n"
        f"```yaml\n{text}\n```\n\n</details>"
    )


# ------------------------------------------------------------------------------------------------------------ the words


def link(base: Base) -> str:
    return f"[{base.name}](https://huggingface.co/{base.name})" if base.hub else f"`{base.name}`"


def _own_recipe(command: Sequence[str]) -> str | None:
    """The name of the recipe's file; None: a recipe that comes with the package."""
    words = list(command)
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words[:-1] else ""
    return Path(recipe).name if recipe.endswith((".yaml", ".yml")) else None


def _precision(provenance: Provenance) -> str:
    if provenance.quant_type is None:
        return f"not quantized, {provenance.compute_dtype}"
    double = " with double quantization" if provenance.double_quant else ""
    return f"{provenance.quant_type.upper()}{double}, computed in {provenance.compute_dtype}"


def _rounds(count: int) -> str:
    return f"{count} {'round' if count == 1 else 'rounds'} of allocation"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _number(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _table(head: list[str], rows: list[list[str]], *, right: bool = False) -> str:
    rule = ["---:" if right or column else "---" for column in range(len(head))]
    if not right and head == ["", ""]:
        rule = ["---", "---"]
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _named(value: object, key: str = "") -> object:
    """Settings with the paths among them reduced to their last names."""
    if isinstance(value, dict):
        return {name: _named(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_named(item, key) for item in value]
    return without_paths(value) if isinstance(value, str) and key in PATH_SETTINGS else value
