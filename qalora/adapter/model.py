"""Attach adapters to a frozen base, list and count them, keep PEFT's config in step, save and load.

What reaches the disk is a plain PEFT LoRA: vanilla PEFT reads it without this package.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qalora.adapter.attention import use_fused_attention
from qalora.adapter.layer import GatedLinear
from qalora.adapter.swiglu import use_fused_mlps
from qalora.base.quantized import guard_cpu_packing, linear_maps
from qalora.base.registry import ModelSource, shape_of
from qalora.errors import InputError

ADAPTER = "default"
PREFIX = "base_model.model."


def attach(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> PeftModel:
    """A rank-`r` adapter on every targeted linear map: rows of A Kaiming-uniform as in PEFT, B zero.

    Raises:
        InputError: a target that no linear map of the model ends with.
    """
    maps = linear_maps(model)
    suffixes = {name.rsplit(".", 1)[-1] for name in maps}
    targets = suffixes if target_modules == "all-linear" else set(target_modules)
    if unknown := sorted(targets - suffixes):
        raise InputError(
            f"lora.target_modules={', '.join(unknown)}: the model has no such linear map; it has {', '.join(sorted(suffixes))}."
        )
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(targets), task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _with_gated_layers(model, config)


def load_adapter(model: PreTrainedModel, path: str | Path, *, trainable: bool = False) -> PeftModel:
    """Puts a saved plain PEFT LoRA (ours or any other) on the base, with gates, weights in fp32.

    Raises:
        InputError: not an adapter, not a plain LoRA, made for another model, or with a weight that is not finite.
    """
    config, pairs = read_config(path), paired(read_tensors(path), path)
    check_fit(config, pairs, {name: (m.in_features, m.out_features) for name, m in linear_maps(model).items()}, path)
    config.inference_mode = not trainable
    config.init_lora_weights = True  # the start is overwritten below, and some need more than a config (EVA)
    peft_model = _with_gated_layers(model, config)
    layers = gated_layers(peft_model)
    if missing := sorted(set(layers) - set(pairs)):
        raise InputError(f"{path}: the config targets {missing[0]} but the file has no weights for it.")
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            layers[name].A.copy_(A)
            layers[name].B.copy_(B)
    return peft_model


def save_adapter(model: PeftModel, path: str | Path) -> None:
    """Writes the adapter as a plain PEFT LoRA, beside its place and moved there once it has been read back equal.

    Raises:
        RuntimeError: the adapter is empty, not finite or untrained (every B zero), or the file does not read back equal.
    """
    path = Path(path)
    layers = gated_layers(model)
    if not layers:
        raise RuntimeError("every rank was pruned: there is no adapter to save; set allocation.min_rank=1")
    if not all(bool(torch.isfinite(layer.A).all() & torch.isfinite(layer.B).all()) for layer in layers.values()):
        raise RuntimeError("the adapter holds weights that are not finite: it is not saved")
    if not any(bool(layer.B.any()) for layer in layers.values()):
        raise RuntimeError("the adapter is untrained (every B is zero): it is not saved")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_adapter(model, partial)
    replaced = path.with_name(path.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def write_adapter(model: PeftModel, path: str | Path) -> None:
    """Writes the adapter into a folder and reads it back.

    Raises:
        RuntimeError: the file does not read back equal.
    """
    # Left to itself, PEFT asks the Hub at every save whether the vocabulary has grown.
    model.save_pretrained(str(path), save_embedding_layers=False)
    verify_saved(model, path)


def verify_saved(model: PeftModel, path: str | Path) -> None:
    """Compares a saved adapter with the live one: every tensor, and every rank and scaling that PEFT will derive.

    Raises:
        RuntimeError: any difference.
    """
    saved, layers = paired(read_tensors(path), path), gated_layers(model)
    if saved.keys() != layers.keys():
        raise RuntimeError(f"{path}: holds other modules than the model: {sorted(saved.keys() ^ layers.keys())[:3]}")
    config = read_config(path)
    for name, layer in layers.items():
        A, B = saved[name]
        if not (torch.equal(A, layer.A.detach().cpu()) and torch.equal(B, layer.B.detach().cpu())):
            raise RuntimeError(f"{path}: the weights of {name} do not read back equal")
        if (rank_of(config, name), scaling_of(config, name)) != (len(A), layer.s):
            raise RuntimeError(f"{path}: the config gives {name} another rank or scaling than it has")


def gated_layers(model: PeftModel) -> dict[str, GatedLinear]:
    """Full module name, as rank_pattern writes it → layer, in the model's order."""
    return {
        name.removeprefix(PREFIX): module for name, module in model.named_modules() if isinstance(module, GatedLinear)
    }


def ranks(model: PeftModel) -> dict[str, int]:
    """Full module name → its present rank."""
    return {name: len(layer.A) for name, layer in gated_layers(model).items()}


def rank_parameters(model: PeftModel, names: Iterable[str]) -> dict[str, int]:
    """Full module name → parameters of one rank: a row of A and a column of B."""
    base: Any = model.get_base_model()
    maps = {name: base.get_submodule(name) for name in names}
    return {name: module.in_features + module.out_features for name, module in maps.items()}


