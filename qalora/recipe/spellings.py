"""How settings are spelled: other tools' names and values for ours, and what to write for a name that is none.
Torch-free."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from qalora.adapter.targets import EVERY
from qalora.recipe.advice import advice
from qalora.recipe.settings import options

# Two names of one thing: what is set later takes the place of the other.
ONE_OF = (("training.warmup_steps", "training.warmup_ratio"),)
# Other tools' spellings (docs of axolotl, LLaMA-Factory, litgpt, torchtune, qlora.py) → ours.
ALIASES = {
    "push_to_hub_model_id": "hub_model_id",
    "hub_repo_id": "hub_model_id",
    "base_model": "model",
    "model_name_or_path": "model",
    "dataset": "data.train",
    "data_path": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.validation_split",
    "dataset_config_name": "data.name",
    "dataset_config": "data.name",
    "subset": "data.name",
    "dataset_format": "data.format",
    "type": "data.format",
    "formatting": "data.format",
    "cutoff_len": "data.max_seq_len",
    "sequence_len": "data.max_seq_len",
    "max_seq_length": "data.max_seq_len",
    "val_size": "data.val_set_size",
    "eval_dataset_size": "data.val_set_size",
    "val_split_fraction": "data.val_set_size",
    "train_on_source": "data.train_on_inputs",
    "train_on_prompt": "data.train_on_inputs",
    "mask_prompt": "data.train_on_inputs",
    "chat_template_jinja": "data.chat_template",
    "chat_template_path": "data.chat_template",
    "sample_packing": "data.packing",
    "neat_packing": "data.packing",
    "per_device_train_batch_size": "training.micro_batch_size",
    "num_train_epochs": "training.num_epochs",
    "epochs": "training.num_epochs",
    "lr": "training.learning_rate",
    "optimizer": "training.optim",
    "quant_type": "quantization.bnb_4bit_quant_type",
    "double_quant": "quantization.bnb_4bit_use_double_quant",
    "bits": "quantization.load_in_4bit",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_target": "lora.target_modules",
    "adapter_name_or_path": "lora.adapter",
    "lora_model_dir": "lora.adapter",
    "lora_target_modules": "lora.target_modules",
    "lora_dropout": "lora.dropout",
    "lora_layers_to_transform": "lora.layers_to_transform",
    "peft_layers_to_transform": "lora.layers_to_transform",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "eval_batch_size": "evaluation.batch_size",
    "eval_max_new_tokens": "evaluation.max_new_tokens",
    "max_train_steps": "training.max_steps",
    "num_warmup_steps": "training.warmup_steps",
    "lr_warmup_steps": "training.warmup_steps",
    "lr_scheduler": "training.lr_scheduler_type",
    "evaluation_strategy": "training.eval_strategy",
    "gradient_clipping": "training.max_grad_norm",
    "clip_grad_norm": "training.max_grad_norm",
    "label_smoothing": "training.label_smoothing_factor",
    "noisy_embedding_alpha": "training.neftune_noise_alpha",
    "use_gradient_checkpointing": "training.gradient_checkpointing",
    "logging_steps": "logging.steps",
    "max_samples": "data.max_rows",
    "dataset_name": "data.train",
    "quantization_bit": "quantization.load_in_4bit",
    "quantization_type": "quantization.bnb_4bit_quant_type",
    "double_quantization": "quantization.bnb_4bit_use_double_quant",
}
SOURCES = ("data.train", "data.validation")  # a comma may be part of a file's name
# Other tools' values → ours.
VALUE_ALIASES: dict[str, dict[Any, Any]] = {
    "data.format": {"input-output": "prompt-completion", "completion": "text"},
    "lora.target_modules": {"all": EVERY},
    "training.gradient_checkpointing": {"unsloth": "offload"},
    "training.optim": {
        "adamw": "adamw_torch",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw": "paged_adamw_32bit",
        "lion": "lion_32bit",
        "paged_lion": "paged_lion_32bit",
    },
}


def our_spelling(key: str, value: Any, known: Mapping[str, Any]) -> tuple[str | None, Any]:
    """The canonical name and value of a setting spelled our way or another tool's way; None when unknown."""
    section, _, leaf = key.rpartition(".")
    canonical = key if key in known else ALIASES.get(leaf)
    if canonical is None or section not in ("", canonical.rpartition(".")[0]):
        return None, value
    if leaf == "mask_prompt" and isinstance(value, bool):
        value = not value
    elif leaf in ("bits", "quantization_bit") and isinstance(value, int):
        value = {4: True, 16: False, 32: False}.get(value, value)
    elif isinstance(value, str):
        value = VALUE_ALIASES.get(canonical, {}).get(value, value)
        whole = canonical in SOURCES or (canonical == "lora.target_modules" and _is_expression(value))
        if is_list(known[canonical]) and not whole:
            value = [] if value == "none" else [part.strip() for part in value.split(",")]
    return canonical, value


def _is_expression(targets: str) -> bool:
    return targets == EVERY or re.fullmatch(r"[\w.\-, ]*", targets) is None


def is_list(annotation: Any) -> bool:
    return any(typing.get_origin(option) is list for option in options(annotation))


def advice_on(key: str, known: Mapping[str, Any]) -> str:
    """What to write instead: what the other tools' name means here, else the name that is spelled most like it."""
    leaf = key.rpartition(".")[2]
    if leaf in ALIASES and leaf not in known:
        return f", did you mean {ALIASES[leaf]}?"
    return advice(leaf) or nearest(key, [*known, *ALIASES])


def nearest(word: str, names: Sequence[str]) -> str:
    """`; did you mean …?`: the name that is spelled most like `word`, also when only its last part is."""
    leaves = {name.rsplit(".", 1)[-1]: name for name in names}
    by_leaf = [leaves[match] for match in difflib.get_close_matches(word.rsplit(".", 1)[-1], leaves, 1, 0.7)]
    match = by_leaf or difflib.get_close_matches(word, names, 1, 0.6)
    return f", did you mean {ALIASES.get(match[0], match[0])}?" if match else ""
