"""An adapter alone, in the forms that other tools read.

    peft           rank_pattern and alpha_pattern with full names: PEFT
    peft-uniform   one rank, zero-padded, alpha = rank, scaling folded into B: PEFT, vLLM, and llama.cpp's converter
    gguf-lora      the same as GGUF: llama.cpp (--lora) and Ollama (ADAPTER)

PEFT divides alpha by each module's rank, vLLM by the one global r, llama.cpp by each tensor's own rank: of one rank,
all three compute the same function.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from qalora.adapter.provenance import read_provenance
from qalora.adapter.saved import PREFIX, read_adapter, whole
from qalora.base.checkpoint import open_config
from qalora.base.families import in_decoder
from qalora.base.registry import ModelSource
from qalora.base.structure import structure_of
from qalora.card_files import keep_users_card, write_card
from qalora.deploy.merging import low_rank_updates
from qalora.deploy.output import REPORT, check_output, one_at_a_time
from qalora.deploy.settings import served_after
from qalora.deploy.verification import Update
from qalora.files import written_beside
from qalora.results.card import exported_card

AdapterFormat = Literal["peft", "peft-uniform", "gguf-lora"]
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


@one_at_a_time
def export_adapter(
    adapter_dir: str | Path,
    output_dir: str | Path,
    format: AdapterFormat,
    *,
    source: ModelSource,
    overwrite: bool = False,
) -> dict[str, object]:
    """Writes the adapter in another form, reads it back, and compares every module's s · B A.

    Returns:
        What `merge.json` in the folder holds: among others the rank, and the largest difference of an element of s · B
        A relative to the largest element.

    Raises:
        InputError: no plain LoRA, made for another model, or an output folder that holds something else.
        RuntimeError: what was written does not read back as the same function.
    """
    adapter_dir, output_dir = Path(adapter_dir), Path(output_dir)
    check_output(output_dir, model=source.name, adapter=adapter_dir, overwrite=overwrite)
    model_config = open_config(source)
    adapter = read_adapter(adapter_dir).fitted(structure_of(model_config).adapted)
    updates = low_rank_updates(adapter)
    written = updates if format == "peft" else uniform(updates)
    with written_beside(output_dir) as partial:
        if format == "gguf-lora":
            from qalora.deploy import gguf
            from qalora.deploy.modelfile import write_modelfile

            # llama.cpp has the text part of a vision model as a model of its own.
            updates, written = ({in_decoder(name): it for name, it in of.items()} for of in (updates, written))
            gguf.write_adapter(partial / "adapter.gguf", written, model_config)
            served = served_after(source, model_config, adapter_dir)
            write_modelfile(partial, served, adapter_of=source.hub_id or source.name)
            found = gguf.read_adapter(partial / "adapter.gguf", list(updates), model_config)
        else:
            write_peft(partial, adapter.config, written)
            if provenance := read_provenance(adapter_dir):
                provenance.write(partial)
            found = low_rank_updates(read_adapter(partial))
        difference = largest_difference(updates, found)
        if difference > 1e-6:
            raise RuntimeError(f"{output_dir}: the export does not compute what {adapter_dir} does ({difference:.1e})")
        rank = max(len(A) for A, _, _ in written.values())
        report = {
            "model": source.name,
            "adapter": str(adapter_dir.resolve()),
            "format": format,
            "modules": len(written),
            "rank": rank,
            "max_lora_rank": next((r for r in VLLM_RANKS if r >= rank), None),
            "relative_difference": difference,
        }
        (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if not keep_users_card(output_dir, partial):
            write_card(partial, exported_card(partial, adapter_dir, output_dir.resolve().name))
    return report


def uniform(updates: Mapping[str, Update]) -> dict[str, Update]:
    """Every module at the largest rank, padded with zeros, its scaling folded into B and 1 from then on."""
    rank = max(len(A) for A, _, _ in updates.values())
    return {
        name: (F.pad(A, (0, 0, 0, rank - len(A))), F.pad(s * B, (0, rank - len(A))), 1.0)
        for name, (A, B, s) in updates.items()
    }


def write_peft(folder: Path, config: LoraConfig, updates: Mapping[str, Update]) -> None:
    """A PEFT folder with these updates; what else the adapter's config says stays."""
    config = copy.copy(config)
    ranks = {name: len(A) for name, (A, _, _) in updates.items()}
    alphas = {name: whole(s * ranks[name]) for name, (_, _, s) in updates.items()}
    config.r = max(ranks.values())
    config.lora_alpha = max(alphas.values())
    one = len(set(ranks.values())) == len(set(alphas.values())) == 1
    config.rank_pattern, config.alpha_pattern = ({}, {}) if one else (ranks, alphas)
    config.use_rslora = False
    config.inference_mode = True
    config.save_pretrained(str(folder))
    tensors: dict[str, Tensor] = {}
    for name, (A, B, _) in updates.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.contiguous()
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def largest_difference(left: Mapping[str, Update], right: Mapping[str, Update]) -> float:
    """Of an element of s · B A, relative to the largest, over all modules.

    Raises:
        RuntimeError: other modules.
    """
    if left.keys() != right.keys():
        raise RuntimeError(f"other modules: {sorted(left.keys() ^ right.keys())[:3]}")
    worst = largest = 0.0
    for name, (A, B, s) in left.items():
        product = s * (B @ A)
        A2, B2, s2 = right[name]
        largest = max(largest, product.abs().max().item())
        worst = max(worst, torch.addmm(product, B2, A2, alpha=-s2).abs().max().item())
    return worst / largest if largest else 0.0
