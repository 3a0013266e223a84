"""What stands beside the weights of a merged folder: config, tokenizer and generation defaults, as the base has them.

Servers are pinned to either major version of transformers, and what one writes the other may misread in silence. So the
base's own files are copied, and only what training added is written on top. A GGUF file has none: what is written for
it, both can read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qalora.adapter.provenance import read_provenance
from qalora.base.families import is_wrapper, text_fields
from qalora.base.loading import read_tokenizer
from qalora.base.registry import ModelSource, read_fields
from qalora.data.ending import Ending, ending_of
from qalora.errors import InputError
from qalora.files import write_json, write_whole

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "chat_template.*", "additional_chat_templates/*", "*processor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Served:
    """How a model is asked, and where it stops: the base's own way, and what training added to it.

    Attributes:
        tokenizer: the base's, with the chat template that was trained with.
        ending: what ends an answer; its tokens go to the generation config.
        chat_template: where it is not the tokenizer's own.
        prompt: the text that was trained around what a user says, {prompt}; None: a chat, or unknown.
    """

    tokenizer: PreTrainedTokenizerBase
    ending: Ending
    chat_template: str | None = None
    prompt: str | None = None


def served_after(source: ModelSource, config: PreTrainedConfig, adapter_dir: Path) -> Served:
    """How the base is asked once this adapter is on it."""
    tokenizer = read_tokenizer(source)
    provenance = read_provenance(adapter_dir)
    own = base_generation(source, config).get("eos_token_id")
    if provenance is None:
        return Served(tokenizer, ending_of(tokenizer, own))
    if provenance.chat_template is not None:
        tokenizer.chat_template = provenance.chat_template
    ending = ending_of(tokenizer, own, provenance.stop_tokens)
    return Served(tokenizer, ending, provenance.chat_template, provenance.prompt)


def write_settings(
    folder: Path, source: ModelSource, config: PreTrainedConfig, dtype: torch.dtype, served: Served
) -> None:
    """Writes config.json (without quantization_config), generation_config.json and the tokenizer's files.

    Args:
        config: the model's as it was trained.
        dtype: of the weights in the folder.
    """
    published = published_folder(source)
    fields = _config_fields(published, config)
    write_json(folder / "config.json", served_config(fields, config, dtype))
    _write_generation(folder, published, fields, served.ending)
    if published is None:
        _write_tokenizer(folder, source)
    else:
        _copy_tokenizer(folder, published)
    if served.chat_template is not None:
        add_chat_template(folder, served.chat_template)


def published_folder(source: ModelSource) -> Path | None:
    """The folder with the base's own files, all but its weights; None of a GGUF file, which has none.

    Raises:
        InputError: they cannot be downloaded.
    """
    if source.kind == "gguf":
        return None
    if source.kind == "folder":
        return Path(source.location)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source.location, allow_patterns=["config.json", "generation_config.json", *TOKENIZER_FILES]
            )
        )
    except Exception as error:  # offline, gated and unknown models each raise a class of their own
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--model {source.name}: config and tokenizer of {source.location} cannot be had ({reason})."
        ) from None


# --------------------------------------------------------------------------------------------------------------- config


def _config_fields(published: Path | None, config: PreTrainedConfig) -> dict[str, object]:
    """config.json as published; of a GGUF file, as it would be."""
    return dict(json.loads(config.to_json_string())) if published is None else read_fields(published / "config.json")


def served_config(fields: Mapping[str, object], config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, object]:
    """The fields of a config.json, such that transformers 4 and 5 read the same model.

    Version 5 keeps everything about positions in rope_parameters, which version 4 does not know: it reads rope_theta,
    or takes 10,000, and rope_scaling. The names of the dtype differ likewise.

    Args:
        fields: as published.
        config: as version 5 reads them, with what training found otherwise in the weights (a head of its own).
    """
    served = {name: value for name, value in fields.items() if name not in ("quantization_config", "dtype")}
    served["torch_dtype"] = served["dtype"] = str(dtype).removeprefix("torch.")
    if is_wrapper(fields):  # as either version wrote it: the config of a vision model is its own, and no decoder's
        text: dict[str, Any] = {**fields["text_config"]}  # type: ignore[dict-item]
        text.pop("quantization_config", None)
        kept = {name: served["dtype"] for name in ("dtype", "torch_dtype") if name in text}
        if text_fields(fields)["tie_word_embeddings"] != config.tie_word_embeddings:
            served["tie_word_embeddings"] = config.tie_word_embeddings
        return served | {"text_config": text | kept}
    if served.get("tie_word_embeddings", False) != config.tie_word_embeddings:
        served["tie_word_embeddings"] = config.tie_word_embeddings
    if config.model_type == "granitemoehybrid":  # without state spaces; version 5 reads version 4's name for the rest
        served["layer_types"] = ["attention"] * config.num_hidden_layers
    if not served.get("architectures"):  # a GGUF file names none, and vLLM asks for it
        with torch.device("meta"):
            served["architectures"] = [type(AutoModelForCausalLM.from_config(config)).__name__]
    rope = dict(config.rope_parameters or {})
    if "rope_theta" not in rope:  # no rotation, or one for each kind of layer, which has no form that both read
        return served
    served.setdefault("rope_theta", rope["rope_theta"])
    published_for_4 = "rope_parameters" not in served and "original_max_position_embeddings" in served
    if published_for_4:
        return served
    if (
        rope.get("rope_type") == "longrope"
    ):  # version 4 knows its length at the top alone, and takes another factor from it
        served["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        rope["attention_factor"] = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")[1]
    if "rope_parameters" in served or rope.get("rope_type") == "longrope":
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        if (share := rope.get("partial_rotary_factor")) is not None:
            served["partial_rotary_factor"] = share
        served |= {
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
            "rope_parameters": rope,
        }
    return served


# -------------------------------------------------------------------------------------------------- generation defaults


def base_generation(source: ModelSource, config: PreTrainedConfig) -> dict[str, Any]:
    """The base's generation defaults as it publishes them, or as they follow from its config."""
    published = published_folder(source)
    own = _published_generation(published)
    return _implied_generation(_config_fields(published, config)) if own is None else own