def sync_config(model: PeftModel) -> None:
    """Writes the present ranks into the LoraConfig, so that whatever PEFT saves can be loaded again.

    Every module has a full-name entry in rank_pattern and in alpha_pattern (alpha = scaling · rank). Modules that lost
    all their ranks carry no layer and are listed in exclude_modules, for PEFT refuses a rank of 0.
    """
    config = cast(LoraConfig, model.peft_config[ADAPTER])
    layers = gated_layers(model)
    if not layers:
        return
    s = next(iter(layers.values())).s
    config.r = max(ranks(model).values())
    config.lora_alpha = _whole(s * config.r)
    config.rank_pattern = ranks(model)
    config.alpha_pattern = {name: _whole(layer.s * len(layer.A)) for name, layer in layers.items()}
    config.use_rslora = False  # its scaling would follow the rank; the patterns hold whatever scaling it gave
    config.exclude_modules = None
    bare = [name for name in linear_maps(model) if name not in layers and check_target_module_exists(config, name)]
    config.exclude_modules = bare or None


def remove_layer(model: PeftModel, name: str) -> None:
    """Puts the frozen map back in the place of its gated layer."""
    parent, _, child = (PREFIX + name).rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, getattr(owner, child).base_layer)


# ------------------------------------------------------------------------------------------------ files of any PEFT LoRA


def read_config(path: str | Path) -> LoraConfig:
    """The LoraConfig of a saved adapter.

    Raises:
        InputError: no adapter there, or a variant of LoRA whose function is not s · B A x.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        raise InputError(f"{path}: not an adapter, there is no adapter_config.json.")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{file}: not valid JSON.") from None
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type is not LORA; only plain LoRA adapters work.")
    variants = (
        "use_dora", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
        "alora_invocation_tokens", "modules_to_save", "lora_bias", "layer_replication", "trainable_token_indices",
        "target_parameters",
    )  # fmt: skip
    for variant in variants:
        if fields.get(variant):
            raise InputError(f"{file}: {variant} is set; only plain LoRA adapters work.")
    start = str(fields.get("init_lora_weights")).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise InputError(
            f"{file}: init_lora_weights={start} took weights out of the base, and the adapter only fits what it left; save it "
            "with PEFT's path_initial_model_for_weight_conversion, or set it to true if --model is the base that was left."
        )
    return LoraConfig.from_pretrained(str(path))


def check_fit(
    config: LoraConfig,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    maps: Mapping[str, tuple[int, int]],
    path: str | Path,
) -> None:
    """
    Args:
        config, pairs: of the adapter, see `read_config` and `paired`.
        maps: full module name → (in, out) of every linear map of the model's blocks.

    Raises:
        InputError: the adapter has a module that the model lacks, or another shape for it, or a rank that is another by its config.
    """
    for name, (A, B) in pairs.items():
        if name not in maps:
            raise InputError(
                f"{path}: the adapter has weights for {name}, which the model lacks; it was made for another model."
            )
        if (A.shape[1], B.shape[0]) != maps[name]:
            raise InputError(
                f"{path}: {name} is {(B.shape[0], A.shape[1])} in the adapter and {maps[name][::-1]} in the model (out, in); "
                "it was made for another model."
            )
        if len(A) != rank_of(config, name):
            raise InputError(f"{path}: {name} has rank {len(A)} in the file and {rank_of(config, name)} by the config.")


def check_adapter(path: str | Path, source: ModelSource) -> None:
    """Refuses, before the base is loaded, an adapter that could not be put on it.

    Raises:
        InputError: not an adapter, not a plain LoRA, made for another model, or with a weight that is not finite.
    """
    check_fit(read_config(path), paired(read_tensors(path), path), shape_of(source).linear_maps(), path)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of adapter_model.safetensors, on the CPU.

    Raises:
        InputError: no such file (pickled adapter_model.bin is not read), or a weight that is not finite.
    """
    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"{path}: there is no adapter_model.safetensors.")
    try:
        tensors = load_file(str(file))
    except Exception as error:  # safetensors raises its own class, which older versions do not export
        raise InputError(f"{file}: not a safetensors file ({error}).") from None
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{file}: {key} holds a value that is not finite (NaN or infinite).")
    return tensors


def paired(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Full module name → (A, B) of the tensors of a saved adapter.

    Raises:
        InputError: a tensor that is neither an A nor a B of a linear map, or lacks its partner.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if kind not in ("lora_A", "lora_B") or tensor.ndim != 2:
            raise InputError(f"{path}: {key} is not a LoRA matrix of a linear map; only plain LoRA adapters work.")
        pairs.setdefault(module, {})[kind] = tensor
    for module, pair in pairs.items():
        if len(pair) != 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise InputError(f"{path}: lora_A and lora_B of {module} do not belong together.")
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in pairs.items()}


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank that PEFT gives the module; every entry of the pattern that we write is a full name."""
    return int(_first_match(config.rank_pattern or {}, name, config.r))


def scaling_of(config: LoraConfig, name: str) -> float:
    """The scaling that PEFT derives for the module: alpha / r, or alpha / √r for rsLoRA."""
    rank, alpha = rank_of(config, name), _first_match(config.alpha_pattern or {}, name, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _first_match(pattern: Mapping[str, float], name: str, default: float) -> float:
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), name), default)


def _whole(alpha: float) -> Any:
    return int(alpha) if float(alpha).is_integer() else alpha


def _with_gated_layers(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    from bitsandbytes.nn import Linear4bit

    guard_cpu_packing(model)
    config._register_custom_module({Linear4bit: GatedLinear, nn.Linear: GatedLinear})
    peft_model = get_peft_model(model, config, adapter_name=ADAPTER)
    for layer in gated_layers(peft_model).values():
        layer.A.data, layer.B.data = layer.A.data.float(), layer.B.data.float()
    use_fused_mlps(peft_model)
    use_fused_attention(peft_model)
    return peft_model
