"""Adapter + frozen base → one 16-bit model that plain transformers loads.

    W_merged = round( dequantized W + s · B A )        per linear map, in fp32, rounded once

The base is the one that was trained on: the exact values of its 4-bit weights, or its 16-bit weights.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from qalora.adapter.model import load_adapter, paired, read_config, read_tensors, scaling_of
from qalora.base.loading import LoadedBase
from qalora.base.quantized import dequantize, guard_cpu_packing, linear_maps
from qalora.errors import InputError

REPORT = "merge.json"
SHARD_SIZE = "4GB"
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Question: What is 17 + 25?\nAnswer:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Write a short review of a family-friendly restaurant near the river.",
)


def merge_into(
    loaded: LoadedBase,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    verify_rows: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Merges any plain PEFT LoRA into the base and writes a Hugging Face model folder.

    The folder is written beside its place and moved there at the end. A previous merge of the same model and
    adapter is replaced; any other content is refused. One shard at a time is in memory, and then, for the
    comparison, the model read back from the folder.

    Args:
        loaded: the base without an adapter; it is without one again afterwards.
        dtype: of the saved weights.
        overwrite: replace whatever the folder holds.
        verify_rows: texts whose logits under both models are compared; None: TEXTS.

    Returns:
        What `merge.json` in the folder holds: model, adapter, dtype, number of merged modules, bytes, and
        over all logits of the texts `max_logit_difference`, `mean_logit_difference` (merged against adapter
        model, both in the base's compute dtype) and `mean_adapter_effect` (adapter model against bare base),
        all absolute.

    Raises:
        InputError: an adapter that is no plain LoRA or is made for another model, a folder that holds
            something else, too little disk, or a sum that `dtype` cannot hold.
    """
    output_dir, adapter_dir = Path(output_dir), Path(adapter_dir)
    check_output(output_dir, model=loaded.source.name, adapter=adapter_dir, overwrite=overwrite)
    guard_cpu_packing(loaded.model)
    updates = low_rank_updates(adapter_dir)
    texts = TEXTS if verify_rows is None else tuple(verify_rows)
    inputs = [loaded.tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    with_adapter, without_adapter = _adapter_logits(loaded, adapter_dir, inputs)

    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        size = write_weights(loaded.model, updates, partial, dtype)
        write_settings(loaded.model, loaded.tokenizer, partial, dtype)
        merged = _saved_logits(partial, inputs, loaded.compute_dtype, loaded.model.device)
        difference = _distances(merged, with_adapter)
        report = {
            "model": loaded.source.name,
            "adapter": str(adapter_dir.resolve()),
            "base": "dequantized" if loaded.quantized else "original",
            "dtype": str(dtype).removeprefix("torch."),
            "modules": len(updates),
            "bytes": size,
            "max_logit_difference": difference.max().item(),
            "mean_logit_difference": difference.mean().item(),
            "mean_adapter_effect": _distances(with_adapter, without_adapter).mean().item(),
        }
        (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if output_dir.exists():
            shutil.rmtree(output_dir)
        partial.rename(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def check_output(output_dir: Path, *, model: str, adapter: Path, overwrite: bool) -> None:
    """Refuses a folder whose content is not ours to replace.

    Raises:
        InputError: a file; a folder that holds the adapter or the base; without `overwrite`, a folder with
            anything but a previous merge of the same model and adapter.
    """
    here = output_dir.resolve()
    for source in (adapter, Path(model)):
        if source.exists() and (here == source.resolve() or here in source.resolve().parents):
            raise InputError(f"{output_dir}: holds {source}, which the merge reads; choose another output folder.")
    if output_dir.is_file():
        raise InputError(f"{output_dir}: is a file; choose a folder.")
    if overwrite or not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    try:
        report = json.loads((output_dir / REPORT).read_text(encoding="utf-8"))
        same = (report["model"], report["adapter"]) == (model, str(adapter.resolve()))
    except (OSError, ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise InputError(f"{output_dir}: not a merge of {model} with {adapter}; pass --overwrite to replace it.")


def low_rank_updates(adapter_dir: str | Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Full module name → (A (r, in), B (out, r), scaling) of a saved plain PEFT LoRA, on the CPU in fp32."""
    config = read_config(adapter_dir)
    pairs = paired(read_tensors(adapter_dir), adapter_dir)
    return {name: (A.float(), B.float(), scaling_of(config, name)) for name, (A, B) in pairs.items()}


def merged_weight(base: nn.Module, update: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """W + s · B A of one linear map, (out, in) in fp32 on the device of the base."""
    weight = dequantize(base, torch.float32)
    if update is None:
        return weight
    A, B, s = update
    return weight + s * (B.to(weight.device) @ A.to(weight.device))


def write_weights(
    model: nn.Module, updates: Mapping[str, tuple[Tensor, Tensor, float]], folder: Path, dtype: torch.dtype
) -> int:
    """Writes the merged weights as safetensors shards with their index, one shard in memory at a time;
    returns bytes.

    Raises:
        InputError: too little room on the disk, or a value beyond the range of `dtype`.
    """
    maps = linear_maps(model)
    plain = {
        name: parameter for name, parameter in model.named_parameters() if name.removesuffix(".weight") not in maps
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in plain.items()}
    shapes |= {f"{name}.weight": (module.out_features, module.in_features) for name, module in maps.items()}
    layout = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in sorted(shapes.items())},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )
    size = int(layout.metadata["total_size"])
    if (free := shutil.disk_usage(folder).free) < size:
        raise InputError(
            f"{folder.parent}: the merge takes {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free."
        )

    def tensor(name: str) -> Tensor:
        if name in plain:
            value = plain[name].detach()
        else:
            module = name.removesuffix(".weight")
            value = merged_weight(maps[module], updates.get(module))
        rounded = value.to(dtype).cpu().contiguous()
        if not torch.isfinite(rounded).all():
            raise InputError(f"{name}: a merged value is beyond the range of {dtype}; pass --dtype bfloat16.")
        return rounded

    for file, names in layout.filename_to_tensors.items():
        save_file({name: tensor(name) for name in names}, str(folder / file), metadata={"format": "pt"})
    if layout.is_sharded:
        index = {"metadata": layout.metadata, "weight_map": layout.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return size


def write_settings(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Writes config (without quantization_config), generation config and tokenizer."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.use_cache = True
    config.save_pretrained(folder)
    if model.generation_config is not None:
        generation = copy.deepcopy(model.generation_config)
        # Published files (LLaMA-2's) set temperature or top_p without do_sample, which strict saving refuses.
        if (generation.temperature or 1.0) != 1.0 or (generation.top_p or 1.0) != 1.0:
            generation.do_sample = True
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _adapter_logits(
    loaded: LoadedBase, adapter_dir: Path, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """fp32 logits with the adapter and without it; the base is left without one."""
    training = loaded.model.training
    without_adapter = list(_logits(loaded.model, inputs))
    peft_model = load_adapter(loaded.model, adapter_dir)
    try:
        with_adapter = list(_logits(peft_model, inputs))
    finally:
        peft_model.unload()
        loaded.model.train(training)
    return with_adapter, without_adapter


@torch.no_grad()
def _saved_logits(
    folder: Path, inputs: Sequence[Tensor], compute_dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """fp32 logits of the model read back from its folder, computed as the adapter model's are."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=compute_dtype)
    return list(_logits(model.to(device), inputs))


def _distances(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Absolute differences of two lists of logits, as one vector."""
    return torch.cat([(a - b).abs().flatten() for a, b in zip(left, right, strict=True)])


def _logits(model: Any, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    model.eval()
    for input_ids in inputs:
        yield model(input_ids=input_ids.to(model.device), use_cache=False).logits.float().cpu()