def _write_generation(folder: Path, published: Path | None, config: Mapping[str, object], ending: Ending) -> None:
    """The base's own file, with the tokens that end an answer. A base without one gets one only where they are not its
    config's.

    As it stands: saving it through transformers would refuse what it loads, such as a temperature without do_sample.
    """
    own = _published_generation(published)
    fields = own if own is not None else _implied_generation(config)
    if _ids(fields.get("eos_token_id")) != list(ending.tokens):
        ends = ending.tokens[0] if len(ending.tokens) == 1 else list(ending.tokens)
        write_json(folder / "generation_config.json", fields | {"eos_token_id": ends})
    elif published is not None and own is not None:
        shutil.copyfile(published / "generation_config.json", folder / "generation_config.json")


def _published_generation(published: Path | None) -> dict[str, object] | None:
    file = published / "generation_config.json" if published else None
    return read_fields(file) if file is not None and file.is_file() else None


def _implied_generation(config: Mapping[str, object]) -> dict[str, object]:
    """What transformers makes of config.json where there is no file: token ids, and older configs' sampling."""
    fields = GenerationConfig.from_model_config(dict(config)).to_diff_dict()
    internal = ("_from_model_config", "transformers_version", "use_cache", "output_attentions", "output_hidden_states")
    return {name: value for name, value in fields.items() if name not in internal}


def _ids(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value or ())


# ------------------------------------------------------------------------------------------------------------ tokenizer


def _copy_tokenizer(folder: Path, published: Path) -> None:
    for pattern in TOKENIZER_FILES:
        for file in published.glob(pattern):
            if file.is_file():
                target = folder / file.relative_to(published)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def _write_tokenizer(folder: Path, source: ModelSource) -> None:
    """Of a GGUF file: tokenizer.json, and a config of it in version 4's words, which version 5 reads too."""
    tokenizer: Any = read_tokenizer(source)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(folder)
    fields = read_fields(folder / "tokenizer_config.json")
    for name in ("backend", "is_local", "local_files_only"):
        fields.pop(name, None)
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    fields["clean_up_tokenization_spaces"] = bool(tokenizer.clean_up_tokenization_spaces)
    if extra := fields.pop("extra_special_tokens", None):
        fields["additional_special_tokens"] = extra
    write_json(folder / "tokenizer_config.json", fields)
    if template is not None:
        add_chat_template(folder, template)


def add_chat_template(folder: Path, template: str) -> None:
    """Puts the template into the tokenizer's files, in both places where versions of transformers look for it."""
    file = folder / "tokenizer_config.json"
    fields = read_fields(file) if file.is_file() else {}
    named = fields.get("chat_template")
    if isinstance(named, list):  # several, of which one is the default
        others = [entry for entry in named if entry.get("name") != "default"]
        fields["chat_template"] = [{"name": "default", "template": template}, *others]
    else:
        fields["chat_template"] = template
    write_json(file, fields)
    write_whole(folder / "chat_template.jinja", template)
