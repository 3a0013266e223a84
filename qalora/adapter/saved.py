"""A plain PEFT LoRA as it lies on the disk, ours or any other: read, and checked against the model it is put on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from qalora.base.registry import ModelSource, read_fields, shape_of
from qalora.errors import InputError

PREFIX = "base_model.model."  # of every name in the file


@dataclass(frozen=True)
class SavedAdapter:
    """
    Attributes:
        path: its folder.
        pairs: full module name → (A (r, in), B (out, r)), on the CPU, in the dtype of the file.
    """

    path: Path
    config: LoraConfig
    pairs: dict[str, tuple[Tensor, Tensor]]

    @property
    def total_rank(self) -> int:
        return sum(len(A) for A, _ in self.pairs.values())

    def check_fit(self, maps: Mapping[str, tuple[int, int]]) -> None:
        """
        Args:
            maps: full module name → (in, out) of every linear map of the model's blocks.

        Raises:
            InputError: the adapter has a module that the model lacks, or another shape for it, or a rank that is another by its config.
        """
        for name, (A, B) in self.pairs.items():
            if name not in maps:
                raise InputError(
                    f"{self.path}: the adapter has weights for {name}, which the model lacks; it was made for another model."
                )
            if (A.shape[1], B.shape[0]) != maps[name]:
                raise InputError(
                    f"{self.path}: {name} is {(B.shape[0], A.shape[1])} in the adapter and {maps[name][::-1]} in the model (out, in); "
                    "it was made for another model."
                )
            if len(A) != rank_of(self.config, name):
                raise InputError(
                    f"{self.path}: {name} has rank {len(A)} in the file and {rank_of(self.config, name)} by the config."
                )


def read_adapter(path: str | Path) -> SavedAdapter:
    """
    Raises:
        InputError: no adapter there, a variant of LoRA whose function is not s · B A x, or a weight that is not finite.
    """
    return SavedAdapter(Path(path), read_config(path), _paired(_read_tensors(path), path))


def check_adapter(path: str | Path, source: ModelSource) -> SavedAdapter:
    """Reads an adapter, and refuses, before the base is loaded, one that could not be put on it.

    Raises:
        InputError: as `read_adapter`, or the adapter was made for another model.
    """
    adapter = read_adapter(path)
    adapter.check_fit(shape_of(source).linear_maps())
    return adapter


def read_config(path: str | Path) -> LoraConfig:
    """The LoraConfig of a saved adapter.

    Raises:
        InputError: no adapter there, or a variant of LoRA whose function is not s · B A x.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        raise InputError(f"{path}: not an adapter, there is no adapter_config.json.")
    fields = read_fields(file)
    if fields.get("peft_type") != "LORA":
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
    _check_numbers(fields, file)
    return LoraConfig.from_pretrained(str(path))


def _check_numbers(fields: Mapping[str, Any], file: Path) -> None:
    patterns = {name: fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise InputError(f"{file}: {name} is {type(pattern).__name__}, not numbers by module.")
        for key in pattern:
            try:
                re.compile(key)
            except re.error:
                raise InputError(f"{file}: {name} has {key!r}, which is no regular expression.") from None
    numbers = {name: fields[name] for name in ("r", "lora_alpha") if name in fields}
    numbers |= {f"{name} of {key}": value for name, pattern in patterns.items() for key, value in pattern.items()}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise InputError(f"{file}: {name} is {value!r}, not a number above 0.")


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank that PEFT gives the module; every entry of the pattern that we write is a full name."""
    return int(_first_match(config.rank_pattern or {}, name, config.r))


def scaling_of(config: LoraConfig, name: str) -> float:
    """The scaling that PEFT derives for the module: alpha / r, or alpha / √r for rsLoRA."""
    rank, alpha = rank_of(config, name), _first_match(config.alpha_pattern or {}, name, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def whole(alpha: float) -> Any:
    """An alpha as PEFT's config declares it: an integer where it is one."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _read_tensors(path: str | Path) -> dict[str, Tensor]:
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


def _paired(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
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


def _first_match(pattern: Mapping[str, float], name: str, default: float) -> float:
    return pattern.get(get_pattern_key(list(pattern), name), default)
