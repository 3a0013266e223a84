"""What the benches share: what they ran on, real models, models of any shape with random weights, and tables."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback

from qalora.base.quantized import guard_cpu_packing, linear_maps, quantized
from qalora.base.registry import ModelShape

RESULTS = Path(__file__).parent / "results"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def environment() -> dict[str, Any]:
    """Device, versions, date and the commit, for whoever repeats the measurement."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{torch.get_num_threads()} CPU threads, {_cpu()}"
    return {
        "device": device,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def commit() -> str | None:
    """Of the checkout; None where there is no git, or no checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.strip() or None


def random_llama(shape: ModelShape, *, device: str, compute_dtype: torch.dtype) -> PreTrainedModel:
    """A frozen 4-bit LLaMA with random weights, made one map at a time on the device. Only good for cost."""
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tie_word_embeddings,
        max_position_embeddings=1 << 20,
        use_cache=False,
        dtype=compute_dtype,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, linear in linear_maps(model).items():
        linear.weight = nn.Parameter(0.02 * torch.randn(linear.weight.shape, device=device, dtype=compute_dtype))
        parent, _, child = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            child,
            quantized(linear, quant_type="nf4", double_quant=True, compute_dtype=compute_dtype),
        )
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.ones if parameter.ndim == 1 else lambda *a, **k: 0.02 * torch.randn(*a, **k)
                module._parameters[name] = nn.Parameter(value(parameter.shape, device=device, dtype=compute_dtype))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    guard_cpu_packing(model)
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one set of columns → a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *[[_shown(row[name]) for name in head] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_results(name: str, results: Mapping[str, Any], text: str, folder: Path = RESULTS) -> None:
    """FOLDER/NAME.json and .md, each whole or as it was, and the table on standard output."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in (("json", json.dumps(results, indent=1) + "\n"), ("md", text)):
        part = folder / f"{name}.{kind}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(folder / f"{name}.{kind}")
    print(text)


def reset_peak() -> int:
    """Starts the peak anew, and returns the present resident set in bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_rss() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


class AllocateAdaLora(TrainerCallback):
    """What AdaLoRA's users have to call after every step, while the gradients are there."""

    def __init__(self, model: Any):
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.base_model.update_and_allocate(state.global_step + 1)
